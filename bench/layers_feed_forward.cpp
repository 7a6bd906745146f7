#include "lithe/layers/feed_forward.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t features = 1024, hidden = 4096, weight_bytes = 2 * features * hidden * 4;
using layer = lithe::feed_forward<float>;

const layer& packed_layer() {
  static const layer l = [] {
    layer made({.features = features, .hidden = hidden}, key);
    lithe::prepack(made);
    return made;
  }();
  return l;
}

void forward(benchmark::State& state) {
  runner run(state.range(1));
  inputs x(1, state.range(0), features);
  time_forward(state, packed_layer(), x, run.ctx, weight_bytes);
}

/// One token after another through different layers: the weights come from memory.
void forward_cold(benchmark::State& state) {
  runner run(state.range(1));
  static const std::vector<layer> layers(8, packed_layer());
  const matrix<float> x = random_matrix(state.range(0), features);
  matrix<float> y(x.rows(), features);
  std::size_t turn = 0;
  for (auto _ : state) {
    layers[turn++ % layers.size()].forward(x, y, run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, x.rows(), weight_bytes);
}

void train(benchmark::State& state) {
  runner run(state.range(1));
  inputs x(1, state.range(0), features);
  static const layer l({.features = features, .hidden = hidden}, key);
  time_training(state, l, x, run.ctx);
}

void cases(benchmark::internal::Benchmark* b, std::vector<index_t> tokens) {
  b->ArgNames({"tokens", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t t : tokens)
    for (const index_t workers : {1, 2}) b->Args({t, workers});
}
BENCHMARK(forward)->Name("feed_forward/forward")->Apply([](auto* b) { cases(b, {512, 64, 1}); });
BENCHMARK(forward_cold)->Name("feed_forward/forward_cold")->Apply([](auto* b) { cases(b, {1}); });
BENCHMARK(train)->Name("feed_forward/train")->Apply([](auto* b) { cases(b, {512}); });

}  // namespace
