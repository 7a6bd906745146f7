#pragma once

#include "lithe/kernels/elementwise.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/call.hpp"
#include "lithe/layers/cost.hpp"

namespace lithe::inline LITHE_ABI {

/// Blocks of one type, as many as a run-time number says, each keeping the shape: y = b_n(... b_1(x)); without blocks y = x. Its
/// children are named "0", "1", ...
template <class B>
struct stack {
  static_assert(explain_layer<B>());
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    std::vector<matrix<S>> between;  // the inputs of all blocks but the first
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };
  using cache = std::vector<cache_of<B>>;
  static constexpr bool looks_across = looks_across_tokens<B>;

  std::vector<B> blocks;

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const {
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const shape s = blocks[i].output_shape(x);
      require<shape_error>(s == shape{x.rows(), x.cols()}, "stack: block ", i, " turns ", to_text(x.rows(), x.cols()), " into ",
                           to_text(s.rows, s.cols), "; stacked blocks must keep the shape");
    }
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const {
    check_forward("stack", *this, x, y, ctx);
    through(x, y, ctx, [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out) { blocks[i].forward(in, out, ctx.child(i)); });
  }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward("stack", *this, x, y, ctx);
    const std::size_t n = blocks.size();
    r.blocks.resize(n);
    r.between.resize(n == 0 ? 0 : n - 1);
    if (n == 0) return copy<S>(x, y, ctx);
    for (std::size_t i = 0; i < n; ++i) {
      if (i + 1 < n) r.between[i].resize(x.rows(), x.cols());
      blocks[i].forward(i == 0 ? x : matrix_view<const S>(r.between[i - 1]), i + 1 < n ? matrix_view<S>(r.between[i]) : y, r.blocks[i],
                        ctx.child(i));
    }
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const {
    check_backward("stack", *this, x, dy, dx, g, ctx);
    const std::size_t n = blocks.size();
    recorded("stack", r.blocks, n);
    for (const matrix<S>& m : recorded("stack", r.between, n == 0 ? 0 : n - 1)) recorded("stack", m, x.rows(), x.cols());
    through(dy, dx, ctx, [&](std::size_t done, matrix_view<const S> d, matrix_view<S> out) {
      const std::size_t i = n - 1 - done;
      blocks[i].backward(i == 0 ? x : matrix_view<const S>(r.between[i - 1]), r.blocks[i], d, out, g.blocks[i], ctx.child(i));
    });
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    cache c;
    for (const auto& b : blocks) c.push_back(lithe::make_cache(b, slots, capacity));
    return c;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode("stack", *this, x, y);
    detail::check_blocks("stack", blocks.size(), c.size());
    through(x, y, ctx,
            [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out) { lithe::decode(blocks[i], in, out, c[i], ctx.child(i)); });
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const {
    detail::check_blocks("stack", blocks.size(), c.size());
    if (blocks.empty()) return;
    const scratch<S> h(ctx, x.rows(), x.cols());
    const std::size_t last = blocks.size() - 1;
    through(x, h, ctx, [&](std::size_t i, matrix_view<const S> in, matrix_view<S> out) {
      if (i == last)
        lithe::fill(blocks[i], in, c[i], ctx.child(i));
      else
        lithe::decode(blocks[i], in, out, c[i], ctx.child(i));
    });
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    detail::check_blocks("stack", blocks.size(), c.size());
    index_t least = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) least = std::max(least, lithe::least_length(blocks[i], c[i], slot));
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("stack", least_length(c, slot), slot, length);
    for (std::size_t i = 0; i < blocks.size(); ++i) lithe::truncate(blocks[i], c[i], slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    detail::check_blocks("stack", blocks.size(), c.size());
    for (std::size_t i = 0; i < blocks.size(); ++i) lithe::permute(blocks[i], c[i], order);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    cost sum;
    for (const auto& b : blocks) sum += cost_of(b, length);
    return sum;
  }
  template <class V, class First, class... T>
  static void visit(V&& f, First& s, T&... rest) {
    visit_parts(f, {""}, s.blocks, rest.blocks...);
  }

 private:
  /// Leads x through all blocks to y by way of two scratch matrices.
  template <class F>
  void through(matrix_view<const S> x, matrix_view<S> y, const context& ctx, F&& block) const {
    const std::size_t n = blocks.size();
    if (n == 0) return copy<S>(x, y, ctx);
    const scratch<S> a(ctx, n > 1 ? x.rows() : 0, x.cols()), b(ctx, n > 2 ? x.rows() : 0, x.cols());
    matrix_view<const S> in = x;
    for (std::size_t i = 0; i < n; ++i) {
      const matrix_view<S> out = i + 1 == n ? y : i % 2 == 0 ? a.view() : b.view();
      block(i, in, out);
      in = out;
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
