// Every layer forward and backward at 512 tokens with one worker and with two.

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/activations.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "lithe/layers/norms.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t tokens = 512, features = 1024;

const std::vector<lithe::token_t>& token_input() {
  static const std::vector<lithe::token_t> ids = [] {
    std::vector<lithe::token_t> made;
    machine::random_bits random;
    for (index_t t = 0; t < tokens; ++t) made.push_back(random.below(32'768));
    return made;
  }();
  return ids;
}

enum class pass { forward, backward };

/// In training, as the record is part of the work.
template <class Make>
void time_pass(benchmark::State& state, Make make, pass which) {
  using layer = decltype(make());
  const layer& l = made_for(0, make);
  runner run(state.range(1));
  run.ctx.train = true;
  matrix<float> x = random_matrix(tokens, features), dx(tokens, features);
  const auto input = [&] {
    if constexpr (std::same_as<lithe::input_of<layer>, std::span<const lithe::token_t>>)
      return std::span<const lithe::token_t>(token_input());
    else
      return matrix_view<const float>(x);
  }();
  const auto input_gradient = [&] {
    if constexpr (std::same_as<lithe::input_gradient_of<layer>, lithe::nothing>)
      return lithe::nothing{};
    else
      return matrix_view<float>(dx);
  }();
  const lithe::shape out = l.output_shape(input);
  matrix<float> y(out.rows, out.cols);
  const matrix<float> dy = random_matrix(out.rows, out.cols);
  lithe::record_of<layer> record;
  auto gradient = lithe::make_gradient(l);
  const auto once = [&] {
    if (which == pass::forward)
      l.forward(input, y, record, run.ctx);
    else
      l.backward(input, record, dy, input_gradient, gradient, run.ctx);
    benchmark::ClobberMemory();
  };
  l.forward(input, y, record, run.ctx);
  once();
  for (auto _ : state) {
    if (which == pass::backward) {
      state.PauseTiming();
      lithe::set_zero(l, gradient);
      state.ResumeTiming();
    }
    once();
  }
  count(state, tokens);
}

template <class Make>
int add(const std::string& name, Make make) {
  for (const auto& [text, which] : {std::pair{"/forward", pass::forward}, {"/backward", pass::backward}})
    benchmark::RegisterBenchmark(("layers/" + name + text).c_str(), [make, which = which](benchmark::State& s) { time_pass(s, make, which); })
        ->ArgNames({"tokens", "workers"})
        ->Args({tokens, 1})
        ->Args({tokens, 2})
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
  return 0;
}

using feed_forward = lithe::feed_forward<float>;
using memory = lithe::product_key_memory<float>;
using normed = lithe::residual<lithe::sequential<lithe::layer_norm<float>, feed_forward>>;

memory make_memory(lithe::product_key_memory_config c) {
  c.inputs = features;
  c.sub_keys = c.flat ? 4096 : 256;
  c.key_width = 512;
  return memory(c, key);
}

[[maybe_unused]] const int registered[] = {
    add("linear", [] { return lithe::linear<float>({features, features}, key); }),
    add("embedding", [] { return lithe::embedding<float>({.tokens = 32'768, .features = features, .positions = tokens}, key); }),
    add("layer_norm", [] { return lithe::layer_norm<float>(features); }),
    add("rms_norm", [] { return lithe::rms_norm<float>(features); }),
    add("batch_norm", [] { return lithe::batch_norm<float>(features); }),
    add("gelu", [] { return lithe::activation_layer<float>{lithe::activation::gelu}; }),
    add("dropout", [] { return lithe::dropout<float>(0.1); }),
    add("feed_forward", [] { return feed_forward({.features = features, .hidden = 4096}, key); }),
    add("feed_forward_gated", [] { return feed_forward({.features = features, .hidden = 2816, .kind = lithe::activation::silu, .gated = true}, key); }),
    add("feed_forward_chunked", [] { return feed_forward({.features = features, .hidden = 4096, .chunk = 128}, key); }),
    add("attention", [] { return lithe::attention<float>({.inputs = features, .heads = 16, .causal = true, .rotary_width = 64}, key); }),
    add("product_key_memory", [] { return make_memory({}); }),
    add("product_key_memory_batch_norm", [] { return make_memory({.query = {.norm = lithe::query_normalisation::batch}}); }),
    add("flat_memory", [] { return make_memory({.flat = true}); }),
    add("memory_plus", [] { return make_memory({.readout = {.kind = lithe::memory_readout_kind::silu_gated}}); }),
    add("peer", [] { return make_memory({.heads = 8, .top_k = 16, .readout = {.kind = lithe::memory_readout_kind::experts}}); }),
    add("stack", [] {
      lithe::stack<normed> s;
      for (std::uint64_t i = 0; i < 2; ++i)
        s.blocks.push_back(normed{lithe::sequential(lithe::layer_norm<float>(features), feed_forward({.features = features, .hidden = 1024}, key.child(i)))});
      return s;
    }),
};

}  // namespace
