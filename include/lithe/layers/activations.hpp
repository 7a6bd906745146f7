#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// An activation as a layer: y = a(x), x and y [T x D].
template <std::floating_point S>
struct activation_layer {
  using scalar = S;
  struct record {};
  struct gradient {};

  activation kind = activation::relu;

  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("activation_layer", *this, x, y, ctx);
    activate<S>(kind, x, y, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record&, const context& ctx) const { forward(x, y, ctx); }
  void backward(matrix_view<const S> x, const record&, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("activation_layer", *this, x, dy, dx, g, ctx);
    activate_backward<S>(kind, x, dy, dx, ctx);
  }
  [[nodiscard]] cost forward_cost(index_t) const { return {}; }
  template <class F, class... T>
  static void visit(F&&, T&...) {}
};

}  // namespace lithe::inline LITHE_ABI
