#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/norms.hpp"

namespace lithe::inline LITHE_ABI {

/// What becomes of the sum of value rows m: plain y = m; linear y = W₂ m + b₂; silu_gated (Memory+) y = W₂ (m ⊙ silu(W₁ x + b₁)) + b₂;
/// experts (PEER): no sum of values but of one-neuron experts, see product_key_memory.
enum class memory_readout_kind { plain, linear, silu_gated, experts };

struct memory_readout_config {
  memory_readout_kind kind = memory_readout_kind::plain;
  bool bias = true;          ///< of the projections
  bool scalar_gate = false;  ///< y σ(<w, x> + b)
  bool output_norm = false;  ///< layer norm, last
  double dropout = 0;        ///< on y, before the scalar gate
};

/// The read-out of a memory layer: (m [T x read], x [T x inputs]) -> y [T x outputs].
template <std::floating_point S>
struct memory_readout {
  using scalar = S;
  struct record {
    matrix<S> silu;          // W₁ x + b₁
    matrix<S> ungated;       // y before the scalar gate
    matrix<S> gate;          // the scalar gate [T x 1]
    matrix<S> before_norm;
    record_of<layer_norm<S>> norm;
    std::uint64_t key = 0;   // of dropout
  };
  struct gradient {
    gradient_of<linear<S>> silu, projection, scalar_gate;
    gradient_of<layer_norm<S>> norm;
  };

  linear<S> silu;         // W₁, b₁
  linear<S> projection;   // W₂, b₂
  linear<S> scalar_gate;  // one output
  layer_norm<S> norm;
  double dropout_rate = 0;

  memory_readout() = default;
  /// Projections start as `linear`. Throws config_error unless read = outputs if there is none, and for a dropout rate outside [0, 1].
  memory_readout(index_t read, index_t inputs, index_t outputs, const memory_readout_config& c, rng_key key)
      : dropout_rate(checked_rate("memory read-out", c.dropout)) {
    const bool gated = c.kind == memory_readout_kind::silu_gated;
    if (gated) silu = linear<S>({inputs, read, c.bias}, key.child(0));
    if (gated || c.kind == memory_readout_kind::linear)
      projection = linear<S>({read, outputs, c.bias}, key.child(1));
    else
      require<config_error>(read == outputs, "memory read-out: without a projection the values' width is the output's, got ", read, " and ", outputs);
    if (c.scalar_gate) scalar_gate = linear<S>({inputs, 1, true}, key.child(2));
    if (c.output_norm) norm = layer_norm<S>(outputs);
  }

  /// Whether y is m itself until dropout, gate and norm: then m and y may be one matrix.
  [[nodiscard]] bool plain() const { return projection.weight.size() == 0; }

  void forward(matrix_view<const S> m, matrix_view<const S> x, matrix_view<S> y, record* r, const context& ctx) const {
    read(m, x, y, r, ctx);
    if (ctx.train && dropout_rate > 0) drop<S>(y, y, dropout_rate, ctx.key, ctx);
    if (r != nullptr) r->key = ctx.key.value;
    if (scalar_gate.weight.size() != 0) {
      const scratch<S> here(ctx, r == nullptr ? y.rows() : 0, 1);
      if (r != nullptr) {
        r->ungated = y.map();
        r->gate.resize(y.rows(), 1);
      }
      const matrix_view<S> a = r != nullptr ? matrix_view<S>(r->gate) : here.view();
      scalar_gate.forward(x, a, ctx);
      a.map() = (S(1) + (-a.map().array()).exp()).inverse();
      y.map().array().colwise() *= a.map().col(0).array();
    }
    if (norm.weight.size() != 0) {
      if (r != nullptr) {
        r->before_norm = y.map();
        norm.forward(r->before_norm, y, r->norm, ctx);
      } else {
        norm.forward(y, y, ctx);
      }
    }
  }

  /// dm is overwritten, the gradient through the gates is added to dx.
  void backward(matrix_view<const S> m, matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dm, matrix_view<S> dx,
                gradient& g, const context& ctx) const {
    check_record(m, r, dy, ctx);
    const scratch<S> d(ctx, dy.rows(), dy.cols());
    if (norm.weight.size() != 0)
      norm.backward(r.before_norm, r.norm, dy, d, g.norm, ctx);
    else
      copy<S>(dy, d, ctx);
    if (scalar_gate.weight.size() != 0) {
      const scratch<S> dgate(ctx, d.rows(), 1);
      const auto a = r.gate.col(0).array();
      dgate.map().col(0) = (d.map().array() * r.ungated.array()).rowwise().sum() * a * (S(1) - a);
      scalar_gate.add_backward(x, dgate, dx, g.scalar_gate, ctx);
      d.map().array().colwise() *= a;
    }
    if (ctx.train && dropout_rate > 0) drop<S>(d, d, dropout_rate, {r.key}, ctx);
    if (plain()) return copy<S>(d, dm, ctx);
    if (silu.weight.size() == 0) return projection.backward(m, {}, d, dm, g.projection, ctx);
    const scratch<S> h(ctx, m.rows(), m.cols()), du(ctx, m.rows(), m.cols());
    activate_gated<S>(activation::silu, r.silu, m, h, ctx);
    projection.backward(h, {}, d, dm, g.projection, ctx);
    activate_gated_backward<S>(activation::silu, r.silu, m, dm, du, dm, ctx);
    silu.add_backward(x, du, dx, g.silu, ctx);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto* l : {&silu, &projection, &scalar_gate}) sum += l->forward_cost(length);
    return norm.weight.size() == 0 ? sum : sum + norm.forward_cost(length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("silu", s.silu...);
    f("projection", s.projection...);
    f("scalar_gate", s.scalar_gate...);
    f("norm", s.norm...);
  }

 private:
  void check_record(matrix_view<const S> m, const record& r, matrix_view<const S> dy, const context& ctx) const {
    constexpr const char* who = "memory read-out";
    ctx.check(who, dy.rows());
    if (silu.weight.size() != 0) recorded(who, r.silu, m.rows(), m.cols());
    if (norm.weight.size() != 0) recorded(who, r.before_norm, dy.rows(), dy.cols());
    if (scalar_gate.weight.size() == 0) return;
    recorded(who, r.ungated, dy.rows(), dy.cols());
    recorded(who, r.gate, dy.rows(), 1);
  }
  void read(matrix_view<const S> m, matrix_view<const S> x, matrix_view<S> y, record* r, const context& ctx) const {
    if (plain()) {
      if (m.data() != y.data()) copy<S>(m, y, ctx);
    } else if (silu.weight.size() == 0) {
      projection.forward(m, y, ctx);
    } else {
      const scratch<S> here(ctx, r == nullptr ? m.rows() : 0, m.cols()), h(ctx, m.rows(), m.cols());
      if (r != nullptr) r->silu.resize(m.rows(), m.cols());
      const matrix_view<S> u = r != nullptr ? matrix_view<S>(r->silu) : here.view();
      silu.forward(x, u, ctx);
      activate_gated<S>(activation::silu, u, m, h, ctx);
      projection.forward(h, y, ctx);
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
