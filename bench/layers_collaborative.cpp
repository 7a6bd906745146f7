#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/collaborative_attention.hpp"
#include "support.hpp"

namespace {

using namespace bench;

// A layer of BERT-base; 0 shared dimensions: separate heads.
constexpr index_t features = 768, heads = 12;

template <class Body>
void with_layer(index_t shared, Body&& body) {
  if (shared == 0) {
    lithe::attention<float> l({.inputs = features, .heads = heads, .causal = true}, key);
    lithe::prepack(l);
    body(l);
  } else {
    lithe::collaborative_attention<float> l({.inputs = features, .heads = heads, .key_width = shared, .causal = true}, key);
    lithe::prepack(l);
    body(l);
  }
}

void forward(benchmark::State& state) {
  runner run(state.range(2));
  inputs x(1, state.range(0), features);
  with_layer(state.range(1), [&](const auto& l) { time_forward(state, l, x, run.ctx, 4 * lithe::count_parameters(l)); });
}
void training(benchmark::State& state) {
  runner run(state.range(2));
  inputs x(1, state.range(0), features);
  with_layer(state.range(1), [&](const auto& l) { time_training(state, l, x, run.ctx); });
}
/// One token behind so many in the cache.
void decode(benchmark::State& state) {
  runner run(state.range(2));
  const index_t length = state.range(0);
  const matrix<float> x = random_matrix(length, features), one = random_matrix(1, features, 2);
  matrix<float> y(1, features);
  with_layer(state.range(1), [&](const auto& l) {
    auto cache = l.make_cache(1, length + 1);
    l.fill(x, cache, run.ctx);
    const auto step = [&] {
      l.decode(one, y, cache, run.ctx);
      l.truncate(cache, 0, length);
    };
    step();
    for (auto _ : state) step();
    count(state, 1, static_cast<index_t>(l.forward_cost(length).bytes));
  });
}

void cases(benchmark::internal::Benchmark* b, std::vector<index_t> lengths) {
  b->ArgNames({"length", "shared", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t length : lengths)
    for (const index_t shared : {0, 384, 256, 128})
      for (const index_t workers : {1, 2}) b->Args({length, shared, workers});
}
BENCHMARK(forward)->Name("collaborative/forward")->Apply([](auto* b) { cases(b, {128, 512}); });
BENCHMARK(training)->Name("collaborative/training")->Apply([](auto* b) { cases(b, {128, 512}); });
BENCHMARK(decode)->Name("collaborative/decode")->Apply([](auto* b) { cases(b, {512, 4096}); });

}  // namespace
