#pragma once

#include "lithe/compose/adaptive_depth_exits.hpp"
#include "lithe/compose/adaptive_depth_stack.hpp"
#include "lithe/layers/halting.hpp"

// T tokens, D features, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// A stack that can answer at every depth (arXiv 1910.10073): its blocks, the classifiers behind them, and what predicts exits: a halting
/// distribution and a meta confidence (arXiv 2207.07061, section 3.3), if they are wanted. As a layer it maps x [T x D] to the logits [N T x V] of
/// all exits, one below the other; training with exits is `aligned_exit_step` and `mixed_exit_step`, of the meta confidence `meta_exit_step`, decoding
/// `adaptive_step`.
///
/// Throws as its parts do.
template <class Block, class Norm = layer_norm<typename Block::scalar>>
struct adaptive_depth {
  using scalar = typename Block::scalar;
  using S = scalar;
  /// The kind of block that the stack is made of.
  using block_type = Block;
  using memory = detail::memory_of<Block>;
  using memory_gradient = detail::memory_gradient_of<Block>;
  static constexpr bool reads_memory = detail::reads_memory<Block>;
  static constexpr bool looks_across = true;
  struct record {
    record_of<adaptive_stack<Block>> stack;
    record_of<exit_classifiers<S, Norm>> answers;
    record_of<halting<S>> halt;
    matrix<S> states;  // h¹ .. h^N, one below the other
  };
  struct gradient {
    gradient_of<adaptive_stack<Block>> stack;
    gradient_of<exit_classifiers<S, Norm>> answers;
    gradient_of<halting<S>> halt;
    gradient_of<halting_head<S>> meta;
  };

  adaptive_stack<Block> stack;
  exit_classifiers<S, Norm> answers;
  halting<S> halt;       ///< without heads unless the model predicts its exits
  halting_head<S> meta;  ///< empty unless wanted

  [[nodiscard]] index_t exits() const { return stack.exits(); }
  [[nodiscard]] index_t features() const { return answers.classifiers.front().weight.cols(); }  ///< D, the width of the states

  /// Throws config_error unless classifiers and halting distribution have as many exits as the stack.
  void check() const {
    require<config_error>(answers.exits == exits() && (halt.heads.empty() || halt.exits == exits()),
                          "adaptive_depth: expected classifiers and a halting distribution of ", exits(), " exits, got ", answers.exits, " and ",
                          halt.exits);
  }
  shape output_shape(matrix_view<const S> x) const {
    check();
    return {stack.output_shape(x).rows, answers.classes()};
  }
  void forward(matrix_view<const S> x, const memory& m, matrix_view<S> logits, const context& ctx) const {
    detail::check_rows("adaptive_depth", "logits", *this, x, logits, ctx);
    const scratch<S> states(ctx, output_shape(x).rows, x.cols());
    stack.forward(x, m, states, ctx);
    answers.forward(states, logits, ctx);
  }
  void forward(matrix_view<const S> x, const memory& m, matrix_view<S> logits, record& r, const context& ctx) const {
    detail::check_rows("adaptive_depth", "logits", *this, x, logits, ctx);
    r.states.resize(output_shape(x).rows, x.cols());
    stack.forward(x, m, r.states, r.stack, ctx);
    answers.forward(r.states, logits, r.answers, ctx);
  }
  void backward(matrix_view<const S> x, const memory& m, const record& r, matrix_view<const S> dlogits, matrix_view<S> dx, const memory_gradient& dm,
                gradient& g, const context& ctx) const {
    detail::check_rows("adaptive_depth", "dlogits", *this, x, dlogits, ctx);
    detail::check_like("adaptive_depth", "dx", dx, x);
    check_gradient("adaptive_depth", *this, g);
    recorded("adaptive_depth", r.states, output_shape(x).rows, x.cols());
    const scratch<S> dstates(ctx, r.states.rows(), r.states.cols());
    answers.backward(r.states, r.answers, dlogits, dstates, g.answers, ctx);
    stack.backward(x, m, r.stack, dstates, dx, dm, g.stack, ctx);
  }

  // The layer concept, for blocks without a memory.
  void forward(matrix_view<const S> x, matrix_view<S> logits, const context& ctx) const requires(!reads_memory) {
    forward(x, nothing{}, logits, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> logits, record& r, const context& ctx) const requires(!reads_memory) {
    forward(x, nothing{}, logits, r, ctx);
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dlogits, matrix_view<S> dx, gradient& g, const context& ctx) const
      requires(!reads_memory) {
    backward(x, nothing{}, r, dlogits, dx, nothing{}, g, ctx);
  }

  [[nodiscard]] cost forward_cost(index_t length) const {
    return stack.forward_cost(length) + answers.forward_cost(length) + halt.forward_cost(length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("blocks", s.stack...);
    f("", s.answers...);
    f("exit", s.halt...);
    f("meta", s.meta...);
  }
};

}  // namespace lithe::inline LITHE_ABI
