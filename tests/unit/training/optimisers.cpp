#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/io/safetensors.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/memory/value_table.hpp"
#include "lithe/training/clip.hpp"
#include "lithe/training/losses.hpp"
#include "lithe/training/optimiser.hpp"
#include "lithe/training/schedules.hpp"

namespace optimisers_tests {

using namespace lithe;

template <class S>
matrix<S> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<S> m(rows, cols);
  fill_normal<S>(m, 1.0, rng_key{seed});
  return m;
}

template <class S>
using shared_rows = shared_table<dense_table<S>>;
template <class T>
auto rows_held(T& table) {
  return table.table().view().map();
}

/// Every kind of tensor that an optimiser meets. Its gradients are set by the tests.
template <class S>
struct tensors {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> weight, bias, running;
    row_gradient<S> embedding;
    typename shared_rows<S>::gradient values, values_again;
    S seen = 0;
  };
  matrix<S> weight, bias, running, embedding;
  shared_rows<S> values, values_again;
  S folded = 0;

  explicit tensors(index_t rows = 23, index_t cols = 9)
      : weight(random_matrix<S>(rows, cols, 1)),
        bias(random_matrix<S>(1, cols, 2)),
        running(random_matrix<S>(1, cols, 3)),
        embedding(random_matrix<S>(rows, cols, 4)) {
    values = shared_rows<S>(dense_table<S>(rows, cols));
    fill_normal<S>(values.table().view(), 1.0, rng_key{5});
    values_again = values;
  }
  void after_step(const gradient& g) { folded += g.seen; }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
    f({"running", role::state}, s.running...);
    f("embedding", s.embedding...);
    f("memory.values", s.values...);
    f("later.values", s.values_again...);
  }
};
template <class S>
void touch(row_gradient<S>& g, std::vector<slot_t> rows, std::uint64_t seed) {
  g.assign_rows(std::move(rows));
  fill_normal<S>(g.values(), 1.0, rng_key{seed});
}
/// A random gradient for step `seed`.
template <class S>
void set_gradient(const tensors<S>& t, typename tensors<S>::gradient& g, std::uint64_t seed) {
  g.weight = random_matrix<S>(t.weight.rows(), t.weight.cols(), 10 * seed);
  g.bias = random_matrix<S>(1, t.bias.cols(), 10 * seed + 1);
  g.running.setOnes();
  const auto last = static_cast<slot_t>(t.weight.rows() - 1), at = static_cast<slot_t>(seed % 5);
  touch<S>(g.embedding, {at, last}, 10 * seed + 2);
  touch<S>(rows_of(g.values), {0, static_cast<slot_t>(at + 2)}, 10 * seed + 3);
}

/// The equations, in double, number by number, for one dense tensor.
struct reference_adam {
  matrix<double> m, v;
  explicit reference_adam(const matrix<double>& p) : m(matrix<double>::Zero(p.rows(), p.cols())), v(m) {}
  void step(matrix<double>& p, const matrix<double>& g, int s, double rate, double decay, double b1, double b2, double eps) {
    for (index_t i = 0; i < p.size(); ++i) {
      double &pi = p.data()[i], &mi = m.data()[i], &vi = v.data()[i];
      const double gi = g.data()[i];
      pi -= rate * decay * pi;
      mi = b1 * mi + (1 - b1) * gi;
      vi = b2 * vi + (1 - b2) * gi * gi;
      pi -= rate * (mi / (1 - std::pow(b1, s))) / (std::sqrt(vi / (1 - std::pow(b2, s))) + eps);
    }
  }
};

template <class S>
class optimiser_of : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(optimiser_of, scalars);

TYPED_TEST(optimiser_of, adamw_follows_the_equations_and_leaves_state_alone) {
  using S = TypeParam;
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;  // 6 steps of rounding on numbers near 1
  for (const index_t rows : {1, 23, 4000}) {                         // 4000 x 9: several pieces and a tail
    tensors<S> t(rows);
    auto g = make_gradient(t);
    g.seen = 2;
    matrix<double> p = t.weight.template cast<double>(), b = t.bias.template cast<double>();
    const matrix<S> running = t.running;
    reference_adam expected(p), expected_bias(b);
    optimiser<S> opt({.beta2 = 0.99, .epsilon = 1e-6, .weight_decay = 0.1});
    for (int s = 1; s <= 6; ++s) {
      g.weight = random_matrix<S>(rows, 9, 100 + std::uint64_t(s));
      g.bias = random_matrix<S>(1, 9, 200 + std::uint64_t(s));
      opt.step(t, g, 0.01 * s);
      expected.step(p, g.weight.template cast<double>(), s, 0.01 * s, 0.1, 0.9, 0.99, 1e-6);
      expected_bias.step(b, g.bias.template cast<double>(), s, 0.01 * s, 0.1, 0.9, 0.99, 1e-6);
    }
    EXPECT_LT((t.weight.template cast<double>() - p).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_LT((t.bias.template cast<double>() - b).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_EQ(t.running, running);
    EXPECT_EQ(t.folded, 12) << "after_step was not called once a step";
    EXPECT_EQ(opt.steps(), 6);
  }
}

TYPED_TEST(optimiser_of, lazy_adam_moves_touched_rows_alone) {
  using S = TypeParam;
  tensors<S> t;
  auto g = make_gradient(t);
  const matrix<S> before = rows_held(t.values), embedding = t.embedding;
  optimiser<S> opt({.weight_decay = 0.5});
  touch<S>(rows_of(g.values), {3, 7}, 1);
  opt.step(t, g, 0.1);
  for (index_t i = 0; i < before.rows(); ++i) EXPECT_EQ(before.row(i) == rows_held(t.values).row(i), i != 3 && i != 7) << i;
  EXPECT_EQ(t.embedding, embedding);
  // The first step of Adam is the rate in the direction of the sign: the shared table moved once, not once a handle.
  for (const index_t i : {3, 7}) EXPECT_NEAR((before.row(i) - rows_held(t.values).row(i)).cwiseAbs().maxCoeff(), 0.1, 1e-6);
  // A row that is touched for the first time in step 3 takes the bias correction of step 3.
  rows_of(g.values).set_zero();
  opt.step(t, g, 0.1);
  touch<S>(rows_of(g.values), {5}, 2);
  opt.step(t, g, 0.1);
  const double first = 0.1 / (1 - std::pow(0.9, 3)), second = 0.001 / (1 - std::pow(0.999, 3));
  EXPECT_NEAR((before.row(5) - rows_held(t.values).row(5)).cwiseAbs().minCoeff(), 0.1 * first / std::sqrt(second), 1e-6);
}

TYPED_TEST(optimiser_of, lazy_equals_dense_when_every_row_is_touched) {
  using S = TypeParam;
  // The same arithmetic in another grouping of numbers; a compiler may fuse a multiply-add in one and not in the other.
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;
  for (const update_rule sparse : {update_rule::lazy_adam, update_rule::adam}) {
    tensors<S> t;
    t.embedding = t.weight;
    rows_held(t.values) = t.weight;
    auto g = make_gradient(t);
    std::vector<slot_t> all(23);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<slot_t>(i);
    optimiser<S> opt({.sparse = sparse});
    const matrix<S> before = t.weight;
    for (std::uint64_t s = 1; s <= 5; ++s) {
      touch<S>(g.embedding, std::vector<slot_t>(all), s);
      touch<S>(rows_of(g.values), std::vector<slot_t>(all), s);
      g.weight = g.embedding.values().map();
      opt.step(t, g, 0.01);
    }
    EXPECT_GT((t.weight - before).cwiseAbs().minCoeff(), 1e-4);
    EXPECT_LT((t.embedding - t.weight).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_LT((rows_held(t.values) - t.weight).cwiseAbs().maxCoeff(), tolerance);
  }
}

TYPED_TEST(optimiser_of, dense_adam_and_sgd_on_tables_equal_a_dense_gradient) {
  using S = TypeParam;
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;
  for (const update_rule rule : {update_rule::sgd, update_rule::adam}) {
    const double decay = rule == update_rule::adam ? 0.1 : 0;  // touched rows alone know no decay
    tensors<S> t;
    t.embedding = t.weight;
    rows_held(t.values) = t.weight;
    auto g = make_gradient(t);
    optimiser<S> opt({.dense = rule, .sparse = rule, .weight_decay = decay});
    const matrix<S> before = t.weight;
    for (std::uint64_t s = 0; s < 5; ++s) {
      touch<S>(g.embedding, s % 2 == 0 ? std::vector<slot_t>{0, 4, 22} : std::vector<slot_t>{1, 4}, s);
      touch<S>(rows_of(g.values), std::vector<slot_t>(g.embedding.rows), s);
      g.weight.setZero();
      for (index_t i = 0; i < g.embedding.count(); ++i) g.weight.row(g.embedding.rows[std::size_t(i)]) = g.embedding.values().map().row(i);
      opt.step(t, g, 0.05);
    }
    EXPECT_GT((t.weight.row(4) - before.row(4)).cwiseAbs().maxCoeff(), 0.01);
    EXPECT_EQ(t.weight.row(9) == before.row(9), rule == update_rule::sgd);
    EXPECT_LT((t.embedding - t.weight).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_LT((rows_held(t.values) - t.weight).cwiseAbs().maxCoeff(), tolerance);
  }
}

/// A table whose rows cannot be reached in place, as one in a file or in another format.
template <class S>
struct far_table {
  using scalar = S;
  matrix<S> values;
  [[nodiscard]] index_t rows() const { return values.rows(); }
  [[nodiscard]] index_t cols() const { return values.cols(); }
  void read_row(index_t i, std::span<S> out) const { std::copy_n(values.row(i).data(), cols(), out.data()); }
  void write_row(index_t i, std::span<const S> in) { std::copy_n(in.data(), cols(), values.row(i).data()); }
};
template <class S, class Table>
struct one_table {
  using scalar = S;
  struct record {};
  struct gradient {
    row_gradient<S> values;
  };
  Table values;
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("values", s.values...);
  }
};

TYPED_TEST(optimiser_of, tables_reached_by_rows_move_like_matrices) {
  using S = TypeParam;
  for (const update_rule rule : {update_rule::sgd, update_rule::adam, update_rule::lazy_adam, update_rule::rowwise_adagrad}) {
    one_table<S, matrix<S>> near{random_matrix<S>(9, 16, 1)};
    one_table<S, far_table<S>> far{{near.values}};
    auto g = make_gradient(near);
    auto h = make_gradient(far);
    optimiser<S> a({.sparse = rule}), b({.sparse = rule});
    for (std::uint64_t s = 0; s < 3; ++s) {
      touch<S>(g.values, {1, static_cast<slot_t>(2 + s)}, s);
      touch<S>(h.values, {1, static_cast<slot_t>(2 + s)}, s);
      a.step(near, g, 0.1);
      b.step(far, h, 0.1);
    }
    EXPECT_EQ(near.values, far.values.values);
    EXPECT_NE(near.values, random_matrix<S>(9, 16, 1));
  }
}

TYPED_TEST(optimiser_of, rowwise_adagrad_holds_one_number_a_row) {
  using S = TypeParam;
  tensors<S> t(4, 3);
  auto g = make_gradient(t);
  matrix<double> p = rows_held(t.values).template cast<double>(), w = t.weight.template cast<double>();
  matrix<double> sums = matrix<double>::Zero(4, 1), weight_sums = sums;
  optimiser<S> opt({.dense = update_rule::rowwise_adagrad, .sparse = update_rule::rowwise_adagrad, .epsilon = 1e-3, .weight_decay = 0.3});
  const auto expect = [](auto& row, const auto& gradient, double& sum) {
    sum += gradient.squaredNorm() / 3;
    row -= 0.1 * gradient / (std::sqrt(sum) + 1e-3);
  };
  for (std::uint64_t s = 0; s < 3; ++s) {
    touch<S>(rows_of(g.values), {1, static_cast<slot_t>(s == 1 ? 2 : 3)}, s);
    g.weight = random_matrix<S>(4, 3, 50 + s);
    for (index_t i = 0; i < 2; ++i) {
      const auto at = rows_of(g.values).rows[std::size_t(i)];
      auto row = p.row(at);
      expect(row, rows_of(g.values).values().map().row(i).template cast<double>(), sums(at, 0));
    }
    for (index_t i = 0; i < 4; ++i) {
      auto row = w.row(i);
      expect(row, g.weight.row(i).template cast<double>(), weight_sums(i, 0));
    }
    opt.step(t, g, 0.1);
  }
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;
  EXPECT_LT((rows_held(t.values).template cast<double>() - p).cwiseAbs().maxCoeff(), tolerance);
  EXPECT_LT((t.weight.template cast<double>() - w).cwiseAbs().maxCoeff(), tolerance);
  std::map<std::string, index_t> sizes;
  opt.visit_state([&](const std::string& name, auto& x) {
    if constexpr (!std::is_arithmetic_v<std::remove_reference_t<decltype(x)>>) sizes[name] = x.size();
  });
  EXPECT_EQ(sizes.at("second_moment.memory.values"), 4);
  EXPECT_FALSE(sizes.contains("first_moment.memory.values"));
}

TYPED_TEST(optimiser_of, groups_by_name_pattern) {
  using S = TypeParam;
  const auto moved = [](optimiser_config config, double rate = 0.1) {
    tensors<S> t;
    const tensors<S> before;  // equal numbers, other memory
    auto g = make_gradient(t);
    set_gradient(t, g, 1);
    config.dense = config.sparse = update_rule::sgd;
    optimiser<S> opt(config);
    opt.step(t, g, rate);
    const auto largest = [](const matrix<S>& a, const matrix<S>& b) { return double((a - b).cwiseAbs().maxCoeff()); };
    return std::map<std::string, double>{
        {"weight", largest(t.weight, before.weight) / double(g.weight.cwiseAbs().maxCoeff())},
        {"bias", largest(t.bias, before.bias) / double(g.bias.cwiseAbs().maxCoeff())},
        {"embedding", largest(t.embedding, before.embedding) / double(g.embedding.values().map().cwiseAbs().maxCoeff())},
        {"values", largest(rows_held(t.values), rows_held(before.values)) / double(rows_of(g.values).values().map().cwiseAbs().maxCoeff())}};
  };
  const double near = 1e-6;
  auto m = moved({.groups = {{.pattern = "bias", .frozen = true}, {.pattern = "*.values", .rate = 4}, {.pattern = "emb??ding", .own_rate = 0.3}}});
  EXPECT_NEAR(m["weight"], 0.1, near);
  EXPECT_EQ(m["bias"], 0);
  EXPECT_NEAR(m["values"], 0.4, near);
  EXPECT_NEAR(m["embedding"], 0.3, near);
  m = moved({.groups = {{.pattern = "weight", .rate = 2}, {.pattern = "*", .rate = 3}}});
  EXPECT_NEAR(m["weight"], 0.2, near) << "the first group that fits counts";
  EXPECT_NEAR(m["bias"], 0.3, near);
  m = moved({.groups = {{.pattern = "!*weight", .frozen = true}}});
  EXPECT_NEAR(m["weight"], 0.1, near);
  EXPECT_EQ(m["bias"] + m["values"] + m["embedding"], 0);
  m = moved({.groups = {{.pattern = "*.values", .rule = update_rule::lazy_adam}}});
  EXPECT_NE(m["values"], m["embedding"]);
}

TYPED_TEST(optimiser_of, weight_decay_by_group) {
  using S = TypeParam;
  tensors<S> t;
  auto g = make_gradient(t);  // zero: decay alone moves
  const tensors<S> before;
  optimiser<S> opt({.weight_decay = 0.5, .groups = {{.pattern = "bias", .weight_decay = 0}}});
  opt.step(t, g, 0.1);
  EXPECT_LT((t.weight - S(0.95) * before.weight).cwiseAbs().maxCoeff(), 1e-6);
  EXPECT_EQ(t.bias, before.bias);
  EXPECT_EQ(t.embedding, before.embedding) << "rows that are not touched do not decay";
  EXPECT_EQ(rows_held(t.values), rows_held(before.values));
}

TYPED_TEST(optimiser_of, frozen_tensors_hold_no_moments_and_may_thaw) {
  using S = TypeParam;
  tensors<S> t;
  auto g = make_gradient(t);
  set_gradient(t, g, 1);
  optimiser<S> opt({.groups = {{.pattern = "!weight", .frozen = true}}});
  const auto count = [&] {
    int n = 0;
    opt.visit_state([&](const std::string&, auto&) { ++n; });
    return n;
  };
  opt.step(t, g, 0.1);
  EXPECT_EQ(count(), 3) << "steps and two moments";
  const matrix<S> bias = t.bias;
  opt.config.groups[0].frozen = false;
  opt.step(t, g, 0.1);
  EXPECT_EQ(count(), 12) << "steps, eight moments, and that three tensors stood still in one step";
  EXPECT_NE(t.bias, bias);
}

TYPED_TEST(optimiser_of, resumes_from_saved_moments_with_the_same_bits) {
  using S = TypeParam;
  for (const update_rule sparse : {update_rule::lazy_adam, update_rule::rowwise_adagrad}) {
    const optimiser_config config{.sparse = sparse, .weight_decay = 0.1};
    const auto run = [&](tensors<S>& t, optimiser<S>& opt, std::uint64_t first, std::uint64_t last) {
      auto g = make_gradient(t);
      for (std::uint64_t s = first; s < last; ++s) {
        set_gradient(t, g, s);
        opt.step(t, g, 0.01);
      }
    };
    tensors<S> straight, interrupted;  // each with a table of its own
    optimiser<S> a(config), b(config);
    run(straight, a, 0, 8);
    run(interrupted, b, 0, 4);
    std::map<std::string, matrix<S>> saved;
    std::int64_t steps = 0;
    b.visit_state([&](const std::string& name, auto& x) {
      if constexpr (std::is_arithmetic_v<std::remove_reference_t<decltype(x)>>)
        steps = x;
      else
        saved[name] = x.map();
    });
    EXPECT_EQ(steps, 4);
    optimiser<S> c(config);
    c.prepare(interrupted, make_gradient(interrupted));
    c.visit_state([&](const std::string& name, auto& x) {
      if constexpr (std::is_arithmetic_v<std::remove_reference_t<decltype(x)>>)
        x = steps;
      else
        x.map() = saved.at(name);
    });
    run(interrupted, c, 4, 8);
    EXPECT_EQ(straight.weight, interrupted.weight);
    EXPECT_EQ(straight.bias, interrupted.bias);
    EXPECT_EQ(straight.embedding, interrupted.embedding);
    EXPECT_EQ(rows_held(straight.values), rows_held(interrupted.values));
  }
}

TYPED_TEST(optimiser_of, same_bits_with_any_number_of_workers) {
  using S = TypeParam;
  for (const update_rule sparse : {update_rule::sgd, update_rule::adam, update_rule::lazy_adam, update_rule::rowwise_adagrad}) {
    const auto run = [&](const executor& exec) {
      workspace work(exec);
      context ctx;
      ctx.exec = &exec;
      ctx.work = &work;
      tensors<S> t(1201, 37);  // three pieces of work and a tail
      auto g = make_gradient(t);
      optimiser<S> opt({.dense = sparse, .sparse = sparse});
      double norms = 0;
      std::vector<slot_t> rows;
      for (slot_t i = 0; i < 1200; i += 2) rows.push_back(i);
      for (std::uint64_t s = 0; s < 3; ++s) {
        set_gradient(t, g, s);
        touch<S>(rows_of(g.values), std::vector<slot_t>(rows), s);
        norms += clip_by_global_norm(t, g, 1.0, ctx);
        opt.step(t, g, 0.01, ctx);
      }
      return std::tuple(norms, t.weight, t.bias, t.embedding, matrix<S>(rows_held(t.values)));
    };
    const auto serial = run(serial_executor);
    for (const index_t workers : {1, 2, 7}) EXPECT_TRUE(run(parallel_executor(workers)) == serial) << workers;
  }
}

TYPED_TEST(optimiser_of, clips_by_global_norm) {
  using S = TypeParam;
  tensors<S> t;
  auto g = make_gradient(t);
  set_gradient(t, g, 3);
  const auto sum = [](const auto& m) { return m.template cast<double>().squaredNorm(); };
  const double weights = sum(g.weight) + sum(g.bias), tables = sum(g.embedding.values().map()) + sum(rows_of(g.values).values().map());
  const double norm = std::sqrt(weights + tables);  // the state's gradient of ones is no part of it, the shared table is one part
  EXPECT_NEAR(global_norm(t, g), norm, 1e-9 * norm);
  const matrix<S> before = g.weight;
  EXPECT_NEAR(clip_by_global_norm(t, g, 2 * norm), norm, 1e-9 * norm);
  EXPECT_EQ(g.weight, before) << "below the limit nothing changes";
  EXPECT_NEAR(clip_by_global_norm(t, g, norm / 4), norm, 1e-9 * norm);
  EXPECT_LT((g.weight - before / S(4)).cwiseAbs().maxCoeff(), 1e-6);
  EXPECT_NEAR(global_norm(t, g), norm / 4, 1e-6 * norm);
  EXPECT_TRUE((g.running.array() == 1).all());
  // Groups of their own.
  const double values = global_norm(t, g, {}, "*.values");
  clip_by_global_norm(t, g, values / 2, {}, "*.values");
  EXPECT_NEAR(global_norm(t, g, {}, "*.values"), values / 2, 1e-6 * values);
  EXPECT_NEAR(std::hypot(global_norm(t, g, {}, "!*.values"), values), norm / 4, 1e-6 * norm);
  // What is not finite is left for the caller to see.
  g.bias(0, 0) = std::numeric_limits<S>::infinity();
  const matrix<S> infinite = g.weight;
  EXPECT_EQ(clip_by_global_norm(t, g, 1.0), std::numeric_limits<double>::infinity());
  EXPECT_EQ(g.weight, infinite);
}

/// Two linear layers, to train for real.
template <class S>
struct two_layers {
  using scalar = S;
  struct record {
    matrix<S> hidden;
  };
  struct gradient {
    typename linear<S>::gradient first, second;
  };
  linear<S> first{{6, 8}, rng_key{1}}, second{{8, 4}, rng_key{2}};

  void backward(const matrix<S>& x, const matrix<S>& target, gradient& g) const {
    matrix<S> h(x.rows(), 8), y(x.rows(), 4), dh(x.rows(), 8), dx(x.rows(), 6);
    first.forward(x, h, {});
    second.forward(h, y, {});
    loss = mean_square<S>(y, target, reduction::mean, y).loss;
    second.backward(h, {}, y, dh, g.second, {});
    first.backward(x, {}, dh, dx, g.first, {});
  }
  mutable double loss = 0;
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("first", s.first...);
    f("second", s.second...);
  }
};

TYPED_TEST(optimiser_of, accumulated_gradients_equal_one_large_batch) {
  using S = TypeParam;
  const matrix<S> x = random_matrix<S>(32, 6, 1), target = random_matrix<S>(32, 4, 2);
  two_layers<S> whole, parts;
  auto a = make_gradient(whole), b = make_gradient(parts);
  whole.backward(x, target, a);
  for (index_t i = 0; i < 4; ++i) parts.backward(x.middleRows(8 * i, 8), target.middleRows(8 * i, 8), b);
  scale_gradient(parts, b, 0.25);
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;  // sums in another order
  EXPECT_GT(a.first.weight.cwiseAbs().maxCoeff(), 0.01);
  EXPECT_LT((a.first.weight - b.first.weight).cwiseAbs().maxCoeff(), tolerance);
  EXPECT_LT((a.second.bias - b.second.bias).cwiseAbs().maxCoeff(), tolerance);
}

TYPED_TEST(optimiser_of, trains_and_refreshes_packed_weights) {
  using S = TypeParam;
  two_layers<S> model;
  model.first.prepack();
  const matrix<S> x = random_matrix<S>(32, 6, 1), target = x.leftCols(4) * S(2);
  auto g = make_gradient(model);
  optimiser<S> opt;
  model.backward(x, target, g);
  const double start = model.loss;
  for (int s = 0; s < 300; ++s) {
    set_zero(model, g);
    model.backward(x, target, g);
    opt.step(model, g, 0.02);
  }
  EXPECT_LT(model.loss, 1e-3 * start);
  matrix<S> y(32, 8), z(32, 8);
  model.first.forward(x, y, {});
  two_layers<S> unpacked = model;
  unpacked.first.packed = {};
  unpacked.first.forward(x, z, {});
  EXPECT_LT((y - z).cwiseAbs().maxCoeff(), 1e-5);
}

TEST(optimisers, config_errors) {
  const auto refuses = [](optimiser_config c) { EXPECT_THROW(optimiser<double>{c}, config_error); };
  const double nan = std::nan("");
  for (const double beta : {-0.1, 1.0, nan}) {
    refuses({.beta1 = beta});
    refuses({.beta2 = beta});
  }
  refuses({.epsilon = 0});
  refuses({.weight_decay = -1});
  refuses({.groups = {{.pattern = "*", .rate = -1}}});
  refuses({.groups = {{.pattern = "*", .own_rate = -1}}});
  refuses({.groups = {{.pattern = "*", .weight_decay = nan}}});
  tensors<double> t;
  auto g = make_gradient(t);
  optimiser<double> opt;
  EXPECT_THROW(opt.step(t, g, -1e-3), config_error);
  EXPECT_THROW(opt.step(t, g, nan), config_error);
  EXPECT_THROW(clip_by_global_norm(t, g, 0), config_error);
  opt.config.beta1 = 2;
  EXPECT_THROW(opt.step(t, g, 1e-3), config_error) << "settings that were changed are checked again";
  EXPECT_EQ(opt.steps(), 0);
}

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const state_error& e) {
    return e.what();
  }
  return "nothing thrown";
}

TEST(optimisers, a_pattern_that_fits_nothing_is_named_before_anything_moves) {
  tensors<double> t;
  const matrix<double> before = t.weight;
  auto g = make_gradient(t);
  set_gradient(t, g, 1);
  optimiser<double> opt({.groups = {{.pattern = "*", .rate = 1}, {.pattern = "*.vaules", .frozen = true}}});
  EXPECT_NE(message([&] { opt.step(t, g, 0.1); }).find("'*.vaules'"), std::string::npos);
  EXPECT_EQ(t.weight, before);
  opt.config.groups.pop_back();
  opt.step(t, g, 0.1);
  EXPECT_NE(t.weight, before);
  EXPECT_NE(message([&] { (void)clip_by_global_norm(t, g, 1, {}, "no such"); }).find("'no such'"), std::string::npos);
  EXPECT_THROW(scale_gradient(t, g, 1, {}, "no such"), state_error);
}

TEST(optimisers, another_model_or_gradient_is_refused) {
  tensors<double> t, larger(24);
  auto g = make_gradient(t), g_larger = make_gradient(larger);
  optimiser<double> opt;
  EXPECT_EQ(message([&] { opt.step(t, g_larger, 0.1); }), "optimiser: expected a gradient of weight of shape [23 x 9], got [24 x 9]");
  g.embedding.total_rows = 2;
  EXPECT_EQ(message([&] { opt.step(t, g, 0.1); }), "optimiser: expected a gradient of embedding of shape [23 x 9], got [2 x 9]");
  g.embedding.total_rows = 23;
  opt.step(t, g, 0.1);
  EXPECT_THROW(opt.step(larger, g_larger, 0.1), state_error);
  tensors<double> wider(23, 12);
  EXPECT_EQ(message([&] { opt.step(wider, make_gradient(wider), 0.1); }), "optimiser: rule or shape of weight changed since its moments were made");
  two_layers<double> other;
  auto g_other = make_gradient(other);
  EXPECT_THROW(opt.step(other, g_other, 0.1), state_error);
  opt.config.dense = update_rule::sgd;
  EXPECT_THROW(opt.step(t, g, 0.1), state_error) << "the rule of a tensor that has moved";
}

TEST(optimisers, patterns) {
  using detail::matches;
  EXPECT_TRUE(matches("*", "a.b"));
  EXPECT_TRUE(matches("*", ""));
  EXPECT_TRUE(matches("", ""));
  EXPECT_FALSE(matches("", "a"));
  EXPECT_TRUE(matches("*bias", "blocks.0.bias"));
  EXPECT_FALSE(matches("*bias", "blocks.0.biases"));
  EXPECT_TRUE(matches("blocks.*.w*t", "blocks.3.attention.weight"));
  EXPECT_TRUE(matches("blocks.?.bias", "blocks.1.bias"));
  EXPECT_FALSE(matches("blocks.?.bias", "blocks.10.bias"));
  EXPECT_TRUE(matches("a*b*c", "aXbXbc"));
  EXPECT_TRUE(matches("a**", "a"));
  EXPECT_TRUE(matches("!*bias", "weight"));
  EXPECT_FALSE(matches("!*bias", "bias"));
  EXPECT_FALSE(matches(std::string(30, '*') + "b", std::string(5000, 'a'))) << "and ends soon";
}

TEST(schedules, warm_up_then_decay) {
  const learning_rate_schedule cosine{.learning_rate = 2, .warmup_steps = 4, .total_steps = 14, .start_ratio = 0.5, .final_ratio = 0.1};
  EXPECT_EQ(cosine(0), 1);
  EXPECT_EQ(cosine(2), 1.5);
  EXPECT_EQ(cosine(4), 2);
  EXPECT_NEAR(cosine(9), 2 * 0.55, 1e-15);
  EXPECT_EQ(cosine(14), 0.2);
  EXPECT_EQ(cosine(1000), 0.2);
  learning_rate_schedule s = cosine;
  s.shape = decay::linear;
  EXPECT_EQ(s(2), 1.5);
  EXPECT_NEAR(s(5), 2 * (0.1 + 0.9 * 0.9), 1e-15);
  EXPECT_NEAR(s(13), 2 * (0.1 + 0.9 * 0.1), 1e-15);
  EXPECT_EQ(s(14), 0.2);
  s.shape = decay::constant;
  EXPECT_EQ(s(2), 1.5);
  EXPECT_EQ(s(1000), 2);
  EXPECT_EQ((learning_rate_schedule{.learning_rate = 3, .shape = decay::constant}(0)), 3);
  EXPECT_THROW((void)(learning_rate_schedule{.warmup_steps = 10, .total_steps = 5}(0)), config_error);
  EXPECT_THROW((void)(learning_rate_schedule{.learning_rate = -1, .total_steps = 5}(0)), config_error);
  EXPECT_THROW((void)cosine(-1), config_error);
  const value_rate_schedule v{.times = 4, .rate = 0.5, .total_steps = 10};
  EXPECT_EQ(v(0), 4);
  EXPECT_NEAR(v(1), 3.4, 1e-15);
  EXPECT_EQ(v(5), 1);
  EXPECT_EQ(v(9), 1);
  EXPECT_THROW((void)(value_rate_schedule{.rate = 0}(0)), config_error);
}

/// The tensors that a golden file gives names to, as a model.
struct named_tensors {
  using scalar = double;
  struct record {};
  struct gradient {
    std::map<std::string, matrix<double>> dense;
    row_gradient<double> table;
  };
  std::map<std::string, matrix<double>> dense;
  matrix<double> table;
  void prepare(gradient& g) const {
    for (const auto& [name, p] : dense) g.dense[name];
  }
  template <class F, class First, class... T>
  static void visit(F&& f, First& s, T&... rest) {
    for (auto& [name, p] : s.dense) f(name, p, rest.dense.at(name)...);
    f("table", s.table, rest.table...);
  }
};

// Equal to the golden files to 1e-9, as their description asks.
TEST(optimisers, golden_files) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(__FILE__).parent_path() / "../../golden")) {
    if (entry.path().filename().string().rfind("optimizer_", 0) != 0) continue;
    ++files;
    SCOPED_TRACE(entry.path());
    const safetensors_file file(entry.path());
    const auto config = nlohmann::json::parse(file.metadata().at("config"));
    // A tensor, or the part of its first axis that belongs to step s, as a matrix of `cols` columns.
    const auto load = [&](const std::string& name, index_t cols, index_t s = 0, index_t steps = 1) {
      const auto numbers = file.read<double>(name);
      const index_t n = index_t(numbers.size()) / steps;
      return matrix<double>(Eigen::Map<const matrix<double>>(numbers.data() + s * n, n / cols, cols));
    };
    const auto near = [](const auto& a, const auto& b) { EXPECT_LT((a - b).cwiseAbs().maxCoeff(), 1e-9 * b.cwiseAbs().maxCoeff()); };
    named_tensors model;
    std::map<std::string, index_t> cols;
    if (config.contains("shapes"))
      for (const auto& [name, s] : config["shapes"].items()) {
        cols[name] = s.back();
        model.dense[name].setZero(s.size() > 1 ? index_t(s[0]) : 1, cols[name]);
      }
    if (config.contains("touched"))
      model.table.setZero(config.value("rows", config.value("table_rows", 0)), config.value("width", config.value("table_width", 0)));
    auto g = make_gradient(model);
    const auto touch_rows = [&](index_t first, index_t last) {
      const auto all = file.read<std::int64_t>("input.rows");
      std::vector<slot_t> rows;
      for (index_t i = first; i < last; ++i) rows.push_back(static_cast<slot_t>(all[std::size_t(i)]));
      g.table.assign_rows(std::move(rows));
      g.table.values().map() = load("input.row_gradients", model.table.cols()).middleRows(first, last - first);
    };
    const auto state = [](auto& opt) {
      std::map<std::string, matrix<double>> all;
      opt.visit_state([&](const std::string& name, auto& x) {
        if constexpr (!std::is_arithmetic_v<std::remove_reference_t<decltype(x)>>) all[name] = x.map();
      });
      return all;
    };

    if (config.contains("decayed")) {  // adamw
      for (auto& [name, p] : model.dense) p = load("param." + name, cols[name]);
      std::vector<parameter_group> groups;
      for (const auto& name : config["decayed"]) groups.push_back({.pattern = name, .weight_decay = config["weight_decay"].get<double>()});
      optimiser<double> opt({.beta1 = config["beta1"], .beta2 = config["beta2"], .epsilon = config["epsilon"], .groups = groups});
      const index_t steps = config["steps"];
      for (index_t s = 0; s < steps; ++s) {
        for (auto& [name, q] : g.dense) q = load("input.gradient." + name, cols[name], s, steps);
        opt.step(model, g, load("input.learning_rate", steps)(0, s));
        for (const auto& [name, p] : model.dense) near(p, load("output." + name, cols[name], s, steps));
      }
      const auto moments = state(opt);
      for (const auto& [name, c] : cols) {
        near(moments.at("first_moment." + name), load("after.first_moment." + name, c));
        near(moments.at("second_moment." + name), load("after.second_moment." + name, c));
      }
    } else if (config.contains("beta1")) {  // lazy adam
      const index_t steps = config["steps"], width = config["width"];
      model.table = load("param.table", width);
      const auto offsets = file.read<std::int64_t>("input.row_offsets");
      optimiser<double> opt({.beta1 = config["beta1"], .beta2 = config["beta2"], .epsilon = config["epsilon"]});
      for (index_t s = 0; s < steps; ++s) {
        touch_rows(offsets[std::size_t(s)], offsets[std::size_t(s) + 1]);
        opt.step(model, g, config["learning_rate"]);
        near(model.table, load("output.table", width, s, steps));
      }
      near(state(opt).at("first_moment.table"), load("after.first_moment", width));
      near(state(opt).at("second_moment.table"), load("after.second_moment", width));
    } else if (config.contains("max_norm")) {
      for (auto& [name, q] : g.dense) q = load("input.gradient." + name, cols[name]);
      touch_rows(0, config["touched"]);
      EXPECT_NEAR(clip_by_global_norm(model, g, config["max_norm"]), load("output.norm", 1)(0, 0), 1e-9);
      for (const auto& [name, q] : g.dense) near(q, load("output.gradient." + name, cols[name]));
      near(g.table.values().map(), load("output.row_gradients", model.table.cols()));
    } else {
      learning_rate_schedule schedule{.learning_rate = config["learning_rate"],
                                      .warmup_steps = config["warmup_steps"],
                                      .total_steps = config["total_steps"],
                                      .start_ratio = config["start_ratio"],
                                      .final_ratio = config["final_ratio"]};
      const auto steps = file.read<std::int64_t>("input.steps");
      for (std::size_t i = 0; i < steps.size(); ++i) {
        double rate = schedule(steps[i]);
        if (config["kind"] == "value_rate") rate *= value_rate_schedule{config["times"], config["rate"], config["total_steps"]}(steps[i]);
        EXPECT_NEAR(rate, load("output.learning_rate", 1)(index_t(i), 0), 1e-9 * rate);
      }
    }
  }
  EXPECT_EQ(files, 7);
}

}  // namespace optimisers_tests
