#pragma once

#include "lithe/layers/attention/collaborative_base.hpp"
#include "lithe/layers/attention/key_value_cache.hpp"

namespace lithe::inline LITHE_ABI {

/// Collaborative multi-head attention over each sequence (arXiv 2006.16362, equation 6): queries and keys are projected once, to a width r
/// that all heads share, and head h weighs the shared dimensions with its row m_h of the mixing matrix. With q = x Wqᵀ (+ bq), k = x Wkᵀ,
/// c = x Bᵀ, v = x Wvᵀ + bv:
///
///     o_h = softmax(scale (q diag(m_h) kᵀ + 1 c_hᵀ) + bias) v_h,      y = concat(o_h) Woᵀ + bo
///
/// x [T x inputs], y [T x outputs]; Wq, Wk [r x inputs], M [heads x r], B [heads x inputs], Wv [value_width x inputs]. The content bias c
/// is what remains of the biases of separate heads (a key's bias cancels in the softmax). Plain multi-head attention is r = inputs with
/// `concatenate`. Masks, segments and padding are those of `attention`; dropout acts on the weights behind the softmax. What published
/// blocks put around it is composed: sequential<residual<sequential<collaborative_attention, dropout>>, layer_norm>.
///
/// Throws config_error, shape_error, state_error as `attention` does.
template <std::floating_point S>
struct collaborative_attention : detail::collaborative_base<S> {
  using base = detail::collaborative_base<S>;
  using base::config;
  using typename base::gradient;
  using typename base::record;

  collaborative_attention() = default;
  /// Projections start Xavier-uniform, biases at 0, the mixing as `c.mixing` says. Throws config_error for sizes that do not go together.
  collaborative_attention(collaborative_attention_config c, rng_key random) : base(who, c, c.inputs, random) {}

  shape output_shape(matrix_view<const S> x) const {
    require_features(who, config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const { forward(x, attention_bias<S>{}, y, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const { forward(x, attention_bias<S>{}, y, r, ctx); }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    backward(x, attention_bias<S>{}, r, dy, dx, g, ctx);
  }

  // The same with an additive bias [H T x T].
  void forward(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    this->run_forward(heads(x, bias, ctx), x, x, y, ctx);
  }
  void forward(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    this->run_forward(heads(x, bias, ctx), x, x, y, r, ctx);
  }
  void backward(matrix_view<const S> x, const attention_bias<S>& bias, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    this->run_backward(who, heads(x, bias, ctx), x, x, r, dy, dx, dx, g, ctx);
  }

  /// For each token one key of width r for all heads, a content bias for each head, and the heads' values.
  struct cache {
    placed_cache slots;  // which sequence stands where
    matrix<S> keys;      ///< a place by row, in panels (`append_to_panels`)
    matrix<S> content;   ///< (place, head) by row, a column for each token
    matrix<S> values;    ///< (place, head, token) by row
  };

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    cache c{.slots = {who, slots, capacity}, .keys = {}, .content = {}, .values = {}};
    c.keys.resize(slots, whole_panels(capacity) * config.key_width);
    c.content.resize(slots * this->contents(), capacity);
    c.values.resize(slots * config.heads * capacity, value_width());
    return c;
  }

  /// The outputs of new rows, which follow what their slots hold; they are appended. As `attention::decode`.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape(who, "y", y, out.rows, out.cols);
    const index_t T = x.rows();
    append(x, c, ctx);
    const scratch<S> q(ctx, T, config.key_width), o(ctx, config.projected ? T : 0, config.value_width);
    const matrix_view<S> to = config.projected ? o.view() : y;
    this->query.forward(x, q.view(), ctx);
    const index_t sequences = ctx.rows.count();
    if (sequences == 1)
      attend_cached(0, q.view(), to, c, ctx);
    else
      ctx.exec->run(sequences, 1, [&](index_t first, index_t last) {
        for (index_t s = first; s < last; ++s) attend_cached(s, q.view(), to, c, ctx);
      });
    this->mask_heads(to, ctx);
    if (config.projected) this->output.forward(o.view(), y, ctx);
  }
  /// Appends the keys, content biases and values of x only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    append(x, c, ctx);
  }
  /// Forgets all but the first `length` tokens of a slot.
  void truncate(cache& c, index_t slot, index_t length) const { c.slots.truncate(who, slot, length); }
  /// Slot i becomes what slot order[i] was.
  void permute(cache& c, std::span<const index_t> order) const {
    const index_t H = config.heads, B = this->contents(), capacity = c.slots.capacity;
    check(c);
    c.slots.permute(who, order, [&](index_t from, index_t to, index_t n) {
      std::copy_n(c.keys.row(from).data(), whole_panels(n) * config.key_width, c.keys.row(to).data());
      c.content.middleRows(to * B, B).leftCols(n) = c.content.middleRows(from * B, B).leftCols(n);
      for (index_t h = 0; h < H; ++h) c.values.middleRows((to * H + h) * capacity, n) = c.values.middleRows((from * H + h) * capacity, n);
    });
  }

 private:
  static constexpr const char* who = "collaborative_attention";

  [[nodiscard]] index_t value_width() const { return config.value_width / config.heads; }

  detail::collaborative_heads<S> heads(matrix_view<const S> x, const attention_bias<S>& bias, const context& ctx) const {
    auto h = base::heads(who, x.rows(), x.rows(), ctx.rows, bias, ctx);
    h.plain.valid = ctx.mask;
    return h;
  }

  /// Throws unless the cache is one of such a layer.
  void check(const cache& c) const {
    const index_t slots = static_cast<index_t>(c.slots.length.size()), capacity = c.slots.capacity;
    require<state_error>(
        c.keys.cols() == whole_panels(capacity) * config.key_width && c.content.rows() == slots * this->contents() &&
            c.values.rows() == slots * config.heads * capacity && c.values.cols() == value_width(),
        who, ": the cache is of another layer: expected one of ", config.heads, " heads with keys of width ",
        config.key_width, " and values of width ", value_width(), ", got values of width ", c.values.cols());
  }
  static index_t place(const cache& c, index_t slot) { return c.slots.place[static_cast<std::size_t>(slot)]; }
  matrix_view<S> values(cache& c, index_t at, index_t h) const {
    return matrix_view<S>(c.values).slice_rows((at * config.heads + h) * c.slots.capacity, c.slots.capacity);
  }
  void append(matrix_view<const S> x, cache& c, const context& ctx) const {
    const index_t T = x.rows(), B = this->contents();
    check(c);
    c.slots.check(who, T, ctx);
    const scratch<S> k(ctx, T, config.key_width), b(ctx, B, T), v(ctx, T, config.value_width);
    this->project_source(x, k.view(), b.view(), v.view(), ctx);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, T) - i, slot = ctx.slot(s), at = place(c, slot), held = c.slots.tokens(slot);
      append_to_panels<S>(k.view().slice_rows(i, n), held, c.keys.row(at).data());
      for (index_t h = 0; h < B; ++h) std::copy_n(b.row(h) + i, n, c.content.data() + (at * B + h) * c.slots.capacity + held);
      for (index_t h = 0; h < config.heads; ++h)
        values(c, at, h).slice_rows(held, n).map() = v.view().slice_rows(i, n).slice_cols(h * value_width(), value_width()).map();
    }
    c.slots.advance(T, ctx);
  }

  /// The new queries of one sequence.
  void attend_cached(index_t s, matrix_view<const S> q, matrix_view<S> o, cache& c, const context& ctx) const {
    const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, q.rows()) - i, slot = ctx.slot(s), N = c.slots.tokens(slot);
    constexpr index_t few = 16;  // up to here the scores of all keys are worth their memory
    if (n > few)
      attend_by_tiles(place(c, slot), N, q.slice_rows(i, n), o.slice_rows(i, n), c, ctx);
    else if (n > 0)
      attend_by_panels(place(c, slot), N, q.slice_rows(i, n), o.slice_rows(i, n), c, ctx);
  }
  /// The content bias of a head, or null.
  const S* content(const cache& c, index_t at, index_t h) const {
    return this->contents() == 0 ? nullptr : c.content.data() + (at * config.heads + h) * c.slots.capacity;
  }
  void attend_by_tiles(index_t at, index_t N, matrix_view<const S> q, matrix_view<S> o, cache& c, const context& ctx) const {
    constexpr index_t block = detail::attention_heads<S>::block;
    const index_t n = q.rows(), H = config.heads, V = value_width();
    const detail::collaborative_heads<S> all{{H, H, V, static_cast<S>(config.scale), config.causal}, this->mixing, 0, {}};
    const scratch<S> log_sum_exp(ctx, H, n), k(ctx, N, q.cols());
    read_panels<S>(c.keys.row(at).data(), k.view(), ctx);
    ctx.exec->run((n + block - 1) / block * H, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece) {
        const index_t h = piece % H, t = piece / H * block, m = std::min(block, n - t);
        const scratch<S> mixed(ctx, m, q.cols());
        all.mix(q.slice_rows(t, m), h, mixed.view());
        const detail::collaborative_mask<S> mask{
            .plain = {.causal = config.causal, .ahead = N - n + t}, .scale = all.plain.scale, .content = content(c, at, h)};
        attend<S>(mixed.view(), k.view(), values(c, at, h).slice_rows(0, N), all.plain.scale, mask, o.slice_rows(t, m).slice_cols(h * V, V),
                  log_sum_exp.row(h) + t, ctx);
      }
    });
  }
  /// Every key is read once, for the queries of all heads.
  void attend_by_panels(index_t at, index_t N, matrix_view<const S> q, matrix_view<S> o, cache& c, const context& ctx) const {
    const index_t n = q.rows(), H = config.heads, V = value_width();
    const auto scale = static_cast<S>(config.scale);
    const scratch<S> mixed(ctx, q.cols(), H * n), scores(ctx, H * n, whole_panels(N));
    for (index_t d = 0; d < q.cols(); ++d)
      for (index_t h = 0; h < H; ++h)
        for (index_t t = 0; t < n; ++t) mixed.row(d)[h * n + t] = q(t, d) * this->mixing(h, d);
    score_panels<S>(mixed.view(), c.keys.row(at).data(), scores.view(), ctx);
    ctx.exec->run(H, 1, [&](index_t first, index_t last) {
      for (index_t h = first; h < last; ++h) {
        const matrix_view<S> p = scores.view().slice_rows(h * n, n), v = values(c, at, h), out = o.slice_cols(h * V, V);
        const auto visible = [&](index_t t) { return config.causal ? N - n + t + 1 : N; };
        for (index_t t = 0; t < n; ++t) {
          auto weights = p.slice_cols(0, visible(t)).row_array(t);
          if (const S* b = content(c, at, h)) weights += typename matrix_view<const S>::row_type(b, visible(t));
          weights = (scale * (weights - weights.maxCoeff())).exp();
          weights /= weights.sum();
        }
        // What all queries see in one product, and nothing that a query does not see: 0 times a NaN is not 0.
        const index_t shared = visible(0);
        gemm_nn<S>(p.slice_cols(0, shared), v.slice_rows(0, shared), out, ctx);
        for (index_t t = 1; t < n; ++t)
          for (index_t j = shared; j < visible(t); ++j) out.row_array(t) += p(t, j) * v.row_array(j);
      }
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
