#pragma once

#include "lithe/kernels/attention_gradient.hpp"
#include "lithe/kernels/rotary.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

/// An additive bias on the scaled scores: row h T + t holds what head h adds for query row t, one column for each key row (entries
/// between different sequences are not read). -inf hides a key. With `gradient` of the same shape, backward adds to it.
template <class S>
struct attention_bias {
  matrix_view<const S> values;
  matrix_view<S> gradient{};
};

namespace detail {

/// Throws shape_error unless segments, mask and bias fit T rows of H heads over N keys.
template <class S>
void check_heads(const char* who, index_t T, index_t N, index_t H, segments key_rows, const attention_bias<S>& bias, const context& ctx) {
  ctx.check(who, T);
  key_rows.check(who, N);
  require<shape_error>(key_rows.count() == ctx.rows.count(), who, ": expected as many sequences in the memory as in x, got ", key_rows.count(),
                       " and ", ctx.rows.count());
  if (bias.values.data() != nullptr) require_shape(who, "an attention bias", bias.values, H * T, N);
  if (bias.gradient.data() != nullptr) require_shape(who, "an attention bias gradient", bias.gradient, H * T, N);
}

template <class S>
void zero_padding(matrix_view<S> y, const context& ctx) {
  if (!ctx.mask.empty())
    for (index_t t = 0; t < y.rows(); ++t)
      if (!ctx.valid(t)) std::fill_n(y.row(t), y.cols(), S(0));
}
/// Of the projections of the source, whose rows may be another sequence's.
template <class S>
context of_source(matrix_view<const S> x, matrix_view<const S> source, const context& ctx) {
  return source.data() == x.data() ? ctx : ctx.position_wise();
}
/// x and source with zeros in the rows of padding, so that a NaN there reaches nothing; themselves without a mask. The mask is that
/// of x; a source of its own has none.
template <class S>
struct unpadded {
  scratch<S> copied;
  matrix_view<const S> x, source;
  unpadded(matrix_view<const S> x_, matrix_view<const S> source_, const context& ctx)
      : copied(ctx, ctx.mask.empty() ? 0 : x_.rows(), x_.cols()), x(x_), source(source_) {
    if (ctx.mask.empty()) return;
    copied.map() = x.map();
    zero_padding<S>(copied, ctx);
    if (source.data() == x.data()) source = copied.view();
    x = copied.view();
  }
};

/// What the queries of one head see of the keys of their sequence, both counted from the first row given.
template <class S>
struct attention_mask {
  bool causal = false;
  index_t ahead = 0;                    // keys before the key of query 0
  const std::uint8_t* valid = nullptr;  // of the keys
  matrix_view<const S> bias{};          // rows of these queries, columns of these keys
  matrix_view<S> bias_gradient{};

  [[nodiscard]] index_t visible(index_t i) const { return causal ? ahead + i + 1 : std::numeric_limits<index_t>::max(); }
  [[nodiscard]] bool hides() const { return valid != nullptr || bias.data() != nullptr; }
  void adjust(index_t i, index_t first, index_t n, S* scores) const {
    if (bias.data() != nullptr)
      for (index_t j = 0; j < n; ++j) {  // -inf hides a key whatever its score is, NaN too
        const S b = bias(i, first + j);
        scores[j] = b == -std::numeric_limits<S>::infinity() ? b : scores[j] + b;
      }
    if (valid != nullptr)
      for (index_t j = 0; j < n; ++j)
        if (valid[first + j] == 0) scores[j] = -std::numeric_limits<S>::infinity();
  }
  void collect(index_t i, index_t first, index_t n, const S* gradient) const {
    if (bias_gradient.data() != nullptr)
      for (index_t j = 0; j < n; ++j) bias_gradient(i, first + j) += gradient[j];
  }
  /// The same for the queries from the i-th on.
  [[nodiscard]] attention_mask from(index_t i, index_t n) const {
    attention_mask m = *this;
    m.ahead += i;
    if (bias.data() != nullptr) m.bias = bias.slice_rows(i, n);
    if (bias_gradient.data() != nullptr) m.bias_gradient = bias_gradient.slice_rows(i, n);
    return m;
  }
};

/// All heads and sequences of an exact attention. q and o are [T x H D], k and v [S x (key_value_heads) D], head by head.
template <class S>
struct attention_heads {
  static constexpr index_t block = 8 * attention_queries;  // queries that share the packing of a tile of keys

  index_t heads, key_value_heads, width;
  S scale;
  bool causal;
  segments rows{}, key_rows{};
  std::span<const std::uint8_t> valid{};  // of the keys
  attention_bias<S> bias{};

  [[nodiscard]] index_t shared() const { return heads / key_value_heads; }  // query heads to a key head
  template <class T>
  [[nodiscard]] matrix_view<T> head(matrix_view<T> x, index_t h, index_t first, index_t n) const {
    return x.slice_cols(h * width, width).slice_rows(first, n);
  }
  [[nodiscard]] attention_mask<S> mask(index_t h, index_t first, index_t n, index_t key_first, index_t key_n, index_t T) const {
    attention_mask<S> m{.causal = causal};
    if (!valid.empty()) m.valid = valid.data() + key_first;
    if (bias.values.data() != nullptr) m.bias = bias.values.slice_rows(h * T + first, n).slice_cols(key_first, key_n);
    if (bias.gradient.data() != nullptr) m.bias_gradient = bias.gradient.slice_rows(h * T + first, n).slice_cols(key_first, key_n);
    return m;
  }

  /// o and log_sum_exp [H x T].
  void forward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, matrix_view<S> o, matrix_view<S> log_sum_exp,
               const context& ctx) const {
    const index_t T = q.rows();
    scratch<index_t> blocks(ctx, T / block + rows.count(), 2);  // sequence, first row
    index_t n = 0;
    for (index_t s = 0; s < rows.count(); ++s)
      for (index_t i = rows.begin(s); i < rows.end(s, T); i += block, ++n) {
        blocks.row(n)[0] = s;
        blocks.row(n)[1] = i;
      }
    // Backwards: under a causal mask the last blocks of a sequence take longest, and long pieces should not come last.
    ctx.exec->run(n * heads, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece) {
        const index_t b = n - 1 - piece / heads, h = piece % heads, s = blocks.row(b)[0], i = blocks.row(b)[1];
        const index_t m = std::min(block, rows.end(s, T) - i), begin = rows.begin(s), j = key_rows.begin(s), N = key_rows.end(s, k.rows()) - j;
        attend<S>(head(q, h, i, m), head(k, h / shared(), j, N), head(v, h / shared(), j, N), scale,
                  mask(h, begin, rows.end(s, T) - begin, j, N, T).from(i - begin, m), head(o, h, i, m), log_sum_exp.row(h) + i, ctx);
      }
    });
  }

  /// dq, dk, dv overwritten from g = dL/do; adds to the bias gradient.
  ///
  /// The tiles of a sequence's keys are dealt out to a few groups, which work at the same time; each has its own dq, and these are
  /// summed in order. The number of groups follows from the longest sequence alone, so the bits do not depend on the workers.
  void backward(matrix_view<const S> q, matrix_view<const S> k, matrix_view<const S> v, matrix_view<const S> o, matrix_view<const S> log_sum_exp,
                matrix_view<const S> g, matrix_view<S> dq, matrix_view<S> dk, matrix_view<S> dv, const context& ctx) const {
    const index_t T = q.rows(), padded = key_gradient_tile<S>::query_gradient_width(width);
    index_t longest = 0;
    for (index_t s = 0; s < rows.count(); ++s) longest = std::max(longest, key_rows.end(s, k.rows()) - key_rows.begin(s));
    const index_t groups = std::clamp<index_t>(longest / 512, 1, 4);
    scratch<S> parts(ctx, groups * T, heads * padded), d(ctx, heads, T);
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      for (index_t h = 0; h < heads; ++h) softmax_row_dots<S>(head(g, h, first, last - first), head(o, h, first, last - first), d.row(h) + first);
    });
    const index_t pieces = key_value_heads * groups;
    ctx.exec->run(rows.count() * pieces, 1, [&](index_t first_piece, index_t last_piece) {
      for (index_t piece = first_piece; piece < last_piece; ++piece) {
        const index_t s = piece / pieces, group = piece % pieces % groups, key_head = piece % pieces / groups;
        const index_t i = rows.begin(s), M = rows.end(s, T) - i, j = key_rows.begin(s), N = key_rows.end(s, k.rows()) - j;
        const matrix_view<S> part = parts.view().slice_rows(group * T + i, M).slice_cols(key_head * shared() * padded, shared() * padded);
        part.map().setZero();
        key_gradient_tile<S> tile(ctx, width, width);
        for (index_t first = group * attention_keys; first < N; first += groups * attention_keys) {
          const index_t n = std::min(attention_keys, N - first);
          tile.load(head(k, key_head, j + first, n), head(v, key_head, j + first, n), scale);
          for (index_t c = 0; c < shared(); ++c) {
            const index_t h = key_head * shared() + c;
            const attention_mask<S> all = mask(h, i, M, j, N, T);
            for (index_t t = 0; t < M; t += attention_gradient_queries) {
              const index_t m = std::min(attention_gradient_queries, M - t);
              tile.add(head(q, h, i + t, m), head(g, h, i + t, m), log_sum_exp.row(h) + i + t, d.row(h) + i + t,
                       part.slice_rows(t, m).slice_cols(c * padded, padded), first, all.from(t, m));
            }
          }
          tile.finish(head(dk, key_head, j + first, n), head(dv, key_head, j + first, n));
        }
      }
    });
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t h = 0; h < heads; ++h) {
          S* to = dq.row(t) + h * width;
          std::copy_n(parts.row(t) + h * padded, width, to);
          for (index_t part = 1; part < groups; ++part)
            for (index_t c = 0; c < width; ++c) to[c] += parts.row(part * T + t)[h * padded + c];
        }
    });
  }
};

/// Rotates the first `table.cols()` features of every head of x, row t by the angles in row place(t).
template <class S, class Place>
void rotate_heads(matrix_view<S> x, index_t heads, matrix_view<const S> table, bool back, const context& ctx, Place place) {
  const index_t width = x.cols() / heads;
  ctx.exec->run(x.rows(), 64, [&](index_t first, index_t last) {
    for (index_t t = first; t < last; ++t)
      for (index_t h = 0; h < heads; ++h) rotate_pairs(x.row(t) + h * width, table.row(place(t)), table.cols(), back);
  });
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
