#include "lithe/training/exit_calibration.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/initialise.hpp"

namespace exit_calibration_tests {

using namespace lithe;

TEST(risk_p_value, the_specification_s_numbers) {
  const auto hoeffding = [](double mean) { return risk_p_value(risk_bound::hoeffding, 500 * mean, 500, 0.1); };
  const auto bentkus = [](double sum) { return risk_p_value(risk_bound::hoeffding_bentkus, sum, 500, 0.1); };
  EXPECT_NEAR(hoeffding(.02), 0.0016615573, 1e-10);
  EXPECT_NEAR(hoeffding(.06), 0.2018965180, 1e-10);
  EXPECT_NEAR(bentkus(10) / 3.0871e-12, 1, 1e-4);
  EXPECT_NEAR(bentkus(30), 0.0027252127, 1e-10);
  EXPECT_NEAR(bentkus(40), 0.2041138516, 1e-10);
  EXPECT_EQ(bentkus(50), 1);
}

TEST(risk_p_value, one_lost_bit_in_the_sum_would_lift_the_ceiling) {
  const double sum = 30, lifted = std::nextafter(sum, 31);
  EXPECT_GT(detail::binomial_cdf(static_cast<index_t>(std::ceil(lifted)), 500, 0.1), 1.5 * detail::binomial_cdf(30, 500, 0.1));
}

TEST(calibrate, hoeffding_rejects_what_hoeffding_bentkus_accepts) {
  const matrix<double> losses = matrix<double>::Constant(1, 500, 0.06);
  const std::vector<double> grid{0.5};
  EXPECT_EQ(calibrate(grid, losses, {.bound = risk_bound::hoeffding}).threshold, 1);
  EXPECT_EQ(calibrate(grid, losses, {}).threshold, 0.5);
}

TEST(calibrate, stops_at_the_first_failure_and_clips) {
  matrix<double> losses = matrix<double>::Zero(3, 200);
  losses.row(1).setConstant(0.9);
  losses.row(0).setConstant(-5);  // clipped to 0
  const std::vector<double> grid{0.9, 0.8, 0.7};
  const auto r = calibrate(grid, losses);
  EXPECT_EQ(r.threshold, 0.9);
  EXPECT_EQ(r.accepted, 1);
  EXPECT_EQ(r.mean_loss[0], 0);
  EXPECT_LT(r.p_values[2], 0.05);
}

TEST(calibrate, a_smaller_loss_never_raises_the_threshold) {
  const auto grid = calibration_grid(0.1);
  matrix<double> losses(static_cast<index_t>(grid.size()), 100);
  for (index_t g = 0; g < losses.rows(); ++g)
    for (index_t i = 0; i < 100; ++i) losses(g, i) = uniform({5}, static_cast<std::uint64_t>(100 * g + i)) < 0.02 * static_cast<double>(g) ? 1 : 0;
  double before = calibrate(grid, losses, {.delta = 0.2}).threshold;
  EXPECT_LT(before, 1);
  EXPECT_GT(before, 0);
  for (int i = 0; i < 5; ++i) {
    losses *= 0.8;
    const double now = calibrate(grid, losses, {.delta = 0.2}).threshold;
    EXPECT_LE(now, before);
    before = now;
  }
}

TEST(calibrate, the_risk_holds_on_held_out_data_over_repeated_splits) {
  // Losses are coins whose probability rises as the threshold falls, from 0 to 0.3; the largest safe one for δ = 0.1 is known. In 1000 splits
  // the chosen threshold may be too low in at most ε = 5 %; four standard deviations of that count are 2.8 %.
  const auto grid = calibration_grid(0.05);
  const auto risk = [&](std::size_t g) { return 0.3 * static_cast<double>(g) / static_cast<double>(grid.size() - 1); };
  for (const auto bound : {risk_bound::hoeffding_bentkus, risk_bound::hoeffding}) {
    int broken = 0, useful = 0;
    for (std::uint64_t split = 0; split < 1000; ++split) {
      matrix<double> losses(static_cast<index_t>(grid.size()), 300);
      for (index_t i = 0; i < 300; ++i) {
        const double u = uniform(rng_key{7}.child(split), static_cast<std::uint64_t>(i));  // one draw a sequence: the same words at each threshold
        for (index_t g = 0; g < losses.rows(); ++g) losses(g, i) = u < risk(static_cast<std::size_t>(g)) ? 1 : 0;
      }
      const auto r = calibrate(grid, losses, {.bound = bound});
      broken += r.accepted > 0 && risk(static_cast<std::size_t>(r.accepted - 1)) > 0.1;
      useful += r.accepted > 1;
    }
    EXPECT_LE(broken, 78);
    EXPECT_GT(useful, 900);  // "never leave" would be safe, too
  }
}

TEST(calibration_grid, falls_to_nought) {
  const auto grid = calibration_grid();
  EXPECT_EQ(grid.size(), 20U);
  EXPECT_NEAR(grid.front(), 0.95, 1e-15);
  EXPECT_EQ(grid.back(), 0);
  EXPECT_EQ(calibration_grid(1), std::vector<double>{0});
}

TEST(excess_risk, is_never_negative) {
  std::vector<double> loss(2);
  excess_risk(std::vector<double>{0.5, 0.1}, std::vector<double>{0.2, 0.3}, loss);
  EXPECT_DOUBLE_EQ(loss[0], 0.3);
  EXPECT_EQ(loss[1], 0);
}

TEST(search_thresholds, keeps_the_best_of_each_stretch_of_cost) {
  // Quality rises with cost here, except where the second threshold is high.
  const auto judge = [](threshold_point& p) {
    p.cost = 1 + 5 * p.thresholds[0];
    p.quality = p.cost - p.thresholds[1];
  };
  const auto found = search_thresholds(3, 2000, 5, 1, 6, {4}, judge);
  ASSERT_EQ(found.size(), 5U);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_GE(found[i].cost, 1 + static_cast<double>(i));
    EXPECT_LE(found[i].cost, 2 + static_cast<double>(i));
    EXPECT_LT(found[i].thresholds[1], 0.2);  // 400 draws a stretch
  }
  const auto again = search_thresholds(3, 2000, 5, 1, 6, {4}, judge);
  EXPECT_EQ(again[2].thresholds, found[2].thresholds);
}

TEST(calibrate, bad_input_is_refused) {
  const matrix<double> losses = matrix<double>::Zero(2, 5);
  const std::vector<double> grid{0.9, 0.8};
  matrix<double> nan = losses;
  nan(1, 1) = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW((void)calibrate(grid, nan), config_error);
  EXPECT_THROW((void)calibrate(grid, matrix_view<const double>(nullptr, 2, 0)), config_error);
  EXPECT_THROW((void)calibrate(grid, losses, {.delta = 0}), config_error);
  EXPECT_THROW((void)calibrate(grid, losses, {.delta = 1}), config_error);
  EXPECT_THROW((void)calibrate(grid, losses, {.epsilon = 0}), config_error);
  EXPECT_THROW((void)calibrate(grid, losses, {.epsilon = 1}), config_error);
  EXPECT_THROW((void)calibrate(std::vector<double>{0.9}, losses), shape_error);
  EXPECT_THROW((void)calibrate(std::vector<double>{0.8, 0.9}, losses), config_error);
  EXPECT_THROW((void)calibration_grid(0), config_error);
  EXPECT_THROW((void)calibration_grid(1.5), config_error);
}

TEST(exit_calibration, excess_risk_writes_what_it_was_given_and_no_more) {
  const std::vector<double> early{0.5, 0.2, 9}, full{0.25, 0.5, 1};
  std::vector<double> loss(3, -1);
  excess_risk(std::span(early).first(2), std::span(full).first(2), std::span(loss).first(2));
  EXPECT_EQ(loss, (std::vector<double>{0.25, 0, -1}));
}

}  // namespace exit_calibration_tests
