#include "lithe/training/exit_targets.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/initialise.hpp"

namespace exit_targets_tests {

using namespace lithe;

using exits_type = std::vector<std::int32_t>;

/// Likelihoods or correctness of three tokens, as the specification gives them.
exit_evidence likelihoods() {
  exit_evidence e;
  e.log_likelihood.resize(3, 3);
  e.log_likelihood << -2, -1, -.5, -.1, -.2, -.3, -3, -.4, -.6;
  e.correct = matrix<double>::Zero(3, 3);
  return e;
}
exit_evidence correctness() {
  exit_evidence e;
  e.correct.resize(4, 3);
  e.correct << 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1;
  e.log_likelihood = matrix<double>::Zero(4, 3);
  return e;
}
exits_type chosen(const exit_evidence& e, exit_target_config c, std::vector<token_t> targets = {}, const context& ctx = {}) {
  if (targets.empty()) targets.assign(static_cast<std::size_t>(e.correct.rows()), 0);
  exits_type exits(c.granularity == exit_granularity::token ? targets.size() : static_cast<std::size_t>(ctx.rows.count()));
  exit_targets(e, targets, c, exits, {}, ctx);
  return exits;
}

TEST(exit_targets, token_likelihood_and_its_smoothing) {
  const auto of = [](double lambda, double sigma) {
    return chosen(likelihoods(), {.oracle = exit_oracle::likelihood, .penalty = lambda, .sigma = sigma});
  };
  EXPECT_EQ(of(0, 0), (exits_type{3, 1, 2}));
  EXPECT_EQ(of(.3, 0), (exits_type{3, 1, 2}));
  EXPECT_EQ(of(.6, 0), (exits_type{2, 1, 2}));
  EXPECT_EQ(of(0, 1), (exits_type{3, 3, 2}));
  EXPECT_EQ(of(.3, 1), (exits_type{3, 2, 2}));
  EXPECT_EQ(of(.6, 1), (exits_type{2, 2, 2}));
  matrix<double> scores(3, 3);
  exits_type exits(3);
  exit_targets(likelihoods(), std::vector<token_t>(3, 0), {.oracle = exit_oracle::likelihood, .penalty = 0, .sigma = 1}, exits, scores);
  EXPECT_NEAR(scores(0, 0), -2.09173, 1e-5);  // as many digits as are printed
  EXPECT_NEAR(scores(0, 1), -1.08090, 1e-5);
  EXPECT_NEAR(scores(0, 2), -0.62135, 1e-5);
}

TEST(exit_targets, sequence_likelihood) {
  for (const auto& [lambda, exit] : {std::pair{0.0, 3}, {.5, 2}, {2.0, 2}, {4.0, 1}})
    EXPECT_EQ(chosen(likelihoods(), {.oracle = exit_oracle::likelihood, .granularity = exit_granularity::sequence, .penalty = lambda}),
              exits_type{exit})
        << lambda;
}

TEST(exit_targets, token_correctness_and_ties) {
  const auto of = [](double lambda) { return chosen(correctness(), {.penalty = lambda}); };
  EXPECT_EQ(of(0), (exits_type{2, 1, 1, 3}));  // the lowest correct block; none: 1
  EXPECT_EQ(of(.1), (exits_type{2, 1, 1, 3}));
  EXPECT_EQ(of(.5), (exits_type{2, 1, 1, 1}));
  EXPECT_EQ(of(1), (exits_type{1, 1, 1, 1}));
  EXPECT_EQ(of(std::numeric_limits<double>::infinity()), (exits_type{1, 1, 1, 1}));
}

TEST(exit_targets, sequence_correctness) {
  for (const auto& [lambda, exit] : {std::pair{0.0, 3}, {.5, 3}, {1.0, 1}, {1.5, 1}})  // counts 1 2 3; at 1 all are equal
    EXPECT_EQ(chosen(correctness(), {.granularity = exit_granularity::sequence, .penalty = lambda}), exits_type{exit}) << lambda;
}

TEST(exit_targets, nothing_crosses_a_sequence_or_comes_from_ignored_targets) {
  const std::vector<index_t> offsets{0, 2, 2, 3};
  context ctx;
  ctx.rows = {offsets};
  const exit_target_config smooth{.oracle = exit_oracle::likelihood, .penalty = 0, .sigma = 1};
  auto e = likelihoods();
  const auto before = chosen(e, smooth, {0, -100, 0}, ctx);
  EXPECT_EQ(before, (exits_type{3, 0, 2}));
  e.log_likelihood.row(1).setConstant(-1000);
  EXPECT_EQ(chosen(e, smooth, {0, -100, 0}, ctx), before);
  exit_target_config whole = smooth;
  whole.granularity = exit_granularity::sequence;
  EXPECT_EQ(chosen(likelihoods(), whole, {}, ctx), (exits_type{3, 1, 2}));  // an empty sequence: all equal
}

TEST(exit_targets, far_neighbours_are_cut_where_no_double_sees_them) {
  // Against the sum over everything, at a length where most of it is cut.
  const index_t T = 200;
  exit_evidence e;
  e.correct.resize(T, 4);
  fill_uniform<double>(e.correct, 1.0, rng_key{3});
  e.log_likelihood = e.correct;
  for (const bool normalise : {false, true}) {
    matrix<double> scores(T, 4), plain = matrix<double>::Zero(T, 4);
    exits_type exits(static_cast<std::size_t>(T));
    exit_targets(e, std::vector<token_t>(static_cast<std::size_t>(T), 0), {.penalty = 0.1, .sigma = 2, .normalise = normalise}, exits, scores);
    for (index_t j = 0; j < T; ++j) {
      double total = 0;
      for (index_t i = 0; i < T; ++i) {
        const double kappa = std::exp(-static_cast<double>((i - j) * (i - j)) / 2);
        plain.row(j) += kappa * e.correct.row(i);
        total += kappa;
      }
      if (normalise) plain.row(j) /= total;
      for (index_t n = 0; n < 4; ++n) plain(j, n) -= 0.1 * static_cast<double>(n + 1);
    }
    EXPECT_LT((scores - plain).cwiseAbs().maxCoeff(), 1e-14);  // sums of about 3 in another order
  }
}

TEST(exit_targets, evidence_is_what_the_logits_say) {
  matrix<double> logits(4, 3);  // 2 exits, 2 tokens
  logits << 1, 2, 0, 0, 0, 5, 3, 3, 0, 0, 1, 0;
  exit_evidence e;
  exit_evidence_from<double>(logits, std::vector<token_t>{0, 2}, -100, e);
  EXPECT_EQ(e.correct(0, 0), 0);
  EXPECT_EQ(e.correct(1, 0), 1);
  EXPECT_EQ(e.correct(0, 1), 1);  // a tie goes to the first
  EXPECT_EQ(e.correct(1, 1), 0);
  EXPECT_NEAR(e.log_likelihood(0, 0), 1 - std::log(std::exp(1) + std::exp(2) + 1), 1e-14);
  exit_evidence_from<double>(logits, std::vector<token_t>{-100, 2}, -100, e);
  EXPECT_EQ(e.log_likelihood(0, 0), 0);
  logits.setConstant(std::numeric_limits<double>::quiet_NaN());
  exit_evidence_from<double>(logits, std::vector<token_t>{0, 2}, -100, e);
  EXPECT_EQ(e.correct.sum(), 0);  // no number is the largest of none
  exit_evidence_from<double>(matrix_view<const double>(nullptr, 0, 3), {}, -100, e);
  EXPECT_EQ(e.correct.rows(), 0);
}

TEST(exit_targets, bad_input_is_refused) {
  const auto e = likelihoods();
  EXPECT_THROW(chosen(e, {.sigma = -1}), config_error);
  EXPECT_THROW(chosen(e, {.penalty = std::numeric_limits<double>::quiet_NaN()}), config_error);
  exits_type two(2);
  EXPECT_THROW(exit_targets(e, std::vector<token_t>(3, 0), {}, two), shape_error);
  EXPECT_THROW(chosen(e, {}, {0, 0}), shape_error);
  exit_evidence out;
  const matrix<double> logits = matrix<double>::Zero(4, 3);
  EXPECT_THROW(exit_evidence_from<double>(logits, std::vector<token_t>{0, 3}, -100, out), index_error);
  EXPECT_THROW(exit_evidence_from<double>(logits, std::vector<token_t>{0, 1, 2}, -100, out), shape_error);
}

}  // namespace exit_targets_tests
