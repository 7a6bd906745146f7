#pragma once

#include "lithe/kernels/key_norm.hpp"
#include "lithe/layers/attention/bucket_windows.hpp"
#include "lithe/layers/attention/key_value_cache.hpp"
#include "lithe/layers/attention/token_hash.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

struct bucket_attention_config {
  index_t inputs = 0, heads = 1;
  index_t head_width = 0;  ///< 0: inputs / heads
  index_t outputs = 0;     ///< 0: inputs
  bool causal = false;
  token_hash_config hash{};  ///< its number of buckets must be given: what a token sees must not depend on how many follow
  key_norm norm = key_norm::rms;
  double dropout = 0;  ///< of the softmax weights
};

/// Exact attention within buckets: the hashing, shared queries and keys of LSH attention (arXiv 2001.04451, section 3), but without its chunks. With
/// q = x Wqkᵀ, v = x Wvᵀ by heads, k_j = q_j n_j / √D, and bucket_r(i) of R rounds of hashing,
///
///     J_i = {j ≠ i in the sequence of i, j < i if causal: bucket_r(j) = bucket_r(i) for some r},     s_ij = q_i · k_j,  s_ii = -1e5
///     o_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij) over J_i and i itself;                                  y = concat(o) Woᵀ
///
/// Every pair counts once, however many rounds agree; a token sees itself if there is nobody else. No pair is missed, and a later token changes
/// no earlier row, hashing included, so decoding gives the rows of the full pass. x [T x inputs], y [T x outputs]. The time is
/// that of Σ n² pairs over all buckets of n tokens: where hashing collects most tokens in one bucket it is that of exact attention, see
/// `largest_bucket`. Memory is linear in T.
///
/// Directions, replay and external ids are as in lsh_attention. Padding (context::mask) is no key; its own rows give their own values.
/// Throws config_error (external ids out of range, too), shape_error, index_error (a record's ids out of range), state_error (a record without ids, or
/// of another call).
template <std::floating_point S>
struct bucket_attention {
  using scalar = S;
  struct record {
    kept<matrix<bucket_t>> buckets;  // [heads rounds x T]
    matrix<S> context;               // heads side by side [T x heads head_width]
    matrix<S> log_sum_exp;           // [heads x T]
  };
  struct gradient {
    gradient_of<linear<S>> query_key, value, output;
    gradient_of<token_hash<S>> hash;
  };

  bucket_attention_config config;  ///< with every 0 replaced by what it stands for
  linear<S> query_key, value, output;
  token_hash<S> hash;

  bucket_attention() = default;
  /// Projections start as `linear`. Throws config_error for sizes that do not go together.
  bucket_attention(bucket_attention_config c, rng_key random) : config(resolved(c)), hash(who, c.hash, random.child(3)) {
    const index_t A = config.heads * config.head_width;
    query_key = linear<S>({c.inputs, A, false}, random.child(0));
    value = linear<S>({c.inputs, A, false}, random.child(1));
    output = linear<S>({A, config.outputs, false}, random.child(2));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features(who, config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    require<state_error>(config.hash.family != hash_family::external, who,
                         ": external bucket ids are taken from a record; use the forward that has one");
    check_forward(who, *this, x, y, ctx);
    const index_t T = x.rows();
    const scratch<bucket_t> ids(ctx, config.heads * config.hash.rounds, T);
    const scratch<S> o(ctx, T, query_key.weight.rows()), log_sum_exp(ctx, config.heads, T);
    run(x, y, ids, o, log_sum_exp, false, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const index_t T = x.rows();
    auto& ids = r.buckets.value;
    const bool external = config.hash.family == hash_family::external && !ctx.replay;
    if (ctx.replay || external)
      check_ids(T, ids);
    else
      ids.resize(config.heads * config.hash.rounds, T);
    if (external) {
      hash.check_external(who, ids, buckets(), ctx.mask);
      hash_padding(ctx.mask, buckets(), ids);
    } else if (ctx.replay) {
      check_range(ids);
    }
    r.context.resize(T, query_key.weight.rows());
    r.log_sum_exp.resize(config.heads, T);
    run(x, y, ids, r.context, r.log_sum_exp, ctx.replay || external, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    check_ids(x.rows(), r.buckets.value);
    check_range(r.buckets.value);
    const index_t T = x.rows(), A = query_key.weight.rows(), d = config.head_width;
    recorded(who, r.context, T, A);
    recorded(who, r.log_sum_exp, config.heads, T);
    const shown<S> in(x, ctx), upstream(dy, ctx);
    const scratch<S> q(ctx, T, A), v(ctx, T, A), scales(ctx, config.heads, T), d_context(ctx, T, A), dq(ctx, T, A), dk(ctx, T, A), dv(ctx, T, A);
    project(in, q.view(), v.view(), scales.view(), ctx);
    output.backward(r.context, {}, upstream, d_context, g.output, ctx);
    windows(ctx).backward(q.view(), v.view(), scales.view(), r.buckets.value, r.context, r.log_sum_exp, d_context.view(), dq.view(), dk.view(),
                          dv.view(), ctx);
    ctx.exec->run(T, rows_together, [&](index_t first, index_t last) {
      for (index_t h = 0; h < config.heads; ++h) {
        const auto part = [&](const scratch<S>& m) { return m.view().slice_cols(h * d, d).slice_rows(first, last - first); };
        for (index_t t = first; t < last; ++t) dk.view().slice_cols(h * d, d).row_array(t) *= scales.row(h)[t];
        add_key_gradient<S>(config.norm, part(q), scales.row(h) + first, part(dk), part(dq));
      }
    });
    query_key.backward(in, {}, dq, dx, g.query_key, ctx);
    value.add_backward(in, dv, dx, g.value, ctx);
  }

  /// The tokens in the fullest bucket of any head, round and sequence: what a pass costs grows with its square. ctx as in forward.
  [[nodiscard]] index_t largest_bucket(const record& r, const context& ctx) const {
    const auto& ids = r.buckets.value;
    const scratch<index_t> count(ctx, buckets());
    index_t most = 0;
    for (index_t row = 0; row < ids.rows(); ++row)
      for (index_t s = 0; s < ctx.rows.count(); ++s) {
        std::fill_n(count.data(), buckets(), index_t{0});
        for (index_t t = ctx.rows.begin(s); t < ctx.rows.end(s, ids.cols()); ++t)
          if (ids(row, t) < buckets()) most = std::max(most, ++count[ids(row, t)]);
      }
    return most;
  }

  /// Keys and values, and for each head and round the tokens of a bucket as a list from the last one back.
  struct cache {
    key_value_cache<S> tokens;
    matrix<S> directions;         ///< [heads rounds N x head_width]
    matrix<bucket_t> ids;         ///< (place, head, round) by row, tokens by column
    matrix<position_t> previous;  ///< the token before in the same bucket, or -1
    matrix<position_t> last;      ///< of each bucket, or -1
  };
  /// Throws config_error unless the layer is causal and its directions are the same for all sequences.
  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    require<config_error>(config.causal, who, ": expected a causal layer to decode with");
    require<config_error>(config.hash.family != hash_family::external && config.hash.sharing != direction_sharing::head_and_sequence, who,
                          ": decoding needs directions of its own that do not depend on the sequence");
    cache c{key_value_cache<S>(who, slots, capacity, config.heads, config.head_width), {}, {}, {}, {}};
    const index_t N = directions();
    c.directions.resize(config.heads * N, config.head_width);
    for (index_t h = 0; h < config.heads; ++h) hash.draw(who, h, config.heads, 0, factors(), view(c.directions).slice_rows(h * N, N), {});
    c.ids.resize(slots * config.heads * config.hash.rounds, capacity);
    c.previous.resize(c.ids.rows(), capacity);
    c.last.setConstant(c.ids.rows(), buckets(), -1);
    return c;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape(who, "y", y, out.rows, out.cols);
    check(c, x.rows(), ctx);
    const index_t T = x.rows(), A = query_key.weight.rows(), d = config.head_width;
    const scratch<S> q(ctx, T, A), v(ctx, T, A), scales(ctx, config.heads, T), o(ctx, T, A), log_sum_exp(ctx, config.heads, T);
    const scratch<bucket_t> ids(ctx, config.heads * config.hash.rounds, T);
    const scratch<index_t> slot(ctx, T), position(ctx, T);
    index_t late = 0;  // rows that see cached tokens
    const scratch<index_t> row(ctx, T);
    append(x, q.view(), v.view(), scales.view(), ids.view(), c, ctx);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t begin = ctx.rows.begin(s), n = ctx.rows.end(s, T) - begin, before = c.tokens.tokens(ctx.slot(s)) - n;
      if (before == 0 && n > 1) {  // all they see is here
        detail::bucket_windows<S> w = windows(ctx);
        w.rows = {};
        w.dropout = 0;
        w.forward(q.view().slice_rows(begin, n), v.view().slice_rows(begin, n), scales.view().slice_cols(begin, n), ids.view().slice_cols(begin, n),
                  o.view().slice_rows(begin, n), log_sum_exp.view().slice_cols(begin, n), ctx);
        continue;
      }
      for (index_t i = 0; i < n; ++i) {
        row[late] = begin + i;
        slot[late] = ctx.slot(s);
        position[late++] = before + i;
      }
    }
    ctx.exec->run(late * config.heads, 1, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        const index_t n = i / config.heads, h = i % config.heads;
        attend_cached(c, slot[n], h, position[n], q.view().slice_cols(h * d, d).slice_rows(row[n], 1), v.row(row[n]) + h * d, o.row(row[n]) + h * d,
                      ctx);
      }
    });
    output.forward(o, y, ctx);
  }
  /// Appends x to the cache only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    check(c, x.rows(), ctx);
    const index_t T = x.rows(), A = query_key.weight.rows();
    const scratch<S> q(ctx, T, A), v(ctx, T, A), scales(ctx, config.heads, T);
    const scratch<bucket_t> ids(ctx, config.heads * config.hash.rounds, T);
    append(x, q.view(), v.view(), scales.view(), ids.view(), c, ctx);
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    check(c);
    c.tokens.truncate(who, slot, length);
    const index_t n = config.heads * config.hash.rounds, row = c.tokens.place[static_cast<std::size_t>(slot)] * n;
    for (index_t i = row; i < row + n; ++i)
      for (index_t b = 0; b < c.last.cols(); ++b)
        while (c.last(i, b) >= length) c.last(i, b) = c.previous(i, c.last(i, b));
  }
  void permute(cache& c, std::span<const index_t> order) const {
    check(c);
    c.tokens.permute(who, order, [&](index_t from, index_t to, index_t length) {
      const index_t n = config.heads * config.hash.rounds;
      c.ids.block(to * n, 0, n, length) = c.ids.block(from * n, 0, n, length);
      c.previous.block(to * n, 0, n, length) = c.previous.block(from * n, 0, n, length);
      c.last.middleRows(to * n, n) = c.last.middleRows(from * n, n);
    });
  }

  /// For a token behind `length` others in buckets that are equally full.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double A = static_cast<double>(query_key.weight.rows()), R = static_cast<double>(config.hash.rounds);
    const double met = static_cast<double>(length) * std::min(1.0, R / static_cast<double>(buckets()));
    return query_key.forward_cost(length) + value.forward_cost(length) + output.forward_cost(length) +
           cost{0, 4 * met * A + 2 * static_cast<double>(directions()) * A, 2 * met * A * sizeof(S)};
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query_key", s.query_key...);
    f("value", s.value...);
    f("output", s.output...);
    f("hash", s.hash...);
  }

 private:
  static constexpr const char* who = "bucket_attention";
  static constexpr index_t rows_together = 64;

  static bucket_attention_config resolved(bucket_attention_config c) {
    require<config_error>(c.inputs >= 1 && c.heads >= 1, who, ": expected at least 1 input and 1 head, got ", c.inputs, " and ", c.heads);
    require<config_error>(c.head_width > 0 || (c.head_width == 0 && c.inputs % c.heads == 0), who,
                          ": expected inputs divisible by heads, or a head_width, got ", c.inputs, " inputs, ", c.heads,
                          " heads and a head_width of ", c.head_width);
    require<config_error>(c.hash.family == hash_family::constant || !c.hash.buckets.empty(), who,
                          ": expected a number of buckets; one that follows the length would let later tokens change earlier rows");
    if (c.head_width == 0) c.head_width = c.inputs / c.heads;
    if (c.outputs == 0) c.outputs = c.inputs;
    require<config_error>(c.outputs >= 1, who, ": expected at least 1 output, got ", c.outputs);
    checked_rate(who, c.dropout);
    return c;
  }
  [[nodiscard]] bucket_factors factors() const { return hash.buckets(who, 1, 1); }
  [[nodiscard]] index_t buckets() const { return factors().total(); }
  [[nodiscard]] index_t directions() const { return config.hash.rounds * hash.directions(factors()); }

  /// Whether the cache is one of such a layer.
  void check(const cache& c) const {
    const index_t lists = static_cast<index_t>(c.tokens.length.size()) * config.heads * config.hash.rounds;
    require<state_error>(
        c.ids.rows() == lists && c.last.cols() == buckets() && c.directions.rows() == config.heads * directions(), who,
        ": the cache is of another layer: expected ", lists, " lists of ", buckets(), " buckets, got ", c.ids.rows(),
        " of ", c.last.cols());
  }
  void check(cache& c, index_t T, const context& ctx) const {
    check(c);
    c.tokens.check(who, T, ctx, config.heads, config.head_width);
  }
  void check_ids(index_t T, const matrix<bucket_t>& ids) const { recorded(who, ids, config.heads * config.hash.rounds, T); }
  void check_range(const matrix<bucket_t>& ids) const {
    const bucket_t most = ids.size() == 0 ? bucket_t{0} : ids.maxCoeff();
    require<index_error>(most <= buckets(), who, ": expected bucket ids below ", buckets(), " (or that, for padding), got ", most);
  }
  [[nodiscard]] detail::bucket_windows<S> windows(const context& ctx) const {
    return {.heads = config.heads,
            .width = config.head_width,
            .rounds = config.hash.rounds,
            .buckets = buckets(),
            .causal = config.causal,
            .dropout = ctx.train ? config.dropout : 0,
            .key = ctx.key,
            .rows = ctx.rows};
  }
  void run(matrix_view<const S> x, matrix_view<S> y, matrix_view<bucket_t> ids, matrix_view<S> o, matrix_view<S> log_sum_exp, bool keep,
           const context& ctx) const {
    const index_t T = x.rows(), A = query_key.weight.rows();
    {
      const shown<S> in(x, ctx);
      const scratch<S> q(ctx, T, A), v(ctx, T, A), scales(ctx, config.heads, T);
      project(in, q.view(), v.view(), scales.view(), ctx);
      if (!keep) choose(q.view(), ids, ctx);
      windows(ctx).forward(q.view(), v.view(), scales.view(), ids, o, log_sum_exp, ctx);
    }
    output.forward(o, y, ctx);
  }
  void project(matrix_view<const S> x, matrix_view<S> q, matrix_view<S> v, matrix_view<S> scales, const context& ctx) const {
    const index_t d = config.head_width;
    query_key.forward(x, q, ctx);
    value.forward(x, v, ctx);
    ctx.exec->run(x.rows(), rows_together, [&](index_t first, index_t last) {
      for (index_t h = 0; h < config.heads; ++h)
        key_scales<S>(config.norm, q.slice_cols(h * d, d).slice_rows(first, last - first), scales.row(h) + first);
    });
  }
  void choose(matrix_view<const S> q, matrix_view<bucket_t> ids, const context& ctx) const {
    const index_t d = config.head_width, R = config.hash.rounds, T = q.rows();
    const bool alone = config.hash.sharing == direction_sharing::head_and_sequence;
    const scratch<S> drawn(ctx, directions(), d);
    for (index_t h = 0; h < config.heads; ++h)
      for (index_t s = 0; s < (alone ? ctx.rows.count() : 1); ++s) {
        const index_t begin = alone ? ctx.rows.begin(s) : 0, n = (alone ? ctx.rows.end(s, T) : T) - begin;
        hash.draw(who, h, config.heads, s, factors(), drawn.view(), ctx);
        hash.hash(q.slice_cols(h * d, d).slice_rows(begin, n), drawn.view(), factors(), ids.slice_rows(h * R, R).slice_cols(begin, n), ctx);
      }
    hash_padding(ctx.mask, buckets(), ids);
  }
  void append(matrix_view<const S> x, matrix_view<S> q, matrix_view<S> v, matrix_view<S> scales, matrix_view<bucket_t> ids, cache& c,
              const context& ctx) const {
    const index_t T = x.rows(), d = config.head_width, R = config.hash.rounds, N = directions();
    project(x, q, v, scales, ctx);
    const scratch<S> k(ctx, T, q.cols());
    for (index_t h = 0; h < config.heads; ++h) {
      hash.hash(q.slice_cols(h * d, d), view(c.directions).slice_rows(h * N, N), factors(), ids.slice_rows(h * R, R), ctx);
      for (index_t t = 0; t < T; ++t) k.view().slice_cols(h * d, d).row_array(t) = scales(h, t) * q.slice_cols(h * d, d).row_array(t);
    }
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t begin = ctx.rows.begin(s), n = ctx.rows.end(s, T) - begin, slot = ctx.slot(s), before = c.tokens.tokens(slot);
      const index_t row = c.tokens.place[static_cast<std::size_t>(slot)] * config.heads * R;
      for (index_t i = 0; i < config.heads * R; ++i)
        for (index_t t = 0; t < n; ++t) {
          const bucket_t b = ids(i, begin + t);
          c.ids(row + i, before + t) = b;
          c.previous(row + i, before + t) = std::exchange(c.last(row + i, b), static_cast<position_t>(before + t));
        }
    }
    c.tokens.append(k.view(), v, ctx);
  }
  void attend_cached(const cache& c, index_t slot, index_t h, index_t t, matrix_view<const S> q, const S* v, S* o, const context& ctx) const {
    const index_t d = config.head_width, R = config.hash.rounds, first = c.tokens.row(slot, h);
    const index_t row = (c.tokens.place[static_cast<std::size_t>(slot)] * config.heads + h) * R;
    key_tile<S> tile(ctx, d, d);
    query_block<S> query(ctx, 1, d);
    const scratch<S> keys(ctx, attention_keys, d), values(ctx, attention_keys, d), found(ctx, 1, d);
    index_t n = 0;
    const auto flush = [&] {
      if (n == 0) return;
      tile.load(keys.view().slice_rows(0, n), values.view().slice_rows(0, n), S(1));
      query.add(tile, 0, see_all{});
      n = 0;
    };
    query.begin(q);
    for (index_t r = 0; r < R; ++r)
      for (index_t j = c.previous(row + r, t); j >= 0; j = c.previous(row + r, j)) {
        bool met = false;
        for (index_t earlier = 0; earlier < r; ++earlier) met = met || c.ids(row + earlier, j) == c.ids(row + earlier, t);
        if (met) continue;
        std::copy_n(c.tokens.keys.row(first + j).data(), d, keys.row(n));
        std::copy_n(c.tokens.values.row(first + j).data(), d, values.row(n));
        if (++n == attention_keys) flush();
      }
    flush();
    S others, all = detail::bucket_windows<S>::self_score;
    query.finish(found.view(), &others);
    std::copy_n(v, d, o);
    windows(ctx).merge(o, all, found.data(), others);
  }
};

}  // namespace lithe::inline LITHE_ABI
