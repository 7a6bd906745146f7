#pragma once

#include "lithe/layers/attention/attention_base.hpp"

namespace lithe::inline LITHE_ABI {

struct cross_attention_config {
  index_t inputs = 0, memory_inputs = 0, heads = 1;
  index_t head_width = 0;  ///< 0: inputs / heads
  index_t outputs = 0;     ///< 0: inputs
  bool bias = true;
  double scale = 0;             ///< of the scores; 0: 1/√head_width
  index_t key_value_heads = 0;  ///< 0: heads
};

/// Exact attention of each sequence of x over the same sequence of another matrix, the memory: as `attention`, with k = m Wkᵀ + bk and
/// v = m Wvᵀ + bv, m [S x memory_inputs]. Every key of the sequence is seen. A sequence without keys gives bo.
template <std::floating_point S>
struct cross_attention : detail::attention_base<S> {
  using base = detail::attention_base<S>;
  using base::config;
  using typename base::gradient;
  using typename base::record;

  cross_attention() = default;
  /// Projections start as `linear`. Throws config_error for sizes that do not go together.
  cross_attention(cross_attention_config c, rng_key random)
      : base("cross_attention",
             {.inputs = c.inputs,
              .heads = c.heads,
              .head_width = c.head_width,
              .outputs = c.outputs,
              .bias = c.bias,
              .scale = c.scale,
              .key_value_heads = c.key_value_heads},
             c.memory_inputs, random) {}

  shape output_shape(matrix_view<const S> x) const {
    require_features("cross_attention", config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const { forward(x, m, attention_bias<S>{}, y, ctx); }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const {
    forward(x, m, attention_bias<S>{}, y, r, ctx);
  }
  /// dx overwritten, dm added to.
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const {
    backward(x, m, attention_bias<S>{}, r, dy, dx, dm, g, ctx);
  }

  // The same with an additive bias [H T x S].
  void forward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<S> y, const context& ctx) const {
    this->run_forward(checked("y", x, m, bias, y, ctx), x, m.x, y, ctx);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<S> y, record& r, const context& ctx) const {
    this->run_forward(checked("y", x, m, bias, y, ctx), x, m.x, y, r, ctx);
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, const record& r, matrix_view<const S> dy, matrix_view<S> dx,
                matrix_view<S> dm, gradient& g, const context& ctx) const {
    detail::check_like(who, "dx", dx, x);
    detail::check_like(who, "dm", dm, m.x);
    check_gradient(who, *this, g);
    this->run_backward(who, checked("dy", x, m, bias, dy, ctx), x, m.x, r, dy, dx, dm, g, ctx);
  }

  /// For a token that sees `length` tokens of the memory, whose keys and values are counted once for each of them.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double n = static_cast<double>(length), d = static_cast<double>(config.head_width);
    return this->query.forward_cost(length) + this->key.forward_cost(length) + this->value.forward_cost(length) + this->output.forward_cost(length) +
           cost{0, 4 * n * d * static_cast<double>(config.heads), 2 * n * d * static_cast<double>(config.key_value_heads) * sizeof(S)};
  }

 private:
  static constexpr const char* who = "cross_attention";

  template <class T>
  detail::attention_heads<S> checked(const char* what, matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<T> y,
                                     const context& ctx) const {
    detail::check_rows(who, what, *this, x, y, ctx);
    require_features(who, this->key.weight.cols(), m.x);
    return this->heads(who, x.rows(), m.x.rows(), m.rows, bias, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
