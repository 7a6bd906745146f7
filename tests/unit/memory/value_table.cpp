#include "lithe/layers/memory/value_table.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"

namespace value_table_tests {

using namespace lithe;

static_assert(value_table<dense_table<float>> && value_table<dense_table<double>>);
static_assert(value_table<shared_table<dense_table<float>>>);
static_assert(value_table<shared_table<shared_table<dense_table<float>>>>, "a handle is itself a value table");
static_assert(!value_table<matrix<float>>);
static_assert(sparse_gradient<row_gradient<float>> && sparse_gradient<shared_gradient<float>> && !sparse_gradient<matrix<float>>);

template <class S>
struct value_table_test : testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(value_table_test, scalars);

TYPED_TEST(value_table_test, rows_are_aligned_and_start_at_zero) {
  using S = TypeParam;
  for (const index_t cols : {1, 15, 16, 17, 100}) {
    dense_table<S> table(7, cols);
    EXPECT_EQ(table.rows(), 7);
    EXPECT_EQ(table.cols(), cols);
    for (index_t i = 0; i < 7; ++i) EXPECT_EQ(reinterpret_cast<std::uintptr_t>(table.view().row(i)) % 64, 0U);
    EXPECT_TRUE((table.view().map().array() == S(0)).all());
  }
}

TYPED_TEST(value_table_test, rows_are_written_and_read) {
  using S = TypeParam;
  dense_table<S> table(5, 3);
  const std::vector<S> in{1, 2, 3};
  std::vector<S> out(3);
  table.write_row(4, in);
  table.read_row(4, out);
  EXPECT_EQ(out, in);
  EXPECT_EQ(table.view()(4, 1), S(2));
  table.read_row(3, out);
  EXPECT_EQ(out, (std::vector<S>{0, 0, 0}));
  EXPECT_THROW(table.read_row(5, out), index_error);
  EXPECT_THROW(table.read_row(-1, out), index_error);
  EXPECT_THROW(table.write_row(0, std::vector<S>(4)), shape_error);
}

TYPED_TEST(value_table_test, refuses_impossible_sizes) {
  using table = dense_table<TypeParam>;
  EXPECT_THROW(table(0, 4), config_error);
  EXPECT_THROW(table(4, 0), config_error);
  EXPECT_THROW(table(index_t{1} << 31, 1), config_error);
}

TYPED_TEST(value_table_test, copies_are_deep) {
  using S = TypeParam;
  dense_table<S> a(1 << 13, 200, rng_key{1});  // large enough for huge pages
  dense_table<S> b = a;
  EXPECT_EQ(a.view().map(), b.view().map());
  b.view()(3, 4) += S(1);
  EXPECT_NE(a.view()(3, 4), b.view()(3, 4));
  a = b;
  EXPECT_EQ(a.view()(3, 4), b.view()(3, 4));
  const S* where = b.view().data();
  const dense_table<S> c = std::move(b);
  EXPECT_EQ(c.view().data(), where);
  EXPECT_EQ(b.view().data(), nullptr);  // NOLINT(bugprone-use-after-move)
  EXPECT_EQ(b.rows() * b.cols(), 0);
}

TYPED_TEST(value_table_test, starts_normal_whatever_the_workers) {
  using S = TypeParam;
  const index_t rows = 3000, cols = 130;
  const parallel_executor two(2), seven(7);
  const dense_table<S> a(rows, cols, rng_key{5}), b(rows, cols, rng_key{5}, two), c(rows, cols, rng_key{5}, seven), other(rows, cols, rng_key{6});
  EXPECT_EQ(a.view().map(), b.view().map());
  EXPECT_EQ(a.view().map(), c.view().map());
  EXPECT_NE(a.view().map(), other.view().map());
  // The moments of z = √cols v over n numbers, each within 5 standard errors; the errors of the mean square, fourth moment and of
  // correlations of normal numbers are √(2/n), √(96/n) and 1/√n.
  const auto z = (a.view().map().template cast<double>() * std::sqrt(static_cast<double>(cols))).array().eval();
  const auto mean = [](const Eigen::ArrayXXd& values) {  // a loop: GCC 12 warns about Eigen's sums of doubles under AVX-512
    double sum = 0;
    for (index_t i = 0; i < values.size(); ++i) sum += values.data()[i];
    return sum / static_cast<double>(values.size());
  };
  const double n = static_cast<double>(rows * cols), error = 1 / std::sqrt(n);
  EXPECT_NEAR(mean(z), 0, 5 * error);
  EXPECT_NEAR(mean(z.square()), 1, 5 * std::sqrt(2.0) * error);
  EXPECT_NEAR(mean(z.cube()), 0, 5 * std::sqrt(15.0) * error);
  EXPECT_NEAR(mean(z.square().square()), 3, 5 * std::sqrt(96.0) * error);
  for (const index_t lag : {1, 2, 4, 64})
    EXPECT_NEAR(mean(z.leftCols(cols - lag) * z.rightCols(cols - lag)), 0, 5 / std::sqrt(static_cast<double>(rows * (cols - lag)))) << lag;
  EXPECT_NEAR(mean(z.topRows(rows - 1) * z.bottomRows(rows - 1)), 0, 5 * error);
  EXPECT_NEAR(mean(z.leftCols(64).square() * z.middleCols(64, 64).square()), 1, 5 * std::sqrt(8.0 / static_cast<double>(rows * 64)));
}

TYPED_TEST(value_table_test, products_go_to_the_kernels) {
  using S = TypeParam;
  const dense_table<S> table(50, 20, rng_key{1});
  const std::vector<slot_t> slots{3, 7, 3, -1, 49, 0};
  const std::vector<S> weights{1, 2, 3, 4, 5, 6};
  matrix<S> y(3, 20), dy = matrix<S>::Ones(3, 20);
  table.gather_sum({slots, weights, 2}, y, {});
  const auto row_1_is = [&](S times) {  // times row 3: one or two products, exact to a few roundings
    for (index_t c = 0; c < 20; ++c)
      EXPECT_NEAR(static_cast<double>(y(1, c)), static_cast<double>(times * table.view()(3, c)), 4 * static_cast<double>(std::numeric_limits<S>::epsilon()));
  };
  row_1_is(S(3));
  table.gather_sum({slots, weights, 2}, y, {}, update::add);
  row_1_is(S(6));
  std::vector<S> dw(6);
  table.row_dots(slots, 2, dy, dw, {});
  double sum = 0;
  for (index_t c = 0; c < 20; ++c) sum += static_cast<double>(table.view()(49, c));
  EXPECT_NEAR(static_cast<double>(dw[4]), sum, 1e-5);  // 20 numbers near 0.2 in float
  EXPECT_EQ(dw[3], S(0));
  row_gradient<S> g;
  g.total_rows = 50;
  g.cols = 20;
  table.scatter_add({slots, weights, 2}, dy, g, {});
  EXPECT_EQ(g.rows, (std::vector<slot_t>{0, 3, 7, 49}));
  EXPECT_EQ(g(3, 19), S(4));
  EXPECT_EQ(g(1, 0), S(0));
}

/// A layer with a table, and a model of two such layers, for the walks.
template <class Table>
struct reader {
  using scalar = typename Table::scalar;
  struct record {};
  struct gradient {
    typename Table::gradient values;
  };
  Table values;
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("values", s.values...);
  }
};
template <class Table>
struct two_readers {
  using scalar = typename Table::scalar;
  struct record {};
  struct gradient {
    typename reader<Table>::gradient first, second;
  };
  reader<Table> first, second;
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("first", s.first...);
    f("second", s.second...);
  }
};

TYPED_TEST(value_table_test, a_private_table_has_a_gradient_of_its_own) {
  using S = TypeParam;
  const two_readers<dense_table<S>> model{{dense_table<S>(9, 4)}, {dense_table<S>(5, 4)}};
  auto g = make_gradient(model);
  EXPECT_EQ(rows_of(g.first.values).total_rows, 9);
  EXPECT_EQ(rows_of(g.second.values).total_rows, 5);
  EXPECT_EQ(g.first.values.cols, 4);
  EXPECT_EQ(count_parameters(model), 56);
}

TYPED_TEST(value_table_test, layers_that_share_a_table_add_to_one_gradient) {
  using S = TypeParam;
  using handle = shared_table<dense_table<S>>;
  const handle table(dense_table<S>(9, 4));
  const two_readers<handle> model{{table}, {table}};
  EXPECT_EQ(count_parameters(model), 36);
  auto g = make_gradient(model);
  EXPECT_EQ(&rows_of(g.first.values), &rows_of(g.second.values));
  const std::vector<slot_t> slots{2, 5};
  const std::vector<S> weights{1, 2};
  const matrix<S> dy = matrix<S>::Ones(1, 4);
  model.first.values.scatter_add({slots, weights, 2}, dy, g.first.values, {});
  model.second.values.scatter_add({slots, weights, 2}, dy, g.second.values, {});
  EXPECT_EQ(g.first.values(5, 3), S(4));
  EXPECT_EQ(g.second.values(2, 0), S(2));
  set_zero(model, g);
  EXPECT_EQ(rows_of(g.second.values).count(), 0);
  typename handle::gradient empty;
  EXPECT_THROW(model.first.values.scatter_add({slots, weights, 2}, dy, empty, {}), state_error);
}

TYPED_TEST(value_table_test, a_copied_model_shares_the_table_and_a_clone_does_not) {
  using S = TypeParam;
  using handle = shared_table<dense_table<S>>;
  const handle table(dense_table<S>(9, 4, rng_key{1}));
  two_readers<handle> model{{table}, {table}};
  auto copy = model;
  auto apart = clone(model);
  EXPECT_EQ(copy.first.values.identity(), table.identity());
  EXPECT_NE(apart.first.values.identity(), table.identity());
  EXPECT_EQ(apart.first.values.identity(), apart.second.values.identity());
  EXPECT_EQ(apart.first.values.table().view().map(), table.table().view().map());
  model.first.values.write_row(0, std::vector<S>{1, 2, 3, 4});
  EXPECT_EQ(copy.second.values.table().view()(0, 3), S(4));
  EXPECT_NE(apart.second.values.table().view()(0, 3), S(4));
  const handle single = clone(table);
  EXPECT_NE(single.identity(), table.identity());
  EXPECT_EQ(single.rows(), 9);
}

}  // namespace value_table_tests
