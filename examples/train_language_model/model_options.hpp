#pragma once

// The options of the model that train_language_model and train_exits share.

#include "../support/options.hpp"
#include "language_model.hpp"

inline void add_model_options(CLI::App& app, model_config& c) {
  using support::between;
  app.add_option("--feed-forward", c.feed_forward, "what stands in for the feed-forward of the blocks with a memory")
      ->check(CLI::IsMember({"dense", "memory", "flat", "peer", "ultramem", "moe"}))
      ->capture_default_str();
  app.add_option("--layers", c.layers, "blocks")->check(between<index_t>(1, 256))->capture_default_str();
  app.add_option("--features", c.features, "numbers that stand for a byte between the blocks; a multiple of 4 heads")
      ->check(between<index_t>(4, 16384))
      ->capture_default_str();
  app.add_option("--context", c.context, "bytes that the model sees")
      ->check(between<index_t>(2, 1048576))
      ->capture_default_str();
  support::add_seed(app, c.seed, "of the weights and the batches");
}
/// Where memories stand if --memory-at is not given: in block 1, or in the only one.
inline void place_memory(const CLI::App& app, model_config& c) {
  const CLI::Option* at = app.get_option_no_throw("--memory-at");
  if (at == nullptr || at->count() == 0) c.memory_at = {std::min<index_t>(1, c.layers - 1)};
}
