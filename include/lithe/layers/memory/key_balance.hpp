#pragma once

#include "lithe/layers/memory/tucker_keys.hpp"

// T tokens, H heads, n keys of an axis, m candidates
namespace lithe::inline LITHE_ABI::detail {

/// The key-balance loss of UltraMemV2 (arXiv 2508.18756): for each axis, with π the softmax of the filter's scores over the n keys of a
/// token and head, n Σ_i π̄_i f_i; π̄_i the mean over tokens and heads, f_i the share of all top-m hits that fell on key i, a constant.
/// It looks at all keys again: the search itself needs no softmax over them.
template <class S>
class key_balance {
 public:
  key_balance(const tucker_keys<S>& keys, const typename tucker_keys<S>::prepared& prepared, const context& ctx)
      : keys_(keys), prepared_(prepared), ctx_(ctx) {}

  /// The loss; hits [2 x n] receives f, or under ctx.replay gives it.
  [[nodiscard]] double loss(matrix_view<const S> q, matrix<S>& hits) const {
    const index_t n = keys_.config.sub_keys, m = keys_.config.top_k;
    if (!ctx_.replay) hits.setZero(2, n);
    const double all = static_cast<double>(counted(q.rows()) * keys_.config.heads);
    if (all == 0) return 0;
    const scratch<double> mean(ctx_, 2, n);
    mean.map().setZero();
    each_tile(q, [&](index_t first, matrix_view<const S> q_tile, index_t head, index_t axis, matrix_view<S> alpha) {
      keys_.filter_scores(q_tile, prepared_, head, axis, alpha, ctx_);
      if (!ctx_.replay) {
        const scratch<S> best(ctx_, alpha.rows(), m);
        const scratch<slot_t> ids(ctx_, alpha.rows(), m);
        top_k<S>(alpha, best, ids, ctx_);
        for (index_t t = 0; t < alpha.rows(); ++t)
          for (index_t j = 0; ctx_.valid(first + t) && j < m; ++j) hits(axis, ids.row(t)[j]) += S(1);
      }
      softmax(alpha);
      for (index_t t = 0; t < alpha.rows(); ++t)
        if (ctx_.valid(first + t)) mean.view().row_array(axis) += alpha.row_array(t).template cast<double>();
    });
    if (!ctx_.replay) hits /= static_cast<S>(all * static_cast<double>(m));
    return static_cast<double>(n) * (mean.map().array() * hits.array().template cast<double>()).sum() / all;
  }

  /// Adds `weight` times the gradient: dα_i = n / (T H) π_i (f_i - Σ_j π_j f_j), and from it dq and the gradient of the normed keys.
  void backward(matrix_view<const S> q, const matrix<S>& hits, double weight, matrix_view<S> dq, matrix_view<S> d_unit) const {
    const index_t n = keys_.config.sub_keys, d = keys_.config.width, width = keys_.filter_width();
    const S scale = static_cast<S>(weight * static_cast<double>(n) / static_cast<double>(std::max<index_t>(1, counted(q.rows())) * keys_.config.heads));
    const scratch<S> d_filter(ctx_, n, width);
    each_tile(q, [&](index_t first, matrix_view<const S> q_tile, index_t head, index_t axis, matrix_view<S> alpha) {
      keys_.filter_scores(q_tile, prepared_, head, axis, alpha, ctx_);
      softmax(alpha);
      const auto f = hits.row(axis).array();
      ctx_.exec->run(alpha.rows(), grain_rows(n), [&](index_t from, index_t to) {
        for (index_t t = from; t < to; ++t) {
          auto pi = alpha.row_array(t);
          const S along = (pi * f).sum();
          if (ctx_.valid(first + t))
            pi *= scale * (f - along);
          else
            pi.setZero();
        }
      });
      const index_t at = keys_.block(head, axis, 0) * d;
      gemm_nn<S>(alpha, keys_.group(prepared_.filter, head, axis), dq.slice_rows(first, alpha.rows()).slice_cols(at, width), ctx_, update::add);
      gemm_tn<S>(alpha, q_tile.slice_cols(at, width), d_filter, ctx_);
      const auto target = keys_.group(d_unit, head, axis);
      for (index_t a = 0; a < keys_.config.rank; ++a)
        target.slice_cols(a * d, d).map() += keys_.filter_weight(head, axis, a) * d_filter.view().slice_cols(width == d ? 0 : a * d, d).map();
    });
  }

 private:
  static constexpr index_t tile = 256;  // tokens

  [[nodiscard]] index_t counted(index_t rows) const {
    index_t n = 0;
    for (index_t t = 0; t < rows; ++t) n += ctx_.valid(t) ? 1 : 0;
    return n;
  }
  template <class F>
  void each_tile(matrix_view<const S> q, F&& f) const {
    const scratch<S> alpha(ctx_, std::min(tile, q.rows()), keys_.config.sub_keys);
    for (index_t first = 0; first < q.rows(); first += tile) {
      const index_t rows = std::min(tile, q.rows() - first);
      for (index_t head = 0; head < keys_.config.heads; ++head)
        for (index_t axis = 0; axis < 2; ++axis) f(first, q.slice_rows(first, rows), head, axis, alpha.view().slice_rows(0, rows));
    }
  }
  void softmax(matrix_view<S> m) const {
    ctx_.exec->run(m.rows(), grain_rows(8 * m.cols()), [&](index_t from, index_t to) {
      for (index_t t = from; t < to; ++t) {
        auto row = m.row_array(t);
        row = (row - row.maxCoeff()).exp();
        row /= row.sum();
      }
    });
  }
  const tucker_keys<S>& keys_;
  const typename tucker_keys<S>::prepared& prepared_;
  const context& ctx_;
};

}  // namespace lithe::inline LITHE_ABI::detail
