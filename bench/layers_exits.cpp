#include "lithe/compose/adaptive_depth_decode.hpp"
#include "lithe/compose/decoder_block.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "support.hpp"

namespace {

using namespace bench;

// A decoder of six blocks over a memory of 20 rows, as in a small translation model; 16 tokens are decoded, exits are given so that cases differ in
// nothing else.
constexpr index_t blocks = 6, features = 256, hidden = 1024, classes = 1024, steps = 16, memory_rows = 20;

using attention_part = lithe::residual<lithe::sequential<lithe::layer_norm<float>, lithe::attention<float>>>;
using feed_forward_part = lithe::residual<lithe::sequential<lithe::layer_norm<float>, lithe::feed_forward<float>>>;
using block = lithe::decoder_block<attention_part, feed_forward_part>;
using model = lithe::adaptive_depth<block>;

const model& decoder() {
  static const model m = [] {
    model d;
    for (index_t n = 0; n < blocks; ++n) {
      const lithe::rng_key k = key.child(static_cast<std::uint64_t>(n));
      lithe::attention<float> attend({.inputs = features, .heads = 4, .causal = true}, k.child(0));
      lithe::feed_forward<float> feed({.features = features, .hidden = hidden}, k.child(1));
      d.stack.blocks.push_back({attention_part{lithe::sequential(lithe::layer_norm<float>(features), std::move(attend))},
                                lithe::layer_norm<float>(features),
                                lithe::cross_attention<float>({.inputs = features, .memory_inputs = features, .heads = 4}, k.child(2)),
                                lithe::dropout<float>(), feed_forward_part{lithe::sequential(lithe::layer_norm<float>(features), std::move(feed))}});
    }
    d.answers = lithe::exit_classifiers<float>({.exits = blocks, .features = features, .classes = classes}, key);
    lithe::prepack(d);
    return d;
  }();
  return m;
}

/// Exits of each step and row, of a mean of about 2: half leave after block 1, then ever fewer.
enum class depths { first, full, drawn, drawn_whole_batch };
std::vector<std::vector<std::int32_t>> exits_of(depths kind, index_t batch) {
  std::vector<std::vector<std::int32_t>> all;
  for (index_t t = 0; t < steps; ++t) {
    auto& row = all.emplace_back();
    for (index_t b = 0; b < batch; ++b) {
      std::int32_t n = kind == depths::first ? 1 : blocks;
      if (kind == depths::drawn || kind == depths::drawn_whole_batch)
        for (n = 1; n < blocks && lithe::uniform(key.child(7), static_cast<std::uint64_t>((t * batch + b) * blocks + n)) < 0.5;) ++n;
      row.push_back(n);
    }
    if (kind == depths::drawn_whole_batch) std::fill(row.begin(), row.end(), *std::max_element(row.begin(), row.end()));
  }
  return all;
}

template <depths Kind, bool Eager = false>
void decode(benchmark::State& state) {
  const index_t batch = state.range(0);
  runner run(state.range(1));
  const model& m = decoder();
  const matrix<float> memory = random_matrix(batch * memory_rows, features, 1), x = random_matrix(batch, features, 2);
  std::vector<index_t> offsets, sources;
  for (index_t b = 0; b <= batch; ++b) offsets.push_back(b * memory_rows);
  for (index_t b = 0; b < batch; ++b) sources.push_back(b);
  const lithe::memory_view<float> v{memory, {offsets}};
  const auto exits = exits_of(Kind, batch);
  auto cache = lithe::make_adaptive_cache(m, batch, steps);
  matrix<float> logits(batch, classes);
  std::vector<std::int32_t> left(static_cast<std::size_t>(batch));
  lithe::exit_rule rule;
  rule.eager = Eager;
  const auto all = [&] {
    lithe::start_memory(m, v, sources, cache);
    for (index_t b = 0; b < batch; ++b) lithe::truncate(m, cache, b, 0);
    for (const auto& row : exits) {
      rule.exits = row;
      lithe::adaptive_step(m, matrix_view<const float>(x), v, matrix_view<float>(logits), left, cache, rule, run.ctx);
    }
  };
  all();
  for (auto _ : state) all();
  count(state, batch * steps);
  double sum = 0;
  for (const auto& row : exits) sum += static_cast<double>(std::accumulate(row.begin(), row.end(), 0));
  state.counters["mean_exit"] = sum / static_cast<double>(batch * steps);
}

void cases(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "workers"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const index_t batch : {1, 32})
    for (const index_t workers : {1, 2}) b->Args({batch, workers});
}
BENCHMARK(decode<depths::full>)->Name("exits/full_depth")->Apply(cases);
BENCHMARK(decode<depths::first>)->Name("exits/first_block")->Apply(cases);
BENCHMARK(decode<depths::drawn>)->Name("exits/of_each_row")->Apply(cases);
BENCHMARK(decode<depths::drawn, true>)->Name("exits/of_each_row_eager")->Apply(cases);
BENCHMARK(decode<depths::drawn_whole_batch>)->Name("exits/slowest_row")->Apply(cases);

}  // namespace
