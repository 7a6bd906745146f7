#pragma once

#include "lithe/kernels/top_k.hpp"

// r rank, m candidates of each axis
namespace lithe::inline LITHE_ABI {

namespace detail {

inline constexpr index_t bilinear_lanes = 16;  // columns scored at a time: whole vectors, whatever m is

/// all(i, j) = Σ_ab rows(a, i) core(a, b) columns(b, j); the columns of `all` and `columns` are padded to whole lanes.
template <class S>
void bilinear_scores(matrix_view<const S> rows, matrix_view<const S> columns, matrix_view<const S> core, matrix_view<S> all) {
  using lanes = Eigen::Array<S, bilinear_lanes, 1>;
  const index_t r = core.rows();
  for (index_t i = 0; i < all.rows(); ++i) {
    S* out = all.row(i);
    for (index_t b = 0; b < r; ++b) {
      S factor = 0;
      for (index_t a = 0; a < r; ++a) factor += rows(a, i) * core(a, b);
      const S* in = columns.row(b);
      if (b == 0)
        for (index_t j = 0; j < all.cols(); j += bilinear_lanes) Eigen::Map<lanes>(out + j) = factor * Eigen::Map<const lanes>(in + j);
      else
        for (index_t j = 0; j < all.cols(); j += bilinear_lanes) Eigen::Map<lanes>(out + j) += factor * Eigen::Map<const lanes>(in + j);
    }
  }
}

}  // namespace detail

/// The k largest of the m² scores Σ_ab rows(a, i) core(a, b) columns(b, j), largest first, equal scores by i, then j; cells[.] = i m + j.
///
/// rows and columns [r x m], core [r x r], 1 <= k <= m². Every pair is looked at: these scores are no sums, so the bound of
/// `product_top_k_row` does not hold for them. NaN ranks last; cells are always in range and differ.
template <class S>
void bilinear_top_k_row(matrix_view<const S> rows, matrix_view<const S> columns, matrix_view<const S> core, index_t k, S* scores, std::int32_t* cells,
                        const context& ctx) {
  const index_t r = core.rows(), m = rows.cols(), padded = (m + detail::bilinear_lanes - 1) / detail::bilinear_lanes * detail::bilinear_lanes;
  LITHE_ASSERT(columns.cols() == m && rows.rows() == r && columns.rows() == r && 1 <= k && k <= m * m);
  const scratch<S> all(ctx, m, padded), in(ctx, r, padded);
  for (index_t b = 0; b < r; ++b) std::fill(std::copy_n(columns.row(b), m, in.row(b)), in.row(b) + padded, std::numeric_limits<S>::quiet_NaN());
  detail::bilinear_scores<S>(rows, in, core, all);
  top_k_row<S>(all.data(), m * padded, k, scores, cells, ctx);
  if (!(scores[k - 1] > detail::lowest_score<S>)) {  // fewer than k numbers: the padding must not be chosen among them
    for (index_t i = 0; i < m; ++i) std::copy_n(all.row(i), m, all.data() + i * m);
    return top_k_row<S>(all.data(), m * m, k, scores, cells, ctx);
  }
  if (padded != m)
    for (index_t j = 0; j < k; ++j) cells[j] -= cells[j] / static_cast<std::int32_t>(padded) * static_cast<std::int32_t>(padded - m);
}

}  // namespace lithe::inline LITHE_ABI
