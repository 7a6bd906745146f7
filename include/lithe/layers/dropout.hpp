#pragma once

#include "lithe/kernels/dropout.hpp"
#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// Throws config_error unless 0 <= rate <= 1.
inline double checked_rate(const char* who, double rate) {
  require<config_error>(rate >= 0 && rate <= 1, who, ": expected a dropout rate in [0, 1], got ", rate);
  return rate;
}

/// Dropout: under ctx.train each number is 0 with probability `rate`, else divided by 1 - rate; otherwise y = x. Draws come from ctx.key
/// alone; the record is that key and the number of rows.
template <std::floating_point S>
struct dropout {
  using scalar = S;
  struct record {
    std::uint64_t key = 0;
    index_t rows = -1;  // of the call
  };
  struct gradient {};

  double rate = 0;

  dropout() = default;
  /// Throws config_error for a rate outside [0, 1].
  explicit dropout(double rate_) : rate(checked_rate("dropout", rate_)) {}

  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("dropout", *this, x, y, ctx);
    apply(x, y, ctx.key, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    forward(x, y, ctx);
    r = {ctx.key.value, x.rows()};
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("dropout", *this, x, dy, dx, g, ctx);
    require<state_error>(r.rows == x.rows(), "dropout: the record is of another call, or was never filled: expected ", x.rows(), " rows, got ", r.rows);
    apply(dy, dx, {r.key}, ctx);
  }
  [[nodiscard]] cost forward_cost(index_t) const { return {}; }
  template <class F, class... T>
  static void visit(F&&, T&...) {}

 private:
  void apply(matrix_view<const S> x, matrix_view<S> y, rng_key key, const context& ctx) const {
    if (ctx.train && rate > 0)
      drop<S>(x, y, rate, key, ctx);
    else
      copy<S>(x, y, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
