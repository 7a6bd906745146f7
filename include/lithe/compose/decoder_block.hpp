#pragma once

#include "lithe/compose/decoder_cross_cache.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/norms.hpp"

namespace lithe::inline LITHE_ABI {

/// A decoder block with cross-attention (arXiv 1706.03762, section 3.1, with the norm in front): a = self(x), b = a + drop(cross(norm(a), memory)),
/// y = feed(b), where `self` and `feed` hold their own residual connections. x and y [T x D]; sequence i of x reads sequence i of the memory.
///
/// Decoding reads the memory by slot (`cross_cache`): `start` says once which source each slot has, then `decode` gets the whole memory with each
/// call. Throws as its parts do.
template <layer Self, layer Feed>
struct decoder_block {
  using scalar = typename Self::scalar;
  using S = scalar;
  struct record {
    record_of<Self> self;
    record_of<layer_norm<S>> norm;
    record_of<cross_attention<S>> cross;
    record_of<dropout<S>> drop;
    record_of<Feed> feed;
    matrix<S> a, normed, b;
  };
  struct gradient {
    gradient_of<Self> self;
    gradient_of<layer_norm<S>> norm;
    gradient_of<cross_attention<S>> cross;
    gradient_of<Feed> feed;
  };
  struct cache {
    cache_of<Self> self;
    cross_cache<S> cross;
    cache_of<Feed> feed;
  };
  static constexpr bool looks_across = true;

  Self self;
  layer_norm<S> norm;
  cross_attention<S> cross;
  dropout<S> drop;
  Feed feed;

  shape output_shape(matrix_view<const S> x) const {
    feed.output_shape(x);
    return self.output_shape(x);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    const scratch<S> a(ctx, x.rows(), x.cols()), n(ctx, x.rows(), x.cols()), b(ctx, x.rows(), x.cols());
    self.forward(x, a, ctx.child(0));
    norm.forward(a, n, ctx.child(1));
    cross.forward(n, m, b, ctx.child(2));
    drop.forward(b, b, ctx.child(3));
    add<S>(a, b, ctx);
    feed.forward(b, y, ctx.child(4));
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    for (matrix<S>* h : {&r.a, &r.normed, &r.b}) h->resize(x.rows(), x.cols());
    self.forward(x, r.a, r.self, ctx.child(0));
    norm.forward(r.a, r.normed, r.norm, ctx.child(1));
    cross.forward(r.normed, m, r.b, r.cross, ctx.child(2));
    drop.forward(r.b, r.b, r.drop, ctx.child(3));
    add<S>(r.a, r.b, ctx);
    feed.forward(r.b, y, r.feed, ctx.child(4));
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const {
    detail::check_rows(who, "dy", *this, x, dy, ctx);
    detail::check_like(who, "dx", dx, x);
    detail::check_like(who, "dm", dm, m.x);
    check_gradient(who, *this, g);
    for (const matrix<S>* h : {&r.a, &r.normed, &r.b}) recorded(who, *h, x.rows(), x.cols());
    const scratch<S> db(ctx, x.rows(), x.cols()), dc(ctx, x.rows(), x.cols()), dn(ctx, x.rows(), x.cols()), da(ctx, x.rows(), x.cols());
    feed.backward(r.b, r.feed, dy, db, g.feed, ctx.child(4));
    dropout_gradient none;
    drop.backward(r.b, r.drop, db, dc, none, ctx.child(3));
    cross.backward(r.normed, m, r.cross, dc, dn, dm, g.cross, ctx.child(2));
    norm.backward(r.a, r.norm, dn, da, g.norm, ctx.child(1));
    add<S>(db, da, ctx);
    self.backward(x, r.self, da, dx, g.self, ctx.child(0));
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return {lithe::make_cache(self, slots, capacity), make_cross_cache<S>(slots), lithe::make_cache(feed, slots, capacity)};
  }
  /// Slot s reads sequence source[s] of the memory; what the cache knew of another memory is forgotten.
  void start(memory_view<S> m, std::span<const index_t> source, cache& c) const { start_cross_cache(cross, m, source, c.cross); }
  void decode(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode(who, *this, x, y);
    const scratch<S> a(ctx, x.rows(), x.cols()), n(ctx, x.rows(), x.cols()), b(ctx, x.rows(), x.cols());
    lithe::decode(self, x, a.view(), c.self, ctx.child(0));
    norm.forward(a, n, ctx.child(1));
    cross_decode<S>(cross, n, m, b, c.cross, ctx.child(2));
    add<S>(a, b, ctx);
    lithe::decode(feed, matrix_view<const S>(b), y, c.feed, ctx.child(4));
  }
  /// Keys and values of the self-attention only.
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    static_assert(!looks_across_tokens<Feed>, "lithe: a decoder block whose feed looks across tokens cannot skip a token: its feed would miss it.");
    lithe::fill(self, x, c.self, ctx.child(0));
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    return std::max(lithe::least_length(self, c.self, slot), lithe::least_length(feed, c.feed, slot));
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("decoder_block", least_length(c, slot), slot, length);
    lithe::truncate(self, c.self, slot, length);
    lithe::truncate(feed, c.feed, slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    lithe::permute(self, c.self, order);
    lithe::permute(feed, c.feed, order);
    permute_cross_cache(c.cross, order);
  }

  /// For a token that sees `length` tokens of its own sequence and as many of the memory.
  [[nodiscard]] cost forward_cost(index_t length) const {
    return cost_of(self, length) + norm.forward_cost(length) + cross.forward_cost(length) + cost_of(feed, length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("self", s.self...);
    f("norm", s.norm...);
    f("cross", s.cross...);
    f("feed", s.feed...);
  }

 private:
  static constexpr const char* who = "decoder_block";
  using dropout_gradient = gradient_of<dropout<S>>;
};

}  // namespace lithe::inline LITHE_ABI
