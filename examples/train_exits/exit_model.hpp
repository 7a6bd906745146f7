#pragma once

// The byte-level language model of train_language_model with an answer after every block.

#include "language_model.hpp"

using exit_stack = lithe::adaptive_depth<lithe::stack<model_part>>;

struct exit_language_model {
  using scalar = real;
  struct record {
    lithe::exit_training_record<exit_stack> stack;
  };
  struct gradient {
    lithe::gradient_of<lithe::embedding<real>> words;
    lithe::gradient_of<exit_stack> stack;
  };

  lithe::embedding<real> words;
  exit_stack stack;

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("words", s.words...);
    f("stack", s.stack...);
  }
};

/// The parts of the plain model in blocks that all exits answer for with one norm and one classifier; a halting head predicts the exit.
inline exit_language_model make_exit_model(const model_config& c) {
  using namespace lithe;
  language_model plain = make_model(c);
  exit_language_model m;
  m.words = std::move(std::get<0>(plain.layers));
  for (auto& part : std::get<1>(plain.layers).blocks) {
    if (std::holds_alternative<attention<real>>(std::get<1>(part.inner.layers).value)) m.stack.stack.blocks.emplace_back();
    m.stack.stack.blocks.back().blocks.push_back(std::move(part));
  }
  m.stack.answers = exit_classifiers<real>({.exits = c.layers, .features = c.features, .classes = byte_values}, rng_key{c.seed}.child(2));
  m.stack.halt = halting<real>({.exits = c.layers, .features = c.features}, rng_key{c.seed}.child(3));
  return m;
}

/// Whether a file holds such a model.
inline bool has_exits(const std::filesystem::path& path) { return lithe::read_model_metadata(path).contains("exits"); }
