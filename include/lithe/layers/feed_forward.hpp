#pragma once

#include "lithe/kernels/activation.hpp"
#include "lithe/kernels/dropout.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/linear.hpp"

namespace lithe::inline LITHE_ABI {

struct feed_forward_config {
  index_t features = 0, hidden = 0;
  activation kind = activation::relu;
  bool gated = false;  ///< a(gate x) ⊙ (up x) in place of a(up x)
  bool bias = true;
  index_t chunk = 0;   ///< tokens computed at a time; 0 = all. Chunked, backward computes the hidden layer again and the record is empty
  double dropout = 0;  ///< of W₁ x + b₁, before the activation, as the Reformer has it (arXiv 2001.04451)
};

/// Position-wise feed-forward: y = W₂ a(W₁ x + b₁) + b₂ (arXiv 1706.03762 eq. 2), or gated y = W₂ (a(W_g x + b_g) ⊙ (W₁ x + b₁)) + b₂
/// (arXiv 2002.05202). x and y [T x features]. Chunked over tokens (arXiv 2001.04451 section 3) the values are the same and the memory
/// is that of one chunk. Throws config_error, shape_error.
template <std::floating_point S>
struct feed_forward {
  using scalar = S;
  struct record {
    matrix<S> up, gate;  // before the activation
  };
  struct gradient {
    typename linear<S>::gradient up, gate, down;
  };

  linear<S> up, gate, down;
  activation kind = activation::relu;
  index_t chunk = 0;
  double rate = 0;  ///< of dropout

  feed_forward() = default;
  /// Maps start as `linear`. Throws config_error for sizes below 1, a chunk below 0 and a rate outside [0, 1].
  feed_forward(feed_forward_config c, rng_key key)
      : up({c.features, c.hidden, c.bias}, key.child(0)), down({c.hidden, c.features, c.bias}, key.child(2)), kind(c.kind), chunk(c.chunk),
        rate(checked_rate("feed_forward", c.dropout)) {
    require<config_error>(c.chunk >= 0, "feed_forward: expected a chunk of 0 (all) or more tokens, got ", c.chunk);
    if (c.gated) gate = linear<S>({c.features, c.hidden, c.bias}, key.child(1));
  }
  [[nodiscard]] bool gated() const { return gate.weight.size() != 0; }  ///< whether there is a W_g

  shape output_shape(matrix_view<const S> x) const {
    require_features("feed_forward", up.weight.cols(), x);
    return {x.rows(), down.weight.rows()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, x, y, ctx);
    each_chunk(x.rows(), [&](index_t first, index_t n) {
      const scratch<S> u(ctx, n, up.weight.rows()), v(ctx, gated() ? n : 0, up.weight.rows());
      const context part = ctx.chunk(first, n);
      hidden(x.slice_rows(first, n), u, v, u, part);
      down.forward(u, y.slice_rows(first, n), part);
    });
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    if (chunk > 0) return forward(x, y, ctx);
    check_forward(who, *this, x, y, ctx);
    const index_t n = x.rows(), width = up.weight.rows();
    r.up.resize(n, width);
    r.gate.resize(gated() ? n : 0, width);
    const scratch<S> h(ctx, n, width);
    hidden(x, r.up, r.gate, h, ctx);
    down.forward(h, y, ctx);
  }

  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t width = up.weight.rows();
    check_backward(who, *this, x, dy, dx, g, ctx);
    if (chunk == 0) {
      recorded(who, r.up, x.rows(), width);
      recorded(who, r.gate, gated() ? x.rows() : 0, width);
    }
    each_chunk(x.rows(), [&](index_t first, index_t n) {
      const context part = ctx.chunk(first, n);
      const auto xs = x.slice_rows(first, n), dys = dy.slice_rows(first, n);
      const scratch<S> h(ctx, n, width), dh(ctx, n, width), dgate(ctx, gated() ? n : 0, width);
      const scratch<S> again(ctx, chunk > 0 ? n : 0, width), gate_again(ctx, chunk > 0 && gated() ? n : 0, width);
      matrix_view<const S> u = r.up, v = r.gate;
      if (chunk > 0) {
        hidden(xs, again, gate_again, h, part);
        u = again;
        v = gate_again;
      } else {
        activate_hidden(u, v, h, part);
      }
      down.backward(h, {}, dys, dh, g.down, part);
      if (gated()) {
        activate_gated_backward<S>(kind, v, u, dh, dgate, dh, part);
        drop_hidden(dh, part);
        gate.backward(xs, {}, dgate, dx.slice_rows(first, n), g.gate, part);
        up.add_backward(xs, dh, dx.slice_rows(first, n), g.up, part);
      } else {
        activate_backward<S>(kind, u, dh, dh, part);
        drop_hidden(dh, part);
        up.backward(xs, {}, dh, dx.slice_rows(first, n), g.up, part);
      }
    });
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return up.forward_cost(length) + down.forward_cost(length) + (gated() ? gate.forward_cost(length) : cost{});
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("up", s.up...);
    f("gate", s.gate...);
    f("down", s.down...);
  }

 private:
  static constexpr const char* who = "feed_forward";

  template <class F>
  void each_chunk(index_t rows, F&& f) const {
    const index_t step = chunk > 0 ? chunk : std::max<index_t>(1, rows);
    for (index_t first = 0; first < rows; first += step) f(first, std::min(step, rows - first));
  }
  void drop_hidden(matrix_view<S> u, const context& ctx) const {
    if (ctx.train && rate > 0) drop<S>(u, u, rate, ctx.key, ctx);
  }
  /// u = up x, v = gate x, h = the activated hidden layer; h may be u.
  void hidden(matrix_view<const S> x, matrix_view<S> u, matrix_view<S> v, matrix_view<S> h, const context& ctx) const {
    up.forward(x, u, ctx);
    drop_hidden(u, ctx);
    if (gated()) gate.forward(x, v, ctx);
    activate_hidden(u, v, h, ctx);
  }
  void activate_hidden(matrix_view<const S> u, matrix_view<const S> v, matrix_view<S> h, const context& ctx) const {
    if (gated())
      activate_gated<S>(kind, v, u, h, ctx);
    else
      activate<S>(kind, u, h, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
