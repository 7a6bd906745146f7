#pragma once

#include "lithe/kernels/dropout_factors.hpp"
#include "lithe/layers/attention/attention_heads.hpp"

// T queries, N keys, H heads, r shared key width, V value width of a head
namespace lithe::inline LITHE_ABI::detail {

/// What the queries of one collaborative head see: the mask of exact attention, the head's content bias, and its dropout.
template <class S>
struct collaborative_mask {
  attention_mask<S> plain;
  S scale = 1;
  const S* content = nullptr;  // of the keys of the sequence; none: no content bias
  S* content_gradient = nullptr;
  double rate = 0;
  rng_key key{};
  std::uint64_t row = 0;  // of query 0, in the numbering of the draws

  [[nodiscard]] index_t visible(index_t i) const { return plain.visible(i); }
  [[nodiscard]] bool hides() const { return plain.hides(); }
  void adjust(index_t i, index_t first, index_t n, S* scores) const {
    if (content != nullptr)
      for (index_t j = 0; j < n; ++j) scores[j] += scale * content[first + j];
    plain.adjust(i, first, n, scores);
  }
  void collect(index_t i, index_t first, index_t n, const S* gradient) const {
    if (content_gradient != nullptr)
      for (index_t j = 0; j < n; ++j) content_gradient[first + j] += scale * gradient[j];
    plain.collect(i, first, n, gradient);
  }
  bool drop(index_t i, index_t first, index_t n, S* factors) const {
    if (rate == 0) return false;
    draw_factors<S>(key, row + static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(first), n, rate, factors);
    return true;
  }
  /// The same for the queries from the i-th on.
  [[nodiscard]] collaborative_mask from(index_t i, index_t n) const {
    collaborative_mask m = *this;
    m.plain = plain.from(i, n);
    m.row += static_cast<std::uint64_t>(i);
    return m;
  }
};

/// All heads and sequences of collaborative attention: q [T x r], k [N x r] and the mixing matrix [H x r] are shared, content [H x N] (or
/// empty) and the values [N x H V] are the heads' own. Scores never exist beyond a tile of keys.
template <class S>
struct collaborative_heads {
  attention_heads<S> plain;  // heads, their masks and segments; `width` is that of values
  matrix_view<const S> mixing;
  double rate = 0;
  rng_key key{};

  /// to = q ∘ m_h for some rows.
  void mix(matrix_view<const S> q, index_t h, matrix_view<S> to) const {
    for (index_t t = 0; t < q.rows(); ++t) to.row_array(t) = q.row_array(t) * mixing.row_array(h);
  }
  [[nodiscard]] collaborative_mask<S> mask(index_t h, index_t s, matrix_view<const S> content, matrix_view<S> content_gradient, index_t T,
                                           index_t N) const {
    const index_t i = plain.rows.begin(s), j = plain.key_rows.begin(s), n = plain.key_rows.end(s, N) - j;
    collaborative_mask<S> m{.plain = plain.mask(h, i, plain.rows.end(s, T) - i, j, n, T),
                            .scale = plain.scale,
                            .rate = rate,
                            .key = key,
                            .row = static_cast<std::uint64_t>(h * T + i)};
    if (content.size() != 0) m.content = content.row(h) + j;
    if (content_gradient.size() != 0) m.content_gradient = content_gradient.row(h) + j;
    return m;
  }

  /// o [T x H V] and log_sum_exp [H x T].
  void forward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> content, matrix_view<const S> v, matrix_view<S> o,
               matrix_view<S> log_sum_exp, const context& ctx) const {
    constexpr index_t block = attention_heads<S>::block;
    const index_t T = q.rows(), N = k.rows(), H = plain.heads;
    scratch<index_t> blocks(ctx, T / block + plain.rows.count(), 2);  // sequence, first row
    index_t n = 0;
    for (index_t s = 0; s < plain.rows.count(); ++s)
      for (index_t i = plain.rows.begin(s); i < plain.rows.end(s, T); i += block, ++n) {
        blocks.row(n)[0] = s;
        blocks.row(n)[1] = i;
      }
    ctx.exec->run(n * H, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece) {
        const index_t b = n - 1 - piece / H, h = piece % H, s = blocks.row(b)[0], i = blocks.row(b)[1];
        const index_t m = std::min(block, plain.rows.end(s, T) - i), j = plain.key_rows.begin(s), keys = plain.key_rows.end(s, N) - j;
        const scratch<S> mixed(ctx, m, q.cols());
        mix(q.slice_rows(i, m), h, mixed.view());
        attend<S>(mixed.view(), k.slice_rows(j, keys), plain.head(v, h, j, keys), plain.scale,
                  mask(h, s, content, {}, T, N).from(i - plain.rows.begin(s), m), plain.head(o, h, i, m), log_sum_exp.row(h) + i, ctx);
      }
    });
  }

  /// From g = dL/do: dq, dk, d_content and dv overwritten, d_mixing added to, as is the gradient of an attention bias. `dots` [H x T] are
  /// the rows' Σ dO ∘ O (softmax_row_dots).
  ///
  ///     U = scale ds k,   dq += U ∘ m_h,   dm_h = Σ_t q ∘ U,   dk += scale dsᵀ (q ∘ m_h),   dc_h = scale Σ_t ds
  ///
  /// The tiles of a sequence's keys are dealt out to a few groups, as in exact attention; a group goes through all heads, so that it
  /// owns the gradients of its keys.
  void backward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> content, matrix_view<const S> v,
                matrix_view<const S> log_sum_exp, matrix_view<const S> dots, matrix_view<const S> g, matrix_view<S> dq, matrix_view<S> dk,
                matrix_view<S> d_content, matrix_view<S> dv, matrix_view<S> d_mixing, const context& ctx) const {
    const index_t T = q.rows(), N = k.rows(), H = plain.heads, r = q.cols(), padded = key_gradient_tile<S>::query_gradient_width(r);
    index_t longest = 0;
    for (index_t s = 0; s < plain.rows.count(); ++s) longest = std::max(longest, plain.key_rows.end(s, N) - plain.key_rows.begin(s));
    const index_t groups = std::clamp<index_t>(longest / attention_keys, 1, 4), units = plain.rows.count() * groups;
    const index_t pieces = std::min<index_t>(units, 16);  // each has its own sum of the mixing matrix's gradient
    const scratch<S> dq_parts(ctx, groups * T, r), mixing_parts(ctx, pieces * H, r);
    if (d_content.size() != 0) d_content.map().setZero();
    ctx.exec->run(pieces, 1, [&](index_t first_piece, index_t last_piece) {
      for (index_t piece = first_piece; piece < last_piece; ++piece) {
        const matrix_view<S> d_mix = mixing_parts.view().slice_rows(piece * H, H);
        d_mix.map().setZero();
        key_gradient_tile<S> tile(ctx, r, plain.width);
        const scratch<S> mixed(ctx, attention_gradient_queries, r), along(ctx, attention_gradient_queries, padded);
        for (index_t unit = piece; unit < units; unit += pieces) {
          const index_t s = unit / groups, group = unit % groups, i = plain.rows.begin(s), M = plain.rows.end(s, T) - i;
          const index_t j = plain.key_rows.begin(s), keys = plain.key_rows.end(s, N) - j;
          const matrix_view<S> part = dq_parts.view().slice_rows(group * T + i, M);
          part.map().setZero();
          for (index_t first = group * attention_keys; first < keys; first += groups * attention_keys) {
            const index_t n = std::min(attention_keys, keys - first);
            tile.load_keys(k.slice_rows(j + first, n), plain.scale);
            for (index_t h = 0; h < H; ++h) {
              tile.load_values(plain.head(v, h, j + first, n));
              const collaborative_mask<S> all = mask(h, s, content, d_content, T, N);
              for (index_t t = 0; t < M; t += attention_gradient_queries) {
                const index_t m = std::min(attention_gradient_queries, M - t);
                if (all.visible(t + m - 1) <= first) continue;
                const matrix_view<const S> rows = q.slice_rows(i + t, m);
                mix(rows, h, mixed.view().slice_rows(0, m));
                along.view().slice_rows(0, m).map().setZero();
                tile.add(mixed.view().slice_rows(0, m), plain.head(g, h, i + t, m), log_sum_exp.row(h) + i + t, dots.row(h) + i + t,
                         along.view().slice_rows(0, m), first, all.from(t, m));
                for (index_t c = 0; c < m; ++c) {
                  const auto u = along.view().slice_cols(0, r).row_array(c);
                  part.row_array(t + c) += u * mixing.row_array(h);
                  d_mix.row_array(h) += u * rows.row_array(c);
                }
              }
              tile.finish_values(plain.head(dv, h, j + first, n));
            }
            tile.finish_keys(dk.slice_rows(j + first, n));
          }
        }
      }
    });
    for (index_t piece = 0; piece < pieces; ++piece) d_mixing.map() += mixing_parts.view().slice_rows(piece * H, H).map();
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      const auto rows = [&](index_t group) { return dq_parts.view().slice_rows(group * T + first, last - first).map(); };
      auto to = dq.slice_rows(first, last - first).map();
      to = rows(0);
      for (index_t group = 1; group < groups; ++group) to += rows(group);
    });
  }
};

}  // namespace lithe::inline LITHE_ABI::detail
