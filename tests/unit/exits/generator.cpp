// Sampling and batched generation against step-by-step references.
#include "lithe/compose/generator.hpp"

#include <gtest/gtest.h>

#include "lithe/compose/beam_search.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/embedding.hpp"

namespace generator_tests {

using namespace lithe;

TEST(sample_token, draws_by_the_probabilities_of_the_logits) {
  const std::vector<double> logits{std::log(0.1), std::log(0.4), std::log(0.2), std::log(0.3)};
  // Running sums: token 0 up to 0.1, token 1 up to 0.5, token 2 up to 0.7, token 3 up to 1.
  const auto draw = [&](double u, sampling how = {}) { return sample_token<double>(logits, how, u, {}); };
  EXPECT_EQ(draw(0), 0);
  EXPECT_EQ(draw(0.09), 0);
  EXPECT_EQ(draw(0.11), 1);
  EXPECT_EQ(draw(0.49), 1);
  EXPECT_EQ(draw(0.51), 2);
  EXPECT_EQ(draw(0.69), 2);
  EXPECT_EQ(draw(0.71), 3);
  EXPECT_EQ(draw(0.999999), 3);
}

TEST(sample_token, temperature_sharpens_and_zero_takes_the_first_of_the_best) {
  const std::vector<float> logits{0, 1, 1, 0};
  EXPECT_EQ(sample_token<float>(logits, {.temperature = 0}, 0.99, {}), 1);
  // exp(1 / 0.1) = 22026: the two best share all but 1e-4 of the probability.
  EXPECT_EQ(sample_token<float>(logits, {.temperature = 0.1}, 0.999, {}), 2);
  EXPECT_EQ(sample_token<float>(logits, {.temperature = 100}, 0.999, {}), 3);
}

TEST(sample_token, top_k_and_top_p_cut_the_tail) {
  const std::vector<double> logits{std::log(0.1), std::log(0.4), std::log(0.2), std::log(0.3)};
  EXPECT_EQ(sample_token<double>(logits, {.top_k = 2}, 0.999, {}), 3);
  EXPECT_EQ(sample_token<double>(logits, {.top_k = 2}, 0.56, {}), 1);   // 0.4 of 0.7 = 0.571
  EXPECT_EQ(sample_token<double>(logits, {.top_p = 0.3}, 0.999, {}), 1);
  EXPECT_EQ(sample_token<double>(logits, {.top_p = 0.65}, 0.999, {}), 3);
  EXPECT_EQ(sample_token<double>(logits, {.top_k = 9}, 0.05, {}), 0);  // more than there are: all
}

TEST(sample_token, refuses_what_it_cannot_draw_from) {
  const std::vector<float> logits{0, 1}, nan(3, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(sample_token<float>(logits, {.temperature = -1}, 0.5, {}), config_error);
  EXPECT_THROW(sample_token<float>(logits, {.top_k = -1}, 0.5, {}), config_error);
  EXPECT_THROW(sample_token<float>(logits, {.top_p = 0}, 0.5, {}), config_error);
  EXPECT_THROW(sample_token<float>(nan, {}, 0.5, {}), state_error);
  EXPECT_THROW(sample_token<float>(std::span<const float>(), {}, 0.5, {}), shape_error);
  const std::vector<float> one_number{nan[0], 3, nan[0]};
  EXPECT_EQ(sample_token<float>(one_number, {}, 0.999, {}), 1);
}

TEST(correct_token, gives_the_wanted_distribution_whatever_guessed) {
  // Every pair of numbers on a grid, for every guess of q: the frequencies are p to the width of the grid.
  const std::vector<double> q{0.5, 0.3, 0.2, 0}, p{0.2, 0.3, 0.1, 0.4};
  constexpr int grid = 200;
  std::vector<double> seen(4, 0.0);
  for (token_t guess = 0; guess < 3; ++guess)
    for (int i = 0; i < grid; ++i)
      for (int k = 0; k < grid; ++k) {
        auto left = p;
        seen[static_cast<std::size_t>(correct_token(guess, q, left, (i + 0.5) / grid, (k + 0.5) / grid))] +=
            q[static_cast<std::size_t>(guess)] / (grid * grid);
      }
  for (std::size_t v = 0; v < 4; ++v) EXPECT_NEAR(seen[v], p[v], 1.0 / grid);
  auto same = q;
  EXPECT_EQ(correct_token(1, q, same, 0.999999, 0.5), 1);
}

using model = sequential<embedding<double>, residual<attention<double>>, linear<double>>;

model small_model() {
  return model(embedding<double>({.tokens = 11, .features = 8, .deviation = 1}, rng_key{1}),
               residual(attention<double>({.inputs = 8, .heads = 2, .causal = true}, rng_key{2})), linear<double>({8, 11}, rng_key{3}));
}

/// The same text by a full forward over the last window at each step.
std::vector<token_t> reference(const model& m, std::vector<token_t> text, index_t sequence, index_t steps, const generator_config& c, rng_key key) {
  std::size_t start = 0;
  for (index_t i = 0; i < steps; ++i) {
    if (text.size() - start > static_cast<std::size_t>(c.capacity)) start = text.size() - static_cast<std::size_t>(c.capacity / 2);
    const auto seen = std::span<const token_t>(text).subspan(start);
    matrix<double> logits(static_cast<index_t>(seen.size()), 11);
    m.forward(seen, logits, context{});
    const double u = uniform(key.child(static_cast<std::uint64_t>(sequence)), text.size());
    text.push_back(sample_token<double>({logits.row(logits.rows() - 1).data(), 11}, c.how, u, {}));
    if (std::find(c.stop.begin(), c.stop.end(), text.back()) != c.stop.end()) break;
  }
  return text;
}

TEST(generator, batches_of_different_lengths_equal_full_forwards_of_each) {
  const model m = small_model();
  const std::vector<std::vector<token_t>> prompts{{1, 2, 3}, {4}, {5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6}};  // the last outgrows the window at once
  const generator_config config{.capacity = 10, .how = {.temperature = 0.8, .top_k = 6, .top_p = 0.95}, .stop = {2}};
  const parallel_executor exec(2);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  generator<model> g(m, config);
  g.start(prompts, rng_key{5}, ctx);
  for (int i = 0; i < 14 && g.live() > 0; ++i) g.step(ctx);
  bool stopped = false, went_on = false;
  for (index_t i = 0; i < 3; ++i) {
    const auto expected = reference(m, prompts[static_cast<std::size_t>(i)], i, 14, config, rng_key{5});
    EXPECT_EQ(std::vector<token_t>(g.text(i).begin(), g.text(i).end()), expected) << "sequence " << i;
    (expected.back() == 2 ? stopped : went_on) = true;
  }
  EXPECT_TRUE(stopped && went_on);
}

TEST(generator, the_key_changes_the_text_and_equal_keys_repeat_it) {
  const model m = small_model();
  const auto text = [&](std::uint64_t seed) {
    generator<model> g(m, {.capacity = 64});
    const std::vector<token_t> prompt{1};
    g.start({&prompt, 1}, rng_key{seed}, {});
    for (int i = 0; i < 40; ++i) g.step({});
    return std::vector<token_t>(g.text(0).begin(), g.text(0).end());
  };
  EXPECT_EQ(text(1), text(1));
  EXPECT_NE(text(1), text(2));
}

TEST(generator, a_limit_of_new_tokens_ends_every_text) {
  const model m = small_model();
  const std::vector<std::vector<token_t>> prompts{{1, 2, 3}, {4}};
  const auto out = generate(m, prompts, {.most = 5}, rng_key{5});  // as much room as that takes
  generator<model> g(m, {.capacity = 64});
  g.start(prompts, rng_key{5}, {});
  for (int i = 0; i < 5; ++i) g.step({});
  for (std::size_t i = 0; i < 2; ++i) {
    const auto text = g.text(static_cast<index_t>(i)).subspan(prompts[i].size());
    EXPECT_EQ(out.tokens[i], std::vector<token_t>(text.begin(), text.end()));
    EXPECT_TRUE(out.exits[i].empty());
  }
}

TEST(generate_by_beams, drives_models_without_exits_too) {
  const model m = small_model();
  const std::vector<std::vector<token_t>> prompts{{1, 2, 3}, {4}};
  const generator_config config{.how = {.temperature = 0}, .most = 6};
  EXPECT_EQ(generate_by_beams(m, prompts, 1, config).tokens, generate(m, prompts, config).tokens);
  const auto one = generate_by_beams(m, prompts, 1, config), wide = generate_by_beams(m, prompts, 11, config);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_GE(wide.scores[i], one.scores[i] - 1e-12);
  EXPECT_THROW((void)generate_by_beams(m, prompts, 0, config), config_error);
  EXPECT_THROW((void)generate_by_beams(m, prompts, 2, {.capacity = 8}), config_error);
}

TEST(generator, names_what_it_cannot_start_from) {
  const model m = small_model();
  EXPECT_THROW(generator<model>(m, {}), config_error);  // neither a capacity nor a limit
  EXPECT_THROW(generator<model>(m, {.most = -1}), config_error);
  EXPECT_THROW(generator<model>(m, {.capacity = 8, .how = {.top_p = 2}}), config_error);
  EXPECT_THROW(generator<model>(m, {.capacity = 8, .drafts = 2}), config_error);  // there is no exit to draft
  EXPECT_THROW((void)generate(m, {}, {.capacity = 8}), config_error);
  EXPECT_THROW(generator<model>(m, {.capacity = 1}), config_error);
  generator<model> g(m, {.capacity = 8});
  const std::vector<std::vector<token_t>> prompts{{1}, {}};
  try {
    g.start(prompts, {}, {});
    FAIL() << "an empty prompt was taken";
  } catch (const shape_error& e) {
    EXPECT_NE(std::string(e.what()).find("prompt 1 is empty"), std::string::npos) << e.what();
  }
  g.start({}, {}, {});
  EXPECT_EQ(g.step({}), 0);
}

}  // namespace generator_tests
