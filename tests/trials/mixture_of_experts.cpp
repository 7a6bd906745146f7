#include "mixture_of_experts.hpp"

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/norms.hpp"
#include "reversible.hpp"
#include "trial.hpp"

namespace {

using namespace trials;

constexpr index_t features = 6;
using experts = mixture_of_experts<double>;
using part = sequential<layer_norm<double>, experts>;
using model = stack<residual<part>>;
static_assert(layer<experts> && layer<mixture_of_experts<float>> && layer<model> && layer<reversible<part, part>>);

experts make_experts(std::uint64_t seed, double balance = 0) {
  experts m({.expert = {features, 5, activation::gelu}, .experts = 4, .top_k = 2, .balance = balance}, rng_key{seed});
  m.router.weight *= 3;
  return m;
}
part make_part(std::uint64_t seed, double balance = 0) { return part(layer_norm<double>(features), make_experts(seed, balance)); }
model make_model(double balance) {
  model m;
  for (std::uint64_t i = 0; i < 3; ++i) m.blocks.push_back({make_part(i + 1, balance)});
  return m;
}

TEST(mixture_of_experts, gradients_with_the_routes_held) {
  const auto x = random_matrix(12, features, 2);
  expect_right_gradients(make_experts(1), x);
  expect_right_gradients(make_model(0), x);
  expect_right_gradients(reversible<part, part>{make_part(1), make_part(2)}, random_matrix(12, 2 * features, 2));
}

TEST(mixture_of_experts, equals_the_sum_over_all_experts) {
  const auto m = make_experts(1);
  const auto x = random_matrix(12, features, 2);
  matrix<double> y(12, features), out = y, expected = matrix<double>::Zero(12, features), p(12, 4);
  record_of<experts> r;
  m.forward(x, y, r, {});
  m.router.forward(x, p, {});
  p = p.array().exp();
  p.array().colwise() /= p.array().rowwise().sum().eval();
  for (index_t e = 0; e < 4; ++e) {
    m.experts[static_cast<std::size_t>(e)].forward(x, out, {});
    for (index_t t = 0; t < 12; ++t) {
      const auto better = (p.row(t).array() > p(t, e)).count();
      if (better < 2) expected.row(t) += p(t, e) * out.row(t);
    }
  }
  EXPECT_LT(largest_difference(y, expected), 1e-12);
}

TEST(mixture_of_experts, gradient_of_the_balance_loss) {
  const auto x = random_matrix(12, features, 2);
  expect_right_gradients(make_experts(1, 0.7), x);
  expect_right_gradients(make_model(0.7), x);  // gathered from three blocks inside containers
}

TEST(mixture_of_experts, balance_loss_of_even_and_of_one_sided_routes) {
  // Σ_e E f_e p_e is 1 if all experts are alike, and E p_1 if all tokens go to one of them.
  auto m = make_experts(1, 1.0);
  const auto x = random_matrix(12, features, 2);
  matrix<double> y(12, features);
  record_of<experts> r;
  m.router.weight.setZero();
  m.forward(x, y, r, {});
  EXPECT_NEAR(auxiliary_loss(r), 1, 1e-12);  // whatever f, as all p are 1/4 and Σ f = 1
  m.top_k = 1;
  m.router.weight.row(2).setConstant(0.1);
  const matrix<double> positive = x.cwiseAbs();
  m.forward(positive, y, r, {});
  EXPECT_EQ(r.inputs[2].rows(), 12);
  EXPECT_EQ(r.inputs[0].rows(), 0);  // an expert without tokens
  EXPECT_NEAR(auxiliary_loss(r), 4 * r.probabilities.col(2).mean(), 1e-12);
}

TEST(mixture_of_experts, the_loss_outlives_forget) {
  const auto m = make_model(0.7);
  matrix<double> y(12, features);
  record_of<model> r;
  m.forward(random_matrix(12, features, 2), y, r, {});
  const double loss = auxiliary_loss(r);
  EXPECT_GT(loss, 0.1);
  forget(r);
  EXPECT_EQ(auxiliary_loss(r), loss);
}

}  // namespace
