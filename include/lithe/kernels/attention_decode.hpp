#pragma once

#include "lithe/kernels/attention_tile.hpp"

namespace lithe::inline LITHE_ABI {

/// A few queries against many cached keys, where reading keys and values once is all that counts: o = softmax(q kᵀ) v.
///
/// All rows have W numbers, filled up with zeros to whole packets: q (already scaled) and o [M x W], k and v [N x W] one row after the
/// other. Query i sees the first visible[i] keys; `visible` does not fall and its last entry is N. What a
/// query does not see is not multiplied either: a NaN stays with those who see it.
template <class S>
void attend_few(matrix_view<const S> q, const S* k, const S* v, const index_t* visible, matrix_view<S> o, const context& ctx) {
  using namespace detail::tile;
  using P = packet<S>;
  constexpr S infinity = std::numeric_limits<S>::infinity();
  constexpr index_t longest = detail::longest_sum;
  const index_t M = q.rows(), W = q.cols(), N = visible[M - 1], stride = round_up<S>(N);
  scratch<S> scores(ctx, M, stride), inverse(ctx, M), ones(ctx, M);
  ones.map().setOnes();
  for (index_t j = 0; j < N; ++j) {
    const S* key = k + j * W;
    for (index_t i = 0; i < M; ++i) {
      P sum = Eigen::internal::pmul(ploadu<P>(q.row(i)), ploadu<P>(key));
      for (index_t d = lanes<S>; d < W; d += lanes<S>) sum = pmadd(ploadu<P>(q.row(i) + d), ploadu<P>(key + d), sum);
      scores.row(i)[j] = Eigen::internal::predux(sum);
    }
  }
  for (index_t i = 0; i < M; ++i) {
    S* s = scores.row(i);
    std::fill(s + visible[i], s + stride, -infinity);
    P most = pset1<P>(-infinity);
    for (index_t j = 0; j < stride; j += lanes<S>) most = Eigen::internal::pmax(most, ploadu<P>(s + j));
    const S maximum = Eigen::internal::predux_max(most);
    const P shift = pset1<P>(maximum == -infinity ? S(0) : maximum);
    S sum = 0;
    for (index_t j = 0; j < stride;) {
      P total = pset1<P>(S(0));
      for (const index_t end = std::min(stride, j + longest * lanes<S>); j < end; j += lanes<S>) {
        const P p = exp_or_zero<S>(Eigen::internal::psub(ploadu<P>(s + j), shift));
        pstoreu(s + j, p);
        total = Eigen::internal::padd(total, p);
      }
      sum += Eigen::internal::predux(total);
    }
    inverse[i] = sum == 0 ? S(0) : 1 / sum;
  }
  const index_t shared = visible[0];  // by all queries
  // o of m queries from i on = Σ p v over keys from `first` up to `last`, added to what it is unless `first` is 0
  const auto sum_values = [&](index_t i, index_t m, index_t first, index_t last) {
    for (index_t j = first; j == 0 || j < last; j += longest)
      product<S>(m, W, std::min(longest, last - j), by_rows<S>{scores.row(i) + j, stride}, v + j * W, W, o.row(i),
                 o.stride(), j == 0 ? nullptr : ones.data());
  };
  sum_values(0, M, 0, shared);
  for (index_t i = 1; i < M; ++i)
    if (visible[i] > shared) sum_values(i, 1, shared, visible[i]);
  for (index_t i = 0; i < M; ++i)
    for (index_t d = 0; d < W; ++d) o(i, d) *= inverse[i];
}

/// Cached keys that several queries read: panels of so many keys, each transposed [D x panel_keys], one after the other. A product with them
/// needs no packing and no sum across a packet, and reads memory in one stream.
inline constexpr index_t panel_keys = 32;
/// Room for so many keys in whole panels.
[[nodiscard]] constexpr index_t whole_panels(index_t keys) { return (keys + panel_keys - 1) / panel_keys * panel_keys; }

/// Writes the keys k [n x D] behind the `held` first ones.
template <class S>
void append_to_panels(matrix_view<const S> k, index_t held, S* panels) {
  for (index_t t = 0, n = 0; t < k.rows(); t += n) {
    const index_t j = (held + t) % panel_keys;
    S* panel = panels + (held + t - j) * k.cols();
    n = std::min(panel_keys - j, k.rows() - t);
    if (j == 0)
      detail::pack_transposed(k.row(t), k.stride(), n, k.cols(), panel, panel_keys);
    else
      for (index_t i = 0; i < n; ++i)
        for (index_t d = 0; d < k.cols(); ++d) panel[d * panel_keys + j + i] = k(t + i, d);
  }
}
/// k [N x D], all keys of the panels by row.
template <class S>
void read_panels(const S* panels, matrix_view<S> k, const context& ctx) {
  ctx.exec->run((k.rows() + panel_keys - 1) / panel_keys, 4, [&](index_t first, index_t last) {
    for (index_t p = first; p < last; ++p) {
      const index_t n = std::min(panel_keys, k.rows() - p * panel_keys);
      const matrix_view<const S> panel(panels + p * panel_keys * k.cols(), k.cols(), n, panel_keys);
      k.slice_rows(p * panel_keys, n).map() = panel.map().transpose();
    }
  });
}
/// scores [M x whole panels] = qᵀ kᵀ, q [D x M] by columns: one pointer reaches the queries of a block. Behind the last key they are of no meaning.
template <class S>
void score_panels(matrix_view<const S> q, const S* panels, matrix_view<S> scores, const context& ctx) {
  using namespace detail::tile;
  ctx.exec->run(scores.cols() / panel_keys, 8, [&](index_t first, index_t last) {
    for (index_t p = first; p < last; ++p)
      product<S>(q.cols(), panel_keys, q.rows(), by_columns<S>{q.data(), q.stride()}, panels + p * panel_keys * q.rows(), panel_keys,
                 scores.data() + p * panel_keys, scores.stride());
  });
}

}  // namespace lithe::inline LITHE_ABI
