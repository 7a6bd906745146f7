// One model that answers after every block against models of fixed depth, on the bundled text (arXiv 1910.10073).
#include "../../examples/train_exits/exit_trainer.hpp"
#include "table.hpp"

namespace {

using namespace lithe;

constexpr index_t rows = 32;  // stretches of held-out text that are decoded side by side

model_config model_of(index_t layers, std::uint64_t seed) {
  model_config c;
  c.feed_forward = "dense";
  c.layers = layers;
  c.context = 128;
  c.seed = seed;
  return c;
}

struct outcome {
  double exit, bits_per_byte, tokens_per_second;
};

/// Held-out text, byte for byte through the decode cache, each leaving by the rule.
outcome decode(const exit_language_model& model, const exit_rule& rule, std::span<const token_t> text, index_t T, context ctx) {
  const exit_decoder model_with_rule(model.words, model.stack, {}, rule);
  auto cache = model_with_rule.make_cache(rows, T);
  std::vector<token_t> ids(rows), next(rows);
  matrix<real> logits(rows, byte_values);
  std::vector<index_t> offsets(rows + 1);
  std::iota(offsets.begin(), offsets.end(), index_t{0});
  ctx.rows = {offsets};
  double loss = 0, exits = 0, seconds = 0;
  for (index_t t = 0; t < T; ++t) {
    for (index_t i = 0; i < rows; ++i) {
      ids[static_cast<std::size_t>(i)] = text[static_cast<std::size_t>(i * T + t)];
      next[static_cast<std::size_t>(i)] = text[static_cast<std::size_t>(i * T + t + 1)];
    }
    const double begin = tables::now();
    model_with_rule.decode(ids, logits, cache, ctx);
    seconds += tables::now() - begin;
    loss += cross_entropy<real>(logits, next, {.reduce = reduction::sum}, matrix_view<real>(), ctx).loss;
    for (const auto n : cache.exits) exits += n;
  }
  const auto bytes = static_cast<double>(rows * T);
  return {exits / bytes, loss / bytes / std::numbers::ln2, bytes / seconds};
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const index_t blocks = 6, steps = o.pick<index_t>(3, 1200, 2400);
  const std::vector<token_t> text = read_text(EXAMPLE_DATA "/kjv_new_testament.txt");
  const std::size_t split = text.size() * 95 / 100;
  const auto held_out = std::span(text).subspan(split);
  t = {.title = "Adaptive depth against fixed depth",
       .source = "arXiv 1910.10073 section 5, figure 3",
       .question =
           concat(steps, " steps of 16 x 128 bytes of the bundled text: held-out bits per byte and decoding speed of ",
                  rows, " rows, by the blocks that a byte runs through."),
       .columns = {"model", "threshold", "mean exit", "bits per byte", "tokens/s"},
       .figures = {{.title = "Quality against depth", .x = "mean exit", .y = "bits per byte", .by = "model"},
                   {.title = "Decoding speed against depth", .x = "mean exit", .y = "tokens/s", .by = "model"}}};
  const std::vector<index_t> depths{1, 2, 3, 4, blocks};
  const double all = static_cast<double>(blocks + std::accumulate(depths.begin(), depths.end(), index_t{0}));  // blocks to train
  double done = 0;
  const auto trained = [&](index_t layers, exit_training_config exits, const std::string& name) {
    exit_language_model model = make_exit_model(model_of(layers, o.seed));
    exits.reduce = reduction::mean;
    support::step_guard guard(name);
    const auto tell = [&](index_t step) {
      tables::progress(name, (done + static_cast<double>(layers) * static_cast<double>(step) / static_cast<double>(steps)) / all);
    };
    train(model, model_of(layers, o.seed), {.steps = steps, .exits = exits}, std::span(text).first(split), ctx, guard,
          [&](index_t step, const auto&) { tell(step); });
    tell(steps);  // where a signal asked for the end, training ended early
    t.skipped += guard.skipped();
    done += static_cast<double>(layers);
    prepack(model);
    return model;
  };
  const auto add = [&](const exit_language_model& model, const std::string& name, const exit_rule& rule, const nlohmann::json& threshold) {
    const outcome x = decode(model, rule, held_out, 128, ctx);
    t.row({name, threshold, x.exit, x.bits_per_byte, x.tokens_per_second});
    return x;
  };
  std::vector<outcome> fixed;
  for (const index_t n : depths) {
    std::vector<double> last(static_cast<std::size_t>(n), 0.0);
    last.back() = 1;
    fixed.push_back(add(trained(n, {.weights = last}, concat("depth ", n)), "fixed depth", {}, nullptr));
  }
  const exit_language_model model =
      trained(blocks, {.alpha = 0.1, .start_step = steps * 3 / 4, .targets = {.penalty = 0.1}}, concat("depth ", blocks, " with exits"));
  for (std::int32_t n = 1; n <= blocks; ++n) add(model, "exits, all from one", {.exits = {n}}, nullptr);
  // The fixed depth that reaches a quality, between the depths that were trained; the deepest, as a lower bound, for what none of them reaches.
  const auto depth_as_good = [&](double bits) {
    for (std::size_t i = 0; i < fixed.size(); ++i)
      if (fixed[i].bits_per_byte <= bits) {
        if (i == 0) return fixed[0].exit;
        const double part = (fixed[i - 1].bits_per_byte - bits) / (fixed[i - 1].bits_per_byte - fixed[i].bits_per_byte);
        return fixed[i - 1].exit + part * (fixed[i].exit - fixed[i - 1].exit);
      }
    return fixed.back().exit;
  };
  double saved = 0, at = 0, bits = 0;  // of the exits that are as good as 3 fixed blocks
  for (const auto& [name, kind] :
       {std::pair{"exits, halting head", exit_confidence::geometric}, {"exits, top probability", exit_confidence::max_prob}})
    for (const double threshold : {0.1, 0.3, 0.5, 0.7, 0.9}) {
      const outcome x = add(model, name, {.kind = kind, .thresholds = {threshold}}, threshold);
      if (depth_as_good(x.bits_per_byte) < x.exit) t.last_row_is_against();
      if (x.bits_per_byte > fixed[2].bits_per_byte) continue;
      if (const double depth = depth_as_good(x.bits_per_byte); depth / x.exit > saved) saved = depth / x.exit, at = x.exit, bits = x.bits_per_byte;
    }
  const auto best = std::ranges::min_element(fixed, {}, &outcome::bits_per_byte);
  t.shown = saved > 1.2;
  t.finding = saved == 0 ? tables::sentence("No threshold is as good as 3 fixed blocks (", fixed[2].bits_per_byte,
                                            " bits per byte).")
                         : tables::sentence("Exits reach ", bits, " bits per byte with ", at,
                                            " blocks a byte on average, for which a model of fixed depth needs ",
                                            bits < best->bits_per_byte ? "more than " : "about ", saved * at, "; ",
                                            blocks, " fixed blocks reach ", fixed.back().bits_per_byte, ".");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
