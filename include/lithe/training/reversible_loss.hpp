#pragma once

#include "lithe/compose/reversible_language_model.hpp"
#include "lithe/training/losses.hpp"

// T tokens, D features of one stream, V vocabulary
namespace lithe::inline LITHE_ABI {

/// The loss of a reversible language model and its gradient, g added to, in the memory that a million tokens leave: the two streams and
/// their gradients (4 T D numbers), what one part of one block needs, and the blocks' choices. Logits exist for `chunk` rows at a
/// time, and the streams are turned back into the embeddings on the way. Equal to forward, `cross_entropy` and backward.
///
/// Streams and scratch come from the workspace, which keeps them; a context without one gives them back after each use. The record of the part that
/// is being turned back is made anew for each part.
/// Throws what the model and `chunked_cross_entropy` throw.
template <class Block>
loss_result reversible_loss(const reversible_language_model<Block>& model, std::span<const token_t> ids, std::span<const token_t> targets,
                            const cross_entropy_options& o, gradient_of<reversible_language_model<Block>>& g, const context& ctx = {},
                            index_t chunk = 1024) {
  using model_type = reversible_language_model<Block>;
  using S = typename model_type::scalar;
  const index_t T = static_cast<index_t>(ids.size()), width = 2 * model.features();
  const context inner = ctx.child(model_type::block_child);
  record_of<reversible_stack<Block>> record;
  const scratch<S> xy(ctx, T, width), dxy(ctx, T, width);
  model.embed(ids, xy, ctx);
  model.blocks.forward_in_place(xy, &record, inner);
  const loss_result loss = chunked_cross_entropy(model.head, xy, targets, o, dxy, g.head, ctx.child(model_type::head_child), chunk);
  model.blocks.reverse(xy, dxy, record, g.blocks, inner);
  model.embed_backward(ids, dxy, g, ctx);
  return loss;
}

}  // namespace lithe::inline LITHE_ABI
