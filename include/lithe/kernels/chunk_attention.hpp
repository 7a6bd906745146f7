#pragma once

#include "lithe/kernels/chunk_window.hpp"

namespace lithe::inline LITHE_ABI {

// As in attention_tile.hpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/// Attention of chunks of one round after the other (arXiv 2001.04451, equations 5 and 6, all rounds under one softmax). Over all pairs (i, j)
/// that meet in a window, as often as they meet, with s_ij = q_i · scales_j q_j after the masks and dropout factors M:
///
///     m_i = max s_ij,   Z_i = Σ exp(s_ij - m_i),   o_i = Σ M_ij exp(s_ij - m_i) / Z_i v_j
///
/// m and Z stay apart, because in m + log Z a query that sees only itself (s = -1e5) would lose Z. With round_merge::mean, o_i is the mean
/// over rounds of each round's own o_i, and m and Z are not touched.
///
/// Every query stands in one chunk of a round, so chunks of one round may be worked on at the same time; rounds go in order.
template <class S>
class chunk_attention {
 public:
  /// Scratch for one window of the head, whose matrices must stay.
  chunk_attention(const context& ctx, const chunked_head<S>& head)
      : window_(ctx, head),
        block_(std::min(detail::chunk_queries, head.chunk)),
        scores_(ctx, block_, window_.width),
        sums_(ctx, block_, window_.value_stride) {}

  /// The queries of chunks first .. last-1 of a round. maximum and sum [L], o [L x V]: round 0 begins them, the last one divides by Z.
  void run(index_t round, index_t first, index_t last, S* maximum, S* sum, matrix_view<S> o) {
    const chunked_head<S>& h = window_.head;
    for (index_t c = first - h.before; c < first + h.after; ++c) window_.load(round, c);
    for (index_t c = first; c < last; ++c) {
      window_.load(round, c + h.after);
      const index_t slot = window_.slot(c), base = slot * window_.chunk, n = window_.counts[slot];
      window_.prefetch(o, base, n);
      window_.prefetch(maximum, base, n);
      window_.prefetch(sum, base, n);
      for (index_t i = 0; i < n; i += block_) attend(round, base + i, std::min(block_, n - i), maximum, sum, o);
    }
  }

 private:
  // The M queries from row `base` of the ring on.
  void attend(index_t round, index_t base, index_t M, S* maximum, S* sum, matrix_view<S> o) {
    const chunked_head<S>& h = window_.head;
    const bool first = round == 0, last = round + 1 == h.rounds(), mean = h.merge == round_merge::mean;
    S before[detail::chunk_queries], now[detail::chunk_queries];  // what the sums so far, and those of this round, are multiplied with
    window_.score(base, M, scores_.data());
    for (index_t i = 0; i < M; ++i) {
      const position_t t = window_.tokens[base + i];
      S* s = scores_.row(i);
      const S most = window_.mask(round, base + i, s, nullptr);
      const bool begin = first || mean;
      const S shift = begin ? most : std::max(maximum[t], most);
      const S total = window_.exponentials(s, shift);
      before[i] = begin ? S(0) : std::exp(maximum[t] - shift);
      now[i] = 1;
      if (mean) {
        before[i] = 1;
        now[i] = 1 / (total * static_cast<S>(h.rounds()));
      } else {
        maximum[t] = shift;
        sum[t] = begin ? total : before[i] * sum[t] + total;
        if (last) {
          now[i] = 1 / sum[t];
          before[i] *= now[i];
        }
      }
      if (h.dropout > 0) drop(round, base + i, s);
    }
    if (window_.finite())
      detail::tile::product<S>(M, window_.value_stride, window_.width, detail::tile::by_rows<S>{scores_.data(), window_.width}, window_.values.data(),
                               window_.value_stride, sums_.data(), window_.value_stride);
    else
      detail::tile::careful_product<S>(M, window_.value_stride, window_.width, scores_.data(), window_.width, window_.values.data(),
                                       window_.value_stride, sums_.data(), window_.value_stride, nullptr);
    for (index_t i = 0; i < M; ++i) {
      auto to = o.row_array(window_.tokens[base + i]);
      const auto from = sums_.view().slice_cols(0, o.cols()).row_array(i);
      if (first)
        to = now[i] * from;
      else
        to = before[i] * to + now[i] * from;
    }
  }
  void drop(index_t round, index_t i, S* s) {
    const S* factors = window_.draw(round, i);
    for (index_t j = 0; j < window_.width; ++j) s[j] *= factors[j];
  }

  detail::chunk_window<S> window_;
  index_t block_;
  scratch<S> scores_, sums_;
};

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace lithe::inline LITHE_ABI
