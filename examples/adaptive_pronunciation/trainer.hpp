#pragma once

// Training of a pronouncer, by step and by epoch.

#include "../support/signals.hpp"
#include "../support/steps.hpp"
#include "../support/terminal.hpp"
#include "pronouncer.hpp"

using support::now;

/// Words as ragged rows: spellings for the encoder, "<" and the phones for the decoder, the phones and ">" as its targets.
struct word_batch {
  std::vector<token_t> spelling, inputs, targets;
  std::vector<index_t> spelling_offsets{0}, phone_offsets{0};

  void add(const entry& e) {
    spelling.insert(spelling.end(), e.spelling.begin(), e.spelling.end());
    inputs.push_back(start_phone);
    inputs.insert(inputs.end(), e.phones.begin(), e.phones.end());
    targets.insert(targets.end(), e.phones.begin(), e.phones.end());
    targets.push_back(end_phone);
    spelling_offsets.push_back(static_cast<index_t>(spelling.size()));
    phone_offsets.push_back(static_cast<index_t>(inputs.size()));
  }
};

struct training_config {
  std::string mode = "aligned";  ///< aligned, mixed, top (only the last exit is trained: a model of fixed depth), or meta (the learned confidence)
  index_t passes = 2;            ///< of mixed training
  index_t batch = 64;            ///< words
  double rate = 2e-3;
  lithe::exit_training_config exits{};  ///< weights, oracle, α
};

/// A pronouncer in training.
struct trainer {
  pronouncer model;
  training_config config;
  lithe::optimiser<real> adam{lithe::optimiser_config{.beta2 = 0.98, .weight_decay = 0.01}};
  lithe::gradient_of<pronouncer> gradient;
  pronouncer::record record;
  index_t step = 0, steps = 1;
  double loss = 0;
  support::step_guard guard;

  trainer(pronouncer m, training_config c, index_t all_steps)
      : model(std::move(m)), config(std::move(c)), gradient(lithe::make_gradient(model)), steps(all_steps) {
    config.exits.reduce = lithe::reduction::mean;
    if (config.mode == "top") {
      config.exits.weights.assign(static_cast<std::size_t>(model.decoder.exits()), 0.0);
      config.exits.weights.back() = 1;
    }
  }

  void train(const word_batch& words, std::uint64_t seed, const lithe::context& base) {
    using namespace lithe;
    const auto T = static_cast<index_t>(words.inputs.size()), X = static_cast<index_t>(words.spelling.size()), D = model.decoder.features();
    context enc = base, dec = base;
    enc.train = dec.train = config.mode != "meta";
    enc.rows = {words.spelling_offsets};
    dec.rows = {words.phone_offsets};
    enc.key = rng_key{seed}.child(2 * static_cast<std::uint64_t>(step));
    dec.key = rng_key{seed}.child(2 * static_cast<std::uint64_t>(step) + 1);
    const scratch<real> memory(base, X, D), dmemory(base, X, D), x(base, T, D), dx(base, T, D);
    dmemory.map().setZero();
    set_zero(model, gradient);
    model.encoder.forward(words.spelling, memory, record.encoder, enc);
    model.phones.forward(words.inputs, x, dec);
    const memory_view<real> m{memory, enc.rows};
    const learning_rate_schedule schedule{
        .learning_rate = config.rate, .warmup_steps = std::min<index_t>(200, steps), .total_steps = steps, .final_ratio = 0.02};
    if (config.mode == "meta") {
      loss = meta_exit_step(model.decoder, matrix_view<const real>(x), m, reduction::mean, record.decoder, gradient.decoder, dec).loss;
      if (guard.accepts(loss, global_norm(model.decoder.meta, gradient.decoder.meta, base)))
        adam.step(model.decoder.meta, gradient.decoder.meta, schedule(step), base);
      ++step;
      return;
    }
    if (config.mode == "mixed") {
      loss = mixed_exit_step(model.decoder, matrix_view<const real>(x), m, words.targets, config.passes, reduction::mean, -100, record.decoder,
                             dx.view(), dmemory.view(), gradient.decoder, dec)
                 .total;
    } else {
      loss = aligned_exit_step(model.decoder, matrix_view<const real>(x), m, words.targets, config.exits, step, record.decoder, dx.view(),
                               dmemory.view(), gradient.decoder, dec)
                 .total;
      const bool labelled = !record.decoder.exits.empty();
      if (labelled && config.exits.targets.granularity == exit_granularity::sequence) train_whole(m, dmemory.view(), enc);
    }
    model.phones.backward(words.inputs, {}, dx, {}, gradient.phones, dec);
    model.encoder.backward(words.spelling, record.encoder, dmemory, {}, gradient.encoder, enc);
    const double norm = clip_by_global_norm(model, gradient, 1.0, base);
    if (guard.accepts(loss, norm)) adam.step(model, gradient, schedule(step), base);
    ++step;
  }

 private:
  /// The sequence-level exit loss, which reads the encoder's output.
  void train_whole(lithe::memory_view<real> m, matrix_view<real> dmemory, const lithe::context& ctx) {
    const auto B = m.rows.count(), N = model.decoder.exits();
    const lithe::scratch<real> log_q(ctx, B, N), d(ctx, B, N), dm(ctx, m.x.rows(), m.x.cols());
    model.whole.forward(m.x, log_q, record.whole, ctx);
    loss += lithe::exit_loss<real>(log_q, record.decoder.exits, config.exits.alpha, lithe::reduction::mean, d).loss;
    model.whole.backward(m.x, record.whole, d, dm, gradient.whole, ctx);
    if (!config.exits.detach) lithe::add<real>(dm, dmemory, ctx);
  }
};

/// How a pronouncer is trained: the trunk first, then the choice of exits too.
struct training_plan {
  std::string mode = "aligned", oracle = "correctness";
  index_t epochs = 16, exit_epochs = 2, batch = 64, limit = 0;
  double rate = 2e-3, penalty = 0.1, sigma = 0, alpha = 0.2;
  bool detach = false;
};

/// Epochs over the dictionary in an order of the seed's; fewer where a signal asks for it.
inline void train(trainer& t, const dictionary& d, index_t epochs, std::uint64_t seed, const training_plan& r, const lithe::context& ctx,
                  const char* what) {
  const auto words = r.limit > 0 ? std::min(d.train.size(), static_cast<std::size_t>(r.limit)) : d.train.size();
  std::vector<std::size_t> order(words);
  support::progress line(std::string(what) + ": step", t.steps);
  for (index_t epoch = 0; epoch < epochs && !support::stop_asked(); ++epoch) {
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto key = lithe::rng_key{seed}.child(static_cast<std::uint64_t>(1000 + epoch));
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return lithe::philox(key, a) < lithe::philox(key, b); });
    double sum = 0, count = 0;
    for (std::size_t first = 0; first < words && !support::stop_asked(); first += static_cast<std::size_t>(t.config.batch)) {
      word_batch b;
      for (std::size_t i = first; i < std::min(words, first + static_cast<std::size_t>(t.config.batch)); ++i) b.add(d.train[order[i]]);
      t.train(b, seed, ctx);
      if (std::isfinite(t.loss)) sum += t.loss, ++count;
      line.show(t.step, {support::format("epoch %td/%td", epoch + 1, epochs), support::format("loss %.3f", sum / count), t.guard.report()});
    }
  }
  line.end();
  t.guard.check();
}

inline index_t steps_of(const dictionary& d, index_t epochs, const training_plan& r) {
  const auto words = r.limit > 0 ? std::min(static_cast<index_t>(d.train.size()), r.limit) : static_cast<index_t>(d.train.size());
  return epochs * ((words + r.batch - 1) / r.batch);
}

inline lithe::exit_target_config oracle(const training_plan& r, const std::string& distribution) {
  return {.oracle = r.oracle == "likelihood" ? lithe::exit_oracle::likelihood : lithe::exit_oracle::correctness,
          .granularity = distribution == "sequence" ? lithe::exit_granularity::sequence : lithe::exit_granularity::token,
          .penalty = r.penalty,
          .sigma = r.sigma};
}

/// After the trunk, the choice of exits: the exit loss beside the decoder's (arXiv 1910.10073, section 5), or the learned confidence alone.
inline pronouncer train_with_exits(pronouncer model, const dictionary& d, const model_config& c, const training_plan& r, const lithe::context& ctx) {
  if (r.exit_epochs == 0 || support::stop_asked()) return model;
  const bool meta = c.distribution == "meta";
  training_config t{.mode = meta ? "meta" : "aligned", .batch = r.batch, .rate = meta ? r.rate : r.rate / 4};
  t.exits.alpha = r.alpha;
  t.exits.detach = r.detach;
  t.exits.targets = oracle(r, c.distribution);
  trainer with_exits(std::move(model), t, steps_of(d, r.exit_epochs, r));
  const std::string what = meta ? "learned confidence" : lithe::concat(c.distribution, " exits, ", r.oracle);
  train(with_exits, d, r.exit_epochs, c.seed + 77, r, ctx, what.c_str());
  return std::move(with_exits.model);
}
inline pronouncer train_trunk(const dictionary& d, const model_config& c, const training_plan& r, const std::string& mode,
                              const lithe::context& ctx) {
  trainer trunk(make_pronouncer(c), {.mode = mode, .batch = r.batch, .rate = r.rate}, steps_of(d, r.epochs, r));
  train(trunk, d, r.epochs, c.seed, r, ctx, lithe::concat(mode, ", ", c.decoder_blocks, " blocks, seed ", c.seed).c_str());
  return std::move(trunk.model);
}
