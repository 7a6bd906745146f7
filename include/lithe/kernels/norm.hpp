#pragma once

#include "lithe/kernels/elementwise.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

inline constexpr index_t norm_rows = 32;  // rows in one piece; also the block of the sums over rows

/// total [k x cols] = Σ over pieces of rows of what `add(first, last, sums)` adds to the zeroed sums [k x cols] of its piece, in the order
/// of the rows with any number of workers.
template <class S, class Add>
void sum_over_rows(index_t rows, matrix_view<S> total, const context& ctx, const Add& add) {
  const index_t k = total.rows(), pieces = (rows + norm_rows - 1) / norm_rows;
  const scratch<S> sums(ctx, k * pieces, total.cols());
  ctx.exec->run(rows, norm_rows, [&](index_t first, index_t last) {
    const matrix_view<S> piece = sums.view().slice_rows(k * (first / norm_rows), k);
    piece.map().setZero();
    add(first, last, piece);
  });
  ctx.exec->run(total.cols(), 256, [&](index_t first, index_t last) {
    const scratch<double> all(ctx, k, last - first);  // a million rows are thousands of pieces
    all.map().setZero();
    for (index_t piece = 0; piece < pieces; ++piece)
      all.map() += sums.view().slice_cols(first, last - first).slice_rows(k * piece, k).map().template cast<double>();
    total.slice_cols(first, last - first).map() = all.map().template cast<S>();
  });
}

}  // namespace detail

/// Each row of y = (x - mean) ρ ⊙ weight + bias with ρ = 1/√(variance + epsilon) (biased variance), or, not centred, y = x ρ ⊙ weight with
/// ρ = 1/√(mean square + epsilon). weight and bias are [1 x cols], bias may be empty; statistics [rows x 2] receives (mean, ρ).
template <class S>
void normalise_rows(matrix_view<const S> x, matrix_view<const S> weight, matrix_view<const S> bias, S epsilon, bool centred, matrix_view<S> y,
                    matrix_view<S> statistics, const context& ctx) {
  ctx.exec->run(x.rows(), detail::norm_rows, [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t) {
      const auto row = x.row_array(t);
      const S mean = centred ? row.mean() : S(0);
      const S inverse = S(1) / std::sqrt((row - mean).square().mean() + epsilon);
      auto out = y.row_array(t);
      out = (row - mean) * inverse * weight.row_array(0);
      if (bias.rows() != 0) out += bias.row_array(0);
      statistics(t, 0) = mean;
      statistics(t, 1) = inverse;
    }
  });
}

/// Backward of `normalise_rows`: with ẑ = (x - mean) ρ and e = dy ⊙ weight, dx = ρ (e - mean(e) - ẑ mean(e ⊙ ẑ)) (without mean(e) if not
/// centred); dweight += Σ dy ⊙ ẑ, dbias += Σ dy (if there is one). dx may be dy.
template <class S>
void normalise_rows_backward(matrix_view<const S> x, matrix_view<const S> weight, bool centred, matrix_view<const S> statistics,
                             matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dweight, matrix_view<S> dbias, const context& ctx) {
  const scratch<S> sums(ctx, 2, x.cols());  // dweight, dbias
  detail::sum_over_rows<S>(x.rows(), sums, ctx, [&](index_t first, index_t last, matrix_view<S> piece) {
    auto sum_weight = piece.row_array(0), sum_bias = piece.row_array(1);
    const scratch<S> unit(ctx, 1, x.cols()), scaled(ctx, 1, x.cols());
    auto z = unit.view().row_array(0), e = scaled.view().row_array(0);
    for (index_t t = first; t < last; ++t) {
      const auto d = dy.row_array(t);
      z = (x.row_array(t) - statistics(t, 0)) * statistics(t, 1);
      e = d * weight.row_array(0);
      sum_weight += d * z;
      sum_bias += d;
      const S mean = centred ? e.mean() : S(0), along = (e * z).mean();
      dx.row_array(t) = statistics(t, 1) * (e - mean - z * along);
    }
  });
  dweight.row_array(0) += sums.view().row_array(0);
  if (dbias.rows() != 0) dbias.row_array(0) += sums.view().row_array(1);
}

}  // namespace lithe::inline LITHE_ABI
