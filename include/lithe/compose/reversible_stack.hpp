#pragma once

#include "lithe/compose/reversible.hpp"

// T tokens, D features of one stream
namespace lithe::inline LITHE_ABI {

/// Reversible blocks of one type, one after the other: y = b_n(... b_1(x)), x and y [T x 2D]. Its children are named "0", "1", ...
///
/// The record holds the last output and what the blocks chose; backward reconstructs every block's input, so activation memory does not
/// grow with depth (arXiv 1707.04585 section 3.3). `forward_in_place` and `reverse` keep no copy of the output either: the caller's
/// xy is the output, and becomes the input again. Blocks that need a memory make it a `conditioned_layer`.
template <class B>
struct reversible_stack {
  static constexpr bool conditioned = conditioned_reversible_block<B>;
  static_assert(conditioned || reversible_block<B>, "lithe: a reversible_stack needs blocks with forward_in_place and reverse, such as `reversible`.");
  using scalar = typename B::scalar;
  using S = scalar;
  struct record {
    std::vector<record_of<B>> blocks;
    matrix<S> output;
  };
  struct gradient {
    std::vector<gradient_of<B>> blocks;
  };
  using cache = std::vector<cache_of<B>>;
  static constexpr bool looks_across = looks_across_tokens<B>;

  std::vector<B> blocks;

  void prepare(gradient& g) const { g.blocks.resize(blocks.size()); }
  shape output_shape(matrix_view<const S> x) const {
    for (const B& b : blocks) b.output_shape(x);
    return {x.rows(), x.cols()};
  }

  void forward(matrix_view<const S> x, matrix_view<S> y, const context& ctx) const requires(!conditioned) { copy_forward(x, y, nullptr, ctx); }
  void forward(matrix_view<const S> x, matrix_view<S> y, record& r, const context& ctx) const requires(!conditioned) { copy_forward(x, y, &r, ctx); }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx) const
      requires(!conditioned) {
    copy_backward(x, r, dy, dx, g, ctx);
  }
  /// r: null or the blocks' records alone; its `output` is not touched.
  void forward_in_place(matrix_view<S> xy, record* r, const context& ctx) const requires(!conditioned) { run(xy, r, ctx); }
  void reverse(matrix_view<S> xy, matrix_view<S> dxy, const record& r, gradient& g, const context& ctx) const requires(!conditioned) {
    run_back(xy, dxy, r, g, ctx);
  }

  // The same for blocks with a memory, whose gradient dm is added to.
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, const context& ctx) const requires conditioned {
    copy_forward(x, y, nullptr, ctx, m);
  }
  void forward(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, record& r, const context& ctx) const requires conditioned {
    copy_forward(x, y, &r, ctx, m);
  }
  void backward(matrix_view<const S> x, memory_view<S> m, const record& r, matrix_view<const S> dy, matrix_view<S> dx, matrix_view<S> dm, gradient& g,
                const context& ctx) const requires conditioned {
    copy_backward(x, r, dy, dx, g, ctx, m, dm);
  }
  void forward_in_place(matrix_view<S> xy, memory_view<S> m, record* r, const context& ctx) const requires conditioned { run(xy, r, ctx, m); }
  void reverse(matrix_view<S> xy, memory_view<S> m, matrix_view<S> dxy, matrix_view<S> dm, const record& r, gradient& g, const context& ctx) const
      requires conditioned {
    run_back(xy, dxy, r, g, ctx, m, dm);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    cache c;
    for (const auto& b : blocks) c.push_back(b.make_cache(slots, capacity));
    return c;
  }
  void decode(matrix_view<const S> x, matrix_view<S> y, cache& c, const context& ctx) const requires(!conditioned) {
    decode_until(x, y, blocks.size(), c, ctx);
  }
  void decode(matrix_view<const S> x, memory_view<S> m, matrix_view<S> y, cache& c, const context& ctx) const requires conditioned {
    decode_until(x, y, blocks.size(), c, ctx, m);
  }
  void fill(matrix_view<const S> x, cache& c, const context& ctx) const requires(!conditioned) { decode_and_fill(x, c, ctx); }
  void fill(matrix_view<const S> x, memory_view<S> m, cache& c, const context& ctx) const requires conditioned { decode_and_fill(x, c, ctx, m); }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const {
    detail::check_blocks("reversible_stack", blocks.size(), c.size());
    index_t least = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) least = std::max(least, lithe::least_length(blocks[i], c[i], slot));
    return least;
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("reversible_stack", least_length(c, slot), slot, length);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].truncate(c[i], slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    detail::check_blocks("reversible_stack", blocks.size(), c.size());
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].permute(c[i], order);
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
  static constexpr const char* who = "reversible_stack";

  // m... is nothing, or the memory (and its gradient).
  void run(matrix_view<S> xy, record* r, const context& ctx, const auto&... m) const {
    output_shape(xy);
    ctx.check(who, xy.rows());
    if (r != nullptr) r->blocks.resize(blocks.size());
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].forward_in_place(xy, m..., r == nullptr ? nullptr : &r->blocks[i], ctx.child(i));
  }
  void run_back(matrix_view<S> xy, matrix_view<S> dxy, const record& r, gradient& g, const context& ctx, const auto&... m) const {
    require_shape(who, "dxy", dxy, xy.rows(), xy.cols());
    ctx.check(who, xy.rows());
    check_gradient(who, *this, g);
    recorded(who, r.blocks, blocks.size());
    for (std::size_t i = blocks.size(); i-- > 0;) {
      if constexpr (conditioned)
        [&](const auto& memory, const auto& dm) { blocks[i].reverse(xy, memory, dxy, dm, r.blocks[i], g.blocks[i], ctx.child(i)); }(m...);
      else
        blocks[i].reverse(xy, dxy, r.blocks[i], g.blocks[i], ctx.child(i));
    }
  }
  void copy_forward(matrix_view<const S> x, matrix_view<S> y, record* r, const context& ctx, const auto&... m) const {
    detail::check_rows(who, "y", *this, x, y, ctx);
    copy<S>(x, y, ctx);
    run(y, r, ctx, m...);
    if (r == nullptr) return;
    r->output.resize(y.rows(), y.cols());
    copy<S>(y, r->output, ctx);
  }
  void copy_backward(matrix_view<const S> x, const record& r, matrix_view<const S> dy, matrix_view<S> dx, gradient& g, const context& ctx, const auto&... m) const {
    detail::check_rows(who, "dy", *this, x, dy, ctx);
    detail::check_like(who, "dx", dx, x);
    check_gradient(who, *this, g);
    recorded(who, r.output, dy.rows(), dy.cols());
    recorded(who, r.blocks, blocks.size());
    const scratch<S> xy(ctx, dy.rows(), dy.cols());
    copy<S>(r.output, xy, ctx);
    copy<S>(dy, dx, ctx);
    run_back(xy, dx, r, g, ctx, m...);
  }
  /// Leads x through the blocks before `end` to y.
  void decode_until(matrix_view<const S> x, matrix_view<S> y, std::size_t end, cache& c, const context& ctx, const auto&... m) const {
    check_decode(who, *this, x, y);
    detail::check_blocks("reversible_stack", blocks.size(), c.size());
    const scratch<S> in(ctx, x.rows(), x.cols());
    copy<S>(x, y, ctx);
    for (std::size_t i = 0; i < end; ++i) {
      copy<S>(y, in, ctx);
      blocks[i].decode(in, m..., y, c[i], ctx.child(i));
    }
  }
  void decode_and_fill(matrix_view<const S> x, cache& c, const context& ctx, const auto&... m) const {
    if (blocks.empty()) return;
    const scratch<S> y(ctx, x.rows(), x.cols());
    const std::size_t last = blocks.size() - 1;
    decode_until(x, y, last, c, ctx, m...);
    blocks[last].fill(y, m..., c[last], ctx.child(last));
  }
};

}  // namespace lithe::inline LITHE_ABI
