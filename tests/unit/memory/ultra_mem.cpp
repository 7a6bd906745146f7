#include "lithe/layers/memory/ultra_mem.hpp"

#include <gtest/gtest.h>

#include "lithe/layers/memory/ultra_mem_presets.hpp"
#include "lithe/training/gradient_check.hpp"
#include "lithe/training/optimiser.hpp"
#include "support/malloc_count.hpp"
#include "support/same_bits.hpp"

namespace ultra_mem_tests {

using namespace lithe;
using memory = ultra_mem<double>;
using shared_memory = ultra_mem<double, shared_table<dense_table<double>>>;
static_assert(layer<memory> && cached_layer<memory> && layer<ultra_mem<float>> && layer<shared_memory>);

constexpr index_t D = 10, T = 9;

ultra_mem_config small() { return {.features = D, .sub_keys = 10, .key_width = 6, .top_k = 4, .value_width = 8}; }
ultra_mem_config second() {  // UltraMemV2
  auto c = small();
  c.heads = 1;
  c.query = tucker_query::per_rank;
  c.groups = 1;
  c.pre_width = 6;
  return c;
}
memory make(const ultra_mem_config& c) {
  memory m(c, rng_key{3});
  for (index_t i = 0; i < m.expansion.values.view().rows(); ++i) m.expansion.values.view().row_array(i) *= 30;  // values of size 0.6
  return m;
}
matrix<double> input(index_t rows = T, std::uint64_t key = 2, index_t cols = D) {
  matrix<double> x(rows, cols);
  fill_normal<double>(x, 1.0, rng_key{key});
  return x;
}
matrix<double> output_of(const memory& m, const matrix<double>& x, const context& ctx = {}) {
  matrix<double> y(x.rows(), x.cols());
  m.forward(x, y, ctx);
  return y;
}
memory::record recorded(const memory& m, const matrix<double>& x, matrix<double>& y, const context& ctx = {}) {
  memory::record r;
  y.resize(x.rows(), x.cols());
  m.forward(x, y, r, ctx);
  return r;
}
double difference(const matrix<double>& a, const matrix<double>& b) { return (a - b).cwiseAbs().maxCoeff(); }

using vector = Eigen::VectorXd;

/// The specification's steps 1 to 8 by plain loops over all keys: shared or per-rank queries, RMS norms, no convolution.
struct reference {
  const memory& m;
  vector normed(const vector& v, const matrix<double>& weight) const {
    return (v / std::sqrt(v.squaredNorm() / static_cast<double>(v.size()) + 1e-5)).cwiseProduct(weight.row(0).transpose());
  }
  /// The scores [r] of key i of an axis.
  vector factor(const vector& x, index_t head, index_t axis, index_t i) const {
    const index_t d = m.config.key_width, r = m.config.rank;
    const vector z = m.query.projection.weight * x;
    vector out(r);
    for (index_t a = 0; a < r; ++a) {
      const index_t block = m.config.query == tucker_query::per_rank ? axis * r + a : axis;
      const vector key = m.search.keys.row((head * 2 + axis) * m.config.sub_keys + i).segment(a * d, d).transpose();
      out(a) = normed(z.segment(block * d, d), m.query.norm.weight).dot(normed(key, m.search.norm.weight));
    }
    return out;
  }
  static std::vector<index_t> largest(const std::vector<double>& s, index_t k) {
    std::vector<index_t> order(s.size());
    for (std::size_t i = 0; i < s.size(); ++i) order[i] = static_cast<index_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return s[static_cast<std::size_t>(a)] > s[static_cast<std::size_t>(b)]; });
    order.resize(static_cast<std::size_t>(k));
    return order;
  }
  double score(index_t head, index_t core, const vector& R, const vector& Q) const {
    const index_t r = m.config.rank;
    return R.dot(m.search.cores.middleRows((core * m.config.heads + head) * r, r) * Q);
  }
  matrix<double> operator()(const matrix<double>& x) const {
    const auto& c = m.config;
    const auto& e = m.expansion.config;
    const index_t n = c.sub_keys, k = m.search.config.final_k, width = c.value_width / c.cores;
    matrix<double> y = matrix<double>::Zero(x.rows(), D);
    for (index_t t = 0; t < x.rows(); ++t) {
      const vector token = x.row(t).transpose();
      for (index_t head = 0; head < c.heads; ++head) {
        std::vector<double> alpha, beta;
        for (index_t i = 0; i < n; ++i) {
          alpha.push_back(m.search.u.row(head).dot(factor(token, head, 0, i)));
          beta.push_back(m.search.t.row(head).dot(factor(token, head, 1, i)));
        }
        const auto I = largest(alpha, c.top_k), J = largest(beta, c.top_k);
        std::vector<double> all;
        for (const index_t i : I)
          for (const index_t j : J) {
            double sum = 0;
            for (index_t core = 0; core < c.cores; ++core) sum += score(head, core, factor(token, head, 0, i), factor(token, head, 1, j));
            all.push_back(sum);
          }
        for (const index_t cell : largest(all, k)) {
          const index_t i = I[static_cast<std::size_t>(cell / c.top_k)], j = J[static_cast<std::size_t>(cell % c.top_k)];
          const index_t A = m.expansion.permutation(0, i * n + j), row = (A % e.rows + e.offset) % e.table_rows, p = e.groups == 1 ? 0 : A / e.rows;
          double psi = 1;
          if (c.pre_width > 0) psi = m.expansion.pre_values.view().map().row(row).dot((m.expansion.pre_projection.weight * token).transpose());
          for (index_t core = 0; core < c.cores; ++core)
            y.row(t) += psi * score(head, core, factor(token, head, 0, i), factor(token, head, 1, j)) * m.expansion.values.view().map().row(row * c.cores + core) *
                        m.expansion.projection.weight.middleCols(p * c.value_width + core * width, width).transpose();
        }
      }
    }
    return y;
  }
};

TEST(ultra_mem, equals_plain_loops_over_all_keys) {
  const auto equal = [](const char* what, const ultra_mem_config& c) {
    const auto m = make(c);
    const auto x = input();
    const auto expected = reference{m}(x);
    EXPECT_LT(difference(output_of(m, x), expected), 1e-12 * std::max(1.0, expected.cwiseAbs().maxCoeff())) << what;  // a few hundred terms
  };
  equal("defaults", small());
  equal("v2", second());
  auto c = small();
  c.rank = 3;
  c.cores = 4;
  c.final_k = 7;
  equal("rank 3, 4 cores, more picks than candidates of an axis", c);
  c = small();
  c.rank = c.cores = 1;
  c.expansion = 1;
  equal("one rank, core and table", c);
  c = small();
  c.rank = 9;  // beyond the ranks that are decomposed without the heap
  c.expansion = 25;
  c.table_rows = 11;
  c.table_offset = 9;
  equal("rank 9, a shared table that wraps around", c);
  c = second();
  c.groups = 4;
  c.top_k = 10;
  equal("all keys are candidates", c);
}

TEST(ultra_mem, gradients_in_each_query_mode) {
  for (const auto mode : {tucker_query::shared, tucker_query::per_rank, tucker_query::released, tucker_query::ascend}) {
    auto c = small();
    c.query = mode;
    const auto m = make(c);
    const auto report = gradient_check(m, input());
    EXPECT_LT(report.worst(), 1e-5) << report.where();  // as the specification asks
    EXPECT_GT(report.smallest_gradient(), 1e-2);
  }
}
TEST(ultra_mem, gradients_of_pre_values_and_relu_scores) {
  auto c = second();
  c.pre_gelu = c.relu_scores = true;
  auto m = make(c);
  for (index_t i = 0; i < m.expansion.pre_values.rows(); ++i) m.expansion.pre_values.view().row_array(i) *= 30;
  const auto report = gradient_check(m, input());
  EXPECT_LT(report.worst(), 1e-5) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
}
TEST(ultra_mem, gradients_of_own_losses_norms_convolution_and_dropout) {
  auto c = small();
  c.rank = 3;
  c.norm = score_norm_kind::layer;
  c.norm_bias = true;
  c.query_conv = 5;
  c.rank_loss = 0.7;
  c.rank_margin = 0.05;
  c.balance = 0.5;
  c.output_dropout = 0.3;
  const auto m = make(c);
  const std::vector<index_t> offsets{0, 2, 2, T};
  context ctx;
  ctx.rows = {offsets};
  ctx.train = true;
  ctx.key = {7};
  const auto report = gradient_check(m, input(), ctx);
  EXPECT_LT(report.worst(), 1e-5) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
  c.norm = score_norm_kind::none;
  c.query = tucker_query::per_rank;
  const auto plain = gradient_check(make(c), input(), ctx);
  EXPECT_LT(plain.worst(), 1e-5) << plain.where();
}

TEST(ultra_mem, every_option_changes_the_output) {
  context ctx;
  ctx.train = true;
  const auto base = output_of(make(small()), input(), ctx);
  const auto differs = [&](const char* what, auto&& change, ultra_mem_config c = small()) {
    const auto before = output_of(make(c), input(), ctx);
    change(c);
    EXPECT_GT(difference(output_of(make(c), input(), ctx), before), 1e-4) << what;
  };
  differs("heads", [](auto& c) { c.heads = 3; });
  differs("sub_keys", [](auto& c) { c.sub_keys = 12; });
  differs("key_width", [](auto& c) { c.key_width = 5; });
  differs("rank", [](auto& c) { c.rank = 3; });
  differs("cores", [](auto& c) { c.cores = 4; });
  differs("top_k", [](auto& c) { c.top_k = 3; });
  differs("final_k", [](auto& c) { c.final_k = 3; });
  differs("query", [](auto& c) { c.query = tucker_query::per_rank; });
  differs("ascend", [](auto& c) { c.query = tucker_query::ascend; });
  auto released = small();
  released.query = tucker_query::released;
  differs("released", [](auto& c) { c.query = tucker_query::per_rank; }, released);
  differs("layer norm", [](auto& c) { c.norm = score_norm_kind::layer; });
  differs("no norm", [](auto& c) { c.norm = score_norm_kind::none; });
  differs("epsilon", [](auto& c) { c.epsilon = 1; });
  differs("relu_scores", [](auto& c) { c.relu_scores = true; }, [] {
    auto c = small();
    c.top_k = 10;
    c.final_k = 100;  // negative scores among the picks
    return c;
  }());
  differs("expansion", [](auto& c) { c.expansion = 1; });
  differs("groups", [](auto& c) { c.groups = 1; });
  differs("value_width", [](auto& c) { c.value_width = 6; });
  auto wrapping = small();
  wrapping.table_offset = 10;
  differs("table_rows", [](auto& c) { c.table_rows = 30; }, wrapping);
  differs("table_offset", [](auto& c) { c.table_offset = 3; });
  differs("pre_width", [](auto& c) { c.pre_width = 3; });
  differs("pre_gelu", [](auto& c) { c.pre_gelu = true; }, second());
  differs("query_conv", [](auto& c) { c.query_conv = 5; });
  differs("output_dropout", [](auto& c) { c.output_dropout = 0.5; });
  differs("start", [](auto& c) { c.start.kind = ultra_mem_start_kind::released_v2; });
}

TEST(ultra_mem, prefilter_selects_what_brute_force_selects_for_factors_of_one_sign) {
  auto c = small();
  c.rank = c.cores = c.expansion = c.heads = 1;
  c.norm = score_norm_kind::none;
  auto m = make(c);
  m.search.cores.setOnes();
  m.search.u.setOnes();
  m.search.t.setOnes();
  m.search.keys = m.search.keys.cwiseAbs();
  m.query.projection.weight = m.query.projection.weight.cwiseAbs();
  const matrix<double> x = input().cwiseAbs();
  matrix<double> y;
  const auto r = recorded(m, x, y);
  for (index_t t = 0; t < T; ++t) {
    std::vector<double> all;
    const vector q = m.query.projection.weight * x.row(t).transpose();
    for (index_t i = 0; i < 10; ++i)
      for (index_t j = 0; j < 10; ++j) all.push_back(q.head(6).dot(m.search.keys.row(i)) * q.tail(6).dot(m.search.keys.row(10 + j)));
    const auto best = reference::largest(all, 4);
    for (index_t p = 0; p < 4; ++p) EXPECT_EQ(r.addresses.value(t, p), best[static_cast<std::size_t>(p)]);
  }
}

TEST(ultra_mem, singular_vectors_follow_the_cores_with_a_continuous_sign) {
  auto m = make(small());
  EXPECT_GE(m.search.u.row(0).sum(), 0);  // a fresh pair
  auto turned = m;
  turned.search.u *= -1;
  turned.search.t *= -1;
  const auto g = make_gradient(m);
  for (int step = 1; step <= 20; ++step) {
    const auto u = m.search.u;
    for (memory* each : {&m, &turned}) {
      each->search.cores(1, 0) += 0.02;
      each->search.cores(4, 1) -= 0.03;
      after_step(*each, g);
    }
    EXPECT_GT(m.search.u.row(0).dot(u.row(0)), 0.95);
    EXPECT_LT(difference(turned.search.u, -m.search.u) + difference(turned.search.t, -m.search.t), 1e-14);
  }
  const matrix<double> C = m.search.cores.middleRows(0, 2) + m.search.cores.middleRows(4, 2);  // head 0
  const vector Ct = C * m.search.t.row(0).transpose();
  EXPECT_LT((Ct - Ct.norm() * m.search.u.row(0).transpose()).norm(), 1e-12);
  const auto before = m.search.u;
  m.search.follow();
  EXPECT_LT(difference(m.search.u, before), 1e-15);  // idempotent
  EXPECT_GT(difference(output_of(m, input()), output_of(turned, input())), 1e-3);  // the sign decides what is chosen

  m.search.cores.setZero();  // leading vectors that are not defined stay
  m.search.follow();
  EXPECT_EQ(m.search.u, before);
  m.search.cores(0, 0) = m.search.cores(1, 1) = 1;  // λ₁ = λ₂ for head 0
  m.search.follow();
  EXPECT_EQ(m.search.u.row(0), before.row(0));
}

TEST(ultra_mem, rank_loss_is_its_definition) {
  auto c = small();
  c.rank_loss = 2;
  const auto m = make(c);
  matrix<double> y;
  auto r = recorded(m, input(), y);
  double expected = 0;
  for (index_t h = 0; h < 2; ++h) {
    const matrix<double> C = m.search.cores.middleRows(h * 2, 2) + m.search.cores.middleRows(4 + h * 2, 2);
    const double over = std::max(0.0, Eigen::JacobiSVD<matrix<double>>(C).singularValues()(1) - 0.15);
    expected += over * over / 2;
  }
  EXPECT_GT(expected, 1e-3);
  EXPECT_NEAR(r.rank_loss.loss, 2 * expected, 1e-14);
  c.rank_margin = 100;
  r = recorded(make(c), input(), y);
  EXPECT_EQ(r.rank_loss.loss, 0);
}

TEST(ultra_mem, balance_loss_of_even_keys_is_one_for_each_axis) {
  auto c = small();
  c.balance = 0.5;
  auto m = make(c);
  m.search.norm.weight.setZero();  // all filter scores are 0, so π is uniform, whatever was hit
  matrix<double> y;
  const auto r = recorded(m, input(), y);
  EXPECT_NEAR(r.balance.loss, 0.5 * 2, 1e-14);
  EXPECT_NEAR(r.hits.value.row(0).sum(), 1, 1e-14);
  EXPECT_NEAR(auxiliary_loss(r), 1, 1e-14);
}

TEST(ultra_mem, norms_have_a_bias_only_if_asked_and_then_use_it) {
  auto c = small();
  EXPECT_EQ(make(c).query.norm.bias.size(), 0);
  c.norm_bias = true;
  auto m = make(c);
  EXPECT_EQ(m.query.norm.bias.cols(), c.key_width);
  const auto before = output_of(m, input());
  m.query.norm.bias.setConstant(0.3);
  EXPECT_GT(difference(output_of(m, input()), before), 1e-6);
  c.norm = score_norm_kind::none;
  EXPECT_EQ(make(c).query.norm.bias.size(), 0);
}

TEST(ultra_mem, scaling_cores_scales_the_output_and_scaling_keys_changes_nothing) {
  auto c = small();
  c.epsilon = 1e-300;  // next to nothing
  const auto m = make(c);
  auto scaled = m;
  scaled.search.cores *= 3;
  EXPECT_LT(difference(output_of(scaled, input()), 3 * output_of(m, input())), 1e-12);
  scaled = m;
  scaled.search.keys *= 7;
  EXPECT_LT(difference(output_of(scaled, input()), output_of(m, input())), 1e-12);
}

TEST(ultra_mem, a_core_split_in_two_gives_its_slices_the_same_scores) {
  auto c = small();
  c.cores = 1;
  auto one = make(c);
  c.cores = 2;
  auto two = make(c);
  two.query = one.query;
  two.search.keys = one.search.keys;
  two.search.cores << one.search.cores / 2, one.search.cores / 2;
  one.search.cores /= 2;
  two.search.u = one.search.u;
  two.search.t = one.search.t;
  two.expansion.projection = one.expansion.projection;
  two.expansion.permutation = one.expansion.permutation;
  for (index_t i = 0; i < one.expansion.values.rows(); ++i)
    for (index_t j = 0; j < 8; ++j) two.expansion.values.view()(2 * i + j / 4, j % 4) = one.expansion.values.view()(i, j);
  EXPECT_LT(difference(output_of(one, input()), output_of(two, input())), 1e-13);
}

TEST(ultra_mem, permuting_rows_with_the_permutation_changes_nothing) {
  const auto m = make(small());
  auto moved = m;
  const index_t P = m.expansion.config.rows;
  for (index_t i = 0; i < m.expansion.permutation.size(); ++i) {
    const index_t A = m.expansion.permutation(0, i);
    moved.expansion.permutation(0, i) = static_cast<slot_t>(A / P * P + (A % P + 1) % P);
  }
  for (index_t i = 0; i < 2 * P; ++i) moved.expansion.values.view().map().row((i + 2) % (2 * P)) = m.expansion.values.view().map().row(i);
  EXPECT_LT(difference(output_of(moved, input()), output_of(m, input())), 1e-13);
}

TEST(ultra_mem, folded_values_give_the_same_output) {
  for (auto c : {small(), second()}) {
    auto m = make(c);
    const auto expected = output_of(m, input());
    m.expansion.fold();
    EXPECT_EQ(m.expansion.folded.rows(), (c.groups == 1 ? 1 : 4) * 25 * 2);
    EXPECT_LT(difference(output_of(m, input()), expected), 1e-12);
    m.expansion.projection.weight *= 2;
    refresh(m);
    EXPECT_LT(difference(output_of(m, input()), 2 * expected), 1e-12);
  }
}

TEST(ultra_mem, equal_projections_equal_summed_groups) {
  auto c = small();
  auto concatenated = make(c);
  c.groups = 1;
  auto summed = make(c);
  summed.search = concatenated.search;
  summed.query = concatenated.query;
  summed.expansion.values = concatenated.expansion.values;
  summed.expansion.permutation = concatenated.expansion.permutation;
  for (index_t p = 0; p < 4; ++p) concatenated.expansion.projection.weight.middleCols(p * 8, 8) = summed.expansion.projection.weight;
  EXPECT_LT(difference(output_of(summed, input()), output_of(concatenated, input())), 1e-12);
}

TEST(ultra_mem, prepacked_keys_follow_steps_and_refresh) {
  for (const auto mode : {tucker_query::shared, tucker_query::per_rank}) {
    auto c = small();
    c.query = mode;
    auto m = make(c);
    prepack(m);
    m.search.keys = 0.5 * m.search.keys.reverse().eval();
    m.search.norm.weight *= 2;
    refresh(m);
    auto plain = m;
    plain.search.packed.clear();
    plain.query.projection.packed.clear();
    plain.expansion.projection.packed.clear();
    EXPECT_LT(difference(output_of(m, input()), output_of(plain, input())), 1e-12);
    EXPECT_LT(difference(output_of(m, input()), reference{m}(input())), 1e-11);
    const auto report = gradient_check(m, input());
    EXPECT_LT(report.worst(), 1e-5) << report.where();
  }
}

TEST(ultra_mem, values_alone_learn_from_values_of_zero) {
  auto m = make(small());
  m.expansion.values.fill_normal(0, {});
  const auto x = input();
  matrix<double> y, dx(T, D);
  const auto r = recorded(m, x, y);
  EXPECT_EQ(y.norm(), 0);
  auto g = make_gradient(m);
  m.backward(x, r, input(T, 9), dx, g, {});
  EXPECT_EQ(g.search.keys.norm() + g.search.cores.norm() + g.query.projection.weight.norm() + dx.norm(), 0);
  EXPECT_GT(g.expansion.values.count(), 0);
}

TEST(ultra_mem, layers_share_a_table_from_different_offsets) {
  const auto place = [](index_t layer) { return share_ultra_mem_table(4, 2, layer, 0.5); };
  EXPECT_EQ(place(1).rows, 4);
  EXPECT_EQ(place(1).table_rows, 32);
  EXPECT_EQ(place(1).offset, 16);
  EXPECT_EQ(share_ultra_mem_table(360, 20, 3, 0.5).rows, 1138);
  shared_table<dense_table<double>> values(dense_table<double>(64, 4, {1})), pre(dense_table<double>(32, 6, {2}));
  std::vector<shared_memory> layers;
  for (index_t i = 0; i < 2; ++i) {
    auto c = second();
    c.sub_keys = 8;
    c.table_rows = 32;
    c.table_offset = place(i).offset;
    layers.emplace_back(c, values, pre, rng_key{static_cast<std::uint64_t>(i)});
  }
  matrix<slot_t> rows(T, 4), group(T, 4);
  for (index_t i = 0; i < 2; ++i) {  // share 1/2 of two layers: disjoint rows
    shared_memory::record r;
    matrix<double> y(T, D);
    layers[static_cast<std::size_t>(i)].forward(input(), y, r, {});
    layers[static_cast<std::size_t>(i)].picked(r, rows, group, {});
    EXPECT_GE(rows.minCoeff(), i * 16);
    EXPECT_LT(rows.maxCoeff(), (i + 1) * 16);
  }
  const auto report = gradient_check(layers[1], input());
  EXPECT_LT(report.worst(), 1e-5) << report.where();
}

TEST(ultra_mem, released_queries_leave_half_of_the_projection_alone) {
  auto c = small();
  c.query = tucker_query::released;
  const auto m = make(c);
  matrix<double> y, dx(T, D);
  const auto r = recorded(m, input(), y);
  auto g = make_gradient(m);
  m.backward(input(), r, input(T, 9), dx, g, {});
  EXPECT_GT(g.query.projection.weight.topRows(12).norm(), 1e-2);
  EXPECT_EQ(g.query.projection.weight.bottomRows(12).norm(), 0);
}

TEST(ultra_mem, released_queries_give_each_half_two_heads) {
  auto c = small();
  c.query = tucker_query::released;
  c.heads = 4;
  const auto m = make(c);
  const auto report = gradient_check(m, input());
  EXPECT_LT(report.worst(), 1e-5) << report.where();  // as the specification asks
  EXPECT_GT(report.smallest_gradient(), 1e-2);
  // With the second half's keys, cores and queries those of the first, the other two heads pick what the first two pick.
  auto twice = m;
  twice.query.projection.weight.bottomRows(12) = twice.query.projection.weight.topRows(12);
  auto& s = twice.search;
  const index_t keys = s.keys.rows() / 2, r = s.config.rank;
  s.keys.bottomRows(keys) = s.keys.topRows(keys);
  s.u.bottomRows(2) = s.u.topRows(2);
  s.t.bottomRows(2) = s.t.topRows(2);
  for (index_t core = 0; core < s.config.cores; ++core)
    s.cores.middleRows((core * 4 + 2) * r, 2 * r) = matrix<double>(s.cores.middleRows(core * 4 * r, 2 * r));
  matrix<double> y;
  const auto found = recorded(twice, input(), y).addresses.value;
  EXPECT_TRUE(found.leftCols(found.cols() / 2) == found.rightCols(found.cols() / 2));
  EXPECT_FALSE(recorded(m, input(), y).addresses.value == found);
}

TEST(ultra_mem, the_convolution_looks_back_within_a_sequence_and_decodes) {
  auto c = small();
  c.query_conv = 5;
  const auto m = make(c);
  const auto x = input(11);
  const std::vector<index_t> offsets{0, 7, 7, 11};
  context ctx;
  ctx.rows = {offsets};
  const auto whole = output_of(m, x, ctx);
  EXPECT_LT(difference(output_of(m, x.topRows(7)), whole.topRows(7)), 1e-13);
  EXPECT_LT(difference(output_of(m, x.bottomRows(4)), whole.bottomRows(4)), 1e-13);  // nothing from the sequence before
  EXPECT_GT(difference(output_of(m, x), whole), 1e-4);

  auto cache = m.make_cache(2, 8);  // prefill of 3, then one by one; a rejected draft is truncated
  const auto step = [&](index_t first, index_t n, index_t slot) {
    const std::vector<index_t> slots{slot};
    context one;
    one.slots = slots;
    matrix<double> y(n, D);
    const matrix<double> rows = x.middleRows(first, n);
    m.decode(rows, y, cache, one);
    return difference(y, whole.middleRows(first, n));
  };
  EXPECT_LT(step(0, 3, 0), 1e-12);
  EXPECT_LT(step(7, 4, 1), 1e-12);
  EXPECT_LT(step(3, 2, 0), 1e-12);
  m.truncate(cache, 0, 4);
  for (index_t t = 4; t < 7; ++t) EXPECT_LT(step(t, 1, 0), 1e-12);
  m.permute(cache, std::vector<index_t>{1, 0});
  m.truncate(cache, 1, 5);
  EXPECT_LT(step(5, 2, 1), 1e-12);
  EXPECT_THROW(step(0, 5, 0), state_error);  // 4 + 5 tokens of 8
  EXPECT_THROW(step(0, 1, 2), index_error);
  EXPECT_THROW(m.truncate(cache, 0, -1), index_error);
  EXPECT_THROW(m.permute(cache, std::vector<index_t>{1}), shape_error);
  m.permute(cache, std::vector<index_t>{1, 1});  // both slots go on from one sequence, each for itself
  m.truncate(cache, 0, 5);
  EXPECT_LT(step(5, 2, 0), 1e-12);
  m.truncate(cache, 1, 6);
  EXPECT_LT(step(6, 1, 1), 1e-12);
}

TEST(ultra_mem, starts_as_published) {
  auto c = small();
  c.sub_keys = 60;
  const memory released(c, rng_key{1});
  EXPECT_NEAR(released.query.norm.weight(0, 0), std::pow(6, -0.33), 1e-15);
  EXPECT_NEAR(released.expansion.values.view().map().norm() / std::sqrt(900 * 8), 0.02, 1e-3);
  const auto mean_score = [](const memory& m) {  // on inputs other than those of the start
    matrix<double> y;
    const auto r = recorded(m, input(2000, 77), y);
    return r.scores.sum() / static_cast<double>(r.addresses.value.size());
  };
  c.start = {.kind = ultra_mem_start_kind::paper, .blocks = 12};
  const memory paper(c, rng_key{1});
  EXPECT_NEAR(paper.search.norm.weight(0, 0), std::pow(6, -0.5), 1e-15);
  EXPECT_NEAR(mean_score(paper), 1, 0.05);  // sampled
  EXPECT_NEAR(paper.expansion.values.view().map().norm() / std::sqrt(900 * 8), std::sqrt(4.0 / (2 * 4 * 2 * 12)), 5e-3);
  auto v2 = second();
  v2.start = {.kind = ultra_mem_start_kind::paper_v2, .blocks = 20};
  const memory paper_v2(v2, rng_key{1});
  EXPECT_NEAR(paper_v2.query.projection.weight.norm() / std::sqrt(static_cast<double>(paper_v2.query.projection.weight.size())), std::sqrt(2.0 / 50), 0.02);
  v2.start.blocks = 0;
  EXPECT_THROW(memory(v2, rng_key{1}), config_error);
}

TEST(ultra_mem, values_of_the_second_paper_follow_from_its_scores) {
  auto c = second();
  c.sub_keys = 60;
  c.start = {.kind = ultra_mem_start_kind::paper_v2, .blocks = 20, .inner_ratio = 3};
  const memory m(c, rng_key{1});
  matrix<double> y;
  const auto r = recorded(m, input(2000, 77), y);
  const index_t picks = r.addresses.value.cols();
  double sum = 0, square = 0;
  for (index_t i = 0; i < r.scores.size(); i += 2) {
    const double score = r.scores.data()[i] + r.scores.data()[i + 1];
    sum += score;
    square += score * score;
  }
  const double count = 2000.0 * static_cast<double>(picks), variance = square / count - sum * sum / (count * count);
  const double deviation = std::pow(0.2 * 3 * D / (4 * (1 + variance) * 6 * 8 * 20), 0.25);
  EXPECT_NEAR(m.expansion.values.view().map().norm() / std::sqrt(900 * 8), deviation, 0.05 * deviation);  // the score's variance is sampled
  EXPECT_NEAR(m.expansion.pre_values.view().map().norm() / std::sqrt(900 * 6), deviation, 0.05 * deviation);
}

TEST(ultra_mem, presets_have_the_published_parts) {
  constexpr index_t F = 12;
  const auto tiny = [](ultra_mem_config c) {
    c.sub_keys = 10;
    c.top_k = 4;
    return memory(c, rng_key{1});
  };
  const auto v1 = tiny(ultra_mem_v1(F)), paper = tiny(ultra_mem_paper(F, 12)), v2 = tiny(ultra_mem_v2(F));
  EXPECT_EQ(v1.query.projection.weight.rows(), 2 * v1.config.key_width);             // one query for all heads and ranks
  EXPECT_EQ(v1.expansion.projection.weight.cols(), 4 * F / 2);                       // a projection for each virtual table
  EXPECT_TRUE(v1.query.convolution.none());
  EXPECT_EQ(paper.query.convolution.weight.size(), 5 * F);
  EXPECT_EQ(paper.query.norm.kind, score_norm_kind::layer);
  matrix<double> y;
  EXPECT_GT(recorded(paper, input(T, 2, F), y).rank_loss.loss, 0);
  EXPECT_EQ(v2.query.projection.weight.rows(), 2 * 2 * v2.config.key_width);         // one for each rank
  EXPECT_EQ(v2.expansion.projection.weight.cols(), v2.config.value_width);           // one projection
  EXPECT_EQ(v2.expansion.pre_values.view().map().size(), 100 * v2.config.pre_width);
  for (const memory* m : {&v1, &paper, &v2}) EXPECT_GT(output_of(*m, input(T, 2, F)).norm(), 0);
}

TEST(ultra_mem, masked_rows_give_nothing_and_touch_nothing) {
  auto c = small();
  c.balance = 1;
  const auto m = make(c);
  const auto x = input(), dy = input(T, 9);
  std::vector<std::uint8_t> mask(T, 1);
  mask[T - 1] = mask[T - 2] = 0;
  context ctx;
  ctx.mask = mask;
  matrix<double> y, z, dx(T, D), dz(T - 2, D);
  const matrix<double> head = x.topRows(T - 2), dhead = dy.topRows(T - 2);
  const auto a = recorded(m, x, y, ctx), b = recorded(m, head, z);
  auto ga = make_gradient(m), gb = make_gradient(m);
  m.backward(x, a, dy, dx, ga, ctx);
  m.backward(head, b, dhead, dz, gb, {});
  EXPECT_EQ(y.bottomRows(2).norm() + dx.bottomRows(2).norm(), 0);
  EXPECT_EQ(a.addresses.value.bottomRows(2).maxCoeff(), -1);
  EXPECT_LT(difference(y.topRows(T - 2), z) + difference(dx.topRows(T - 2), dz), 1e-13);
  EXPECT_LT(difference(ga.search.keys, gb.search.keys) + difference(ga.search.cores, gb.search.cores), 1e-13);
  EXPECT_EQ(ga.expansion.values.rows, gb.expansion.values.rows);
  EXPECT_NEAR(auxiliary_loss(a), auxiliary_loss(b), 1e-14);
}

TEST(ultra_mem, nan_stays_in_its_row) {
  const auto m = make(second());
  auto x = input();
  const auto clean = output_of(m, x);
  x(4, 2) = std::numeric_limits<double>::quiet_NaN();
  x(6, 1) = std::numeric_limits<double>::infinity();
  matrix<double> y, dx(T, D);
  const auto r = recorded(m, x, y);
  auto g = make_gradient(m);
  m.backward(x, r, input(T, 9), dx, g, {});
  EXPECT_TRUE(y.row(4).array().isNaN().all() && y.row(6).array().isNaN().all());
  EXPECT_LT(difference(y.topRows(4), clean.topRows(4)) + difference(y.row(5), clean.row(5)) + difference(y.bottomRows(2), clean.bottomRows(2)), 1e-13);
  EXPECT_GE(r.addresses.value.minCoeff(), 0);
  EXPECT_LT(r.addresses.value.maxCoeff(), 100);
}

TEST(ultra_mem, no_token_one_token_and_a_token_of_zeros) {
  auto c = small();
  c.balance = c.rank_loss = 1;
  const auto m = make(c);
  for (const index_t rows : {0, 1}) {
    const matrix<double> x = matrix<double>::Zero(rows, D);
    matrix<double> y, dx(rows, D);
    const auto r = recorded(m, x, y);
    auto g = make_gradient(m);
    m.backward(x, r, input(rows, 9), dx, g, {});
    EXPECT_EQ(y.norm(), 0);
    EXPECT_TRUE(dx.allFinite() && g.query.projection.weight.allFinite());
  }
}

TEST(ultra_mem, the_same_bits_with_any_number_of_workers) {
  ultra_mem_config c{.features = 32, .sub_keys = 24, .key_width = 16, .top_k = 9, .value_width = 48, .query_conv = 3, .rank_loss = 1, .balance = 1};
  const ultra_mem<float> m(c, rng_key{5});
  matrix<float> x(300, 32);
  fill_normal<float>(x, 1.0, {1});
  expect_same_bits_for_any_workers(m, x, {.train = true});
}

TEST(ultra_mem, allocates_nothing_when_called_again) {
#if defined(LITHE_COUNTS_MALLOC)
  for (auto c : {small(), second()}) {
    c.balance = c.rank_loss = 1;
    const auto m = make(c);
    workspace work;
    const context ctx{.work = &work};
    const auto x = input(), dy = input(T, 9);
    matrix<double> y(T, D), dx(T, D);
    memory::record r;
    auto g = make_gradient(m);
    for (int round = 0; round < 4; ++round) {
      set_zero(m, g);  // which writes out names
      const long before = mallocs;
      m.forward(x, y, ctx);
      m.forward(x, y, r, ctx);
      m.backward(x, r, dy, dx, g, ctx);
      EXPECT_EQ(mallocs == before, round > 1) << round;
    }
  }
#else
  GTEST_SKIP() << "malloc is not ours to count here";
#endif
}

TEST(ultra_mem, costs_what_it_holds) {
  for (const auto& c : {small(), second()}) {
    const auto m = make(c);
    const auto cost = cost_of(m, 1);
    EXPECT_EQ(cost.parameters, static_cast<double>(count_parameters(m)));
    EXPECT_GT(cost.flops, 2.0 * 2 * 10 * 6);
    EXPECT_GT(cost.bytes, 8.0 * static_cast<double>(m.search.picks() * 8));
  }
}

TEST(ultra_mem, state_is_walked_but_not_trained) {
  auto m = make(small());
  std::vector<std::string> state;
  for_each_tensor([&](const std::string& name, role kind, const auto&) { if (kind != role::parameter) state.push_back(name); }, m);
  EXPECT_EQ(state, (std::vector<std::string>{"search.u", "search.t", "expansion.permutation"}));
  optimiser<double> adam(optimiser_config{});
  auto g = make_gradient(m);
  matrix<double> y, dx(T, D);
  const auto r = recorded(m, input(), y);
  m.backward(input(), r, input(T, 9), dx, g, {});
  const auto order = m.expansion.permutation;
  const auto cores = m.search.cores;
  adam.step(m, g, 1e-2);
  EXPECT_EQ(m.expansion.permutation, order);
  EXPECT_GT(difference(m.search.cores, cores), 1e-3);
}

TEST(ultra_mem, refuses_what_does_not_fit_in_a_sentence) {
  const auto says = [](const std::string& sentence, auto&& change) {
    auto c = small();
    change(c);
    try {
      memory m(c, rng_key{1});
      FAIL() << sentence;
    } catch (const config_error& e) {
      EXPECT_EQ(e.what(), "ultra_mem: " + sentence);
    }
  };
  EXPECT_THROW(tucker_keys<double>({.heads = 0, .sub_keys = 4, .top_k = 2}, rng_key{1}), config_error);
  says("expected an expansion that is a square (1, 4, 9, ...), got 6", [](auto& c) { c.expansion = 6; });
  says("expected an expansion that is a square (1, 4, 9, ...), got 0", [](auto& c) { c.expansion = 0; });
  says("sub_keys must be a multiple of √expansion = 3, got 10", [](auto& c) { c.expansion = 9; });
  says("the value width must be divisible by the cores, got 8 and 3", [](auto& c) { c.cores = 3; });
  says("expected top_k from 1 to the 10 keys of an axis, got 11", [](auto& c) { c.top_k = 11; });
  says("expected top_k from 1 to the 10 keys of an axis, got 0", [](auto& c) { c.top_k = 0; });
  says("expected final_k from 1 to top_k² = 16, got 17", [](auto& c) { c.final_k = 17; });
  says("expected 1 group or one for each of the 4 virtual tables, got 2", [](auto& c) { c.groups = 2; });
  says("queries laid out as released are for rank 2, got 3", [](auto& c) {
    c.query = tucker_query::released;
    c.rank = 3;
  });
  says("queries laid out as released are for 1 to 4 heads, got 5", [](auto& c) {
    c.query = tucker_query::released;
    c.heads = 5;
  });
  says("expected a table of at least 25 rows (fewer than 2^31 slices) and an offset within it, got 20 and 0", [](auto& c) { c.table_rows = 20; });
  EXPECT_THROW(share_ultra_mem_table(4, 2, 0, 0), config_error);
  EXPECT_THROW(share_ultra_mem_table(4, 2, 0, 1.5), config_error);
  EXPECT_THROW(memory(small(), dense_table<double>(49, 4), {}, rng_key{1}), config_error);
  auto m = make(small());
  std::swap(m.expansion.permutation(0, 3), m.expansion.permutation(0, 4));
  EXPECT_NO_THROW(refresh(m));
  m.expansion.permutation(0, 3) = m.expansion.permutation(0, 4);
  EXPECT_THROW(refresh(m), config_error);
  matrix<double> x(2, D + 1), y(2, D);
  EXPECT_THROW(m.forward(x, y, {}), shape_error);
  memory::record empty;
  matrix<double> x2(2, D);
  context replay;
  replay.replay = true;
  EXPECT_THROW(m.forward(x2, y, empty, replay), state_error);
}

}  // namespace ultra_mem_tests
