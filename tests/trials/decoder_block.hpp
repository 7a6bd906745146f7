#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/norms.hpp"

namespace trials {

using namespace lithe;

/// Decoder block: a = self(x), b = a + cross(norm(a), memory), y = feed(b), where self and feed hold their own residual connections. The sequences
/// of the memory are remembered in the cache once (`remember`); then the block decodes like any other.
template <layer Self, conditioned_layer Cross, layer Feed>
struct decoder_block {
  using scalar = typename Self::scalar;
  using S = scalar;
  struct record {
    record_of<Self> self;
    record_of<layer_norm<S>> norm;
    record_of<Cross> cross;
    record_of<Feed> feed;
    matrix<S> a, n, b;
  };
  struct gradient {
    gradient_of<Self> self;
    gradient_of<layer_norm<S>> norm;
    gradient_of<Cross> cross;
    gradient_of<Feed> feed;
  };
  struct cache {
    cache_of<Self> self;
    std::vector<matrix<S>> memory;  // of each slot
    cache_of<Feed> feed;
  };

  Self self;
  layer_norm<S> norm;
  Cross cross;
  Feed feed;

  shape output_shape(matrix_view<const S> x) const { return self.output_shape(x); }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, m, y, r, c);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const {
    for (matrix<S>* h : {&r.a, &r.n, &r.b}) h->resize(x.rows(), x.cols());
    self.forward(x, r.a, r.self, ctx.child(0));
    norm.forward(r.a, r.n, r.norm, ctx.child(1));
    cross.forward(r.n, m, r.b, r.cross, ctx.child(2));
    add<S>(r.a, r.b, ctx);
    feed.forward(r.b, y, r.feed, ctx.child(3));
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const {
    const scratch<S> db(ctx, x.rows(), x.cols()), dn(ctx, x.rows(), x.cols()), da(ctx, x.rows(), x.cols());
    feed.backward(r.b, r.feed, dy, db, g.feed, ctx.child(3));
    cross.backward(r.n, m, r.cross, db, dn, dm, g.cross, ctx.child(2));
    norm.backward(r.a, r.norm, dn, da, g.norm, ctx.child(1));
    add<S>(db, da, ctx);
    self.backward(x, r.self, da, dx, g.self, ctx.child(0));
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return {lithe::make_cache(self, slots, capacity), std::vector<matrix<S>>(static_cast<std::size_t>(slots)), lithe::make_cache(feed, slots, capacity)};
  }
  void remember(memory_view<S> m, cache& c, const context& ctx) const {
    for (index_t s = 0; s < m.rows.count(); ++s) {
      const index_t first = m.rows.begin(s);
      c.memory[static_cast<std::size_t>(ctx.slot(s))] = m.x.slice_rows(first, m.rows.end(s, m.x.rows()) - first).map();
    }
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    const scratch<S> a(ctx, x.rows(), x.cols()), n(ctx, x.rows(), x.cols()), b(ctx, x.rows(), x.cols());
    lithe::decode(self, x, a, c.self, ctx.child(0));
    norm.forward(a, n, ctx.child(1));
    std::vector<index_t> offsets{0};
    for (index_t s = 0; s < ctx.rows.count(); ++s) offsets.push_back(offsets.back() + remembered(c, s, ctx).rows());
    matrix<S> memory(offsets.back(), remembered(c, 0, ctx).cols());
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      memory.middleRows(offsets[static_cast<std::size_t>(s)], remembered(c, s, ctx).rows()) = remembered(c, s, ctx);
    cross.forward(n, {memory, {offsets}}, b, ctx.child(2));
    add<S>(a, b, ctx);
    lithe::decode(feed, b, y, c.feed, ctx.child(3));
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    const scratch<S> y(ctx, x.rows(), x.cols());
    decode(x, y, c, ctx);
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    lithe::truncate(self, c.self, slot, length);
    lithe::truncate(feed, c.feed, slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    lithe::permute(self, c.self, order);
    lithe::permute(feed, c.feed, order);
    const auto before = c.memory;
    for (std::size_t i = 0; i < order.size(); ++i) c.memory[i] = before[static_cast<std::size_t>(order[i])];
  }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("self", s.self...);
    f("norm", s.norm...);
    f("cross", s.cross...);
    f("feed", s.feed...);
  }

 private:
  static const matrix<S>& remembered(const cache& c, index_t sequence, const context& ctx) { return c.memory[static_cast<std::size_t>(ctx.slot(sequence))]; }
};

/// Conditioned blocks one after the other; all read one memory, whose gradient they add up.
template <conditioned_layer B>
struct conditioned_stack {
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    std::vector<matrix<S>> between;
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };

  std::vector<B> blocks;

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const { return {x.rows(), x.cols()}; }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const {
    context c = ctx;
    c.replay = false;
    record r;
    forward(x, m, y, r, c);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const {
    r.blocks.resize(blocks.size());
    r.between.resize(blocks.size() - 1);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if (i + 1 < blocks.size()) r.between[i].resize(x.rows(), x.cols());
      blocks[i].forward(i == 0 ? x : matrix_view<const S>(r.between[i - 1]), m, i + 1 < blocks.size() ? matrix_view<S>(r.between[i]) : y, r.blocks[i],
                        ctx.child(i));
    }
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const {
    const scratch<S> d(ctx, x.rows(), x.cols());
    copy<S>(dy, dx, ctx);
    for (std::size_t i = blocks.size(); i-- > 0;) {
      copy<S>(dx, d, ctx);
      blocks[i].backward(i == 0 ? x : matrix_view<const S>(r.between[i - 1]), m, r.blocks[i], d, dx, dm, g.blocks[i], ctx.child(i));
    }
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    for (std::size_t i = 0; i < s.blocks.size(); ++i) f(std::to_string(i), s.blocks[i], rest.blocks[i]...);
  }
};

}  // namespace trials
