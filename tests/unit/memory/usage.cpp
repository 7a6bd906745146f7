#include "lithe/layers/memory/usage.hpp"

#include <gtest/gtest.h>

namespace usage_tests {

using namespace lithe;

TEST(usage, uniform_use) {
  const auto s = usage_meter::spread(std::vector<double>(64, 3.0));
  EXPECT_NEAR(s.used, 100, 1e-12);
  EXPECT_NEAR(s.kl_to_uniform, 0, 1e-14);
  EXPECT_NEAR(s.gini, -1.0 / 64, 1e-14);
  EXPECT_EQ(s.top50, 33);
  EXPECT_EQ(s.top90, 58);
  EXPECT_EQ(s.top99, 64);
}

TEST(usage, one_slot) {
  std::vector<double> z(64);
  z[5] = 2;
  const auto s = usage_meter::spread(z);
  EXPECT_NEAR(s.used, 100.0 / 64, 1e-12);
  EXPECT_NEAR(s.kl_to_uniform, std::log(64), 1e-14);
  EXPECT_NEAR(s.gini, 1 - 2.0 / 64, 1e-14);
  EXPECT_EQ(s.top50, 1);
  EXPECT_EQ(s.top90, 1);
  EXPECT_EQ(s.top99, 1);
}

TEST(usage, counts_weights_best_picks_and_overlap) {
  usage_meter meter(10);
  matrix<slot_t> slots(2, 4);  // two heads of two picks
  slots << 1, 2, 2, 3,  //
      4, 5, -1, 6;
  matrix<float> weights(2, 4);
  weights << 0.5F, 0.5F, 1.0F, 0.0F,  //
      0.75F, 0.25F, 9.0F, 1.0F;
  meter.add<float>(slots, weights, 2);
  const auto r = meter.report();
  EXPECT_EQ(r.picks, 7);                                   // -1 is none
  EXPECT_NEAR(r.counted.used, 60, 1e-12);                  // 1 2 3 4 5 6
  EXPECT_NEAR(r.weighted.used, 50, 1e-12);                 // slot 3 has weight 0
  EXPECT_NEAR(r.top1_used, 30, 1e-12);                     // 1, 2 and 4
  EXPECT_NEAR(r.head_overlap, 2.0 / 7, 1e-12);             // slot 2 of the first token, twice
  usage_meter alone(10);
  slots << 3, 3, 3, 3,  //
      4, 4, 5, 5;
  alone.add<float>(slots, weights, 1);
  EXPECT_EQ(alone.report().head_overlap, 0);  // one head overlaps with nobody, whatever it repeats
}

TEST(usage, refuses_what_it_cannot_count) {
  usage_meter meter(10);
  matrix<slot_t> slots(1, 2);
  matrix<float> weights(1, 2);
  slots << 1, 10;
  weights << 1, 1;
  EXPECT_THROW(meter.add<float>(slots, weights, 1), index_error);
  slots << 1, 2;
  weights << 1, -1;
  EXPECT_THROW(meter.add<float>(slots, weights, 1), config_error);
  weights << 1, std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(meter.add<float>(slots, weights, 1), config_error);
  weights << 1, 1;
  for (const index_t heads : {-1, 0, 3}) EXPECT_THROW(meter.add<float>(slots, weights, heads), config_error) << heads;
  EXPECT_EQ(meter.report().picks, 0);
  for (const index_t rows : {-1, 0}) EXPECT_THROW(usage_meter{rows}, config_error) << rows;
}

}  // namespace usage_tests
