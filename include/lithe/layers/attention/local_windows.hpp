#pragma once

#include "lithe/kernels/attention_gradient.hpp"
#include "lithe/kernels/dropout_factors.hpp"

namespace lithe::inline LITHE_ABI {

/// What a query gives that may see no key of its window: the mean of the window's values, or zero.
enum class empty_row { mean, zero };

namespace detail {

/// What the queries of one chunk see of a run of keys. Keys are counted by their slot in the window; `ahead` slots stand before the
/// key of query 0, and slot n holds key n + offset.
template <class S>
struct window_mask {
  bool causal = false;
  index_t ahead = 0;
  const std::uint8_t* valid = nullptr;  // of the keys of the sequence
  index_t offset = 0;
  double dropout = 0;
  rng_key key{};
  index_t row = 0;  // the number of query 0 in the whole call

  [[nodiscard]] index_t visible(index_t i) const { return causal ? ahead + i + 1 : std::numeric_limits<index_t>::max(); }
  [[nodiscard]] bool hides() const { return valid != nullptr; }
  void adjust(index_t, index_t first, index_t n, S* scores) const {
    if (valid != nullptr)
      for (index_t j = 0; j < n; ++j)
        if (valid[offset + first + j] == 0) scores[j] = -std::numeric_limits<S>::infinity();
  }
  void collect(index_t, index_t, index_t, const S*) const {}
  bool drop(index_t i, index_t first, index_t n, S* factors) const {
    if (dropout > 0) draw_factors(key, static_cast<std::uint64_t>(row + i), static_cast<std::uint64_t>(first), n, dropout, factors);
    return dropout > 0;
  }
};

/// All heads and sequences of an attention over chunks: a query of chunk c sees the keys of chunks c - before .. c + after of its
/// sequence. q, k, v and o are [T x heads width], head by head; positions count within a sequence, whose last chunk may be short.
template <class S>
struct local_windows {
  static constexpr index_t block = 8 * attention_queries;  // queries that share the packing of a tile of keys

  index_t heads, width, chunk, before, after;
  index_t pad_to;  // the windows go around a sequence that is filled up to a multiple of so many tokens
  S scale;
  bool causal, circular, mean;
  double dropout = 0;
  rng_key key{};
  segments rows{};
  std::span<const std::uint8_t> valid{};  // of the keys

  /// o and log_sum_exp [heads x T]; a query that sees no key has a log_sum_exp of -inf.
  void forward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, matrix_view<S> o, matrix_view<S> log_sum_exp,
               const context& ctx) const {
    const index_t T = q.rows(), most = std::min(block, chunk);
    const scratch<piece> pieces(ctx, T / most + T / chunk + 2 * rows.count() + 1);
    index_t n = 0;
    each_sequence(T, [&](const sequence& s) {
      for (index_t c = 0; c < s.chunks; ++c)
        for (index_t i = c * s.chunk; i < s.end(c); i += block) pieces[n++] = {s, c, i, std::min(block, s.end(c) - i)};
    });
    ctx.exec->run(n * heads, std::max<index_t>(1, 256 / most), [&](index_t first, index_t last) {
      key_tile<S> tile(ctx, width, width);
      query_block<S> queries(ctx, std::min(block, longest(T)), width);
      for (index_t i = first; i < last; ++i) attend_piece(pieces[i % n], i / n, q, k, v, o, log_sum_exp, tile, queries);
    });
  }

  /// dq, dk, dv overwritten from g = dL/do.
  ///
  /// A key belongs to the windows of before + 1 + after chunks of queries, so runs of chunks of keys that are neighbours would add to the same
  /// dq. They are done in up to three rounds (even, odd, and an odd last one, which meets the first across the end).
  void backward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, matrix_view<const S> o, matrix_view<const S> log_sum_exp,
                matrix_view<const S> g, matrix_view<S> dq, matrix_view<S> dk, matrix_view<S> dv, const context& ctx) const {
    const index_t T = q.rows(), padded = key_gradient_tile<S>::query_gradient_width(width);
    const scratch<S> d(ctx, heads, T), wide(ctx, padded == width ? 0 : T, heads * padded);
    const matrix_view<S> sum = padded == width ? dq : wide.view();
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      sum.slice_rows(first, last - first).map().setZero();
      for (index_t h = 0; h < heads; ++h)
        softmax_row_dots<S>(g.slice_cols(h * width, width).slice_rows(first, last - first),
                            o.slice_cols(h * width, width).slice_rows(first, last - first), d.row(h) + first);
    });
    const index_t span = std::max({index_t{1}, before + after, 512 / chunk});  // chunks of keys in a run, at least
    const scratch<piece> pieces(ctx, T / (span * chunk) + rows.count() + 1);
    for (const index_t colour : {0, 1, 2}) {
      index_t n = 0;
      each_sequence(T, [&](const sequence& s) {
        const index_t runs = std::max<index_t>(1, s.chunks / span);
        for (index_t r = 0; r < runs; ++r) {
          const bool odd_last = r > 0 && r == runs - 1 && runs % 2 == 1;
          if ((odd_last ? 2 : r % 2) != colour) continue;
          const index_t first = r * s.chunks / runs;
          pieces[n++] = {s, first, 0, (r + 1) * s.chunks / runs - first};
        }
      });
      ctx.exec->run(n * heads, 1, [&](index_t first, index_t last) {
        key_gradient_tile<S> tile(ctx, width, width);
        for (index_t i = first; i < last; ++i)
          for (index_t c = 0; c < pieces[i % n].count; ++c)
            differentiate_chunk(pieces[i % n].s, pieces[i % n].chunk + c, i / n, {q, k, v, g, log_sum_exp, d, sum, dk, dv}, tile);
      });
    }
    if (padded != width)
      ctx.exec->run(T, 64, [&](index_t first, index_t last) {
        for (index_t t = first; t < last; ++t)
          for (index_t h = 0; h < heads; ++h) std::copy_n(wide.row(t) + h * padded, width, dq.row(t) + h * width);
      });
  }

 private:
  struct sequence {
    index_t begin, length, chunk, chunks;
    index_t around;  // chunks with those that filling up adds, which hold nothing
    [[nodiscard]] index_t end(index_t c) const { return std::min(length, (c + 1) * chunk); }
  };
  /// `count` queries of a chunk from `first` on; in backward so many chunks of keys.
  struct piece {
    sequence s;
    index_t chunk, first, count;
  };
  struct gradient_views {
    matrix_view<const S> q, k, v, g, log_sum_exp, d;
    matrix_view<S> dq, dk, dv;
  };

  template <class F>
  void each_sequence(index_t T, F&& f) const {
    for (index_t s = 0; s < rows.count(); ++s) {
      const index_t begin = rows.begin(s), n = rows.end(s, T) - begin;
      // Up to one chunk: all see all, once.
      if (n > 0) f(n <= chunk ? sequence{begin, n, n, 1, 1} : sequence{begin, n, chunk, (n + chunk - 1) / chunk, (n + pad_to - 1) / pad_to * (pad_to / chunk)});
    }
  }
  [[nodiscard]] index_t longest(index_t T) const { return std::max<index_t>(1, std::min(chunk, T)); }

  /// f(slot of the first key, first key, keys) for each run of neighbouring chunks in the window of chunk c.
  template <class F>
  void each_run(const sequence& s, index_t c, F&& f) const {
    if (s.chunks == 1) return f(index_t{0}, index_t{0}, s.length);
    for (index_t at = -before; at <= after;) {
      index_t from = c + at;
      if (circular) from = (from % s.around + s.around) % s.around;
      if (from < 0 || from >= s.chunks) {
        ++at;
        continue;
      }
      const index_t count = std::min(after - at + 1, s.chunks - from);
      f((at + before) * s.chunk, from * s.chunk, s.end(from + count - 1) - from * s.chunk);
      at += count;
    }
  }
  /// For queries of a head from position i on, and a run of keys.
  [[nodiscard]] window_mask<S> mask(const sequence& s, index_t h, index_t i, index_t slot, index_t first) const {
    return {.causal = causal,
            .ahead = i - first + slot,
            .valid = valid.empty() ? nullptr : valid.data() + s.begin,
            .offset = first - slot,
            .dropout = dropout,
            .key = key.child(static_cast<std::uint64_t>(h)),
            .row = s.begin + i};
  }
  template <class T>
  [[nodiscard]] matrix_view<T> part(matrix_view<T> x, const sequence& s, index_t h, index_t first, index_t n, index_t w) const {
    return x.slice_cols(h * w, w).slice_rows(s.begin + first, n);
  }

  void attend_piece(const piece& p, index_t h, matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, matrix_view<S> o,
                    matrix_view<S> log_sum_exp, key_tile<S>& tile, query_block<S>& queries) const {
    const matrix_view<S> out = part(o, p.s, h, p.first, p.count, width);
    S* const lse = log_sum_exp.row(h) + p.s.begin + p.first;
    queries.begin(part(q, p.s, h, p.first, p.count, width));
    each_run(p.s, p.chunk, [&](index_t slot, index_t first, index_t n) {
      const window_mask<S> m = mask(p.s, h, p.first, slot, first);
      if (causal) n = std::min(n, p.first + p.count - first);
      for (index_t j = 0; j < n; j += attention_keys) {
        const index_t count = std::min(attention_keys, n - j);
        tile.load(part(k, p.s, h, first + j, count, width), part(v, p.s, h, first + j, count, width), scale);
        queries.add(tile, slot + j, m);
      }
    });
    queries.finish(out, lse);
    if (!valid.empty() && mean)
      for (index_t i = 0; i < p.count; ++i)
        if (empty(lse[i])) {
          each_run(p.s, p.chunk,
                   [&](index_t, index_t first, index_t n) { out.map().row(i) += part(v, p.s, h, first, n, width).map().colwise().sum(); });
          out.row_array(i) /= static_cast<S>(window(p.s, p.chunk));
        }
  }

  /// The gradients of the keys and values of chunk c, and what its keys add to dq.
  void differentiate_chunk(const sequence& s, index_t c, index_t h, const gradient_views& x, key_gradient_tile<S>& tile) const {
    const index_t padded = key_gradient_tile<S>::query_gradient_width(width);
    for (index_t j = c * s.chunk; j < s.end(c); j += attention_keys) {
      const index_t n = std::min(attention_keys, s.end(c) - j);
      tile.load(part(x.k, s, h, j, n, width), part(x.v, s, h, j, n, width), scale);
      each_asking_chunk(s, c, [&](index_t from, index_t slot) {
        if (causal && from < c) return;
        const window_mask<S> all = mask(s, h, from * s.chunk, slot, c * s.chunk);
        for (index_t i = from * s.chunk; i < s.end(from); i += attention_gradient_queries) {
          const index_t m = std::min(attention_gradient_queries, s.end(from) - i);
          window_mask<S> here = all;
          here.ahead += i - from * s.chunk;
          here.row += i - from * s.chunk;
          tile.add(part(x.q, s, h, i, m, width), part(x.g, s, h, i, m, width), x.log_sum_exp.row(h) + s.begin + i, x.d.row(h) + s.begin + i,
                   part(x.dq, s, h, i, m, padded), slot + j - c * s.chunk, here);
        }
      });
      const matrix_view<S> dv = part(x.dv, s, h, j, n, width);
      tile.finish(part(x.dk, s, h, j, n, width), dv);
      if (!valid.empty() && mean)
        each_asking_chunk(s, c, [&](index_t from, index_t) {
          for (index_t i = from * s.chunk; i < s.end(from); ++i)
            if (empty(x.log_sum_exp(h, s.begin + i)))
              dv.map().rowwise() += part(x.g, s, h, i, 1, width).map().row(0) / static_cast<S>(window(s, from));
        });
    }
  }
  /// f(chunk, slot of the first key) for each time that chunk c stands in the window of a chunk of queries.
  template <class F>
  void each_asking_chunk(const sequence& s, index_t c, F&& f) const {
    if (s.chunks == 1) return f(index_t{0}, index_t{0});
    for (index_t at = -before; at <= after; ++at) {
      index_t from = c - at;
      if (circular) from = (from % s.around + s.around) % s.around;
      if (from >= 0 && from < s.chunks) f(from, (at + before) * s.chunk);
    }
  }
  [[nodiscard]] index_t window(const sequence& s, index_t c) const {
    index_t n = 0;
    each_run(s, c, [&](index_t, index_t, index_t count) { n += count; });
    return n;
  }
  static bool empty(S log_sum_exp) { return log_sum_exp == -std::numeric_limits<S>::infinity(); }
};

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
