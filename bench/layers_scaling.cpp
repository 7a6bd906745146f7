// Every layer forward and backward at 512 tokens, for the gain of a second worker.

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/activations.hpp"
#include "lithe/layers/batch_norm.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "lithe/layers/norms.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t tokens = 512, features = 1024;

template <class Make>
void forward(benchmark::State& state, Make make) {
  runner run(state.range(1));
  auto& layer = made_for(0, make);
  const auto input = make_input(layer);
  const lithe::shape out = layer.output_shape(input);
  matrix<float> y(out.rows, out.cols);
  run.ctx.train = true;
  lithe::record_of<std::remove_cvref_t<decltype(layer)>> record;
  for (auto _ : state) {
    layer.forward(input, y, record, run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, tokens);
}

}  // namespace
