// Loss and decode time of UltraMem against the ratio of stored to active numbers, at equal values read by a token (arXiv 2411.12364 section 4.4).
#include "facts.hpp"
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
/// The same for facts.
tables::facts::model fact_model(index_t side, index_t top_k, rng_key key) {
  const ultra_mem_config c{.features = tables::facts::width, .sub_keys = 2 * side, .key_width = 16, .top_k = top_k};
  return tables::facts::make_model({ultra_mem<real>(c, key.child(0))}, key.child(1));
}

/// What a table of side² rows of `width` numbers is to a model of so many parameters; a token reads 2 top_k rows.
struct size {
  double table, values, active;  // active: all but the table, and of the table what a token reads
  size(index_t side, index_t top_k, index_t width, index_t parameters)
      : table(static_cast<double>(side * side * width)),
        values(static_cast<double>(2 * top_k * width)),
        active(static_cast<double>(parameters) - table + values) {}
  [[nodiscard]] double ratio() const { return table / active; }
};
size size_of(const model_config& c) { return {c.sub_keys, c.top_k, c.features / 2, count_parameters(make_model(c))}; }
size size_of_facts(index_t side, index_t top_k) {
  return {side, top_k, tables::facts::width / 2, count_parameters(fact_model(side, top_k, rng_key{0}))};
}
/// The side of the table that holds `ratio` times what a token needs; without its table a model grows in proportion to the side.
template <class F>
index_t side_of(double ratio, index_t top_k, F&& size_at) {
  const size at32 = size_at(32);
  const double slope = (size_at(64).active - at32.active) / 32;
  index_t side = top_k;
  const auto reached = [&] {
    const double s = static_cast<double>(side);
    return at32.table * s * s / 1024 >= ratio * (at32.active + slope * (s - 32));
  };
  while (!reached()) ++side;
  return side;
}

/// The cross-entropy in bits of a fact's object, after training.
double bits_of_fact(index_t side, index_t top_k, const tables::options& o, const context& ctx,
                    const std::function<void(double)>& tell, tables::table& t) {
  const rng_key key{o.seed};
  const tables::facts::corpus known(o.pick<index_t>(200, 2000, 4000), key.child(0));
  tables::facts::model m = fact_model(side, top_k, key.child(1));
  t.skipped += tables::facts::learn(m, known, {.steps = o.pick<index_t>(20, 600, 2200), .value_times = 4}, key.child(2),
                                    ctx, tell);
  return tables::facts::test(m, known, ctx).bits;
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

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const std::vector<double> ratios = o.pick<std::vector<double>>({2, 6}, {2, 6, 12, 24}, {2, 4, 6, 8, 12, 16, 24});
  const std::vector<index_t> top_ks = o.pick<std::vector<index_t>>({8}, {8, 16}, {4, 8, 16, 32});
  std::vector<tables::contender> all(1, {"dense", {}});
  all[0].config.feed_forward = "dense";
  for (const index_t k : top_ks)
    for (const double ratio : ratios)
      all.push_back(
          {concat("ratio ", ratio, ", k = ", k), memory_model(side_of(ratio, k, [&](index_t side) { return size_of(memory_model(side, k)); }), k)});
  training_config r;
  r.steps = o.pick<index_t>(3, 150, 1600);
  constexpr index_t batch = 64;

  std::vector<tables::outcome> outcomes;
  const std::int64_t skipped = tables::compare(
      all, r, o, ctx, [&](const tables::contender&, const tables::outcome& x) { outcomes.push_back(x); });
  const auto times = decode_times(all, batch, o.pick(10, 200, 200), ctx);

  t = {.title = "UltraMem: stored against active numbers",
       .source = "arXiv 2411.12364 section 4.4",
       .question = concat("What a larger table is worth and costs, at equal values read by a token: bits of a random "
                          "fact learnt by heart; ",
                          r.steps, " steps of ", r.batch, " x 256 bytes of the bundled text; then one decode step of ",
                          batch, " sequences of it."),
       .columns = {"model", "values of a token", "ratio", "million parameters", "million active", "bits of a fact",
                   "bits per byte", "us a step"},
       .figures = {
           {.title = "Bits of a fact", .x = "ratio", .y = "bits of a fact", .by = "values of a token", .log_x = true},
           {.title = "Held-out bits per byte",
            .x = "ratio",
            .y = "bits per byte",
            .by = "values of a token",
            .log_x = true},
           {.title = "Decode time", .x = "ratio", .y = "us a step", .by = "values of a token", .log_x = true}}};
  t.skipped = skipped;
  t.row({"dense", nullptr, nullptr, static_cast<double>(outcomes[0].parameters) * 1e-6, static_cast<double>(outcomes[0].parameters) * 1e-6, nullptr,
         outcomes[0].bits_per_byte, times[0]});
  double least_gain = 1e9, text_gain = 1e9, slower = 0;  // of the largest table over the smallest, the worst of all k
  std::size_t i = 1;
  for (const index_t k : top_ks) {
    const std::size_t smallest = i;
    std::vector<double> facts;
    for (const double ratio : ratios) {
      const size s = size_of(all[i].config);
      facts.push_back(bits_of_fact(
          side_of(ratio, k, [&](index_t side) { return size_of_facts(side, k); }), k, o, ctx,
          [&](double share) {
            tables::progress("facts, " + all[i].name,
                             (static_cast<double>(i - 1) + share) / static_cast<double>(all.size() - 1));
          },
          t));
      t.row({all[i].name, s.values, s.ratio(), static_cast<double>(outcomes[i].parameters) * 1e-6, s.active * 1e-6, facts.back(),
             outcomes[i].bits_per_byte, times[i]});
      if (facts.size() > 1 && facts.back() >= facts[facts.size() - 2]) t.last_row_is_against();
      ++i;
    }
    least_gain = std::min(least_gain, facts.front() - facts.back());
    text_gain = std::min(text_gain, outcomes[smallest].bits_per_byte - outcomes[i - 1].bits_per_byte);
    slower = std::max(slower, times[i - 1] / times[smallest]);
  }
  t.shown = least_gain > 0 && slower < 2;
  t.finding =
      tables::sentence("From a ratio of ", ratios.front(), " to ", ratios.back(), " a fact costs at least ", least_gain,
                       " bits less, and a step takes at most ", slower, " times as long. The loss on text ",
                       text_gain > 0 ? "falls by " : "does not fall: ", text_gain, " bits a byte at least.");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
