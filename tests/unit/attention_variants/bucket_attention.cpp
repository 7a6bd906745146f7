#include "lithe/layers/attention/bucket_attention.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/malloc_count.hpp"
#include "support/matrices.hpp"
#include "support/same_bits.hpp"

namespace bucket_attention_tests {

using namespace lithe;

static_assert(layer<bucket_attention<float>> && layer<bucket_attention<double>>);
static_assert(cached_layer<bucket_attention<float>> && cached_layer<bucket_attention<double>>);


using offsets = std::vector<index_t>;
using bytes_mask = std::vector<std::uint8_t>;

bucket_attention_config config(index_t buckets, index_t rounds, bool causal) {
  return {.inputs = 12, .heads = 2, .causal = causal, .hash = {.rounds = rounds, .buckets = {buckets}}};
}

// The union over rounds as the specification writes it, one pair at a time, with the ids that the layer found.
template <class S>
matrix<double> plain(const bucket_attention<S>& l, const matrix<S>& x, const matrix<bucket_t>& ids, const context& ctx) {
  const auto& c = l.config;
  const matrix<double> q = x.template cast<double>() * l.query_key.weight.template cast<double>().transpose();
  const matrix<double> v = x.template cast<double>() * l.value.weight.template cast<double>().transpose();
  matrix<double> o = matrix<double>::Zero(q.rows(), q.cols());
  const index_t d = c.head_width;
  for (index_t s = 0; s < ctx.rows.count(); ++s)
    for (index_t h = 0; h < c.heads; ++h)
      for (index_t i = ctx.rows.begin(s); i < ctx.rows.end(s, x.rows()); ++i) {
        std::vector<std::pair<index_t, double>> met;
        double most = -1e5;
        for (index_t j = ctx.rows.begin(s); j < (c.causal ? i + 1 : ctx.rows.end(s, x.rows())); ++j) {
          bool meet = j == i;
          for (index_t r = 0; r < c.hash.rounds; ++r)
            meet = meet || (ctx.valid(i) && ctx.valid(j) && ids(h * c.hash.rounds + r, i) == ids(h * c.hash.rounds + r, j));
          if (!meet) continue;
          const auto key = q.row(j).segment(h * d, d);
          const double square = key.squaredNorm();
          const double scale =
              c.norm == key_norm::rms ? 1 / std::sqrt(square + static_cast<double>(d) * 1e-6) : 1 / std::sqrt(static_cast<double>(d) * square);
          met.emplace_back(j, i == j ? -1e5 : scale * q.row(i).segment(h * d, d).dot(key));
          most = std::max(most, met.back().second);
        }
        double sum = 0;
        for (const auto& [j, score] : met) sum += std::exp(score - most);
        for (const auto& [j, score] : met) o.row(i).segment(h * d, d) += std::exp(score - most) / sum * v.row(j).segment(h * d, d);
      }
  return o * l.output.weight.template cast<double>().transpose();
}

template <class S>
struct result {
  typename bucket_attention<S>::record record;
  matrix<S> y;
};
template <class S>
result<S> run(const bucket_attention<S>& l, const matrix<S>& x, const context& ctx) {
  result<S> r{{}, matrix<S>(x.rows(), l.config.outputs)};
  l.forward(x, r.y, r.record, ctx);
  matrix<S> again(r.y.rows(), r.y.cols());
  if (l.config.hash.family != hash_family::external) {
    l.forward(x, again, ctx);
    EXPECT_EQ(again, r.y);
  }
  return r;
}

const offsets sequences{0, 7, 7, 8, 20, 41};

std::vector<bucket_attention_config> configurations() {
  std::vector<bucket_attention_config> all;
  for (const bool causal : {true, false}) {
    all.push_back(config(4, 1, causal));
    all.push_back(config(6, 3, causal));
    all.push_back(config(40, 2, causal));  // many tokens alone
    all.push_back({.inputs = 12,
                   .heads = 2,
                   .head_width = 5,
                   .outputs = 7,
                   .causal = causal,
                   .hash = {.rounds = 3, .buckets = {2, 4}},
                   .norm = key_norm::unit});
    all.push_back({.inputs = 12, .heads = 1, .causal = causal, .hash = {.family = hash_family::sign, .rounds = 2, .buckets = {4}}});
    all.push_back({.inputs = 12, .heads = 1, .causal = causal, .hash = {.family = hash_family::constant, .rounds = 2}});
  }
  return all;
}

std::string name_of(const bucket_attention_config& c) {
  return concat("buckets ", c.hash.buckets.total(), " rounds ", c.hash.rounds, " causal ", c.causal, " dropout ", c.dropout);
}

// Rounding of sums of some dozen numbers of order 1, and in double of -1e5 beside them.
TEST(bucket_attention, equals_the_union_over_rounds_in_plain_loops) {
  for (const auto& c : configurations()) {
    SCOPED_TRACE(name_of(c));
    const context ctx{.rows = {sequences}};
    const bucket_attention<double> l(c, rng_key{3});
    const bucket_attention<float> f(c, rng_key{3});
    const matrix<double> x = random(41, 12, 1, 2);
    const matrix<float> xf = x.cast<float>();
    const auto r = run(l, x, ctx);
    const auto rf = run(f, xf, ctx);
    EXPECT_EQ(l.output_shape(x), (shape{41, l.config.outputs}));
    EXPECT_LT(difference(r.y, plain(l, x, r.record.buckets.value, ctx)), 1e-14);
    EXPECT_LT(difference(rf.y, plain(f, xf, rf.record.buckets.value, ctx)), 2e-6);
  }
}

// Buckets of several tiles and spans, queries that begin in the middle of a bucket.
TEST(bucket_attention, equals_plain_loops_over_several_tiles) {
  for (const bool causal : {true, false})
    for (const index_t buckets : {2, 8}) {
      bucket_attention_config c{.inputs = 8, .heads = 1, .causal = causal, .hash = {.rounds = 3, .buckets = {buckets}}};
      const offsets rows{0, 300, 1700};
      const context ctx{.rows = {rows}};
      const bucket_attention<double> l(c, rng_key{3});
      const matrix<double> x = random(1700, 8, 1, 2);
      const auto r = run(l, x, ctx);
      EXPECT_LT(difference(r.y, plain(l, x, r.record.buckets.value, ctx)), 1e-13);
      EXPECT_GT(l.largest_bucket(r.record, ctx), 400 / buckets);
    }
}

TEST(bucket_attention, one_bucket_is_exact_shared_query_attention) {
  // The same whether it is met in one round or in several: every pair counts once.
  const matrix<double> x = random(60, 12, 1);
  const auto with = [&](hash_family family, index_t rounds) {
    bucket_attention_config c{.inputs = 12, .heads = 2, .causal = true, .hash = {.family = family, .rounds = rounds, .buckets = {2}}};
    return bucket_attention<double>(c, rng_key{3});
  };
  const auto one = run(with(hash_family::constant, 1), x, {});
  EXPECT_LT(difference(one.y, run(with(hash_family::constant, 4), x, {}).y), 1e-15);
  EXPECT_EQ(with(hash_family::constant, 4).largest_bucket(run(with(hash_family::constant, 4), x, {}).record, {}), 60);
  // Quarters of the tokens in pairs, all three ways: whoever shares a quarter meets three times, everybody at least once.
  const auto pairs = with(hash_family::external, 3);
  bucket_attention<double>::record r;
  r.buckets.value.resize(6, 60);
  for (index_t t = 0; t < 60; ++t)
    for (const index_t h : {0, 1}) {
      const index_t quarter = t % 4;
      r.buckets.value(3 * h, t) = static_cast<bucket_t>(quarter / 2);
      r.buckets.value(3 * h + 1, t) = static_cast<bucket_t>(quarter % 2);
      r.buckets.value(3 * h + 2, t) = static_cast<bucket_t>(quarter == 0 || quarter == 3 ? 0 : 1);
    }
  matrix<double> y(60, 12);
  pairs.forward(x, y, r, {});
  EXPECT_LT(difference(one.y, y), 1e-15);
  EXPECT_GT(difference(one.y, run(with(hash_family::rotation, 1), x, {}).y), 1e-3);
}

TEST(bucket_attention, each_option_changes_the_output) {
  const matrix<double> x = random(41, 12, 1, 2);
  const bytes_mask mask = [] {
    bytes_mask m(41, 1);
    m[3] = m[30] = 0;
    return m;
  }();
  const context ctx{.key = rng_key{9}, .rows = {sequences}, .train = true};
  const auto with = [&](auto change, const context& here) {
    bucket_attention_config c = config(4, 2, true);
    change(c);
    return run(bucket_attention<double>(c, rng_key{3}), x, here).y;
  };
  const auto nothing_changed = [](auto&) {};
  const matrix<double> y = with(nothing_changed, ctx);
  EXPECT_GT(difference(y, with([](auto& c) { c.causal = false; }, ctx)), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.hash.rounds = 3; }, ctx)), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.hash.buckets = {6}; }, ctx)), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.hash.family = hash_family::sign; }, ctx)), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.hash.sharing = direction_sharing::head_and_sequence; }, ctx)), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.norm = key_norm::unit; }, ctx)), 1e-8);  // 1e-6 in a mean square
  EXPECT_GT(difference(y, with([](auto& c) { c.dropout = 0.3; }, ctx)), 1e-3);
  context other = ctx;
  other.key = rng_key{10};
  EXPECT_GT(difference(y, with(nothing_changed, other)), 1e-3);  // other directions
  other = ctx;
  other.mask = mask;
  EXPECT_GT(difference(y, with(nothing_changed, other)), 1e-3);
  other = ctx;
  other.rows = {};
  EXPECT_GT(difference(y, with(nothing_changed, other)), 1e-3);
  other = ctx;
  other.train = false;
  other.key = rng_key{11};
  context same = other;
  same.key = rng_key{12};
  EXPECT_EQ(with(nothing_changed, other), with(nothing_changed, same));  // inference: the layer's own directions
}

TEST(bucket_attention, gradients_equal_finite_differences) {
  for (auto c : configurations())
    for (const double dropout : {0.0, 0.3}) {
      c.dropout = dropout;
      SCOPED_TRACE(name_of(c));
      bucket_attention<double> l(c, rng_key{5});
      for_each_tensor([](const std::string&, role, auto& p) { p *= 2; }, l);
      bytes_mask mask(41, 1);
      mask[2] = mask[11] = mask[40] = 0;
      context ctx{.key = rng_key{9}, .rows = {sequences}, .train = true};
      if (dropout > 0) ctx.mask = mask;
      const auto report = gradient_check(l, random(41, 12, 1), ctx);
      EXPECT_LT(report.worst(), 1e-6) << report.where();  // central differences with a step of 1e-5
      EXPECT_GT(report.smallest_gradient(), 1e-3);
    }
}

TEST(bucket_attention, gradients_equal_finite_differences_over_several_tiles) {
  for (const bool causal : {true, false}) {
    const bucket_attention<double> l({.inputs = 4, .heads = 1, .causal = causal, .hash = {.rounds = 2, .buckets = {2}}}, rng_key{5});
    matrix<double> x = random(900, 4, 1, 3), dy = random(900, 4, 2), y(900, 4), dx(900, 4);
    bucket_attention<double>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, dy, dx, g, {});
    const context replay{.replay = true};
    for (const index_t t : {0, 1, 191, 200, 383, 384, 500, 898, 899}) {
      const double was = x(t, 1), step = 1e-5;
      const auto loss = [&](double to) {
        x(t, 1) = to;
        l.forward(x, y, r, replay);
        return (y.array() * dy.array()).sum();
      };
      const double up = loss(was + step), down = loss(was - step);
      x(t, 1) = was;
      EXPECT_NEAR(dx(t, 1), (up - down) / (2 * step), 1e-7) << t;  // sums of 900 rows
    }
  }
}

// The weight of each pair is dropped by a draw of its own: over many draws the mean is the undropped output.
TEST(bucket_attention, dropout_keeps_the_mean) {
  bucket_attention_config c = config(4, 2, true);
  c.dropout = 0.3;
  c.hash.family = hash_family::external;
  const bucket_attention<double> l(c, rng_key{3});
  const matrix<double> x = random(41, 12, 1);
  bucket_attention<double>::record r;
  r.buckets.value.resize(4, 41);
  for (index_t i = 0; i < 4; ++i)
    for (index_t t = 0; t < 41; ++t) r.buckets.value(i, t) = static_cast<bucket_t>((t * (i + 3) / 2) % 4);
  matrix<double> sum = matrix<double>::Zero(41, 12), y(41, 12);
  constexpr int draws = 4000;
  for (std::uint64_t i = 0; i < draws; ++i) {
    l.forward(x, y, r, {.key = rng_key{i}, .train = true});
    sum += y;
  }
  l.forward(x, y, r, {});
  EXPECT_LT(difference(sum / draws, y), 0.05);  // a standard deviation of at most 0.65 |v| / √4000 = 0.01
}

TEST(bucket_attention, a_later_token_changes_no_earlier_row_hashing_included) {
  const bucket_attention<float> l(config(8, 3, true), rng_key{1});
  matrix<float> x = random<float>(500, 12, 1);
  const auto before = run(l, x, {});
  for (const index_t t : {499, 250, 3}) {
    x.row(t).array() += 1;
    const auto after = run(l, x, {});
    EXPECT_NE(before.record.buckets.value.col(t), after.record.buckets.value.col(t));
    EXPECT_LT(difference(before.y.topRows(t), after.y.topRows(t)), 1e-6);  // tiles of other sizes: rounding
    EXPECT_NE(before.y.row(t), after.y.row(t));
  }
}

TEST(bucket_attention, replay_and_external_ids_are_taken_as_they_are) {
  const bucket_attention<double> l(config(4, 2, true), rng_key{3});
  const matrix<double> x = random(30, 12, 1);
  auto r = run(l, x, {.key = rng_key{1}, .train = true});
  const auto ids = r.record.buckets.value;
  forget(r.record);
  EXPECT_EQ(r.record.context.size(), 0);
  matrix<double> y(30, 12);
  l.forward(x, y, r.record, {.key = rng_key{2}, .train = true, .replay = true});
  EXPECT_EQ(y, r.y);
  EXPECT_EQ(r.record.buckets.value, ids);
  bucket_attention_config c = l.config;
  c.hash.family = hash_family::external;
  bucket_attention<double> external(c, rng_key{3});
  bucket_attention<double>::record given;
  EXPECT_THROW(external.forward(x, y, given, {}), state_error);
  EXPECT_THROW(external.forward(x, y, {}), state_error);
  given.buckets.value = ids;
  external.forward(x, y, given, {});
  EXPECT_EQ(y, r.y);
  for (const int wrong : {4, 5}) {
    given.buckets.value(1, 2) = static_cast<bucket_t>(wrong);
    EXPECT_THROW(external.forward(x, y, given, {}), config_error);
  }
  EXPECT_THROW(l.forward(x, y, given, {.replay = true}), index_error);
  matrix<double> dx(x.rows(), x.cols());
  auto g = make_gradient(l);
  EXPECT_THROW(l.backward(x, given, y, dx, g, {}), index_error);
}

TEST(bucket_attention, external_ids_of_padding_are_written_over) {
  bucket_attention_config c = config(4, 2, true);
  const bucket_attention<double> own(c, rng_key{3});
  c.hash.family = hash_family::external;
  const bucket_attention<double> external(c, rng_key{3});
  const matrix<double> x = random(41, 12, 1);
  bytes_mask mask(41, 1);
  for (const std::size_t t : {0U, 5U, 6U, 39U}) mask[t] = 0;
  const context ctx{.rows = {sequences}, .mask = mask};
  const auto expected = run(own, x, ctx);
  bucket_attention<double>::record given;
  given.buckets.value = run(own, x, {.rows = {sequences}}).record.buckets.value;  // as if nobody were padding
  given.buckets.value(0, 5) = 60000;
  matrix<double> y(41, expected.y.cols());
  external.forward(x, y, given, ctx);
  EXPECT_EQ(given.buckets.value, expected.record.buckets.value);
  EXPECT_EQ(y, expected.y);
}

TEST(bucket_attention, padding_is_no_key_and_gives_its_own_value) {
  for (const bool causal : {true, false}) {
    const bucket_attention<double> l(config(4, 2, causal), rng_key{3});
    matrix<double> x = random(41, 12, 1);
    bytes_mask mask(41, 1);
    for (const std::size_t t : {0U, 5U, 6U, 7U, 30U, 39U, 40U}) mask[t] = 0;
    const context ctx{.rows = {sequences}, .mask = mask};
    const auto r = run(l, x, ctx);
    EXPECT_LT(difference(r.y, plain(l, x, r.record.buckets.value, ctx)), 1e-14);
    x.row(30).array() += 2;
    const auto other = run(l, x, ctx);
    for (index_t t = 0; t < 41; ++t)
      if (t != 30) {
        EXPECT_EQ(r.y.row(t), other.y.row(t));
      }
    const matrix<double> own = x.row(30) * l.value.weight.transpose() * l.output.weight.transpose();
    EXPECT_LT(difference(other.y.row(30), own), 1e-14);
  }
}

TEST(bucket_attention, sequences_do_not_see_each_other) {
  const bucket_attention<double> l(config(4, 2, false), rng_key{1});
  const matrix<double> x = random(41, 12, 1), y = run(l, x, {.rows = {sequences}}).y;
  for (std::size_t s = 0; s + 1 < sequences.size(); ++s) {
    const index_t n = sequences[s + 1] - sequences[s];
    EXPECT_LT(difference(y.middleRows(sequences[s], n), run(l, matrix<double>(x.middleRows(sequences[s], n)), {}).y), 1e-15);
  }
}

// In float the -1e5 of a token alone must not swallow the digits of those that meet others.
TEST(bucket_attention, float_stays_close_to_double_beside_tokens_that_are_alone) {
  for (const index_t rounds : {1, 2, 5, 8}) {
    bucket_attention_config c{.inputs = 16, .heads = 2, .causal = true, .hash = {.family = hash_family::external, .rounds = rounds, .buckets = {64}}};
    const bucket_attention<float> f(c, rng_key{1});
    bucket_attention<double> l(c, rng_key{1});
    for_each_tensor([](const std::string&, role, auto& a, const auto& b) { a = b.template cast<double>(); }, l, f);
    const matrix<float> x = random<float>(200, 16, 1, 3), dy = random<float>(200, 16, 2);
    bucket_attention<float>::record rf;
    bucket_attention<double>::record r;
    rf.buckets.value.resize(2 * rounds, 200);
    for (index_t i = 0; i < 2 * rounds; ++i)
      for (index_t t = 0; t < 200; ++t)
        rf.buckets.value(i, t) = static_cast<bucket_t>(uniform(rng_key{static_cast<std::uint64_t>(i)}, static_cast<std::uint64_t>(t)) * 64);
    r.buckets.value = rf.buckets.value;
    matrix<float> yf(200, 16), dxf(200, 16);
    matrix<double> y(200, 16), dx(200, 16);
    auto gf = make_gradient(f);
    auto g = make_gradient(l);
    f.forward(x, yf, rf, {});
    f.backward(x, rf, dy, dxf, gf, {});
    const matrix<double> xd = x.cast<double>();
    l.forward(xd, y, r, {});
    l.backward(xd, r, matrix<double>(dy.cast<double>()), dx, g, {});
    EXPECT_EQ((r.log_sum_exp.array() == -1e5).any(), true);
    EXPECT_LT(difference(yf, y), 1e-6 * y.cwiseAbs().maxCoeff());
    EXPECT_LT(difference(dxf, dx), 2e-6 * dx.cwiseAbs().maxCoeff());
  }
}

template <class S>
void same_bits(index_t length, index_t heads) {
  const bucket_attention<S> l({.inputs = 16, .heads = heads, .head_width = 20, .causal = true, .hash = {.rounds = 3, .buckets = {8}}, .dropout = 0.1},
                              rng_key{1});
  const offsets rows{0, length / 3, length / 3, length};
  expect_same_bits_for_any_workers(l, random<S>(length, 16, 1), {.rows = {rows}, .train = true});
}
TEST(bucket_attention, same_bits_for_any_number_of_workers) {
  same_bits<float>(2100, 3);
  same_bits<float>(900, 1);
  same_bits<double>(700, 2);
}

template <class S>
class bucket_decoding : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(bucket_decoding, scalars);

TYPED_TEST(bucket_decoding, equals_the_full_pass) {
  using S = TypeParam;
  const double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;  // DESIGN: a row's bits may depend on how many rows come together
  for (const index_t buckets : {2, 8, 64}) {
    const bucket_attention<S> l(config(buckets, 3, true), rng_key{1});
    const parallel_executor exec(2);
    workspace work(exec);
    std::vector<matrix<S>> x{random<S>(500, 12, 1), random<S>(270, 12, 2)}, full;
    for (const auto& s : x) full.push_back(run(l, s, {}).y);
    auto cache = l.make_cache(2, 500);
    std::vector<std::size_t> in{0, 1};
    std::vector<index_t> done{0, 0};
    const auto feed = [&](index_t a, index_t b, bool keep = true) {
      const offsets rows{0, a, a + b};
      matrix<S> now(a + b, 12), y(a + b, 12), expected(a + b, 12);
      for (std::size_t s : {0U, 1U}) {
        const index_t n = rows[s + 1] - rows[s];
        now.middleRows(rows[s], n) = x[in[s]].middleRows(done[in[s]], n);
        expected.middleRows(rows[s], n) = full[in[s]].middleRows(done[in[s]], n);
        if (keep) done[in[s]] += n;
      }
      decode<bucket_attention<S>>(l, now, y, cache, {.exec = &exec, .work = &work, .rows = {rows}});
      EXPECT_LT(difference(y, expected), tolerance);
    };
    feed(300, 0);
    feed(1, 13);
    for (int step = 0; step < 20; ++step) feed(1, 1);
    feed(20, 3, false);  // a draft
    for (const std::size_t s : {0U, 1U}) truncate(l, cache, static_cast<index_t>(s), done[in[s]]);
    feed(9, 5);
    permute(l, cache, std::vector<index_t>{1, 0});
    std::swap(in[0], in[1]);
    feed(1, 2);
    fill<bucket_attention<S>>(l, matrix<S>(x[in[0]].middleRows(done[in[0]], 2)), cache, {.slots = std::vector<index_t>{0}});
    done[in[0]] += 2;
    feed(1, 0);
    permute(l, cache, std::vector<index_t>{1, 1});  // beams
    in[0] = in[1];
    matrix<S> y(2, 12), twice(2, 12);
    twice.row(0) = twice.row(1) = x[in[1]].row(done[in[1]]);
    decode<bucket_attention<S>>(l, twice, y, cache, {.rows = {offsets{0, 1, 2}}});
    for (const index_t i : {0, 1}) EXPECT_LT(difference(y.row(i), full[in[1]].row(done[in[1]])), tolerance);
  }
}

TEST(bucket_attention, a_refused_decode_changes_nothing) {
  const bucket_attention<double> l(config(4, 2, true), rng_key{1});
  auto cache = l.make_cache(2, 4);
  const matrix<double> x = random(6, 12, 1);
  matrix<double> y(6, 12);
  const offsets rows{0, 1, 6};
  EXPECT_THROW(l.decode(x, y, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.fill(x, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.truncate(cache, 0, 1), index_error);
  EXPECT_EQ(cache.tokens.length, (offsets{0, 0}));
  EXPECT_TRUE((cache.last.array() == -1).all());
  EXPECT_THROW((void)bucket_attention<double>(config(4, 2, false), rng_key{1}).make_cache(1, 1), config_error);
  auto c = config(4, 2, true);
  c.hash.sharing = direction_sharing::head_and_sequence;
  EXPECT_THROW((void)bucket_attention<double>(c, rng_key{1}).make_cache(1, 1), config_error);
}

TEST(bucket_attention, nan_stays_with_those_who_meet_it) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const bucket_attention<float> l(config(8, 2, true), rng_key{1});
    matrix<float> x = random<float>(100, 12, 1), y(100, 12), dx(100, 12);
    x(65, 3) = bad;
    bucket_attention<float>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    l.backward(x, r, random<float>(100, 12, 2), dx, g, {});
    EXPECT_TRUE(std::isnan(y(65, 0)));
    const auto& ids = r.buckets.value;
    for (index_t t = 0; t < 100; ++t) {
      const bool meet = (ids.col(t).array() == ids.col(65).array()).any();
      EXPECT_TRUE(meet || y.row(t).allFinite()) << t;
    }
    auto cache = l.make_cache(1, 100);
    l.decode(x, y, cache, {});
  }
}

TEST(bucket_attention, takes_no_rows_one_row_and_nothing_but_padding) {
  for (const bool causal : {false, true}) {
    const bucket_attention<float> l(config(4, 2, causal), rng_key{1});
    for (const index_t n : {0, 1, 3}) {
      const matrix<float> x = random<float>(n, 12, 1);
      matrix<float> y(n, 12), dx(n, 12);
      const bytes_mask none(static_cast<std::size_t>(n), 0);
      for (const bool masked : {false, true}) {
        context ctx;
        if (masked) ctx.mask = none;
        bucket_attention<float>::record r;
        auto g = make_gradient(l);
        l.forward(x, y, r, ctx);
        l.backward(x, r, y, dx, g, ctx);
        EXPECT_TRUE(y.allFinite() && dx.allFinite());
        if (n == 1 || masked) {
          EXPECT_LT(difference(y, x * l.value.weight.transpose() * l.output.weight.transpose()), 1e-6);
        }
      }
    }
  }
}

TEST(bucket_attention, steady_state_allocates_nothing) {
  const bucket_attention<float> l(config(4, 2, true), rng_key{1});
  const parallel_executor exec(2);
  workspace work(exec);
  const offsets rows{0, 150, 200};
  const context ctx{.exec = &exec, .work = &work, .rows = {rows}, .train = true};
  const matrix<float> x = random<float>(200, 12, 1);
  matrix<float> y(200, 12), dx(200, 12);
  bucket_attention<float>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  EXPECT_EQ(bytes(r), 200U * (12 + 2) * sizeof(float) + 200U * 4 * sizeof(bucket_t));
#ifdef LITHE_COUNTS_MALLOC
  auto c = l.make_cache(2, 150);
  const std::vector<index_t> order{1, 1};
  long before = 0;
  for (int round = 0; round < 3; ++round) {
    if (round == 1) before = mallocs;
    l.forward(x, y, ctx);
    l.forward(x, y, r, ctx);
    l.backward(x, r, y, dx, g, ctx);
    l.decode(x, y, c, ctx);
    l.permute(c, order);
    for (const index_t slot : {0, 1}) l.truncate(c, slot, 0);
  }
  EXPECT_EQ(mallocs, before);
#else
  GTEST_SKIP() << "malloc is not ours to count here";
#endif
}

TEST(bucket_attention, refuses_what_does_not_fit) {
  const auto make = [](bucket_attention_config c) { return bucket_attention<float>(c, rng_key{}); };
  EXPECT_THROW(make({.inputs = 10, .heads = 3, .hash = {.buckets = {4}}}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2}), config_error);  // no number of buckets
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .hash = {.rounds = 0, .buckets = {4}}}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .hash = {.buckets = {5}}}), config_error);
  EXPECT_THROW(make({.inputs = 8, .heads = 2, .hash = {.buckets = {4}}, .dropout = 1.1}), config_error);
  const bucket_attention<float> l(config(4, 2, true), rng_key{1});
  matrix<float> x = random<float>(6, 12, 1), y(6, 12), narrow(6, 7), dx(6, 12);
  bucket_attention<float>::record r;
  auto g = make_gradient(l);
  EXPECT_THROW(l.forward(narrow, y, {}), shape_error);
  EXPECT_THROW(l.forward(x, narrow, {}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.mask = bytes_mask(5, 1)}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.rows = {offsets{0, 5}}}), shape_error);
  EXPECT_THROW(l.backward(x, r, y, dx, g, {}), state_error);
  EXPECT_THROW(l.forward(x, y, r, {.replay = true}), state_error);
}

TEST(bucket_attention, cost_counts_projections_directions_and_equal_buckets) {
  const bucket_attention<float> l(config(8, 2, true), rng_key{1});
  const double p = static_cast<double>(count_parameters(l));
  EXPECT_EQ(l.forward_cost(1000).parameters, p);
  EXPECT_EQ(l.forward_cost(1000).flops, 2 * p + 4 * 250 * 12 + 2 * 8 * 12);
  EXPECT_EQ(l.forward_cost(1000).bytes, 4 * (p + 2 * 250 * 12));
}

}  // namespace bucket_attention_tests
