#pragma once

#include <algorithm>

#include "lithe/kernels/elementwise.hpp"

// T tokens, D features, W taps
namespace lithe::inline LITHE_ABI {

namespace detail {

/// f(t, begin, end) for the rows first .. last-1, each with the sequence that it lies in.
template <class F>
void each_row_of_segment(index_t first, index_t last, index_t rows, const segments& s, F&& f) {
  index_t i = s.offsets.empty() ? 0 : std::upper_bound(s.offsets.begin(), s.offsets.end(), first) - s.offsets.begin() - 1;
  for (index_t t = first; t < last; ++t) {
    while (s.end(i, rows) <= t) ++i;
    f(t, s.begin(i), s.end(i, rows));
  }
}

}  // namespace detail

/// Causal depthwise convolution of each sequence: y_t = Σ_τ w_τ ⊙ x_{t-W+1+τ}, rows before the sequence and masked rows counting as zero.
/// x and y [T x D], w [W x D], the last tap the newest row. Sequences are those of ctx.rows.
template <class S>
void causal_conv(matrix_view<const S> x, matrix_view<const S> w, matrix_view<S> y, const context& ctx) {
  const index_t W = w.rows();
  ctx.exec->run(x.rows(), detail::grain_rows(W * x.cols()), [&](index_t first, index_t last) {
    detail::each_row_of_segment(first, last, x.rows(), ctx.rows, [&](index_t t, index_t begin, index_t) {
      auto out = y.row_array(t);
      out.setZero();
      for (index_t s = std::max(begin, t - W + 1); s <= t; ++s)
        if (ctx.valid(s)) out += w.row_array(W - 1 - (t - s)) * x.row_array(s);
    });
  });
}

/// Backward of `causal_conv`: dx_s += Σ_t w_{s-t+W-1} ⊙ dy_t and dw_τ += Σ_t dy_t ⊙ x_{t-W+1+τ}.
template <class S>
void causal_conv_backward(matrix_view<const S> x, matrix_view<const S> w, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dw,
                          const context& ctx) {
  // Sums run over blocks of rows and these in double, so that a float sum over a million rows stays close.
  constexpr index_t columns = 64, block = 128;
  const index_t W = w.rows(), D = x.cols();
  ctx.exec->run(x.rows(), detail::grain_rows(W * D), [&](index_t first, index_t last) {
    detail::each_row_of_segment(first, last, x.rows(), ctx.rows, [&](index_t s, index_t, index_t end) {
      if (!ctx.valid(s)) return;
      auto out = dx.row_array(s);
      for (index_t t = s; t < std::min(end, s + W); ++t) out += w.row_array(W - 1 - (t - s)) * dy.row_array(t);
    });
  });
  ctx.exec->run(D, columns, [&](index_t from, index_t to) {
    const scratch<S> sums(ctx, W, to - from);
    const scratch<double> total(ctx, W, to - from);
    total.map().setZero();
    const auto part = [&](auto m) { return m.slice_cols(from, to - from); };
    for (index_t first = 0; first < x.rows(); first += block) {
      sums.map().setZero();
      detail::each_row_of_segment(first, std::min(first + block, x.rows()), x.rows(), ctx.rows, [&](index_t t, index_t begin, index_t) {
        for (index_t s = std::max(begin, t - W + 1); s <= t; ++s)
          if (ctx.valid(s)) sums.view().row_array(W - 1 - (t - s)) += part(dy).row_array(t) * part(x).row_array(s);
      });
      total.map() += sums.map().template cast<double>();
    }
    part(dw).map() += total.map().template cast<S>();
  });
}

}  // namespace lithe::inline LITHE_ABI
