#pragma once

// A model in training: its steps, how good each exit is, and its files.

#include <numbers>

#include "../support/files.hpp"
#include "../support/steps.hpp"
#include "model.hpp"

inline std::vector<token_t> to_tokens(const std::string& text) {
  std::vector<token_t> out;
  for (const char c : text) out.push_back(static_cast<unsigned char>(c));
  return out;
}

/// Sequences of equal length, one after the other, and the byte behind each byte.
struct batch {
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets{0};

  void add(std::span<const token_t> text, std::size_t at, std::size_t length) {
    const auto from = text.subspan(at, length), next = text.subspan(at + 1, length);
    inputs.insert(inputs.end(), from.begin(), from.end());
    targets.insert(targets.end(), next.begin(), next.end());
    offsets.push_back(static_cast<index_t>(inputs.size()));
  }
};

/// All that it does is a function of the configuration and the step, so a resumed run repeats an uninterrupted one.
template <class Model>
struct trainer {
  using S = typename Model::scalar;
  using decoder_type = std::tuple_element_t<1, decltype(Model::layers)>;

  model_config config;
  Model model;
  lithe::optimiser<S> adam;
  lithe::gradient_of<Model> gradient;
  lithe::exit_training_record<decoder_type> record;
  std::int64_t step = 0;
  support::step_guard guard;

  trainer(const model_config& c, Model m)
      : config(c), model(std::move(m)), adam(optimiser_settings(model)), gradient(lithe::make_gradient(model)) {
    adam.prepare(model, gradient);
  }
  /// Rows of a memory are seldom touched, so they move faster.
  static lithe::optimiser_config optimiser_settings(const Model& model) {
    lithe::optimiser_config o{.weight_decay = 0.01};
    bool tables = false;
    lithe::for_each_tensor([&](const std::string& name, lithe::role, const auto&) { tables = tables || name.ends_with(".values"); }, model);
    if (tables) o.groups.push_back({.pattern = "*.values", .rate = 3});
    o.groups.push_back({.pattern = "*bias", .weight_decay = 0});
    return o;
  }

  [[nodiscard]] const auto& words() const { return std::get<0>(model.layers); }
  [[nodiscard]] const decoder_type& decoder() const { return std::get<1>(model.layers); }

  /// One step on a batch: all exits learn the next byte, the predictor of exits learns where the answer is right already.
  lithe::exit_training_losses train(const batch& b, double rate, lithe::context ctx) {
    ctx.train = true;
    ctx.rows = {b.offsets};
    ctx.key = lithe::rng_key{config.seed}.child(8).child(static_cast<std::uint64_t>(step));
    lithe::set_zero(model, gradient);
    lithe::matrix<S> x(static_cast<index_t>(b.inputs.size()), decoder().features()), dx(x.rows(), x.cols());
    words().forward(b.inputs, x, ctx.child(0));
    const lithe::exit_training_config how{.alpha = decoder().halt.heads.empty() ? 0 : config.exit_loss, .reduce = lithe::reduction::mean};
    const auto losses = lithe::aligned_exit_step(decoder(), x, lithe::nothing{}, b.targets, how, static_cast<index_t>(step), record, dx, lithe::nothing{},
                                                 std::get<1>(gradient.layers), ctx.child(1));
    words().backward(b.inputs, {}, dx, lithe::nothing{}, std::get<0>(gradient.layers), ctx.child(0));
    const double norm = lithe::clip_by_global_norm(model, gradient, 1.0, ctx);
    if (guard.accepts(losses.total, norm)) adam.step(model, gradient, rate, ctx);
    ++step;
    return losses;
  }

  /// The loss of each exit in nats a byte.
  [[nodiscard]] std::vector<double> evaluate(const batch& b, lithe::context ctx) const {
    ctx.rows = {b.offsets};
    const auto T = static_cast<index_t>(b.inputs.size());
    lithe::matrix<S> logits(decoder().exits() * T, byte_values);
    model.forward(b.inputs, logits, ctx);
    std::vector<double> out;
    for (index_t n = 0; n < decoder().exits(); ++n)
      out.push_back(lithe::cross_entropy<S>(lithe::view(logits).slice_rows(n * T, T), b.targets, {}, lithe::matrix_view<S>(), ctx).loss);
    return out;
  }

  /// `training`: what a run that is resumed goes on with, an object of JSON.
  void save(const std::string& path, const nlohmann::json& training = nlohmann::json::object()) {
    lithe::state_writer file;
    file.metadata["program"] = "all_together";
    file.metadata["training"] = training.dump();
    file.metadata["config"] = nlohmann::json(config).dump();
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

/// The configuration in a saved file; build the model from it, then `trainer::resume` or `lithe::load_model`.
inline model_config read_saved_config(const std::string& path) {
  return parse_config(support::read_saved(path, {"all_together"}).at("config"), path + ", config");
}
