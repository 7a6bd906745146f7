#include "lithe/layers/attention/lsh_attention.hpp"

#include <gtest/gtest.h>

#include <functional>

#include "lithe/compose/reversible_part.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/gradient_check.hpp"

namespace lsh_attention_tests {

using namespace lithe;

static_assert(layer<lsh_attention<float>> && layer<lsh_attention<double>>);
static_assert(cached_layer<lsh_attention<float>> && cached_layer<lsh_attention<double>>);
static_assert(fused_part<lsh_attention<float>> && fused_part<lsh_attention<double>>);

using offsets = std::vector<index_t>;
using config = lsh_attention_config;

template <class S = double>
matrix<S> normal(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<S> m(rows, cols);
  fill_normal<S>(m, 1.0, rng_key{seed});
  return m;
}
template <class A, class B>
double difference(const A& a, const B& b) {
  return a.size() == 0 ? 0 : static_cast<double>((a.template cast<double>() - b.template cast<double>()).cwiseAbs().maxCoeff());
}

config small(bool causal = true) {
  return {.inputs = 6, .heads = 2, .head_width = 5, .outputs = 4, .causal = causal, .hash = {.rounds = 3, .buckets = {6}}, .chunk = 5};
}

/// Section 3 of the paper, pair by pair, all in double: every round's sorted list, every slot of every window, one softmax.
struct plain {
  const config& c;
  const matrix<bucket_t>& ids;
  const context& ctx;

  struct pair {
    index_t round, key, slot;
  };
  // What the query at t (of a sequence that begins at `begin`) meets in a head.
  [[nodiscard]] std::vector<pair> meets(index_t h, index_t begin, index_t L, index_t t) const {
    std::vector<pair> out;
    if (L <= c.exact_up_to) {
      for (index_t j = 0; j < L; ++j) out.push_back({0, j, j});
      return out;
    }
    const index_t R = c.hash.rounds, m = c.chunk, C = (L + c.pad_to - 1) / c.pad_to * c.pad_to / m, w = c.before + 1 + c.after;
    for (index_t r = 0; r < R; ++r) {
      const auto at = order(h, r, begin, L);
      const index_t chunk = (std::find(at.begin(), at.end(), t) - at.begin()) / m;
      for (index_t offset = -c.before; offset <= c.after; ++offset) {
        index_t g = chunk + offset, from = r;
        if (g < 0 || g >= C) {
          if (c.wrap == chunk_wrap::none) continue;
          if (c.wrap == chunk_wrap::round) g = ((g % C) + C) % C;
          if (c.wrap == chunk_wrap::circular) {
            const index_t all = (((r * C + g) % (R * C)) + R * C) % (R * C);
            from = all / C;
            g = all % C;
          }
        }
        const auto source = order(h, from, begin, L);
        for (index_t i = g * m; i < std::min(L, (g + 1) * m); ++i)
          out.push_back({from == r ? r : from + 1000 * (r + 1), source[static_cast<std::size_t>(i)], ((chunk + offset + c.before) % w) * m + i - g * m});
      }
    }
    return out;
  }
  [[nodiscard]] std::vector<index_t> order(index_t h, index_t r, index_t begin, index_t L) const {
    std::vector<index_t> at(static_cast<std::size_t>(L));
    for (index_t i = 0; i < L; ++i) at[static_cast<std::size_t>(i)] = i;
    std::stable_sort(at.begin(), at.end(), [&](index_t a, index_t b) { return ids(h * c.hash.rounds + r, begin + a) < ids(h * c.hash.rounds + r, begin + b); });
    return at;
  }

  template <class S>
  matrix<double> operator()(const lsh_attention<S>& l, const matrix<S>& x_given) const {
    const matrix<double> x = x_given.template cast<double>(), q = x * l.query_key.weight.template cast<double>().transpose(),
                         v = x * l.value.weight.template cast<double>().transpose();
    const index_t T = x.rows(), d = c.head_width, R = c.hash.rounds;
    matrix<double> o = matrix<double>::Zero(T, q.cols());
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      for (index_t h = 0; h < c.heads; ++h)
        for (index_t begin = ctx.rows.begin(s), L = ctx.rows.end(s, T) - begin, t = 0; t < L; ++t) {
          const bool exact = L <= c.exact_up_to;
          const auto pairs = meets(h, begin, L, t);
          const auto head = [&](const matrix<double>& m, index_t i) { return m.row(begin + i).segment(h * d, d); };
          const auto round_of = [&](std::size_t p) { return pairs[p].round < 1000 ? pairs[p].round : pairs[p].round / 1000 - 1; };
          const auto same = [&](std::size_t p) {  // bucket and round
            return exact || c.other_bucket.idle() ||
                   (pairs[p].round < 1000 && ids(h * R + round_of(p), begin + pairs[p].key) == ids(h * R + round_of(p), begin + t));
          };
          std::vector<double> e, m;
          for (std::size_t p = 0; p < pairs.size(); ++p) {
            const index_t j = pairs[p].key;
            const double square = head(q, j).squaredNorm(), dd = static_cast<double>(d);
            const double n = c.norm == key_norm::rms ? 1 / std::sqrt(square / dd + 1e-6) : 1 / std::sqrt(square);
            double score = head(q, t).dot(head(q, j)) * n / std::sqrt(dd);
            const auto apply = [&](const mask_rule& rule) { score = (rule.replace ? 0 : score) + rule.value; };
            if (!same(p)) apply(c.other_bucket);
            if (!exact && c.count_once && same(p)) {
              double times = 0;
              for (std::size_t u = 0; u < pairs.size(); ++u) times += pairs[u].key == j && same(u) ? 1 : 0;
              score -= std::log(times);
            }
            if ((c.causal && j > t) || !ctx.valid(begin + j)) apply(c.hidden);
            if (j == t) apply(c.self);
            e.push_back(score);
            double factor = 1;
            if (ctx.train && c.dropout > 0)
              draw_factors(ctx.key.child(1), static_cast<std::uint64_t>((h * R + round_of(p)) * T + begin + t), static_cast<std::uint64_t>(pairs[p].slot), 1, c.dropout,
                           &factor);
            m.push_back(factor);
          }
          const index_t groups = c.merge == round_merge::mean && !exact ? R : 1;
          for (index_t g = 0; g < groups; ++g) {
            const auto in = [&](std::size_t p) { return groups == 1 || round_of(p) == g; };
            double most = -1e300, sum = 0;
            for (std::size_t p = 0; p < e.size(); ++p)
              if (in(p)) most = std::max(most, e[p]);
            for (std::size_t p = 0; p < e.size(); ++p)
              if (in(p)) sum += std::exp(e[p] - most);
            for (std::size_t p = 0; p < e.size(); ++p)
              if (in(p)) o.row(begin + t).segment(h * d, d) += m[p] * std::exp(e[p] - most) / sum / static_cast<double>(groups) * head(v, pairs[p].key);
          }
        }
    return o * l.output.weight.template cast<double>().transpose();
  }
};

struct setting {
  const char* name;
  config c;
  bool train = false, masked = false;
};
std::vector<setting> settings() {
  std::vector<setting> all;
  const auto add = [&](const char* name, auto&& change) {
    all.push_back({name, small()});
    change(all.back());
  };
  add("causal", [](setting&) {});
  add("bidirectional", [](setting& s) { s.c.causal = false; });
  add("trax_v1", [](setting& s) { s.c = trax_v1_lsh(s.c); });
  add("trax_v2", [](setting& s) { s.c = trax_v2_lsh(s.c); });
  add("lucidrains", [](setting& s) { s.c = lucidrains_lsh(s.c); });
  add("after", [](setting& s) { s.c.causal = false, s.c.after = 2; });
  add("before_two", [](setting& s) { s.c.before = 2; });
  add("own_chunk", [](setting& s) { s.c.before = 0; });
  add("wrap_round", [](setting& s) { s.c.wrap = chunk_wrap::round, s.c.after = 1; });
  add("wrap_none", [](setting& s) { s.c.wrap = chunk_wrap::none, s.c.after = 1; });
  add("wide_window", [](setting& s) { s.c.before = 9, s.c.after = 8, s.c.causal = false; });  // the same chunk several times
  add("pad_to", [](setting& s) { s.c.pad_to = 15; });
  add("mean", [](setting& s) { s.c.merge = round_merge::mean; });
  add("same_bucket", [](setting& s) { s.c.other_bucket = {-1e9, true}; });
  add("count_once", [](setting& s) { s.c.count_once = true, s.c.causal = false; });
  add("count_once_wide", [](setting& s) { s.c.count_once = true, s.c.before = 9; });
  add("soft_masks", [](setting& s) { s.c.self = {-3, true}, s.c.hidden = {-4, true}, s.c.other_bucket = {-1, false}, s.masked = true; });  // every pair counts
  add("soft_masks_once", [](setting& s) { s.c.self = {-3, false}, s.c.hidden = {-4, false}, s.c.other_bucket = {-2, true}, s.c.count_once = true; });
  add("no_self_mask", [](setting& s) { s.c.self = {0, false}; });
  add("masked", [](setting& s) { s.masked = true; });
  add("masked_bidirectional", [](setting& s) { s.masked = true, s.c.causal = false; });
  add("dropout", [](setting& s) { s.train = true, s.c.dropout = 0.3; });
  add("dropout_mean", [](setting& s) { s.train = true, s.c.dropout = 0.3, s.c.merge = round_merge::mean, s.c.wrap = chunk_wrap::round; });
  add("training", [](setting& s) { s.train = true, s.c.hash.buckets = {2, 4}; });
  add("automatic", [](setting& s) { s.c.hash.buckets = {}; });
  add("sign", [](setting& s) { s.c.hash.family = hash_family::sign, s.c.hash.buckets = {8}; });
  add("constant", [](setting& s) { s.c.hash.family = hash_family::constant; });
  add("whole_packets", [](setting& s) { s.c.chunk = 16, s.c.head_width = 16; });
  add("never_exact", [](setting& s) { s.c.exact_up_to = 0; });
  add("one_token_chunks", [](setting& s) { s.c.chunk = 1; });
  return all;
}

/// Ragged, with an empty sequence, one token, chunk - 1, chunk + 1 and longer ones.
struct batch {
  offsets rows{0, 17, 17, 18, 22, 28, 66};
  std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(66, 1);
  context ctx;
  explicit batch(const setting& s) {
    for (const std::size_t i : {0, 3, 17, 27, 40, 63, 64, 65}) mask[i] = 0;
    ctx.rows = {rows};
    ctx.key = {77};
    ctx.train = s.train;
    if (s.masked) ctx.mask = mask;
  }
};

TEST(lsh_attention, equals_the_plain_loops) {
  for (const setting& s : settings()) {
    SCOPED_TRACE(s.name);
    const batch b(s);
    const lsh_attention<double> l(s.c, rng_key{1});
    lsh_attention<float> single(s.c, rng_key{1});
    single.query_key.weight = l.query_key.weight.cast<float>();
    single.value.weight = l.value.weight.cast<float>();
    single.output.weight = l.output.weight.cast<float>();
    const matrix<double> x = 2 * normal(66, 6, 2);
    matrix<double> y(66, 4);
    lsh_attention<double>::record r;
    l.forward(x, y, r, b.ctx);
    const matrix<double> expected = plain{l.config, r.buckets.value, b.ctx}(l, x);
    EXPECT_LT(difference(y, expected), 1e-12);  // the same sums in another order
    // Subtracting 1e5 leaves 7 binary digits behind the point of a float.
    const bool coarse = (!s.c.self.replace && s.c.self.value < -1e4);
    lsh_attention<float>::record rf;
    rf.buckets = r.buckets;
    context replay = b.ctx;
    replay.replay = true;
    matrix<float> yf(66, 4);
    const matrix<float> xf = x.cast<float>();
    single.forward(xf, yf, rf, replay);
    EXPECT_LT(difference(yf, expected), coarse ? 1e-2 : 1e-5 * expected.cwiseAbs().maxCoeff());
  }
}

TEST(lsh_attention, gradients) {
  for (const setting& s : settings()) {
    SCOPED_TRACE(s.name);
    const batch b(s);
    const auto report = gradient_check(lsh_attention<double>(s.c, rng_key{1}), normal(66, 6, 2), b.ctx, {.entries = 16});
    // Central differences with step 1e-5: truncation 1e-10 times a third derivative of up to some hundreds. Beside 1e5, a score keeps only 1e-11.
    EXPECT_LT(report.worst(), s.c.self.value < -1e4 && !s.c.self.replace ? 1e-5 : 1e-6) << report.where();
    EXPECT_GT(report.smallest_gradient(), 1e-2);
  }
}

TEST(lsh_attention, every_option_changes_the_output) {
  const auto run = [](const config& c, std::uint64_t key = 77) {
    setting s{"", c};
    s.train = true;
    batch b(s);
    b.ctx.key = {key};
    matrix<double> y(66, 4);
    lsh_attention<double>(c, rng_key{1}).forward(normal(66, 6, 2), y, b.ctx);
    return y;
  };
  const auto changes = [&](const config& from, auto&& change) {
    config c = from;
    change(c);
    return difference(run(from), run(c)) > 1e-4;
  };
  const config c = small(false);
  EXPECT_TRUE(changes(c, [](config& o) { o.causal = true; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.rounds = 2; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.buckets = {2, 4}; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.buckets = {}; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.family = hash_family::constant; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.sharing = direction_sharing::all; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.hash.sharing = direction_sharing::head_and_sequence; }));
  config sign = c;
  sign.hash.family = hash_family::sign;
  sign.hash.buckets = {8};
  EXPECT_GT(difference(run(c), run(sign)), 1e-4);
  EXPECT_TRUE(changes(sign, [](config& o) { o.hash.gray = gray_code::none; }));
  EXPECT_TRUE(changes(sign, [](config& o) { o.hash.gray = gray_code::forward; }));
  config automatic = c;
  automatic.hash.buckets = {};
  EXPECT_TRUE(changes(automatic, [](config& o) { o.hash.rule = bucket_rule::one_per_chunk; }));
  automatic.chunk = 2;  // 64 buckets of 38 tokens: above the limit unless there may be many positions
  EXPECT_TRUE(changes(automatic, [](config& o) { o.hash.most_positions = 1 << 20; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.chunk = 7; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.before = 0; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.after = 1; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.wrap = chunk_wrap::round; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.wrap = chunk_wrap::none; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.pad_to = 25; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.exact_up_to = 20; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.norm = key_norm::unit; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.self = {0, false}; }));
  EXPECT_TRUE(changes(small(true), [](config& o) { o.hidden = {-1, true}; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.other_bucket = {-1e9, true}; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.count_once = true; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.merge = round_merge::mean; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.dropout = 0.2; }));
  EXPECT_TRUE(changes(c, [](config& o) { o.output_dropout = 0.2; }));
  EXPECT_GT(difference(run(c), run(c, 78)), 1e-4);  // directions are drawn anew
}

TEST(lsh_attention, directions_are_fixed_outside_of_training) {
  const lsh_attention<double> l(small(), rng_key{1});
  const auto x = normal(40, 6, 2);
  matrix<double> y(40, 4), z(40, 4);
  context ctx;
  l.forward(x, y, ctx);
  ctx.key = {5};
  l.forward(x, z, ctx);
  EXPECT_EQ(y, z);
}

TEST(lsh_attention, dropout_one_gives_zero_and_zero_gradient) {
  for (const bool of_weights : {true, false}) {
    config c = small();
    (of_weights ? c.dropout : c.output_dropout) = 1;
    const lsh_attention<double> l(c, rng_key{1});
    const auto x = normal(30, 6, 2);
    matrix<double> y(30, 4), dx(30, 6);
    context ctx;
    ctx.train = true;
    lsh_attention<double>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, ctx);
    l.backward(x, r, normal(30, 4, 3), dx, g, ctx);
    EXPECT_TRUE((y.array() == 0).all());
    EXPECT_TRUE((dx.array() == 0).all());
    EXPECT_TRUE((g.query_key.weight.array() == 0).all());
  }
}

TEST(lsh_attention, same_bits_for_any_number_of_workers) {
  for (const bool twice : {false, true}) {
    config c = small(false);
    c.after = 1;
    c.chunk = 8;
    c.dropout = c.output_dropout = 0.1;
    c.merge = twice ? round_merge::mean : round_merge::softmax;
    const lsh_attention<float> l(c, rng_key{1});
    const index_t T = 5000;
    const offsets rows{0, 4100, 4105, 5000};
    const auto x = normal<float>(T, 6, 2), dy = normal<float>(T, 4, 3);
    const auto run = [&](index_t workers) {
      const parallel_executor exec(workers, workers);
      context ctx;
      ctx.exec = &exec;
      ctx.rows = {rows};
      ctx.train = true;
      std::vector<matrix<float>> out{matrix<float>(T, 4), matrix<float>(T, 6), matrix<float>::Zero(T, 4), matrix<float>::Zero(T, 6)};
      lsh_attention<float>::record r, kept_only;
      auto g = make_gradient(l);
      l.forward(x, out[0], r, ctx);
      l.backward(x, r, dy, out[1], g, ctx);
      l.add_to(x, out[2], kept_only, ctx);
      l.reverse(x, out[2], kept_only, dy, out[3], g, ctx);
      for (auto* m : {&g.query_key.weight, &g.value.weight, &g.output.weight}) out.push_back(*m);
      return out;
    };
    const auto one = run(1);
    for (const index_t workers : {2, 7}) EXPECT_EQ(run(workers), one);
  }
}

TEST(lsh_attention, fused_reverse_equals_forward_and_backward) {
  for (const bool drop : {false, true}) {
    config c = small();
    c.outputs = 6;
    if (drop) c.dropout = c.output_dropout = 0.2;
    const lsh_attention<double> l(c, rng_key{1});
    setting s{"", c};
    s.train = true;
    const batch b(s);
    const auto x = normal(66, 6, 2), dy = normal(66, 6, 3), start = normal(66, 6, 4);
    matrix<double> y(66, 6), dx(66, 6), stream = start, dstream = start;
    lsh_attention<double>::record r, kept_only;
    auto g = make_gradient(l), fused = make_gradient(l);
    l.forward(x, y, r, b.ctx);
    l.backward(x, r, dy, dx, g, b.ctx);
    l.add_to(x, stream, kept_only, b.ctx);
    EXPECT_EQ(kept_only.buckets.value, r.buckets.value);
    EXPECT_EQ(bytes(kept_only), bytes(r.buckets));  // nothing but the choices
    EXPECT_LT(difference(stream, matrix<double>(start + y)), 1e-12);
    context replay = b.ctx;
    replay.replay = true;
    l.reverse(x, stream, kept_only, dy, dstream, fused, replay);
    EXPECT_LT(difference(stream, start), 1e-12);
    EXPECT_LT(difference(dstream, matrix<double>(start + dx)), 1e-12);
    EXPECT_LT(difference(fused.query_key.weight, g.query_key.weight), 1e-12);
    EXPECT_LT(difference(fused.value.weight, g.value.weight), 1e-12);
    EXPECT_LT(difference(fused.output.weight, g.output.weight), 1e-12);
  }
}

TEST(lsh_attention, replay_keeps_buckets_though_queries_have_moved) {
  const lsh_attention<double> l(small(), rng_key{1});
  const auto x = normal(66, 6, 2);
  context ctx;
  matrix<double> y(66, 4);
  lsh_attention<double>::record r;
  l.forward(x, y, r, ctx);
  const matrix<bucket_t> ids = r.buckets.value;
  forget(r);
  EXPECT_EQ(r.context.size(), 0);
  ctx.replay = true;
  l.forward(normal(66, 6, 9), y, r, ctx);
  EXPECT_EQ(r.buckets.value, ids);
}

TEST(lsh_attention, external_ids) {
  config c = small();
  const lsh_attention<double> own(c, rng_key{1});
  c.hash.family = hash_family::external;
  const lsh_attention<double> l(c, rng_key{1});
  const auto x = normal(40, 6, 2);
  matrix<double> y(40, 4), z(40, 4);
  lsh_attention<double>::record r, given;
  own.forward(x, y, r, {});
  given.buckets = r.buckets;
  l.forward(x, z, given, {});
  EXPECT_EQ(y, z);
  EXPECT_THROW(l.forward(x, z, {}), state_error);
  lsh_attention<double>::record none;
  EXPECT_THROW(l.forward(x, z, none, {}), state_error);
  const offsets rows{0, 20, 40};
  for (const index_t t : {3, 33}) {
    given.buckets = r.buckets;
    given.buckets.value(0, t) = 6;
    EXPECT_THROW(l.forward(x, z, given, {.rows = {rows}}), std::invalid_argument) << t;
  }
  EXPECT_THROW((void)l.make_cache(1, 8), config_error);
}

// Given directions: R copies of one round are that round.
TEST(lsh_attention, copies_of_a_round_change_nothing) {
  for (const chunk_wrap wrap : {chunk_wrap::circular, chunk_wrap::round, chunk_wrap::none})
    for (const bool once : {false, true}) {
      config c = small();
      c.wrap = wrap;
      c.count_once = once;
      const auto run = [&](index_t rounds) {
        c.hash.rounds = rounds;
        lsh_attention<double> l(c, rng_key{1});
        l.hash.given = normal(3, 5, 4).replicate(2 * rounds, 1);
        matrix<double> y(40, 4);
        l.forward(normal(40, 6, 2), y, {});
        return y;
      };
      EXPECT_LT(difference(run(1), run(4)), 1e-12);
    }
}

TEST(lsh_attention, exact_attention_as_special_cases) {
  const auto x = normal(24, 6, 2);
  const auto run = [&](const config& c) {
    matrix<double> y(24, 4);
    lsh_attention<double>(c, rng_key{1}).forward(x, y, {});
    return y;
  };
  for (const bool causal : {true, false}) {
    config exact = small(causal);
    exact.exact_up_to = 24;
    const auto expected = run(exact);
    config one = small(causal);  // one chunk that is not taken for exact
    one.chunk = 24;
    one.before = one.after = one.exact_up_to = 0;
    EXPECT_LT(difference(run(one), expected), 1e-12);
    config all = small(causal);  // windows that hold everything, several times
    all.before = 7;
    all.self = exact.self = {0, false};  // a replaced score would count as often as it is met
    all.count_once = true;
    EXPECT_LT(difference(run(all), run(exact)), 1e-12);
    all.count_once = false;
    EXPECT_GT(difference(run(all), run(exact)), 1e-4);
  }
}

// A query that sees only itself has a score of -1e5 and R times the weight 1 / R: in float, log-sum-exp alone would be off by 5e-3.
TEST(lsh_attention, the_first_token_returns_its_own_value_in_float) {
  for (const index_t rounds : {2, 3, 5, 8}) {
    config c = small();
    c.hash.rounds = rounds;
    const lsh_attention<float> l(c, rng_key{1});
    const auto x = normal<float>(40, 6, 2);
    matrix<float> y(40, 4), dx(40, 6), dy = matrix<float>::Zero(40, 4);
    lsh_attention<float>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, r, {});
    const matrix<float> v = x.row(0) * l.value.weight.transpose();
    EXPECT_LT(difference(r.context.row(0), v), 1e-6);
    dy.row(0).setOnes();
    l.backward(x, r, dy, dx, g, {});
    const matrix<float> expected = dy.row(0) * l.output.weight * l.value.weight;
    EXPECT_LT(difference(dx.row(0), expected), 1e-6);
    EXPECT_EQ(dx.bottomRows(39).cwiseAbs().maxCoeff(), 0.0F);
  }
}

TEST(lsh_attention, later_tokens_do_not_enter_earlier_rows_while_ids_are_held) {
  const lsh_attention<double> l(small(), rng_key{1});
  auto x = normal(40, 6, 2);
  matrix<double> y(40, 4), z(40, 4);
  lsh_attention<double>::record r;
  l.forward(x, y, r, {});
  x.bottomRows(15) = normal(15, 6, 3);
  context replay;
  replay.replay = true;
  l.forward(x, z, r, replay);
  EXPECT_EQ(y.topRows(25), z.topRows(25));
  EXPECT_GT(difference(y.bottomRows(15), z.bottomRows(15)), 1e-3);
}

TEST(lsh_attention, padding_does_not_enter_real_rows) {
  for (const bool causal : {true, false}) {
    config c = small(causal);
    c.wrap = chunk_wrap::none;  // nor does its amount then
    c.hash.buckets = {4};
    const lsh_attention<double> l(c, rng_key{1});
    const auto real = normal(33, 6, 2);
    const auto run = [&](index_t padding, std::uint64_t seed) -> matrix<double> {
      matrix<double> x(33 + padding, 6), y(33 + padding, 4);
      x << real, normal(padding, 6, seed);
      std::vector<std::uint8_t> mask(static_cast<std::size_t>(33 + padding), 1);
      std::fill(mask.begin() + 33, mask.end(), std::uint8_t{0});
      context ctx;
      ctx.mask = mask;
      l.forward(x, y, ctx);
      EXPECT_TRUE(y.allFinite());
      return y.topRows(33);
    };
    EXPECT_EQ(run(7, 3), run(7, 4));
    EXPECT_LT(difference(run(7, 3), run(0, 4)), 1e-12);
    EXPECT_LT(difference(run(7, 3), run(40, 4)), 1e-12);
  }
}

TEST(lsh_attention, nothing_but_padding_returns_its_own_values) {
  config c = small();
  const lsh_attention<double> l(c, rng_key{1});
  const auto x = normal(20, 6, 2);
  const std::vector<std::uint8_t> mask(20, 0);
  context ctx;
  ctx.mask = mask;
  matrix<double> y(20, 4);
  l.forward(x, y, ctx);
  EXPECT_LT(difference(y, matrix<double>(x * l.value.weight.transpose() * l.output.weight.transpose())), 1e-12);
}

TEST(lsh_attention, sequences_of_a_batch_are_as_if_alone) {
  for (const setting& s : settings()) {
    if (s.train) continue;  // draws are counted over the whole call
    SCOPED_TRACE(s.name);
    const batch b(s);
    const lsh_attention<float> l(s.c, rng_key{1});
    if (l.config.hash.sharing == direction_sharing::head_and_sequence) continue;
    const auto x = normal<float>(66, 6, 2);
    matrix<float> y(66, 4);
    l.forward(x, y, b.ctx);
    for (index_t i = 0; i < b.ctx.rows.count(); ++i) {
      const index_t begin = b.ctx.rows.begin(i), n = b.ctx.rows.end(i, 66) - begin;
      context alone = b.ctx;
      alone.rows = {};
      if (s.masked) alone.mask = alone.mask.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n));
      matrix<float> z(n, 4);
      l.forward(x.middleRows(begin, n), z, alone);
      EXPECT_LT(difference(z, y.middleRows(begin, n)), 1e-6);  // projections of few rows round differently
    }
  }
}

TEST(lsh_attention, nan_and_infinity_stay_in_their_windows) {
  config c = small(false);
  c.wrap = chunk_wrap::none;
  c.before = 0;
  const lsh_attention<float> l(c, rng_key{1});
  auto x = normal<float>(40, 6, 2);
  matrix<float> y(40, 4), dx(40, 6);
  lsh_attention<float>::record r;
  x(7, 2) = std::numeric_limits<float>::quiet_NaN();
  x(9, 0) = std::numeric_limits<float>::infinity();
  l.forward(x, y, r, {});
  auto g = make_gradient(l);
  l.backward(x, r, normal<float>(40, 4, 3), dx, g, {});
  index_t finite = 0;
  for (index_t t = 0; t < 40; ++t) finite += y.row(t).allFinite() ? 1 : 0;
  EXPECT_FALSE(y.row(7).allFinite());
  EXPECT_GT(finite, 0);
}

TEST(lsh_attention, no_tokens_and_empty_sequences) {
  config c = small();
  c.outputs = 6;
  const lsh_attention<double> l(c, rng_key{1});
  matrix<double> x(0, 6), y(0, 6), dx(0, 6);
  const offsets empty{0, 0, 0};
  for (const bool segmented : {false, true}) {
    context ctx;
    if (segmented) ctx.rows = {empty};
    lsh_attention<double>::record r;
    auto g = make_gradient(l);
    l.forward(x, y, ctx);
    l.forward(x, y, r, ctx);
    l.backward(x, r, y, dx, g, ctx);
    l.reverse(x, y, r, y, dx, g, ctx);
    EXPECT_EQ(g.value.weight.cwiseAbs().maxCoeff(), 0);
  }
}

TEST(lsh_attention, a_workspace_grows_once) {
  for (const bool train : {false, true}) {
    config c = small();
    c.dropout = c.output_dropout = 0.1;
    const lsh_attention<float> l(c, rng_key{1});
    const auto x = normal<float>(700, 6, 2), dy = normal<float>(700, 4, 3);
    matrix<float> y(700, 4), dx(700, 6);
    workspace work;
    context ctx;
    ctx.work = &work;
    ctx.train = train;
    lsh_attention<float>::record r;
    auto g = make_gradient(l);
    const auto step = [&] {
      l.forward(x, y, ctx);
      l.forward(x, y, r, ctx);
      l.backward(x, r, dy, dx, g, ctx);
    };
    step();
    const auto held = work.bytes();
    const auto* ids = r.buckets.value.data();
    step();
    EXPECT_EQ(work.bytes(), held);
    EXPECT_EQ(r.buckets.value.data(), ids);
  }
}

// --- decoding -------------------------------------------------------------------------------------------------------------------------------

/// What the published decoder computes for the newest of n tokens, from the whole list of them.
matrix<double> plain_step(const lsh_attention<double>& l, const lsh_cache<double>& cache, const matrix<double>& x, index_t n) {
  const config& c = l.config;
  const index_t d = c.head_width, m = c.chunk, R = c.hash.rounds, t = n - 1;
  const matrix<double> q = x.topRows(n) * l.query_key.weight.transpose(), v = x.topRows(n) * l.value.weight.transpose();
  matrix<double> o = matrix<double>::Zero(1, q.cols());
  for (index_t h = 0; h < c.heads; ++h) {
    const matrix<double> qh = q.middleCols(h * d, d);
    const index_t directions = cache.hash.given.rows() / c.heads;
    matrix<bucket_t> ids(R, n);
    cache.hash.hash(qh, view(cache.hash.given).slice_rows(h * directions, directions), cache.hash.config.buckets, ids, {});
    std::vector<double> s;
    std::vector<index_t> keys;
    for (index_t r = 0; r < (n <= c.exact_up_to ? 1 : R); ++r) {
      std::vector<index_t> order;
      for (index_t j = 0; j < n; ++j) order.push_back(j);
      if (n <= c.exact_up_to) {
        keys = order;
        break;
      }
      std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return ids(r, a) < ids(r, b); });
      const index_t p = std::find(order.begin(), order.end(), t) - order.begin();
      for (index_t i = 0, start = (p / m - c.before) * m; i < (c.before + 1 + c.after) * m; ++i)
        keys.push_back(order[static_cast<std::size_t>((((start + i) % n) + n) % n)]);
    }
    double most = -1e300, sum = 0;
    for (const index_t j : keys) {
      s.push_back(j == t ? -1e5 : qh.row(t).dot(qh.row(j)) / std::sqrt(qh.row(j).squaredNorm() + 1e-6 * static_cast<double>(d)));
      most = std::max(most, s.back());
    }
    for (const double e : s) sum += std::exp(e - most);
    for (std::size_t i = 0; i < s.size(); ++i) o.middleCols(h * d, d) += std::exp(s[i] - most) / sum * v.row(keys[i]).segment(h * d, d);
  }
  return o * l.output.weight.transpose();
}

TEST(lsh_attention, decoding_equals_the_plain_loops) {
  for (const index_t after : {0, 1}) {
    config c = small();
    c.after = after;
    const lsh_attention<double> l(c, rng_key{1});
    const auto x = normal(60, 6, 2);
    auto cache = l.make_cache(2, 60);
    for (index_t t = 0; t < 60; ++t) {
      matrix<double> y(1, 4);
      l.decode(x.middleRows(t, 1), y, cache, {});
      ASSERT_LT(difference(y, plain_step(l, cache, x, t + 1)), 1e-12) << t;
    }
  }
}

TEST(lsh_attention, short_decoding_equals_the_whole_pass_and_prefill_equals_forward) {
  config c = small();
  c.chunk = 16;
  lsh_attention<double> l(c, rng_key{1});
  const auto x = normal(40, 6, 2);
  matrix<double> y(16, 4), row(1, 4), whole(40, 4), prefill(40, 4);
  l.forward(x.topRows(16), y, {});
  auto cache = l.make_cache(3, 40);
  for (index_t t = 0; t < 16; ++t) {
    l.decode(x.middleRows(t, 1), row, cache, {});
    EXPECT_LT(difference(row, y.row(t)), 1e-12);
  }
  const offsets rows{0, 0, 40};
  const std::vector<index_t> slots{2, 1};
  context ctx;
  ctx.rows = {rows};
  ctx.slots = slots;
  l.decode(x, prefill, cache, ctx);
  l.forward(x, whole, {});  // the same directions: both are those of inference
  EXPECT_LT(difference(prefill, whole), 1e-12);
}

// An imported model hashes sequences that its other layers make it fill up; one that began shorter it attends in full up to a chunk.
TEST(lsh_attention, a_sequence_that_began_unhashed_is_attended_in_full_up_to_a_chunk) {
  config c = small();
  c.chunk = 8;
  c.exact_up_to = 3;
  const lsh_attention<double> l(c, rng_key{1});
  c.exact_up_to = 8;
  const lsh_attention<double> exact(c, rng_key{1});
  const auto x = normal(9, 6, 2);
  matrix<double> expected(8, 4), y(8, 4);
  exact.forward(x.topRows(8), expected, {});
  const std::vector<index_t> slot{1}, turned{1, 1};
  for (const index_t begin : {1, 3, 4}) {
    auto cache = l.make_cache(2, 9);
    const context ctx{.slots = slot};
    const auto next = [&](index_t first, index_t n) { l.decode(view(x).slice_rows(first, n), view(y).slice_rows(first, n), cache, ctx); };
    next(0, begin);
    l.permute(cache, turned);
    for (index_t t = begin; t < 8; ++t) next(t, 1);
    EXPECT_EQ(difference(y, expected) < 1e-12, begin <= 3) << begin;
    l.truncate(cache, 1, 0);  // and begins again
    next(0, 2);
    for (index_t t = 2; t < 8; ++t) next(t, 1);
    EXPECT_LT(difference(y, expected), 1e-12) << begin;
  }
}

TEST(lsh_attention, padding_is_sorted_apart_or_hashed_as_it_comes) {
  const auto x = normal(40, 6, 2);
  std::vector<std::uint8_t> mask(40, 1);
  for (const std::size_t t : {3U, 17U, 38U}) mask[t] = 0;
  for (const bool apart : {true, false}) {
    config c = lucidrains_lsh(small());
    EXPECT_FALSE(c.padding_apart);
    c.padding_apart = apart;
    const lsh_attention<double> l(c, rng_key{1});
    lsh_attention<double>::record all, r;
    matrix<double> y(40, 4), z(40, 4);
    l.forward(x, y, all, {});
    l.forward(x, y, r, {.mask = mask});
    for (index_t i = 0; i < r.buckets.value.rows(); ++i)
      for (index_t t = 0; t < 40; ++t)
        EXPECT_EQ(r.buckets.value(i, t), apart && mask[static_cast<std::size_t>(t)] == 0 ? 6 : all.buckets.value(i, t));
    EXPECT_LT(difference(y, plain{l.config, r.buckets.value, {.mask = mask}}(l, x)), 1e-12);
    matrix<double> other = x;
    other.row(17).setConstant(3);  // not a key of anybody
    l.forward(other, z, r, {.mask = mask, .replay = true});
    for (index_t t = 0; t < 40; ++t)
      if (t != 17) {
        EXPECT_EQ(y.row(t), z.row(t)) << t;
      }
  }
}

TEST(lsh_attention, caches_are_filled_truncated_and_permuted) {
  const lsh_attention<double> l(small(), rng_key{1});
  const auto x = normal(50, 6, 2), other = normal(50, 6, 3);
  auto straight = l.make_cache(1, 50), cache = l.make_cache(3, 50);
  matrix<double> expected(10, 4), y(10, 4), junk(7, 4);
  l.fill(x.topRows(40), straight, {});
  l.decode(x.bottomRows(10), expected, straight, {});

  const std::vector<index_t> first{0}, second{1}, turned{2, 0, 0};
  context ctx;
  ctx.slots = first;
  l.fill(x.topRows(30), cache, ctx);
  ctx.slots = second;
  l.fill(other.topRows(20), cache, ctx);
  ctx.slots = first;
  l.fill(x.middleRows(30, 10), cache, ctx);
  l.decode(other.topRows(7), junk, cache, ctx);
  l.truncate(cache, 0, 40);
  l.permute(cache, turned);  // slots 1 and 2 both go on with the first
  EXPECT_EQ(cache.tokens.tokens(0), 0);
  for (const index_t slot : {2, 1}) {
    const std::vector<index_t> at{slot};
    ctx.slots = at;
    l.decode(x.bottomRows(10), y, cache, ctx);
    EXPECT_LT(difference(y, expected), 1e-12);
  }
  matrix<double> too_many(50, 4);
  ctx.slots = first;
  l.decode(x, too_many, cache, ctx);
  EXPECT_THROW(l.decode(x.topRows(10), y, cache, ctx), state_error);
  EXPECT_THROW(l.truncate(cache, 1, 51), index_error);
}

// --- errors ---------------------------------------------------------------------------------------------------------------------------------

TEST(lsh_attention, bad_options_and_inputs_are_errors) {
  const auto refused = [](auto&& change) {
    config c = small();
    change(c);
    EXPECT_THROW(lsh_attention<float>(c, {}), config_error);
  };
  refused([](config& c) { c.inputs = 0; });
  refused([](config& c) { c.heads = 4, c.head_width = 0; });
  refused([](config& c) { c.chunk = 0; });
  refused([](config& c) { c.before = -1; });
  refused([](config& c) { c.after = -1; });
  refused([](config& c) { c.pad_to = 7; });
  refused([](config& c) { c.exact_up_to = -2; });
  refused([](config& c) { c.dropout = 1.5; });
  refused([](config& c) { c.output_dropout = -0.1; });
  refused([](config& c) { c.hash.rounds = 0; });
  refused([](config& c) { c.hash.buckets = {3}; });
  refused([](config& c) { c.hash.buckets = {4, 0}; });
  refused([](config& c) { c.hash.buckets = {512, 512}; });
  refused([](config& c) { c.hash.family = hash_family::sign, c.hash.buckets = {6}; });

  config both_ways = small();
  both_ways.causal = false;
  EXPECT_THROW((void)lsh_attention<double>(both_ways, {}).make_cache(1, 8), config_error);
  const lsh_attention<double> l(small(), {});
  matrix<double> x(20, 6), narrow(20, 5), y(20, 4), dx(20, 6);
  x.setOnes();
  EXPECT_THROW(l.forward(narrow, y, {}), shape_error);
  EXPECT_THROW(l.forward(x, narrow, {}), shape_error);
  context ctx;
  const std::vector<std::uint8_t> mask(19, 1);
  ctx.mask = mask;
  EXPECT_THROW(l.forward(x, y, ctx), shape_error);
  ctx = {};
  const offsets wrong{0, 21};
  ctx.rows = {wrong};
  EXPECT_THROW(l.forward(x, y, ctx), shape_error);
  ctx = {};
  ctx.replay = true;
  lsh_attention<double>::record none;
  auto g = make_gradient(l);
  EXPECT_THROW(l.forward(x, y, none, ctx), state_error);
  EXPECT_THROW(l.backward(x, none, y, dx, g, {}), state_error);
  EXPECT_THROW(l.reverse(x, y, none, y, dx, g, {}), state_error);
  auto fewer = small();
  fewer.hash.rounds = 1;
  const lsh_attention<double> one_round(fewer, {});
  one_round.forward(x, y, none, {});
  EXPECT_THROW(l.backward(x, none, y, dx, g, {}), state_error);
  lsh_attention<double> given(small(), {});
  // 2 heads, 3 rounds and 3 directions are 18 rows; twice as many would be those of other rounds or buckets.
  for (const index_t directions : {7, 9, 36}) {
    given.hash.given = normal(directions, 5, 1);
    EXPECT_THROW(given.forward(x, y, {}), shape_error) << directions;
  }
}

TEST(lsh_attention, cost) {
  const lsh_attention<float> l(small(), {});
  const auto few = l.forward_cost(4), many = l.forward_cost(1000);
  EXPECT_EQ(few.parameters, 6 * 10 * 2 + 10 * 4);
  EXPECT_EQ(few.parameters, static_cast<double>(count_parameters(l)));
  EXPECT_EQ(few.flops, 2 * few.parameters + 2 * 4 * 4 * 5);
  EXPECT_EQ(many.flops, 2 * few.parameters + 2 * (4 * 3 * 10 * 5 + 2 * 3 * 5 * 3));
  EXPECT_EQ(l.forward_cost(100000).flops, many.flops);
}

}  // namespace lsh_attention_tests
