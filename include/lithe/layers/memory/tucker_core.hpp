#pragma once

#include <Eigen/SVD>

#include "lithe/tensor/matrix_view.hpp"

// H heads, r rank, M cores
namespace lithe::inline LITHE_ABI::detail {

/// f(U, λ, T) for the decomposition U diag(λ) Tᵀ of the sum of a head's cores, λ descending; in double, without the heap up to rank 8.
/// cores [M H r x r] in the order [core][head]. Nothing happens if the sum is not finite.
template <class S, class F>
void decompose_cores(matrix_view<const S> cores, index_t heads, index_t head, F&& f) {
  const index_t r = cores.cols();
  const auto run = [&]<int Max>() {
    using square = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, 0, Max, Max>;
    square sum = square::Zero(r, r);
    for (index_t at = head * r; at < cores.rows(); at += heads * r) sum += cores.slice_rows(at, r).map().template cast<double>();
    if (!sum.allFinite()) return;
    const Eigen::JacobiSVD<square, Eigen::NoQRPreconditioner> svd(sum, Eigen::ComputeFullU | Eigen::ComputeFullV);
    f(svd.matrixU(), svd.singularValues(), svd.matrixV());
  };
  if (r <= 8)
    run.template operator()<8>();
  else
    run.template operator()<Eigen::Dynamic>();
}

/// Moves the stored leading singular vectors u and t [H x r] on to those of the summed cores: of the two signs the one whose vectors are
/// nearer to the stored ones in the 1-norm; if those are all zero, the one with Σ u >= 0. The sign matters: turning both leaves u tᵀ as it
/// is and makes the filter pick the opposite rows and columns. Where the leading vectors are not defined (λ₁ = 0 or λ₁ = λ₂) stored ones stay.
template <class S>
void follow_cores(matrix_view<const S> cores, matrix_view<S> u, matrix_view<S> t) {
  constexpr double same = 1e-12;  // relative difference below which two singular values of rounded cores are one
  for (index_t h = 0; h < u.rows(); ++h)
    decompose_cores<S>(cores, u.rows(), h, [&](const auto& U, const auto& lambda, const auto& T) {
      auto old_u = u.row_array(h), old_t = t.row_array(h);
      const bool fresh = (old_u == S(0)).all() && (old_t == S(0)).all();
      if (!fresh && (lambda(0) == 0 || (lambda.size() > 1 && lambda(0) - lambda(1) <= same * lambda(0)))) return;
      const Eigen::Array<S, 1, Eigen::Dynamic> new_u = U.col(0).transpose().template cast<S>(), new_t = T.col(0).transpose().template cast<S>();
      const S away = (new_u - old_u).abs().sum() + (new_t - old_t).abs().sum(), turned = (new_u + old_u).abs().sum() + (new_t + old_t).abs().sum();
      const S sign = (fresh ? new_u.sum() < S(0) : turned < away) ? S(-1) : S(1);
      old_u = sign * new_u;
      old_t = sign * new_t;
    });
}

/// The loss on the lesser singular values of the summed cores: mean over heads and i >= 2 of max(0, λ_i - margin)² (0 for rank 1). If `d` has
/// data, `weight` times its gradient, which is the same for every core, is added to d [M H r x r] (arXiv 2411.12364 section 3.2).
template <class S>
double rank_loss(matrix_view<const S> cores, index_t heads, double margin, double weight, matrix_view<S> d) {
  const index_t r = cores.cols();
  if (r < 2) return 0;
  const double share = 1 / static_cast<double>(heads * (r - 1));
  double loss = 0;
  for (index_t h = 0; h < heads; ++h)
    decompose_cores<S>(cores, heads, h, [&](const auto& U, const auto& lambda, const auto& T) {
      for (index_t i = 1; i < r; ++i) {
        const double over = std::max(0.0, lambda(i) - margin);
        loss += share * over * over;
        if (d.data() == nullptr || over == 0) continue;
        for (index_t at = h * r; at < cores.rows(); at += heads * r)
          for (index_t a = 0; a < r; ++a)
            for (index_t b = 0; b < r; ++b) d(at + a, b) += static_cast<S>(2 * weight * share * over * U(a, i) * T(b, i));
      }
    });
  return loss;
}

}  // namespace lithe::inline LITHE_ABI::detail
