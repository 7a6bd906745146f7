#pragma once

#include "lithe/layers/attention/collaborative_base.hpp"

namespace lithe::inline LITHE_ABI {

/// Collaborative attention of each sequence of x over the same sequence of another matrix, the memory: as `collaborative_attention`, with
/// k = m Wkᵀ, c = m Bᵀ and v = m Wvᵀ + bv, m [N x memory_inputs]. Every key of the sequence is seen (config.causal must be off). A
/// sequence without keys gives bo.
template <std::floating_point S>
struct collaborative_cross_attention : detail::collaborative_base<S> {
  using base = detail::collaborative_base<S>;
  using base::config;
  using typename base::gradient;
  using typename base::record;

  collaborative_cross_attention() = default;
  /// Starts as collaborative_attention does, for a memory of memory_inputs columns. Throws config_error for sizes that do not go together and for `causal`.
  collaborative_cross_attention(collaborative_attention_config c, index_t memory_inputs, rng_key random) : base(who, c, memory_inputs, random) {
    require<config_error>(!c.causal, who, ": expected causal to be off: every key of the memory is seen");
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features(who, config.inputs, x);
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

  // The same with an additive bias [H T x N].
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

 private:
  static constexpr const char* who = "collaborative_cross_attention";

  template <class T>
  detail::collaborative_heads<S> checked(const char* what, matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<T> y,
                                         const context& ctx) const {
    detail::check_rows(who, what, *this, x, y, ctx);
    require_features(who, this->key.weight.cols(), m.x);
    return this->heads(who, x.rows(), m.x.rows(), m.rows, bias, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
