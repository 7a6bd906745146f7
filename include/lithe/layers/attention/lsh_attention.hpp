#pragma once

#include "lithe/kernels/attention_gradient.hpp"
#include "lithe/kernels/dropout.hpp"
#include "lithe/layers/attention/lsh_cache.hpp"
#include "lithe/layers/attention/lsh_heads.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

/// Attention among tokens with similar queries (LSH attention of the Reformer, arXiv 2001.04451, section 3). Queries
/// are keys too: with q = x Wqkᵀ, v = x Wvᵀ by heads, and R rounds of hashing the queries to buckets, each round sorts
/// the tokens of a sequence by bucket, cuts them into chunks of m, and lets the queries of a chunk see the keys of
/// `before` chunks, their own and `after` chunks:
///
///     s_ij = q_i · k_j,  k_j = q_j n_j / √D;      o_i = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij) over all rounds;      y =
///     dropout(concat(o) Woᵀ)
///
/// x [T x inputs], y [T x outputs]; O(T R m D (before + 1 + after)) time, and memory that is linear in T. A sequence of
/// at most `exact_up_to` tokens sees all of its keys. Later tokens never enter a causal output, but they move the
/// chunks, and so can change which earlier ones do. Padding (context::mask) is no key; its own rows are what the
/// published models make of them, and their gradient counts.
///
/// In training, directions are drawn from the context's key; in inference they are fixed, by a key that is saved with
/// the model. The record keeps the bucket ids, and backward and replay use these and never hash again.
/// hash_family::external takes the ids that the caller left in the record, and writes those of padding and of exact
/// sequences over.
///
/// Throws config_error for options that cannot work and external ids out of range, shape_error for matrices, segments,
/// masks or directions that do not fit, state_error for a record without ids or of another call.
template <std::floating_point S>
struct lsh_attention {
  using scalar = S;
  struct record {
    kept<matrix<bucket_t>> buckets;  // [H R x T]; padding sorted apart has the number of buckets, exact sequences have 0
    matrix<S> context;               // heads side by side [T x H D]
    matrix<S> maximum, sum;          // of the softmax over all rounds [H x T]
  };
  struct gradient {
    typename linear<S>::gradient query_key, value, output;
    typename token_hash<S>::gradient hash;
  };

  linear<S> query_key, value, output;
  token_hash<S> hash;
  lsh_attention_config config;  ///< with every 0 replaced by what it stands for

  lsh_attention() = default;
  /// Projections start as `linear`. Throws config_error for options that do not go together.
  lsh_attention(lsh_attention_config c, rng_key random) : hash("lsh_attention", c.hash, random.child(3)), config(detail::resolved(c)) {
    const index_t A = config.heads * config.head_width;
    query_key = linear<S>({config.inputs, A, false}, random.child(0));
    value = linear<S>({config.inputs, A, false}, random.child(1));
    output = linear<S>({A, config.outputs, false}, random.child(2));
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("lsh_attention", config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    require<state_error>(config.hash.family != hash_family::external, "lsh_attention: external bucket ids are taken from a record; use the forward that has one");
    check(x, y, ctx);
    const shown<S> in(x, ctx);
    const index_t T = x.rows(), H = config.heads;
    const scratch<bucket_t> ids(ctx, H * config.hash.rounds, T);
    const scratch<S> heads(ctx, T, H * config.head_width), maximum(ctx, H, T), sum(ctx, H, T);
    run_forward(in, y, {heads, maximum, sum, ids}, false, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check(x, y, ctx);
    const bool keep = prepare(x.rows(), r, ctx);
    r.context.resize(x.rows(), config.heads * config.head_width);
    r.maximum.resize(config.heads, x.rows());
    r.sum.resize(config.heads, x.rows());
    run_forward(shown<S>(x, ctx), y, {r.context, r.maximum, r.sum, r.buckets.value}, keep, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    recorded(who, r.context, x.rows(), config.heads * config.head_width);
    recorded(who, r.maximum, config.heads, x.rows());
    recorded(who, r.sum, config.heads, x.rows());
    check_ids(x.rows(), r);
    run_backward(shown<S>(x, ctx), r, {}, shown<S>(dy, ctx), dx, g, ctx);
  }

  /// y += f(x), and the record keeps the choices alone; works on a few heads at a time, so it needs less memory than `forward`.
  void add_to(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check(x, y, ctx);
    const bool keep = prepare(x.rows(), r, ctx);
    forget(r);
    run_forward(shown<S>(x, ctx), y, {{}, {}, {}, r.buckets.value}, keep, ctx);
  }
  /// y -= f(x) and dx += f'(x)ᵀ dy, with the choices of the record: for reversible blocks.
  void reverse(matrix_view<const S> x, matrix_view<S> y, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
               const context& ctx) const {
    check(x, y, ctx);
    check_backward(who, *this, x, dy, dx, g, ctx);
    check_ids(x.rows(), r);
    run_backward(shown<S>(x, ctx), r, y, shown<S>(dy, ctx), dx, g, ctx);
  }

  /// Queries, values and buckets of the rows so far (lithe::cached_layer).
  using cache = lsh_cache<S>;

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    require<config_error>(config.causal, "lsh_attention: expected a causal layer to decode with");
    require<config_error>(config.hash.family != hash_family::external, "lsh_attention: decoding needs a hash of its own, not external bucket ids");
    return cache(hash, config, slots, capacity);
  }
  /// The outputs of new rows, which follow what their slots hold; they are appended. Rows that begin a slot get what
  /// `forward` gives them with the cache's directions and buckets (a slot's, if sequences have their own: slot s has
  /// those of sequence s); later ones, one after the other, see in each round the window around their place among the
  /// tokens there are then. That is how the published models decode; except up to `exact_up_to` tokens it is not what a
  /// forward over the whole sequence gives, because later tokens move the chunks. Throws as `attention::decode`.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("lsh_attention", "y", y, out.rows, out.cols);
    const index_t T = x.rows(), H = config.heads, d = config.head_width;
    c.check(config, T, ctx);
    const scratch<S> o(ctx, T, H * d);
    context inference = ctx;
    inference.train = false;
    inference.slots = {};
    inference.rows = {};
    const index_t sequences = ctx.rows.count();
    const scratch<index_t> before(ctx, sequences);
    for (index_t s = 0; s < sequences; ++s) before[s] = c.tokens.tokens(ctx.slot(s));
    append(x, c, ctx);
    for (index_t s = 0; s < sequences; ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, T) - i;
      if (before[s] != 0 || n == 0) continue;
      const auto ids = view(c.ids).slice_rows(c.list_row(ctx.slot(s), 0, 0), H * config.hash.rounds).slice_cols(0, n);
      const scratch<S> softmax(ctx, 2 * H, n);
      attend(x.slice_rows(i, n),
             {o.view().slice_rows(i, n), softmax.view().slice_rows(0, H), softmax.view().slice_rows(H, H), ids}, {},
             c.hash, true, inference);
    }
    ctx.exec->run(sequences * H, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece) {
        const index_t s = piece / H, h = piece % H, slot = ctx.slot(s), i = ctx.rows.begin(s), n = ctx.rows.end(s, T) - i;
        for (index_t t = 0; t < n; ++t) {
          const auto token = static_cast<position_t>(before[s] + t);
          for (index_t r = 0; r < config.hash.rounds; ++r) c.link(c.list_row(slot, h, r), token);
          if (before[s] != 0) detail::attend_cached<S>(config, c, slot, h, token, o.row(i + t) + h * d, ctx);
        }
      }
    });
    output.forward(o, y, ctx);
  }
  /// Appends x only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    c.check(config, x.rows(), ctx);
    append(x, c, ctx);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s), end = c.tokens.tokens(slot), n = ctx.rows.end(s, x.rows()) - ctx.rows.begin(s);
      for (index_t h = 0; h < config.heads; ++h)
        for (index_t r = 0; r < config.hash.rounds; ++r)
          for (index_t t = end - n; t < end; ++t) c.link(c.list_row(slot, h, r), static_cast<position_t>(t));
    }
  }
  void truncate(cache& c, index_t slot, index_t length) const { c.truncate(slot, length); }
  void permute(cache& c, std::span<const index_t> order) const { c.permute(order); }

  /// For a token of a sequence of `length` tokens.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double d = static_cast<double>(config.head_width), H = static_cast<double>(config.heads), R = static_cast<double>(config.hash.rounds);
    const bool exact = length <= config.exact_up_to;
    const index_t padded = std::max<index_t>(1, (length + config.pad_to - 1) / config.pad_to) * config.pad_to;
    const double keys = exact ? static_cast<double>(length) : R * static_cast<double>((config.before + 1 + config.after) * config.chunk);
    const double hashing = exact ? 0 : 2 * R * d * static_cast<double>(hash.directions(hash.buckets("lsh_attention", padded, config.chunk)));
    return query_key.forward_cost(length) + value.forward_cost(length) + output.forward_cost(length) +
           cost{0, H * (4 * keys * d + hashing), 2 * keys * d * H * sizeof(S)};
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query_key", s.query_key...);
    f("value", s.value...);
    f("output", s.output...);
    f("hash", s.hash...);
  }

 private:
  static constexpr const char* who = "lsh_attention";
  static constexpr index_t block = 512;         // rows of x that are projected to all heads while they are in a cache
  static constexpr index_t wide_block = 4096;   // rows whose heads are joined at once
  static constexpr std::uint64_t output_child = 2;

  void append(matrix_view<const S> x, cache& c, const context& ctx) const {
    const index_t T = x.rows(), H = config.heads, d = config.head_width, R = config.hash.rounds;
    const scratch<S> q(ctx, T, H * d), v(ctx, T, H * d), scales(ctx, T);
    const scratch<bucket_t> ids(ctx, R, T);
    query_key.forward(x, q, ctx);
    value.forward(x, v, ctx);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s);
      if (ctx.rows.end(s, T) == ctx.rows.begin(s) || c.tokens.tokens(slot) != 0) continue;
      c.began_hashed(slot) = ctx.rows.end(s, T) - ctx.rows.begin(s) > config.exact_up_to;
      c.sequence[static_cast<std::size_t>(slot)] = slot;
    }
    for (index_t h = 0; h < H; ++h) {
      const auto part = q.view().slice_cols(h * d, d);
      for (index_t s = 0; s < (c.alone() ? ctx.rows.count() : 1); ++s) {
        const index_t i = c.alone() ? ctx.rows.begin(s) : 0, count = (c.alone() ? ctx.rows.end(s, T) : T) - i;
        c.hash.hash(part.slice_rows(i, count), c.directions(ctx.slot(s), h), c.hash.config.buckets,
                    ids.view().slice_cols(i, count), ctx);
      }
      key_scales<S>(config.norm, part, scales.data());
      for (index_t s = 0; s < ctx.rows.count(); ++s) {
        const index_t i = ctx.rows.begin(s), count = ctx.rows.end(s, T) - i, slot = ctx.slot(s),
                      at = c.tokens.tokens(slot);
        std::copy_n(scales.data() + i, count, c.scales.row(c.head_row(slot, h)).data() + at);
        for (index_t r = 0; r < R; ++r) std::copy_n(ids.row(r) + i, count, c.ids.row(c.list_row(slot, h, r)).data() + at);
      }
    }
    c.tokens.append(q, v, ctx);
  }

  using heads_of = detail::lsh_heads<S>;
  struct activations {
    matrix_view<S> context, maximum, sum;  // of all heads; none: y += f(x), and nothing is kept
    matrix_view<bucket_t> ids;
  };

  void check(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    require<shape_error>(x.rows() >> 31 == 0, "lsh_attention: expected fewer than 2^31 tokens, got ", x.rows());
  }
  void check_ids(index_t T, const record& r) const { recorded(who, r.buckets.value, config.heads * config.hash.rounds, T); }
  // Whether the record's ids are taken as they are.
  bool prepare(index_t T, record& r, const context& ctx) const {
    if (ctx.replay || config.hash.family == hash_family::external)
      check_ids(T, r);
    else
      r.buckets.value.resize(config.heads * config.hash.rounds, T);
    return ctx.replay;
  }

  [[nodiscard]] static matrix_view<const S> rows_of_head(const linear<S>& l, index_t h, index_t d) { return view(l.weight).slice_rows(h * d, d); }
  [[nodiscard]] bool drops(const context& ctx) const { return ctx.train && config.output_dropout > 0; }
  void drop_output(matrix_view<S> y, index_t first, const context& ctx) const {
    if (drops(ctx)) drop<S>(y, y, config.output_dropout, ctx.key.child(output_child), ctx.chunk(first, y.rows()));
  }

  // q, v [G T x D] and scales [G T] of heads first .. first + G - 1.
  void project(matrix_view<const S> x, index_t first, index_t G, matrix_view<S> q, matrix_view<S> v, S* scales, const context& ctx) const {
    const index_t T = x.rows(), d = config.head_width;
    ctx.exec->run(T, block, [&](index_t from, index_t to) {
      for (index_t g = 0; g < G; ++g) {
        const auto part = [&](matrix_view<S> m) { return m.slice_rows(g * T + from, to - from); };
        gemm_nt<S>(x.slice_rows(from, to - from), rows_of_head(query_key, first + g, d), part(q), ctx);
        gemm_nt<S>(x.slice_rows(from, to - from), rows_of_head(value, first + g, d), part(v), ctx);
        key_scales<S>(config.norm, part(q), scales + g * T + from);
      }
    });
  }
  // Neighbouring sequences with equally many buckets are hashed together.
  void choose(const heads_of& heads, matrix_view<bucket_t> ids, const context& ctx) const {
    const index_t R = config.hash.rounds, n = ctx.rows.count();
    for (index_t g = 0; g < heads.count; ++g)
      for (index_t s = 0, next; s < n; s = next) {
        const auto one = heads.find(s);
        const auto rows = ids.slice_rows((heads.first + g) * R, R);
        next = s + 1;
        if (one.exact) {
          for (index_t r = 0; r < R; ++r) std::fill_n(rows.row(r) + one.begin, one.length, bucket_t{0});
          continue;
        }
        const bucket_factors f = heads.buckets(one);
        index_t end = one.begin + one.length;
        for (; next < n && config.hash.sharing != direction_sharing::head_and_sequence; ++next) {
          const auto other = heads.find(next);
          if (other.exact || !(heads.buckets(other) == f)) break;
          end = other.begin + other.length;
        }
        const scratch<S> directions(ctx, R * heads.hash.directions(f), config.head_width);
        heads.hash.draw("lsh_attention", heads.first + g, config.heads, s, f, directions, ctx);
        const auto part = rows.slice_cols(one.begin, end - one.begin);
        heads.hash.hash(heads.q.slice_rows(g * heads.T + one.begin, end - one.begin), directions, f, part, ctx);
        const auto mask = ctx.mask.empty() ? ctx.mask : ctx.mask.subspan(static_cast<std::size_t>(one.begin), static_cast<std::size_t>(end - one.begin));
        if (heads.hash.config.family == hash_family::external) heads.hash.check_external("lsh_attention", part, f.total(), mask);
        if (config.padding_apart) hash_padding(mask, f.total(), part);
      }
  }

  void run_forward(matrix_view<const S> x, matrix_view<S> y, const activations& a, bool keep, const context& ctx) const {
    attend(x, a, y, hash, keep, ctx);
    if (a.context.data() == nullptr) return;
    output.forward(a.context, y, ctx);
    drop_output(y, 0, ctx);
  }
  // The heads of all tokens, to `a`; or else to y through the output projection, a few heads at a time.
  void attend(matrix_view<const S> x, const activations& a, matrix_view<S> y, const token_hash<S>& by, bool keep, const context& ctx) const {
    const index_t T = x.rows(), H = config.heads, d = config.head_width, R = config.hash.rounds, G = heads_of::together(T, d, H);
    const bool all = a.context.data() != nullptr;
    const scratch<S> rows(ctx, G * T, (all ? 2 : 3) * d), scales(ctx, G, T), softmax(ctx, all ? 0 : 2 * G, T);
    const auto column = [&](index_t i) { return rows.view().slice_cols(i * d, d); };
    const scratch<position_t> order(ctx, G * R, T), places(ctx, config.count_once ? G * R : 0, T);
    for (index_t h = 0; T != 0 && h < H; h += G) {
      const index_t n = std::min(G, H - h);
      project(x, h, n, column(0), column(1), scales.data(), ctx);
      const heads_of heads{config, by, ctx, T, h, n, column(0), column(1), scales.data(), a.ids, order, places};
      if (!keep) choose(heads, a.ids, ctx);
      heads.sort();
      if (all) {
        heads.forward([&](index_t g) { return a.context.slice_cols((h + g) * d, d); }, a.maximum.slice_rows(h, n), a.sum.slice_rows(h, n));
      } else {
        heads.forward([&](index_t g) { return column(2).slice_rows(g * T, T); }, softmax.view().slice_rows(0, n), softmax.view().slice_rows(G, n));
        add_output(column(2), h, n, y, S(1), ctx);
      }
    }
  }

  // y += sign dropout(Σ o_h Wo_hᵀ) over n heads from h on, o [n T x D].
  void add_output(matrix_view<const S> o, index_t h, index_t n, matrix_view<S> y, S sign, const context& ctx) const {
    const index_t T = y.rows(), d = config.head_width;
    const scratch<S> room(ctx, std::min(T, wide_block), config.outputs);
    for (index_t t = 0; t < T; t += wide_block) {
      const index_t rows = std::min(wide_block, T - t);
      const matrix_view<S> part = room.view().slice_rows(0, rows);
      for (index_t g = 0; g < n; ++g)
        gemm_nt<S>(o.slice_rows(g * T + t, rows), view(output.weight).slice_cols((h + g) * d, d), part, ctx, g == 0 ? update::assign : update::add);
      drop_output(part, t, ctx);
      ctx.exec->run(rows, block, [&](index_t from, index_t to) { y.slice_rows(t + from, to - from).map() += sign * part.slice_rows(from, to - from).map(); });
    }
  }

  // Without y: backward from the record's heads. With it they are computed again and taken from y, and dx is added to.
  void run_backward(matrix_view<const S> x, const record& r, matrix_view<S> y, matrix_view<const S> dy, matrix_view<S> dx, gradient& dw,
                    const context& ctx) const {
    const index_t T = x.rows(), H = config.heads, d = config.head_width, R = config.hash.rounds, G = heads_of::together(T, d, H);
    const bool again = y.data() != nullptr;
    // All that belongs to a token side by side: sorted tokens are met in no order, each on a page of its own.
    const scratch<S> rows(ctx, G * T, (again ? 6 : 5) * d);
    const auto column = [&](index_t i) { return rows.view().slice_cols(i * d, d); };
    const matrix_view<S> q = column(0), v = column(1), g = column(2), dq = column(3), dv = column(4);
    const scratch<S> scales(ctx, G, T), dots(ctx, G, T), softmax(ctx, again ? 2 * G : 0, T);
    const scratch<position_t> order(ctx, G * R, T), places(ctx, config.count_once ? G * R : 0, T);
    for (index_t h = 0; T != 0 && h < H; h += G) {
      const index_t n = std::min(G, H - h);
      project(x, h, n, q, v, scales.data(), ctx);
      const heads_of heads{config, hash, ctx, T, h, n, q, v, scales.data(), r.buckets.value, order, places};
      heads.sort();
      if (again) {
        heads.forward([&](index_t i) { return column(5).slice_rows(i * T, T); }, softmax.view().slice_rows(0, n), softmax.view().slice_rows(G, n));
        add_output(column(5), h, n, y, S(-1), ctx);
      }
      const auto head_output = [&](index_t i) -> matrix_view<const S> {
        return again ? matrix_view<const S>(column(5)).slice_rows(i * T, T) : matrix_view<const S>(r.context).slice_cols((h + i) * d, d);
      };
      split_gradient(dy, h, n, head_output, g, dw, ctx);
      ctx.exec->run(T, block, [&](index_t from, index_t to) {
        for (index_t i = 0; i < n; ++i) {
          softmax_row_dots<S>(g.slice_rows(i * T + from, to - from), head_output(i).slice_rows(from, to - from), dots.row(i) + from);
          rows.view().slice_rows(i * T + from, to - from).slice_cols(3 * d, 2 * d).map().setZero();  // dq, dv
        }
      });
      if (again)
        heads.backward(g, softmax.view().slice_rows(0, n), softmax.view().slice_rows(G, n), dots, dq, dv);
      else
        heads.backward(g, view(r.maximum).slice_rows(h, n), view(r.sum).slice_rows(h, n), dots, dq, dv);
      ctx.exec->run(T, block, [&](index_t from, index_t to) {
        for (index_t i = 0; i < n; ++i) {
          const auto part = [&](matrix_view<const S> m) { return m.slice_rows(i * T + from, to - from); };
          const matrix_view<S> out = dx.slice_rows(from, to - from);
          gemm_nn<S>(part(dq), rows_of_head(query_key, h + i, d), out, ctx, h + i == 0 && !again ? update::assign : update::add);
          gemm_nn<S>(part(dv), rows_of_head(value, h + i, d), out, ctx, update::add);
        }
      });
      for (index_t i = 0; i < n; ++i) {
        gemm_tn<S>(dq.slice_rows(i * T, T), x, view(dw.query_key.weight).slice_rows((h + i) * d, d), ctx, update::add);
        gemm_tn<S>(dv.slice_rows(i * T, T), x, view(dw.value.weight).slice_rows((h + i) * d, d), ctx, update::add);
      }
    }
  }

  // g_h = dropout(dy) Wo_h and dWo_h += dropout(dy)ᵀ o_h for n heads from h on.
  template <class Heads>
  void split_gradient(matrix_view<const S> dy, index_t h, index_t n, Heads&& o, matrix_view<S> g, gradient& dw, const context& ctx) const {
    const index_t T = dy.rows(), d = config.head_width;
    const scratch<S> room(ctx, drops(ctx) ? std::min(T, wide_block) : 0, config.outputs);
    for (index_t t = 0; t < T; t += wide_block) {
      const index_t rows = std::min(wide_block, T - t);
      matrix_view<const S> part = dy.slice_rows(t, rows);
      if (drops(ctx)) {
        drop<S>(part, room.view().slice_rows(0, rows), config.output_dropout, ctx.key.child(output_child), ctx.chunk(t, rows));
        part = room.view().slice_rows(0, rows);
      }
      for (index_t i = 0; i < n; ++i) {
        gemm_nn<S>(part, view(output.weight).slice_cols((h + i) * d, d), g.slice_rows(i * T + t, rows), ctx);
        gemm_tn<S>(part, o(i).slice_rows(t, rows), view(dw.output.weight).slice_cols((h + i) * d, d), ctx, update::add);
      }
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
