#include <gtest/gtest.h>

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/kernels/causal_conv.hpp"
#include "lithe/kernels/gather.hpp"
#include "lithe/kernels/norm.hpp"

// Sums of N equal numbers, for which one chain of float additions is off by 6e-4 at 65,536 and by 1e-2 at a million.
namespace long_sums_tests {

using namespace lithe;

constexpr index_t many = 65536, million = index_t{1} << 20;

/// Chains of at most 1024 terms are off by 1e-5, the chain of the 2048 sums of 512 terms of a million, onto what c was,
/// by 3e-5.
double allowed(index_t n) { return n == many ? 1.25e-5 : 5e-5; }

/// The largest relative error of numbers that should all be `expected`.
template <class M>
double error(const M& m, double expected) {
  return (m.template cast<double>().array() / expected - 1).abs().maxCoeff();
}

TEST(long_sums, weight_gradients) {
  const context ctx;
  struct size {
    index_t n, rows, cols;
  };
  // Few rows of c; narrow rows of b in place; packed; all with tails.
  for (const auto& [n, rows, cols] :
       {size{many, 3, 5}, size{million, 8, 5}, size{many, 20, 19}, size{million, 17, 3}, size{many, 21, 140}}) {
    const matrix<float> a = matrix<float>::Constant(n, rows, 0.7F), b = matrix<float>::Constant(n, cols, 0.3F);
    matrix<float> c(rows, cols);
    gemm_tn<float>(a, b, c, ctx);
    const double expected = static_cast<double>(n) * static_cast<double>(0.7F) * static_cast<double>(0.3F);
    EXPECT_LT(error(c, expected), allowed(n)) << n << ' ' << rows << ' ' << cols;
    gemm_tn<float>(a, b, c, ctx, update::add);
    EXPECT_LT(error(c, 2 * expected), allowed(n)) << n << ' ' << rows << ' ' << cols;
  }
}

TEST(long_sums, products_with_a_long_inner_side) {
  const context ctx;
  for (const index_t n : {many, million})
    for (const index_t rows : {1, 3, 9}) {
      if (n == million && rows > 3) continue;  // the same path, for longer
      const index_t cols = n == many ? 70 : 5;
      const matrix<float> a = matrix<float>::Constant(rows, n, 0.7F), b = matrix<float>::Constant(cols, n, 0.3F);
      const double expected = static_cast<double>(n) * static_cast<double>(0.7F) * static_cast<double>(0.3F);
      matrix<float> c(rows, cols);
      gemm_nt<float>(a, b, c, ctx);
      EXPECT_LT(error(c, expected), allowed(n)) << "nt " << n << ' ' << rows;
      packed_matrix<float> w;
      w.assign(b);
      const matrix<float> bias = matrix<float>::Constant(1, cols, 100.0F);
      gemm_packed<float>(a, w, c, ctx, update::assign, bias.data());
      EXPECT_LT(error(c, expected + 100), allowed(n)) << "packed " << n << ' ' << rows;
    }
  for (const index_t rows : {3, 20}) {
    const matrix<float> a = matrix<float>::Constant(rows, many, 0.7F), b = matrix<float>::Constant(many, 70, 0.3F);
    matrix<float> c(rows, 70);
    gemm_nn<float>(a, b, c, ctx);
    EXPECT_LT(error(c, many * static_cast<double>(0.7F) * static_cast<double>(0.3F)), allowed(many)) << "nn " << rows;
  }
}

/// The wide panels of one row, for which several are read at once.
TEST(long_sums, one_row_has_the_bits_of_many) {
  const context ctx;
  const index_t depth = 2500, cols = 4 * detail::tile_shape<float>::width;
  const matrix<float> a = matrix<float>::Random(9, depth), b = matrix<float>::Random(cols, depth);
  packed_matrix<float> w;
  w.assign(b);
  matrix<float> all(9, cols), one(1, cols);
  gemm_packed<float>(a, w, all, ctx);
  gemm_packed<float>(view(a).slice_rows(4, 1), w, one, ctx);
  EXPECT_EQ(one, all.row(4));
}

TEST(long_sums, gathered_and_scattered_rows) {
  const context ctx;
  for (const index_t n : {many, million}) {
    constexpr index_t D = 67;  // whole packets and a tail
    const double expected = static_cast<double>(n) * static_cast<double>(0.7F) * static_cast<double>(0.3F);
    const matrix<float> row = matrix<float>::Constant(1, D, 0.3F);
    const std::vector<slot_t> slots(static_cast<std::size_t>(n), 0);
    const std::vector<float> weights(slots.size(), 0.7F);
    matrix<float> y(1, D);
    gather_sum<float>(row, {slots, weights, n}, y, ctx);
    EXPECT_LT(error(y, expected), allowed(n));
    gather_sum<float>(row, {slots, weights, n}, y, ctx, update::add);
    EXPECT_LT(error(y, 2 * expected), allowed(n));

    const matrix_view<const float> dy(row.data(), n, D, 0);  // all rows are the same
    matrix<float> dense = matrix<float>::Zero(2, D);
    scatter_add<float>({slots, weights, 1}, dy, dense, ctx);
    EXPECT_LT(error(dense.row(0), expected), allowed(n));
    row_gradient<float> g;
    g.total_rows = 2;
    g.cols = D;
    for (const int times : {1, 2}) {
      scatter_add<float>({slots, weights, 1}, dy, g, ctx);
      EXPECT_LT(error(g.values().map(), times * expected), allowed(n));
    }
    const matrix<float> x = matrix<float>::Constant(1, n, 0.3F), wide = matrix<float>::Constant(1, n, 0.7F);
    std::vector<float> dw(1);
    row_dots<float>(wide, std::span(slots).first(1), 1, x, dw, ctx);
    EXPECT_NEAR(static_cast<double>(dw[0]) / expected, 1, allowed(n));
  }
}

TEST(long_sums, sums_over_rows) {
  const context ctx;
  for (const index_t n : {many, million}) {
    constexpr index_t D = 5;
    const double expected = static_cast<double>(n) * static_cast<double>(0.3F);
    const matrix<float> x = matrix<float>::Constant(n, D, 0.3F);
    matrix<float> sums = matrix<float>::Zero(1, D);
    add_row_sums<float>(x, sums, ctx);
    EXPECT_LT(error(sums, expected), 1e-5);
    detail::sum_over_rows<float>(n, sums, ctx, [&](index_t first, index_t last, matrix_view<float> piece) {
      for (index_t t = first; t < last; ++t) piece.row_array(0) += x.row(t).array();
    });
    EXPECT_LT(error(sums, expected), 1e-5);

    const matrix<float> taps = matrix<float>::Constant(2, D, 1.0F);
    matrix<float> dx = matrix<float>::Zero(n, D), dw = matrix<float>::Zero(2, D);
    causal_conv_backward<float>(x, taps, x, dx, dw, ctx);
    EXPECT_LT(error(dw.row(1), expected * static_cast<double>(0.3F)), 1e-5);
  }
}

/// One query, and a few of which the later see more, against as many equal values: the answer is the value, whatever
/// the scores.
TEST(long_sums, a_decoded_row_over_many_keys) {
  const context ctx;
  constexpr index_t W = 16;
  for (const index_t rows : {1, 3}) {
    const index_t n = many;
    const matrix<float> q = matrix<float>::Constant(rows, W, 0.01F), v = matrix<float>::Constant(n, W, 0.3F);
    matrix<float> k = matrix<float>::Constant(n, W, 0.02F), o(rows, W), full(rows, W), lse(1, rows);
    k.bottomRows(n / 2).setConstant(0.03F);
    std::vector<index_t> visible;
    for (index_t i = 0; i < rows; ++i) visible.push_back(n - rows + 1 + i);
    attend_few<float>(q, k.data(), v.data(), visible.data(), o, ctx);
    EXPECT_LT(error(o, 0.3F), 1e-5) << rows;
    attend<float>(q, k, v, 1.0F, see_all{}, full, lse.data(), ctx);
    EXPECT_LT(error(full, 0.3F), 1e-5) << rows;
  }
}

}  // namespace long_sums_tests
