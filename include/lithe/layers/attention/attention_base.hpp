#pragma once

#include "lithe/layers/attention/attention_heads.hpp"

namespace lithe::inline LITHE_ABI {

struct attention_config {
  index_t inputs = 0, heads = 1;
  index_t head_width = 0;  ///< 0: inputs / heads
  index_t outputs = 0;     ///< 0: inputs
  bool causal = false;
  bool bias = true;
  double scale = 0;          ///< of the scores; 0: 1/√head_width
  index_t rotary_width = 0;  ///< features of each head that carry the position; even
  double rotary_base = 10000;
  index_t key_value_heads = 0;  ///< heads of keys and values, each shared by heads / key_value_heads query heads (arXiv 2305.13245); 0: heads
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
    check_heads<S>(who, T, N, config.heads, key_rows, bias, ctx);
    return {config.heads, config.key_value_heads, config.head_width, static_cast<S>(config.scale), config.causal, ctx.rows, key_rows, {}, bias};
  }

  struct activations {
    matrix_view<S> query, key, value, context, log_sum_exp;
  };

  void run_forward(const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, const activations& a,
                   const context& ctx) const {
    const unpadded<S> rows(x, source, ctx);
    query.forward(rows.x, a.query, ctx);
    key.forward(rows.source, a.key, of_source(x, source, ctx));
    value.forward(rows.source, a.value, of_source(x, source, ctx));
    rotate(a.query, a.key, false, ctx);
    h.forward(a.query, a.key, a.value, a.context, a.log_sum_exp, ctx);
    output.forward(a.context, y, ctx);
    zero_padding<S>(y, ctx);
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
  void run_backward(const char* who, const attention_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, const record& r,
                    matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> ds, gradient& g, const context& ctx) const {
    const index_t T = x.rows(), N = source.rows(), G = key.weight.rows();
    for (const matrix<S>* m : {&r.query, &r.context}) recorded(who, *m, T, query.weight.rows());
    for (const matrix<S>* m : {&r.key, &r.value}) recorded(who, *m, N, G);
    recorded(who, r.log_sum_exp, config.heads, T);
    const context source_ctx = of_source(x, source, ctx);
    const unpadded<S> rows(x, source, ctx), d(dy, dy, ctx);
    const scratch<S> d_context(ctx, T, query.weight.rows()), dq(ctx, T, query.weight.rows()), dk(ctx, N, G), dv(ctx, N, G);
    output.backward(r.context, {}, d.x, d_context, g.output, ctx);
    h.backward(r.query, r.key, r.value, r.context, r.log_sum_exp, d_context.view(), dq.view(), dk.view(), dv.view(), ctx);
    rotate(dq.view(), dk.view(), true, ctx);
    query.backward(rows.x, {}, dq, dx, g.query, ctx);
    if (config.rotary_width != 0) {
      key.add_backward(rows.source, dk, ds, g.key, source_ctx);
    } else {  // a key's bias adds the same to all scores of a query, so its gradient is 0 and not the rounding of one
      gemm_nn<S>(dk, key.weight, ds, ctx, update::add);
      gemm_tn<S>(dk, rows.source, g.key.weight, ctx, update::add);
    }
    value.add_backward(rows.source, dv, ds, g.value, source_ctx);
  }

 private:
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

}  // namespace lithe::inline LITHE_ABI
