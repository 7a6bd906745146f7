#include <gtest/gtest.h>

#include "lithe/compose/sequential.hpp"
#include "lithe/layers/activations.hpp"
#include "lithe/layers/dropout.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/same_bits.hpp"

namespace layers_tests {

using namespace lithe;

// Tokens are read by the first layer of a sequential alone, whatever stands last.
static_assert(detail::only_first_takes_tokens<embedding<double>, linear<double>, linear<double>>);
static_assert(!detail::only_first_takes_tokens<embedding<double>, embedding<double>, linear<double>>);
static_assert(!detail::only_first_takes_tokens<linear<double>, linear<double>, embedding<double>>);

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t key = 7) {
  matrix<double> x(rows, cols);
  fill_uniform<double>(x, 1.5, rng_key{key});
  return x;
}
context training() {
  context ctx;
  ctx.train = true;
  ctx.key = {3};
  return ctx;
}
template <class L>
matrix<double> output_of(const L& l, const matrix<double>& x, const context& ctx = {}) {
  const shape s = l.output_shape(x);
  matrix<double> y(s.rows, s.cols);
  l.forward(x, y, ctx);
  return y;
}
/// Central differences in double with a step of 1e-5: 1e-6 leaves room for the truncation of curved functions.
template <class L>
void expect_gradients(const L& l, const matrix<double>& x, const context& ctx = training()) {
  const auto report = gradient_check(l, x, ctx);
  EXPECT_LT(report.worst(), 1e-6) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-2);
}

TEST(linear, is_an_affine_map) {
  const linear<double> l({.inputs = 5, .outputs = 3}, {1});
  const auto x = random_matrix(4, 5);
  matrix<double> expected = x.lazyProduct(l.weight.transpose());
  expected.rowwise() += l.bias.row(0);
  EXPECT_LT((output_of(l, x) - expected).norm(), 1e-14);
  expect_gradients(l, x);
  expect_gradients(linear<double>({.inputs = 5, .outputs = 3, .bias = false}, {1}), x);
}

TEST(linear, packed_weights_follow_steps_and_refresh) {
  linear<double> l({.inputs = 5, .outputs = 3}, {1});
  const auto x = random_matrix(20, 5);
  l.prepack();
  l.weight *= 2;
  l.refresh();
  linear<double> plain = l;
  plain.packed.clear();
  EXPECT_LT((output_of(l, x) - output_of(plain, x)).norm(), 1e-13);
}

TEST(linear, refuses_other_widths_in_a_sentence) {
  const linear<double> l({.inputs = 5, .outputs = 3}, {1});
  matrix<double> x(2, 4), y(2, 3);
  try {
    l.forward(x, y, {});
    FAIL();
  } catch (const shape_error& e) {
    EXPECT_STREQ(e.what(), "linear: expected 5 features, got 4");
  }
  EXPECT_THROW(linear<double>({.inputs = 0, .outputs = 3}, {1}), config_error);
}

TEST(layer_norm, centres_and_scales_each_token) {
  layer_norm<double> l(7);
  const auto x = random_matrix(6, 7);
  const auto y = output_of(l, x);
  for (index_t t = 0; t < 6; ++t) {
    EXPECT_NEAR(y.row(t).mean(), 0, 1e-14);
    EXPECT_NEAR(y.row(t).squaredNorm() / 7, 1, 1e-4);  // epsilon is 1e-5
  }
  l.weight = random_matrix(1, 7, 2);
  l.bias = random_matrix(1, 7, 3);
  expect_gradients(l, random_matrix(70, 7));  // more rows than one piece of the sums
}

TEST(rms_norm, scales_each_token) {
  rms_norm<double> l(7);
  const auto x = random_matrix(6, 7);
  const auto y = output_of(l, x);
  for (index_t t = 0; t < 6; ++t) EXPECT_LT((y.row(t) - x.row(t) / std::sqrt(x.row(t).squaredNorm() / 7 + 1e-5)).norm(), 1e-14);
  l.weight = random_matrix(1, 7, 2);
  expect_gradients(l, random_matrix(70, 7));
}

TEST(batch_norm, uses_the_batch_in_training_and_running_statistics_after) {
  batch_norm<double> l(300);  // 40 x 300: more rows and more features than one piece of work
  l.weight = random_matrix(1, 300, 2);
  l.bias = random_matrix(1, 300, 3);
  const auto x = random_matrix(40, 300);
  expect_gradients(l, x);
  l.running_mean = random_matrix(1, 300, 4);
  l.running_var = random_matrix(1, 300, 5).cwiseAbs();
  expect_gradients(l, x, {});
  EXPECT_GT((output_of(l, x) - output_of(l, x, training())).norm(), 1);
}

TEST(batch_norm, running_statistics_move_after_the_step_and_not_before) {
  batch_norm<double> l(3);
  const auto x = random_matrix(9, 3);
  matrix<double> y(9, 3), dx(9, 3);
  batch_norm<double>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, training());
  l.backward(x, r, y, dx, g, training());
  EXPECT_EQ(l.running_mean.norm(), 0);
  after_step(l, g);
  const matrix<double> mean = x.colwise().mean();
  EXPECT_LT((l.running_mean - 0.1 * mean).norm(), 1e-14);
  const matrix<double> variance = (x.rowwise() - mean.row(0)).array().square().colwise().sum() / 8;
  EXPECT_LT((l.running_var - (0.9 * matrix<double>::Ones(1, 3) + 0.1 * variance)).norm(), 1e-13);
  set_zero(l, g);
  const auto before = l.running_mean;
  after_step(l, g);
  EXPECT_TRUE(l.running_mean == before);
}

TEST(batch_norm, masked_rows_are_no_part_of_it) {
  const batch_norm<double> l(4);
  auto x = random_matrix(6, 4);
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 1};
  context ctx = training();
  ctx.mask = mask;
  const auto y = output_of(l, x, ctx);
  x.row(1) *= 100;
  EXPECT_TRUE(output_of(l, x, ctx).row(0) == y.row(0));
  matrix<double> one(1, 4);
  EXPECT_THROW(l.forward(random_matrix(1, 4), one, training()), shape_error);
}

TEST(activation, gradients_and_values_of_all_kinds) {
  const auto x = random_matrix(5, 70);
  for (const auto kind : {activation::relu, activation::gelu, activation::gelu_tanh, activation::silu}) expect_gradients(activation_layer<double>{kind}, x);
  const auto at = [](activation kind, double v) { return output_of(activation_layer<double>{kind}, matrix<double>::Constant(1, 1, v))(0, 0); };
  EXPECT_EQ(at(activation::relu, -1), 0);
  EXPECT_EQ(at(activation::relu, 2), 2);
  EXPECT_NEAR(at(activation::gelu, 1), 0.8413447460685429, 1e-15);       // Φ(1)
  EXPECT_NEAR(at(activation::gelu_tanh, 1), 0.8411919906082768, 1e-15);  // its tanh form
  EXPECT_NEAR(at(activation::silu, 1), 0.7310585786300049, 1e-15);       // σ(1)
}

TEST(activation, float_stays_close_to_double) {
  const matrix<double> x = matrix<double>::NullaryExpr(1, 4001, [](index_t, index_t j) { return -10 + 0.005 * static_cast<double>(j); });
  const matrix<float> xf = x.cast<float>();
  matrix<float> yf(1, 4001);
  for (const auto kind : {activation::gelu, activation::gelu_tanh, activation::silu}) {
    activation_layer<float>{kind}.forward(xf, yf, {});
    // 1.5e-7 of the normal distribution times |x| <= 10, and float's rounding of numbers up to 10
    EXPECT_LT((yf.cast<double>() - output_of(activation_layer<double>{kind}, x)).cwiseAbs().maxCoeff(), 3e-6);
  }
}

TEST(activation, not_a_number_stays) {
  matrix<double> x = random_matrix(2, 3);
  x(0, 1) = std::numeric_limits<double>::quiet_NaN();
  for (const auto kind : {activation::relu, activation::gelu, activation::gelu_tanh, activation::silu}) {
    const auto y = output_of(activation_layer<double>{kind}, x);
    EXPECT_TRUE(std::isnan(y(0, 1)));
    EXPECT_FALSE(std::isnan(y(0, 2)));
  }
}

TEST(dropout, drops_a_share_and_keeps_the_mean) {
  const dropout<double> l(0.25);
  const matrix<double> x = matrix<double>::Ones(100, 101);
  const auto y = output_of(l, x, training());
  const auto dropped = static_cast<double>((y.array() == 0).count()) / 10100;
  EXPECT_NEAR(dropped, 0.25, 0.02);  // four standard deviations
  EXPECT_TRUE((y.array() == 0 || y.array() == 1 / 0.75).all());
  EXPECT_TRUE(output_of(l, x) == x);
  context other = training();
  other.key = {4};
  EXPECT_FALSE(output_of(l, x, other) == y);
  EXPECT_TRUE(output_of(l, x, training()) == y);
  expect_gradients(l, random_matrix(6, 11));
  const dropout<double> all(1.0);
  dropout<double>::record r;
  dropout<double>::gradient g;
  matrix<double> z(100, 101), dx(100, 101);
  all.forward(x, z, r, training());
  all.backward(x, r, x, dx, g, training());
  EXPECT_EQ(z.norm(), 0);
  EXPECT_EQ(dx.norm(), 0);
  for (const double rate : {-0.1, 1.1}) EXPECT_THROW((void)dropout<double>(rate), config_error);
}

TEST(feed_forward, gradients_plain_gated_and_chunked) {
  const auto x = random_matrix(11, 6);
  for (const auto kind : {activation::gelu, activation::silu})
    for (const bool gated : {false, true})
      for (const index_t chunk : {0, 4})
        expect_gradients(feed_forward<double>({.features = 6, .hidden = 9, .kind = kind, .gated = gated, .chunk = chunk}, {1}), x);
}

TEST(feed_forward, chunks_change_no_value_and_keep_no_record) {
  for (const bool gated : {false, true}) {
    const feed_forward<double> whole({.features = 6, .hidden = 9, .gated = gated}, {1});
    auto chunked = whole;
    chunked.chunk = 16;
    const auto x = random_matrix(50, 6), dy = random_matrix(50, 6, 9);
    matrix<double> y(50, 6), y2(50, 6), dx(50, 6), dx2(50, 6);
    feed_forward<double>::record r, r2;
    auto g = make_gradient(whole), g2 = make_gradient(whole);
    whole.forward(x, y, r, {});
    chunked.forward(x, y2, r2, {});
    EXPECT_LT((y - y2).cwiseAbs().maxCoeff(), 1e-12);  // the last chunk of two rows takes the path of few rows
    EXPECT_EQ(bytes(r2), 0);
    EXPECT_EQ(bytes(r), (gated ? 2 : 1) * 50 * 9 * sizeof(double));
    whole.backward(x, r, dy, dx, g, {});
    chunked.backward(x, r2, dy, dx2, g2, {});
    EXPECT_LT((dx - dx2).norm(), 1e-12);
    EXPECT_LT((g.up.weight - g2.up.weight).norm(), 1e-12);  // summed in another order
  }
  EXPECT_THROW(feed_forward<double>({.features = 6, .hidden = 9, .chunk = -1}, {1}), config_error);
}

TEST(embedding, looks_up_and_adds_positions) {
  const embedding<double> l({.tokens = 9, .features = 4, .positions = 5}, {1});
  const std::vector<token_t> ids{3, 3, 8, 0, 3};
  const std::vector<index_t> rows{0, 2, 2, 5};
  context ctx;
  ctx.rows = {rows};
  matrix<double> y(5, 4);
  l.forward(ids, y, ctx);
  EXPECT_TRUE(y.row(0) == l.weight.row(3) + l.position.row(0));
  EXPECT_TRUE(y.row(1) == l.weight.row(3) + l.position.row(1));
  EXPECT_TRUE(y.row(2) == l.weight.row(8) + l.position.row(0));
  const auto report = gradient_check(l, std::span<const token_t>(ids), ctx);
  EXPECT_LT(report.worst(), 1e-6) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-2);
}

TEST(embedding, decoding_goes_on_where_the_slot_stands) {
  const embedding<double> l({.tokens = 9, .features = 4, .positions = 5}, {1});
  const std::vector<token_t> ids{3, 1, 8, 0};
  matrix<double> whole(4, 4), parts(4, 4);
  l.forward(ids, whole, {});
  auto cache = l.make_cache(1, 6);
  l.decode(std::span(ids).first(3), matrix_view<double>(parts).slice_rows(0, 3), cache, {});
  l.decode(std::span(ids).last(1), matrix_view<double>(parts).slice_rows(3, 1), cache, {});
  EXPECT_TRUE(whole == parts);
  EXPECT_THROW(l.decode(std::span(ids).first(2), matrix_view<double>(parts).slice_rows(0, 2), cache, {}), index_error);
}

TEST(embedding, a_refused_decode_changes_nothing) {
  const embedding<double> l({.tokens = 9, .features = 4}, {1});
  auto cache = l.make_cache(2, 3);
  const std::vector<token_t> ids{3, 1, 8, 0};
  matrix<double> y(4, 4);
  const std::vector<index_t> rows{0, 0, 4}, one{1}, outside{2}, twice{1, 1};
  EXPECT_THROW(l.decode(ids, y, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.fill(ids, cache, {.slots = one}), state_error);
  EXPECT_THROW(l.decode(ids, y, cache, {.slots = outside}), index_error);
  EXPECT_THROW(l.decode(ids, y, cache, {.rows = {rows}, .slots = one}), shape_error);
  EXPECT_THROW(l.decode(ids, y, cache, {.rows = {rows}, .slots = twice}), state_error);
  EXPECT_THROW(l.truncate(cache, 2, 0), index_error);
  EXPECT_THROW(l.truncate(cache, 0, 1), index_error);
  EXPECT_THROW(l.permute(cache, outside), shape_error);
  EXPECT_THROW(l.permute(cache, std::vector<index_t>{0, 2}), index_error);
  EXPECT_EQ(cache.length, (std::vector<index_t>{0, 0}));
}

TEST(embedding, refuses_foreign_tokens) {
  const embedding<double> l({.tokens = 9, .features = 4}, {1});
  const std::vector<token_t> ids{3, 9};
  matrix<double> y(2, 4);
  try {
    l.forward(ids, y, {});
    FAIL();
  } catch (const index_error& e) {
    EXPECT_STREQ(e.what(), "embedding: token 9 in row 1 lies outside 0 .. 8");
  }
}

TEST(layers, sizes_below_1_are_refused_before_anything_is_made_of_them) {
  EXPECT_THROW(linear<double>({.inputs = 8, .outputs = -1}, {1}), config_error);
  EXPECT_THROW(linear<double>({.inputs = -1, .outputs = 8}, {1}), config_error);
  EXPECT_THROW(embedding<double>({.tokens = 4, .features = -1}, {1}), config_error);
  EXPECT_THROW(embedding<double>({.tokens = 4, .features = 8, .positions = -1}, {1}), config_error);
  EXPECT_THROW(layer_norm<double>(-1), config_error);
  EXPECT_THROW(rms_norm<double>(0), config_error);
  EXPECT_THROW(batch_norm<double>(-1), config_error);
}

TEST(layers, no_tokens_are_no_trouble) {
  matrix<double> x(0, 6), y(0, 6), dx(0, 6);
  const auto run = [&](const auto& l) {
    typename std::remove_cvref_t<decltype(l)>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, {});
    l.forward(x, y, r, {});
    l.backward(x, r, y, dx, g, {});
  };
  run(linear<double>({6, 6}, {1}));
  run(layer_norm<double>(6));
  run(rms_norm<double>(6));
  run(batch_norm<double>(6));
  run(dropout<double>(0.1));
  run(activation_layer<double>{});
  run(feed_forward<double>({.features = 6, .hidden = 9}, {1}));
}

TEST(layers, the_same_bits_with_any_number_of_workers) {
  matrix<float> x(700, 96);
  fill_uniform<float>(x, 1.0, {1});
  const auto expect_same = [&](const auto& l) { expect_same_bits_for_any_workers(l, x, {.key = {5}, .train = true}); };
  expect_same(linear<float>({96, 96}, {1}));
  expect_same(layer_norm<float>(96));
  expect_same(rms_norm<float>(96));
  expect_same(batch_norm<float>(96));
  expect_same(dropout<float>(0.3));
  expect_same(activation_layer<float>{activation::gelu});
  expect_same(feed_forward<float>({.features = 96, .hidden = 200, .kind = activation::silu, .gated = true}, {1}));
}

}  // namespace layers_tests
