#pragma once

#include "lithe/layers/attention/collaborative_heads.hpp"
#include "lithe/layers/dropout.hpp"

// T queries, N keys, H heads, r shared key width, D features
namespace lithe::inline LITHE_ABI {

/// How the mixing matrix [H x r] starts.
enum class mixing_start {
  normal,           ///< standard deviation 0.2 (what epfml/collaborative-attention calls uniform)
  concatenate,      ///< head h takes its own block of ⌈r/H⌉ columns: plain multi-head attention
  all_ones,         ///< every head has the same scores
  xavier_uniform,   ///< ±√(6 / (H + r))
  uniform,          ///< ±1/√r
  standard_normal,  ///< standard deviation 1
};

struct collaborative_attention_config {
  index_t inputs = 0, heads = 1;
  index_t key_width = 0;    ///< r, shared by all heads; 0: inputs
  index_t value_width = 0;  ///< of all heads together; 0: inputs
  index_t outputs = 0;      ///< 0: inputs, or value_width without an output projection
  bool causal = false;
  bool content_bias = true;
  bool query_bias = false;  ///< shared, before mixing; a key's bias would change nothing
  bool value_bias = true;
  bool projected = true;  ///< an output projection (with bias); without it y is the heads side by side
  mixing_start mixing = mixing_start::normal;
  double scale = 0;    ///< of the scores; 0: 1/√(inputs / heads), as re-parametrised heads need; a small r learns sooner from scratch at √(heads / r)
  double dropout = 0;  ///< of the weights behind the softmax, under context::train
};

/// The mixing matrix [heads x r] of a start. `concatenate`: M(i, j) = 1 for i w <= j < (i + 1) w, w = ⌈r/heads⌉; later heads may be
/// narrower or empty. Throws config_error for sizes below 1.
template <class S>
[[nodiscard]] matrix<S> make_mixing(mixing_start kind, index_t heads, index_t r, rng_key random) {
  require<config_error>(heads >= 1 && r >= 1, "make_mixing: expected at least 1 head and a key width of 1, got ", heads, " and ", r);
  matrix<S> m = matrix<S>::Zero(heads, r);
  switch (kind) {
    case mixing_start::normal:
      fill_normal<S>(m, 0.2, random);
      break;
    case mixing_start::concatenate:
      for (index_t j = 0; j < r; ++j) m(j / ((r + heads - 1) / heads), j) = 1;
      break;
    case mixing_start::all_ones:
      m.setOnes();
      break;
    case mixing_start::xavier_uniform:
      fill_uniform<S>(m, std::sqrt(6 / static_cast<double>(heads + r)), random);
      break;
    case mixing_start::uniform:
      fill_uniform<S>(m, 1 / std::sqrt(static_cast<double>(r)), random);
      break;
    case mixing_start::standard_normal:
      fill_normal<S>(m, 1, random);
      break;
  }
  return m;
}

namespace detail {

/// What collaborative self- and cross-attention share: the projections, the mixing matrix and the heads between them.
template <std::floating_point S>
struct collaborative_base {
  using scalar = S;
  /// Grows with the length, not with its square.
  struct record {
    matrix<S> query, key;   // [T x r], [N x r]
    matrix<S> content;      // [H x N]
    matrix<S> value;        // [N x value_width]
    matrix<S> context;      // heads side by side
    matrix<S> log_sum_exp;  // [H x T]
  };
  struct gradient {
    typename linear<S>::gradient query, key, content_bias, value, output;
    matrix<S> mixing;
    nothing head_mask;
  };

  linear<S> query, key, content_bias, value, output;
  matrix<S> mixing;                       ///< [H x r]
  matrix<S> head_mask;                    ///< [1 x H]: what each head's output is multiplied with; empty: 1
  collaborative_attention_config config;  ///< with every 0 replaced by what it stands for

  collaborative_base() = default;
  collaborative_base(const char* who, collaborative_attention_config c, index_t memory_inputs, rng_key random) : config(resolved(who, c)) {
    const auto xavier = [&](linear<S>& l, index_t inputs, index_t outputs, bool bias, std::uint64_t child) {
      l = linear<S>({inputs, outputs, bias}, random.child(child));
      fill_uniform<S>(l.weight, std::sqrt(6 / static_cast<double>(inputs + outputs)), random.child(child));
      l.bias.setZero();
    };
    xavier(query, config.inputs, config.key_width, config.query_bias, 0);
    xavier(key, memory_inputs, config.key_width, false, 1);
    xavier(value, memory_inputs, config.value_width, config.value_bias, 2);
    if (config.projected) xavier(output, config.value_width, config.outputs, true, 3);
    if (config.content_bias) content_bias.weight.setZero(config.heads, memory_inputs);
    mixing = make_mixing<S>(config.mixing, config.heads, config.key_width, random.child(4));
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query", s.query...);
    f("key", s.key...);
    f("content_bias", s.content_bias...);
    f("value", s.value...);
    f("output", s.output...);
    f("mixing", s.mixing...);
    f(field("head_mask", role::state), s.head_mask...);
  }

  /// For a token that sees `length` tokens.
  [[nodiscard]] cost forward_cost(index_t length) const {
    const auto size = [](const auto& m) { return static_cast<double>(m.size()); };
    const double n = static_cast<double>(length), r = static_cast<double>(config.key_width), v = static_cast<double>(config.value_width),
                 H = static_cast<double>(config.heads), content = size(content_bias.weight);
    cost c = query.forward_cost(length) + key.forward_cost(length) + value.forward_cost(length) +
             cost{size(mixing) + content, size(mixing) + 2 * content, (size(mixing) + content) * sizeof(S)};
    if (config.projected) c += output.forward_cost(length);
    return c + cost{0, 2 * n * (H * r + v), n * (r + (content != 0 ? H : 0) + v) * sizeof(S)};
  }

 protected:
  static collaborative_attention_config resolved(const char* who, collaborative_attention_config c) {
    require<config_error>(c.inputs >= 1 && c.heads >= 1, who, ": expected at least 1 input and 1 head, got ", c.inputs, " and ", c.heads);
    if (c.key_width == 0) c.key_width = c.inputs;
    if (c.value_width == 0) c.value_width = c.inputs;
    if (c.outputs == 0) c.outputs = c.projected ? c.inputs : c.value_width;
    if (c.scale == 0) c.scale = std::sqrt(static_cast<double>(c.heads) / static_cast<double>(c.inputs));
    require<config_error>(c.key_width >= 1, who, ": expected a key_width of at least 1, got ", c.key_width);
    require<config_error>(c.value_width >= 1 && c.value_width % c.heads == 0, who, ": expected value_width divisible by heads, got ", c.value_width,
                          " and ", c.heads);
    require<config_error>(c.outputs >= 1 && (c.projected || c.outputs == c.value_width), who, ": expected ",
                          c.projected ? "at least 1 output" : "as many outputs as value_width", ", got ", c.outputs);
    require<config_error>(c.scale > 0 && std::isfinite(c.scale), who, ": expected a positive, finite scale, got ", c.scale);
    checked_rate(who, c.dropout);
    return c;
  }

  collaborative_heads<S> heads(const char* who, index_t T, index_t N, segments key_rows, const attention_bias<S>& bias, const context& ctx) const {
    const index_t H = config.heads;
    check_heads<S>(who, T, N, H, key_rows, bias, ctx);
    require_shape<const S>(who, "a mixing matrix", mixing, H, config.key_width);
    if (head_mask.size() != 0) require_shape<const S>(who, "a head mask", head_mask, 1, H);
    return {{H, H, config.value_width / H, static_cast<S>(config.scale), config.causal, ctx.rows, key_rows, {}, bias},
            mixing,
            ctx.train ? config.dropout : 0,
            ctx.key};
  }

  struct activations {
    matrix_view<S> query, key, content, value, context, log_sum_exp;
  };
  [[nodiscard]] index_t contents() const { return content_bias.weight.rows(); }  // H or 0

  void project_source(matrix_view<const S> source, matrix_view<S> k, matrix_view<S> content, matrix_view<S> v, const context& ctx) const {
    key.forward(source, k, ctx);
    if (contents() != 0) gemm_nt<S>(content_bias.weight, source, content, ctx);
    value.forward(source, v, ctx);
  }
  void run_forward(const collaborative_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, const activations& a,
                   const context& ctx) const {
    const unpadded<S> rows(x, source, ctx);
    query.forward(rows.x, a.query, ctx);
    project_source(rows.source, a.key, a.content, a.value, of_source(x, source, ctx));
    h.forward(a.query, a.key, a.content, a.value, a.context, a.log_sum_exp, ctx);
    mask_heads(a.context, ctx);
    if (config.projected)
      output.forward(a.context, y, ctx);
    else if (y.data() != a.context.data())
      copy<S>(a.context, y, ctx);
    zero_padding<S>(y, ctx);
  }
  /// Without a record.
  void run_forward(const collaborative_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, const context& ctx) const {
    const index_t T = x.rows(), N = source.rows(), r = config.key_width, V = config.value_width;
    const scratch<S> q(ctx, T, r), k(ctx, N, r), c(ctx, contents(), N), v(ctx, N, V), o(ctx, config.projected ? T : 0, V), l(ctx, config.heads, T);
    run_forward(h, x, source, y, {q.view(), k.view(), c.view(), v.view(), config.projected ? o.view() : y, l.view()}, ctx);
  }
  void run_forward(const collaborative_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, matrix_view<S> y, record& r,
                   const context& ctx) const {
    const index_t T = x.rows(), N = source.rows();
    r.query.resize(T, config.key_width);
    r.key.resize(N, config.key_width);
    r.content.resize(contents(), N);
    r.value.resize(N, config.value_width);
    r.context.resize(T, config.value_width);
    r.log_sum_exp.resize(config.heads, T);
    run_forward(h, x, source, y, {r.query, r.key, r.content, r.value, r.context, r.log_sum_exp}, ctx);
  }

  /// ds: the gradient of the source, added to, or replaced if it is dx itself.
  void run_backward(const char* who, const collaborative_heads<S>& h, matrix_view<const S> x, matrix_view<const S> source, const record& r,
                    matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> ds, gradient& g, const context& ctx) const {
    const index_t T = x.rows(), N = source.rows(), K = config.key_width, V = config.value_width, H = config.heads;
    recorded(who, r.query, T, K);
    recorded(who, r.key, N, K);
    recorded(who, r.content, contents(), N);
    recorded(who, r.value, N, V);
    recorded(who, r.context, T, V);
    recorded(who, r.log_sum_exp, H, T);
    const context source_ctx = of_source(x, source, ctx);
    const unpadded<S> rows(x, source, ctx);
    const unpadded<S> upstream(dy, dy, ctx);
    const scratch<S> d_context(ctx, T, V), dots(ctx, H, T), dq(ctx, T, K), dk(ctx, N, K), dc(ctx, contents(), N), dv(ctx, N, V);
    if (config.projected)
      output.backward(r.context, {}, upstream.x, d_context, g.output, ctx);
    else
      copy<S>(upstream.x, d_context, ctx);
    // <dO, O> is the same whether the head mask stands with the one or the other.
    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      const auto head = [&](matrix_view<const S> m, index_t i) { return h.plain.head(m, i, first, last - first); };
      for (index_t i = 0; i < H; ++i) softmax_row_dots<S>(head(d_context.view(), i), head(r.context, i), dots.view().row(i) + first);
    });
    mask_heads(d_context.view(), ctx);
    h.backward(r.query, r.key, r.content, r.value, r.log_sum_exp, dots.view(), d_context.view(), dq.view(), dk.view(), dc.view(), dv.view(), g.mixing,
               ctx);
    query.backward(rows.x, {}, dq, dx, g.query, ctx);
    key.add_backward(rows.source, dk, ds, g.key, source_ctx);
    if (contents() != 0) {
      gemm_tn<S>(dc, content_bias.weight, ds, ctx, update::add);
      gemm_nn<S>(dc, rows.source, g.content_bias.weight, ctx, update::add);
    }
    value.add_backward(rows.source, dv, ds, g.value, source_ctx);
  }

  void mask_heads(matrix_view<S> o, const context& ctx) const {
    if (head_mask.size() == 0) return;
    const index_t width = config.value_width / config.heads;
    ctx.exec->run(o.rows(), 64, [&](index_t first, index_t last) {
      for (index_t h = 0; h < config.heads; ++h) o.slice_rows(first, last - first).slice_cols(h * width, width).map() *= head_mask(0, h);
    });
  }
};

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
