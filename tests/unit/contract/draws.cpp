// Random numbers as functions of (key, index), and the matrices that are filled with them.
#include <gtest/gtest.h>

#include <set>

#include "lithe/core/random.hpp"
#include "lithe/layers/initialise.hpp"

namespace draw_tests {

using namespace lithe;

// Salmon et al. 2011, the known answers of Philox-4x32-10 in their Random123 library (kat_vectors).
TEST(draws, philox_gives_its_authors_answers) {
  EXPECT_EQ(philox({0}, 0), (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~std::uint64_t{0}}, ~std::uint64_t{0}, ~std::uint64_t{0}),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x299f31d0a4093822}, 0x85a308d3243f6a88, 0x0370734413198a2e),
            (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(draws, number_i_of_a_matrix_is_number_i_of_the_stream) {
  const rng_key key{7};
  matrix<double> m(37, 29);
  fill_uniform<double>(m, 0.5, key);
  for (index_t i = 0; i < m.size(); ++i) EXPECT_EQ(m.data()[i], 0.5 * (2 * uniform(key, static_cast<std::uint64_t>(i)) - 1)) << i;
  fill_normal<double>(m, 3, key);
  for (index_t i = 0; i < m.size(); ++i) EXPECT_EQ(m.data()[i], 3 * normal(key, static_cast<std::uint64_t>(i))) << i;
  fill_normal<double>(m, 0, key);
  EXPECT_TRUE((m.array() == 0).all());
}

// Of n = 200,000 independent numbers the mean is off by 1/√n, the variance by √(2/n), the fourth moment by √(96/n): bounds of five times that.
TEST(draws, normal_numbers_have_the_moments_of_a_normal_distribution) {
  constexpr index_t n = 200'000;
  double mean = 0, square = 0, fourth = 0, between_neighbours = 0, last = 0;
  for (index_t i = 0; i < n; ++i) {
    const double x = normal({3}, static_cast<std::uint64_t>(i));
    mean += x / n;
    square += x * x / n;
    fourth += x * x * x * x / n;
    between_neighbours += x * last / n;
    last = x;
  }
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(square, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth, 3, 5 * std::sqrt(96.0 / n));
  EXPECT_NEAR(between_neighbours, 0, 5 / std::sqrt(n));
}

TEST(draws, the_rarest_words_give_finite_normal_numbers) {
  EXPECT_NEAR(detail::normal_of(0, 0), std::sqrt(2 * 33 * std::numbers::ln2), 1e-9);  // (0 + 1/2) / 2^32
  EXPECT_TRUE(std::isfinite(detail::normal_of(~0U, ~0U)));
  EXPECT_NEAR(detail::normal_of(~0U, 0), 0, 2e-5);
}

TEST(draws, children_of_keys_are_all_different) {
  std::set<std::uint64_t> seen;
  for (std::uint64_t i = 0; i < 100; ++i)
    for (std::uint64_t j = 0; j < 100; ++j) seen.insert(rng_key{5}.child(i).child(j).value);
  EXPECT_EQ(seen.size(), 10'000U);
  EXPECT_EQ(rng_key{0}.child(0).value, 0xe220a8397b1dcdafU);  // the first number of SplitMix64 from 0
}

}  // namespace draw_tests
