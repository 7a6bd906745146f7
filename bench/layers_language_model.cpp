#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/losses.hpp"
#include "lithe/training/optimiser.hpp"
#include "support.hpp"

namespace {

using namespace bench;
using lithe::token_t;

// A byte-level model: pre-norm blocks of 4 heads, feed-forward four times as wide, learned positions, a head of its own.
constexpr index_t vocabulary = 256, length = 256, batch = 16;

using attention_part = lithe::residual<lithe::sequential<lithe::layer_norm<float>, lithe::attention<float>>>;
using feed_forward_part = lithe::residual<lithe::sequential<lithe::layer_norm<float>, lithe::feed_forward<float>>>;
using block = lithe::sequential<attention_part, feed_forward_part>;
using model = lithe::sequential<lithe::embedding<float>, lithe::stack<block>, lithe::layer_norm<float>, lithe::linear<float>>;

model make(index_t layers, index_t features) {
  lithe::stack<block> blocks;
  for (index_t i = 0; i < layers; ++i) {
    const lithe::rng_key k = key.child(static_cast<std::uint64_t>(i));
    lithe::attention<float> attend({.inputs = features, .heads = 4, .causal = true}, k.child(0));
    lithe::feed_forward<float> feed({.features = features, .hidden = 4 * features, .kind = lithe::activation::gelu}, k.child(1));
    blocks.blocks.push_back(block(attention_part{lithe::sequential(lithe::layer_norm<float>(features), std::move(attend))},
                                  feed_forward_part{lithe::sequential(lithe::layer_norm<float>(features), std::move(feed))}));
  }
  return model(lithe::embedding<float>({.tokens = vocabulary, .features = features, .positions = length}, key.child(100)), std::move(blocks),
               lithe::layer_norm<float>(features), lithe::linear<float>({features, vocabulary}, key.child(101)));
}

struct text {
  std::vector<token_t> ids, targets;
  std::vector<index_t> offsets;
  text() {
    machine::random_bits random;
    for (index_t i = 0; i < batch * length; ++i) {
      ids.push_back(random.below(vocabulary));
      targets.push_back(random.below(vocabulary));
    }
    for (index_t i = 0; i <= batch; ++i) offsets.push_back(i * length);
  }
};

/// Forward, loss, backward and a step of AdamW over 16 sequences of 256 bytes.
void train(benchmark::State& state) {
  runner run(state.range(2));
  model m = make(state.range(0), state.range(1));
  const text batch_text;
  run.ctx.rows = {batch_text.offsets};
  run.ctx.train = true;
  auto gradient = lithe::make_gradient(m);
  lithe::record_of<model> record;
  lithe::optimiser<float> adam({.weight_decay = 0.01});
  matrix<float> logits(batch * length, vocabulary);
  const auto step = [&] {
    lithe::set_zero(m, gradient);
    m.forward(batch_text.ids, logits, record, run.ctx);
    benchmark::DoNotOptimize(lithe::cross_entropy<float>(logits, batch_text.targets, {}, logits, run.ctx).loss);
    m.backward(batch_text.ids, record, logits, {}, gradient, run.ctx);
    adam.step(m, gradient, 1e-3, run.ctx);
  };
  step();
  for (auto _ : state) step();
  count(state, batch * length);
}

/// Inference over the same sequences.
void forward(benchmark::State& state) {
  runner run(state.range(2));
  model m = make(state.range(0), state.range(1));
  lithe::prepack(m);
  const text batch_text;
  run.ctx.rows = {batch_text.offsets};
  matrix<float> logits(batch * length, vocabulary);
  m.forward(batch_text.ids, logits, run.ctx);
  for (auto _ : state) {
    m.forward(batch_text.ids, logits, run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, batch * length);
}

void cases(benchmark::internal::Benchmark* b) {
  b->ArgNames({"layers", "features", "workers"})->Args({3, 128, 1})->Args({3, 128, 2})->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(train)->Name("language_model/train")->Apply(cases);
BENCHMARK(forward)->Name("language_model/forward")->Apply(cases);

}  // namespace
