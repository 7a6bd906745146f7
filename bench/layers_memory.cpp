#include "lithe/layers/memory/product_key_memory.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t features = 1024;
using layer = lithe::product_key_memory<float>;

/// 4 heads, 32 picks each, half queries of 256; `keys` sub-keys of each half, or (flat) so many keys.
layer make(index_t keys, bool flat) {
  lithe::dense_table<float> values(flat ? keys : keys * keys, features);
  fill_random(values.view());
  layer l({.inputs = features, .sub_keys = keys, .key_width = 512, .flat = flat}, std::move(values), {}, key);
  lithe::prepack(l);
  return l;
}
const layer& product_keys(index_t keys) {
  return made_for(keys, [&] { return make(keys, false); });
}
const layer& flat_keys(index_t keys) {
  return made_for(keys, [&] { return make(keys, true); });
}

/// Query network, keys and the picked value rows.
index_t bytes_read(const layer& l, index_t tokens) {
  return 4 * (l.query.outputs() * features + l.keys.keys.size() + tokens * l.keys.picks() * features);
}
void time_inference(benchmark::State& state, const layer& l, index_t sets, index_t tokens) {
  runner run(state.range(1));
  inputs x(sets, tokens, features);
  time_forward(state, l, x, run.ctx, bytes_read(l, tokens));
}

/// Fresh tokens in every call: value rows come from memory.
void forward(benchmark::State& state) { time_inference(state, product_keys(512), cold_sets(state.range(0)), state.range(0)); }
/// The same token again: its rows and the weights stay in the caches as far as they fit.
void forward_hot(benchmark::State& state) { time_inference(state, product_keys(512), 1, state.range(0)); }
void train(benchmark::State& state) {
  runner run(state.range(1));
  inputs x(4, state.range(0), features);
  time_training(state, product_keys(512), x, run.ctx);
}
/// Cost against the number of slots: product keys ...
void slots(benchmark::State& state) { time_inference(state, product_keys(state.range(0)), 8, 512); }
/// ... and one key for each slot.
void flat_slots(benchmark::State& state) { time_inference(state, flat_keys(state.range(0) * state.range(0)), 2, 512); }

void cases(benchmark::internal::Benchmark* b, const char* name, std::vector<index_t> values) {
  b->ArgNames({name, "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t value : values)
    for (const index_t workers : {1, 2}) b->Args({value, workers});
}
BENCHMARK(forward)->Name("product_key_memory/forward")->Apply([](auto* b) { cases(b, "tokens", {512, 64, 1}); });
BENCHMARK(forward_hot)->Name("product_key_memory/forward_hot")->Apply([](auto* b) { cases(b, "tokens", {1}); });
BENCHMARK(train)->Name("product_key_memory/train")->Apply([](auto* b) { cases(b, "tokens", {512}); });
BENCHMARK(slots)->Name("product_key_memory")->Apply([](auto* b) { cases(b, "slots", {128, 256, 512, 1024}); });
BENCHMARK(flat_slots)->Name("flat_memory")->Apply([](auto* b) { cases(b, "slots", {64, 128, 256}); });

}  // namespace
