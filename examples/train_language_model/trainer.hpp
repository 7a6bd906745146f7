#pragma once

// A language model in training: its batches, steps, evaluation and files.

#include <numbers>

#include "../support/steps.hpp"
#include "../support/terminal.hpp"
#include "language_model.hpp"

using support::now;

/// How a model is trained.
struct training_config {
  index_t steps = 1600, batch = 8, warmup = 100;
  double rate = 3e-3, value_rate = 1e-2, weight_decay = 0.01, clip = 1;
  double value_times = 0;  ///< what value_rate is multiplied with at first, falling to 1; 0: 4 for ultramem, as its paper has it, else 1
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(training_config, steps, batch, warmup, rate, value_rate, weight_decay,
                                                clip, value_times)

/// A stretch of text for training and the last 5 % for evaluation.
struct corpus {
  std::vector<token_t> text;
  index_t held_out;

  corpus(const std::string& path, index_t context) : corpus(read_text(path), context, path) {}
  corpus(std::vector<token_t> all, index_t context, const std::string& name) : text(std::move(all)), held_out(static_cast<index_t>(text.size()) * 95 / 100) {
    const index_t need = 20 * (context + 1);  // so that the last 5 % hold one context and its next byte
    lithe::require<lithe::io_error>(static_cast<index_t>(text.size()) >= need, name, ": expected at least ", need, " bytes of text for a context of ", context,
                                    ", found ", text.size());
  }
};

/// One model in training. Everything it does is a function of its configuration and the step, so a resumed run repeats an uninterrupted one.
struct trainer {
  std::string name;
  model_config config;
  language_model model;
  lithe::optimiser<real> adam;
  lithe::gradient_of<language_model> gradient;
  language_model::record record;
  matrix<real> logits;
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets;
  std::int64_t step = 0;
  double loss = 0, seconds = 0;
  index_t tokens = 0;
  support::step_guard guard{name};

  trainer(std::string name_, const model_config& c, const training_config& r)
      : name(std::move(name_)), config(c), model(make_model(c)), adam(optimiser_settings(model, r)), gradient(lithe::make_gradient(model)) {
    adam.prepare(model, gradient);
  }

  static lithe::optimiser_config optimiser_settings(const language_model& model, const training_config& r) {
    lithe::optimiser_config o{.weight_decay = r.weight_decay};
    bool tables = false;
    lithe::for_each_tensor([&](const std::string& tensor, lithe::role, const auto&) { tables = tables || tensor.ends_with(".values"); }, model);
    if (tables) o.groups.push_back({.pattern = "*.values", .rate = r.value_rate / r.rate});
    o.groups.push_back({.pattern = "*bias", .weight_decay = 0});
    return o;
  }

  /// The input tokens of one batch and what to predict: the next byte, or the bytes behind the masks.
  void draw(const corpus& data, index_t batch) {
    const index_t T = config.context;
    const lithe::rng_key key = lithe::rng_key{config.seed}.child(7).child(static_cast<std::uint64_t>(step));
    inputs.resize(static_cast<std::size_t>(batch * T));
    targets.resize(inputs.size());
    offsets.resize(static_cast<std::size_t>(batch) + 1);
    for (index_t b = 0; b < batch; ++b) {
      const auto at = static_cast<index_t>(lithe::uniform(key, static_cast<std::uint64_t>(b)) * static_cast<double>(data.held_out - T));
      offsets[static_cast<std::size_t>(b) + 1] = (b + 1) * T;
      fill(data, at, static_cast<std::size_t>(b * T), key.child(1));
    }
  }
  /// One sequence of them. Of a masked one at least one byte is behind a mask: without any it would teach and show nothing.
  void fill(const corpus& data, index_t at, std::size_t to, lithe::rng_key key) {
    bool any = config.objective == "causal";
    for (std::size_t t = 0; t < static_cast<std::size_t>(config.context); ++t) {
      const token_t byte = data.text[static_cast<std::size_t>(at) + t];
      inputs[to + t] = byte;
      targets[to + t] = config.objective == "causal" ? data.text[static_cast<std::size_t>(at) + t + 1] : lithe::uniform(key, to + t) < 0.15 ? byte : -100;
      if (config.objective != "causal" && targets[to + t] >= 0) {
        inputs[to + t] = mask_token;
        any = true;
      }
    }
    if (any) return;
    const auto t = to + static_cast<std::size_t>(lithe::uniform(key.child(2), to) * static_cast<double>(config.context));
    targets[t] = std::exchange(inputs[t], mask_token);
  }

  void train_step(const corpus& data, const training_config& r, lithe::context ctx) {
    const double begin = now();
    draw(data, r.batch);
    ctx.train = true;
    ctx.rows = {offsets};
    ctx.key = lithe::rng_key{config.seed}.child(8).child(static_cast<std::uint64_t>(step));
    logits.resize(static_cast<index_t>(inputs.size()), byte_values);
    lithe::set_zero(model, gradient);
    model.forward(inputs, logits, record, ctx);
    loss = lithe::cross_entropy<real>(logits, targets, {}, logits, ctx).loss;
    model.backward(inputs, record, logits, lithe::nothing{}, gradient, ctx);
    const double norm = lithe::clip_by_global_norm(model, gradient, r.clip, ctx);
    const lithe::learning_rate_schedule schedule{.learning_rate = r.rate, .warmup_steps = std::min(r.warmup, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.05};
    const double times = r.value_times > 0 ? r.value_times : config.feed_forward == "ultramem" ? 4 : 1;
    for (lithe::parameter_group& g : adam.config.groups)
      if (g.pattern == "*.values") g.rate = r.value_rate / r.rate * lithe::value_rate_schedule{.times = times, .total_steps = r.steps}(step);
    if (guard.accepts(loss, norm)) adam.step(model, gradient, schedule(step), ctx);
    ++step;
    seconds += now() - begin;
    tokens += static_cast<index_t>(inputs.size());
  }

  struct result {
    double bits_per_byte = 0, tokens_per_second = 0;
  };
  /// Over the held-out text, in pieces of one context; the meter gets what the memory layers read.
  result evaluate(const corpus& data, const lithe::context& base, lithe::usage_meter* meter) {
    const index_t T = config.context, last = static_cast<index_t>(data.text.size()) - 1;
    double sum = 0, seconds_here = 0;
    index_t counted = 0, seen = 0;
    inputs.resize(static_cast<std::size_t>(T));
    targets.resize(inputs.size());
    matrix<real> out(T, byte_values);
    for (index_t at = data.held_out; at + T <= last; at += T) {
      fill(data, at, 0, lithe::rng_key{1}.child(static_cast<std::uint64_t>(at)));
      const double begin = now();
      model.forward(inputs, out, base);
      seconds_here += now() - begin;
      seen += T;
      const auto l = lithe::cross_entropy<real>(out, targets, {.reduce = lithe::reduction::sum}, lithe::matrix_view<real>(), base);
      sum += l.loss;
      counted += l.counted;
      if (meter == nullptr) continue;
      model.forward(inputs, out, record, base);
      for_each_memory(model, record, [&](const auto& memory, const auto& r) {
        matrix<lithe::slot_t> slots(T, memory.keys.picks());
        matrix<real> weights(T, memory.keys.picks());
        memory.picked(r, slots, weights, base);
        meter->add<real>(slots, weights, memory.config.heads);
      });
    }
    return {sum / static_cast<double>(counted) / std::numbers::ln2, static_cast<double>(seen) / seconds_here};
  }

  /// `training`: what a run that is resumed goes on with, an object of JSON.
  void save(const std::string& path, const nlohmann::json& training) {
    lithe::state_writer file;
    file.metadata["program"] = "train_language_model";
    file.metadata["config"] = config_text(config);
    file.metadata["training"] = training.dump();
    file.add_model(model);
    file.add_training("optimizer", adam);
    file.add_training("step", step);
    file.write(path);
  }
  void resume(const std::string& path) {
    lithe::state_reader file(path);
    file.add_model(model);
    file.add_training("optimizer", adam);
    file.add_training("step", step);
    file.load();
  }
};
