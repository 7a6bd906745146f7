#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"

namespace trials {

using namespace lithe;

/// Reversible block (arXiv 1707.04585): x = [x1 | x2], y1 = x1 + F(x2), y2 = x2 + G(y1). Its record holds what F and G chose and one key;
/// `reverse` computes x from y, and all that backward needs with it.
template <layer F, layer G>
struct reversible {
  using scalar = typename F::scalar;
  using S = scalar;
  struct record {
    record_of<F> f;
    record_of<G> g;
    std::uint64_t key = 0;
  };
  struct gradient {
    gradient_of<F> f;
    gradient_of<G> g;
  };

  F f;
  G g;

  shape output_shape(matrix_view<const S> x) const {
    require<shape_error>(x.cols() % 2 == 0, "reversible: expected two streams side by side, got ", x.cols(), " columns");
    const index_t half = x.cols() / 2;
    const auto a = f.output_shape(x.slice_cols(half, half)), b = g.output_shape(x.slice_cols(0, half));
    require<shape_error>(a == shape{x.rows(), half} && b == a, "reversible: f and g must keep the shape of a stream");
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    output_shape(x);
    copy<S>(x, y, ctx);
    forward_in_place(y, nullptr, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    output_shape(x);
    copy<S>(x, y, ctx);
    forward_in_place(y, &r, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& q, const context& ctx) const {
    const scratch<S> xy(ctx, x.rows(), x.cols());
    context c = replay(r, ctx);
    record again = r;
    copy<S>(x, xy, ctx);
    forward_in_place(xy, &again, c);
    copy<S>(dy, dx, ctx);
    reverse(xy, dx, r, q, ctx);
  }

  void forward_in_place(matrix_view<S> xy, record* r, const context& ctx) const {
    const auto [y1, y2] = streams(xy);
    const scratch<S> t(ctx, xy.rows(), y1.cols());
    if (r != nullptr) r->key = ctx.key.value;
    const auto step = [&](const auto& part, matrix_view<S> in, matrix_view<S> out, auto* kept_part, const context& c) {
      if (kept_part != nullptr) {
        part.forward(in, t, *kept_part, c);
        forget(*kept_part);
      } else {
        part.forward(in, t, c);
      }
      add<S>(t, out, ctx);
    };
    step(f, y2, y1, r == nullptr ? nullptr : &r->f, ctx.child(0));
    step(g, y1, y2, r == nullptr ? nullptr : &r->g, ctx.child(1));
  }
  /// From y and dy, in place, to x and dx.
  void reverse(matrix_view<S> xy, matrix_view<S> dxy, const record& r, gradient& q, const context& ctx) const {
    const context c = replay(r, ctx);
    const auto [y1, y2] = streams(xy);
    const auto [d1, d2] = streams(dxy);
    const scratch<S> t(ctx, xy.rows(), y1.cols());
    const auto step = [&](const auto& part, matrix_view<S> in, matrix_view<S> out, matrix_view<S> dout, matrix_view<S> din, auto again, auto& gradient_part,
                          const context& child) {
      part.forward(in, t, again, child);
      out.map() -= t.map();
      part.backward(in, again, dout, t, gradient_part, child);
      add<S>(t, din, ctx);
    };
    step(g, y1, y2, d2, d1, r.g, q.g, c.child(1));
    step(f, y2, y1, d1, d2, r.f, q.f, c.child(0));
  }

  template <class V, class... T>
  static void visit(V&& v, T&... s) {
    v("f", s.f...);
    v("g", s.g...);
  }

 private:
  static context replay(const record& r, const context& ctx) {
    context c = ctx;
    c.key = {r.key};
    c.replay = true;
    return c;
  }
  static std::pair<matrix_view<S>, matrix_view<S>> streams(matrix_view<S> xy) {
    const index_t half = xy.cols() / 2;
    return {xy.slice_cols(0, half), xy.slice_cols(half, half)};
  }
};

/// Reversible blocks one after the other; holds the last output alone, whatever the depth.
template <class B>
struct reversible_stack {
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    matrix<S> output;
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };

  std::vector<B> blocks;

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const {
    for (const B& b : blocks) b.output_shape(x);
    return {x.rows(), x.cols()};
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    output_shape(x);
    copy<S>(x, y, ctx);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].forward_in_place(y, nullptr, ctx.child(i));
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    output_shape(x);
    copy<S>(x, y, ctx);
    r.blocks.resize(blocks.size());
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].forward_in_place(y, &r.blocks[i], ctx.child(i));
    r.output = y.map();
  }
  void backward(matrix_view<const S>, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const scratch<S> xy(ctx, dy.rows(), dy.cols());
    copy<S>(r.output, xy, ctx);
    copy<S>(dy, dx, ctx);
    for (std::size_t i = blocks.size(); i-- > 0;) blocks[i].reverse(xy, dx, r.blocks[i], g.blocks[i], ctx.child(i));
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    for (std::size_t i = 0; i < s.blocks.size(); ++i) f(std::to_string(i), s.blocks[i], rest.blocks[i]...);
  }
};

}  // namespace trials
