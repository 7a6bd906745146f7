#include "lithe/layers/attention/attention.hpp"

#include "golden_runner/golden_case.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

template <class S, class Layer, class Run>
void run_layer(golden_case<S>& c, Layer& l, Run&& run) {
  c.load("query", l.query);
  c.load("key", l.key);
  c.load("value", l.value);
  c.load("output", l.output);
  auto g = make_gradient(l);
  run(g);
  c.compare_linear_gradient("query", g.query);
  c.compare_linear_gradient("key", g.key);
  c.compare_linear_gradient("value", g.value);
  c.compare_linear_gradient("output", g.output);
}

template <class S>
void run_attention(golden_case<S>& c) {
  const auto& j = c.config;
  const bool cross = j.at("kind") == "cross";
  attention_config a{.inputs = j.at("width"), .heads = j.at("heads"), .head_width = j.at("head_width"), .outputs = j.at("out_width"),
                     .causal = j.at("causal"), .bias = j.at("bias"), .scale = j.at("scale")};
  const std::string positions = j.at("positions");
  if (positions == "rotary") {
    a.rotary_width = j.at("rotary_width");
    a.rotary_base = j.at("rotary_base");
  } else if (positions != "none") {
    throw skipped("positions of kind " + positions);
  }
  const matrix<S> x = c.tensor("input.x"), dy = c.tensor("grad_output.y");
  const auto segment = c.offsets("input.segments");
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  context ctx;
  ctx.rows = {segment};

  attention_bias<S> bias;
  matrix<S> values, gradient;
  if (j.at("additive_bias")) {
    values = c.tensor("input.bias");
    gradient.setZero(values.rows(), values.cols());
    bias = {values, gradient};
  }

  if (cross) {
    if (a.causal || a.rotary_width != 0) throw skipped("cross-attention with causality or positions");
    const matrix<S> memory = c.tensor("input.memory");
    const auto memory_segment = c.offsets("input.memory_segments");
    cross_attention<S> l({.inputs = a.inputs, .memory_inputs = memory.cols(), .heads = a.heads, .head_width = a.head_width, .outputs = a.outputs,
                          .bias = a.bias, .scale = a.scale},
                         {});
    run_layer(c, l, [&](auto& g) {
      typename cross_attention<S>::record r;
      matrix<S> dm = matrix<S>::Zero(memory.rows(), memory.cols());
      const memory_view<S> m{memory, {memory_segment}};
      l.forward(x, m, bias, y, r, ctx);
      l.backward(x, m, bias, r, dy, dx, dm, g, ctx);
      c.compare("grad.input.memory", matrix_view<const S>(dm));
    });
  } else {
    attention<S> l(a, {});
    run_layer(c, l, [&](auto& g) {
      typename attention<S>::record r;
      l.forward(x, bias, y, r, ctx);
      l.backward(x, bias, r, dy, dx, g, ctx);
    });
  }
  if (c.has("grad.input.bias")) c.compare("grad.input.bias", matrix_view<const S>(gradient));
  c.compare("output.y", matrix_view<const S>(y));
  c.compare("grad.input.x", matrix_view<const S>(dx));
}

template void run_attention(golden_case<float>&);
template void run_attention(golden_case<double>&);

}  // namespace golden
