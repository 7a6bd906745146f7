// What dropout draws is a function of the key and the place alone, however the rows are cut.
#include "lithe/kernels/dropout.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"

namespace dropout_tests {

using namespace lithe;

TEST(dropout, draws_are_those_of_philox_one_by_one) {
  constexpr rng_key key{0x123456789abcdef1};
  constexpr double rate = 0.3;
  for (const std::uint64_t row : {0ULL, 7ULL, (1ULL << 40) + 3})
    for (const std::uint64_t first : {0ULL, 1ULL, 6ULL, (1ULL << 34) - 5})
      for (const index_t n : {0, 1, 3, 64, 131}) {
        std::vector<double> factors(static_cast<std::size_t>(n) + 1, -1);
        draw_factors(key, row, first, n, rate, factors.data());
        for (index_t j = 0; j < n; ++j) {
          const auto at = first + static_cast<std::uint64_t>(j);
          const bool dropped = philox(key, at / 4, row)[at % 4] < static_cast<std::uint64_t>(rate * 0x1p32);
          EXPECT_EQ(factors[static_cast<std::size_t>(j)], dropped ? 0 : 1 / (1 - rate)) << row << " " << first << " " << j;
        }
        EXPECT_EQ(factors.back(), -1);  // nothing behind them
      }
}

TEST(dropout, rates_of_zero_and_one_divide_by_nothing) {
  std::vector<float> factors(100);
  draw_factors({1}, 0, 0, 100, 0.0, factors.data());
  EXPECT_EQ(std::count(factors.begin(), factors.end(), 1.0F), 100);
  draw_factors({1}, 0, 0, 100, 1.0, factors.data());
  EXPECT_EQ(std::count(factors.begin(), factors.end(), 0.0F), 100);
}

TEST(dropout, chunks_of_rows_and_workers_draw_what_the_whole_draws) {
  matrix<float> x = matrix<float>::Constant(37, 301, 2), whole(37, 301), parts(37, 301);
  context ctx;
  ctx.key = {9};
  drop<float>(x, whole, 0.5, ctx.key, ctx);
  EXPECT_NEAR(whole.mean(), 2, 0.1);  // 11137 draws: five deviations
  const parallel_executor exec(3, 3);
  ctx.exec = &exec;
  for (index_t first = 0; first < 37; first += 5) {
    const index_t n = std::min<index_t>(5, 37 - first);
    drop<float>(view(x).slice_rows(first, n), view(parts).slice_rows(first, n), 0.5, ctx.key, ctx.chunk(first, n));
  }
  EXPECT_EQ(whole, parts);
}

TEST(dropout, what_is_dropped_is_zero_even_if_it_was_not_a_number) {
  matrix<float> x = matrix<float>::Constant(4, 100, std::numeric_limits<float>::quiet_NaN());
  drop<float>(x, x, 0.5, {1}, {});
  EXPECT_GT((x.array() == 0).count(), 100);
  EXPECT_GT(x.array().isNaN().count(), 100);
}

}  // namespace dropout_tests
