// Trained from scratch to say words from their letters: collaborative heads against plain heads of the same total key width (arXiv 2006.16362,
// the translation table of its first version: at equal width collaborative heads are no worse, and the gap grows as the width falls).
#include "../../examples/compress_attention/compressed_model.hpp"
#include "table.hpp"

namespace {

using namespace lithe;

constexpr index_t D = 128, H = 8, head_width = 32, full_width = H * head_width, layers = 2, T = 64;

/// The lines of the bundled pronunciation dictionary (word, tab, phones) in a random order: a model that continues them translates letters to phones.
corpus shuffled_dictionary() {
  const std::string path = EXAMPLE_DATA "/g2p_cmudict.tsv";
  std::ifstream file(path);
  std::vector<std::pair<double, std::string>> lines;
  for (std::string line; std::getline(file, line);) lines.emplace_back(uniform(rng_key{11}, lines.size()), line + '\n');
  std::ranges::sort(lines);
  std::vector<token_t> text;
  for (const auto& [_, line] : lines) text.insert(text.end(), line.begin(), line.end());
  return {std::move(text), T, path};
}

/// `shared` = false: heads of width r / H each, whose mixing matrix is one-hot blocks and stays so. Both scale scores by the width that they have:
/// shared heads trained from scratch at the scale of wider ones start with scores too small to learn from.
compressed::model make_model(index_t r, bool shared, std::uint64_t seed) {
  const rng_key key{seed};
  stack<compressed::part> parts;
  for (index_t i = 0; i < layers; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    const collaborative_attention_config c{.inputs = D,
                                           .heads = H,
                                           .key_width = r,
                                           .causal = true,
                                           .mixing = shared ? mixing_start::xavier_uniform : mixing_start::concatenate,
                                           .scale = std::sqrt(static_cast<double>(H) / static_cast<double>(r))};
    const auto add = [&](compressed::layer l) { parts.blocks.push_back({sequential(layer_norm<real>(D), std::move(l), dropout<real>(0))}); };
    add(collaborative_attention<real>(c, k.child(0)));
    add(feed_forward<real>({.features = D, .hidden = 2 * D, .kind = activation::gelu}, k.child(1)));
  }
  return compressed::model(embedding<real>({.tokens = byte_values, .features = D, .positions = T, .deviation = 1}, key.child(0)), std::move(parts),
                           layer_norm<real>(D), linear<real>({D, byte_values}, key.child(1)));
}

struct spread {
  double mean = 0, deviation = 0;
};
spread spread_of(const std::vector<double>& x) {
  spread s;
  for (const double v : x) s.mean += v / static_cast<double>(x.size());
  for (const double v : x) s.deviation += (v - s.mean) * (v - s.mean) / static_cast<double>(std::max<std::size_t>(2, x.size()) - 1);
  s.deviation = std::sqrt(s.deviation);
  return s;
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const corpus data = shuffled_dictionary();
  const index_t steps = o.pick<index_t>(3, 3200, 8000), seeds = o.pick<index_t>(2, 2, 5), pieces = o.pick<index_t>(4, 500, 500);
  t = {.title = "Key width, shared or divided among the heads",
       .source = "arXiv 2006.16362, first version, table 2",
       .question =
           concat(steps, " steps of ", compressed::batch, " x ", T, " bytes of the bundled pronunciation dictionary, ",
                  layers, " layers of ", D, " features and ", H, " heads of ", head_width, " at full width, ", seeds,
                  " seeds, the first of which chooses the learning rate: held-out bits per byte."),
       .columns = {"heads", "key width", "bits per byte", "deviation", "learning rate", "parameters"},
       .figures = {
           {.title = "Held-out bits per byte", .x = "key width", .y = "bits per byte", .by = "heads", .log_x = true}}};
  struct run {
    index_t r;
    bool shared;
  };
  const index_t quarter = full_width / 4, eighth = full_width / 8, sixteenth = full_width / 16;
  const std::vector<run> all{{full_width, false}, {quarter, false},   {quarter, true},  {eighth, false},
                             {eighth, true},      {sixteenth, false}, {sixteenth, true}};
  std::map<std::pair<index_t, bool>, spread> found;
  const std::array<double, 2> rates{3e-3, 6e-3};
  index_t done = 0;
  for (const run& a : all) {
    index_t parameters = 0;
    const auto train = [&](index_t seed, double rate) {
      auto model = make_model(a.r, a.shared, o.seed + static_cast<std::uint64_t>(seed));
      parameters = count_parameters(model);
      compressed::fit_options how{.steps = steps, .warmup = 50, .rate = rate, .seed = 1000 + o.seed + static_cast<std::uint64_t>(seed)};
      if (!a.shared) how.groups.push_back({.pattern = "*mixing", .rate = 0, .weight_decay = 0});
      t.skipped += compressed::fit(model, data, T, how, ctx, [&](double part) {
        tables::progress(concat(a.shared ? "collaborative" : "plain", ", width ", a.r, ", seed ", seed, ", rate ", rate),
                         (static_cast<double>(done) + part) / static_cast<double>(std::ssize(all) * (seeds + 1)));
      });
      ++done;
      return compressed::bits_per_byte(model, data, T, pieces, ctx);
    };
    const std::array<double, 2> first{train(0, rates[0]), train(0, rates[1])};
    const std::size_t better = first[1] < first[0] ? 1 : 0;
    std::vector<double> bits{first[better]};
    for (index_t seed = 1; seed < seeds; ++seed) bits.push_back(train(seed, rates[better]));
    const spread s = found[{a.r, a.shared}] = spread_of(bits);
    t.row({a.shared ? "collaborative" : "plain", a.r, s.mean, s.deviation, rates[better], parameters});
    if (a.shared && s.mean > found[{a.r, false}].mean) t.last_row_is_against();
  }
  const auto gap = [&](index_t r) { return found[{r, false}].mean - found[{r, true}].mean; };
  const spread whole = found[{full_width, false}], shared = found[{quarter, true}];
  t.shown = gap(quarter) >= 0 && gap(eighth) >= gap(quarter) && gap(sixteenth) >= gap(eighth) &&
            shared.mean <= whole.mean + std::max(whole.deviation, shared.deviation);
  t.finding = tables::sentence(
      "Plain heads need ", gap(quarter), ", ", gap(eighth), " and ", gap(sixteenth),
      " bits per byte more than collaborative ones at 1/4, 1/8 and 1/16 of the width; collaborative at 1/4 is at ",
      shared.mean, ", plain at full width at ", whole.mean, " (deviation ", whole.deviation, ").");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
