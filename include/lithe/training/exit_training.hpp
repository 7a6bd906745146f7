#pragma once

#include "lithe/compose/adaptive_depth.hpp"
#include "lithe/training/exit_losses.hpp"
#include "lithe/training/exit_targets.hpp"

// T tokens, D features, N exits, V classes, M passes
namespace lithe::inline LITHE_ABI {

struct exit_training_config {
  std::vector<double> weights{};  ///< of the exits in aligned training; none: 1 for each
  double alpha = 0;               ///< weight of the exit loss; 0: none
  index_t start_step = 0;         ///< the exit loss begins with this step
  bool detach = false;            ///< the exit loss trains the halting head, not the trunk
  exit_target_config targets{};   ///< the oracle of the exit loss; its ignore_index is that of all losses
  reduction reduce = reduction::sum;
};

/// What a step of training keeps; keeps its memory from step to step.
template <class Model>
struct exit_training_record {
  using S = typename Model::scalar;
  record_of<Model> model;
  matrix<S> logits, log_q;  // [N T x V], [T x N]
  exit_evidence evidence;
  std::vector<std::int32_t> exits;  // the oracle's, of each token (0: none) or sequence, if there is an exit loss; or the exits of a pass
  record_of<halting_head<S>> meta;
};

/// What one training pass over several exits lost.
struct exit_training_losses {
  double decoder = 0, exit = 0;  ///< L_dec, and L_exit without its weight
  index_t counted = 0;           ///< targets
  double total = 0;              ///< L_dec + α L_exit
};

/// Aligned training with the exit loss (arXiv 1910.10073, equations 2 and 8): L = L_dec + α L_exit, forward and backward. L_dec is
/// `aligned_exit_loss` on the answers of all exits; L_exit from `start_step` on the cross entropy between the oracle's exits (or, given, `exits` [T]
/// with 0 for none) and the model's halting distribution. With an oracle for whole sequences the record's `exits` [B] are its choices, and the loss
/// of the `sequence_halting` that predicts them is the caller's. Where there is no exit loss (before `start_step`, without an α, with one exit alone)
/// the record's `exits` are empty. x [T x D]; dx is overwritten, dm and g are added to; the record holds the logits' gradient afterwards.
///
/// Throws config_error when there is an α but no halting head, and what its parts throw.
template <class Model>
exit_training_losses aligned_exit_step(const Model& model, matrix_view<const typename Model::scalar> x, const typename Model::memory& m,
                                       std::span<const token_t> targets, const exit_training_config& config, index_t step,
                                       exit_training_record<Model>& r, matrix_view<typename Model::scalar> dx,
                                       const typename Model::memory_gradient& dm, gradient_of<Model>& g, const context& ctx,
                                       std::span<const std::int32_t> exits = {}) {
  using S = typename Model::scalar;
  const index_t T = x.rows(), N = model.exits();
  require<config_error>(config.alpha >= 0 && std::isfinite(config.alpha), "aligned_exit_step: expected a weight alpha of at least 0, got ",
                        config.alpha);
  require<config_error>(config.weights.empty() || static_cast<index_t>(config.weights.size()) == N,
                        "aligned_exit_step: expected a weight for each of ", N, " exits, got ", config.weights.size());
  const token_t ignored = config.targets.ignore_index;
  const bool by_token = config.targets.granularity == exit_granularity::token;
  const bool labelled = config.alpha > 0 && step >= config.start_step && N > 1, with_exits = labelled && by_token;
  require<config_error>(!with_exits || !model.halt.heads.empty(), "aligned_exit_step: the model has no halting head to train");
  r.logits.resize(model.output_shape(x).rows, model.answers.classes());
  model.forward(x, m, r.logits, r.model, ctx);
  r.exits.clear();
  if (labelled) {
    if (exits.empty()) {
      exit_evidence_from<S>(r.logits, targets, ignored, r.evidence, ctx);
      r.exits.resize(static_cast<std::size_t>(by_token ? T : ctx.rows.count()));
      exit_targets(r.evidence, targets, config.targets, r.exits, {}, ctx);
    } else {
      r.exits.assign(exits.begin(), exits.end());
    }
  }
  const std::vector<double> ones(config.weights.empty() ? static_cast<std::size_t>(N) : 0, 1.0);
  exit_training_losses losses;
  const auto decoder = aligned_exit_loss<S>(r.logits, targets, config.weights.empty() ? ones : config.weights, config.reduce, ignored, r.logits, ctx);
  losses.decoder = losses.total = decoder.loss;
  losses.counted = decoder.counted;
  const scratch<S> dstates(ctx, N * T, x.cols());
  model.answers.backward(r.model.states, r.model.answers, r.logits, dstates, g.answers, ctx);
  if (with_exits) {
    r.log_q.resize(T, N);
    model.halt.forward(r.model.states, r.log_q, r.model.halt, ctx);
    const scratch<S> dlog_q(ctx, T, N), dh(ctx, N * T, x.cols());
    const auto loss = exit_loss<S>(r.log_q, r.exits, config.alpha, config.reduce, dlog_q);
    losses.exit = loss.loss / config.alpha;
    losses.total += loss.loss;
    model.halt.backward(r.model.states, r.model.halt, dlog_q, dh, g.halt, ctx);
    if (!config.detach) add<S>(dh, dstates, ctx);
  }
  model.stack.backward(x, m, r.model.stack, dstates, dx, dm, g.stack, ctx);
  return losses;
}

/// Uniform exits on 1 .. N, one for each token, as mixed training draws them.
inline void draw_exits(index_t exits, rng_key key, std::span<std::int32_t> out) {
  for (std::size_t t = 0; t < out.size(); ++t) out[t] = 1 + static_cast<std::int32_t>(uniform(key, t) * static_cast<double>(exits));
}

/// Mixed training (the same, section 3.2): `passes` forward passes, each with an exit of its own for every token (uniform, drawn from ctx.key, unless
/// `exits` [M T] gives them), states copied upwards; L_dec = -(1/M) Σ_m Σ_t LL. dx, dm and g as above. `observe(pass, states, logits)`, if given,
/// sees h^N [T x D] and the answers [T x V] of each pass. Throws config_error for passes below 1.
template <class Model>
exit_training_losses mixed_exit_step(
    const Model& model, matrix_view<const typename Model::scalar> x, const typename Model::memory& m, std::span<const token_t> targets,
    index_t passes, reduction reduce, token_t ignore_index, exit_training_record<Model>& r, matrix_view<typename Model::scalar> dx,
    const typename Model::memory_gradient& dm, gradient_of<Model>& g, const context& ctx, std::span<const std::int32_t> exits = {},
    function_ref<void(index_t, matrix_view<const typename Model::scalar>, matrix_view<const typename Model::scalar>)> observe = [](index_t, auto,
                                                                                                                                   auto) {}) {
  using S = typename Model::scalar;
  const index_t T = x.rows(), N = model.exits();
  require<config_error>(passes >= 1, "mixed_exit_step: expected at least 1 pass, got ", passes);
  require<shape_error>(exits.empty() || static_cast<index_t>(exits.size()) == passes * T, "mixed_exit_step: expected an exit for each of ", T,
                       " tokens in ", passes, " passes, got ", exits.size());
  r.model.states.resize(model.output_shape(x).rows, x.cols());
  r.logits.resize(T, model.answers.classes());
  r.exits.resize(static_cast<std::size_t>(T));
  const scratch<S> dstates(ctx, N * T, x.cols()), dpass(ctx, T, x.cols());
  const cross_entropy_options o{.ignore_index = ignore_index, .reduce = reduce};
  dx.map().setZero();
  exit_training_losses losses;
  losses.counted = detail::count_targets("mixed_exit_step", targets, T, model.answers.classes(), o);
  const double scale = detail::loss_scale(reduce, losses.counted) / static_cast<double>(passes);
  const scratch<double> rows(ctx, T);
  for (index_t pass = 0; pass < passes; ++pass) {
    const context c = ctx.child(static_cast<std::uint64_t>(pass));
    if (exits.empty())
      draw_exits(N, c.key.child(static_cast<std::uint64_t>(2 * N + 1)), r.exits);
    else
      std::copy_n(exits.begin() + pass * T, T, r.exits.begin());
    model.stack.forward_mixed(x, m, r.exits, r.model.states, r.model.stack, c);
    const auto last = matrix_view<const S>(r.model.states).slice_rows((N - 1) * T, T);
    model.answers.forward_mixed(last, r.exits, r.logits, r.model.answers, c);
    observe(pass, last, r.logits);
    detail::cross_entropy_rows<S>(r.logits, targets, o, scale, r.logits, rows.span(), ctx);
    losses.decoder += scale * detail::ordered_sum(rows.span());
    dstates.map().setZero();
    model.answers.backward(last, r.model.answers, r.logits, dstates.view().slice_rows((N - 1) * T, T), g.answers, c);
    model.stack.backward(x, m, r.model.stack, dstates, dpass, dm, g.stack, c);
    add<S>(dpass, dx, ctx);
  }
  losses.total = losses.decoder;
  return losses;
}

/// Training of the meta confidence (arXiv 2207.07061, section 3.3) once the model is trained, which stays as it is: the loss is 1/(N-1) Σ_{n<N} of the
/// binary cross entropy between σ(meta(hⁿ)) and whether exit n answers as exit N does, summed or averaged over tokens (`meta_exit_loss`). x [T x D];
/// of g only `meta` is added to, so an optimiser is given model.meta and g.meta. With one exit there is nothing to learn and the loss is 0.
///
/// Throws config_error when there is no meta head, and what its parts throw.
template <class Model>
loss_result meta_exit_step(const Model& model, matrix_view<const typename Model::scalar> x, const typename Model::memory& m, reduction reduce,
                           exit_training_record<Model>& r, gradient_of<Model>& g, const context& ctx) {
  using S = typename Model::scalar;
  const index_t T = x.rows(), N = model.exits(), below = (N - 1) * T;
  require<config_error>(N == 1 || model.meta.output.weight.size() != 0, "meta_exit_step: the model has no meta head to train");
  const shape out = model.output_shape(x);
  if (N == 1) return {0, T};
  r.model.states.resize(out.rows, x.cols());
  r.logits.resize(out.rows, out.cols);
  model.stack.forward(x, m, r.model.states, ctx);
  model.answers.forward(r.model.states, r.logits, ctx);
  const auto states = matrix_view<const S>(r.model.states).slice_rows(0, below);
  const regrouped rows(ctx, below, [T](index_t i) { return i % T; });
  const scratch<S> z(ctx, below, 1), dz(ctx, below, 1), consistent(ctx, N - 1, T), dstates(ctx, below, x.cols());
  model.meta.forward(states, z, r.meta, rows.ctx());
  meta_targets<S>(r.logits, N, consistent, ctx);
  const auto loss = meta_exit_loss<S>(matrix_view<const S>(z.data(), N - 1, T), consistent, reduce, matrix_view<S>(dz.data(), N - 1, T));
  model.meta.backward(states, r.meta, dz, dstates, g.meta, rows.ctx());
  return loss;
}

}  // namespace lithe::inline LITHE_ABI
