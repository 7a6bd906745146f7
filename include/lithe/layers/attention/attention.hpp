#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/attention/attention_base.hpp"
#include "lithe/layers/attention/key_value_cache.hpp"

namespace lithe::inline LITHE_ABI {

/// Exact multi-head attention over each sequence (arXiv 1706.03762, equation 1, tiled as in arXiv 2205.14135): with q = x Wqᵀ + bq and
/// k, v alike, and for each head
///
///     o = softmax(scale q kᵀ + bias) v,      y = concat(o) Woᵀ + bo
///
/// x [T x inputs], y [T x outputs], heads in contiguous blocks of rows of the projections. Causal: a query sees keys up to its own
/// position in its sequence. Padding (context::mask) gives zero output and gradient and is no key; a query that sees no key gives bo.
/// Throws config_error for sizes that do not go together, shape_error for matrices, segments or masks that do not, state_error for a
/// record of another call.
template <std::floating_point S>
struct attention : detail::attention_base<S> {
  using base = detail::attention_base<S>;
  using base::config;
  using typename base::gradient;
  using typename base::record;

  attention() = default;
  /// Projections start as `linear`. Throws config_error for sizes that do not go together.
  attention(attention_config c, rng_key random) : base("attention", c, c.inputs, random) {}

  shape output_shape(matrix_view<const S> x) const {
    require_features("attention", config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const { forward(x, attention_bias<S>{}, y, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const { forward(x, attention_bias<S>{}, y, r, ctx); }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    backward(x, attention_bias<S>{}, r, dy, dx, g, ctx);
  }

  // The same with an additive bias [H T x T].
  void forward(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<S> y, const context& ctx) const {
    check_forward("attention", *this, x, y, ctx);
    this->run_forward(heads(x, bias, ctx), x, x, y, ctx);
  }
  void forward(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward("attention", *this, x, y, ctx);
    this->run_forward(heads(x, bias, ctx), x, x, y, r, ctx);
  }
  void backward(matrix_view<const S> x, const attention_bias<S>& bias, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    check_backward("attention", *this, x, dy, dx, g, ctx);
    this->run_backward("attention", heads(x, bias, ctx), x, x, r, dy, dx, dx, g, ctx);
  }

  /// Keys (after the rotation) and values of `slots` sequences of up to `capacity` tokens.
  using cache = key_value_cache<S>;

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const { return {"attention", slots, capacity, config.key_value_heads, config.head_width}; }

  /// The outputs of new rows, which follow what their slots hold; they are appended. Any number of new rows a sequence.
  /// Without `causal` each sees everything then in the slot. Throws state_error when a slot would overflow or comes
  /// twice, index_error for a slot that is not there; nothing has then changed. A cache of another layer is a
  /// state_error.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("attention", "y", y, out.rows, out.cols);
    const index_t T = x.rows(), H = config.heads;
    c.check("attention", T, ctx, config.key_value_heads, config.head_width);
    const scratch<S> q(ctx, T, this->query.weight.rows()), o(ctx, T, this->query.weight.rows()), table(ctx, T, config.rotary_width);
    new_angles(table.view(), c, ctx);
    append(x, table.view(), c, ctx);
    this->query.forward(x, q.view(), ctx);
    if (config.rotary_width != 0) detail::rotate_heads<S>(q.view(), H, table.view(), false, ctx, [](index_t t) { return t; });
    ctx.exec->run(ctx.rows.count() * config.key_value_heads, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece)
        attend_cached(piece / config.key_value_heads, piece % config.key_value_heads, q.view(), o.view(), c, ctx);
    });
    this->output.forward(o.view(), y, ctx);
  }
  /// Appends the keys and values of x only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    output_shape(x);
    c.check("attention", x.rows(), ctx, config.key_value_heads, config.head_width);
    const scratch<S> table(ctx, x.rows(), config.rotary_width);
    new_angles(table.view(), c, ctx);
    append(x, table.view(), c, ctx);
  }
  /// Forgets all but the first `length` tokens of a slot.
  void truncate(cache& c, index_t slot, index_t length) const { c.truncate("attention", slot, length); }
  /// Slot i becomes what slot order[i] was. Copies only what is wanted more than once.
  void permute(cache& c, std::span<const index_t> order) const {
    c.permute("attention", order, [](index_t, index_t, index_t) {});
  }

  /// For a token that sees `length` tokens.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double n = static_cast<double>(length), d = static_cast<double>(config.head_width);
    return this->query.forward_cost(length) + this->key.forward_cost(length) + this->value.forward_cost(length) + this->output.forward_cost(length) +
           cost{0, 4 * n * d * static_cast<double>(config.heads), 2 * n * d * static_cast<double>(config.key_value_heads) * sizeof(S)};
  }

 private:
  detail::attention_heads<S> heads(matrix_view<const S> x, const attention_bias<S>& bias, const context& ctx) const {
    auto h = base::heads("attention", x.rows(), x.rows(), ctx.rows, bias, ctx);
    h.valid = ctx.mask;
    return h;
  }

  void new_angles(matrix_view<S> table, const cache& c, const context& ctx) const {
    if (config.rotary_width == 0) return;
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, table.rows()) - i;
      rotary_angles<S>(c.tokens(ctx.slot(s)), config.rotary_base, table.slice_rows(i, n), ctx);
    }
  }
  void append(matrix_view<const S> x, matrix_view<const S> table, cache& c, const context& ctx) const {
    const index_t T = x.rows();
    const scratch<S> k(ctx, T, this->key.weight.rows()), v(ctx, T, this->key.weight.rows());
    this->key.forward(x, k.view(), ctx);
    this->value.forward(x, v.view(), ctx);
    if (config.rotary_width != 0) detail::rotate_heads<S>(k.view(), config.key_value_heads, table, false, ctx, [](index_t t) { return t; });
    c.append(k, v, ctx);
  }
  // The new queries of one sequence that share a head of keys.
  void attend_cached(index_t s, index_t key_head, matrix_view<const S> q, matrix_view<S> o, const cache& c, const context& ctx) const {
    constexpr index_t few = 12;  // up to here, reading the keys costs more than the products
    const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, q.rows()) - i, slot = ctx.slot(s), N = c.tokens(slot);
    const index_t d = config.head_width, W = c.keys.cols(), shared = config.heads / config.key_value_heads, M = n * shared;
    const S* k = c.keys.data() + c.row(slot, key_head) * W;
    const S* v = c.values.data() + c.row(slot, key_head) * W;
    const auto scale = static_cast<S>(config.scale);
    if (n == 0) return;
    if (M <= few) {
      const scratch<S> rows(ctx, M, W), context_rows(ctx, M, W);
      index_t visible[few];
      for (index_t r = 0; r < M; ++r) {
        detail::tile::pad_rows<S>(q.slice_cols((key_head * shared + r % shared) * d, d).slice_rows(i + r / shared, 1), rows.row(r), scale);
        visible[r] = config.causal ? N - n + r / shared + 1 : N;
      }
      attend_few<S>(rows.view(), k, v, visible, context_rows.view(), ctx);
      for (index_t r = 0; r < M; ++r) std::copy_n(context_rows.row(r), d, o.row(i + r / shared) + (key_head * shared + r % shared) * d);
      return;
    }
    constexpr index_t block = detail::attention_heads<S>::block;
    const scratch<S> log_sum_exp(ctx, shared, n);
    const index_t blocks = (n + block - 1) / block;
    ctx.exec->run(blocks * shared, 1, [&](index_t first, index_t last) {
      for (index_t piece = first; piece < last; ++piece) {
        const index_t b = blocks - 1 - piece / shared, h = key_head * shared + piece % shared, t = b * block, m = std::min(block, n - t);
        attend<S>(q.slice_cols(h * d, d).slice_rows(i + t, m), {k, N, d, W}, {v, N, d, W}, scale,
                  detail::attention_mask<S>{.causal = config.causal, .ahead = N - n + t}, o.slice_cols(h * d, d).slice_rows(i + t, m),
                  log_sum_exp.row(piece % shared) + t, ctx);
      }
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
