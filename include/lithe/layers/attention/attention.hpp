#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/attention/attention_core.hpp"

namespace lithe::inline LITHE_ABI {

struct attention_config {
  index_t inputs = 0, heads = 1;
  index_t head_width = 0;       ///< 0: inputs / heads
  index_t outputs = 0;          ///< 0: inputs
  bool causal = false;
  bool bias = true;
  double scale = 0;             ///< of the scores; 0: 1/√head_width
  index_t rotary_width = 0;     ///< features of each head that carry the position; even
  double rotary_base = 10000;
  index_t key_value_heads = 0;  ///< heads of keys and values, each shared by heads / key_value_heads query heads (arXiv 2305.13245); 0: heads
};

struct cross_attention_config {
  index_t inputs = 0, memory_inputs = 0, heads = 1;
  index_t head_width = 0;  ///< 0: inputs / heads
  index_t outputs = 0;     ///< 0: inputs
  bool bias = true;
  double scale = 0;             ///< of the scores; 0: 1/√head_width
  index_t key_value_heads = 0;  ///< 0: heads
};

namespace detail {

/// The parts that self- and cross-attention share: four projections and the heads between them.
template <std::floating_point S>
struct attention_base {
  using scalar = S;
  /// Grows with the length, not with its square: the scores are computed again in backward.
  struct record {
    matrix<S> query, key, value;  // projected, after the rotation
    matrix<S> context;            // heads side by side
    matrix<S> log_sum_exp;        // [H x T]
  };
  struct gradient {
    typename linear<S>::gradient query, key, value, output;
  };

  linear<S> query, key, value, output;
  attention_config config;  ///< with every 0 replaced by what it stands for

  attention_base() = default;
  attention_base(const char* who, attention_config c, index_t memory_inputs, rng_key random) : config(resolved(who, c)) {
    const index_t H = config.heads * config.head_width, G = config.key_value_heads * config.head_width;
    query = linear<S>({c.inputs, H, c.bias}, random.child(0));
    key = linear<S>({memory_inputs, G, c.bias}, random.child(1));
    value = linear<S>({memory_inputs, G, c.bias}, random.child(2));
    output = linear<S>({H, config.outputs, c.bias}, random.child(3));
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query", s.query...);
    f("key", s.key...);
    f("value", s.value...);
    f("output", s.output...);
  }

 protected:
  static attention_config resolved(const char* who, attention_config c) {
    require<config_error>(c.inputs >= 1 && c.heads >= 1, who, ": expected at least 1 input and 1 head, got ", c.inputs, " and ", c.heads);
    if (c.head_width == 0) {
      require<config_error>(c.inputs % c.heads == 0, who, ": expected inputs divisible by heads (or a head_width), got ", c.inputs, " inputs and ",
                            c.heads, " heads");
      c.head_width = c.inputs / c.heads;
    }
    if (c.outputs == 0) c.outputs = c.inputs;
    if (c.key_value_heads == 0) c.key_value_heads = c.heads;
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_width));
    require<config_error>(c.head_width >= 1 && c.outputs >= 1, who, ": expected a head_width and outputs of at least 1, got ", c.head_width, " and ",
                          c.outputs);
    require<config_error>(c.key_value_heads >= 1 && c.heads % c.key_value_heads == 0, who, ": expected heads divisible by key_value_heads, got ",
                          c.heads, " and ", c.key_value_heads);
    require<config_error>(c.rotary_width >= 0 && c.rotary_width % 2 == 0 && c.rotary_width <= c.head_width, who,
                          ": expected an even rotary_width of at most the head_width ", c.head_width, ", got ", c.rotary_width);
    require<config_error>(c.rotary_width == 0 || c.rotary_base > 0, who, ": expected a positive rotary_base, got ", c.rotary_base);
    return c;
  }

  attention_heads<S> heads(const char* who, index_t T, index_t N, segments key_rows, const attention_bias<S>& bias, const context& ctx) const {
    ctx.rows.check(who, T);
    key_rows.check(who, N);
    require<shape_error>(key_rows.count() == ctx.rows.count(), who, ": expected as many sequences in the memory as in x, got ", key_rows.count(),
                         " and ", ctx.rows.count());
    require<shape_error>(ctx.mask.empty() || static_cast<index_t>(ctx.mask.size()) == T, who, ": expected a mask of ", T, " rows, got ",
                         ctx.mask.size());
    if (bias.values.data() != nullptr) require_shape(who, "an attention bias", bias.values, config.heads * T, N);
    if (bias.gradient.data() != nullptr) require_shape(who, "an attention bias gradient", bias.gradient, config.heads * T, N);
    return {config.heads, config.key_value_heads, config.head_width, static_cast<S>(config.scale), config.causal, ctx.rows, key_rows, {}, bias};
  }

  struct activations {
    matrix_view<S> query, key, value, context, log_sum_exp;
  };

  void run_forward(const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, const activations& a,
                   const context& ctx) const {
    query.forward(x, a.query, ctx);
    key.forward(source, a.key, ctx);
    value.forward(source, a.value, ctx);
    rotate(a.query, a.key, false, ctx);
    h.forward(a.query, a.key, a.value, a.context, a.log_sum_exp, ctx);
    output.forward(a.context, y, ctx);
    zero_padding(y, ctx);
  }
  /// Without a record.
  void run_forward(const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, const context& ctx) const {
    const index_t T = x.rows(), N = source.rows(), G = key.weight.rows();
    const scratch<S> q(ctx, T, query.weight.rows()), k(ctx, N, G), v(ctx, N, G), o(ctx, T, query.weight.rows()), l(ctx, config.heads, T);
    run_forward(h, x, source, y, {q.view(), k.view(), v.view(), o.view(), l.view()}, ctx);
  }
  void run_forward(const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, record& r,
                   const context& ctx) const {
    const index_t T = x.rows(), N = source.rows(), G = key.weight.rows();
    r.query.resize(T, query.weight.rows());
    r.key.resize(N, G);
    r.value.resize(N, G);
    r.context.resize(T, query.weight.rows());
    r.log_sum_exp.resize(config.heads, T);
    run_forward(h, x, source, y, {r.query, r.key, r.value, r.context, r.log_sum_exp}, ctx);
  }

  /// ds: the gradient of the source, added to, or replaced if it is dx itself.
  void run_backward(const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, const record& r, matrix_view<const S> dy,
                    matrix_view<S> dx, matrix_view<S> ds, gradient& g, const context& ctx) const {
    require<state_error>(r.query.rows() == x.rows() && r.key.rows() == source.rows(), "attention: the record is of another call: expected ", x.rows(),
                         " and ", source.rows(), " rows, got ", r.query.rows(), " and ", r.key.rows());
    const index_t T = x.rows(), N = source.rows(), G = key.weight.rows();
    const scratch<S> unpadded(ctx, ctx.mask.empty() ? 0 : T, dy.cols());
    if (!ctx.mask.empty()) {
      unpadded.map() = dy.map();
      zero_padding(unpadded.view(), ctx);
      dy = unpadded.view();
    }
    const scratch<S> d_context(ctx, T, query.weight.rows()), dq(ctx, T, query.weight.rows()), dk(ctx, N, G), dv(ctx, N, G);
    back(output, r.context, dy, d_context.view(), update::assign, g.output, ctx);
    h.backward(r.query, r.key, r.value, r.context, r.log_sum_exp, d_context.view(), dq.view(), dk.view(), dv.view(), ctx);
    rotate(dq.view(), dk.view(), true, ctx);
    back(query, x, dq.view(), dx, update::assign, g.query, ctx);
    back(key, source, dk.view(), ds, update::add, g.key, ctx);
    back(value, source, dv.view(), ds, update::add, g.value, ctx);
  }

  static void zero_padding(matrix_view<S> y, const context& ctx) {
    if (!ctx.mask.empty())
      for (index_t t = 0; t < y.rows(); ++t)
        if (!ctx.valid(t)) std::fill_n(y.row(t), y.cols(), S(0));
  }

 private:
  // As linear::backward, but dx may be added to: three projections read the same x.
  static void back(const linear<S>& l, matrix_view<const S> x, matrix_view<const S> dy, matrix_view<S> dx, update mode,
                   typename linear<S>::gradient& g, const context& ctx) {
    gemm_nn<S>(dy, l.weight, dx, ctx, mode);
    gemm_tn<S>(dy, x, g.weight, ctx, update::add);
    if (l.bias.size() != 0) g.bias += dy.map().colwise().sum();
  }

  // Positions start at 0 in each sequence, so one table serves all.
  void rotate(matrix_view<S> q, matrix_view<S> k, bool back, const context& ctx) const {
    if (config.rotary_width == 0) return;
    const index_t T = q.rows();
    index_t longest = 0;
    scratch<index_t> position(ctx, T);
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      for (index_t t = ctx.rows.begin(s); t < ctx.rows.end(s, T); ++t) position[t] = t - ctx.rows.begin(s);
      longest = std::max(longest, ctx.rows.end(s, T) - ctx.rows.begin(s));
    }
    const scratch<S> table(ctx, longest, config.rotary_width);
    rotary_angles<S>(0, config.rotary_base, table.view(), ctx);
    const auto place = [&](index_t t) { return position[t]; };
    rotate_heads<S>(q, config.heads, table.view(), back, ctx, place);
    rotate_heads<S>(k, config.key_value_heads, table.view(), back, ctx, place);
  }
};

}  // namespace detail

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
  using typename base::gradient;
  using typename base::record;
  using base::config;

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
      for (index_t piece = first; piece < last; ++piece) attend_cached(piece / config.key_value_heads, piece % config.key_value_heads, q.view(), o.view(), c, ctx);
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
    require<index_error>(slot >= 0 && slot < static_cast<index_t>(c.length.size()), "attention: expected a slot below ", c.length.size(), ", got ", slot);
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
      require<state_error>(length(c, slot) + n <= c.capacity, "attention: slot ", slot, " holds ", length(c, slot), " of ", c.capacity, " tokens; ", n,
                           " more do not fit");
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

/// Exact attention of each sequence of x over the same sequence of another matrix, the memory: as `attention`, with k = m Wkᵀ + bk and
/// v = m Wvᵀ + bv, m [S x memory_inputs]. Every key of the sequence is seen. A sequence without keys gives bo.
template <std::floating_point S>
struct cross_attention : detail::attention_base<S> {
  using base = detail::attention_base<S>;
  using typename base::gradient;
  using typename base::record;
  using base::config;

  cross_attention() = default;
  cross_attention(cross_attention_config c, rng_key random)
      : base("cross_attention",
             {.inputs = c.inputs, .heads = c.heads, .head_width = c.head_width, .outputs = c.outputs, .bias = c.bias, .scale = c.scale,
              .key_value_heads = c.key_value_heads},
             c.memory_inputs, random) {}

  shape output_shape(matrix_view<const S> x) const {
    require_features("cross_attention", config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const { forward(x, m, attention_bias<S>{}, y, ctx); }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const {
    forward(x, m, attention_bias<S>{}, y, r, ctx);
  }
  /// dx overwritten, dm added to.
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const {
    backward(x, m, attention_bias<S>{}, r, dy, dx, dm, g, ctx);
  }

  // The same with an additive bias [H T x S].
  void forward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<S> y, const context& ctx) const {
    this->run_forward(checked(x, m, bias, y, ctx), x, m.x, y, ctx);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<S> y, record& r, const context& ctx) const {
    this->run_forward(checked(x, m, bias, y, ctx), x, m.x, y, r, ctx);
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, const record& r, matrix_view<const S> dy, matrix_view<S> dx,
                matrix_view<S> dm, gradient& g, const context& ctx) const {
    require_shape("cross_attention", "dx", dx, x.rows(), x.cols());
    require_shape("cross_attention", "dm", dm, m.x.rows(), m.x.cols());
    this->run_backward(checked(x, m, bias, dy, ctx), x, m.x, r, dy, dx, dm, g, ctx);
  }

  /// For a token that sees `length` tokens of the memory, whose keys and values are counted once for each of them.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const double n = static_cast<double>(length), d = static_cast<double>(config.head_width);
    return this->query.forward_cost(length) + this->key.forward_cost(length) + this->value.forward_cost(length) + this->output.forward_cost(length) +
           cost{0, 4 * n * d * static_cast<double>(config.heads), 2 * n * d * static_cast<double>(config.key_value_heads) * sizeof(S)};
  }

 private:
  template <class T>
  detail::attention_heads<S> checked(matrix_view<const S> x, memory_view<S> m, const attention_bias<S>& bias, matrix_view<T> y, const context& ctx) const {
    const shape out = output_shape(x);
    require_shape("cross_attention", "y", y, out.rows, out.cols);
    require_features("cross_attention", this->key.weight.cols(), m.x);
    return this->heads("cross_attention", x.rows(), m.x.rows(), m.rows, bias, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
