#include <thread>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "trial.hpp"

namespace stranger {

/// A matrix as others write one.
class matrix {
 public:
  matrix(int rows, int cols) : rows_(rows), cols_(cols), numbers_(static_cast<std::size_t>(rows * cols)) {}
  int height() const { return rows_; }
  int width() const { return cols_; }
  double* begin() { return numbers_.data(); }
  const double* begin() const { return numbers_.data(); }
  double& at(int i, int j) { return numbers_[static_cast<std::size_t>(i * cols_ + j)]; }

 private:
  int rows_, cols_;
  std::vector<double> numbers_;
};

/// The members of std::mdspan<double, dextents<int, 2>, layout_stride> that a view of it needs.
struct span_2d {
  double* pointer;
  int extents[2], strides[2];
  double* data_handle() const { return pointer; }
  int extent(std::size_t r) const { return extents[r]; }
  int stride(std::size_t r) const { return strides[r]; }
};

}  // namespace stranger

template <>
struct lithe::matrix_access<stranger::matrix> {
  static double* data(stranger::matrix& m) { return m.begin(); }
  static const double* data(const stranger::matrix& m) { return m.begin(); }
  static std::ptrdiff_t rows(const stranger::matrix& m) { return m.height(); }
  static std::ptrdiff_t cols(const stranger::matrix& m) { return m.width(); }
  static std::ptrdiff_t stride(const stranger::matrix& m) { return m.width(); }
};

namespace {

using namespace trials;

static_assert(matrix_like<stranger::matrix> && matrix_like<const stranger::matrix> && matrix_like<stranger::span_2d>);
static_assert(!matrix_like<std::vector<double>> && !matrix_like<Eigen::MatrixXd>);

using attention_part = residual<sequential<attention<double>, dropout<double>>>;
using memory_part = residual<product_key_memory<double>>;
using block = sequential<attention_part, memory_part, residual<feed_forward<double>>>;
using model = stack<block>;

model make_model() {
  model m;
  for (std::uint64_t i = 0; i < 2; ++i)
    m.blocks.push_back(block(attention_part{sequential<attention<double>, dropout<double>>(attention<double>({.inputs = 6, .heads = 2, .causal = true}, rng_key{i}),
                                                                                         dropout<double>(0.3))},
                             memory_part{product_key_memory<double>({.inputs = 6, .heads = 2, .sub_keys = 4, .key_width = 4, .top_k = 3}, rng_key{i + 10})},
                             residual<feed_forward<double>>{feed_forward<double>({6, 9, activation::silu, true}, rng_key{i + 20})}));
  return m;
}

TEST(user_types, go_in_and_out_of_a_model_with_a_default_context) {
  const model m = make_model();
  const auto x = random_matrix(5, 6, 1);
  matrix<double> expected(5, 6);
  m.forward(x, expected, {});

  stranger::matrix in(5, 6), out(5, 6);
  for (int i = 0; i < 5; ++i)
    for (int j = 0; j < 6; ++j) in.at(i, j) = x(i, j);
  m.forward(in, out, {});
  EXPECT_EQ(view(out).map(), expected);
  const stranger::matrix& const_in = in;
  m.forward(const_in, out, {});
  EXPECT_EQ(view(out).map(), expected);

  std::vector<double> memory(100, -1.0);  // rows of 6 in rows of 9, and NaN where nothing may be read
  const stranger::span_2d spread{memory.data() + 2, {5, 6}, {9, 1}};
  std::fill(memory.begin(), memory.end(), std::numeric_limits<double>::quiet_NaN());
  for (int i = 0; i < 5; ++i)
    for (int j = 0; j < 6; ++j) memory[static_cast<std::size_t>(2 + 9 * i + j)] = x(i, j);
  m.forward(spread, out, {});
  EXPECT_EQ(view(out).map(), expected);
  m.forward(x, spread, {});
  EXPECT_EQ(view(spread).map(), expected);
  EXPECT_TRUE(std::isnan(memory[8]) && std::isnan(memory[1]));  // nothing was written beside the rows

  matrix<double> wide = matrix<double>::Constant(9, 9, -1);
  wide.block(2, 1, 5, 6) = x;
  m.forward(wide.block(2, 1, 5, 6), expected.topRows(5), {});
  EXPECT_EQ(view(out).map(), expected);
  m.forward(x, wide.block(2, 1, 5, 6), {});
  EXPECT_EQ(wide.block(2, 1, 5, 6), expected);
  EXPECT_EQ(wide.col(0).minCoeff(), -1);

  const stranger::span_2d columns{memory.data(), {5, 6}, {1, 5}};
  EXPECT_THROW(m.forward(columns, out, {}), shape_error);
}

TEST(user_types, go_through_backward) {
  const model m = make_model();
  const auto x = random_matrix(5, 6, 1), dy = random_matrix(5, 6, 2);
  matrix<double> y(5, 6), expected(5, 6);
  record_of<model> r;
  auto g = make_gradient(m), h = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, dy, expected, g, {});
  stranger::matrix in(5, 6), up(5, 6), down(5, 6);
  view(in).map() = x;
  view(up).map() = dy;
  m.backward(in, r, up, down, h, {});
  EXPECT_EQ(view(down).map(), expected);
}

TEST(concurrent_use, one_const_model_in_two_threads) {
  // Forward and backward of one model at the same time, with contexts, workspaces, records and gradients of their own: the results are
  // those of one call after the other. Under the thread sanitizer this also shows that the model is only read.
  const model m = make_model();
  struct pass {
    training t;
    matrix<double> x, dy, y, dx;
    gradient_of<model> g;
    explicit pass(std::uint64_t seed) : t(seed), x(random_matrix(12, 6, seed)), dy(random_matrix(12, 6, seed + 1)), y(12, 6), dx(12, 6) {}
    void run(const model& shared) {
      for (int i = 0; i < 20; ++i) {
        g = make_gradient(shared);
        record_of<model> r;
        shared.forward(x, y, r, t.ctx);
        shared.backward(x, r, dy, dx, g, t.ctx);
      }
    }
  };
  pass alone[2] = {pass(1), pass(2)}, together[2] = {pass(1), pass(2)};
  for (pass& p : alone) p.run(m);
  std::thread other([&] { together[1].run(m); });
  together[0].run(m);
  other.join();
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(alone[i].y, together[i].y);
    EXPECT_EQ(alone[i].dx, together[i].dx);
    for (std::size_t b = 0; b < 2; ++b) {
      const auto& ga = std::get<0>(alone[i].g.blocks[b].layers).inner;
      const auto& gt = std::get<0>(together[i].g.blocks[b].layers).inner;
      EXPECT_EQ(std::get<0>(ga.layers).query.weight, std::get<0>(gt.layers).query.weight);
      const auto& va = std::get<1>(alone[i].g.blocks[b].layers).inner.values;
      const auto& vt = std::get<1>(together[i].g.blocks[b].layers).inner.values;
      EXPECT_EQ(va.rows, vt.rows);
      EXPECT_EQ(va.values().map(), vt.values().map());
    }
  }
  EXPECT_NE(alone[0].y, alone[1].y);
}

}  // namespace
