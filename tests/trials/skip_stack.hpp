#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/norms.hpp"

namespace trials {

using namespace lithe;

/// A block that shows a value inside of it, the tap [T x D], and takes a gradient for it.
template <class B>
concept tapped_layer = layer<B> && requires(const B b, matrix_view<const typename B::scalar> x, matrix_view<typename B::scalar> y, record_of<B> r, gradient_of<B> g,
                                            const context& ctx) {
  b.forward_tapped(x, y, y, r, ctx);      // x, y, tap
  b.backward_tapped(x, r, x, x, y, g, ctx);  // x, record, dy, dtap, dx
};

/// h = mix(x), tap = norm(h), y = h + feed(tap); mix holds its own residual connection.
template <layer Mix, layer Feed>
struct tapped_block {
  using scalar = typename Mix::scalar;
  using S = scalar;
  struct record {
    record_of<Mix> mix;
    record_of<layer_norm<S>> norm;
    record_of<Feed> feed;
    matrix<S> h, tap;
  };
  struct gradient {
    gradient_of<Mix> mix;
    gradient_of<layer_norm<S>> norm;
    gradient_of<Feed> feed;
  };

  Mix mix;
  layer_norm<S> norm;
  Feed feed;

  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, y, r, c);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    r.h.resize(x.rows(), x.cols());
    r.tap.resize(x.rows(), x.cols());
    mix.forward(x, r.h, r.mix, ctx.child(0));
    norm.forward(r.h, r.tap, r.norm, ctx.child(1));
    feed.forward(r.tap, y, r.feed, ctx.child(2));
    add<S>(r.h, y, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    backward_tapped(x, r, dy, {}, dx, g, ctx);
  }
  void forward_tapped(matrix_view<const S> x, matrix_view<S> y, matrix_view<S> tap, record& r, const context& ctx) const {
    forward(x, y, r, ctx);
    copy<S>(r.tap, tap, ctx);
  }
  void backward_tapped(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<const S> dtap, matrix_view<S> dx, gradient& g,
                       const context& ctx) const {
    const scratch<S> dt(ctx, x.rows(), x.cols()), dh(ctx, x.rows(), x.cols());
    feed.backward(r.tap, r.feed, dy, dt, g.feed, ctx.child(2));
    if (dtap.data() != nullptr) add<S>(dtap, dt, ctx);
    norm.backward(r.h, r.norm, dt, dh, g.norm, ctx.child(1));
    add<S>(dy, dh, ctx);
    mix.backward(x, r.mix, dh, dx, g.mix, ctx.child(0));
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("mix", s.mix...);
    f("norm", s.norm...);
    f("feed", s.feed...);
  }
};

/// Which block a unit reads inside, and after which block its output joins.
struct skip_range {
  std::size_t read, join;
};

/// Blocks, and units that read the tap of one block and add their output after the same or a later one (arXiv 2411.12364 section 3.1).
template <tapped_layer B, layer U>
struct skip_stack {
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    std::vector<record_of<U>> units;
    std::vector<matrix<S>> between, taps;
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
    std::vector<gradient_of<U>> units;
  };

  std::vector<B> blocks;
  std::vector<U> units;
  std::vector<skip_range> ranges;

  void prepare(gradient& g) const {
    g.blocks.resize(blocks.size());
    g.units.resize(units.size());
  }
  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, y, r, c);
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    const std::size_t n = blocks.size();
    const scratch<S> tap(ctx, x.rows(), x.cols()), out(ctx, x.rows(), x.cols());
    r.blocks.resize(n);
    r.units.resize(units.size());
    r.between.resize(n - 1);
    r.taps.resize(units.size());
    for (std::size_t i = 0; i < n; ++i) {
      if (i + 1 < n) r.between[i].resize(x.rows(), x.cols());
      const matrix_view<S> h = i + 1 < n ? matrix_view<S>(r.between[i]) : y;
      blocks[i].forward_tapped(input(x, r, i), h, tap, r.blocks[i], ctx.child(i));
      for (std::size_t u = 0; u < units.size(); ++u) {
        if (ranges[u].read == i) r.taps[u] = tap.map();
        if (ranges[u].join != i) continue;
        units[u].forward(r.taps[u], out, r.units[u], ctx.child(n + u));
        add<S>(out, h, ctx);
      }
    }
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const std::size_t n = blocks.size();
    const scratch<S> d(ctx, x.rows(), x.cols()), dtap(ctx, x.rows(), x.cols());
    std::vector<matrix<S>> of_unit(units.size(), matrix<S>(x.rows(), x.cols()));
    copy<S>(dy, dx, ctx);
    for (std::size_t i = n; i-- > 0;) {
      copy<S>(dx, d, ctx);
      dtap.map().setZero();
      for (std::size_t u = units.size(); u-- > 0;) {
        if (ranges[u].join == i) units[u].backward(r.taps[u], r.units[u], d, of_unit[u], g.units[u], ctx.child(n + u));
        if (ranges[u].read == i) add<S>(of_unit[u], dtap, ctx);
      }
      blocks[i].backward_tapped(input(x, r, i), r.blocks[i], d, dtap, dx, g.blocks[i], ctx.child(i));
    }
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    for (std::size_t i = 0; i < s.blocks.size(); ++i) f("blocks." + std::to_string(i), s.blocks[i], rest.blocks[i]...);
    for (std::size_t u = 0; u < s.units.size(); ++u) f("units." + std::to_string(u), s.units[u], rest.units[u]...);
  }

 private:
  static matrix_view<const S> input(matrix_view<const S> x, const record& r, std::size_t i) { return i == 0 ? x : matrix_view<const S>(r.between[i - 1]); }
};

}  // namespace trials
