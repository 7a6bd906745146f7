#include "lithe/layers/halting.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/halting_sequence.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/same_bits.hpp"

namespace halting_tests {

using namespace lithe;

static_assert(layer<halting<float>> && layer<halting_head<double>> && layer<sequence_halting<double>>);

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}
matrix<double> row(std::initializer_list<double> v) {
  matrix<double> m(1, static_cast<index_t>(v.size()));
  std::copy(v.begin(), v.end(), m.data());
  return m;
}
const double given_digits = 1e-8;  // the specification prints that many

// Central differences with h = 1e-5 of functions of size 1 are good to about 1e-10, divided by gradients of at least the checker's floor 1e-3.
const double gradient_tolerance = 2e-6;

TEST(stick_breaking, the_specification_s_numbers) {
  const matrix<double> z = row({0.2, -0.4, 1}).transpose();
  matrix<double> log_q(1, 4), dz(3, 1), d(1, 4);
  stick_breaking<double>(z, log_q, {});
  const double q[] = {0.54983400, 0.18065717, 0.19702674, 0.07248209};
  for (index_t n = 0; n < 4; ++n) EXPECT_NEAR(std::exp(log_q(0, n)), q[n], given_digits);
  EXPECT_NEAR(log_q.array().exp().sum(), 1, 1e-15);
  EXPECT_NEAR(-log_q(0, 1), 1.7111541218, 1e-10);
  EXPECT_NEAR(-log_q(0, 3), 2.6244158093, 1e-10);
  d << 0, -1, 0, 0;
  stick_breaking_backward<double>(z, d, dz, {});
  EXPECT_NEAR(dz(0, 0), 0.5498339973, 1e-10);
  EXPECT_NEAR(dz(1, 0), -0.5986876601, 1e-10);
  EXPECT_EQ(dz(2, 0), 0);
  std::vector<double> expected(1);
  expected_exit<double>(z, expected, dz, {});
  EXPECT_NEAR(expected[0], 1.7921569215, 1e-10);
}

TEST(stick_breaking, saturated_signals_stay_finite) {
  const matrix<double> z = row({100, -100, 100}).transpose();
  matrix<double> log_q(1, 4), dz(3, 1), d = matrix<double>::Constant(1, 4, -1.0);
  stick_breaking<double>(z, log_q, {});
  EXPECT_TRUE(log_q.allFinite());
  EXPECT_NEAR(log_q(0, 3), -200, 1e-12);
  stick_breaking_backward<double>(z, d, dz, {});
  EXPECT_TRUE(dz.allFinite());
}

TEST(stick_breaking, expected_exit_has_the_gradient_of_its_equation) {
  auto z = random_matrix(4, 3, 5);
  matrix<double> dz(4, 3), none;
  std::vector<double> e(3), up(3), down(3);
  expected_exit<double>(z, e, dz, {});
  for (index_t n = 0; n < 4; ++n)
    for (index_t t = 0; t < 3; ++t) {
      const double kept_value = z(n, t), h = 1e-5;
      z(n, t) = kept_value + h;
      expected_exit<double>(z, up, {}, {});
      z(n, t) = kept_value - h;
      expected_exit<double>(z, down, {}, {});
      z(n, t) = kept_value;
      EXPECT_NEAR((up[static_cast<std::size_t>(t)] - down[static_cast<std::size_t>(t)]) / (2 * h), dz(n, t), 1e-9);
      EXPECT_LT(dz(n, t), 0);
    }
}

TEST(multinomial_exits, the_specification_s_numbers) {
  matrix<double> log_q(1, 4), d(1, 4), dlogits(1, 4);
  multinomial_exits<double>(row({.1, .2, .3, -.4}), log_q, {});
  const double q[] = {0.25425209, 0.28099202, 0.31054420, 0.15421169};
  for (index_t n = 0; n < 4; ++n) EXPECT_NEAR(std::exp(log_q(0, n)), q[n], given_digits);
  EXPECT_NEAR(-log_q(0, 2), 1.1694290214, 1e-10);
  d << 0, 0, -1, 0;
  multinomial_exits_backward<double>(log_q, d, dlogits, {});
  for (index_t n = 0; n < 4; ++n) EXPECT_NEAR(dlogits(0, n), q[n] - (n == 2), given_digits);
}

TEST(exit_test, thresholds_of_one_and_nought_and_confidences_that_are_no_numbers) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_FALSE(reaches(1, 1, false));
  EXPECT_FALSE(reaches(1, 2, false));
  EXPECT_TRUE(reaches(0, 0, true));
  EXPECT_TRUE(reaches(0.5, 0.5, false));
  EXPECT_FALSE(reaches(0.5, 0.5, true));
  EXPECT_FALSE(reaches(nan, 0.5, false));
  EXPECT_FALSE(reaches(0.5, nan, false));
}

TEST(exit_test, ties_and_first_exits) {
  std::vector<std::int32_t> exits(1);
  most_probable_exits<double>(row({-1, -0.5, -0.5}), exits);
  EXPECT_EQ(exits[0], 2);
  const matrix<double> z = row({0.2, -0.4, 1}).transpose();  // χ = 0.55, 0.40, 0.73
  for (const auto& [tau, exit] : {std::pair{0.5, 1}, {0.6, 3}, {0.8, 4}, {0.0, 1}, {1.0, 4}}) {
    first_exits<double>(z, std::vector<double>{tau}, false, exits);
    EXPECT_EQ(exits[0], exit) << tau;
  }
  first_exits<double>(z, std::vector<double>{0.9, 0.4, 0.5}, false, exits);
  EXPECT_EQ(exits[0], 2);
}

TEST(halting_head, gradients_of_all_activations_and_depths) {
  for (const auto kind : {halting_activation::tanh, halting_activation::sigmoid, halting_activation::relu})
    for (const index_t layers : {0, 1, 3}) {
      const halting_head<double> head({.features = 5, .outputs = 3, .hidden_layers = layers, .kind = kind}, {7});
      const auto report = gradient_check(head, random_matrix(6, 5, 2));
      EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
      EXPECT_GT(report.smallest_gradient(), 1e-3);
    }
}

TEST(halting, gradients_of_every_distribution) {
  const auto x = random_matrix(4 * 5, 6, 2);  // 4 exits, 5 tokens
  for (const halting_config& c : {halting_config{.exits = 4, .features = 6}, halting_config{.exits = 4, .features = 6, .per_block = true},
                                  halting_config{.exits = 4, .features = 6, .per_block = true, .hidden_layers = 2},
                                  halting_config{.kind = exit_distribution::multinomial, .exits = 4, .features = 6, .hidden_layers = 1}}) {
    const halting<double> l(c, {3});
    const auto report = gradient_check(l, x);
    EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
    EXPECT_GT(report.smallest_gradient(), 1e-3);
    matrix<double> log_q(5, 4);
    l.forward(x, log_q, {});
    for (index_t t = 0; t < 5; ++t) EXPECT_NEAR(log_q.row(t).array().exp().sum(), 1, 1e-14);
  }
}

TEST(halting, every_option_changes_the_output) {
  const auto x = random_matrix(12, 6, 2);
  const auto of = [&](const halting_config& c) {
    matrix<double> log_q(4, 3);
    halting<double>(c, {3}).forward(x, log_q, {});
    return log_q;
  };
  const halting_config plain{.exits = 3, .features = 6};
  for (const auto change : std::initializer_list<void (*)(halting_config&)>{
           [](halting_config& c) { c.kind = exit_distribution::multinomial; }, [](halting_config& c) { c.per_block = true; },
           [](halting_config& c) { c.hidden_layers = 1; }, [](halting_config& c) { c.bias = -2; }}) {
    halting_config c = plain;
    change(c);
    EXPECT_GT((of(c) - of(plain)).cwiseAbs().maxCoeff(), 1e-3);
  }
  halting_config hidden = plain, sigmoid_hidden = plain;
  hidden.hidden_layers = sigmoid_hidden.hidden_layers = 1;
  sigmoid_hidden.activation = halting_activation::sigmoid;
  EXPECT_GT((of(hidden) - of(sigmoid_hidden)).cwiseAbs().maxCoeff(), 1e-3);
  halting_config deep = plain;
  deep.bias = -2;
  EXPECT_GT(of(deep)(0, 2), of(plain)(0, 2));  // exits start deeper
}

TEST(halting, one_exit_has_no_head) {
  const halting<double> l({.exits = 1, .features = 6}, {3});
  EXPECT_EQ(count_parameters(l), 0);
  matrix<double> log_q(5, 1), dx(5, 6);
  record_of<halting<double>> r;
  auto g = make_gradient(l);
  const auto x = random_matrix(5, 6, 1);
  l.forward(x, log_q, r, {});
  EXPECT_EQ(log_q.cwiseAbs().maxCoeff(), 0);
  l.backward(x, r, log_q, dx, g, {});
  EXPECT_EQ(dx.cwiseAbs().maxCoeff(), 0);
}

TEST(halting, same_bits_with_any_number_of_workers) {
  expect_same_bits_for_any_workers(halting<double>({.exits = 3, .features = 6, .per_block = true, .hidden_layers = 1}, {3}),
                                   random_matrix(3 * 300, 6, 2), {});
}

TEST(halting, bad_input_is_refused) {
  EXPECT_THROW(halting<double>({.exits = 0, .features = 6}, {}), config_error);
  EXPECT_THROW(halting<double>({.kind = exit_distribution::multinomial, .exits = 3, .features = 6, .per_block = true}, {}), config_error);
  EXPECT_THROW(halting_head<double>({.features = 6, .hidden_layers = -1}, {}), config_error);
  const halting<double> l({.exits = 3, .features = 6}, {3});
  matrix<double> log_q(2, 3);
  EXPECT_THROW(l.forward(random_matrix(7, 6, 1), log_q, {}), shape_error);
  EXPECT_THROW(l.forward(random_matrix(6, 5, 1), log_q, {}), shape_error);
}

TEST(sequence_halting, padding_changes_nothing_and_gets_no_gradient) {
  const std::vector<index_t> offsets{0, 3, 8};
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 0, 1, 1, 0};
  context ctx;
  ctx.rows = {offsets};
  ctx.mask = mask;
  const sequence_halting<double> l({.features = 4, .outputs = 3}, {3});
  auto x = random_matrix(8, 4, 1);
  matrix<double> a(2, 3), b(2, 3), dx(8, 4);
  record_of<sequence_halting<double>> r;
  auto g = make_gradient(l);
  l.forward(x, a, r, ctx);
  l.backward(x, r, random_matrix(2, 3, 2), dx, g, ctx);
  for (const index_t padding : {2, 4, 7}) {
    EXPECT_EQ(dx.row(padding).cwiseAbs().maxCoeff(), 0);
    x.row(padding).setConstant(1e6);
  }
  EXPECT_GT(dx.row(0).cwiseAbs().maxCoeff(), 1e-3);
  l.forward(x, b, ctx);
  EXPECT_EQ(a, b);
}

TEST(sequence_halting, gradients_of_one_sequence) {
  const sequence_halting<double> l({.features = 4, .outputs = 3, .hidden_layers = 1}, {3});
  const auto report = gradient_check(l, random_matrix(5, 4, 1));
  EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
}

TEST(sequence_halting, an_encoder_input_without_real_rows_is_refused) {
  const sequence_halting<double> l({.features = 4, .outputs = 3}, {3});
  const std::vector<index_t> offsets{0, 2, 2};
  context ctx;
  ctx.rows = {offsets};
  matrix<double> log_q(2, 3);
  try {
    l.forward(random_matrix(2, 4, 1), log_q, ctx);
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(), "sequence_halting: expected at least one row that is no padding in sequence 1, got none");
  }
}

}  // namespace halting_tests
