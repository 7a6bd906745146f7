#pragma once

#include "lithe/compose/adaptive_depth_decode.hpp"

// R rows, D features, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// An embedding and a stack with exits as one model to generate with, and when its tokens leave:
///
///     generate(exit_decoder(words, stack, memory, rule), prompts, {.most = 100}, key, ctx)
///
/// It borrows embedding, stack and memory. `embed` is the layer that turns tokens into rows (learned positions go on by themselves); of a memory each
/// prompt reads one sequence. Prompts go through all blocks, behind them every row leaves by the rule (`adaptive_step`, which says what is thrown).
/// The constructor throws config_error for a rule that asks a head which the model does not have.
template <class Embed, class Block, class Norm>
class exit_decoder {
 public:
  using scalar = typename Block::scalar;
  using S = scalar;
  /// What the blocks read beside the tokens: a `memory_view`, or `nothing`.
  using memory_type = detail::memory_of<Block>;
  struct cache {
    cache_of<Embed> tokens;
    adaptive_cache<Block> states;
    std::vector<std::int32_t> exits;  ///< of the rows of the last step
  };

  /// Embedding and model must outlive the decoder, and so must the rows of the memory.
  exit_decoder(const Embed& embed, const adaptive_depth<Block, Norm>& model, memory_type memory = {}, exit_rule rule = {})
      : embed_(&embed), model_(&model), memory_(memory), rule_(std::move(rule)) {
    detail::check_rule(model, rule_);
  }

  [[nodiscard]] index_t exits() const { return model_->exits(); }
  /// Whether every row goes through all blocks.
  [[nodiscard]] bool full_depth() const { return rule_.kind == exit_confidence::fixed && rule_.exits.empty(); }
  [[nodiscard]] index_t features() const { return model_->features(); }  ///< D, the width of the states
  [[nodiscard]] shape output_shape(std::span<const token_t> ids) const { return {static_cast<index_t>(ids.size()), model_->answers.classes()}; }

  /// The longest text that embedding and blocks take.
  [[nodiscard]] index_t longest_sequence() const {
    return std::min(lithe::longest_sequence(*embed_), lithe::longest_sequence(*model_));
  }

  [[nodiscard]] cache make_cache(index_t slots, index_t capacity) const {
    return {lithe::make_cache(*embed_, slots, capacity), make_adaptive_cache(*model_, slots, capacity),
            std::vector<std::int32_t>(static_cast<std::size_t>(slots))};
  }
  /// Gives each of `prompts` prompts, whose slots stand side by side, its sequence of the memory. Throws shape_error for another number of sequences.
  void start(index_t prompts, cache& c) const {
    if constexpr (detail::reads_memory<Block>) {
      require<shape_error>(memory_.rows.count() == prompts, "exit_decoder: expected a sequence of the memory for each of ", prompts, " prompts, got ",
                           memory_.rows.count());
      std::vector<index_t> source(c.exits.size());
      for (std::size_t s = 0; s < source.size(); ++s) source[s] = static_cast<index_t>(s) / (c.states.slots() / prompts);
      start_memory(*model_, memory_, source, c.states);
    }
  }
  /// One new token for each slot of ctx.slots: logits [R x V], and c.exits.
  void decode(std::span<const token_t> ids, matrix_view<S> logits, cache& c, const context& ctx) const {
    require<shape_error>(ids.size() <= c.exits.size(), "exit_decoder: expected a token for each of at most ", c.exits.size(),
                         " slots, got ", ids.size());
    const scratch<S> x(ctx, logits.rows(), features());
    whole(c, ctx, [&] {
      lithe::decode(*embed_, ids, x.view(), c.tokens, ctx);
      adaptive_step<Block, Norm>(*model_, x, memory_, logits, std::span(c.exits).first(ids.size()), c.states, rule_, ctx);
    });
  }
  void fill(std::span<const token_t> ids, cache& c, const context& ctx) const {
    const scratch<S> x(ctx, static_cast<index_t>(ids.size()), features());
    whole(c, ctx, [&] {
      lithe::decode(*embed_, ids, x.view(), c.tokens, ctx);
      prefill(*model_, matrix_view<const S>(x), memory_, c.states, ctx);
    });
  }
  void truncate(cache& c, index_t slot, index_t length) const {
    c.states.check_slot("exit_decoder", slot);
    detail::check_cut("exit_decoder", lithe::least_length(*embed_, c.tokens, slot), slot, length);
    lithe::truncate(*model_, c.states, slot, length);
    lithe::truncate(*embed_, c.tokens, slot, length);
  }
  void permute(cache& c, std::span<const index_t> order) const {
    lithe::permute(*embed_, c.tokens, order);
    lithe::permute(*model_, c.states, order);
  }

  /// Drafting: one new token for each slot goes through blocks 1 .. exit; its states [R x D].
  void draft(index_t exit, std::span<const token_t> ids, matrix_view<S> states, cache& c, const context& ctx) const {
    const scratch<S> x(ctx, states.rows(), features());
    whole(c, ctx, [&] {
      lithe::decode(*embed_, ids, x.view(), c.tokens, ctx);
      decode_blocks<Block, Norm>(*model_, 1, exit, x, memory_, states, c.states, ctx);
    });
  }
  /// What an exit answers to states [R x D]: logits [R x V].
  void answer(index_t exit, matrix_view<const S> states, matrix_view<S> logits, const context& ctx) const {
    model_->answers.answer(exit, states, logits, ctx);
  }
  /// Drafted states go through the blocks above `exit`: the full model's logits, and the slots are as long as if it had decoded the tokens.
  void verify(index_t exit, matrix_view<const S> states, matrix_view<S> logits, cache& c, const context& ctx) const {
    const scratch<S> top(ctx, states.rows(), features());
    whole(c, ctx, [&] { decode_blocks<Block, Norm>(*model_, exit + 1, exits(), states, memory_, top, c.states, ctx); });
    answer(exits(), top, logits, ctx);
    advance<Block>(top, c.states, ctx);
  }

 private:
  /// If f throws, embedding and stack both forget what is not in all blocks, drafts too.
  template <class F>
  void whole(cache& c, const context& ctx, F&& f) const {
    try {
      f();
    } catch (...) {
      for (index_t i = 0; i < ctx.rows.count(); ++i)
        if (const index_t s = ctx.slot(i); s >= 0 && s < c.states.slots()) truncate(c, s, c.states.length[static_cast<std::size_t>(s)]);
      throw;
    }
  }

  const Embed* embed_;
  const adaptive_depth<Block, Norm>* model_;
  memory_type memory_;
  exit_rule rule_;
};

}  // namespace lithe::inline LITHE_ABI
