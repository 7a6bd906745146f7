#include "lithe/kernels/top_k.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "lithe/core/parallel_executor.hpp"

// Selection is exact, so every comparison here is for equality: values, indices and their order.

namespace top_k_tests {

using namespace lithe;

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

template <class S>
struct top_k_test : testing::Test {
  /// What a row must give: a full stable sort.
  static std::pair<std::vector<S>, std::vector<std::int32_t>> expected(const std::vector<S>& scores, index_t k) {
    std::vector<std::pair<S, std::int32_t>> all;
    for (std::size_t i = 0; i < scores.size(); ++i)
      all.emplace_back(std::isnan(scores[i]) ? S(-inf) : scores[i], static_cast<std::int32_t>(i));
    std::stable_sort(all.begin(), all.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::pair<std::vector<S>, std::vector<std::int32_t>> result;
    for (index_t j = 0; j < k; ++j) {
      result.first.push_back(all[static_cast<std::size_t>(j)].first);
      result.second.push_back(all[static_cast<std::size_t>(j)].second);
    }
    return result;
  }
  /// Checks the dispatched row and each plan that takes it on. Returns whether the portable threshold plan did.
  static bool check(const std::vector<S>& scores, index_t k) {
    const auto n = static_cast<index_t>(scores.size());
    const auto want = expected(scores, k);
    std::vector<S> values(static_cast<std::size_t>(k), S(-1));
    std::vector<std::int32_t> indices(static_cast<std::size_t>(k), -1);
    top_k_row<S>(scores.data(), n, k, values.data(), indices.data(), {});
    EXPECT_EQ(values, want.first) << "n " << n << " k " << k;
    EXPECT_EQ(indices, want.second) << "n " << n << " k " << k;
    values.assign(values.size(), S(-1));
    const bool fast = detail::top_k_row_portable(scores.data(), n, k, values.data(), indices.data());
    if (fast) {
      EXPECT_EQ(values, want.first) << "portable, n " << n << " k " << k;
      EXPECT_EQ(indices, want.second) << "portable, n " << n << " k " << k;
    }
#if defined(LITHE_AVX512)
    if constexpr (std::is_same_v<S, float>) {  // both ways of listing survivors; the one for VBMI2 is emulated where that is missing
      for (const bool words : {false, true}) {
        if (words && n > 65536) continue;
        values.assign(values.size(), S(-1));
        const bool took = words ? detail::top_k_row_avx512<detail::word_list>(scores.data(), n, k, values.data(), indices.data())
                                : detail::top_k_row_avx512<detail::number_list>(scores.data(), n, k, values.data(), indices.data());
        EXPECT_EQ(took, fast);
        if (took) {
          EXPECT_EQ(values, want.first) << "AVX-512, n " << n << " k " << k << " words " << words;
          EXPECT_EQ(indices, want.second) << "AVX-512, n " << n << " k " << k << " words " << words;
        }
      }
    }
#endif
    std::vector<std::int32_t> order(scores.size());
    detail::top_k_row_sorted(scores.data(), n, k, values.data(), indices.data(), order);
    EXPECT_EQ(values, want.first) << "sorted, n " << n << " k " << k;
    EXPECT_EQ(indices, want.second) << "sorted, n " << n << " k " << k;
    return fast;
  }
  static std::vector<S> random(index_t n, std::uint64_t seed, double step = 0) {
    std::vector<S> s(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < s.size(); ++i) {
      const double v = normal(rng_key{seed}, i);
      s[i] = static_cast<S>(step > 0 ? std::round(v / step) * step : v);
    }
    return s;
  }
};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(top_k_test, scalars);

TYPED_TEST(top_k_test, equals_a_stable_sort_for_every_small_size) {
  for (index_t n = 1; n <= 70; ++n)
    for (index_t k = 1; k <= n; ++k) {
      this->check(this->random(n, static_cast<std::uint64_t>(100 * n + k)), k);
      this->check(this->random(n, static_cast<std::uint64_t>(100 * n + k), 0.5), k);
    }
}

TYPED_TEST(top_k_test, equals_a_stable_sort_for_real_sizes_and_takes_the_fast_plan) {
  for (const auto& [n, k] : {std::pair<index_t, index_t>{512, 32}, {1024, 32}, {128, 16}, {1024, 42}, {256, 8}, {513, 32}, {1000, 16}, {767, 64}, {512, 1},
                             {64, 64}, {4096, 128}, {1023, 100}, {65536, 32}, {65537, 32}, {33, 32}})
    for (std::uint64_t seed = 0; seed < 20; ++seed) EXPECT_TRUE(this->check(this->random(n, seed), k)) << n << " " << k << " " << seed;
}

TYPED_TEST(top_k_test, large_k_and_k_equal_to_n) {
  for (const auto& [n, k] : {std::pair<index_t, index_t>{512, 512}, {128, 128}, {1000, 129}, {3000, 700}, {129, 128}, {200, 199}})
    for (std::uint64_t seed = 0; seed < 5; ++seed) this->check(this->random(n, seed, seed % 2 == 0 ? 0 : 0.25), k);
}

TYPED_TEST(top_k_test, ties_go_to_the_lower_index) {
  for (const double step : {0.01, 0.1, 0.5, 2.0, 100.0})  // 100: all scores are 0
    for (const auto& [n, k] : {std::pair<index_t, index_t>{512, 32}, {1024, 42}, {130, 16}, {77, 33}})
      for (std::uint64_t seed = 0; seed < 10; ++seed) this->check(this->random(n, seed, step), k);
  using S = TypeParam;
  std::vector<S> signed_zeros(100);
  for (std::size_t i = 0; i < 100; ++i) signed_zeros[i] = i % 3 == 0 ? S(-0.0) : S(0.0);
  this->check(signed_zeros, 20);
}

TYPED_TEST(top_k_test, nan_is_chosen_last) {
  using S = TypeParam;
  for (const auto& [n, k] : {std::pair<index_t, index_t>{512, 32}, {70, 32}, {64, 16}, {20, 20}})
    for (const index_t numbers : {index_t{0}, index_t{1}, k - 1, k, k + 1, n / 2, n - 1})
      for (std::uint64_t seed = 0; seed < 5; ++seed) {
        auto s = this->random(n, seed, seed % 2 == 0 ? 0 : 0.5);
        for (index_t gone = 0, i = 0; gone < n - numbers; i = (i + 37) % n)
          if (auto& v = s[static_cast<std::size_t>(i)]; !std::isnan(v)) v = S(nan_value), ++gone;
          else i = i + 1;
        this->check(s, k);
      }
}

TYPED_TEST(top_k_test, infinities_are_numbers) {
  using S = TypeParam;
  for (const auto& [n, k] : {std::pair<index_t, index_t>{512, 32}, {70, 32}, {64, 16}})
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      auto s = this->random(n, seed);
      for (std::size_t i = seed; i < s.size(); i += 3) s[i] = S(i % 2 == 0 ? inf : -inf);
      for (std::size_t i = 5; i < s.size(); i += 11) s[i] = S(nan_value);
      this->check(s, k);
      for (auto& v : s) v = v > 0 ? v : S(-inf);
      this->check(s, k);
      for (auto& v : s) v = std::numeric_limits<S>::max() * (v > 1 ? S(1) : S(-1));  // the range overflows
      this->check(s, k);
      s.assign(s.size(), S(-inf));
      this->check(s, k);
      s.assign(s.size(), S(inf));
      this->check(s, k);
    }
}

TYPED_TEST(top_k_test, skewed_scores) {
  using S = TypeParam;
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    auto s = this->random(1024, seed);
    for (auto& v : s) v = std::exp(10 * v);
    this->check(s, 32);
    std::sort(s.begin(), s.end());
    this->check(s, 32);
    std::reverse(s.begin(), s.end());
    this->check(s, 32);
    for (std::size_t i = 0; i < s.size(); ++i) s[i] = S(i % 128 == 7 ? 5 + static_cast<double>(i) : 0);  // one group has all the large ones
    this->check(s, 8);
    this->check(s, 32);
  }
}

TYPED_TEST(top_k_test, strided_rows_and_any_number_of_workers) {
  using S = TypeParam;
  matrix<S> big(77, 300), values(77, 40);
  Eigen::Matrix<std::int32_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> indices(77, 50);
  for (index_t i = 0; i < big.size(); ++i) big.data()[i] = static_cast<S>(normal(rng_key{3}, static_cast<std::uint64_t>(i)));
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx;
    ctx.exec = &exec;
    ctx.work = &work;
    values.setConstant(S(9));
    indices.setConstant(-9);
    const matrix_view<const S> scores = view(std::as_const(big)).slice_cols(13, 257);
    top_k<S>(scores, view(values).slice_cols(3, 32), view(indices).slice_cols(5, 32), ctx);
    for (index_t t = 0; t < 77; ++t) {
      const auto want = this->expected(std::vector<S>(scores.row(t), scores.row(t) + 257), 32);
      for (index_t j = 0; j < 32; ++j) {
        EXPECT_EQ(values(t, 3 + j), want.first[static_cast<std::size_t>(j)]);
        EXPECT_EQ(indices(t, 5 + j), want.second[static_cast<std::size_t>(j)]);
      }
      EXPECT_EQ(values(t, 2), S(9));
      EXPECT_EQ(values(t, 35), S(9));
      EXPECT_EQ(indices(t, 4), -9);
      EXPECT_EQ(indices(t, 37), -9);
    }
  }
}

TYPED_TEST(top_k_test, refuses_impossible_k_and_takes_no_rows) {
  using S = TypeParam;
  const matrix<S> scores = matrix<S>::Zero(2, 4), none(0, 4);
  matrix<S> values(2, 5), empty(0, 2);
  Eigen::Matrix<std::int32_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> indices(2, 5), no_indices(0, 2);
  EXPECT_THROW(top_k<S>(scores, values, indices, {}), shape_error);
  EXPECT_THROW(top_k<S>(scores, view(values).slice_cols(0, 0), view(indices).slice_cols(0, 0), {}), shape_error);
  EXPECT_THROW(top_k<S>(scores, view(values).slice_cols(0, 2), view(indices).slice_cols(0, 3), {}), shape_error);
  EXPECT_NO_THROW(top_k<S>(none, empty, no_indices, {}));
}

}  // namespace top_k_tests
