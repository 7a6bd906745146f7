#include "lithe/kernels/bilinear_top_k.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "lithe/layers/initialise.hpp"

namespace bilinear_top_k_tests {

using namespace lithe;

template <class S>
struct bilinear_top_k : testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(bilinear_top_k, scalars);

template <class S>
matrix<S> random_matrix(index_t rows, index_t cols, std::uint64_t key) {
  matrix<S> m(rows, cols);
  fill_normal<S>(m, 1.0, rng_key{key});
  return m;
}

TYPED_TEST(bilinear_top_k, equals_a_sort_of_all_pairs) {
  using S = TypeParam;
  for (const index_t r : {1, 2, 3, 5})
    for (const index_t m : {1, 4, 15, 16, 17, 42}) {
      const auto rows = random_matrix<S>(r, m, 1), columns = random_matrix<S>(r, m, 2), core = random_matrix<S>(r, r, 3);
      matrix<S> all(m, m);
      for (index_t i = 0; i < m; ++i)
        for (index_t j = 0; j < m; ++j) {
          double sum = 0;
          for (index_t a = 0; a < r; ++a)
            for (index_t b = 0; b < r; ++b) sum += static_cast<double>(rows(a, i)) * static_cast<double>(core(a, b)) * static_cast<double>(columns(b, j));
          all(i, j) = static_cast<S>(sum);
        }
      for (const index_t k : {index_t{1}, m, m * m}) {
        std::vector<S> scores(static_cast<std::size_t>(k));
        std::vector<std::int32_t> cells(scores.size());
        bilinear_top_k_row<S>(rows, columns, core, k, scores.data(), cells.data(), {});
        std::vector<S> sorted(all.data(), all.data() + all.size());
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        EXPECT_EQ(std::set<std::int32_t>(cells.begin(), cells.end()).size(), cells.size());
        for (std::size_t j = 0; j < scores.size(); ++j) {
          const S tolerance = std::numeric_limits<S>::epsilon() * S(64);  // sums of at most 25 products of size 1 to 10
          EXPECT_NEAR(scores[j], sorted[j], tolerance) << r << " " << m << " " << k;
          EXPECT_NEAR(all.data()[cells[j]], scores[j], tolerance);
        }
      }
    }
}

TYPED_TEST(bilinear_top_k, ties_go_to_the_lower_pair_and_nan_comes_last_within_range) {
  using S = TypeParam;
  const index_t m = 5;
  const matrix<S> ones = matrix<S>::Ones(2, m), core = matrix<S>::Ones(2, 2);
  std::vector<S> scores(8);
  std::vector<std::int32_t> cells(8), first(8);
  std::iota(first.begin(), first.end(), 0);
  bilinear_top_k_row<S>(ones, ones, core, 8, scores.data(), cells.data(), {});
  EXPECT_EQ(cells, first);
  matrix<S> bad = ones;
  bad.col(0).setConstant(std::numeric_limits<S>::quiet_NaN());
  bilinear_top_k_row<S>(bad, ones, core, 8, scores.data(), cells.data(), {});
  EXPECT_EQ(cells.front(), m);  // row 0 is NaN
  bad.setConstant(std::numeric_limits<S>::quiet_NaN());
  bilinear_top_k_row<S>(bad, ones, core, 8, scores.data(), cells.data(), {});
  EXPECT_EQ(cells, first);
}

}  // namespace bilinear_top_k_tests
