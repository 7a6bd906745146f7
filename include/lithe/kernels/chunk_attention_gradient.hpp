#pragma once

#include "lithe/kernels/chunk_window.hpp"
#include "lithe/kernels/key_norm.hpp"

namespace lithe::inline LITHE_ABI {

// As in attention_tile.hpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/// What backward knows of the outputs: g = dL/do, and of the softmax m, Z and D_i = g_i · o_i (not used, and free to be null, if every round has
/// a softmax of its own).
template <class S>
struct chunk_softmax {
  matrix_view<const S> g;  ///< [L x V]
  const S *maximum = nullptr, *sum = nullptr, *dots = nullptr;
};

/// The backward pass of `chunk_attention`, in closed form: with A_ij = exp(s_ij - m_i) / Z_i computed again,
///
///     dv_j += M_ij A_ij g_i,   dS_ij = A_ij (M_ij g_i · v_j - D_i), 0 where the score was replaced
///     dq_i += dS_ij scales_j q_j,   and dS_ij q_i goes through the length of key j (`add_key_gradient`) to dq_j
///
/// dq [L x D] and dv [L x V] are added to. Chunks c and c' of a round touch the same rows only if |c - c'| < w or if a window reaches across an
/// end of the round; whoever works on several at a time keeps them apart.
template <class S>
class chunk_attention_gradient {
 public:
  /// Scratch for one window of the head, whose matrices must stay; `norm` is what made keys of its queries.
  chunk_attention_gradient(const context& ctx, const chunked_head<S>& head, key_norm norm)
      : window_(ctx, head),
        norm_(norm),
        block_(std::min(detail::chunk_queries, head.chunk)),
        values_transposed_(ctx, window_.slots * head.v.cols(), window_.chunk),
        d_queries_(ctx, window_.width, window_.query_stride),
        d_keys_(ctx, window_.width, window_.query_stride),
        d_values_(ctx, window_.width, window_.value_stride),
        g_(ctx, block_, window_.value_stride),
        weights_(ctx, block_, window_.width),
        d_scores_(ctx, block_, window_.width),
        live_(ctx, window_.width),
        ones_(ctx, window_.width) {
    ones_.map().setOnes();
  }

  /// The queries of chunks first .. last-1 of a round.
  void run(index_t round, index_t first, index_t last, const chunk_softmax<S>& softmax, matrix_view<S> dq, matrix_view<S> dv) {
    const chunked_head<S>& h = window_.head;
    for (index_t c = first - h.before; c < first + h.after; ++c) load(round, c);
    for (index_t c = first; c < last; ++c) {
      load(round, c + h.after);
      const index_t slot = window_.slot(c), base = slot * window_.chunk, n = window_.counts[slot], out = window_.slot(c - h.before);
      window_.prefetch(dq, out * window_.chunk, window_.counts[out]);
      window_.prefetch(dv, out * window_.chunk, window_.counts[out]);
      window_.prefetch(softmax.g, base, n);
      for (const S* of_queries : {softmax.maximum, softmax.sum, softmax.dots}) window_.prefetch(of_queries, base, n);
      for (index_t i = 0; i < n; i += block_) differentiate(round, base + i, std::min(block_, n - i), softmax);
      finish(c - h.before, dq, dv);
    }
    for (index_t c = last - h.before; c < last + h.after; ++c) finish(c, dq, dv);
  }

 private:
  void load(index_t round, index_t c) {
    window_.load(round, c);
    const index_t s = window_.slot(c), base = s * window_.chunk, V = window_.head.v.cols();
    detail::pack_transposed(window_.values.row(base), window_.value_stride, window_.chunk, V, values_transposed_.row(s * V), window_.chunk);
    std::fill_n(d_queries_.row(base), window_.chunk * window_.query_stride, S(0));
    std::fill_n(d_keys_.row(base), window_.chunk * window_.query_stride, S(0));
    std::fill_n(d_values_.row(base), window_.chunk * window_.value_stride, S(0));
  }

  // Adds what was gathered for the chunk in a slot that is about to be given up.
  void finish(index_t c, matrix_view<S> dq, matrix_view<S> dv) {
    const index_t s = window_.slot(c), base = s * window_.chunk, D = window_.D;
    const auto row = [](const scratch<S>& m, index_t i, index_t n) { return m.view().slice_rows(i, 1).slice_cols(0, n); };
    for (index_t i = base; i < base + window_.counts[s]; ++i) {
      const position_t t = window_.tokens[i];
      dv.row_array(t) += row(d_values_, i, dv.cols()).row_array(0);
      add_key_gradient<S>(norm_, row(window_.queries, i, D), window_.scales.data() + i, row(d_keys_, i, D), row(d_queries_, i, D));
      dq.row_array(t) += row(d_queries_, i, D).row_array(0);
    }
  }

  // The M queries from row `base` of the ring on.
  void differentiate(index_t round, index_t base, index_t M, const chunk_softmax<S>& softmax) {
    using namespace detail::tile;
    const chunked_head<S>& h = window_.head;
    const index_t width = window_.width, V = h.v.cols(), key_stride = window_.query_stride, value_stride = window_.value_stride;
    window_.score(base, M, weights_.data());
    for (index_t i = 0; i < M; ++i) pad_rows<S>(softmax.g.slice_rows(window_.tokens[base + i], 1), g_.row(i));
    for (index_t s = 0; s < window_.slots; ++s)
      product<S>(M, window_.chunk, V, by_rows<S>{g_.data(), value_stride}, values_transposed_.row(s * V), window_.chunk,
                 d_scores_.data() + s * window_.chunk, width);
    for (index_t i = 0; i < M; ++i) differentiate_row(round, base + i, softmax, weights_.row(i), d_scores_.row(i));
    const S* q = window_.queries.row(base);
    product<S>(width, value_stride, M, by_columns<S>{weights_.data(), width}, g_.data(), value_stride, d_values_.data(), value_stride, ones_.data());
    product<S>(width, key_stride, M, by_columns<S>{d_scores_.data(), width}, q, key_stride, d_keys_.data(), key_stride, ones_.data());
    product<S>(M, key_stride, width, by_rows<S>{d_scores_.data(), width}, window_.queries.data(), key_stride, d_queries_.row(base), key_stride,
               ones_.data());
  }

  // p: scores -> M A; ds: g · v -> dS scales.
  void differentiate_row(index_t round, index_t i, const chunk_softmax<S>& softmax, S* p, S* ds) {
    using namespace Eigen::internal;
    using P = detail::tile::packet<S>;
    const chunked_head<S>& h = window_.head;
    const index_t width = window_.width, lanes = detail::tile::lanes<S>;
    const position_t t = window_.tokens[i];
    const bool mean = h.merge == round_merge::mean;
    const S most = window_.mask(round, i, p, live_.data());
    const S total = window_.exponentials(p, mean ? most : softmax.maximum[t]);
    const P inverse = pset1<P>(1 / (mean ? total : softmax.sum[t])), share = pset1<P>(mean ? 1 / static_cast<S>(h.rounds()) : S(1));
    const S* factors = h.dropout > 0 ? window_.draw(round, i) : ones_.data();
    P dot = pset1<P>(S(0));
    for (index_t j = 0; mean && j < width; j += lanes)
      dot = pmadd(pmul(ploadu<P>(p + j), ploadu<P>(factors + j)), ploadu<P>(ds + j), dot);
    const P off = pset1<P>(mean ? predux(pmul(dot, inverse)) : softmax.dots[t]);
    for (index_t j = 0; j < width; j += lanes) {
      const P a = pmul(pmul(ploadu<P>(p + j), inverse), share), m = ploadu<P>(factors + j);
      const P d = pmul(a, psub(pmul(m, ploadu<P>(ds + j)), off));
      pstoreu(p + j, pmul(a, m));
      pstoreu(ds + j, pmul(pmul(d, ploadu<P>(live_.data() + j)), ploadu<P>(window_.scales.data() + j)));
    }
  }

  detail::chunk_window<S> window_;
  key_norm norm_;
  index_t block_;
  scratch<S> values_transposed_, d_queries_, d_keys_, d_values_, g_, weights_, d_scores_, live_, ones_;
};

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace lithe::inline LITHE_ABI
