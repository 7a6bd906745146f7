#include "lithe/layers/axial_positions.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/cache.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/same_bits.hpp"

namespace axial_positions_tests {

using namespace lithe;

static_assert(layer<axial_positions<float>> && layer<axial_positions<double>>);
static_assert(cached_layer<axial_positions<float>>);
static_assert(looks_across_tokens<axial_positions<float>>);

using offsets = std::vector<index_t>;

matrix<double> random(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_uniform<double>(m, 1, rng_key{seed});
  return m;
}
matrix<double> run(const axial_positions<double>& l, const matrix<double>& x, const context& ctx) {
  matrix<double> y(x.rows(), x.cols());
  l.forward(x, y, ctx);
  return y;
}
axial_positions_config grid(offsets shape, offsets widths) { return {.shape = std::move(shape), .widths = std::move(widths)}; }

TEST(axial_positions, equal_a_dense_table_for_any_number_of_axes) {
  const axial_positions<double> two(grid({3, 4}, {2, 5}), rng_key{1}), wide(grid({1, 12}, {2, 5}), rng_key{1}),
      tall(grid({12, 1}, {2, 5}), rng_key{1});
  const matrix<double> x = random(12, 7, 2);
  const matrix<double> y = run(two, x, {}), w = run(wide, x, {}), t = run(tall, x, {});
  for (index_t p = 0; p < 12; ++p)
    for (index_t j = 0; j < 7; ++j) {
      EXPECT_EQ(y(p, j), x(p, j) + (j < 2 ? two.weights[0](p / 4, j) : two.weights[1](p % 4, j - 2)));
      EXPECT_EQ(w(p, j), x(p, j) + (j < 2 ? wide.weights[0](0, j) : wide.weights[1](p, j - 2)));
      EXPECT_EQ(t(p, j), x(p, j) + (j < 2 ? tall.weights[0](p, j) : tall.weights[1](0, j - 2)));
    }
  const axial_positions<double> one(grid({12}, {7}), rng_key{1}), three(grid({2, 3, 4}, {1, 2, 4}), rng_key{1});
  const matrix<double> o = run(one, x, {}), longer = random(24, 7, 3), z = run(three, longer, {});
  for (index_t p = 0; p < 24; ++p)
    for (index_t j = 0; j < 7; ++j) {
      if (p < 12) {
        EXPECT_EQ(o(p, j), x(p, j) + one.weights[0](p, j));
      }
      EXPECT_EQ(z(p, j), longer(p, j) + (j < 1   ? three.weights[0](p / 12, j)
                                         : j < 3 ? three.weights[1](p / 4 % 3, j - 1)
                                                 : three.weights[2](p % 4, j - 3)));
    }
  EXPECT_EQ(two.positions(), 12);
  EXPECT_EQ(three.positions(), 24);
}

TEST(axial_positions, bear_the_public_names) {
  axial_positions<float> l(grid({3, 4, 2}, {2, 5, 3}), rng_key{1});
  std::vector<std::string> names;
  for_each_tensor([&](const std::string& name, role, const auto&) { names.push_back(name); }, l);
  EXPECT_EQ(names, (std::vector<std::string>{"weights.0", "weights.1", "weights.2"}));
  EXPECT_EQ(count_parameters(l), 3 * 2 + 4 * 5 + 2 * 3);
  EXPECT_EQ(make_gradient(l).weights[1].rows(), 4);
  // A grid of a whole checkpoint: 64 x 64 for the public configuration's defaults.
  EXPECT_EQ(count_parameters(axial_positions<float>(grid({64, 64}, {64, 192}), rng_key{1})), 64 * 256);
}

TEST(axial_positions, positions_start_anew_in_each_sequence) {
  const axial_positions<double> l(grid({3, 4}, {2, 5}), rng_key{1});
  const matrix<double> x = random(12, 7, 2);
  const offsets rows{0, 5, 5, 6, 12};
  const matrix<double> y = run(l, x, {.rows = {rows}});
  for (std::size_t s = 0; s + 1 < rows.size(); ++s) {
    const index_t n = rows[s + 1] - rows[s];
    EXPECT_EQ(y.middleRows(rows[s], n), run(l, matrix<double>(x.middleRows(rows[s], n)), {}));
  }
}

TEST(axial_positions, gradients_equal_finite_differences) {
  const offsets rows{0, 9, 9, 10, 16};
  for (const double dropout : {0.0, 0.4}) {
    axial_positions_config c = grid({3, 2, 2}, {3, 2, 4});
    c.dropout = dropout;
    const axial_positions<double> l(c, rng_key{1});
    const auto report = gradient_check(l, random(16, 9, 2), {.key = rng_key{5}, .rows = {rows}, .train = true});
    EXPECT_LT(report.worst(), 1e-8) << report.where();  // linear: only the rounding of the differences
    EXPECT_GT(report.smallest_gradient(), 0.1);
  }
}

TEST(axial_positions, unused_rows_have_a_gradient_of_exactly_zero) {
  const axial_positions<double> l(grid({4, 5}, {2, 3}), rng_key{1});
  const matrix<double> x = random(7, 5, 2), dy = random(7, 5, 3);
  matrix<double> dx(7, 5);
  axial_positions<double>::record r;
  auto g = make_gradient(l);
  l.backward(x, r, dy, dx, g, {.rows = {offsets{0, 7}}});
  EXPECT_EQ(dx, dy);
  EXPECT_TRUE((g.weights[0].topRows(2).array() != 0).all());
  EXPECT_TRUE((g.weights[0].bottomRows(2).array() == 0).all());
  EXPECT_TRUE((g.weights[1].array() != 0).all());
  g = make_gradient(l);
  l.backward(matrix<double>(x.topRows(3)), r, matrix<double>(dy.topRows(3)), view(dx).slice_rows(0, 3), g, {});
  EXPECT_TRUE((g.weights[1].bottomRows(2).array() == 0).all());
  EXPECT_EQ(g.weights[0].row(0), (dy.row(0) + dy.row(1) + dy.row(2)).leftCols(2));  // the sum over the other axis
}

TEST(axial_positions, dropout_is_of_the_embedding_and_only_in_training) {
  axial_positions_config c = grid({40, 50}, {20, 30});
  c.dropout = 0.3;
  const axial_positions<double> l(c, rng_key{1});
  const matrix<double> x = matrix<double>::Zero(2000, 50);
  const matrix<double> y = run(l, x, {.key = rng_key{5}, .train = true}), plain = run(l, x, {});
  const double dropped = static_cast<double>((y.array() == 0).count()) / static_cast<double>(y.size());
  EXPECT_NEAR(dropped, 0.3, 0.01);  // 100,000 draws: a standard deviation of 0.0015
  EXPECT_LT(((y.array() == 0).select(plain.array() / 0.7, y.array()) - plain.array() / 0.7).abs().maxCoeff(), 1e-14);
  EXPECT_EQ(run(l, x, {.key = rng_key{5}, .train = true}), y);
  EXPECT_NE(run(l, x, {.key = rng_key{6}, .train = true}), y);
}

TEST(axial_positions, same_bits_for_any_number_of_workers) {
  axial_positions_config c = grid({40, 50}, {70, 130});
  c.dropout = 0.1;
  expect_same_bits_for_any_workers(axial_positions<float>(c, rng_key{1}), matrix<float>(random(1900, 200, 2).cast<float>()),
                                   {.key = rng_key{3}, .train = true});
}

TEST(axial_positions, decoding_goes_on_where_the_slot_stands) {
  const axial_positions<double> l(grid({3, 4}, {2, 5}), rng_key{1});
  const matrix<double> x = random(12, 7, 2), full = run(l, x, {});
  auto cache = l.make_cache(2, 13);
  matrix<double> y(12, 7);
  const std::vector<index_t> slot{1};
  const context ctx{.slots = slot};
  const auto next = [&](index_t first, index_t n) { l.decode(view(x).slice_rows(first, n), view(y).slice_rows(first, n), cache, ctx); };
  next(0, 5);
  next(5, 1);
  l.fill(view(x).slice_rows(6, 2), cache, ctx);
  l.truncate(cache, 1, 6);
  next(6, 6);
  EXPECT_EQ(y, full);
  EXPECT_THROW(next(0, 1), index_error);
  l.permute(cache, std::vector<index_t>{1, 0});
  EXPECT_EQ(cache.length, (offsets{12, 0}));
}

TEST(axial_positions, refuses_what_does_not_fit) {
  EXPECT_THROW(axial_positions<float>(grid({}, {}), rng_key{}), config_error);
  EXPECT_THROW(axial_positions<float>(grid({4, 4}, {8}), rng_key{}), config_error);
  EXPECT_THROW(axial_positions<float>(grid({4, 0}, {4, 4}), rng_key{}), config_error);
  EXPECT_THROW(axial_positions<float>(grid({4, 4}, {4, 0}), rng_key{}), config_error);
  const axial_positions<double> l(grid({3, 4}, {2, 5}), rng_key{1});
  const matrix<double> x = random(13, 7, 2);
  EXPECT_THROW(run(l, x, {}), index_error);
  EXPECT_THROW(run(l, random(3, 8, 2), {}), shape_error);
  EXPECT_THROW(run(l, x, {.rows = {offsets{0, 5}}}), shape_error);
  EXPECT_NO_THROW(run(l, x, {.rows = {offsets{0, 12, 13}}}));
  try {
    run(l, x, {});
  } catch (const index_error& e) {
    EXPECT_STREQ(e.what(), "axial_positions: a sequence of 13 tokens is longer than the grid of 12 positions");
  }
  for (const index_t n : {0, 1}) EXPECT_EQ(run(l, random(n, 7, 1), {}).rows(), n);
  // A grid larger than any index: no overflow.
  EXPECT_EQ(axial_positions<float>(grid({1 << 20, 1 << 20, 1 << 20, 1 << 20}, {1, 1, 1, 1}), rng_key{1}).positions(),
            std::numeric_limits<index_t>::max());
}

}  // namespace axial_positions_tests
