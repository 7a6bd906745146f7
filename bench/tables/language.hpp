#pragma once

// Small language models on the bundled text, for the tables that compare them.

#include "table.hpp"
#include "trainer.hpp"

namespace tables {

/// What a trained model comes to.
struct outcome {
  index_t parameters;
  double bits_per_byte, training_rate, inference_rate;  // tokens a second
  std::int64_t skipped = 0;                             // steps that were not finite
  lithe::usage_report usage{};                          // of its memories, if it has any
};

inline const corpus& bundled_text(index_t context) {
  static const corpus text(EXAMPLE_DATA "/kjv_new_testament.txt", context);
  return text;
}

/// Trains a model from its seed and evaluates it on held-out text; tell(share) hears how far it is.
inline outcome train(const std::string& name, const model_config& c, const training_config& r,
                     const lithe::context& ctx, const std::function<void(double)>& tell) {
  const corpus& data = bundled_text(c.context);
  trainer t(name, c, r);
  while (t.step < r.steps) {
    t.train_step(data, r, ctx);
    tell(static_cast<double>(t.step) / static_cast<double>(r.steps));
  }
  t.guard.check();
  lithe::prepack(t.model);
  const auto e = t.evaluate(data, ctx, nullptr);
  outcome o{lithe::count_parameters(t.model), e.bits_per_byte, static_cast<double>(t.tokens) / t.seconds,
            e.tokens_per_second, t.guard.skipped()};
  if (!has_slots(c)) return o;
  lithe::usage_meter meter(slots_of(c));
  t.evaluate(data, ctx, &meter);
  o.usage = meter.report();
  return o;
}

/// A model of a table and the name of its row.
struct contender {
  std::string name;
  model_config config;
};

/// row(contender, outcome) for each of them in turn, with a progress line. Returns the steps that were skipped because
/// they were not finite.
inline std::int64_t compare(const std::vector<contender>& all, const training_config& r, const options& o,
                            const lithe::context& ctx,
                            const std::function<void(const contender&, const outcome&)>& row) {
  std::int64_t skipped = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    contender c = all[i];
    c.config.seed = o.seed;
    const outcome x = train(c.name, c.config, r, ctx, [&](double share) {
      progress(c.name, (static_cast<double>(i) + share) / static_cast<double>(all.size()));
    });
    skipped += x.skipped;
    row(c, x);
  }
  return skipped;
}

}  // namespace tables
