// The training of examples/train_language_model: steps that are not finite, and a masked objective with little to mask.
#include <gtest/gtest.h>

#include "../../../examples/train_language_model/trainer.hpp"

namespace language_model_training_tests {

using namespace lithe;

const double nan = std::numeric_limits<double>::quiet_NaN();

model_config smallest(const std::string& objective, index_t context) {
  model_config c;
  c.feed_forward = "dense";
  c.objective = objective;
  c.layers = 1;
  c.features = 8;
  c.heads = 2;
  c.hidden = 8;
  c.context = context;
  return c;
}
corpus some_text(index_t context) {
  std::vector<token_t> text(400);
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<token_t>(uniform(rng_key{1}, i) * 256);
  return {text, context, "text"};
}
std::vector<real> numbers_of_model(const trainer& t) {
  std::vector<real> all;
  for_each_tensor(
      [&](const std::string&, role, const auto& x) {
        if constexpr (requires { x.data(); }) all.insert(all.end(), x.data(), x.data() + x.size());
      },
      t.model);
  return all;
}

TEST(language_model_training, steps_that_are_not_finite_move_nothing_and_are_counted) {
  const training_config r{.steps = 100, .batch = 2};
  trainer t("", smallest("causal", 8), r);
  const corpus data = some_text(8);
  t.train_step(data, r, {});
  const auto before = numbers_of_model(t);
  auto& bias = std::get<3>(t.model.layers).bias;
  const real kept = bias(0, 3);
  bias(0, 3) = static_cast<real>(nan);
  for (int i = 1; i < support::step_guard::patience; ++i) t.train_step(data, r, {});
  EXPECT_EQ(t.step, support::step_guard::patience);
  EXPECT_EQ(t.guard.skipped(), support::step_guard::patience - 1);
  EXPECT_EQ(t.adam.steps(), 1);
  EXPECT_THROW(t.guard.check(), support::diverged);
  bias(0, 3) = kept;
  EXPECT_EQ(numbers_of_model(t), before);
  t.train_step(data, r, {});
  EXPECT_EQ(t.adam.steps(), 2);
  t.guard.check();
  bias(0, 3) = static_cast<real>(nan);
  for (int i = 1; i < support::step_guard::patience; ++i) t.train_step(data, r, {});
  EXPECT_THROW(t.train_step(data, r, {}), support::diverged);
}

TEST(language_model_training, of_a_masked_sequence_at_least_one_byte_is_masked) {
  for (const index_t context : {1, 2, 5}) {
    const training_config r{.steps = 100, .batch = 3};
    trainer t("", smallest("masked", context), r);
    const corpus data = some_text(context);
    for (t.step = 0; t.step < 50; ++t.step) {
      t.draw(data, r.batch);
      for (index_t b = 0; b < r.batch; ++b) {
        index_t masked = 0;
        for (index_t i = b * context; i < (b + 1) * context; ++i) {
          const auto at = static_cast<std::size_t>(i);
          EXPECT_EQ(t.inputs[at] == mask_token, t.targets[at] >= 0);
          masked += t.targets[at] >= 0 ? 1 : 0;
        }
        EXPECT_GE(masked, 1) << "context " << context << ", step " << t.step << ", sequence " << b;
      }
    }
    // An untrained model knows nothing of random bytes: about 8 bits each, and never 0.
    EXPECT_GT(t.evaluate(data, {}, nullptr).bits_per_byte, 4);
  }
}

}  // namespace language_model_training_tests
