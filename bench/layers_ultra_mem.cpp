#include "lithe/layers/memory/product_keys.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
#include "lithe/layers/mixture_of_experts.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t heads = 2, key_width = 160;  // of one axis, over all ranks

/// Scoring and selection alone, of 512 tokens: product keys ...
void product_search(benchmark::State& state) {
  runner run(state.range(2));
  const index_t n = state.range(0), m = state.range(1), T = 512;
  lithe::product_keys<float> keys({.heads = heads, .sub_keys = n, .width = key_width, .top_k = m});
  prepack(keys);
  inputs q(4, T, 2 * heads * key_width);
  matrix<slot_t> pairs(T, keys.picks());
  matrix<float> scores(T, keys.picks());
  keys.search(q.next(), pairs, scores, run.ctx);
  for (auto _ : state) {
    keys.search(q.next(), pairs, scores, run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, T);
}
/// ... and Tucker keys of rank 2 whose ranks share that width.
void tucker_search(benchmark::State& state) {
  runner run(state.range(2));
  const index_t n = state.range(0), m = state.range(1), T = 512;
  lithe::tucker_keys<float> keys({.heads = heads, .sub_keys = n, .width = key_width / 2, .top_k = m}, key);
  prepack(keys);
  inputs q(4, T, keys.blocks() * key_width / 2);
  matrix<slot_t> pairs(T, keys.picks());
  matrix<float> scores(T, keys.picks() * keys.config.cores);
  const lithe::tucker_keys<float>::prepared prepared(keys, false, run.ctx);
  const auto search = [&] { keys.search(q.next(), prepared, pairs, scores, run.ctx); };
  search();
  for (auto _ : state) {
    search();
    benchmark::ClobberMemory();
  }
  count(state, T);
}

// The specification's set for the race on a CPU: about 40 million numbers in each, 2.6 million active.
constexpr index_t features = 512;
const lithe::mixture_of_experts<float>& experts() {
  static const auto l = [] {
    lithe::mixture_of_experts<float> made({.features = features, .hidden = 1264, .experts = 32, .top_k = 2}, key);
    lithe::prepack(made);
    return made;
  }();
  return l;
}
const lithe::ultra_mem<float>& memory() {
  static const auto l = [] {
    lithe::ultra_mem<float> made({.features = features, .sub_keys = 1352, .key_width = 80, .value_width = 256}, key);
    lithe::prepack(made);
    return made;
  }();
  return l;
}
void expert_forward(benchmark::State& state) {
  runner run(state.range(1));
  const index_t T = state.range(0);
  inputs x(cold_sets(T), T, features);
  // Experts that none of T tokens picks are not read.
  const double used = 32 * (1 - std::pow(1 - 2.0 / 32, static_cast<double>(T)));
  time_forward(state, experts(), x, run.ctx, static_cast<index_t>(used * 2 * 4 * features * 1264));
}
void memory_forward(benchmark::State& state) {
  runner run(state.range(1));
  const auto& l = memory();
  inputs x(cold_sets(state.range(0)), state.range(0), features);
  const auto cost = l.forward_cost(1);
  const auto values = static_cast<double>(l.search.picks() * 256 * 4);
  time_forward(state, l, x, run.ctx, static_cast<index_t>(cost.bytes + values * static_cast<double>(state.range(0) - 1)));
}
template <class L>
void train(benchmark::State& state, const L& layer) {
  runner run(state.range(1));
  inputs x(4, state.range(0), features);
  time_training(state, layer, x, run.ctx);
}

void search_cases(benchmark::internal::Benchmark* b) {
  b->ArgNames({"keys", "top_k", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t n : {512, 1352})
    for (const index_t m : {32, 42})
      for (const index_t workers : {1, 2}) b->Args({n, m, workers});
}
void cases(benchmark::internal::Benchmark* b, std::vector<index_t> tokens) {
  b->ArgNames({"tokens", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t t : tokens)
    for (const index_t workers : {1, 2}) b->Args({t, workers});
}
BENCHMARK(product_search)->Name("product_keys/search")->Apply(search_cases);
BENCHMARK(tucker_search)->Name("tucker_keys/search")->Apply(search_cases);
BENCHMARK(memory_forward)->Name("ultra_mem/forward")->Apply([](auto* b) { cases(b, {1, 16, 64, 512}); });
BENCHMARK(expert_forward)->Name("mixture_of_experts/forward")->Apply([](auto* b) { cases(b, {1, 16, 64, 512}); });
BENCHMARK_CAPTURE(train, ultra_mem, memory())->Name("ultra_mem/train")->Apply([](auto* b) { cases(b, {512}); });
BENCHMARK_CAPTURE(train, mixture_of_experts, experts())->Name("mixture_of_experts/train")->Apply([](auto* b) { cases(b, {512}); });

}  // namespace
