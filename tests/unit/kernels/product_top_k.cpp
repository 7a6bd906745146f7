#include "lithe/kernels/product_top_k.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

// Selection is exact, so every comparison here is for equality: sums, pairs and their order.

namespace product_top_k_tests {

using namespace lithe;

constexpr double inf = std::numeric_limits<double>::infinity();

template <class S>
struct product_top_k_test : testing::Test {
  /// Checks against a stable sort of all k² sums. Returns whether the portable plan of a fixed size took it on.
  static bool check(const std::vector<S>& a, const std::vector<S>& b, index_t final_k) {
    const auto k = static_cast<index_t>(a.size());
    std::vector<std::pair<S, std::int32_t>> all;
    for (std::size_t i = 0; i < a.size(); ++i)
      for (std::size_t j = 0; j < b.size(); ++j) {
        const S sum = a[i] + b[j];
        all.emplace_back(std::isnan(sum) ? S(-inf) : sum, static_cast<std::int32_t>(i * b.size() + j));
      }
    std::stable_sort(all.begin(), all.end(), [](auto& x, auto& y) { return x.first > y.first; });
    std::vector<S> sums(static_cast<std::size_t>(final_k)), want_sums;
    std::vector<std::int32_t> pairs(sums.size()), want_pairs;
    for (std::size_t j = 0; j < sums.size(); ++j) {
      want_sums.push_back(all[j].first);
      want_pairs.push_back(all[j].second);
    }
    const auto expect = [&](const char* which) {
      EXPECT_EQ(sums, want_sums) << which << ", k " << k << " final " << final_k;
      EXPECT_EQ(pairs, want_pairs) << which << ", k " << k << " final " << final_k;
      sums.assign(sums.size(), S(7));
      pairs.assign(pairs.size(), -7);
    };
    product_top_k_row<S>(a.data(), b.data(), k, final_k, sums.data(), pairs.data(), {});
    expect("chosen");
    detail::product_top_k_row_any<S>(a.data(), b.data(), k, final_k, sums.data(), pairs.data(), {});
    expect("any");
    const index_t size = std::max(k, final_k);
    const auto portable = [&]<int K>(std::integral_constant<int, K>) {
      const bool took = size <= K && detail::product_top_k_row_portable<K>(a.data(), b.data(), k, final_k, sums.data(), pairs.data());
      if (took) expect("portable");
      return took;
    };
    portable(std::integral_constant<int, 16>());
    portable(std::integral_constant<int, 32>());
#if defined(LITHE_AVX512)
    if constexpr (std::is_same_v<S, float>) {
      if (size <= 16 && detail::product_top_k_row_avx512<16>(a.data(), b.data(), k, final_k, sums.data(), pairs.data())) expect("AVX-512 16");
      if (size <= 32 && detail::product_top_k_row_avx512<32>(a.data(), b.data(), k, final_k, sums.data(), pairs.data())) expect("AVX-512 32");
    }
#endif
    return portable(std::integral_constant<int, 64>());
  }
  static std::vector<S> descending(index_t k, std::uint64_t seed, double step = 0) {
    std::vector<S> s(static_cast<std::size_t>(k));
    for (std::size_t i = 0; i < s.size(); ++i) {
      const double v = normal(rng_key{seed}, i);
      s[i] = static_cast<S>(step > 0 ? std::round(v / step) * step : v);
    }
    std::sort(s.begin(), s.end(), std::greater<>());
    return s;
  }
};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(product_top_k_test, scalars);

TYPED_TEST(product_top_k_test, equals_a_stable_sort_of_all_sums) {
  for (index_t k = 1; k <= 40; ++k)
    for (std::uint64_t seed = 0; seed < 6; ++seed)
      for (const index_t final_k : {index_t{1}, (k + 1) / 2, k, k * k})
        this->check(this->descending(k, 2 * seed, seed % 3 == 0 ? 0 : 0.2 * static_cast<double>(seed)),
                    this->descending(k, 2 * seed + 1, seed % 3 == 0 ? 0 : 0.2 * static_cast<double>(seed)), final_k);
}

TYPED_TEST(product_top_k_test, real_sizes_take_the_fast_plan) {
  for (const index_t k : {8, 16, 32, 42, 64})
    for (std::uint64_t seed = 0; seed < 20; ++seed) EXPECT_TRUE(this->check(this->descending(k, 2 * seed), this->descending(k, 2 * seed + 1), k)) << k;
}

TYPED_TEST(product_top_k_test, large_k) {
  for (const index_t k : {100, 128, 129, 200})
    for (std::uint64_t seed = 0; seed < 5; ++seed) this->check(this->descending(k, 2 * seed), this->descending(k, 2 * seed + 1), k);
}

TYPED_TEST(product_top_k_test, ties_go_to_the_lower_pair) {
  for (const index_t k : {5, 16, 31, 32, 33, 64})
    for (const double step : {0.05, 0.3, 1.0, 100.0})
      for (std::uint64_t seed = 0; seed < 10; ++seed) this->check(this->descending(k, 2 * seed, step), this->descending(k, 2 * seed + 1, step), k);
}

TYPED_TEST(product_top_k_test, rounded_sums_tie) {
  using S = TypeParam;
  for (const index_t k : {16, 32}) {  // sums of large and tiny numbers: many round to the same
    auto a = this->descending(k, 1), b = this->descending(k, 2);
    for (auto& v : b) v *= std::numeric_limits<S>::epsilon();
    this->check(a, b, k);
    this->check(b, a, k);
  }
}

TYPED_TEST(product_top_k_test, infinities) {
  using S = TypeParam;
  for (const index_t k : {4, 16, 32, 40})
    for (index_t lowest = 0; lowest <= k; lowest += 3)
      for (index_t highest = 0; highest + lowest <= k; highest += 2) {
        auto a = this->descending(k, 1), b = this->descending(k, 2);
        std::fill(a.end() - lowest, a.end(), S(-inf));
        std::fill(b.end() - lowest / 2, b.end(), S(-inf));
        std::fill_n(b.begin(), highest, S(inf));
        this->check(a, b, k);
        this->check(b, a, k);
        this->check(a, b, 1);
      }
}

}  // namespace product_top_k_tests
