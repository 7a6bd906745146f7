// Reversible blocks against plain residual blocks of the same parts: quality, speed and what training keeps (arXiv 2001.04451).
#include "../../examples/compress_attention/compressed_model.hpp"
#include "table.hpp"

namespace {

using namespace lithe;

using compressed::batch;

constexpr index_t D = 128, H = 4, T = 256;

using attending = pre_norm<attention<real>>;
using feeding = pre_norm<feed_forward<real>>;
using plain_model = sequential<embedding<real>, stack<sequential<residual<attending>, residual<feeding>>>, layer_norm<real>, linear<real>>;
using reversible_model = reversible_language_model<reversible<attending, feeding>>;

attending attending_part(rng_key key) { return {layer_norm<real>(D), attention<real>({.inputs = D, .heads = H, .causal = true}, key)}; }
feeding feeding_part(rng_key key) {
  return {layer_norm<real>(D), feed_forward<real>({.features = D, .hidden = 4 * D, .kind = activation::gelu}, key)};
}

plain_model make_plain(index_t layers, rng_key key) {
  plain_model m;
  auto& [words, blocks, norm, last] = m.layers;
  words = embedding<real>({.tokens = byte_values, .features = D, .positions = T}, key.child(0));
  for (index_t i = 0; i < layers; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    blocks.blocks.push_back(sequential(residual<attending>{attending_part(k.child(0))}, residual<feeding>{feeding_part(k.child(1))}));
  }
  norm = layer_norm<real>(D);
  last = linear<real>({D, byte_values}, key.child(2));
  return m;
}

reversible_model make_reversible(index_t layers, rng_key key) {
  reversible_model m;
  m.words = embedding<real>({.tokens = byte_values, .features = D}, key.child(0));
  m.positions = axial_positions<real>({.shape = {T}, .widths = {D}, .deviation = 0.02}, key.child(1));
  for (index_t i = 0; i < layers; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    m.blocks.blocks.emplace_back(attending_part(k.child(0)), feeding_part(k.child(1)));
  }
  m.head = reversible_model::head_type(layer_norm<real>(2 * D), dropout<real>(0), linear<real>({2 * D, byte_values}, key.child(2)));
  return m;
}

struct outcome {
  double bits_per_byte, tokens_per_second, record_mib;
  std::int64_t skipped;  // steps of training
};

template <class Model>
outcome train(Model& model, const corpus& data, index_t steps, std::uint64_t seed, const context& ctx, const std::function<void(double)>& tell) {
  const double begin = tables::now();
  const std::int64_t skipped =
      compressed::fit(model, data, T, {.steps = steps, .warmup = 50, .rate = 3e-3, .seed = seed}, ctx, tell);
  const double seconds = tables::now() - begin;
  record_of<Model> record;
  matrix<real> logits(T, byte_values);
  context training = ctx;
  training.train = true;
  model.forward(std::span<const token_t>(data.text).first(static_cast<std::size_t>(T)), logits, record, training);
  return {compressed::bits_per_byte(model, data, T, std::numeric_limits<index_t>::max(), ctx), static_cast<double>(steps * batch * T) / seconds,
          static_cast<double>(batch) * static_cast<double>(bytes(record)) / (1 << 20), skipped};
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const corpus data(EXAMPLE_DATA "/kjv_new_testament.txt", T);
  const index_t steps = o.pick<index_t>(3, 700, 1600);
  const std::vector<index_t> depths{3, 6, 12};
  t = {.title = "Reversible blocks against plain ones",
       .source = "arXiv 2001.04451 section 5, figure 3",
       .question =
           concat(steps, " steps of ", batch, " x ", T, " bytes of the bundled text, blocks of ", D,
                  " features: held-out bits per byte, and the MiB that stand between a forward and its backward pass."),
       .columns = {"blocks", "kind", "parameters", "bits per byte", "training tokens/s", "record MiB"},
       .figures = {{.title = "Held-out bits per byte", .x = "blocks", .y = "bits per byte", .by = "kind"},
                   {.title = "Kept for the backward pass", .x = "blocks", .y = "record MiB", .by = "kind"}}};
  std::vector<outcome> plain, reversible;  // by depth
  for (std::size_t i = 0; i < 2 * depths.size(); ++i) {
    const index_t layers = depths[i / 2];
    const bool backwards = i % 2 == 1;
    const std::string kind = backwards ? "reversible" : "plain";
    const auto tell = [&](double share) {
      tables::progress(concat(layers, " ", kind, " blocks"), (static_cast<double>(i) + share) / static_cast<double>(2 * depths.size()));
    };
    const auto add = [&](auto model) {
      const outcome x = train(model, data, steps, 1000 + o.seed, ctx, tell);
      t.skipped += x.skipped;
      t.row({layers, kind, count_parameters(model), x.bits_per_byte, x.tokens_per_second, x.record_mib});
      (backwards ? reversible : plain).push_back(x);
      if (backwards && x.bits_per_byte >= plain.back().bits_per_byte + 0.02) t.last_row_is_against();
    };
    backwards ? add(make_reversible(layers, rng_key{o.seed})) : add(make_plain(layers, rng_key{o.seed}));
  }
  double worst = -std::numeric_limits<double>::infinity(), slowest = 1;
  for (std::size_t i = 0; i < depths.size(); ++i) {
    worst = std::max(worst, reversible[i].bits_per_byte - plain[i].bits_per_byte);
    slowest = std::min(slowest, reversible[i].tokens_per_second / plain[i].tokens_per_second);
  }
  t.shown = worst < 0.02 && reversible[2].record_mib < 1.1 * reversible[0].record_mib;
  t.finding = tables::sentence(
      "With ", depths[0], ", ", depths[1], " and ", depths[2], " blocks reversible ones reach ",
      reversible[0].bits_per_byte, ", ", reversible[1].bits_per_byte, " and ", reversible[2].bits_per_byte,
      " bits per byte, plain ones ", plain[0].bits_per_byte, ", ", plain[1].bits_per_byte, " and ",
      plain[2].bits_per_byte, ", at no less than ", slowest, " of their speed; ", depths[2], " reversible blocks keep ",
      reversible[2].record_mib, " MiB, plain ones ", plain[2].record_mib, ".");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
