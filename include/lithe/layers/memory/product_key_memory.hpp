#pragma once

#include <numeric>

#include "lithe/layers/memory/memory_gate.hpp"
#include "lithe/layers/memory/memory_readout.hpp"
#include "lithe/layers/memory/product_keys.hpp"
#include "lithe/layers/memory/query_network.hpp"
#include "lithe/layers/memory/value_table.hpp"

namespace lithe::inline LITHE_ABI {

/// The norm of a memory layer's private copy of its input.
enum class memory_input_norm { none, layer, rms };

/// Published settings are in `memory_presets.hpp`; these defaults are those of the paper's authors.
struct product_key_memory_config {
  index_t inputs = 0;
  index_t outputs = 0;      ///< 0 = inputs
  index_t value_width = 0;  ///< 0 = outputs
  index_t heads = 4;
  index_t sub_keys = 512;   ///< keys of each half, so sub_keys² slots; flat: slots
  index_t key_width = 256;  ///< of a head's whole query
  index_t top_k = 32;
  index_t final_k = 0;      ///< 0 = top_k
  bool flat = false;
  bool share_keys = false;
  query_config query{};
  memory_gate_config gate{};
  memory_readout_config readout{};
  memory_input_norm input_norm = memory_input_norm::none;
  double input_epsilon = 1e-5;       ///< of the input's norm, added to the variance or mean square
  bool shuffle_slots = false;        ///< a permutation of the slots for each head
  index_t modulo = 0;                ///< values = slot mod modulo; 0 = a row for each slot
  bool separate_values = false;      ///< rows of its own for each head
  bool concat_heads = false;         ///< heads side by side into a linear read-out, instead of their sum
  bool weighted = true;              ///< false: every pick counts 1, so keys and queries get no gradient
  double input_dropout = 0, weight_dropout = 0;
  bool detach_input = false;         ///< no gradient to x
};

/// Product-key memory (arXiv 1907.05242), with Memory+ (2412.09764) and PEER (2407.04153) as read-outs. For every token x [inputs]:
///
///     x' = dropout(norm(x));  q = query_network(x');  (pairs, s) = product_keys(q);  w = dropout(gate(s));  slots = map(pairs)
///     m = Σ_heads Σ_picks w V[slot];  y = readout(m, x')            experts: y = Σ w GELU(<x', U[slot]>) V[slot]
///
/// x [T x inputs] -> y [T x outputs]. Heads are summed, so under softmax the weights of a token add up to `heads`. Only the rows of V that
/// were picked are read, and only they have a gradient. Selection carries no gradient. Rows hidden by ctx.mask give 0 and touch nothing; a
/// row with NaN gives NaN. Throws config_error, shape_error, state_error (replay without recorded pairs).
template <std::floating_point S, value_table Table = dense_table<S>>
struct product_key_memory {
  using scalar = S;
  struct record {
    matrix<S> input;  // x', where it is not x
    record_of<layer_norm<S>> norm;
    record_of<query_network<S>> query;
    matrix<S> queries;
    kept<matrix<slot_t>> pairs;  // [T x heads picks]
    matrix<S> scores;
    matrix<S> read;              // m where the read-out needs it; experts: <x', U[slot]>
    record_of<memory_readout<S>> readout;
  };
  struct gradient {
    gradient_of<layer_norm<S>> layer;
    gradient_of<rms_norm<S>> rms;
    gradient_of<query_network<S>> query;
    gradient_of<product_keys<S>> keys;
    nothing permutation;
    typename Table::gradient values, down;
    gradient_of<memory_readout<S>> readout;
  };

  product_key_memory_config config;
  layer_norm<S> layer;                // of the input; one of the two, or none
  rms_norm<S> rms;
  query_network<S> query;
  product_keys<S> keys;
  matrix<std::int64_t> permutation;   // [heads x slots], or empty
  Table values;                       // V [rows x value_width]
  Table down;                         // U [rows x inputs], experts only
  memory_readout<S> readout;
  memory_gate<S> gate;

  product_key_memory() = default;
  /// A memory with a table of its own.
  product_key_memory(product_key_memory_config c, rng_key key) : product_key_memory(c, make_table(c, key.child(2), false), make_table(c, key.child(3), true), key) {}
  /// A memory that reads the given tables (`shared_table` handles: several layers, one pool).
  product_key_memory(product_key_memory_config c, Table values_, Table down_, rng_key key)
      : config(completed(c)), query(config.inputs, config.heads, config.flat ? 1 : 2, half_width(config), config.query, key.child(0)),
        keys({.heads = config.heads, .sub_keys = config.sub_keys, .width = half_width(config), .top_k = config.top_k, .final_k = config.final_k,
              .flat = config.flat, .shared = config.share_keys}),
        values(std::move(values_)), down(std::move(down_)),
        readout(config.value_width * (config.concat_heads ? config.heads : 1), config.inputs, config.outputs, config.readout, key.child(1)),
        gate(config.gate) {
    require<config_error>(values.slots() == table_rows(config) && values.cols() == config.value_width, "product_key_memory: expected a table of ",
                          to_text(table_rows(config), config.value_width), ", got ", to_text(values.slots(), values.cols()));
    require<config_error>(!experts() || (down.slots() == values.slots() && down.cols() == config.inputs), "product_key_memory: expected a down table of ",
                          to_text(values.slots(), config.inputs), ", got ", to_text(down.slots(), down.cols()));
    if (config.input_norm == memory_input_norm::layer) layer = layer_norm<S>(config.inputs);
    if (config.input_norm == memory_input_norm::rms) rms = rms_norm<S>(config.inputs);
    set_input_epsilon(config.input_epsilon);
    if (config.shuffle_slots) shuffle(key.child(4));
  }

  /// Sets the epsilon of the input's norm. Throws config_error unless it is positive and finite, also as an S.
  void set_input_epsilon(double epsilon) {
    require<config_error>(static_cast<S>(epsilon) > 0 && std::isfinite(static_cast<S>(epsilon)),
                          "product_key_memory: expected a positive, finite input_epsilon, got ", epsilon);
    config.input_epsilon = epsilon;
    layer.epsilon = rms.epsilon = static_cast<S>(epsilon);
  }

  shape output_shape(matrix_view<const S> x) const {
    require_features("product_key_memory", config.inputs, x);
    return {x.rows(), config.outputs};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> rows(x, ctx);
    const index_t T = x.rows(), P = keys.picks();
    const scratch<S> input(ctx, changes_input(ctx) ? T : 0, x.cols()), q(ctx, T, query.outputs()), weights(ctx, T, P);
    const scratch<slot_t> slots(ctx, T, P);
    const matrix_view<const S> in = prepare_input(rows, input, nullptr, ctx);
    query.forward(in, q, ctx.child(1));
    keys.search(q, slots, weights, ctx);
    gate.forward(by_head(weights.view()), by_head(weights.view()), ctx);
    map_slots(slots, slots, ctx);
    weigh(weights, ctx);
    const scratch<S> hidden(ctx, experts() ? T : 0, P), sum(ctx, readout.plain() ? 0 : T, read_width());
    if (experts()) weigh_experts(in, slots, hidden, weights, ctx);
    const matrix_view<S> m = readout.plain() ? y : sum.view();
    gather(slots, weights, m, ctx);
    readout.forward(m, in, y, nullptr, ctx.child(3));
    hide(y, ctx);
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    const shown<S> rows(x, ctx);
    const index_t T = x.rows(), P = keys.picks();
    if (ctx.replay) recorded_slots(who, r.pairs.value, T, P, keys.slots());
    if (changes_input(ctx)) r.input.resize(T, x.cols());
    const matrix_view<const S> in = prepare_input(rows, r.input, &r, ctx);
    r.queries.resize(T, query.outputs());
    query.forward(in, r.queries, r.query, ctx.child(1));
    r.scores.resize(T, P);
    if (ctx.replay) {
      keys.rescore(r.queries, view(r.pairs.value), r.scores, ctx);
    } else {
      r.pairs.value.resize(T, P);
      keys.search(r.queries, r.pairs.value, r.scores, ctx);
    }
    const scratch<S> weights(ctx, T, P);
    const scratch<slot_t> slots(ctx, T, P);
    gate.forward(by_head(view(r.scores)), by_head(weights.view()), ctx);
    map_slots(r.pairs.value, slots, ctx);
    weigh(weights, ctx);
    if (experts()) {
      r.read.resize(T, P);
      weigh_experts(in, slots, r.read, weights, ctx);
    } else if (!readout.plain()) {
      r.read.resize(T, read_width());
    }
    const matrix_view<S> m = readout.plain() ? y : matrix_view<S>(r.read);
    gather(slots, weights, m, ctx);
    readout.forward(m, in, y, &r.readout, ctx.child(3));
    hide(y, ctx);
  }

  /// dV[slot] += w dm, dw = <dm, V[slot]>; then back through gate, keys and query network. Experts, with t = <x', U[slot]> and r = dw:
  /// dw = GELU(t) r, dt = w r GELU'(t), dU[slot] += dt x', dx' += dt U[slot].
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward(who, *this, x, dy, dx, g, ctx);
    const index_t T = x.rows(), P = keys.picks();
    recorded_slots(who, r.pairs.value, T, P, keys.slots());
    recorded(who, r.scores, T, P);
    recorded(who, r.queries, T, query.outputs());
    if (experts() || !readout.plain()) recorded(who, r.read, T, experts() ? P : read_width());
    const shown<S> rows(x, ctx);
    const matrix_view<const S> in = changes_input(ctx) ? recorded(who, r.input, T, x.cols()) : rows.view();
    const scratch<S> shown(ctx, ctx.mask.empty() ? 0 : T, dy.cols()), dm(ctx, T, read_width()), weights(ctx, T, P), dw(ctx, T, P), din(ctx, T, x.cols());
    const scratch<slot_t> slots(ctx, T, P);
    din.map().setZero();
    readout.backward(r.read, in, r.readout, visible(dy, shown, ctx), dm, din, g.readout, ctx.child(3));

    gate.forward(by_head(view(r.scores)), by_head(weights.view()), ctx);
    map_slots(view(r.pairs.value), slots, ctx);
    weigh(weights, ctx);
    if (experts()) {
      experts_backward(in, r.read, slots, weights, dm, dw, din, g, ctx);
    } else {
      if (config.weighted) values.row_dots(slots.span(), per_row(), spread(dm.view()), dw.span(), ctx);
      values.scatter_add({slots.span(), weights.span(), per_row()}, spread(dm.view()), g.values, ctx);
    }

    if (config.weighted) {
      const scratch<S> dq(ctx, T, query.outputs()), dfrom(ctx, T, x.cols());
      if (ctx.train && config.weight_dropout > 0) drop<S>(dw, dw, config.weight_dropout, ctx.child(2).key, ctx);
      gate.backward(by_head(view(r.scores)), by_head(dw.view()), by_head(dw.view()), ctx);
      keys.backward(r.queries, view(r.pairs.value), dw, dq, g.keys, ctx);
      query.backward(in, r.queries, r.query, dq, dfrom, g.query, ctx.child(1));
      add<S>(dfrom, din, ctx);
    }
    input_backward(rows, r, din, dx, g, ctx);
  }

  /// The rows that forward read and their weights (after the gate, before dropout), both [T x heads picks], -1 for hidden rows: for
  /// usage metrics.
  void picked(const record& r, matrix_view<slot_t> slots, matrix_view<S> weights, const context& ctx) const {
    recorded_slots(who, r.pairs.value, r.pairs.value.rows(), keys.picks(), keys.slots());
    recorded(who, r.scores, r.pairs.value.rows(), keys.picks());
    require_shape(who, "picked slots", slots, r.pairs.value.rows(), keys.picks());
    require_shape(who, "picked weights", weights, r.pairs.value.rows(), keys.picks());
    const scratch<S> by_lists(ctx, weights.rows(), weights.cols());  // rows of `weights` may lie apart
    map_slots(view(r.pairs.value), slots, ctx);
    gate.forward(by_head(view(r.scores)), by_head(by_lists.view()), ctx);
    copy<S>(by_lists, weights, ctx);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    const double rows = static_cast<double>(keys.picks()), width = static_cast<double>(values.cols() + down.cols());
    const cost table{static_cast<double>(values.slots()) * width, 2 * rows * width, rows * width * sizeof(S)};
    const cost norm = (layer.weight.size() != 0 ? layer.forward_cost(length) : cost{}) + (rms.weight.size() != 0 ? rms.forward_cost(length) : cost{});
    return norm + query.forward_cost(length) + keys.forward_cost(length) + table + readout.forward_cost(length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("layer_norm", s.layer...);
    f("rms_norm", s.rms...);
    f("query", s.query...);
    f("keys", s.keys...);
    f(field("permutation", role::permutation), s.permutation...);
    f("values", s.values...);
    f("down", s.down...);
    f("readout", s.readout...);
  }

 private:
  static constexpr const char* who = "product_key_memory";

  static product_key_memory_config completed(product_key_memory_config c) {
    if (c.outputs == 0) c.outputs = c.inputs;
    if (c.value_width == 0) c.value_width = c.outputs;
    require<config_error>(c.inputs >= 1, "product_key_memory: expected at least 1 input, got ", c.inputs);
    require<config_error>(c.heads >= 1, "product_key_memory: expected at least 1 head, got ", c.heads);
    require<config_error>(!c.concat_heads || c.readout.kind == memory_readout_kind::linear || c.readout.kind == memory_readout_kind::silu_gated,
                          "product_key_memory: concat_heads needs a linear or silu_gated read-out, which takes the heads side by side");
    require<config_error>(c.flat || c.key_width % 2 == 0, "product_key_memory: key_width is cut into two halves, so it must be even, got ", c.key_width);
    const index_t slots = c.flat ? c.sub_keys : c.sub_keys * c.sub_keys;
    require<config_error>(slots < (index_t{1} << 31), "product_key_memory: expected fewer than 2^31 slots, got ", slots);
    require<config_error>(c.modulo == 0 || (c.modulo >= 1 && c.modulo < slots), "product_key_memory: expected modulo from 1 to ", slots - 1, ", got ", c.modulo);
    checked_rate("product_key_memory", c.input_dropout);
    checked_rate("product_key_memory", c.weight_dropout);
    return c;
  }
  static index_t half_width(const product_key_memory_config& c) { return c.flat ? c.key_width : c.key_width / 2; }
  static index_t table_rows(const product_key_memory_config& c) {
    const index_t slots = c.flat ? c.sub_keys : c.sub_keys * c.sub_keys;
    return (c.modulo > 0 ? c.modulo : slots) * (c.separate_values ? c.heads : 1);
  }
  static Table make_table(product_key_memory_config c, rng_key key, bool down) {
    c = completed(c);
    if (down && c.readout.kind != memory_readout_kind::experts) return Table();
    return Table(table_rows(c), down ? c.inputs : c.value_width, key);
  }
  void shuffle(rng_key key) {
    permutation.resize(config.heads, keys.slots());
    for (index_t h = 0; h < config.heads; ++h) {
      std::iota(permutation.data() + h * keys.slots(), permutation.data() + (h + 1) * keys.slots(), std::int64_t{0});
      for (index_t i = keys.slots() - 1; i > 0; --i)
        std::swap(permutation(h, i), permutation(h, static_cast<index_t>(uniform(key.child(static_cast<std::uint64_t>(h)), static_cast<std::uint64_t>(i)) *
                                                                         static_cast<double>(i + 1))));
    }
  }

  [[nodiscard]] bool experts() const { return config.readout.kind == memory_readout_kind::experts; }
  [[nodiscard]] index_t read_width() const { return config.value_width * (config.concat_heads ? config.heads : 1); }
  /// Picks that are summed into one row, and the matrix of these rows: a row for each token, or for each token and head.
  [[nodiscard]] index_t per_row() const { return config.concat_heads ? keys.config.final_k : keys.picks(); }
  template <class E>
  matrix_view<E> spread(matrix_view<E> m) const {
    return config.concat_heads ? m.cut_rows(config.value_width) : m;
  }
  template <class E>
  matrix_view<E> by_head(matrix_view<E> w) const {
    return w.cut_rows(keys.config.final_k);
  }
  [[nodiscard]] bool changes_input(const context& ctx) const {
    return config.input_norm != memory_input_norm::none || (ctx.train && config.input_dropout > 0);
  }
  matrix_view<const S> prepare_input(matrix_view<const S> x, matrix_view<S> to, record* r, const context& ctx) const {
    if (!changes_input(ctx)) return x;
    const scratch<S> here(ctx, r == nullptr ? x.rows() : 0, 2);
    if (r != nullptr) r->norm.statistics.resize(x.rows(), 2);
    const matrix_view<S> statistics = r != nullptr ? matrix_view<S>(r->norm.statistics) : here.view();
    if (layer.weight.size() != 0)
      normalise_rows<S>(x, layer.weight, layer.bias, layer.epsilon, true, to, statistics, ctx);
    else if (rms.weight.size() != 0)
      normalise_rows<S>(x, rms.weight, {}, rms.epsilon, false, to, statistics, ctx);
    else
      copy<S>(x, to, ctx);
    if (ctx.train && config.input_dropout > 0) drop<S>(to, to, config.input_dropout, ctx.child(0).key, ctx);
    return to;
  }
  void input_backward(matrix_view<const S> x, const record& r, matrix_view<S> din, matrix_view<S> dx, gradient& g, const context& ctx) const {
    if (ctx.train && config.input_dropout > 0) drop<S>(din, din, config.input_dropout, ctx.child(0).key, ctx);
    if (layer.weight.size() != 0)
      normalise_rows_backward<S>(x, layer.weight, true, r.norm.statistics, din, dx, g.layer.weight, g.layer.bias, ctx);
    else if (rms.weight.size() != 0)
      normalise_rows_backward<S>(x, rms.weight, false, r.norm.statistics, din, dx, g.rms.weight, {}, ctx);
    else
      copy<S>(din, dx, ctx);
    if (config.detach_input) dx.map().setZero();
  }
  void map_slots(matrix_view<const slot_t> pairs, matrix_view<slot_t> slots, const context& ctx) const {
    const index_t own = config.separate_values ? values.slots() / config.heads : 0;
    ctx.exec->run(pairs.rows(), 64, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < pairs.cols(); ++p) {
          std::int64_t slot = pairs(t, p);
          const index_t head = p / keys.config.final_k;
          if (slot >= 0) {
            if (permutation.size() != 0) slot = permutation(head, slot);
            if (config.modulo > 0) slot %= config.modulo;
            slot += head * own;
          }
          slots(t, p) = static_cast<slot_t>(slot);
        }
    });
  }
  void weigh(matrix_view<S> weights, const context& ctx) const {
    if (!config.weighted) weights.map().setOnes();
    if (ctx.train && config.weight_dropout > 0) drop<S>(weights, weights, config.weight_dropout, ctx.child(2).key, ctx);
  }
  void gather(const scratch<slot_t>& slots, const scratch<S>& weights, matrix_view<S> m, const context& ctx) const {
    values.gather_sum({slots.span(), weights.span(), per_row()}, spread(m), ctx);
  }
  /// hidden = <x', U[slot]>, w <- w GELU(hidden).
  void weigh_experts(matrix_view<const S> in, const scratch<slot_t>& slots, matrix_view<S> hidden, const scratch<S>& weights, const context& ctx) const {
    down.row_dots(slots.span(), keys.picks(), in, {hidden.data(), static_cast<std::size_t>(hidden.size())}, ctx);
    activate_gated<S>(activation::gelu, hidden, weights, weights, ctx);
  }
  void experts_backward(matrix_view<const S> in, matrix_view<const S> hidden, const scratch<slot_t>& slots, const scratch<S>& weights,
                        matrix_view<const S> dm, const scratch<S>& dw, matrix_view<S> din, gradient& g, const context& ctx) const {
    const scratch<S> r(ctx, dw.rows(), dw.cols()), effective(ctx, dw.rows(), dw.cols());
    values.row_dots(slots.span(), keys.picks(), dm, r.span(), ctx);
    activate_gated<S>(activation::gelu, hidden, weights, effective, ctx);
    values.scatter_add({slots.span(), effective.span(), keys.picks()}, dm, g.values, ctx);
    activate_gated_backward<S>(activation::gelu, hidden, weights, r, effective, dw, ctx);  // effective = dt
    down.scatter_add({slots.span(), effective.span(), keys.picks()}, in, g.down, ctx);
    down.gather_sum({slots.span(), effective.span(), keys.picks()}, din, ctx, update::add);
  }
  /// Rows hidden by the mask give zero.
  void hide(matrix_view<S> y, const context& ctx) const {
    for (index_t t = 0; !ctx.mask.empty() && t < y.rows(); ++t)
      if (!ctx.valid(t)) y.row_array(t).setZero();
  }
  matrix_view<const S> visible(matrix_view<const S> dy, matrix_view<S> to, const context& ctx) const {
    if (ctx.mask.empty()) return dy;
    copy<S>(dy, to, ctx);
    hide(to, ctx);
    return to;
  }
};

}  // namespace lithe::inline LITHE_ABI
