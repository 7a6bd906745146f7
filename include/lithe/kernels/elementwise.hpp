#pragma once

#include "lithe/kernels/activation.hpp"

namespace lithe::inline LITHE_ABI {

/// y = x.
template <class S>
void copy(matrix_view<const S> x, matrix_view<S> y, const context& ctx) {
  ctx.exec->run(x.rows(), detail::grain_rows(x.cols()),
                [&](index_t first, index_t last) { y.slice_rows(first, last - first).map() = x.slice_rows(first, last - first).map(); });
}

/// y += x.
template <class S>
void add(matrix_view<const S> x, matrix_view<S> y, const context& ctx) {
  ctx.exec->run(x.rows(), detail::grain_rows(x.cols()),
                [&](index_t first, index_t last) { y.slice_rows(first, last - first).map() += x.slice_rows(first, last - first).map(); });
}

/// y -= x.
template <class S>
void subtract(matrix_view<const S> x, matrix_view<S> y, const context& ctx) {
  ctx.exec->run(x.rows(), detail::grain_rows(x.cols()),
                [&](index_t first, index_t last) { y.slice_rows(first, last - first).map() -= x.slice_rows(first, last - first).map(); });
}

/// sums += the sum of the rows of x, sums [1 x cols]. Rows are added in blocks and these in double, so that a float sum
/// over a million rows stays close to the double one; columns are shared out, so the order never depends on the
/// workers.
template <class S>
void add_row_sums(matrix_view<const S> x, matrix_view<S> sums, const context& ctx) {
  constexpr index_t columns = 64, block = 128;
  ctx.exec->run(x.cols(), columns, [&](index_t first, index_t last) {
    using row = Eigen::Matrix<S, 1, Eigen::Dynamic, Eigen::RowMajor, 1, columns>;
    using wide_row = Eigen::Matrix<double, 1, Eigen::Dynamic, Eigen::RowMajor, 1, columns>;
    wide_row total = wide_row::Zero(last - first);
    for (index_t t = 0; t < x.rows(); t += block) {
      // A row of its own: a sum that is cast on the way is one column after the other.
      const row part = x.slice_rows(t, std::min(block, x.rows() - t)).slice_cols(first, last - first).map().colwise().sum();
      total += part.template cast<double>();
    }
    sums.slice_cols(first, last - first).map() += total.template cast<S>();
  });
}

}  // namespace lithe::inline LITHE_ABI
