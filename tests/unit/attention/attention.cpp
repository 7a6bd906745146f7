#include "lithe/layers/attention/attention.hpp"

#include <gtest/gtest.h>

#include <functional>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/cross_attention.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/parameters.hpp"
#include "support/decoded_rows.hpp"
#include "support/matrices.hpp"
#include "support/same_bits.hpp"

namespace attention_tests {

using namespace lithe;

static_assert(layer<attention<float>> && layer<attention<double>>);
static_assert(cached_layer<attention<float>> && cached_layer<attention<double>>);
static_assert(conditioned_layer<cross_attention<float>> && conditioned_layer<cross_attention<double>>);
static_assert(!layer<cross_attention<double>>);

template <class S>
double largest(const matrix<S>& m) {
  return m.size() == 0 ? 0 : static_cast<double>(m.cwiseAbs().maxCoeff());
}

using offsets = std::vector<index_t>;

// The equation, one number at a time.
struct plain {
  const attention_config& config;
  bool self = true;
  std::vector<std::uint8_t> mask{};
  matrix<double> bias{};

  template <class L>
  matrix<double> operator()(const L& l, const matrix<double>& x, const offsets& rows, const matrix<double>& m, const offsets& memory_rows) const {
    const auto project = [](const auto& p, const matrix<double>& a) {
      matrix<double> y = a * p.weight.template cast<double>().transpose();
      if (p.bias.size() != 0) y.rowwise() += p.bias.template cast<double>().row(0);
      return y;
    };
    matrix<double> q = project(l.query, x), k = project(l.key, m), v = project(l.value, m);
    const auto rotate = [&](matrix<double>& a, index_t heads, const offsets& sequences) {
      const index_t w = config.rotary_width;
      for (std::size_t s = 0; s + 1 < sequences.size(); ++s)
        for (index_t t = sequences[s]; t < sequences[s + 1]; ++t)
          for (index_t h = 0; h < heads; ++h)
            for (index_t i = 0; i < w / 2; ++i) {
              const double angle =
                  static_cast<double>(t - sequences[s]) * std::pow(config.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(w));
              double &lo = a(t, h * config.head_width + i), &hi = a(t, h * config.head_width + i + w / 2);
              const double p = lo, r = hi;
              lo = p * std::cos(angle) - r * std::sin(angle);
              hi = p * std::sin(angle) + r * std::cos(angle);
            }
    };
    rotate(q, config.heads, rows);
    rotate(k, config.key_value_heads, memory_rows);
    matrix<double> o = matrix<double>::Zero(q.rows(), q.cols());
    const index_t d = config.head_width, shared = config.heads / config.key_value_heads;
    for (std::size_t s = 0; s + 1 < rows.size(); ++s)
      for (index_t h = 0; h < config.heads; ++h)
        for (index_t t = rows[s]; t < rows[s + 1]; ++t) {
          std::vector<double> e;
          double sum = 0;
          for (index_t j = memory_rows[s]; j < memory_rows[s + 1]; ++j) {
            const bool hidden =
                (config.causal && j - memory_rows[s] > t - rows[s]) || (self && !mask.empty() && mask[static_cast<std::size_t>(j)] == 0);
            const double score = q.row(t).segment(h * d, d).dot(k.row(j).segment(h / shared * d, d)) * config.scale +
                                 (bias.size() != 0 ? bias(h * x.rows() + t, j) : 0.0);
            e.push_back(hidden ? 0.0 : std::exp(score));
            sum += e.back();
          }
          for (std::size_t j = 0; j < e.size(); ++j)
            if (e[j] != 0) o.row(t).segment(h * d, d) += e[j] / sum * v.row(memory_rows[s] + static_cast<index_t>(j)).segment(h / shared * d, d);
        }
    matrix<double> y = project(l.output, o);
    for (index_t t = 0; t < y.rows(); ++t)
      if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) y.row(t).setZero();
    return y;
  }
  template <class L>
  matrix<double> operator()(const L& l, const matrix<double>& x, const offsets& rows) const {
    return (*this)(l, x, rows, x, rows);
  }
};

template <class S>
matrix<S> run(const attention<S>& l, const matrix<S>& x, const context& ctx) {
  matrix<S> y(x.rows(), l.config.outputs);
  l.forward(x, y, ctx);
  return y;
}

// Central differences of Σ weight ∘ forward() in every number of p against `gradient`. The truncation error is step² times a third
// derivative of order 1 and the rounding error 1e-16 / step, so 1e-5 leaves 1e-10; ten times that is allowed, relative to the largest.
void expect_gradient(const char* what, matrix_view<double> p, const matrix<double>& gradient, const std::function<double()>& loss) {
  constexpr double step = 1e-5;
  double scale = 1e-2;
  if (gradient.size() != 0) scale = std::max(scale, largest(gradient));
  for (index_t i = 0; i < p.rows(); ++i)
    for (index_t j = 0; j < p.cols(); ++j) {
      const double was = p(i, j);
      p(i, j) = was + step;
      const double up = loss();
      p(i, j) = was - step;
      const double down = loss();
      p(i, j) = was;
      ASSERT_NEAR(gradient(i, j), (up - down) / (2 * step), 1e-8 * scale) << what << " " << i << " " << j;
    }
}

template <class S>
void compare_core(index_t M, index_t N, index_t D, index_t V, bool causal, double tolerance) {
  SCOPED_TRACE(concat(M, " queries ", N, " keys ", D, " wide, values ", V, causal ? " causal" : ""));
  const index_t pad = 3;  // strided and misaligned
  const matrix<S> q0 = random<S>(M, D + pad, 1, 2), k0 = random<S>(N, D + pad, 2, 2), v0 = random<S>(N, V + pad, 3), g0 = random<S>(M, V + pad, 4);
  const auto in = [&](const matrix<S>& m) { return view(m).slice_cols(1, m.cols() - pad); };
  const auto wide = [&](const matrix<S>& m) -> matrix<double> { return m.middleCols(1, m.cols() - pad).template cast<double>(); };
  const index_t ahead = N - M;
  const detail::attention_mask<S> mask{.causal = causal, .ahead = ahead};
  const S scale = S(0.3);

  matrix<double> s = 0.3 * wide(q0) * wide(k0).transpose();
  if constexpr (sizeof(S) == 4) s *= static_cast<double>(0.3F) / 0.3;
  matrix<double> p = s.array().exp();
  if (causal)
    for (index_t i = 0; i < M; ++i)
      for (index_t j = std::max<index_t>(0, ahead + i + 1); j < N; ++j) p(i, j) = 0;
  const Eigen::VectorXd sum = p.rowwise().sum();
  for (index_t i = 0; i < M; ++i)
    if (sum(i) != 0) p.row(i) /= sum(i);
  const matrix<double> o = p * wide(v0);

  matrix<S> out = matrix<S>::Constant(M, V + pad, S(7)), lse(1, M);
  attend<S>(in(q0), in(k0), in(v0), scale, mask, view(out).slice_cols(1, V), lse.data(), {});
  EXPECT_LT(difference(out.middleCols(1, V), o), tolerance);
  for (index_t i = 0; i < M; ++i)
    if (sum(i) != 0) {
      EXPECT_NEAR(static_cast<double>(lse(i)), std::log(sum(i)), 10 * tolerance);
    } else {
      EXPECT_EQ(lse(i), -std::numeric_limits<S>::infinity());
    }
  EXPECT_EQ(out(M - 1, 0), S(7));
  EXPECT_EQ(out(M - 1, V + 1), S(7));

  const matrix<double> dp = wide(g0) * wide(v0).transpose();
  const Eigen::VectorXd d = (wide(g0).array() * o.array()).rowwise().sum();
  const matrix<double> ds = p.array() * (dp.colwise() - d).array();
  const matrix<double> dq = 0.3 * ds * wide(k0), dk = 0.3 * ds.transpose() * wide(q0), dv = p.transpose() * wide(g0);
  matrix<S> gq = matrix<S>::Zero(M, key_gradient_tile<S>::query_gradient_width(D)), gk(N, D), gv(N, V), dots(1, M);
  softmax_row_dots<S>(in(g0), view(out).slice_cols(1, V), dots.data());
  key_gradient_tile<S> tile(context{}, D, V);
  for (index_t j = 0; j < N; j += attention_keys) {
    const index_t n = std::min(attention_keys, N - j);
    tile.load(in(k0).slice_rows(j, n), in(v0).slice_rows(j, n), scale);
    for (index_t i = 0; i < M; i += attention_gradient_queries) {
      const index_t m = std::min(attention_gradient_queries, M - i);
      tile.add(in(q0).slice_rows(i, m), in(g0).slice_rows(i, m), lse.data() + i, dots.data() + i, view(gq).slice_rows(i, m), j, mask.from(i, m));
    }
    tile.finish(view(gk).slice_rows(j, n), view(gv).slice_rows(j, n));
  }
  // Sums of up to 500 products of order 1.
  EXPECT_LT(difference(gq.leftCols(D), dq), 20 * tolerance);
  EXPECT_LT(difference(gk, dk), 20 * tolerance);
  EXPECT_LT(difference(gv, dv), 20 * tolerance);
}

// Rounding of sums of some hundred numbers of order 1: a few units in the last place of the largest.
TEST(attention, tiles_equal_plain_loops_at_every_tail) {
  for (const index_t width : {1, 3, 8, 16, 20, 33, 64, 100, 128}) {
    compare_core<double>(50, 70, width, width, true, 1e-13);
    compare_core<float>(50, 70, width, width, true, 5e-6);
  }
  for (const index_t M : {1, 2, 5, 6, 7, 47, 48, 49, 95, 97, 200})
    for (const index_t N : {1, 15, 17, 63, 65, 191, 192, 193, 400})
      for (const bool causal : {false, true}) {
        compare_core<double>(M, N, 24, 40, causal, 1e-13);
        compare_core<float>(M, N, 24, 40, causal, 5e-6);
      }
}

// Scores far from each other, and rows whose maximum moves with every tile of keys.
TEST(attention, softmax_is_stable_for_large_scores) {
  const index_t N = 500;
  matrix<float> q = matrix<float>::Ones(1, 1), k(N, 1), v = random<float>(N, 1, 1), o(1, 1), lse(1, 1);
  for (index_t j = 0; j < N; ++j) k(j, 0) = 3e4F + 100 * static_cast<float>(j);
  attend<float>(q, k, v, 1.0F, see_all{}, o, lse.data(), {});
  EXPECT_EQ(o(0, 0), v(N - 1, 0));
  EXPECT_EQ(lse(0, 0), k(N - 1, 0));
  k = -k;
  attend<float>(q, k, v, 1.0F, see_all{}, o, lse.data(), {});
  EXPECT_EQ(o(0, 0), v(0, 0));
}

TEST(attention, float_stays_close_to_double_at_length_64k) {
  const index_t N = 65536;
  const matrix<float> q = random<float>(4, 16, 1, 2), k = random<float>(N, 16, 2, 2), v = random<float>(N, 16, 3).array() + 1;
  matrix<float> o(4, 16), lse(1, 4);
  matrix<double> od(4, 16), lsed(1, 4);
  attend<float>(q, k, v, 0.25F, see_all{}, o, lse.data(), {});
  attend<double>(matrix<double>(q.cast<double>()), matrix<double>(k.cast<double>()), matrix<double>(v.cast<double>()), 0.25, see_all{}, od,
                 lsed.data(), {});
  // 342 tiles are added one to the other: the errors of 400 additions, not of 65536.
  EXPECT_LT(difference(o, od), 2e-6);
  EXPECT_LT(difference(lse, lsed), 2e-6);
}

const offsets sequences{0, 5, 5, 6, 13};

TEST(attention, layer_equals_plain_loops_with_every_option) {
  const matrix<double> x = random(13, 12, 1);
  for (const attention_config& c : {attention_config{.inputs = 12, .heads = 3},
                                    {.inputs = 12, .heads = 3, .causal = true},
                                    {.inputs = 12, .heads = 3, .bias = false},
                                    {.inputs = 12, .heads = 2, .head_width = 5, .outputs = 7},
                                    {.inputs = 12, .heads = 2, .scale = 0.9},
                                    {.inputs = 12, .heads = 2, .rotary_width = 6},
                                    {.inputs = 12, .heads = 2, .causal = true, .rotary_width = 4, .rotary_base = 100},
                                    {.inputs = 12, .heads = 4, .rotary_width = 2, .key_value_heads = 2},
                                    {.inputs = 12, .heads = 4, .causal = true, .key_value_heads = 1}}) {
    const attention<double> l(c, rng_key{3});
    const context ctx{.rows = {sequences}};
    EXPECT_EQ(l.output_shape(x), (shape{13, l.config.outputs}));
    EXPECT_LT(difference(run(l, x, ctx), plain{l.config}(l, x, sequences)), 1e-14);
    const attention<float> f(c, rng_key{3});
    const matrix<float> xf = x.cast<float>();
    EXPECT_LT(difference(run(f, xf, ctx), plain{f.config}(f, xf.cast<double>(), sequences)), 1e-6);
  }
}

TEST(attention, each_option_changes_the_output) {
  const matrix<double> x = random(13, 12, 1);
  const context ctx{.rows = {sequences}};
  const attention_config c{.inputs = 12, .heads = 2, .rotary_width = 4};
  const auto with = [&](auto change) {
    attention_config d = c;
    change(d);
    return run(attention<double>(d, rng_key{3}), x, ctx);
  };
  const matrix<double> y = with([](auto&) {});
  EXPECT_GT(difference(y, with([](auto& d) { d.causal = true; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.bias = false; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.scale = 2; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.rotary_width = 0; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.rotary_width = 6; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.rotary_base = 10; })), 1e-4);
  EXPECT_GT(difference(y, with([](auto& d) { d.key_value_heads = 1; })), 1e-4);
  EXPECT_GT(difference(y, run(attention<double>(c, rng_key{3}), x, {})), 1e-4);  // the sequences
  EXPECT_EQ(with([](auto& d) { d.head_width = 6; }), y);
  EXPECT_EQ(with([](auto& d) { d.scale = 1 / std::sqrt(6.0); }), y);
}

TEST(attention, gradients_equal_finite_differences) {
  for (const attention_config& c : {attention_config{.inputs = 6, .heads = 2, .head_width = 4, .outputs = 5, .causal = true, .rotary_width = 2},
                                    {.inputs = 6, .heads = 2, .bias = false, .scale = 0.8},
                                    {.inputs = 6, .heads = 4, .head_width = 3, .causal = true, .key_value_heads = 2}})
    for (const bool padded : {false, true}) {
      attention<double> l(c, rng_key{5});
      for_each_tensor([](const std::string&, role, auto& p) { p *= 2; }, l);
      const std::vector<std::uint8_t> mask = padded ? std::vector<std::uint8_t>{1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1} : std::vector<std::uint8_t>{};
      const context ctx{.rows = {sequences}, .mask = mask};
      const index_t out = l.config.outputs;
      matrix<double> x0 = random(13, 9, 1), dy0 = random(13, out + 2, 2), y0(13, out + 1), dx0(13, 8);
      const auto x = view(x0).slice_cols(2, 6), y = view(y0).slice_cols(1, out), dx = view(dx0).slice_cols(1, 6);
      const auto dy = view(dy0).slice_cols(1, out);
      attention<double>::record r;
      auto g = make_gradient(l);
      for_each_tensor([](const std::string&, role, const auto&, auto& q) { q.setConstant(1); }, l, g);
      l.forward(x, y, r, ctx);
      l.backward(x, r, dy, dx, g, ctx);
      const auto loss = [&] {
        l.forward(x, y, ctx);
        return (y.map().array() * dy.map().array()).sum();
      };
      matrix<double> d = dx.map();
      EXPECT_GT(largest(d), 0.1);
      expect_gradient("x", x, d, loss);
      for_each_tensor(
          [&](const std::string& name, role, auto& p, auto& q) {
            const matrix<double> mine = q.array() - 1;  // accumulated
            if (name != "key.bias") {                   // which shifts every score of a row alike
              EXPECT_GT(largest(mine), 1e-3) << name;
            }
            expect_gradient(name.c_str(), p, mine, loss);
          },
          l, g);
      if (padded) {
        for (const index_t t : {2, 5, 9}) EXPECT_EQ(d.row(t).cwiseAbs().maxCoeff(), 0);
      }
    }
}

TEST(attention, gradients_equal_finite_differences_over_several_tiles) {
  attention<double> l({.inputs = 4, .heads = 2, .causal = true}, rng_key{5});
  for_each_tensor([](const std::string&, role, auto& p) { p *= 2; }, l);
  const offsets rows{0, 450, 1500};  // two groups of tiles of keys
  const context ctx{.rows = {rows}};
  matrix<double> x = random(1500, 4, 1), dy = random(1500, 4, 2), y(1500, 4), dx(1500, 4);
  attention<double>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, g, ctx);
  for (const index_t t : {0, 47, 48, 191, 192, 449, 450, 641, 642, 1000, 1499}) {
    const double was = x(t, 1), step = 1e-5;
    const auto loss = [&](double to) {
      x(t, 1) = to;
      l.forward(x, y, ctx);
      return (y.array() * dy.array()).sum();
    };
    const double up = loss(was + step), down = loss(was - step);
    x(t, 1) = was;
    EXPECT_NEAR(dx(t, 1), (up - down) / (2 * step), 1e-7 * largest(dx)) << t;  // sums of 1500 rows
  }
}

TEST(attention, additive_bias_hides_shifts_and_has_a_gradient) {
  attention<double> l({.inputs = 6, .heads = 2, .causal = true}, rng_key{5});
  matrix<double> x = random(13, 6, 1), dy = random(13, 6, 2), y(13, 6), dx(13, 6), bias = random(2 * 13, 13, 3),
                 gradient = matrix<double>::Ones(26, 13);
  const double hidden = -std::numeric_limits<double>::infinity();
  bias(3, 1) = bias(13 + 7, 6) = hidden;
  bias.row(4).setConstant(hidden);  // sees nothing in one head
  const context ctx{.rows = {sequences}};
  const attention_bias<double> b{bias, gradient};
  attention<double>::record r;
  auto g = make_gradient(l);
  l.forward(x, b, y, r, ctx);
  plain reference{l.config};
  reference.bias = bias;
  EXPECT_LT(difference(y, reference(l, x, sequences)), 1e-14);
  EXPECT_GT(difference(y, run(l, x, ctx)), 1e-3);
  EXPECT_EQ(r.log_sum_exp(0, 4), hidden);
  l.backward(x, b, r, dy, dx, g, ctx);
  const auto loss = [&] {
    l.forward(x, b, y, ctx);
    return (y.array() * dy.array()).sum();
  };
  expect_gradient("x", x, dx, loss);
  expect_gradient("bias", bias, gradient.array() - 1, loss);
  EXPECT_GT((gradient.array() - 1).abs().maxCoeff(), 1e-3);
}

TEST(attention, cross_attention_equals_plain_loops_and_finite_differences) {
  const offsets rows{0, 3, 3, 8, 9}, memory_rows{0, 4, 6, 6, 11};  // an empty sequence on either side
  for (const index_t shared : {2, 1}) {
    cross_attention<double> l({.inputs = 6, .memory_inputs = 5, .heads = 2, .head_width = 4, .outputs = 7, .key_value_heads = shared}, rng_key{5});
    for_each_tensor([](const std::string&, role, auto& p) { p *= 2; }, l);
    matrix<double> x = random(9, 6, 1), m = random(11, 5, 2), dy = random(9, 7, 3), y(9, 7), dx(9, 6), dm = matrix<double>::Ones(11, 5);
    const context ctx{.rows = {rows}};
    const memory_view<double> memory{m, {memory_rows}};
    cross_attention<double>::record r;
    auto g = make_gradient(l);
    l.forward(x, memory, y, r, ctx);
    EXPECT_LT(difference(y, plain{l.config, false}(l, x, rows, m, memory_rows)), 1e-14);
    l.backward(x, memory, r, dy, dx, dm, g, ctx);
    const auto loss = [&] {
      l.forward(x, memory, y, ctx);
      return (y.array() * dy.array()).sum();
    };
    expect_gradient("x", x, dx, loss);
    expect_gradient("memory", m, dm.array() - 1, loss);
    for_each_tensor([&](const std::string& name, role, auto& p, auto& q) { expect_gradient(name.c_str(), p, q, loss); }, l, g);
  }
}

TEST(attention, a_later_token_changes_no_earlier_row_when_causal) {
  for (const bool causal : {true, false}) {
    const attention<float> l({.inputs = 16, .heads = 2, .causal = causal, .rotary_width = 4}, rng_key{1});
    matrix<float> x = random<float>(300, 16, 1);
    const matrix<float> y = run(l, x, {});
    x.row(250).array() += 1;
    const matrix<float> z = run(l, x, {});
    EXPECT_EQ(causal, y.topRows(250) == z.topRows(250));
    EXPECT_NE(y.row(250), z.row(250));
  }
}

TEST(attention, sequences_do_not_see_each_other) {
  const attention<double> l({.inputs = 8, .heads = 2}, rng_key{1});
  matrix<double> x = random(13, 8, 1);
  const matrix<double> y = run(l, x, {.rows = {sequences}});
  x.row(5).array() += 1;
  const matrix<double> z = run(l, x, {.rows = {sequences}});
  EXPECT_EQ(y.topRows(5), z.topRows(5));
  EXPECT_EQ(y.bottomRows(7), z.bottomRows(7));
  EXPECT_NE(y.row(5), z.row(5));
}

TEST(attention, grouped_query_equals_repeated_keys_and_values) {
  const index_t d = 3;
  const attention<double> grouped({.inputs = 8, .heads = 4, .head_width = d, .causal = true, .key_value_heads = 2}, rng_key{1});
  attention<double> full({.inputs = 8, .heads = 4, .head_width = d, .causal = true}, rng_key{2});
  full.query = grouped.query;
  full.output = grouped.output;
  for (index_t h = 0; h < 4; ++h) {
    full.key.weight.middleRows(h * d, d) = grouped.key.weight.middleRows(h / 2 * d, d);
    full.key.bias.middleCols(h * d, d) = grouped.key.bias.middleCols(h / 2 * d, d);
    full.value.weight.middleRows(h * d, d) = grouped.value.weight.middleRows(h / 2 * d, d);
    full.value.bias.middleCols(h * d, d) = grouped.value.bias.middleCols(h / 2 * d, d);
  }
  const matrix<double> x = random(40, 8, 1);
  EXPECT_LT(difference(run(grouped, x, {}), run(full, x, {})), 1e-15);
}

TEST(attention, padding_gives_nothing_and_is_no_key) {
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1};
  for (const bool causal : {true, false}) {
    const attention<double> l({.inputs = 8, .heads = 2, .causal = causal}, rng_key{1});
    matrix<double> x = random(13, 8, 1);
    const context ctx{.rows = {sequences}, .mask = mask};
    const matrix<double> y = run(l, x, ctx);
    plain reference{l.config};
    reference.mask = mask;
    EXPECT_LT(difference(y, reference(l, x, sequences)), 1e-14);
    x.row(1).array() += 3;
    x.row(10).array() -= 3;
    EXPECT_EQ(run(l, x, ctx), y);
    attention<double>::record r;
    auto g = make_gradient(l), spoiled = make_gradient(l);
    matrix<double> dx(13, 8), d_spoiled(13, 8), again(13, 8);
    const matrix<double> dy = random(13, 8, 2);
    l.forward(x, again, r, ctx);
    l.backward(x, r, dy, dx, g, ctx);
    x.row(4).setConstant(std::numeric_limits<double>::quiet_NaN());  // reaches nothing
    l.forward(x, again, r, ctx);
    EXPECT_EQ(again, y);
    l.backward(x, r, dy, d_spoiled, spoiled, ctx);
    EXPECT_EQ(d_spoiled, dx);
    EXPECT_EQ(spoiled.key.weight, g.key.weight);
    EXPECT_EQ(spoiled.value.weight, g.value.weight);
    for (const index_t t : {1, 4, 5, 10}) EXPECT_EQ(y.row(t).cwiseAbs().maxCoeff(), 0);
  }
}

template <class S>
void same_bits(index_t length, index_t heads, index_t key_value_heads) {
  const attention<S> l({.inputs = 16, .heads = heads, .head_width = 20, .causal = true, .rotary_width = 8, .key_value_heads = key_value_heads},
                       rng_key{1});
  const offsets rows{0, length / 3, length / 3, length};
  const matrix<S> x = random<S>(length, 16, 1);
  expect_same_bits_for_any_workers(l, x, {.rows = {rows}}, [&](const context& ctx) {
    matrix<S> cached(length, 16);
    auto c = l.make_cache(3, length);
    l.decode(x, cached, c, ctx);
    return cached;
  });
}
TEST(attention, same_bits_for_any_number_of_workers) {
  same_bits<float>(1700, 3, 3);
  same_bits<float>(2100, 2, 1);
  same_bits<double>(700, 4, 2);
}

TEST(attention, record_grows_with_the_length_and_not_its_square) {
  const attention<float> l({.inputs = 16, .heads = 2}, rng_key{1});
  std::size_t size[2];
  for (const index_t n : {1, 2}) {
    const matrix<float> x = random<float>(400 * n, 16, 1);
    matrix<float> y(400 * n, 16);
    attention<float>::record r;
    l.forward(x, y, r, {});
    size[n - 1] = bytes(r);
  }
  EXPECT_EQ(size[0], 400U * (4 * 16 + 2) * sizeof(float));
  EXPECT_EQ(size[1], 2 * size[0]);
}

template <class S>
class attention_decoding : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(attention_decoding, scalars);

// Ragged prefill, steps one token at a time, drafts that are taken back, sequences that change slots: always the full pass.
TYPED_TEST(attention_decoding, equals_the_full_pass) {
  using S = TypeParam;
  const double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;  // DESIGN: a row's bits may depend on how many rows come together
  for (const attention_config& c : {attention_config{.inputs = 12, .heads = 2, .causal = true, .rotary_width = 4},
                                    {.inputs = 12, .heads = 4, .head_width = 5, .outputs = 7, .causal = true, .key_value_heads = 1}}) {
    const attention<S> l(c, rng_key{1});
    const parallel_executor exec(2);
    workspace work(exec);
    std::vector<matrix<S>> x{random<S>(260, 12, 1), random<S>(270, 12, 2), random<S>(250, 12, 3)}, full;
    for (const auto& s : x) full.push_back(run(l, s, {}));
    auto cache = l.make_cache(3, 300);
    std::vector<std::size_t> in{0, 1, 2};  // which sequence each slot holds
    std::vector<index_t> done{0, 0, 0};    // of each sequence
    const auto feed = [&](std::vector<index_t> slots, std::vector<index_t> counts, bool keep = true) {
      offsets rows{0};
      for (const index_t n : counts) rows.push_back(rows.back() + n);
      matrix<S> now(rows.back(), 12), y(rows.back(), l.config.outputs), expected(rows.back(), l.config.outputs);
      for (std::size_t s = 0; s < slots.size(); ++s) {
        const std::size_t which = in[static_cast<std::size_t>(slots[s])];
        now.middleRows(rows[s], counts[s]) = x[which].middleRows(done[which], counts[s]);
        expected.middleRows(rows[s], counts[s]) = full[which].middleRows(done[which], counts[s]);
        if (keep) done[which] += counts[s];
      }
      decode<attention<S>>(l, now, y, cache, {.exec = &exec, .work = &work, .rows = {rows}, .slots = slots});
      EXPECT_LT(difference(y, expected), tolerance);
    };
    feed({0, 1, 2}, {200, 7, 0});
    feed({2, 0}, {33, 1});
    for (int step = 0; step < 5; ++step) feed({0, 1, 2}, {1, 1, 1});
    feed({1}, {5}, false);  // a draft
    truncate(l, cache, 1, done[1]);
    feed({1, 0}, {20, 2});
    const std::vector<index_t> order{2, 0, 1};
    permute(l, cache, order);
    in = {2, 0, 1};
    feed({0, 1, 2}, {1, 1, 1});
    feed({1, 2}, {3, 60});
    // Beams: two slots go on from one sequence.
    const std::vector<index_t> twice{1, 1, 2};
    permute(l, cache, twice);
    const std::vector<index_t> length = done;
    for (const index_t slot : {0, 1}) {
      matrix<S> y(1, l.config.outputs);
      const std::vector<index_t> slots{slot};
      decode<attention<S>>(l, matrix<S>(x[0].row(length[0])), y, cache, {.slots = slots});
      EXPECT_LT(difference(y, full[0].row(length[0])), tolerance);
    }
    in = {0, 0, 1};
    feed({2}, {1});
    fill<attention<S>>(l, matrix<S>(x[1].middleRows(done[1], 2)), cache, {.slots = std::vector<index_t>{2}});
    done[1] += 2;
    feed({2}, {1});
  }
}

TYPED_TEST(attention_decoding, sees_the_whole_cache_when_not_causal) {
  using S = TypeParam;
  const attention<S> l({.inputs = 8, .heads = 2}, rng_key{1});
  const matrix<S> x = random<S>(30, 8, 1), full = run(l, x, {});
  for (const index_t last : {1, 2, 20}) {
    auto cache = l.make_cache(1, 30);
    matrix<S> y(last, 8);
    l.fill(matrix<S>(x.topRows(30 - last)), cache, {});
    l.decode(matrix<S>(x.bottomRows(last)), y, cache, {});
    EXPECT_LT(difference(y, full.bottomRows(last)), sizeof(S) == 8 ? 1e-12 : 1e-5);
  }
}

TEST(attention, a_refused_decode_changes_nothing) {
  const attention<double> l({.inputs = 8, .heads = 2, .causal = true}, rng_key{1});
  auto cache = l.make_cache(2, 4);
  const matrix<double> x = random(6, 8, 1);
  matrix<double> y(6, 8);
  const offsets rows{0, 1, 6};
  EXPECT_THROW(l.decode(x, y, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.fill(x, cache, {.rows = {rows}}), state_error);
  EXPECT_EQ(cache.length, (std::vector<index_t>{0, 0}));
  const std::vector<index_t> twice{0, 0}, beyond{0, 2};
  const offsets small{0, 1, 2};
  const auto two = view(x).slice_rows(0, 2);
  const auto out = view(y).slice_rows(0, 2);
  EXPECT_THROW(l.decode(two, out, cache, {.rows = {small}, .slots = twice}), state_error);
  EXPECT_THROW(l.decode(two, out, cache, {.rows = {small}, .slots = beyond}), index_error);
  EXPECT_THROW(l.truncate(cache, 0, 1), index_error);
  EXPECT_THROW(l.permute(cache, beyond), index_error);
  EXPECT_EQ(cache.length, (std::vector<index_t>{0, 0}));
  l.decode(two, out, cache, {.rows = {small}});
  EXPECT_EQ(cache.length, (std::vector<index_t>{1, 1}));
}

TEST(attention, nan_flows_through_to_the_rows_that_see_it) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const attention<float> l({.inputs = 8, .heads = 2, .causal = true}, rng_key{1});
    matrix<float> x = random<float>(100, 8, 1), y(100, 8), dx(100, 8);
    x(60, 3) = bad;
    attention<float>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, random<float>(100, 8, 2), dx, g, {});
    EXPECT_TRUE(y.topRows(60).allFinite());
    for (index_t t = 60; t < 100; ++t) EXPECT_TRUE(std::isnan(y(t, 0))) << t;
    EXPECT_TRUE(std::isnan(dx(99, 0)));
    auto cache = l.make_cache(1, 100);
    l.decode(x, y, cache, {});
    EXPECT_TRUE(y.topRows(60).allFinite());
    EXPECT_TRUE(std::isnan(y(99, 0)));
  }
}

TEST(attention, a_decoded_row_takes_nothing_from_a_later_one) {
  const attention<double> l({.inputs = 8, .heads = 4, .causal = true, .key_value_heads = 2}, rng_key{1});
  for (const index_t n : {2, 3, 6}) expect_nothing_from_a_later_row(l, n);
}

TEST(attention, takes_no_rows_and_one_row) {
  const attention<float> l({.inputs = 8, .heads = 2, .causal = true, .rotary_width = 2}, rng_key{1});
  for (const index_t n : {0, 1}) {
    matrix<float> x = random<float>(n, 8, 1), y(n, 8), dx(n, 8);
    attention<float>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, y, dx, g, {});
    auto cache = l.make_cache(1, 2);
    l.decode(x, y, cache, {});
    EXPECT_EQ(cache.length[0], n);
  }
}

TEST(attention, refuses_what_does_not_fit) {
  const auto make = [](attention_config c) { return attention<float>(c, rng_key{}); };
  EXPECT_THROW(make({.inputs = 10, .heads = 3}), config_error);
  EXPECT_THROW(make({.inputs = 0, .heads = 1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .rotary_width = 3}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .rotary_width = 6}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 4, .key_value_heads = 3}), config_error);
  EXPECT_THROW(cross_attention<float>({.inputs = 10, .memory_inputs = 4, .heads = 3}, rng_key{}), config_error);
  EXPECT_THROW(cross_attention<float>({.inputs = 8, .memory_inputs = 0, .heads = 2}, rng_key{}), config_error);

  const attention<float> l({.inputs = 8, .heads = 2}, rng_key{1});
  matrix<float> x = random<float>(6, 8, 1), y(6, 8), narrow(6, 7), dx(6, 8), bias(12, 5);
  attention<float>::record r;
  auto g = make_gradient(l);
  const std::vector<std::uint8_t> mask(5, 1);
  const offsets rows{0, 5};
  EXPECT_THROW(l.forward(narrow, y, {}), shape_error);
  EXPECT_THROW(l.forward(x, narrow, {}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.mask = mask}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.rows = {rows}}), shape_error);
  EXPECT_THROW(l.forward(x, attention_bias<float>{bias}, y, {}), shape_error);
  EXPECT_THROW(l.backward(x, r, y, dx, g, {}), state_error);
  EXPECT_THROW(l.backward(x, r, y, narrow, g, {}), shape_error);
}

TEST(attention, cost_counts_projections_scores_and_cached_bytes) {
  const attention<float> l({.inputs = 8, .heads = 4, .head_width = 3, .bias = false, .key_value_heads = 2}, rng_key{1});
  const cost c = l.forward_cost(100);
  EXPECT_EQ(c.parameters, static_cast<double>(count_parameters(l)));
  EXPECT_EQ(c.flops, 2.0 * static_cast<double>(count_parameters(l)) + 4 * 100 * 12);
  EXPECT_EQ(c.bytes, 4 * (static_cast<double>(count_parameters(l)) + 2 * 100 * 6));
}

}  // namespace attention_tests
