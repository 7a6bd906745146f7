#include "lithe/layers/attention/collaborative_attention.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/collaborative_cross_attention.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/decoded_rows.hpp"
#include "support/matrices.hpp"
#include "support/same_bits.hpp"

namespace collaborative_attention_tests {

using namespace lithe;
using collaborative = collaborative_attention<double>;
using collaborative_cross = collaborative_cross_attention<double>;
using offsets = std::vector<index_t>;

static_assert(layer<collaborative_attention<float>> && layer<collaborative>);
static_assert(cached_layer<collaborative_attention<float>> && cached_layer<collaborative>);
static_assert(conditioned_layer<collaborative_cross_attention<float>> && conditioned_layer<collaborative_cross>);

template <class L>
matrix<typename L::scalar> run(const L& l, const matrix<typename L::scalar>& x, const context& ctx) {
  matrix<typename L::scalar> y(x.rows(), l.config.outputs);
  l.forward(x, y, ctx);
  return y;
}
/// Weights and biases large enough that every gradient is felt; the content bias starts at 0 otherwise.
template <class L>
L lively(L l) {
  std::uint64_t seed = 100;
  for_each_tensor([&](const std::string&, role, auto& p) { fill_uniform<typename L::scalar>(p, 0.8, rng_key{seed++}); }, l);
  return l;
}
collaborative make(collaborative_attention_config c) { return lively(collaborative(c, rng_key{1})); }

// The equation, one number at a time.
struct plain {
  const collaborative_attention_config& config;
  std::vector<std::uint8_t> mask{};
  matrix<double> bias{};

  template <class L>
  matrix<double> operator()(const L& l, const matrix<double>& x, const offsets& rows, const matrix<double>& m, const offsets& key_rows) const {
    const auto project = [](const auto& p, const matrix<double>& a) {
      matrix<double> y = a * p.weight.transpose();
      if (p.bias.size() != 0) y.rowwise() += p.bias.row(0);
      return y;
    };
    const matrix<double> q = project(l.query, x), k = project(l.key, m), v = project(l.value, m);
    const index_t V = config.value_width / config.heads;
    matrix<double> o = matrix<double>::Zero(x.rows(), config.value_width);
    for (std::size_t s = 0; s + 1 < rows.size(); ++s)
      for (index_t h = 0; h < config.heads; ++h)
        for (index_t t = rows[s]; t < rows[s + 1]; ++t) {
          std::vector<double> e;
          double sum = 0;
          for (index_t j = key_rows[s]; j < key_rows[s + 1]; ++j) {
            const bool hidden = (config.causal && j - key_rows[s] > t - rows[s]) || (!mask.empty() && mask[static_cast<std::size_t>(j)] == 0);
            const double content = config.content_bias ? l.content_bias.weight.row(h).dot(m.row(j)) : 0;
            const double score = config.scale * (q.row(t).cwiseProduct(l.mixing.row(h)).dot(k.row(j)) + content) +
                                 (bias.size() != 0 ? bias(h * x.rows() + t, j) : 0.0);
            e.push_back(hidden ? 0.0 : std::exp(score));
            sum += e.back();
          }
          const double share = (l.head_mask.size() != 0 ? l.head_mask(0, h) : 1.0) / sum;
          for (std::size_t j = 0; j < e.size(); ++j)
            if (e[j] != 0) o.row(t).segment(h * V, V) += e[j] * share * v.row(key_rows[s] + static_cast<index_t>(j)).segment(h * V, V);
        }
    matrix<double> y = config.projected ? project(l.output, o) : o;
    for (index_t t = 0; t < y.rows(); ++t)
      if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) y.row(t).setZero();
    return y;
  }
};

/// The spec's deterministic numbers: fill(a)[k] = ((3 k k + 5 k + a) mod 13 - 6) / 10.
matrix<double> fill(index_t a, index_t rows, index_t cols) {
  matrix<double> m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) m.data()[k] = static_cast<double>((3 * k * k + 5 * k + a) % 13 - 6) / 10;
  return m;
}

TEST(collaborative_attention, agrees_with_a_calculation_by_hand) {
  collaborative_cross l({.inputs = 4, .heads = 2, .key_width = 3, .value_width = 4, .projected = false, .scale = 1 / std::sqrt(2.0)}, 4, rng_key{1});
  l.query.weight = fill(3, 3, 4);
  l.key.weight = fill(4, 3, 4);
  l.mixing = fill(5, 2, 3);
  l.content_bias.weight = fill(6, 2, 4);
  l.value.weight = fill(7, 4, 4);
  l.value.bias = fill(8, 1, 4);
  const matrix<double> x = fill(1, 2, 4), m = fill(2, 3, 4), dy = fill(9, 2, 4);
  matrix<double> y(2, 4), dx(2, 4), dm = matrix<double>::Zero(3, 4), expected(2, 4), mixing(2, 3);
  collaborative_cross::record r;
  auto g = make_gradient(l);
  l.forward(x, {m, {}}, y, r, {});
  l.backward(x, {m, {}}, r, dy, dx, dm, g, {});
  expected << 0.0041413562, -0.5388930626, -0.1792432773, 0.6124082980,  //
      0.0074236470, -0.5361838478, -0.1794363541, 0.6129083765;
  EXPECT_LT(difference(y, expected), 1e-10);  // the digits given
  EXPECT_NEAR((y.array() * dy.array()).sum(), 0.772222682637, 1e-12);
  mixing << 0.0069320754, -0.0068976872, 0.0002428444,  //
      0.0078117058, -0.0065722930, 0.0011265416;
  EXPECT_LT(difference(g.mixing, mixing), 1e-10);
  EXPECT_NEAR(dx.norm(), 0.0143498300, 1e-10);
  EXPECT_NEAR(dm.norm(), 0.3828570719, 1e-10);
  EXPECT_NEAR(g.query.weight.norm(), 0.0182886844, 1e-10);
  EXPECT_NEAR(g.key.weight.norm(), 0.0167664012, 1e-10);
  EXPECT_NEAR(g.content_bias.weight.norm(), 0.1023308246, 1e-10);
  EXPECT_NEAR(g.value.weight.norm(), 0.6618311447, 1e-10);
  EXPECT_NEAR(g.value.bias.norm(), 1.3416407865, 1e-10);
  EXPECT_NEAR(dx(0, 0), 0.0047256457, 1e-10);
  EXPECT_NEAR(dm(0, 0), -0.0365633198, 1e-10);
  EXPECT_NEAR(g.content_bias.weight(0, 0), -0.0242382643, 1e-10);
}

TEST(collaborative_attention, equals_plain_loops) {
  // Lengths across the tiles' borders (192 keys, 48 and 384 queries), an empty sequence, widths that fill no packet.
  const offsets rows{0, 3, 3, 420, 421, 600};
  for (const bool causal : {false, true}) {
    const auto l = make({.inputs = 6, .heads = 3, .key_width = 7, .value_width = 15, .outputs = 5, .causal = causal, .query_bias = true});
    const matrix<double> x = random(600, 6, 2);
    plain reference{l.config};
    const matrix<double> expected = reference(l, x, rows, x, rows);
    EXPECT_LT(difference(run(l, x, {.rows = {rows}}), expected), 1e-13);
    const collaborative_attention<float> narrow = [&] {
      collaborative_attention<float> f(l.config, rng_key{1});
      for_each_tensor([](const std::string&, role, auto& to, const auto& from) { to = from.template cast<float>(); }, f, l);
      return f;
    }();
    // float against double: rounding of the inputs and of sums of some hundred terms of order 1
    EXPECT_LT(difference(run(narrow, matrix<float>(x.cast<float>()), {.rows = {rows}}), expected), 2e-5);
  }
}

TEST(collaborative_attention, at_full_width_with_one_hot_blocks_is_plain_attention) {
  const index_t D = 12, H = 3, d = 4;
  attention<double> separate({.inputs = D, .heads = H, .causal = true}, rng_key{1});
  collaborative shared({.inputs = D, .heads = H, .causal = true, .mixing = mixing_start::concatenate}, rng_key{2});
  EXPECT_EQ(shared.config.scale, separate.config.scale);
  shared.query.weight = separate.query.weight;
  shared.key.weight = separate.key.weight;
  shared.value = separate.value;
  shared.output = separate.output;
  for (index_t h = 0; h < H; ++h)
    shared.content_bias.weight.row(h) = separate.query.bias.row(0).segment(h * d, d) * separate.key.weight.middleRows(h * d, d);
  const matrix<double> x = random(40, D, 3);
  const matrix<double> y = run(separate, x, {});
  EXPECT_LT(difference(run(shared, x, {}), y), 1e-14);
  separate.key.bias.setRandom();  // changes nothing
  EXPECT_LT(difference(run(separate, x, {}), y), 1e-14);
}

TEST(collaborative_attention, mixing_starts) {
  const rng_key k{1};
  const matrix<double> blocks = make_mixing<double>(mixing_start::concatenate, 3, 7, k);
  matrix<double> expected(3, 7);
  expected << 1, 1, 1, 0, 0, 0, 0,  //
      0, 0, 0, 1, 1, 1, 0,          //
      0, 0, 0, 0, 0, 0, 1;
  EXPECT_EQ(blocks, expected);
  EXPECT_EQ(make_mixing<double>(mixing_start::concatenate, 4, 2, k).bottomRows(2).cwiseAbs().sum(), 0);  // later heads are empty
  EXPECT_EQ(make_mixing<double>(mixing_start::all_ones, 3, 7, k).sum(), 21);
  const auto deviation = [&](mixing_start s) { return std::sqrt(make_mixing<double>(s, 12, 384, k).array().square().mean()); };
  EXPECT_NEAR(deviation(mixing_start::normal), 0.2, 0.01);  // 4608 draws: a hundredth of the deviation is one standard error
  EXPECT_NEAR(deviation(mixing_start::standard_normal), 1, 0.05);
  EXPECT_NEAR(deviation(mixing_start::xavier_uniform), 0.12309 / std::sqrt(3.0), 0.002);
  EXPECT_NEAR(deviation(mixing_start::uniform), 1 / std::sqrt(3 * 384.0), 0.001);
}

TEST(collaborative_attention, gradients_of_self_attention) {
  const offsets rows{0, 4, 4, 5, 11};
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1};
  const collaborative_attention_config all{
      .inputs = 6, .heads = 2, .key_width = 5, .value_width = 8, .outputs = 7, .causal = true, .query_bias = true};
  for (auto c : {all, {.inputs = 6, .heads = 3, .key_width = 4, .content_bias = false, .value_bias = false, .projected = false}}) {
    for (const double rate : {0.0, 0.3}) {
      c.dropout = rate;
      const auto l = make(c);
      for (const bool padded : {false, true}) {
        context ctx{.key = {5}, .rows = {rows}, .train = true};
        if (padded) ctx.mask = mask;
        const auto report = gradient_check(l, random(11, 6, 1), ctx);
        EXPECT_LT(report.worst(), 1e-6) << report.where();  // central differences of step 1e-5: 1e-10 / floor 1e-3, and third derivatives
        EXPECT_GT(report.smallest_gradient(), 1e-3);
      }
    }
  }
}

TEST(collaborative_attention, gradients_of_cross_attention_with_a_head_mask) {
  const offsets rows{0, 3, 3, 8, 9}, memory_rows{0, 4, 6, 6, 11};
  auto l = lively(collaborative_cross({.inputs = 6, .heads = 2, .key_width = 5, .outputs = 7}, 5, rng_key{1}));
  l.head_mask = random(1, 2, 7);
  const matrix<double> x = random(9, 6, 1), m = random(11, 5, 2);
  const auto report = gradient_check(l, x, {m, {memory_rows}}, {.rows = {rows}});
  EXPECT_LT(report.worst(), 1e-6) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
  matrix<double> y(9, 7);
  l.forward(x, {m, {memory_rows}}, y, {.rows = {rows}});
  EXPECT_LT(difference(y, plain{l.config}(l, x, rows, m, memory_rows)), 1e-14);
}

// Tiles in several groups, pieces in which several sequences take turns: dx of single numbers.
TEST(collaborative_attention, gradients_across_tiles_and_sequences) {
  offsets rows{0, 850};
  for (int i = 0; i < 20; ++i) rows.push_back(rows.back() + i % 3);
  const index_t T = rows.back();
  const auto l = make({.inputs = 4, .heads = 2, .key_width = 3, .causal = true});
  matrix<double> x = random(T, 4, 1);
  const matrix<double> dy = random(T, 4, 2);
  matrix<double> y(T, 4), dx(T, 4);
  const context ctx{.rows = {rows}};
  collaborative::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, g, ctx);
  const auto check = [&](double& number, double gradient) {
    const double was = number, step = 1e-5;
    const auto loss = [&](double v) {
      number = v;
      l.forward(x, y, ctx);
      return (y.array() * dy.array()).sum();
    };
    const double slope = (loss(was + step) - loss(was - step)) / (2 * step);
    number = was;
    EXPECT_NEAR(gradient, slope, 1e-6);  // sums of 850 rows: 1e-13 of rounding over the step, and third derivatives
  };
  for (const index_t t : {0, 150, 200, 400, 790, 849, 852, 860}) check(x(t, 1), dx(t, 1));
  auto& mixing = const_cast<collaborative&>(l).mixing;
  for (const index_t j : {0, 1, 2}) check(mixing(1, j), g.mixing(1, j));
  auto& content = const_cast<collaborative&>(l).content_bias.weight;
  check(content(0, 2), g.content_bias.weight(0, 2));
}

TEST(collaborative_attention, an_additive_bias_hides_shifts_and_has_a_gradient) {
  const offsets rows{0, 5, 13};
  const auto l = make({.inputs = 6, .heads = 2, .key_width = 5, .causal = true});
  const matrix<double> x = random(13, 6, 1), dy = random(13, 6, 2);
  matrix<double> y(13, 6), dx(13, 6), bias = random(26, 13, 3), gradient = matrix<double>::Ones(26, 13);
  const double hidden = -std::numeric_limits<double>::infinity();
  bias(13 + 7, 6) = hidden;
  bias.row(4).setConstant(hidden);  // sees nothing in one head
  const context ctx{.rows = {rows}};
  const attention_bias<double> b{bias, gradient};
  collaborative::record r;
  auto g = make_gradient(l);
  l.forward(x, b, y, r, ctx);
  l.backward(x, b, r, dy, dx, g, ctx);
  EXPECT_TRUE(y.allFinite() && dx.allFinite() && gradient.allFinite());
  const auto loss = [&](index_t i, index_t j, double step) {
    matrix<double> moved = bias;
    moved(i, j) += step;
    l.forward(x, {moved, {}}, y, ctx);
    return (y.array() * dy.array()).sum();
  };
  for (const auto& [i, j] : {std::pair<index_t, index_t>{2, 1}, {9, 7}, {13 + 12, 6}}) {
    EXPECT_NEAR(gradient(i, j) - 1, (loss(i, j, 1e-5) - loss(i, j, -1e-5)) / 2e-5, 1e-9);
    EXPECT_GT(std::abs(gradient(i, j) - 1), 1e-4);
  }
  EXPECT_EQ(gradient(4, 1), 1);
}

TEST(collaborative_attention, padding_gives_nothing_is_no_key_and_leaks_no_nan) {
  const offsets rows{0, 5, 13};
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1};
  const auto l = make({.inputs = 6, .heads = 2, .key_width = 5});
  matrix<double> x = random(13, 6, 1), dx(13, 6);
  const context ctx{.rows = {rows}, .mask = mask};
  const matrix<double> y = run(l, x, ctx);
  plain reference{l.config};
  reference.mask = mask;
  EXPECT_LT(difference(y, reference(l, x, rows, x, rows)), 1e-14);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(run(l, x, ctx), y);
  collaborative::record r;
  auto g = make_gradient(l);
  matrix<double> again(13, 6);
  l.forward(x, again, r, ctx);
  l.backward(x, r, random(13, 6, 2), dx, g, ctx);
  EXPECT_TRUE(dx.allFinite() && g.key.weight.allFinite() && g.content_bias.weight.allFinite() && g.mixing.allFinite());
  for (const index_t t : {1, 4, 5, 10}) EXPECT_EQ(y.row(t).cwiseAbs().maxCoeff() + dx.row(t).cwiseAbs().maxCoeff(), 0);
}

TEST(collaborative_attention, every_option_changes_the_output) {
  const collaborative_attention_config c{.inputs = 6, .heads = 2};
  const matrix<double> x = random(9, 6, 1);
  const matrix<double> y = run(make(c), x, {});
  const auto changed = [&](auto&& edit) {
    auto other = c;
    edit(other);
    return difference(run(make(other), x, {}), y) > 1e-3;
  };
  EXPECT_TRUE(changed([](auto& o) { o.key_width = 4; }));
  EXPECT_TRUE(changed([](auto& o) { o.value_width = 8; }));
  EXPECT_TRUE(changed([](auto& o) { o.heads = 3; }));
  EXPECT_TRUE(changed([](auto& o) { o.causal = true; }));
  EXPECT_TRUE(changed([](auto& o) { o.content_bias = false; }));
  EXPECT_TRUE(changed([](auto& o) { o.query_bias = true; }));
  EXPECT_TRUE(changed([](auto& o) { o.value_bias = false; }));
  EXPECT_TRUE(changed([](auto& o) { o.projected = false; }));
  EXPECT_TRUE(changed([](auto& o) { o.scale = 2; }));
  auto dropping = c;
  dropping.dropout = 0.5;
  EXPECT_EQ(run(make(dropping), x, {}), y);  // not in inference
  EXPECT_GT(difference(run(make(dropping), x, {.train = true}), y), 1e-3);
  EXPECT_GT(difference(run(make(dropping), x, {.train = true}), run(make(dropping), x, {.key = {3}, .train = true})), 1e-3);
  EXPECT_EQ(make({.inputs = 6, .heads = 2, .outputs = 9}).output_shape(x).cols, 9);
}

TEST(collaborative_attention, dropout_keeps_the_mean) {
  auto l = make({.inputs = 6, .heads = 2, .projected = false, .dropout = 0.4});
  const matrix<double> x = random(40, 6, 1), y = run(l, x, {});
  matrix<double> sum = matrix<double>::Zero(40, 6);
  constexpr int draws = 400;
  for (std::uint64_t i = 0; i < draws; ++i) sum += run(l, x, {.key = {i}, .train = true});
  EXPECT_LT(difference(matrix<double>(sum / draws), y), 0.05);  // weights of 1/40 each: a deviation of about 0.13 / 20, and many numbers
}

template <class S>
void same_bits(index_t length, index_t heads, double rate) {
  const auto l = lively(collaborative_attention<S>(
      {.inputs = 16, .heads = heads, .key_width = 20, .value_width = heads * 5, .causal = true, .dropout = rate}, rng_key{1}));
  const offsets rows{0, length / 3, length / 3, length};
  const matrix<S> x = random<S>(length, 16, 1);
  expect_same_bits_for_any_workers(l, x, {.rows = {rows}, .train = true}, [&](const context& ctx) {
    matrix<S> all(length + 3, 16);
    auto c = l.make_cache(3, length + 1);
    l.decode(x, all.topRows(length), c, ctx);
    context one = ctx;
    const offsets single{0, 1, 2, 3};
    one.rows = {single};
    l.decode(matrix<S>(x.topRows(3)), all.bottomRows(3), c, one);
    return all;
  });
}
TEST(collaborative_attention, same_bits_for_any_number_of_workers) {
  same_bits<float>(1300, 3, 0);
  same_bits<double>(500, 2, 0.2);
}

TEST(collaborative_attention, record_grows_with_the_length_and_not_its_square) {
  const collaborative_attention<float> l({.inputs = 16, .heads = 2, .key_width = 8}, rng_key{1});
  for (const index_t n : {400, 800}) {
    matrix<float> y(n, 16);
    collaborative_attention<float>::record r;
    l.forward(random<float>(n, 16, 1), y, r, {});
    EXPECT_EQ(bytes(r), static_cast<std::size_t>(n) * (2 * 8 + 2 + 2 * 16 + 2) * sizeof(float));
  }
}

TEST(collaborative_attention, a_second_equal_call_needs_no_more_scratch_memory) {
  const collaborative_attention<float> l({.inputs = 16, .heads = 2, .key_width = 8}, rng_key{1});
  workspace work;
  const context ctx{.work = &work};
  const matrix<float> x = random<float>(300, 16, 1);
  matrix<float> y(300, 16), dx(300, 16);
  collaborative_attention<float>::record r;
  auto g = make_gradient(l);
  const auto step = [&] {
    l.forward(x, y, r, ctx);
    l.backward(x, r, x, dx, g, ctx);
  };
  step();
  const auto held = work.bytes();
  const float* const record = r.query.data();
  step();
  EXPECT_EQ(work.bytes(), held);
  EXPECT_EQ(r.query.data(), record);
}

template <class S>
class collaborative_decoding : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(collaborative_decoding, scalars);

// Ragged prefill, single steps, drafts that are taken back, sequences that change slots: always the full pass.
TYPED_TEST(collaborative_decoding, equals_the_full_pass) {
  using S = TypeParam;
  const double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;  // a row's bits may depend on how many rows come together
  for (const bool whole : {true, false}) {
    auto l = lively(collaborative_attention<S>(
        {.inputs = 12, .heads = 3, .key_width = 7, .causal = true, .content_bias = whole, .query_bias = true, .projected = whole}, rng_key{1}));
    l.head_mask = matrix<S>::Constant(1, 3, S(0.5));
    const parallel_executor exec(2);
    workspace work(exec);
    const std::vector<matrix<S>> x{random<S>(260, 12, 1), random<S>(270, 12, 2), random<S>(250, 12, 3)};
    std::vector<matrix<S>> full;
    for (const auto& s : x) full.push_back(run(l, s, {}));
    auto cache = l.make_cache(3, 300);
    std::vector<std::size_t> in{0, 1, 2};
    std::vector<index_t> done{0, 0, 0};
    const auto feed = [&](std::vector<index_t> slots, std::vector<index_t> counts, bool keep = true) {
      offsets rows{0};
      for (const index_t n : counts) rows.push_back(rows.back() + n);
      matrix<S> now(rows.back(), 12), y(rows.back(), 12), expected(rows.back(), 12);
      for (std::size_t s = 0; s < slots.size(); ++s) {
        const std::size_t which = in[static_cast<std::size_t>(slots[s])];
        now.middleRows(rows[s], counts[s]) = x[which].middleRows(done[which], counts[s]);
        expected.middleRows(rows[s], counts[s]) = full[which].middleRows(done[which], counts[s]);
        if (keep) done[which] += counts[s];
      }
      decode<collaborative_attention<S>>(l, now, y, cache, {.exec = &exec, .work = &work, .rows = {rows}, .slots = slots});
      EXPECT_LT(difference(y, expected), tolerance);
    };
    feed({0, 1, 2}, {200, 7, 0});
    feed({2, 0}, {33, 1});
    for (int step = 0; step < 5; ++step) feed({0, 1, 2}, {1, 1, 1});
    feed({1}, {3}, false);  // a draft
    truncate(l, cache, 1, done[1]);
    feed({1, 0}, {20, 2});
    const std::vector<index_t> order{2, 0, 1};
    permute(l, cache, order);
    in = {2, 0, 1};
    feed({0, 1, 2}, {1, 1, 1});
    const std::vector<index_t> twice{1, 1, 2};  // two slots go on from one sequence
    permute(l, cache, twice);
    in = {0, 0, 1};
    const auto before = done;
    feed({0}, {1});
    done = before;
    feed({1}, {1});
    fill<collaborative_attention<S>>(l, matrix<S>(x[1].middleRows(done[1], 2)), cache, {.slots = std::vector<index_t>{2}});
    done[1] += 2;
    feed({2}, {1});
  }
}

TEST(collaborative_attention, decoding_sees_the_whole_cache_when_not_causal) {
  const auto l = make({.inputs = 8, .heads = 2, .key_width = 5});
  const matrix<double> x = random(30, 8, 1), full = run(l, x, {});
  for (const index_t last : {1, 3, 20}) {
    auto cache = l.make_cache(1, 30);
    matrix<double> y(last, 8);
    l.fill(matrix<double>(x.topRows(30 - last)), cache, {});
    l.decode(matrix<double>(x.bottomRows(last)), y, cache, {});
    EXPECT_LT(difference(y, full.bottomRows(last)), 1e-12);
  }
}

TEST(collaborative_attention, a_cache_holds_one_key_of_width_r_and_a_bias_for_each_head) {
  const collaborative_attention<float> l({.inputs = 768, .heads = 12, .key_width = 256}, rng_key{1});
  const auto c = l.make_cache(2, 64);
  EXPECT_EQ(c.keys.size() + c.content.size() + c.values.size(), 2 * 64 * 1036);
}

TEST(collaborative_attention, a_refused_decode_changes_nothing) {
  const auto l = make({.inputs = 8, .heads = 2, .causal = true});
  auto cache = l.make_cache(2, 4);
  const matrix<double> x = random(6, 8, 1);
  matrix<double> y(6, 8);
  const offsets rows{0, 1, 6};
  EXPECT_THROW(l.decode(x, y, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.fill(x, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.truncate(cache, 0, 1), index_error);
  EXPECT_EQ(cache.slots.length, (std::vector<index_t>{0, 0}));
}

TEST(collaborative_attention, nan_flows_through_to_the_rows_that_see_it) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const auto l = lively(collaborative_attention<float>({.inputs = 8, .heads = 2, .causal = true}, rng_key{1}));
    matrix<float> x = random<float>(100, 8, 1), y(100, 8), dx(100, 8);
    x(60, 3) = bad;
    collaborative_attention<float>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, random<float>(100, 8, 2), dx, g, {});
    EXPECT_TRUE(y.topRows(60).allFinite());
    for (index_t t = 60; t < 100; ++t) EXPECT_TRUE(std::isnan(y(t, 0))) << t;
    auto cache = l.make_cache(1, 100);
    l.decode(matrix<float>(x.topRows(60)), matrix_view<float>(y).slice_rows(0, 60), cache, {});
    EXPECT_TRUE(y.topRows(60).allFinite());
    l.decode(matrix<float>(x.row(60)), matrix_view<float>(y).slice_rows(60, 1), cache, {});
    EXPECT_TRUE(std::isnan(y(60, 0)));
  }
}

TEST(collaborative_attention, a_decoded_row_takes_nothing_from_a_later_one) {
  const auto l = make({.inputs = 8, .heads = 2, .causal = true});
  for (const index_t n : {2, 4}) expect_nothing_from_a_later_row(l, n);
}

TEST(collaborative_attention, takes_no_rows_and_one_row) {
  const auto l = make({.inputs = 8, .heads = 2, .causal = true});
  for (const index_t n : {0, 1}) {
    matrix<double> x = random(n, 8, 1), y(n, 8), dx(n, 8);
    collaborative::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, y, dx, g, {});
    if (n == 0) {
      EXPECT_EQ(g.mixing.cwiseAbs().maxCoeff(), 0);
    }
    auto cache = l.make_cache(1, 2);
    l.decode(x, y, cache, {});
    EXPECT_EQ(cache.slots.length[0], n);
  }
}

TEST(collaborative_attention, refuses_what_does_not_fit) {
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .key_width = -1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 0}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 3}), config_error);  // value_width
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .outputs = 4, .projected = false}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .scale = -1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .scale = std::numeric_limits<double>::quiet_NaN()}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .dropout = 1.1}), config_error);
  EXPECT_THROW(collaborative_cross({.inputs = 8, .heads = 2, .causal = true}, 4, rng_key{1}), config_error);
  EXPECT_THROW(static_cast<void>(make_mixing<float>(mixing_start::normal, 0, 3, rng_key{})), config_error);
  EXPECT_THROW(static_cast<void>(make_mixing<float>(mixing_start::normal, 3, 0, rng_key{})), config_error);

  auto l = make({.inputs = 8, .heads = 2, .key_width = 5});
  const matrix<double> x = random(6, 8, 1);
  matrix<double> y(6, 8), narrow(6, 7), bias(12, 5);
  collaborative::record r;
  auto g = make_gradient(l);
  const std::vector<std::uint8_t> mask(5, 1);
  EXPECT_THROW(l.forward(narrow, y, {}), shape_error);
  EXPECT_THROW(l.forward(x, narrow, {}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.mask = mask}), shape_error);
  EXPECT_THROW(l.forward(x, attention_bias<double>{bias}, y, {}), shape_error);
  EXPECT_THROW(l.backward(x, r, y, narrow, g, {}), shape_error);
  EXPECT_THROW(l.backward(x, r, y, matrix<double>(6, 8), g, {}), state_error);
  l.mixing.setZero(2, 4);
  try {
    l.forward(x, y, {});
    ADD_FAILURE() << "a mixing matrix of the wrong shape was taken";
  } catch (const shape_error& e) {
    EXPECT_STREQ(e.what(), "collaborative_attention: expected a mixing matrix of shape [2 x 5], got [2 x 4]");
  }
  l.mixing.setZero(2, 5);
  l.head_mask.setOnes(1, 3);
  EXPECT_THROW(l.forward(x, y, {}), shape_error);
}

TEST(collaborative_attention, cost_counts_projections_scores_and_cached_bytes) {
  const collaborative_attention<float> l({.inputs = 8, .heads = 4, .key_width = 3}, rng_key{1});
  const cost c = l.forward_cost(100);
  EXPECT_EQ(c.parameters, static_cast<double>(count_parameters(l)));
  const double products = 2 * (3 * 8 + 3 * 8 + 4 * 8 + 2 * 8 * 8), biases = 8 + 8, mixing = 4 * 3;
  EXPECT_EQ(c.flops, products + biases + mixing + 2 * 100 * (4 * 3 + 8));
  EXPECT_EQ(c.bytes, 4 * (c.parameters + 100 * (3 + 4 + 8)));
}

}  // namespace collaborative_attention_tests
