#pragma once

#include "lithe/compose/reversible_stack.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/axial_positions.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/linear.hpp"

// T tokens, D features of one stream, V vocabulary
namespace lithe::inline LITHE_ABI {

/// Language model of reversible blocks (arXiv 2001.04451):
///
///     e = dropout(E[id]) + dropout(P[position]);   [y₁ | y₂] = blocks([e | e]);   logits = W dropout(norm([y₁ | y₂])) + b
///
/// ids [T] -> logits [T x V]; the norm is 2D wide and W [V x 2D] is not tied to E. The record holds the blocks' output and choices.
/// `reversible_loss` (training/) takes a training step without any [T x V] matrix. Throws what its parts throw.
template <class Block>
struct reversible_language_model {
  using scalar = typename Block::scalar;
  using S = scalar;
  using input_type = std::span<const token_t>;
  using input_gradient_type = nothing;
  /// What turns [e | e] into [y₁ | y₂].
  using stack_type = reversible_stack<Block>;
  /// What turns [y₁ | y₂] into logits.
  using head_type = sequential<layer_norm<S>, dropout<S>, linear<S>>;
  struct record {
    record_of<stack_type> blocks;
    record_of<head_type> head;
    matrix<S> streams;  // the blocks' output
  };
  struct gradient {
    gradient_of<embedding<S>> words;
    gradient_of<axial_positions<S>> positions;
    gradient_of<stack_type> blocks;
    gradient_of<head_type> head;
  };
  struct cache {
    cache_of<axial_positions<S>> positions;
    cache_of<stack_type> blocks;
  };
  static constexpr bool looks_across = true;

  embedding<S> words;
  axial_positions<S> positions;  ///< one axis: a plain table
  stack_type blocks;
  head_type head;
  dropout<S> drop;  ///< of the words

  shape output_shape(input_type ids) const { return head.output_shape(matrix_view<const S>(nullptr, words.output_shape(ids).rows, 2 * features())); }

  void forward(input_type ids, matrix_view<S> y, const context& ctx) const {
    check_forward(who, *this, ids, y, ctx);
    const scratch<S> xy(ctx, output_shape(ids).rows, 2 * features());
    embed(ids, xy, ctx);
    blocks.forward_in_place(xy, nullptr, ctx.child(block_child));
    head.forward(xy, y, ctx.child(head_child));
  }
  void forward(input_type ids, matrix_view<S> y, record& r, const context& ctx) const {
    check_forward(who, *this, ids, y, ctx);
    r.streams.resize(output_shape(ids).rows, 2 * features());
    embed(ids, r.streams, ctx);
    blocks.forward_in_place(r.streams, &r.blocks, ctx.child(block_child));
    head.forward(r.streams, y, r.head, ctx.child(head_child));
  }
  void backward(input_type ids, const record& r, matrix_view<const S> dy, nothing, gradient& g, const context& ctx) const {
    check_backward(who, *this, ids, dy, {}, g, ctx);
    recorded(who, r.streams, output_shape(ids).rows, 2 * features());
    const scratch<S> xy(ctx, r.streams.rows(), r.streams.cols()), dxy(ctx, r.streams.rows(), r.streams.cols());
    head.backward(r.streams, r.head, dy, dxy, g.head, ctx.child(head_child));
    copy<S>(r.streams, xy, ctx);
    blocks.reverse(xy, dxy, r.blocks, g.blocks, ctx.child(block_child));
    embed_backward(ids, dxy, g, ctx);
  }

  // The steps of a forward and a backward pass, for those that must not hold more than the streams and their gradients.
  static constexpr std::uint64_t block_child = 2, head_child = 3;
  [[nodiscard]] index_t features() const { return words.weight.cols(); }  ///< D, the width of one stream
  /// xy [T x 2D] = [e | e].
  void embed(input_type ids, matrix_view<S> xy, const context& ctx) const {
    const auto [e, with_positions] = streams(xy);
    words.forward(ids, e, ctx);
    drop.forward(e, e, ctx.child(0));
    positions.forward(e, with_positions, ctx.child(1));
    copy<S>(with_positions, e, ctx);
  }
  /// From the gradient of [e | e], which is used up.
  void embed_backward(input_type ids, matrix_view<S> dxy, gradient& g, const context& ctx) const {
    const auto [de, other] = streams(dxy);
    add<S>(other, de, ctx);
    positions.backward(de, {}, de, other, g.positions, ctx.child(1));
    typename dropout<S>::gradient none;
    drop.backward(other, {ctx.child(0).key.value, other.rows()}, other, other, none, ctx.child(0));
    words.backward(ids, {}, other, nothing{}, g.words, ctx);
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return {positions.make_cache(slots, capacity), blocks.make_cache(slots, capacity)};
  }
  void decode(input_type ids, matrix_view<S> y, cache& c, const context& ctx) const {
    check_decode(who, *this, ids, y);
    const scratch<S> x(ctx, output_shape(ids).rows, 2 * features()), h(ctx, x.rows(), x.cols());
    embed_next(ids, x, c, ctx);
    blocks.decode(x, h, c.blocks, ctx.child(block_child));
    head.forward(h, y, ctx.child(head_child));
  }
  void fill(input_type ids, cache& c, const context& ctx) const {
    const scratch<S> x(ctx, output_shape(ids).rows, 2 * features());
    embed_next(ids, x, c, ctx);
    blocks.fill(x, c.blocks, ctx.child(block_child));
  }
  [[nodiscard]] index_t least_length(const cache& c, index_t slot) const { return blocks.least_length(c.blocks, slot); }
  void truncate(cache& c, index_t slot, index_t length) const {
    detail::check_cut("reversible_language_model", least_length(c, slot), slot, length);
    positions.truncate(c.positions, slot, length);
    blocks.truncate(c.blocks, slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    positions.permute(c.positions, order);
    blocks.permute(c.blocks, order);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return cost_of(words, length) + cost_of(positions, length) + cost_of(blocks, length) + cost_of(head, length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("words", s.words...);
    f("positions", s.positions...);
    f("blocks", s.blocks...);
    f("head", s.head...);
  }

 private:
  static constexpr const char* who = "reversible_language_model";
  static std::pair<matrix_view<S>, matrix_view<S>> streams(matrix_view<S> xy) {
    return {xy.slice_cols(0, xy.cols() / 2), xy.slice_cols(xy.cols() / 2, xy.cols() / 2)};
  }
  void embed_next(input_type ids, matrix_view<S> xy, cache& c, const context& ctx) const {
    const auto [e, with_positions] = streams(xy);
    words.forward(ids, e, ctx);
    positions.decode(e, with_positions, c.positions, ctx);
    copy<S>(with_positions, e, ctx);
  }
};

}  // namespace lithe::inline LITHE_ABI
