// Loss and decode time of UltraMem against the ratio of stored to active numbers, at equal values read by a token (arXiv 2411.12364 section 4.4).
#include "language.hpp"

namespace {

using namespace lithe;

/// A model with one UltraMem layer of side² table rows, half as wide as its features.
model_config memory_model(index_t side, index_t top_k) {
  model_config c;
  c.feed_forward = "ultramem";
  c.sub_keys = side;
  c.top_k = top_k;
  return c;
}
double table_numbers(const model_config& c) { return static_cast<double>(c.sub_keys * c.sub_keys * c.features / 2); }
double values_of_token(const model_config& c) { return static_cast<double>(2 * c.top_k * c.features / 2); }
/// Numbers that a token needs: all but the table, and of the table what it reads.
double active(const model_config& c) { return static_cast<double>(count_parameters(make_model(c))) - table_numbers(c) + values_of_token(c); }
double ratio_of(const model_config& c) { return table_numbers(c) / active(c); }

/// The model whose table holds `ratio` times what a token needs; without its table a model grows in proportion to the side.
model_config of_ratio(double ratio, index_t top_k) {
  const double at32 = active(memory_model(32, top_k)), slope = (active(memory_model(64, top_k)) - at32) / 32;
  index_t side = top_k;
  const auto reached = [&] { return table_numbers(memory_model(side, top_k)) >= ratio * (at32 + slope * static_cast<double>(side - 32)); };
  while (!reached()) ++side;
  return memory_model(side, top_k);
}

/// Least us a decode step of `batch` sequences, for each model, all in turn.
std::vector<double> decode_times(const std::vector<tables::contender>& all, index_t batch, int steps, const context& base) {
  struct decoder {
    language_model model;
    cache_of<language_model> cache;
  };
  std::vector<decoder> decoders;
  std::vector<index_t> offsets(static_cast<std::size_t>(batch) + 1);
  std::iota(offsets.begin(), offsets.end(), index_t{0});
  for (const tables::contender& c : all) {
    decoders.push_back({make_model(c.config), {}});
    prepack(decoders.back().model);
    decoders.back().cache = decoders.back().model.make_cache(batch, c.config.context);
  }
  context ctx = base;
  ctx.rows = {offsets};
  std::vector<double> least(all.size(), 1e9);
  std::vector<token_t> tokens(static_cast<std::size_t>(batch));
  matrix<real> logits(batch, byte_values);
  for (int step = 0; step < steps; ++step) {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = static_cast<token_t>(uniform(rng_key{3}.child(static_cast<std::uint64_t>(step)), i) * byte_values);
    for (std::size_t i = 0; i < decoders.size(); ++i) {
      const double begin = tables::now();
      decoders[i].model.decode(tokens, logits, decoders[i].cache, ctx);
      least[i] = std::min(least[i], (tables::now() - begin) * 1e6);
    }
  }
  return least;
}

tables::table make(const tables::options& o) {
  const std::vector<double> ratios = o.pick<std::vector<double>>({2, 6}, {2, 6, 12, 24}, {2, 4, 6, 8, 12, 16, 24});
  const std::vector<index_t> top_ks = o.pick<std::vector<index_t>>({8}, {8, 16}, {4, 8, 16, 32});
  std::vector<tables::contender> all(1, {"dense", {}});
  all[0].config.feed_forward = "dense";
  for (const index_t k : top_ks)
    for (const double ratio : ratios) all.push_back({concat("ratio ", ratio, ", k = ", k), of_ratio(ratio, k)});
  training_config r;
  r.steps = o.pick<index_t>(3, 250, 1600);
  constexpr index_t batch = 64;

  std::vector<tables::outcome> outcomes;
  tables::compare(all, r, o, [&](const tables::contender&, const tables::outcome& x) { outcomes.push_back(x); });
  const parallel_executor exec(o.workers);
  workspace work(exec);
  const auto times = decode_times(all, batch, o.pick(10, 200, 200), {.exec = &exec, .work = &work});

  tables::table t{.title = "UltraMem: stored against active numbers",
                  .source = "arXiv 2411.12364 section 4.4",
                  .question = concat(r.steps, " steps of ", r.batch, " x 256 bytes of the bundled text, then one decode step of ", batch,
                                     " sequences: what a larger table is worth and costs, at equal values read by a token."),
                  .columns = {"model", "values of a token", "ratio", "million parameters", "million active", "bits per byte", "us a step"},
                  .figures = {{.title = "Held-out bits per byte", .x = "ratio", .y = "bits per byte", .by = "values of a token", .log_x = true},
                              {.title = "Decode time", .x = "ratio", .y = "us a step", .by = "values of a token", .log_x = true}}};
  double gain = 1e9, slower = 0;  // of the largest table over the smallest, the worst of all k
  for (std::size_t i = 0; i < all.size(); ++i) {
    const model_config& c = all[i].config;
    const double parameters = static_cast<double>(outcomes[i].parameters);
    if (i == 0) {
      t.row({"dense", nullptr, nullptr, parameters * 1e-6, parameters * 1e-6, outcomes[i].bits_per_byte, times[i]});
      continue;
    }
    t.row({all[i].name, values_of_token(c), ratio_of(c), parameters * 1e-6, active(c) * 1e-6, outcomes[i].bits_per_byte, times[i]});
    const std::size_t smallest = i - (i - 1) % ratios.size();
    if (i != smallest + ratios.size() - 1) continue;
    gain = std::min(gain, outcomes[smallest].bits_per_byte - outcomes[i].bits_per_byte);
    slower = std::max(slower, times[i] / times[smallest]);
  }
  t.shown = gain > 0 && slower < 2;
  t.finding = concat("From a ratio of ", ratios.front(), " to ", ratios.back(), " the loss falls by at least ", gain,
                     " bits per byte, and a step takes at most ", slower, " times as long.");
  return t;
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
