#include "lithe/training/exit_losses.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/initialise.hpp"
#include "lithe/training/exit_curriculum.hpp"

namespace exit_losses_tests {

using namespace lithe;

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}
/// Central differences with h = 1e-5 of functions of size 1 to 10: good to 1e-9.
template <class Loss>
void expect_gradient(matrix<double> x, const matrix<double>& d, Loss&& loss) {
  double largest = 0;
  for (index_t i = 0; i < x.size(); ++i) {
    const double kept_value = x.data()[i], h = 1e-5;
    x.data()[i] = kept_value + h;
    const double up = loss(x);
    x.data()[i] = kept_value - h;
    const double down = loss(x);
    x.data()[i] = kept_value;
    EXPECT_NEAR((up - down) / (2 * h), d.data()[i], 1e-8) << i;
    largest = std::max(largest, std::abs(d.data()[i]));
  }
  EXPECT_GT(largest, 1e-3);
}
const std::vector<token_t> targets{1, 0, -100, 3};

TEST(exit_weights, all_weightings) {
  using enum exit_weighting;
  EXPECT_EQ(exit_weights(uniform, 3), (std::vector<double>{1, 1, 1}));
  EXPECT_EQ(exit_weights(linear, 3), (std::vector<double>{1, 2, 3}));
  EXPECT_EQ(exit_weights(root, 2), (std::vector<double>{1, std::sqrt(2.0)}));
  EXPECT_EQ(exit_weights(inverse, 2), (std::vector<double>{1, 0.5}));
  EXPECT_EQ(exit_weights(inverse_root, 2), (std::vector<double>{1, 1 / std::sqrt(2.0)}));
  const auto shares = detail::shares_of("test", exit_weights(linear, 4));
  for (std::size_t n = 0; n < 4; ++n) EXPECT_NEAR(shares[n], 0.1 * static_cast<double>(n + 1), 1e-16);
}

TEST(aligned_exit_loss, gradient_and_reductions) {
  const auto x = random_matrix(3 * 4, 5, 1);
  const std::vector<double> w{0.5, 0, 2};
  for (const auto reduce : {reduction::sum, reduction::mean}) {
    matrix<double> d(12, 5);
    const auto l = aligned_exit_loss<double>(x, targets, w, reduce, -100, d);
    EXPECT_EQ(l.counted, 3);
    expect_gradient(x, d, [&](const matrix<double>& at) { return aligned_exit_loss<double>(at, targets, w, reduce, -100, {}).loss; });
    EXPECT_EQ(d.middleRows(4, 4).cwiseAbs().maxCoeff(), 0);  // weight 0
    EXPECT_EQ(d.row(2).cwiseAbs().maxCoeff(), 0);            // ignored
  }
  const double sum = aligned_exit_loss<double>(x, targets, w, reduction::sum, -100, {}).loss;
  EXPECT_NEAR(aligned_exit_loss<double>(x, targets, w, reduction::mean, -100, {}).loss, sum / 3, 1e-15);
}

TEST(aligned_exit_loss, the_last_exit_alone_is_the_cross_entropy) {
  const auto x = random_matrix(12, 5, 1);
  matrix<double> d(4, 5);
  const matrix<double> top = x.bottomRows(4);
  const double plain = cross_entropy<double>(top, targets, {.reduce = reduction::sum}, d).loss;
  EXPECT_EQ(aligned_exit_loss<double>(x, targets, std::vector<double>{0, 0, 1}, reduction::sum, -100, {}).loss, plain);
}

TEST(aligned_exit_loss, no_target_and_no_token) {
  const auto x = random_matrix(12, 5, 1);
  matrix<double> d(12, 5);
  EXPECT_EQ(aligned_exit_loss<double>(x, std::vector<token_t>(4, -100), std::vector<double>{1, 1, 1}, reduction::mean, -100, d).loss, 0);
  EXPECT_EQ(d.cwiseAbs().maxCoeff(), 0);
  EXPECT_EQ(aligned_exit_loss<double>(matrix_view<const double>(nullptr, 0, 5), {}, std::vector<double>{1}, reduction::mean, -100, {}).loss, 0);
}

TEST(aligned_exit_loss, bad_input_is_refused) {
  const auto x = random_matrix(12, 5, 1);
  const auto with = [&](std::vector<double> w, std::vector<token_t> y) { return aligned_exit_loss<double>(x, y, w, reduction::sum, -100, {}); };
  EXPECT_THROW(with({1, -1, 1}, targets), config_error);
  EXPECT_THROW(with({0, 0, 0}, targets), config_error);
  EXPECT_THROW(with({1, 1}, targets), shape_error);
  EXPECT_THROW(with({1, 1, 1}, {1, 0, 5, 3}), index_error);
}

TEST(exit_loss, hard_and_soft_targets) {
  const auto q = random_matrix(4, 3, 2);
  const std::vector<std::int32_t> exits{2, 0, 3, 1};
  matrix<double> d(4, 3), soft(4, 3), one_hot = matrix<double>::Zero(4, 3);
  const auto hard = exit_loss<double>(q, exits, 0.7, reduction::mean, d);
  EXPECT_EQ(hard.counted, 3);
  EXPECT_NEAR(hard.loss, -0.7 / 3 * (q(0, 1) + q(2, 2) + q(3, 0)), 1e-15);
  expect_gradient(q, d, [&](const matrix<double>& at) { return exit_loss<double>(at, exits, 0.7, reduction::mean, {}).loss; });
  for (index_t t = 0; t < 4; ++t)
    if (exits[static_cast<std::size_t>(t)] != 0) one_hot(t, exits[static_cast<std::size_t>(t)] - 1) = 1;
  EXPECT_NEAR(soft_exit_loss<double>(q, one_hot, 0.7, reduction::mean, soft).loss, hard.loss, 1e-15);
  EXPECT_LT((soft - d).cwiseAbs().maxCoeff(), 1e-16);
}

TEST(exit_loss, bad_input_is_refused) {
  const auto q = random_matrix(2, 3, 2);
  const auto with = [&](std::vector<std::int32_t> exits, double alpha) { return exit_loss<double>(q, exits, alpha, reduction::sum, {}); };
  EXPECT_THROW(with({1, 4}, 1), index_error);
  EXPECT_THROW(with({1, -1}, 1), index_error);
  EXPECT_THROW(with({1}, 1), shape_error);
  EXPECT_THROW(with({1, 1}, -1), config_error);
  EXPECT_THROW(with({1, 1}, std::numeric_limits<double>::quiet_NaN()), config_error);
  EXPECT_THROW(soft_exit_loss<double>(q, matrix<double>::Constant(2, 3, -1).eval(), 1, reduction::sum, {}), config_error);
  EXPECT_EQ(with({0, 0}, 1).loss, 0);
}

TEST(meta_exit_loss, targets_gradient_and_reduction) {
  auto logits = random_matrix(3 * 4, 5, 1);
  logits.topRows(2) = logits.middleRows(8, 2);  // the first exit already says what the last says
  matrix<double> y(2, 4), dz(2, 4);
  meta_targets<double>(logits, 3, y);
  EXPECT_EQ(y(0, 0), 1);
  EXPECT_EQ(y(0, 1), 1);
  const auto z = random_matrix(2, 4, 3);
  const auto loss = meta_exit_loss<double>(z, y, reduction::mean, dz);
  expect_gradient(z, dz, [&](const matrix<double>& at) { return meta_exit_loss<double>(at, y, reduction::mean, {}).loss; });
  EXPECT_NEAR(meta_exit_loss<double>(z, y, reduction::sum, {}).loss, 4 * loss.loss, 1e-14);
}

TEST(meta_exit_loss, two_outputs_and_their_difference_agree) {
  // softmax([a, b])[1] = σ(b - a): how a head with two outputs is taken over.
  const auto w = random_matrix(2, 6, 1), h = random_matrix(1, 6, 2);
  const double a = h.row(0).dot(w.row(0)), b = h.row(0).dot(w.row(1)), z = h.row(0).dot(w.row(1) - w.row(0));
  EXPECT_NEAR(std::exp(b) / (std::exp(a) + std::exp(b)), sigmoid(z), 1e-15);
}

TEST(distillation_exit_loss, gradient_with_a_constant_teacher) {
  const auto x = random_matrix(3 * 2, 4, 1);
  matrix<double> d(6, 4);
  (void)distillation_exit_loss<double>(x, 3, reduction::sum, d);
  EXPECT_EQ(d.bottomRows(2).cwiseAbs().maxCoeff(), 0);
  matrix<double> early = x.topRows(4), dearly = d.topRows(4);
  expect_gradient(early, dearly, [&](const matrix<double>& at) {
    matrix<double> all(6, 4), scratch_gradient(6, 4);
    all << at, x.bottomRows(2);
    return distillation_exit_loss<double>(all, 3, reduction::sum, scratch_gradient).loss;
  });
}

TEST(layer_skip, the_specification_s_rates_and_weights) {
  const auto p = layer_drop_rates(5, 0.5);
  const double rates[] = {0, .0946036, .2071068, .3408964, .5};
  for (std::size_t l = 0; l < 5; ++l) EXPECT_NEAR(p[l], rates[l], 1e-7);
  EXPECT_EQ(layer_drop_rates(5, 0.5, 0, 10)[4], 0);
  EXPECT_NEAR(layer_drop_rates(5, 0.5, 9, 10)[4], 0.5, 1e-15);
  const auto c = exit_loss_weights(5, 0.2);
  const double weights[] = {0, .0277778, .0833333, .1666667, .7222222};
  for (std::size_t l = 0; l < 5; ++l) EXPECT_NEAR(c[l], weights[l], 1e-7);
}

TEST(layer_skip, curricula) {
  // Every third block, shifted by one each step: at step 1 blocks 1 and 4 of 0 .. 4.
  const auto rotated = exit_loss_weights(5, 0.2, exit_curriculum::rotational, 1, 3);
  EXPECT_NEAR(rotated[1], .0370370, 1e-7);
  EXPECT_NEAR(rotated[4], .9629630, 1e-7);
  EXPECT_EQ(rotated[2] + rotated[3], 0);
  const auto later = exit_loss_weights(5, 0.2, exit_curriculum::rotational, 2, 3);
  EXPECT_GT(later[2], 0);
  EXPECT_EQ(later[1], 0);
  EXPECT_GT(later[4], 0);  // the last always
  const auto on = [](index_t step) {
    index_t count = 0;
    for (const double w : exit_loss_weights(5, 0.2, exit_curriculum::gradual, step, 1, 100)) count += w > 0;
    return count;
  };
  EXPECT_EQ(on(0), 1);
  EXPECT_EQ(on(9), 1);
  EXPECT_EQ(on(10), 2);
  EXPECT_EQ(on(50), 4);  // all but block 0, whose weight is 0
  EXPECT_THROW((void)exit_loss_weights(5, -1), config_error);
  EXPECT_THROW((void)layer_drop_rates(5, 1.5), config_error);
}

}  // namespace exit_losses_tests
