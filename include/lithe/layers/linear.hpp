#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/kernels/gemm.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"
#include "lithe/layers/initialise.hpp"

namespace lithe::inline LITHE_ABI {

struct linear_config {
  index_t inputs = 0, outputs = 0;
  bool bias = true;
};

/// Affine map: y = x Wᵀ + b with x [T x inputs], W [outputs x inputs], b [1 x outputs] or empty.
///
/// Starts at W, b ~ U(±1/√inputs). Throws config_error for sizes below 1, shape_error for x of another width.
template <std::floating_point S>
struct linear {
  using scalar = S;
  struct record {};  // nothing that x does not already give
  struct gradient {
    matrix<S> weight, bias;
  };

  matrix<S> weight, bias;
  packed_matrix<S> packed;  ///< a copy of `weight` for inference, made by `prepack`

  linear() = default;
  /// W and b start at U(±1/√inputs). Throws config_error for sizes below 1.
  linear(linear_config c, rng_key key) {
    require<config_error>(c.inputs >= 1 && c.outputs >= 1, "linear: expected at least 1 input and 1 output, got ", c.inputs, " and ", c.outputs);
    weight.resize(c.outputs, c.inputs);
    bias.resize(c.bias ? 1 : 0, c.outputs);
    const double bound = 1 / std::sqrt(static_cast<double>(c.inputs));
    fill_uniform<S>(weight, bound, key.child(0));
    fill_uniform<S>(bias, bound, key.child(1));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("linear", weight.cols(), x);
    return {x.rows(), weight.rows()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("linear", *this, x, y, ctx);
    const S* start = bias.size() != 0 ? bias.data() : nullptr;
    if (packed.empty())
      gemm_nt<S>(x, weight, y, ctx, update::assign, start);
    else
      gemm_packed<S>(x, packed, y, ctx, update::assign, start);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record&, const context& ctx) const { forward(x, y, ctx); }

  /// dx = dy W, dW += dyᵀ x, db += Σ dy.
  void backward(matrix_view<const S> x, const record&, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("linear", *this, x, dy, dx, g, ctx);
    gemm_nn<S>(dy, weight, dx, ctx);
    add(x, dy, g, ctx);
  }
  /// The same, but dx += dy W: for inputs that several products read.
  void add_backward(matrix_view<const S> x, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("linear", *this, x, dy, dx, g, ctx);
    gemm_nn<S>(dy, weight, dx, ctx, update::add);
    add(x, dy, g, ctx);
  }
  /// The parameters' part alone, for inputs that need no gradient.
  void add_gradient(matrix_view<const S> x, matrix_view<const S> dy, gradient& g, const context& ctx) const {
    detail::check_rows("linear", "dy", *this, x, dy, ctx);
    check_gradient("linear", *this, g);
    add(x, dy, g, ctx);
  }

  void prepack() { packed.assign(weight); }
  void refresh() {
    if (!packed.empty()) prepack();
  }
  void after_step(const gradient&) { refresh(); }

  [[nodiscard]] cost forward_cost(index_t) const {
    const double b = static_cast<double>(bias.size());
    return dense_cost<S>(weight.rows(), weight.cols()) + cost{b, b, b * sizeof(S)};
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
  }

 private:
  void add(matrix_view<const S> x, matrix_view<const S> dy, gradient& g, const context& ctx) const {
    const shown<S> in(x, ctx), d(dy, ctx);
    gemm_tn<S>(d, in, g.weight, ctx, update::add);
    if (bias.size() != 0) add_row_sums<S>(d, g.bias, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
