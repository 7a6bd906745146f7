#pragma once

#include "lithe/kernels/attention_gradient.hpp"
#include "lithe/kernels/bucket_sort.hpp"
#include "lithe/kernels/dropout_factors.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// What some queries of a bucket see of a tile of its keys: those before them (causal) or all, without themselves and without whom they met in an
/// earlier round. Queries and keys are counted by their rank in the bucket.
template <class S>
struct bucket_mask {
  bool causal = false;
  index_t rank = 0;                     // of query 0
  index_t earlier = 0;                  // rounds before this one
  const bucket_t* query_ids = nullptr;  // [earlier x query_stride]: where the queries were in those
  index_t query_stride = 0;
  const bucket_t* key_ids = nullptr;  // [earlier x attention_keys]
  double dropout = 0;
  rng_key key{};
  const position_t* tokens = nullptr;  // of the queries
  index_t row = 0;                     // of token 0 in this round, among the rows of all rounds

  [[nodiscard]] index_t visible(index_t i) const { return causal ? rank + i : std::numeric_limits<index_t>::max(); }
  [[nodiscard]] bool hides() const { return true; }
  void adjust(index_t i, index_t first, index_t n, S* scores) const {
    constexpr S hidden = -std::numeric_limits<S>::infinity();
    if (const index_t own = rank + i - first; own >= 0 && own < n) scores[own] = hidden;
    if (earlier == 0) return;
    bucket_t met[attention_keys] = {};
    for (index_t r = 0; r < earlier; ++r) {
      const bucket_t mine = query_ids[r * query_stride + i];
      const bucket_t* theirs = key_ids + r * attention_keys;
      for (index_t j = 0; j < n; ++j) met[j] = static_cast<bucket_t>(met[j] | (theirs[j] == mine ? 1 : 0));
    }
    for (index_t j = 0; j < n; ++j) scores[j] = met[j] != 0 ? hidden : scores[j];
  }
  void collect(index_t, index_t, index_t, const S*) const {}
  bool drop(index_t i, index_t first, index_t n, S* factors) const {
    if (dropout > 0) draw_factors(key, static_cast<std::uint64_t>(row + tokens[i]), static_cast<std::uint64_t>(first), n, dropout, factors);
    return dropout > 0;
  }
};

/// The tokens of a sequence sorted by bucket.
struct bucket_list {
  const position_t* order;
  const bucket_t* ids;
  index_t tokens;
  /// Where the buckets from b on begin.
  [[nodiscard]] index_t begin(index_t b) const {
    return std::lower_bound(order, order + tokens, b, [this](position_t t, index_t wanted) { return ids[t] < wanted; }) - order;
  }
  [[nodiscard]] index_t bucket(index_t rank) const { return ids[order[rank]]; }
};

/// All heads and sequences of exact bucket attention: a query sees every key of its sequence that shares a bucket with it in some round. q, v and o
/// are [T x heads width], head by head; scales [heads x T] make keys of the queries; ids [heads rounds x T], those from `buckets` on are padding,
/// which sees itself alone.
///
/// A token's score with itself is -1e5 whatever its query, so it is where every query starts, and the rounds leave it out.
template <class S>
struct bucket_windows {
  static constexpr index_t block = 8 * attention_queries;  // queries that share the packing of a tile of keys
  static constexpr S self_score = S(-1e5);

  index_t heads, width, rounds, buckets;
  bool causal;
  double dropout = 0;
  rng_key key{};
  segments rows{};

  /// o and log_sum_exp [heads x T].
  void forward(matrix_view<const S> q, matrix_view<const S> v, matrix_view<const S> scales, matrix_view<const bucket_t> ids, matrix_view<S> o,
               matrix_view<S> log_sum_exp, const context& ctx) const {
    const index_t T = q.rows();
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      for (index_t h = 0; h < heads; ++h)
        for (index_t t = first; t < last; ++t) {
          log_sum_exp(h, t) = self_score;
          head(o, h).row_array(t) = self_factor(h, t, T) * head(v, h).row_array(t);
        }
    });
    const scratch<piece> spans(ctx, T / block + rows.count());
    index_t n = 0;
    for (index_t s = 0; s < rows.count(); ++s)
      for (index_t i = 0, length = rows.end(s, T) - rows.begin(s); i < length; i += block)
        spans[n++] = {rows.begin(s), length, i, std::min(length, i + block)};
    const scratch<position_t> order(ctx, heads, T);
    for (index_t round = 0; round < rounds; ++round) {
      sort(round, ids, order, ctx);
      ctx.exec->run(n * heads, 1, [&](index_t first, index_t last) {
        key_tile<S> tile(ctx, width, width);
        query_block<S> queries(ctx, block, width);
        const scratch<S> gathered(ctx, block, width), found(ctx, block, width), keys(ctx, attention_keys, width), values(ctx, attention_keys, width);
        const scratch<S> sums(ctx, block);
        const scratch<bucket_t> query_ids(ctx, round, block), key_ids(ctx, round, attention_keys);
        for (index_t i = first; i < last; ++i) {
          const piece& p = spans[i % n];
          const index_t h = i / n;
          each_bucket(list(p, h, round, ids, order), p, [&](const bucket_list& l, index_t begin, index_t from, index_t to, index_t end) {
            if (end - begin < 2) return;
            const index_t M = to - from, stop = causal ? to : end;
            gather(part(q, p, h), l.order + from, M, gathered.view());
            gather_ids(ids, p, h, round, l.order + from, M, query_ids);
            queries.begin(gathered.view().slice_rows(0, M));
            bucket_mask<S> m = mask(p, h, round, T, l.order + from, from - begin, query_ids.data(), block, key_ids.data());
            for (index_t j = begin; j < stop; j += attention_keys) {
              const index_t N = std::min(attention_keys, stop - j);
              gather(part(q, p, h), l.order + j, N, keys.view(), scales.row(h) + p.begin);
              gather(part(v, p, h), l.order + j, N, values.view());
              gather_ids(ids, p, h, round, l.order + j, N, key_ids);
              tile.load(keys.view().slice_rows(0, N), values.view().slice_rows(0, N), S(1));
              queries.add(tile, j - begin, m);
            }
            queries.finish(found.view().slice_rows(0, M), sums.data());
            for (index_t k = 0; k < M; ++k) {
              const index_t t = p.begin + l.order[from + k];
              merge(head(o, h).row(t), log_sum_exp(h, t), found.row(k), sums[k]);
            }
          });
        }
      });
    }
  }

  /// dq (of queries alone), dk and dv overwritten from g = dL/do.
  ///
  /// In a round every token is in one bucket, so tiles of keys may be dealt out to a few groups, each with its own dq. The number of groups
  /// follows from the shapes alone, so the bits do not depend on the workers.
  void backward(matrix_view<const S> q, matrix_view<const S> v, matrix_view<const S> scales, matrix_view<const bucket_t> ids, matrix_view<const S> o,
                matrix_view<const S> log_sum_exp, matrix_view<const S> g, matrix_view<S> dq, matrix_view<S> dk, matrix_view<S> dv,
                const context& ctx) const {
    const index_t T = q.rows(), padded = key_gradient_tile<S>::query_gradient_width(width),
                  groups = std::clamp<index_t>(8 / std::max<index_t>(1, heads * rows.count()), 1, 4);
    const scratch<S> parts(ctx, groups * T, heads * width), d(ctx, heads, T);
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      const index_t n = last - first;
      for (index_t part = 0; part < groups; ++part) parts.view().slice_rows(part * T + first, n).map().setZero();
      dk.slice_rows(first, n).map().setZero();
      for (index_t h = 0; h < heads; ++h) {
        softmax_row_dots<S>(head(g, h).slice_rows(first, n), head(o, h).slice_rows(first, n), d.row(h) + first);
        for (index_t t = first; t < last; ++t)
          head(dv, h).row_array(t) = self_factor(h, t, T) * std::exp(self_score - log_sum_exp(h, t)) * head(g, h).row_array(t);
      }
    });
    const scratch<position_t> order(ctx, heads, T);
    for (index_t round = 0; round < rounds; ++round) {
      sort(round, ids, order, ctx);
      ctx.exec->run(rows.count() * heads * groups, 1, [&](index_t first, index_t last) {
        constexpr index_t M = attention_gradient_queries, N = attention_keys;
        key_gradient_tile<S> tile(ctx, width, width);
        const scratch<S> queries(ctx, M, width), gradients(ctx, M, width), query_gradients(ctx, M, padded), sums(ctx, M), dots(ctx, M);
        const scratch<S> keys(ctx, N, width), values(ctx, N, width), key_gradients(ctx, N, width), value_gradients(ctx, N, width);
        const scratch<bucket_t> query_ids(ctx, round, M), key_ids(ctx, round, N);
        for (index_t i = first; i < last; ++i) {
          const index_t s = i / (heads * groups), h = i / groups % heads, group = i % groups, length = rows.end(s, T) - rows.begin(s);
          const piece p{rows.begin(s), length, 0, length};
          const matrix_view<S> sum = head(parts.view(), h).slice_rows(group * T + p.begin, length);
          index_t number = 0;
          each_bucket(list(p, h, round, ids, order), p, [&](const bucket_list& l, index_t begin, index_t, index_t, index_t end) {
            if (end - begin < 2) return;
            for (index_t j = begin; j < end; j += N) {
              if (number++ % groups != group) continue;
              const index_t n = std::min(N, end - j);
              gather(part(q, p, h), l.order + j, n, keys.view(), scales.row(h) + p.begin);
              gather(part(v, p, h), l.order + j, n, values.view());
              gather_ids(ids, p, h, round, l.order + j, n, key_ids);
              tile.load(keys.view().slice_rows(0, n), values.view().slice_rows(0, n), S(1));
              for (index_t t = causal ? j : begin; t < end; t += M) {
                const index_t m = std::min(M, end - t);
                gather(part(q, p, h), l.order + t, m, queries.view());
                gather(part(g, p, h), l.order + t, m, gradients.view());
                gather_ids(ids, p, h, round, l.order + t, m, query_ids);
                for (index_t k = 0; k < m; ++k) {
                  sums[k] = log_sum_exp(h, p.begin + l.order[t + k]);
                  dots[k] = d.row(h)[p.begin + l.order[t + k]];
                }
                query_gradients.map().setZero();
                tile.add(queries.view().slice_rows(0, m), gradients.view().slice_rows(0, m), sums.data(), dots.data(),
                         query_gradients.view().slice_rows(0, m), j - begin,
                         mask(p, h, round, T, l.order + t, t - begin, query_ids.data(), M, key_ids.data()));
                scatter_add(query_gradients.view(), l.order + t, m, sum);
              }
              tile.finish(key_gradients.view().slice_rows(0, n), value_gradients.view().slice_rows(0, n));
              scatter_add(key_gradients.view(), l.order + j, n, part(dk, p, h));
              scatter_add(value_gradients.view(), l.order + j, n, part(dv, p, h));
            }
          });
        }
      });
    }
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      dq.slice_rows(first, last - first).map() = parts.view().slice_rows(first, last - first).map();
      for (index_t part = 1; part < groups; ++part)
        dq.slice_rows(first, last - first).map() += parts.view().slice_rows(part * T + first, last - first).map();
    });
  }

  /// Takes the softmax over other keys, o' and its log-sum-exp, into that of a query.
  void merge(S* o, S& log_sum_exp, const S* other, S other_log_sum_exp) const {
    if (other_log_sum_exp == -std::numeric_limits<S>::infinity()) return;
    const S most = std::max(log_sum_exp, other_log_sum_exp);
    const S mine = std::exp(log_sum_exp - most), theirs = std::exp(other_log_sum_exp - most), sum = mine + theirs;
    log_sum_exp = most + std::log(sum);
    for (index_t j = 0; j < width; ++j) o[j] = (mine * o[j] + theirs * other[j]) / sum;
  }

 private:
  /// A sequence, and a span of its sorted tokens.
  struct piece {
    index_t begin, length, first, last;
  };

  template <class T>
  [[nodiscard]] matrix_view<T> head(matrix_view<T> x, index_t h) const {
    return x.slice_cols(h * width, width);
  }
  template <class T>
  [[nodiscard]] matrix_view<T> part(matrix_view<T> x, const piece& p, index_t h) const {
    return head(x, h).slice_rows(p.begin, p.length);
  }
  [[nodiscard]] S self_factor(index_t h, index_t t, index_t T) const {
    S factor = 1;
    if (dropout > 0) draw_factors(key.child(static_cast<std::uint64_t>(h)), static_cast<std::uint64_t>(rounds * T + t), 0, 1, dropout, &factor);
    return factor;
  }
  [[nodiscard]] bucket_mask<S> mask(const piece& p, index_t h, index_t round, index_t T, const position_t* tokens, index_t rank,
                                    const bucket_t* query_ids, index_t query_stride, const bucket_t* key_ids) const {
    return {.causal = causal,
            .rank = rank,
            .earlier = round,
            .query_ids = query_ids,
            .query_stride = query_stride,
            .key_ids = key_ids,
            .dropout = dropout,
            .key = key.child(static_cast<std::uint64_t>(h)),
            .tokens = tokens,
            .row = round * T + p.begin};
  }

  void sort(index_t round, matrix_view<const bucket_t> ids, const scratch<position_t>& order, const context& ctx) const {
    ctx.exec->run(rows.count() * heads, 1, [&](index_t first, index_t last) {
      const scratch<index_t> starts(ctx, buckets + 2);
      for (index_t i = first; i < last; ++i) {
        const index_t s = i / heads, h = i % heads, begin = rows.begin(s);
        const auto n = static_cast<std::size_t>(rows.end(s, ids.cols()) - begin);
        bucket_sort({ids.row(h * rounds + round) + begin, n}, starts.span(), {order.row(h) + begin, n});
      }
    });
  }
  [[nodiscard]] bucket_list list(const piece& p, index_t h, index_t round, matrix_view<const bucket_t> ids, const scratch<position_t>& order) const {
    return {order.row(h) + p.begin, ids.row(h * rounds + round) + p.begin, p.length};
  }
  /// f(list, begin of the bucket, from, to, end of the bucket) for each bucket that has ranks from .. to - 1 in the span; not for padding.
  template <class F>
  void each_bucket(const bucket_list& l, const piece& p, F&& f) const {
    const index_t stop = std::min(p.last, l.begin(buckets));
    for (index_t at = p.first; at < stop;) {
      const index_t b = l.bucket(at), begin = at == p.first ? l.begin(b) : at, end = l.begin(b + 1), to = std::min(end, stop);
      f(l, begin, at, to, end);
      at = to;
    }
  }

  /// Row i of `to` = row tokens[i] of `from`, times its scale.
  void gather(matrix_view<const S> from, const position_t* tokens, index_t n, matrix_view<S> to, const S* scale = nullptr) const {
    for (index_t i = 0; i < n; ++i)
      if (scale == nullptr)
        std::copy_n(from.row(tokens[i]), width, to.row(i));
      else
        to.row_array(i) = scale[tokens[i]] * from.row_array(tokens[i]);
  }
  /// Row tokens[i] of `to` += row i of `from`.
  void scatter_add(matrix_view<const S> from, const position_t* tokens, index_t n, matrix_view<S> to) const {
    for (index_t i = 0; i < n; ++i) to.row_array(tokens[i]) += from.slice_cols(0, width).row_array(i);
  }
  /// Where the tokens were in the rounds before this one.
  void gather_ids(matrix_view<const bucket_t> ids, const piece& p, index_t h, index_t round, const position_t* tokens, index_t n,
                  const scratch<bucket_t>& to) const {
    for (index_t r = 0; r < round; ++r) {
      const bucket_t* from = ids.row(h * rounds + r) + p.begin;
      for (index_t i = 0; i < n; ++i) to.row(r)[i] = from[tokens[i]];
    }
  }
};

}  // namespace lithe::inline LITHE_ABI::detail
