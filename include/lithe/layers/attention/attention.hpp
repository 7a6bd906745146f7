#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/attention/attention_base.hpp"

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
    this->run_forward(checked(x, bias, y, ctx), x, x, y, ctx);
  }
  void forward(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<S> y, record& r, const context& ctx) const {
    this->run_forward(checked(x, bias, y, ctx), x, x, y, r, ctx);
  }
  void backward(matrix_view<const S> x, const attention_bias<S>& bias, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g,
                const context& ctx) const {
    require_shape("attention", "dx", dx, x.rows(), x.cols());
    this->run_backward(checked(x, bias, dy, ctx), x, x, r, dy, dx, dx, g, ctx);
  }

  /// Keys (after the rotation) and values of `slots` sequences of up to `capacity` tokens.
  struct cache {
    index_t capacity = 0;
    std::vector<index_t> length;     ///< tokens in each slot
    std::vector<index_t> place;      ///< where the slot's keys and values stand
    std::vector<index_t> old_place;  // `permute` needs them and must not allocate
    std::vector<std::uint8_t> used;
    matrix<S> keys, values;  ///< (place, head, token) by row, each filled up to whole packets
  };

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    require<config_error>(slots >= 0 && capacity >= 0, "attention: expected a cache of 0 or more slots and tokens, got ", slots, " and ", capacity);
    cache c;
    c.capacity = capacity;
    c.length.assign(static_cast<std::size_t>(slots), 0);
    c.place.resize(c.length.size());
    for (index_t s = 0; s < slots; ++s) c.place[static_cast<std::size_t>(s)] = s;
    c.old_place = c.place;
    c.used.resize(c.length.size());
    c.keys.resize(slots * config.key_value_heads * capacity, padded());
    c.values.resize(c.keys.rows(), c.keys.cols());
    return c;
  }

  /// The outputs of new rows, which follow what their slots hold; they are appended. Any number of new rows a sequence. Without
  /// `causal` each sees everything then in the slot. Throws state_error when a slot would overflow or comes twice, index_error for a
  /// slot that is not there; nothing has then changed.
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("attention", "y", y, out.rows, out.cols);
    const index_t T = x.rows(), H = config.heads;
    check_slots(T, c, ctx);
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
    check_slots(x.rows(), c, ctx);
    const scratch<S> table(ctx, x.rows(), config.rotary_width);
    new_angles(table.view(), c, ctx);
    append(x, table.view(), c, ctx);
  }
  /// Forgets all but the first `length` tokens of a slot.
  void truncate(cache& c, index_t slot, index_t length) const {
    check_slot(slot, c);
    index_t& now = c.length[static_cast<std::size_t>(slot)];
    require<index_error>(length >= 0 && length <= now, "attention: expected to keep 0 to ", now, " tokens of slot ", slot, ", got ", length);
    now = length;
  }
  /// Slot i becomes what slot order[i] was. Copies only what is wanted more than once.
  void permute(cache& c, std::span<const index_t> order) const {
    require<shape_error>(order.size() == c.length.size(), "attention: expected an order of ", c.length.size(), " slots, got ", order.size());
    for (const index_t from : order) check_slot(from, c);
    c.old_place.swap(c.place);
    std::fill(c.used.begin(), c.used.end(), std::uint8_t{0});
    for (const index_t from : order) c.used[static_cast<std::size_t>(c.old_place[static_cast<std::size_t>(from)])] = 1;
    std::size_t free = 0;
    // `used` is 2 once a slot has taken the place over; whoever comes later gets a copy in a place that nobody wants.
    for (std::size_t i = 0; i < order.size(); ++i) {
      const index_t from = c.old_place[static_cast<std::size_t>(order[i])];
      if (auto& state = c.used[static_cast<std::size_t>(from)]; state == 1) {
        state = 2;
        c.place[i] = from;
        continue;
      }
      while (c.used[free] != 0) ++free;
      c.used[free] = 2;
      c.place[i] = static_cast<index_t>(free);
      const index_t n = c.length[static_cast<std::size_t>(order[i])];
      for (index_t h = 0; h < config.key_value_heads; ++h) {
        c.keys.middleRows(row(c, c.place[i], h), n) = c.keys.middleRows(row(c, from, h), n);
        c.values.middleRows(row(c, c.place[i], h), n) = c.values.middleRows(row(c, from, h), n);
      }
    }
    // The lengths follow their places, for which `old_place` is done with.
    for (std::size_t i = 0; i < order.size(); ++i) c.old_place[i] = c.length[static_cast<std::size_t>(order[i])];
    c.length.swap(c.old_place);
  }

  /// For a token that sees `length` tokens.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double n = static_cast<double>(length), d = static_cast<double>(config.head_width);
    return this->query.forward_cost(length) + this->key.forward_cost(length) + this->value.forward_cost(length) + this->output.forward_cost(length) +
           cost{0, 4 * n * d * static_cast<double>(config.heads), 2 * n * d * static_cast<double>(config.key_value_heads) * sizeof(S)};
  }

 private:
  template <class T>
  detail::attention_heads<S> checked(matrix_view<const S> x, const attention_bias<S>& bias, matrix_view<T> y, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("attention", "y", y, out.rows, out.cols);
    auto h = this->heads("attention", x.rows(), x.rows(), ctx.rows, bias, ctx);
    h.valid = ctx.mask;
    return h;
  }

  [[nodiscard]] index_t padded() const { return detail::tile::round_up<S>(config.head_width); }
  [[nodiscard]] index_t row(const cache& c, index_t place, index_t head) const { return (place * config.key_value_heads + head) * c.capacity; }
  static index_t length(const cache& c, index_t slot) { return c.length[static_cast<std::size_t>(slot)]; }
  static index_t place(const cache& c, index_t slot) { return c.place[static_cast<std::size_t>(slot)]; }
  static void check_slot(index_t slot, const cache& c) {
    require<index_error>(slot >= 0 && slot < static_cast<index_t>(c.length.size()), "attention: expected a slot below ", c.length.size(), ", got ",
                         slot);
  }
  void check_slots(index_t T, cache& c, const context& ctx) const {
    ctx.rows.check("attention", T);
    require<state_error>(ctx.mask.empty(), "attention: decoding takes no padding; leave the rows out");
    require<shape_error>(ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == ctx.rows.count(), "attention: expected a slot for each of ",
                         ctx.rows.count(), " sequences, got ", ctx.slots.size());
    std::fill(c.used.begin(), c.used.end(), std::uint8_t{0});
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s), n = ctx.rows.end(s, T) - ctx.rows.begin(s);
      check_slot(slot, c);
      require<state_error>(c.used[static_cast<std::size_t>(slot)]++ == 0, "attention: slot ", slot, " comes twice in one call");
      require<state_error>(length(c, slot) + n <= c.capacity, "attention: slot ", slot, " holds ", length(c, slot), " of ", c.capacity, " tokens; ",
                           n, " more do not fit");
    }
  }
  void new_angles(matrix_view<S> table, const cache& c, const context& ctx) const {
    if (config.rotary_width == 0) return;
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, table.rows()) - i;
      rotary_angles<S>(length(c, ctx.slot(s)), config.rotary_base, table.slice_rows(i, n), ctx);
    }
  }
  void append(matrix_view<const S> x, matrix_view<const S> table, cache& c, const context& ctx) const {
    const index_t T = x.rows(), d = config.head_width, W = padded();
    const scratch<S> k(ctx, T, this->key.weight.rows()), v(ctx, T, this->key.weight.rows());
    this->key.forward(x, k.view(), ctx);
    this->value.forward(x, v.view(), ctx);
    if (config.rotary_width != 0) detail::rotate_heads<S>(k.view(), config.key_value_heads, table, false, ctx, [](index_t t) { return t; });
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, T) - i, slot = ctx.slot(s);
      for (index_t h = 0; h < config.key_value_heads; ++h) {
        const index_t to = row(c, place(c, slot), h) + length(c, slot);
        detail::tile::pad_rows<S>(k.view().slice_cols(h * d, d).slice_rows(i, n), c.keys.data() + to * W);
        detail::tile::pad_rows<S>(v.view().slice_cols(h * d, d).slice_rows(i, n), c.values.data() + to * W);
      }
      c.length[static_cast<std::size_t>(slot)] += n;
    }
  }
  // The new queries of one sequence that share a head of keys.
  void attend_cached(index_t s, index_t key_head, matrix_view<const S> q, matrix_view<S> o, const cache& c, const context& ctx) const {
    constexpr index_t few = 12;  // up to here, reading the keys costs more than the products
    const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, q.rows()) - i, slot = ctx.slot(s), N = length(c, slot);
    const index_t d = config.head_width, W = padded(), shared = config.heads / config.key_value_heads, M = n * shared;
    const S* k = c.keys.data() + row(c, place(c, slot), key_head) * W;
    const S* v = c.values.data() + row(c, place(c, slot), key_head) * W;
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
