#pragma once

#include "lithe/layers/attention/key_value_cache.hpp"
#include "lithe/layers/attention/local_windows.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

struct local_attention_config {
  index_t inputs = 0, heads = 1;
  index_t head_width = 0;         ///< 0: inputs / heads
  index_t outputs = 0;            ///< 0: inputs
  index_t chunk = 64;             ///< tokens
  index_t before = 1, after = 0;  ///< chunks seen beside a query's own
  bool causal = false;
  bool circular = true;               ///< the first chunk sees the last one, as in the public models; else chunks that are not there are left out
  index_t pad_to = 0;                 ///< sequences count as filled up to a multiple of so many tokens, itself one of `chunk`; 0: of `chunk`
  empty_row empty = empty_row::mean;  ///< what a query gives all of whose keys are padding or later
  double dropout = 0;                 ///< of the softmax weights
};

/// Local attention (arXiv 2001.04451, the chunked layers of its models; Hugging Face's LocalSelfAttention and its output projection). Each
/// sequence is cut into chunks of m tokens, the last one as short as it comes, and a query of chunk c sees chunks c - before .. c + after:
///
///     q = x Wqᵀ, k = x Wkᵀ / √d, v = x Wvᵀ;  o = dropout(softmax(q kᵀ)) v for each head;  y = concat(o) Woᵀ
///
/// x [T x inputs], y [T x outputs], no biases. A window that wraps around more chunks than there are holds some of them twice, and each time
/// counts; a sequence of up to m tokens is one window. Causal: no later position. Rows hidden by context::mask are no keys, but ask like
/// all others, as in the public models: what they give is finite and means nothing. So padding a sequence on the right to a multiple of pad_to
/// tokens, as these models do, leaves the rows of its tokens as they are. Throws config_error, shape_error, state_error (a record of another call).
template <std::floating_point S>
struct local_attention {
  using scalar = S;
  struct record {
    matrix<S> query, key, value;  // projected [T x heads head_width]
    matrix<S> context;            // heads side by side
    matrix<S> log_sum_exp;        // [heads x T]
  };
  struct gradient {
    gradient_of<linear<S>> query, key, value, output;
  };
  using cache = key_value_cache<S>;

  local_attention_config config;  ///< with every 0 replaced by what it stands for
  linear<S> query, key, value, output;

  local_attention() = default;
  /// Projections start as `linear`. Throws config_error for sizes that do not go together.
  local_attention(local_attention_config c, rng_key random) : config(resolved(c)) {
    const index_t A = config.heads * config.head_width;
    query = linear<S>({c.inputs, A, false}, random.child(0));
    key = linear<S>({c.inputs, A, false}, random.child(1));
    value = linear<S>({c.inputs, A, false}, random.child(2));
    output = linear<S>({A, config.outputs, false}, random.child(3));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features(who, config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> in(x, ctx);
    const index_t T = x.rows(), A = query.weight.rows();
    const scratch<S> q(ctx, T, A), k(ctx, T, A), v(ctx, T, A), o(ctx, T, A), log_sum_exp(ctx, config.heads, T);
    run(in, y, q.view(), k.view(), v.view(), o.view(), log_sum_exp.view(), ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> in(x, ctx);
    for (matrix<S>* m : {&r.query, &r.key, &r.value, &r.context}) m->resize(x.rows(), query.weight.rows());
    r.log_sum_exp.resize(config.heads, x.rows());
    run(in, y, r.query, r.key, r.value, r.context, r.log_sum_exp, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    const index_t T = x.rows(), A = query.weight.rows();
    for (const matrix<S>* m : {&r.query, &r.key, &r.value, &r.context}) recorded(who, *m, T, A);
    recorded(who, r.log_sum_exp, config.heads, T);
    const shown<S> in(x, ctx), d(dy, ctx);
    const scratch<S> d_context(ctx, T, A), dq(ctx, T, A), dk(ctx, T, A), dv(ctx, T, A);
    output.backward(r.context, {}, d, d_context, g.output, ctx);
    windows(ctx).backward(r.query, r.key, r.value, r.context, r.log_sum_exp, d_context.view(), dq.view(), dk.view(), dv.view(), ctx);
    query.backward(in, {}, dq, dx, g.query, ctx);
    key.add_backward(in, dk, dx, g.key, ctx);
    value.add_backward(in, dv, dx, g.value, ctx);
  }

  /// Throws config_error unless the layer is causal and its windows do not reach around to later chunks: an earlier row would change.
  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    require<config_error>(config.causal, who, ": expected a causal layer to decode with");
    require<config_error>(!config.circular || config.after == 0, who, ": expected after = 0 to decode with circular windows, whose last chunk would see ",
                          "the first one anew with each length, got ", config.after);
    return cache({who, slots, capacity, config.chunk, config.before}, config.heads, config.head_width);
  }
  /// The rows of the full pass (of one whose windows do not wrap around to themselves: before < chunks, or not
  /// circular). The cache keeps the windows of the newest tokens alone, whatever its capacity: `truncate` goes back to
  /// nothing, or by placed_cache::reserve tokens and some more, not further.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape(who, "y", y, out.rows, out.cols);
    check(c, x.rows(), ctx);
    const index_t T = x.rows(), A = query.weight.rows(), sequences = ctx.rows.count();
    const scratch<S> q(ctx, T, A), k(ctx, T, A), v(ctx, T, A), o(ctx, T, A);
    query.forward(x, q.view(), ctx);
    key.forward(x, k.view(), ctx);
    value.forward(x, v.view(), ctx);
    const index_t most = std::min(config.chunk, detail::local_windows<S>::block);
    const scratch<piece> pieces(ctx, T / most + T / config.chunk + 3 * sequences + 1);
    const scratch<index_t> next(ctx, sequences);
    for (index_t s = 0; s < sequences; ++s) next[s] = ctx.rows.begin(s);
    for (bool more = true; more;) {
      // A slot takes in as many rows as it has room for, and their queries look before the next ones come.
      more = false;
      index_t n = 0;
      for (index_t s = 0; s < sequences; ++s) {
        const index_t slot = ctx.slot(s), begin = next[s], left = ctx.rows.end(s, T) - begin, position = c.tokens(slot);
        const index_t count =
            left == 0 ? 0 : c.append(slot, k.view().slice_rows(begin, left), v.view().slice_rows(begin, left));
        for (index_t i = 0; i < count; i += pieces[n - 1].count)
          pieces[n++] = {slot, begin + i, position + i,
                         std::min({most, config.chunk - (position + i) % config.chunk, count - i})};
        next[s] += count;
        more = more || count < left;
      }
      ctx.exec->run(n * config.heads, 1, [&](index_t first, index_t last) {
        for (index_t i = first; i < last; ++i) attend_cached(pieces[i % n], i / n, q.view(), o.view(), c, ctx);
      });
    }
    output.forward(o.view(), y, ctx);
  }
  /// Appends the keys and values of x only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    check(c, x.rows(), ctx);
    const scratch<S> k(ctx, x.rows(), key.weight.rows()), v(ctx, x.rows(), key.weight.rows());
    key.forward(x, k.view(), ctx);
    value.forward(x, v.view(), ctx);
    c.append(k.view(), v.view(), ctx);
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const { return c.least_length(who, slot); }
  void truncate(cache& c, index_t slot, index_t length) const { c.truncate(who, slot, length); }
  void permute(cache& c, std::span<const index_t> order) const {
    c.permute(who, order, [](index_t, index_t, index_t) {});
  }

  /// For a token that stands in the middle of its chunk and sees whole chunks beside it, or `length` tokens if there are fewer.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double own = static_cast<double>(config.chunk) * (config.causal ? 0.5 : 1), beside = config.causal ? 0 : static_cast<double>(config.after);
    const double n = std::min(static_cast<double>(length), own + static_cast<double>(config.chunk) * (static_cast<double>(config.before) + beside));
    const double A = static_cast<double>(query.weight.rows());
    return query.forward_cost(length) + key.forward_cost(length) + value.forward_cost(length) + output.forward_cost(length) +
           cost{0, 4 * n * A, 2 * n * A * sizeof(S)};
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query", s.query...);
    f("key", s.key...);
    f("value", s.value...);
    f("output", s.output...);
  }

 private:
  static constexpr const char* who = "local_attention";
  /// New queries of one chunk: their slot, their rows in x, their positions.
  struct piece {
    index_t slot, row, position, count;
  };

  static local_attention_config resolved(local_attention_config c) {
    require<config_error>(c.inputs >= 1 && c.heads >= 1, who, ": expected at least 1 input and 1 head, got ", c.inputs, " and ", c.heads);
    require<config_error>(c.head_width > 0 || (c.head_width == 0 && c.inputs % c.heads == 0), who,
                          ": expected inputs divisible by heads, or a head_width, got ", c.inputs, " inputs, ", c.heads,
                          " heads and a head_width of ", c.head_width);
    require<config_error>(c.chunk >= 1 && c.before >= 0 && c.after >= 0, who,
                          ": expected a chunk of at least 1 token, before and after of at least 0, got ", c.chunk, ", ", c.before, " and ", c.after);
    if (c.pad_to == 0) c.pad_to = c.chunk;
    require<config_error>(c.pad_to >= 1 && c.pad_to % c.chunk == 0, who, ": expected pad_to to be a multiple of the chunk ", c.chunk, ", got ", c.pad_to);
    if (c.head_width == 0) c.head_width = c.inputs / c.heads;
    if (c.outputs == 0) c.outputs = c.inputs;
    require<config_error>(c.outputs >= 1, who, ": expected at least 1 output, got ", c.outputs);
    checked_rate(who, c.dropout);
    return c;
  }
  [[nodiscard]] S scale() const { return static_cast<S>(1 / std::sqrt(static_cast<double>(config.head_width))); }

  [[nodiscard]] detail::local_windows<S> windows(const context& ctx) const {
    return {.heads = config.heads,
            .width = config.head_width,
            .chunk = config.chunk,
            .before = config.before,
            .after = config.after,
            .pad_to = config.pad_to,
            .scale = scale(),
            .causal = config.causal,
            .circular = config.circular,
            .mean = config.empty == empty_row::mean,
            .dropout = ctx.train ? config.dropout : 0,
            .key = ctx.key,
            .rows = ctx.rows,
            .valid = ctx.mask};
  }
  void run(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> q, matrix_view<S> k, matrix_view<S> v, matrix_view<S> o,
           matrix_view<S> log_sum_exp, const context& ctx) const {
    query.forward(x, q, ctx);
    key.forward(x, k, ctx);
    value.forward(x, v, ctx);
    windows(ctx).forward(q, k, v, o, log_sum_exp, ctx);
    output.forward(o, y, ctx);
  }
  void check(cache& c, index_t T, const context& ctx) const {
    require<state_error>(c.chunk == config.chunk && c.before == config.before, who,
                         ": the cache is of another layer: expected windows of chunk ", config.chunk, " and ",
                         config.before, " before it, got ", c.chunk, " and ", c.before);
    c.check(who, T, ctx, config.heads, config.head_width);
  }
  void attend_cached(const piece& p, index_t h, matrix_view<const S> q, matrix_view<S> o, const cache& c, const context& ctx) const {
    constexpr index_t few = 12;  // up to here, reading the keys costs more than the products
    const index_t d = config.head_width, W = c.keys.cols(), start = c.oldest(p.position),
                  N = p.position + p.count - start;
    const index_t row = c.row(p.slot, h) + start - c.first[static_cast<std::size_t>(p.slot)];
    const S* k = c.keys.row(row).data();
    const S* v = c.values.row(row).data();
    const matrix_view<const S> mine = q.slice_cols(h * d, d).slice_rows(p.row, p.count);
    const matrix_view<S> out = o.slice_cols(h * d, d).slice_rows(p.row, p.count);
    if (p.count <= few) {
      const scratch<S> rows(ctx, p.count, W), found(ctx, p.count, W);
      index_t visible[few];
      detail::tile::pad_rows<S>(mine, rows.data(), scale());
      for (index_t i = 0; i < p.count; ++i) visible[i] = p.position - start + i + 1;
      attend_few<S>(rows.view(), k, v, visible, found.view(), ctx);
      for (index_t i = 0; i < p.count; ++i) std::copy_n(found.row(i), d, out.row(i));
    } else {
      const scratch<S> log_sum_exp(ctx, p.count);
      attend<S>(mine, {k, N, d, W}, {v, N, d, W}, scale(), detail::window_mask<S>{.causal = true, .ahead = p.position - start}, out,
                log_sum_exp.data(), ctx);
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
