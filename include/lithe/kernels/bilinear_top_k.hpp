#pragma once

#include "lithe/kernels/top_k.hpp"

// r rank, m candidates of each axis
namespace lithe::inline LITHE_ABI {

/// The k largest of the m² scores Σ_ab rows(a, i) core(a, b) columns(b, j), largest first, equal scores by i, then j; cells[.] = i m + j.
///
/// rows and columns [r x m], core [r x r], 1 <= k <= m². Every pair is looked at: these scores are no sums, so the bound of
/// `product_top_k_row` does not hold for them. NaN ranks last; cells are always in range and differ.
template <class S>
void bilinear_top_k_row(matrix_view<const S> rows, matrix_view<const S> columns, matrix_view<const S> core, index_t k, S* scores, std::int32_t* cells,
                        const context& ctx) {
  const index_t r = core.rows(), m = rows.cols();
  LITHE_ASSERT(columns.cols() == m && rows.rows() == r && columns.rows() == r && 1 <= k && k <= m * m);
  const scratch<S> all(ctx, m, m);
  for (index_t i = 0; i < m; ++i) {
    auto out = all.view().row_array(i);
    for (index_t b = 0; b < r; ++b) {
      S factor = 0;
      for (index_t a = 0; a < r; ++a) factor += rows(a, i) * core(a, b);
      if (b == 0)
        out = factor * columns.row_array(0);
      else
        out += factor * columns.row_array(b);
    }
  }
  top_k_row<S>(all.data(), m * m, k, scores, cells, ctx);
}

}  // namespace lithe::inline LITHE_ABI
