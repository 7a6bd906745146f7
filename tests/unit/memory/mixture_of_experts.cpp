#include "lithe/layers/mixture_of_experts.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/feed_forward.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/malloc_count.hpp"
#include "support/same_bits.hpp"

namespace mixture_of_experts_tests {

using namespace lithe;
using experts = mixture_of_experts<double>;
static_assert(layer<experts> && layer<mixture_of_experts<float>>);

constexpr index_t D = 6, T = 12;

mixture_of_experts_config small() { return {.features = D, .hidden = 5, .experts = 4, .top_k = 2, .balance = 0, .z_loss = 0}; }
experts make(const mixture_of_experts_config& c) {
  experts m(c, rng_key{3});
  m.router.weight *= 4;  // routes that lie apart
  return m;
}
matrix<double> input(index_t rows = T, std::uint64_t key = 2) {
  matrix<double> x(rows, D);
  fill_normal<double>(x, 1.0, rng_key{key});
  return x;
}
matrix<double> output_of(const experts& m, const matrix<double>& x, const context& ctx = {}) {
  matrix<double> y(x.rows(), D);
  m.forward(x, y, ctx);
  return y;
}

/// Every expert for every token, by the layers that an expert is made of.
matrix<double> reference(const experts& m, const matrix<double>& x) {
  const auto& c = m.config;
  matrix<double> y = matrix<double>::Zero(x.rows(), D);
  for (index_t t = 0; t < x.rows(); ++t) {
    const Eigen::VectorXd p = (m.router.weight * x.row(t).transpose()).array().exp();
    std::vector<index_t> order(static_cast<std::size_t>(c.experts));
    for (index_t e = 0; e < c.experts; ++e) order[static_cast<std::size_t>(e)] = e;
    std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return p(a) > p(b); });
    double sum = 0;
    for (index_t k = 0; k < c.top_k; ++k) sum += p(order[static_cast<std::size_t>(k)]);
    if (!c.renormalise) sum = p.sum();
    for (index_t k = 0; k < c.top_k; ++k) {
      const index_t e = order[static_cast<std::size_t>(k)];
      feed_forward<double> f({.features = D, .hidden = c.hidden, .kind = c.kind, .gated = c.gated, .bias = false}, rng_key{1});
      f.up.weight = m.up.middleRows(e * c.hidden, c.hidden);
      if (c.gated) f.gate.weight = m.gate.middleRows(e * c.hidden, c.hidden);
      f.down.weight = m.down.middleRows(e * D, D);
      matrix<double> one(1, D);
      const matrix<double> row = x.row(t);
      f.forward(row, one, {});
      y.row(t) += p(e) / sum * one.row(0);
    }
  }
  return y;
}

TEST(mixture_of_experts, equals_the_weighted_sum_of_the_chosen_experts) {
  for (const bool gated : {false, true})
    for (const bool renormalise : {false, true})
      for (const index_t k : {1, 2, 4}) {
        auto c = small();
        c.gated = gated;
        c.renormalise = renormalise;
        c.top_k = k;
        const auto m = make(c);
        EXPECT_LT((output_of(m, input()) - reference(m, input())).cwiseAbs().maxCoeff(), 1e-13);  // sums of a few numbers near 1
      }
}

TEST(mixture_of_experts, gradients) {
  for (const bool gated : {false, true})
    for (const bool renormalise : {false, true}) {
      auto c = small();
      c.gated = gated;
      c.kind = gated ? activation::silu : activation::gelu;
      c.renormalise = renormalise;
      const auto report = gradient_check(make(c), input());
      EXPECT_LT(report.worst(), 1e-6) << report.where();  // central differences with a step of 1e-5
      EXPECT_GT(report.smallest_gradient(), gated ? 1e-3 : 1e-2);
    }
}

TEST(mixture_of_experts, gradients_of_the_balance_and_z_losses) {
  auto c = small();
  c.balance = 3;
  c.z_loss = 0.5;
  const auto m = make(c);
  const auto report = gradient_check(m, input());
  EXPECT_LT(report.worst(), 1e-6) << report.where();
  // Without an upstream gradient the losses alone are left.
  matrix<double> y(T, D), dx(T, D);
  const matrix<double> zero = matrix<double>::Zero(T, D), x = input();
  experts::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, zero, dx, g, {});
  EXPECT_GT(g.router.weight.norm(), 0.1);
  EXPECT_EQ(g.up.norm() + g.down.norm(), 0);
}

TEST(mixture_of_experts, the_balance_loss_of_even_and_of_one_sided_routes) {
  auto c = small();
  c.balance = 1;
  c.z_loss = 1;
  auto m = make(c);
  matrix<double> y(T, D);
  experts::record r;
  m.router.weight.setZero();
  m.forward(input(), y, r, {});
  EXPECT_NEAR(r.balance.loss, 1, 1e-14);  // all p are 1/4 and Σ f = 1
  EXPECT_NEAR(r.z.loss, std::log(4.0) * std::log(4.0), 1e-14);
  const auto loads_are = [&](index_t a, index_t b, index_t c2, index_t d) {
    const auto load = m.load(r);
    return load.size() == 4 && load[0] == a && load[1] == b && load[2] == c2 && load[3] == d;
  };
  EXPECT_TRUE(loads_are(T, T, 0, 0));  // ties go to the lower expert
  m.config.top_k = 1;
  m.router.weight.row(2).setConstant(0.3);
  const matrix<double> positive = input().cwiseAbs();
  m.forward(positive, y, r, {});
  EXPECT_TRUE(loads_are(0, 0, T, 0));
  EXPECT_NEAR(r.balance.loss, 4 * r.probabilities.col(2).mean(), 1e-14);
  const double loss = auxiliary_loss(r);
  forget(r);
  EXPECT_EQ(auxiliary_loss(r), loss);
}

TEST(mixture_of_experts, top_1_renormalised_gives_the_router_no_task_gradient) {
  auto c = small();
  c.top_k = 1;
  c.renormalise = true;
  const auto m = make(c);
  const auto x = input(), dy = input(T, 9);
  matrix<double> y(T, D), dx(T, D);
  experts::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, dy, dx, g, {});
  EXPECT_LT(g.router.weight.norm(), 1e-14);
  EXPECT_GT(g.up.norm(), 1e-2);
}

TEST(mixture_of_experts, every_option_changes_the_output) {
  const auto base = output_of(make(small()), input());
  const auto differs = [&](const char* what, auto&& change) {
    auto c = small();
    change(c);
    EXPECT_GT((output_of(make(c), input()) - base).norm(), 1e-3) << what;
  };
  differs("hidden", [](auto& c) { c.hidden = 7; });
  differs("experts", [](auto& c) { c.experts = 5; });
  differs("top_k", [](auto& c) { c.top_k = 3; });
  differs("kind", [](auto& c) { c.kind = activation::relu; });
  differs("gated", [](auto& c) { c.gated = true; });
  differs("renormalise", [](auto& c) { c.renormalise = true; });
}

TEST(mixture_of_experts, packed_weights_follow_steps_and_refresh) {
  auto c = small();
  c.hidden = 300;  // more than one block of rows
  c.gated = true;
  auto m = make(c);
  prepack(m);
  m.up *= 2;
  m.gate *= 0.5;
  m.down *= -1;
  refresh(m);
  auto plain = m;
  plain.packed_up.clear();
  plain.packed_gate.clear();
  plain.packed_down.clear();
  const auto x = input(40);
  EXPECT_LT((output_of(m, x) - output_of(plain, x)).cwiseAbs().maxCoeff(), 1e-12);
  EXPECT_LT((output_of(plain, x) - reference(plain, x)).cwiseAbs().maxCoeff(), 1e-12);
}

TEST(mixture_of_experts, masked_rows_give_nothing_and_count_nowhere) {
  auto c = small();
  c.balance = c.z_loss = 1;
  const auto m = make(c);
  const auto x = input(), dy = input(T, 9);
  std::vector<std::uint8_t> mask(T, 1);
  mask[3] = mask[T - 1] = 0;
  context ctx;
  ctx.mask = mask;
  matrix<double> kept_x(T - 2, D), kept_dy(T - 2, D);
  for (index_t t = 0, i = 0; t < T; ++t)
    if (mask[static_cast<std::size_t>(t)] != 0) {
      kept_x.row(i) = x.row(t);
      kept_dy.row(i++) = dy.row(t);
    }
  experts::record a, b;
  auto ga = make_gradient(m), gb = make_gradient(m);
  matrix<double> y(T, D), dx(T, D), z(T - 2, D), dz(T - 2, D);
  m.forward(x, y, a, ctx);
  m.backward(x, a, dy, dx, ga, ctx);
  m.forward(kept_x, z, b, {});
  m.backward(kept_x, b, kept_dy, dz, gb, {});
  EXPECT_EQ(y.row(3).norm() + dx.row(3).norm() + y.row(T - 1).norm(), 0);
  EXPECT_LT((y.topRows(3) - z.topRows(3)).norm() + (dx.row(5) - dz.row(4)).norm(), 1e-14);
  EXPECT_LT((ga.router.weight - gb.router.weight).norm() + (ga.up - gb.up).norm() + (ga.down - gb.down).norm(), 1e-13);
  EXPECT_NEAR(auxiliary_loss(a), auxiliary_loss(b), 1e-14);
}

TEST(mixture_of_experts, nan_stays_in_its_row) {
  const auto m = make(small());
  auto x = input();
  const auto clean = output_of(m, x);
  x(4, 2) = std::numeric_limits<double>::quiet_NaN();
  x(7, 0) = std::numeric_limits<double>::infinity();
  matrix<double> y(T, D), dx(T, D);
  experts::record r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, input(T, 9), dx, g, {});
  EXPECT_TRUE(y.row(4).array().isNaN().all() && !y.row(7).allFinite());
  EXPECT_LT((y.topRows(4) - clean.topRows(4)).norm() + (y.bottomRows(4) - clean.bottomRows(4)).norm(), 1e-13);
  EXPECT_GE(r.routes.value.minCoeff(), 0);
  EXPECT_LT(r.routes.value.maxCoeff(), 4);
}

TEST(mixture_of_experts, no_token_and_one_token) {
  auto c = small();
  c.balance = c.z_loss = 1;
  const auto m = make(c);
  for (const index_t rows : {0, 1}) {
    const auto x = input(rows);
    matrix<double> y(rows, D), dx(rows, D);
    experts::record r;
    auto g = make_gradient(m);
    m.forward(x, y, r, {});
    m.backward(x, r, x, dx, g, {});
    EXPECT_EQ(auxiliary_loss(r) > 0, rows == 1);
    EXPECT_TRUE(g.router.weight.allFinite());
    if (rows == 1) {
      EXPECT_LT((y - output_of(m, input(T)).topRows(1)).norm(), 1e-13);
    }
  }
}

TEST(mixture_of_experts, the_same_bits_with_any_number_of_workers) {
  mixture_of_experts<float> m({.features = 64, .hidden = 600, .experts = 6, .top_k = 2, .gated = true}, rng_key{3});
  matrix<float> x(150, 64);
  fill_normal<float>(x, 1.0, rng_key{1});
  expect_same_bits_for_any_workers(m, x, {.train = true});
}

TEST(mixture_of_experts, allocates_nothing_when_called_again) {
#if defined(LITHE_COUNTS_MALLOC)
  const auto m = make(small());
  workspace work;
  const context ctx{.work = &work};
  const auto x = input(), dy = input(T, 9);
  matrix<double> y(T, D), dx(T, D);
  experts::record r;
  auto g = make_gradient(m);
  long before = 0;
  for (int round = 0; round < 3; ++round) {
    if (round == 1) before = mallocs;
    set_zero(m, g);
    m.forward(x, y, ctx);
    m.forward(x, y, r, ctx);
    m.backward(x, r, dy, dx, g, ctx);
  }
  EXPECT_EQ(mallocs, before);
#else
  GTEST_SKIP() << "malloc is not ours to count here";
#endif
}

TEST(mixture_of_experts, replay_keeps_the_routes) {
  const auto m = make(small());
  const auto x = input(), other = input(T, 5);
  matrix<double> y(T, D);
  experts::record r;
  m.forward(x, y, r, {});
  const matrix<slot_t> routes = r.routes.value;
  forget(r);
  context replay;
  replay.replay = true;
  m.forward(other, y, r, replay);
  EXPECT_EQ(r.routes.value, routes);
  m.forward(other, y, r, {});
  EXPECT_NE(r.routes.value, routes);
  experts::record empty;
  EXPECT_THROW(m.forward(x, y, empty, replay), state_error);
}

TEST(mixture_of_experts, costs_what_a_token_uses) {
  const auto m = make(small());
  const auto cost = cost_of(m, 1);
  EXPECT_EQ(cost.parameters, static_cast<double>(count_parameters(m)));
  EXPECT_EQ(cost.flops, 2.0 * (4 * D + 2 * 2 * 5 * D));
  EXPECT_EQ(cost.bytes, 8.0 * (4 * D + 2 * 2 * 5 * D));
}

TEST(mixture_of_experts, refuses_what_does_not_fit_in_a_sentence) {
  const auto says = [](const mixture_of_experts_config& c, const std::string& sentence) {
    try {
      experts m(c, rng_key{1});
      FAIL() << sentence;
    } catch (const config_error& e) {
      EXPECT_EQ(e.what(), sentence);
    }
  };
  auto c = small();
  c.top_k = 5;
  says(c, "mixture_of_experts: expected top_k from 1 to the 4 experts, got 5");
  c = small();
  c.hidden = 0;
  says(c, "mixture_of_experts: expected at least 1 feature, 1 expert and 1 hidden feature, got 6, 4 and 0");
  c = small();
  c.balance = -1;
  says(c, "mixture_of_experts: expected loss coefficients of 0 or more, got -1 and 0");
  const auto m = make(small());
  matrix<double> x(2, D + 1), y(2, D);
  EXPECT_THROW(m.forward(x, y, {}), shape_error);
}

}  // namespace mixture_of_experts_tests
