#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// Residual connection: y = x + f(x). Throws shape_error unless f keeps the shape.
template <class F>
struct residual {
  static_assert(explain_layer<F>());
  using scalar = typename F::scalar;
  using S = scalar;
  using record = record_of<F>;
  struct gradient {
    gradient_of<F> inner;
  };
  using cache = cache_of<F>;
  static constexpr bool looks_across = looks_across_tokens<F>;

  F inner;

  shape output_shape(matrix_view<const S> x) const {
    const shape out = inner.output_shape(x);
    require<shape_error>(out == shape{x.rows(), x.cols()}, "residual: its inner layer turns ", to_text(x.rows(), x.cols()), " into ",
                         to_text(out.rows, out.cols), "; x + f(x) needs the same shape");
    return out;
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("residual", *this, x, y, ctx);
    inner.forward(x, y, ctx);
    add<S>(x, y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward("residual", *this, x, y, ctx);
    inner.forward(x, y, r, ctx);
    add<S>(x, y, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("residual", *this, x, dy, dx, g, ctx);
    inner.backward(x, r, dy, dx, g.inner, ctx);
    add<S>(dy, dx, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return lithe::make_cache(inner, slots, capacity); }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode("residual", *this, x, y);
    lithe::decode(inner, x, y, c, ctx);
    add<S>(x, y, ctx);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const { lithe::fill(inner, x, c, ctx); }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const { return lithe::least_length(inner, c, slot); }
  void truncate(cache& c, index_t slot, index_t length) const { lithe::truncate(inner, c, slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { lithe::permute(inner, c, order); }

  [[nodiscard]] cost forward_cost(index_t length) const { return cost_of(inner, length); }
  template <class V, class... T>
  static void visit(V&& f, T&... s) {
    f("", s.inner...);
  }
};

}  // namespace lithe::inline LITHE_ABI
