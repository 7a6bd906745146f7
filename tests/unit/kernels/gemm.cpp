#include "lithe/kernels/gemm.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/core/random.hpp"
#include "support/malloc_count.hpp"  // Eigen's products take their packing buffers from malloc, past operator new

namespace gemm_tests {

using namespace lithe;

/// A matrix inside a larger one, so that its rows are not adjacent and start anywhere; the rim shows writes out of bounds.
template <class S>
class embedded {
 public:
  embedded(index_t rows, index_t cols, index_t spare, std::uint64_t seed) : rows_(rows), cols_(cols), whole_(rows + 2, cols + spare + 1) {
    const rng_key key{seed};
    for (index_t i = 0; i < whole_.size(); ++i) whole_.data()[i] = static_cast<S>(2 * uniform(key, static_cast<std::uint64_t>(i)) - 1);
    before_ = whole_;
  }
  [[nodiscard]] matrix_view<S> view() { return {whole_.data() + whole_.cols() + 1, rows_, cols_, whole_.cols()}; }
  [[nodiscard]] matrix_view<const S> view() const { return {whole_.data() + whole_.cols() + 1, rows_, cols_, whole_.cols()}; }
  [[nodiscard]] bool rim_is_untouched() {
    matrix<S> now = whole_, then = before_;
    now.block(1, 1, rows_, cols_).setZero();
    then.block(1, 1, rows_, cols_).setZero();
    return std::memcmp(now.data(), then.data(), static_cast<std::size_t>(now.size()) * sizeof(S)) == 0;
  }

 private:
  index_t rows_, cols_;
  matrix<S> whole_, before_;
};

enum class kind { nt, nn, tn, packed };
constexpr kind kinds[] = {kind::nt, kind::nn, kind::tn, kind::packed};

template <class S>
void run(kind which, matrix_view<const S> a, matrix_view<const S> b, matrix_view<S> c, const context& ctx, update mode) {
  if (which == kind::nt) return gemm_nt<S>(a, b, c, ctx, mode);
  if (which == kind::nn) return gemm_nn<S>(a, b, c, ctx, mode);
  if (which == kind::tn) return gemm_tn<S>(a, b, c, ctx, mode);
  packed_matrix<S> w;
  w.assign(b);
  gemm_packed<S>(a, w, c, ctx, mode);
}

template <class S>
struct operands {
  kind which;
  embedded<S> a, b, c;
  operands(kind w, index_t m, index_t n, index_t k, index_t spare)
      : which(w),
        a(w == kind::tn ? k : m, w == kind::tn ? m : k, spare, 1),
        b(w == kind::nt || w == kind::packed ? n : k, w == kind::nt || w == kind::packed ? k : n, spare, 2),
        c(m, n, spare, 3) {}
  void multiply(const context& ctx, update mode = update::assign) {
    run<S>(which, std::as_const(a).view(), std::as_const(b).view(), c.view(), ctx, mode);
  }
  /// By plain loops, in double.
  [[nodiscard]] matrix<double> expected(update mode) {
    const auto x = a.view(), y = b.view(), z = c.view();
    matrix<double> e(z.rows(), z.cols());
    const index_t depth = which == kind::tn ? x.rows() : x.cols();
    for (index_t i = 0; i < e.rows(); ++i)
      for (index_t j = 0; j < e.cols(); ++j) {
        double sum = mode == update::add ? static_cast<double>(z(i, j)) : 0;
        for (index_t k = 0; k < depth; ++k)
          sum += static_cast<double>(which == kind::tn ? x(k, i) : x(i, k)) *
                 static_cast<double>(which == kind::nt || which == kind::packed ? y(j, k) : y(k, j));
        e(i, j) = sum;
      }
    return e;
  }
};

/// A sum of k products of numbers below 1 errs by less than k epsilon times its absolute terms, which are below k + 1: k * (k + 1) epsilon
/// is a bound that no correct order of summation can miss; errors that matter are of the order of a term.
template <class S>
double tolerance(index_t k) {
  return static_cast<double>((k + 1) * (k + 1)) * static_cast<double>(std::numeric_limits<S>::epsilon());
}

template <class S>
void check(kind which, index_t m, index_t n, index_t k, index_t spare, const context& ctx = {}) {
  for (const update mode : {update::assign, update::add}) {
    operands<S> o(which, m, n, k, spare);
    const matrix<double> expected = o.expected(mode);
    o.multiply(ctx, mode);
    double worst = 0;
    for (index_t i = 0; i < m; ++i)
      for (index_t j = 0; j < n; ++j) worst = std::max(worst, std::abs(static_cast<double>(o.c.view()(i, j)) - expected(i, j)));
    EXPECT_LE(worst, tolerance<S>(k)) << "kind " << static_cast<int>(which) << ' ' << m << " x " << n << " x " << k << " spare " << spare;
    EXPECT_TRUE(o.c.rim_is_untouched()) << "kind " << static_cast<int>(which) << ' ' << m << " x " << n << " x " << k;
  }
}

template <class S>
struct gemm : testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(gemm, scalars);

TYPED_TEST(gemm, equals_plain_loops_for_every_remainder_of_rows) {
  for (const kind which : kinds)
    for (index_t m = 1; m <= 33; ++m) check<TypeParam>(which, m, 37, 19, 3);
}
TYPED_TEST(gemm, equals_plain_loops_for_every_remainder_of_columns) {
  for (const kind which : kinds)
    for (index_t n = 1; n <= 140; ++n) check<TypeParam>(which, n % 2 == 0 ? 13 : 3, n, 18, 5);
}
TYPED_TEST(gemm, equals_plain_loops_for_every_remainder_of_the_depth) {
  for (const kind which : kinds)
    for (index_t k = 1; k <= 40; ++k) check<TypeParam>(which, k % 2 == 0 ? 7 : 20, 70, k, 1);
}
TYPED_TEST(gemm, equals_plain_loops_past_the_depth_of_one_pass) {
  for (const kind which : kinds)
    for (const index_t m : {1, 5, 20})
      for (const index_t k : {511, 512, 513, 1100}) check<TypeParam>(which, m, 67, k, 0);
}
TYPED_TEST(gemm, equals_plain_loops_when_cut_into_pieces) {
  const parallel_executor exec(2);
  workspace work(exec);
  context ctx;
  ctx.exec = &exec;
  ctx.work = &work;
  for (const kind which : kinds) {
    check<TypeParam>(which, 200, 150, 300, 2, ctx);
    check<TypeParam>(which, 530, 70, 64, 0, ctx);
    check<TypeParam>(which, 2, 1000, 700, 0, ctx);
    check<TypeParam>(which, 6, 2100, 300, 1, ctx);
  }
}
TYPED_TEST(gemm, of_no_terms_is_zero_or_leaves_the_output) {
  for (const kind which : kinds)
    for (const index_t m : {1, 3, 40}) check<TypeParam>(which, m, 70, 0, 2);
}
TYPED_TEST(gemm, of_no_rows_or_columns_touches_nothing) {
  for (const kind which : kinds) {
    check<TypeParam>(which, 0, 7, 5, 2);
    check<TypeParam>(which, 7, 0, 5, 2);
    check<TypeParam>(which, 0, 0, 0, 2);
  }
}

template <class S>
bool same_bits(const matrix<S>& a, const matrix<S>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(S)) == 0;
}

TYPED_TEST(gemm, has_the_same_bits_with_any_number_of_workers) {
  using S = TypeParam;
  const index_t shapes[][3] = {{300, 200, 600}, {1, 900, 700}, {5, 1200, 600}, {16, 1000, 600}, {130, 500, 1030}, {1000, 130, 70}};
  for (const kind which : kinds)
    for (const auto& s : shapes) {
      matrix<S> first;
      for (const index_t workers : {1, 2, 7}) {
        const parallel_executor exec(workers, workers);
        workspace work(exec);
        context ctx;
        ctx.exec = &exec;
        ctx.work = &work;
        operands<S> o(which, s[0], s[1], s[2], 3);
        o.multiply(ctx);
        const matrix<S> c = o.c.view().map();
        if (workers == 1) first = c;
        EXPECT_TRUE(same_bits<S>(c, first)) << "kind " << static_cast<int>(which) << " workers " << workers;
      }
    }
}

/// One chain of multiply-adds in the order of the terms, each rounded once (or, without FMA, twice).
template <class S>
S chain(const S* x, const S* y, index_t n) {
  S sum = 0;
  for (index_t k = 0; k < n; ++k) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    sum = std::fma(x[k], y[k], sum);
#else
    const volatile S product = x[k] * y[k];
    sum += product;
#endif
  }
  return sum;
}

TYPED_TEST(gemm, elements_are_chains_in_order_so_rows_do_not_know_each_other) {
  using S = TypeParam;
  for (const index_t m : {40, 41, 45, 600})
    for (const kind which : {kind::nt, kind::packed}) {
      operands<S> o(which, m, 83, 700, 1);
      o.multiply({});
      const auto a = o.a.view(), b = o.b.view(), c = o.c.view();
      for (index_t i = 0; i < m; ++i)
        for (index_t j = 0; j < 83; ++j) ASSERT_EQ(c(i, j), chain(a.row(i), b.row(j), 700)) << m << ' ' << i << ' ' << j;
    }
}
TYPED_TEST(gemm, with_a_packed_weight_rows_have_the_same_bits_however_many_there_are) {
  using S = TypeParam;
  operands<S> o(kind::packed, 23, 300, 600, 1);
  o.multiply({});
  packed_matrix<S> w;
  w.assign(o.b.view());
  for (const index_t rows : {1, 2, 3, 5, 7, 8, 16})
    for (index_t i = 0; i < 23; i += rows) {
      const index_t n = std::min<index_t>(rows, 23 - i);
      matrix<S> part(n, 300);
      gemm_packed<S>(o.a.view().slice_rows(i, n), w, part, {});
      EXPECT_TRUE(same_bits<S>(part, o.c.view().slice_rows(i, n).map())) << rows << " rows at " << i;
    }
}
TYPED_TEST(gemm, starts_from_a_row_as_it_adds_to_that_row_repeated) {
  using S = TypeParam;
  for (const index_t m : {1, 2, 7, 8, 41})
    for (const index_t n : {5, 64, 83, 300})
      for (const kind which : {kind::nt, kind::packed}) {
        operands<S> o(which, m, n, 1100, 1);
        const matrix<S> row = matrix<S>::Random(1, n);
        o.c.view().map() = row.replicate(m, 1);
        const bool packed = which == kind::packed;
        packed_matrix<S> w;
        if (packed) w.assign(o.b.view());
        matrix<S> c = matrix<S>::Constant(m, n, S(7));
        if (packed)
          gemm_packed<S>(o.a.view(), w, c, {}, update::assign, row.data());
        else
          gemm_nt<S>(o.a.view(), o.b.view(), c, {}, update::assign, row.data());
        o.multiply({}, update::add);
        EXPECT_TRUE(same_bits<S>(c, o.c.view().map())) << m << " x " << n << (packed ? " packed" : "");
      }
}
TYPED_TEST(gemm, of_few_rows_has_the_same_bits_for_one_to_seven_rows) {
  using S = TypeParam;
  operands<S> o(kind::nt, 7, 150, 605, 1);
  o.multiply({});
  for (const index_t rows : {1, 2, 3, 5})
    for (index_t i = 0; i + rows <= 7; i += rows) {
      matrix<S> part(rows, 150);
      gemm_nt<S>(o.a.view().slice_rows(i, rows), o.b.view(), part, {});
      EXPECT_TRUE(same_bits<S>(part, o.c.view().slice_rows(i, rows).map())) << rows << " rows at " << i;
    }
}

TYPED_TEST(gemm, agrees_with_eigen) {
  using S = TypeParam;
  const matrix<S> a = matrix<S>::Random(90, 260), b = matrix<S>::Random(130, 260);
  const matrix<S> at = a.transpose(), bt = b.transpose(), expected = a.lazyProduct(bt);
  matrix<S> c(90, 130);
  gemm_nt<S>(a, b, c, {});
  EXPECT_TRUE(c.isApprox(expected, 100 * std::numeric_limits<S>::epsilon()));  // two orders of summing 260 terms
  gemm_nn<S>(a, bt, c, {});
  EXPECT_TRUE(c.isApprox(expected, 100 * std::numeric_limits<S>::epsilon()));
  gemm_tn<S>(at, bt, c, {});
  EXPECT_TRUE(c.isApprox(expected, 100 * std::numeric_limits<S>::epsilon()));
}

TYPED_TEST(gemm, keeps_nan_and_infinity_where_they_belong) {
  using S = TypeParam;
  constexpr S nan = std::numeric_limits<S>::quiet_NaN(), inf = std::numeric_limits<S>::infinity();
  for (const index_t m : {3, 9, 20}) {
    matrix<S> a = matrix<S>::Random(m, 50), b = matrix<S>::Random(70, 50), c = matrix<S>::Constant(m, 70, nan);
    a(1, 3) = nan;
    b(66, 49) = inf;
    gemm_nt<S>(a, b, c, {});  // the NaN of the old output is gone
    for (index_t i = 0; i < m; ++i)
      for (index_t j = 0; j < 70; ++j) {
        EXPECT_EQ(std::isnan(c(i, j)), i == 1) << i << ' ' << j;
        EXPECT_EQ(std::isinf(c(i, j)), i != 1 && j == 66) << i << ' ' << j;
      }
  }
}

TYPED_TEST(gemm, allocates_nothing_when_called_again) {
#if defined(LITHE_COUNTS_MALLOC)
  using S = TypeParam;
  workspace work;
  context ctx;
  ctx.work = &work;
  for (const index_t m : {1, 5, 12, 70, 300}) {
    const matrix<S> a = matrix<S>::Random(m, 600), at = a.transpose(), b = matrix<S>::Random(90, 600), bt = b.transpose();
    matrix<S> c(m, 90);
    packed_matrix<S> w;
    w.assign(b);
    long before = 0;
    for (int round = 0; round < 3; ++round) {
      if (round == 1) before = mallocs;
      gemm_nt<S>(a, b, c, ctx);
      gemm_nn<S>(a, bt, c, ctx);
      gemm_tn<S>(at, bt, c, ctx, update::add);
      gemm_packed<S>(a, w, c, ctx);
    }
    EXPECT_EQ(mallocs, before) << m << " rows";
  }
  const long before = mallocs;
  void* volatile block = std::malloc(1);  // volatile: clang takes an unused pair of calls away
  std::free(block);
  EXPECT_EQ(mallocs, before + 1) << "the counter counts";
#else
  GTEST_SKIP() << "malloc is not ours to count here";
#endif
}

TEST(packed_matrix, holds_weights_below_each_other_and_slices_of_them) {
  constexpr index_t parts = 3, n = 150, k = 37;
  const matrix<float> m = matrix<float>::Random(parts * n, k), x = matrix<float>::Random(11, k);
  packed_matrix<float> w;
  w.assign(m, parts);
  for (index_t i = 0; i < parts; ++i)
    for (const index_t first : {index_t{0}, index_t{2 * detail::tile_shape<float>::width}}) {
      const index_t rows = n - first;
      matrix<float> y(11, rows), expected(11, rows);
      gemm_packed<float>(x, w.part(i).slice_rows(first, rows), y, {});
      gemm_nt<float>(x, view(m).slice_rows(i * n + first, rows), expected, {});
      EXPECT_EQ(y, expected) << "part " << i << " from row " << first;
    }
}

TEST(packed_matrix, copies_clears_and_refreshes) {
  packed_matrix<float> w;
  EXPECT_TRUE(w.empty());
  const matrix<float> m = matrix<float>::Random(70, 20), other = matrix<float>::Random(9, 20), x = matrix<float>::Random(12, 20);
  w.assign(m);
  EXPECT_FALSE(w.empty());
  EXPECT_EQ(w.part(0).rows, 70);
  EXPECT_EQ(w.part(0).cols, 20);
  const packed_matrix<float> copy = w;
  w.assign(other);
  EXPECT_EQ(w.part(0).rows, 9);
  matrix<float> y(12, 70), expected(12, 70);
  gemm_packed<float>(x, copy, y, {});
  gemm_nt<float>(x, m, expected, {});
  EXPECT_EQ(y, expected);
  w.clear();
  EXPECT_TRUE(w.empty());
  EXPECT_EQ(w.part(0).rows, 0);
}

TEST(gemm_nested, runs_inside_the_body_of_a_loop) {
  const parallel_executor exec(2);
  workspace work(exec);
  context ctx;
  ctx.exec = &exec;
  ctx.work = &work;
  const matrix<float> a = matrix<float>::Random(640, 100), b = matrix<float>::Random(90, 100);
  matrix<float> c(640, 90), expected(640, 90);
  gemm_nt<float>(a, b, expected, {});
  exec.run(640, 64, [&](index_t first, index_t last) {
    gemm_nt<float>(view(a).slice_rows(first, last - first), b, view(c).slice_rows(first, last - first), ctx);
  });
  EXPECT_EQ(c, expected);
}

}  // namespace gemm_tests
