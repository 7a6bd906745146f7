#pragma once

#include "lithe/kernels/norm.hpp"
#include "lithe/layers/layer.hpp"

namespace lithe::inline LITHE_ABI {

enum class score_norm_kind { none, rms, layer };

/// The norm of UltraMem's queries and keys, over their width: y = RMS(x) ⊙ weight (+ bias), or the same with a layer norm, or y = x. x and y
/// are [rows x width]; statistics [rows x 2] is kept for backward. A row of zeros gives 0 (the bias), its gradient is finite.
template <std::floating_point S>
struct score_norm {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> weight, bias;
  };

  score_norm_kind kind = score_norm_kind::rms;
  S epsilon = S(1e-5);
  matrix<S> weight, bias;  // [1 x width]; bias may be empty

  score_norm() = default;
  /// weight = scale, bias = 0. Throws config_error unless epsilon is above 0 in S.
  score_norm(score_norm_kind k, index_t width, bool with_bias, double eps, double scale)
      : kind(k),
        epsilon(static_cast<S>(eps)),
        weight(matrix<S>::Constant(k == score_norm_kind::none ? 0 : 1, width, static_cast<S>(scale))),
        bias(matrix<S>::Zero(with_bias && k != score_norm_kind::none ? 1 : 0, width)) {
    require<config_error>(epsilon > S(0) && std::isfinite(epsilon), "score norm: expected an epsilon above 0, got ",
                          eps);
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> statistics, const context& ctx) const {
    if (kind == score_norm_kind::none) return copy<S>(x, y, ctx);
    normalise_rows<S>(x, weight, bias, epsilon, kind == score_norm_kind::layer, y, statistics, ctx);
  }
  /// dx may be dy.
  void backward(matrix_view<const S> x, matrix_view<const S> statistics, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    if (kind != score_norm_kind::none)
      normalise_rows_backward<S>(x, weight, kind == score_norm_kind::layer, statistics, dy, dx, g.weight, g.bias, ctx);
    else if (dy.data() != dx.data())
      copy<S>(dy, dx, ctx);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
  }
};

}  // namespace lithe::inline LITHE_ABI
