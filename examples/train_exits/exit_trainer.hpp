#pragma once

// Trains a language model with exits on stretches of a text.

#include "../support/signals.hpp"
#include "../support/steps.hpp"
#include "exit_model.hpp"

/// How such a model is trained.
struct exit_run {
  index_t steps = 1000, batch = 16;
  double rate = 2e-3;
  lithe::exit_training_config exits{};
};

/// Stretches of text one below the other, and the byte behind each.
struct stretches {
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets{0};

  void add(std::span<const token_t> text, index_t at, index_t length) {
    const auto from = text.begin() + at;
    inputs.insert(inputs.end(), from, from + length);
    targets.insert(targets.end(), from + 1, from + length + 1);
    offsets.push_back(static_cast<index_t>(inputs.size()));
  }
};

/// tell(steps so far, losses) after each step, which the guard has judged. Ends early where a signal asks for it.
template <class Tell>
void train(exit_language_model& model, const model_config& c, const exit_run& r, std::span<const token_t> text,
           lithe::context ctx, support::step_guard& guard, Tell&& tell) {
  const lithe::learning_rate_schedule schedule{
      .learning_rate = r.rate, .warmup_steps = std::min<index_t>(100, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.05};
  lithe::optimiser<real> adam({.weight_decay = 0.01, .groups = {{.pattern = "*bias", .weight_decay = 0}}});
  auto gradient = lithe::make_gradient(model);
  exit_language_model::record record;
  ctx.train = true;
  for (index_t step = 0; step < r.steps && !support::stop_asked(); ++step) {
    const lithe::rng_key key = lithe::rng_key{c.seed}.child(7).child(static_cast<std::uint64_t>(step));
    stretches b;
    for (index_t i = 0; i < r.batch; ++i)
      b.add(text, static_cast<index_t>(lithe::uniform(key, static_cast<std::uint64_t>(i)) * static_cast<double>(std::ssize(text) - c.context)),
            c.context);
    ctx.rows = {b.offsets};
    ctx.key = key.child(1);
    const lithe::scratch<real> x(ctx, std::ssize(b.inputs), c.features), dx(ctx, std::ssize(b.inputs), c.features);
    lithe::set_zero(model, gradient);
    model.words.forward(b.inputs, x, ctx);
    const auto loss = lithe::aligned_exit_step(model.stack, lithe::matrix_view<const real>(x), {}, b.targets, r.exits, step, record.stack, dx.view(),
                                               {}, gradient.stack, ctx);
    model.words.backward(b.inputs, {}, dx, {}, gradient.words, ctx);
    const double norm = lithe::clip_by_global_norm(model, gradient, 1.0, ctx);
    if (guard.accepts(loss.total, norm)) adam.step(model, gradient, schedule(step), ctx);
    tell(step + 1, loss);
  }
  guard.check();
}
template <class Tell>
void train(exit_language_model& model, const model_config& c, const exit_run& r, std::span<const token_t> text,
           const lithe::context& ctx, Tell&& tell) {
  support::step_guard guard;
  train(model, c, r, text, ctx, guard, tell);
}
