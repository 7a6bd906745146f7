#include "lithe/layers/attention/local_attention.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/cache.hpp"
#include "lithe/layers/parameters.hpp"
#include "lithe/training/gradient_check.hpp"
#include "support/decoded_rows.hpp"
#include "support/malloc_count.hpp"
#include "support/matrices.hpp"
#include "support/same_bits.hpp"

namespace local_attention_tests {

using namespace lithe;

static_assert(layer<local_attention<float>> && layer<local_attention<double>>);
static_assert(cached_layer<local_attention<float>> && cached_layer<local_attention<double>>);


using offsets = std::vector<index_t>;
using bytes_mask = std::vector<std::uint8_t>;

// The windows as the specification lists them, one number at a time.
template <class S>
matrix<double> plain(const local_attention<S>& l, const matrix<S>& x, const context& ctx) {
  const auto& c = l.config;
  const auto project = [&](const linear<S>& p, const matrix<double>& a) -> matrix<double> {
    return a * p.weight.template cast<double>().transpose();
  };
  const matrix<double> in = x.template cast<double>(), q = project(l.query, in), k = project(l.key, in), v = project(l.value, in);
  matrix<double> o = matrix<double>::Zero(q.rows(), q.cols());
  const index_t d = c.head_width;
  for (index_t s = 0; s < ctx.rows.count(); ++s) {
    const index_t begin = ctx.rows.begin(s), L = ctx.rows.end(s, x.rows()) - begin, C = (L + c.chunk - 1) / c.chunk;
    for (index_t t = 0; t < L; ++t) {
      std::vector<std::pair<index_t, index_t>> slots;  // position, number of the slot
      if (L <= c.chunk) {
        for (index_t j = 0; j < L; ++j) slots.emplace_back(j, j);
      } else {
        for (index_t at = -c.before; at <= c.after; ++at) {
          index_t from = t / c.chunk + at;
          if (c.circular) from = ((from % C) + C) % C;
          if (from >= 0 && from < C)
            for (index_t j = from * c.chunk; j < std::min(L, (from + 1) * c.chunk); ++j)
              slots.emplace_back(j, (at + c.before) * c.chunk + j % c.chunk);
        }
      }
      for (index_t h = 0; h < c.heads; ++h) {
        std::vector<double> e;
        double sum = 0;
        for (const auto& [j, slot] : slots) {
          const bool hidden = (c.causal && j > t) || !ctx.valid(begin + j);
          e.push_back(hidden ? 0 : std::exp(q.row(begin + t).segment(h * d, d).dot(k.row(begin + j).segment(h * d, d)) / std::sqrt(double(d))));
          sum += e.back();
        }
        for (std::size_t n = 0; n < slots.size(); ++n) {
          double weight = sum > 0 ? e[n] / sum : c.empty == empty_row::mean ? 1 / double(slots.size()) : 0.0;
          if (ctx.train && c.dropout > 0 && sum > 0)
            weight *= philox(ctx.key.child(static_cast<std::uint64_t>(h)), static_cast<std::uint64_t>(slots[n].second) / 4,
                             static_cast<std::uint64_t>(begin + t))[static_cast<std::size_t>(slots[n].second) % 4] <
                              static_cast<std::uint64_t>(c.dropout * 0x1p32)
                          ? 0
                          : 1 / (1 - c.dropout);
          o.row(begin + t).segment(h * d, d) += weight * v.row(begin + slots[n].first).segment(h * d, d);
        }
      }
    }
  }
  return project(l.output, o);
}

template <class S>
matrix<S> run(const local_attention<S>& l, const matrix<S>& x, const context& ctx) {
  matrix<S> y(x.rows(), l.config.outputs);
  l.forward(x, y, ctx);
  return y;
}

const offsets sequences{0, 7, 7, 8, 20, 41};
const bytes_mask padding = [] {
  bytes_mask m(41, 1);
  for (const std::size_t t : {0U, 1U, 2U, 3U, 4U, 7U, 8U, 9U, 10U, 11U, 12U, 13U, 30U, 31U, 40U}) m[t] = 0;
  return m;
}();

std::vector<local_attention_config> configurations() {
  const local_attention_config c{.inputs = 12, .heads = 2, .chunk = 4};
  std::vector<local_attention_config> all{c};
  const auto add = [&](auto change) {
    all.push_back(c);
    change(all.back());
  };
  add([](auto& d) { d.causal = true; });
  add([](auto& d) { d.after = 1; });
  add([](auto& d) { d.before = 0; });
  add([](auto& d) {
    d.circular = false;
    d.after = 2;
  });
  add([](auto& d) {
    d.before = 5;
    d.after = 4;
  });
  add([](auto& d) {
    d.before = 6;
    d.causal = true;
  });
  add([](auto& d) {
    d.chunk = 1;
    d.before = 3;
  });
  add([](auto& d) { d.chunk = 100; });
  add([](auto& d) {
    d.head_width = 5;
    d.outputs = 7;
    d.causal = true;
    d.before = 2;
  });
  add([](auto& d) {
    d.empty = empty_row::zero;
    d.causal = true;
  });
  return all;
}

// Rounding of sums of some dozen numbers of order 1.
TEST(local_attention, equals_plain_loops_with_every_option) {
  for (auto c : configurations())
    for (const bool padded : {false, true})
      for (const double dropout : {0.0, 0.3}) {
        c.dropout = dropout;
        SCOPED_TRACE(
            concat("chunk ", c.chunk, " before ", c.before, " after ", c.after, " causal ", c.causal, " padded ", padded, " dropout ", dropout));
        context ctx{.key = rng_key{9}, .rows = {sequences}, .train = true};
        if (padded) ctx.mask = padding;
        const local_attention<double> l(c, rng_key{3});
        const local_attention<float> f(c, rng_key{3});
        const matrix<double> x = random(41, 12, 1, 2);
        const matrix<float> xf = x.cast<float>();
        EXPECT_EQ(l.output_shape(x), (shape{41, l.config.outputs}));
        EXPECT_LT(difference(run(l, x, ctx), plain(l, x, ctx)), 1e-14);
        EXPECT_LT(difference(run(f, xf, ctx), plain(f, xf, ctx)), 2e-6);
      }
}

TEST(local_attention, equals_plain_loops_over_several_tiles) {
  for (const bool causal : {false, true}) {
    const offsets rows{0, 300, 1300};
    const context ctx{.rows = {rows}};
    for (const index_t chunk : {64, 250, 500}) {
      const local_attention<double> l({.inputs = 6, .heads = 1, .chunk = chunk, .after = 1, .causal = causal}, rng_key{3});
      const matrix<double> x = random(1300, 6, 1, 2);
      EXPECT_LT(difference(run(l, x, ctx), plain(l, x, ctx)), 1e-13);
    }
  }
}

TEST(local_attention, each_option_changes_the_output) {
  const matrix<double> x = random(41, 12, 1, 2);
  const context ctx{.key = rng_key{9}, .rows = {sequences}, .mask = padding, .train = true};
  const auto with = [&](auto change) {
    local_attention_config c{.inputs = 12, .heads = 2, .chunk = 4};
    change(c);
    return run(local_attention<double>(c, rng_key{3}), x, ctx);
  };
  const matrix<double> y = with([](auto&) {});
  EXPECT_GT(difference(y, with([](auto& c) { c.chunk = 5; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.before = 2; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.after = 1; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.causal = true; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.circular = false; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.empty = empty_row::zero; })), 1e-3);
  EXPECT_GT(difference(y, with([](auto& c) { c.dropout = 0.2; })), 1e-3);
  EXPECT_GT(difference(y, run(local_attention<double>({.inputs = 12, .heads = 2, .chunk = 4}, rng_key{3}), x, {.rows = {sequences}})), 1e-3);
  EXPECT_EQ(with([](auto& c) { c.head_width = 6; }), y);
}

TEST(local_attention, gradients_equal_finite_differences) {
  for (auto c : configurations())
    for (const bool padded : {false, true})
      for (const double dropout : {0.0, 0.3}) {
        c.dropout = dropout;
        SCOPED_TRACE(
            concat("chunk ", c.chunk, " before ", c.before, " after ", c.after, " causal ", c.causal, " padded ", padded, " dropout ", dropout));
        context ctx{.key = rng_key{9}, .rows = {sequences}, .train = true};
        if (padded) ctx.mask = padding;
        local_attention<double> l(c, rng_key{5});
        for_each_tensor([](const std::string&, role, auto& p) { p *= 2; }, l);
        const auto report = gradient_check(l, random(41, 12, 1), ctx);
        EXPECT_LT(report.worst(), 1e-6) << report.where();  // central differences with a step of 1e-5
        EXPECT_GT(report.smallest_gradient(), 1e-3);
      }
}

// Three rounds of runs of chunks, tiles within a chunk, heads that do not fill a packet.
TEST(local_attention, gradients_equal_finite_differences_over_several_runs) {
  for (const index_t chunk : {40, 250})
    for (const index_t length : {1700, 3000}) {
      const local_attention<double> l({.inputs = 3, .heads = 1, .chunk = chunk, .before = 2, .after = 1}, rng_key{5});
      matrix<double> x = random(length, 3, 1, 3), dy = random(length, 3, 2), y(length, 3), dx(length, 3);
      local_attention<double>::record r;
      auto g = make_gradient(l);
      l.forward(x, y, r, {});
      l.backward(x, r, dy, dx, g, {});
      for (const index_t t : {index_t{0}, index_t{39}, index_t{249}, index_t{511}, index_t{560}, length / 2, length - 1}) {
        const double was = x(t, 1), step = 1e-5;
        const auto loss = [&](double to) {
          x(t, 1) = to;
          l.forward(x, y, {});
          return (y.array() * dy.array()).sum();
        };
        const double up = loss(was + step), down = loss(was - step);
        x(t, 1) = was;
        EXPECT_NEAR(dx(t, 1), (up - down) / (2 * step), 1e-7) << t;  // sums of 3000 rows
      }
    }
}

TEST(local_attention, one_window_is_exact_attention_and_the_last_chunk_may_be_short) {
  const matrix<double> x = random(64, 12, 1);
  for (const bool causal : {false, true}) {
    const auto length = [&](index_t n, index_t chunk) {
      return run(local_attention<double>({.inputs = 12, .heads = 2, .chunk = chunk, .causal = causal}, rng_key{3}), matrix<double>(x.topRows(n)), {});
    };
    for (const index_t n : {1, 15, 16})  // up to one chunk: whatever its size
      EXPECT_LT(difference(length(n, 16), length(n, 1000)), 1e-15);
    EXPECT_EQ(length(17, 16).topRows(16) == length(16, 16), causal);  // circular: only without causality the first chunk sees the seventeenth
  }
}

// Rows that pad to whole chunks, hidden by the mask, whatever they hold: what the public models do.
TEST(local_attention, padding_on_the_right_changes_no_token) {
  for (const index_t after : {0, 1})
    for (const bool causal : {false, true}) {
      const local_attention<double> l({.inputs = 12, .heads = 2, .chunk = 8, .after = after, .causal = causal}, rng_key{3});
      for (const index_t n : {5, 17, 23}) {
        const index_t whole = (n + 7) / 8 * 8;
        const matrix<double> x = random(whole, 12, 1);
        bytes_mask mask(static_cast<std::size_t>(whole), 1);
        std::fill(mask.begin() + n, mask.end(), std::uint8_t{0});
        const matrix<double> padded = run(l, x, {.mask = mask});
        EXPECT_LT(difference(padded.topRows(n), run(l, matrix<double>(x.topRows(n)), {})), 1e-15);
        EXPECT_TRUE(padded.allFinite());
      }
    }
}

// The models fill up to the least common multiple of all their chunks, and windows go around what that adds, too.
TEST(local_attention, windows_go_around_the_padded_sequence) {
  for (const index_t before : {1, 3})
    for (const index_t after : {0, 1})
      for (const bool causal : {false, true}) {
        local_attention_config c{.inputs = 12, .heads = 2, .chunk = 4, .before = before, .after = after, .causal = causal};
        const local_attention<double> whole(c, rng_key{3});
        c.pad_to = 16;
        const local_attention<double> l(c, rng_key{3});
        for (const index_t n : {3, 5, 13, 16, 17, 30}) {
          const index_t filled = (n + 15) / 16 * 16;
          const matrix<double> x = random(filled, 12, 1);
          bytes_mask mask(static_cast<std::size_t>(filled), 1);
          std::fill(mask.begin() + n, mask.end(), std::uint8_t{0});
          const matrix<double> y = run(l, matrix<double>(x.topRows(n)), {});
          EXPECT_LT(difference(run(whole, x, {.mask = mask}).topRows(n), y), 1e-15) << n;
          if (before == 1 && !causal && n == 5) {
            EXPECT_GT(difference(run(whole, matrix<double>(x.topRows(n)), {}), y), 1e-3);
          }
        }
        const auto report = gradient_check(l, random(22, 12, 5), {});
        EXPECT_LT(report.worst(), 1e-6) << report.where();
      }
  EXPECT_THROW(local_attention<float>({.inputs = 8, .chunk = 4, .pad_to = 6}, rng_key{1}), config_error);
}

TEST(local_attention, a_later_token_changes_no_earlier_row_when_causal) {
  for (const bool causal : {false, true}) {
    const local_attention<float> l({.inputs = 16, .heads = 2, .chunk = 32, .causal = causal}, rng_key{1});
    matrix<float> x = random<float>(300, 16, 1);
    const matrix<float> y = run(l, x, {});
    x.row(295).array() += 1;
    const matrix<float> z = run(l, x, {});
    EXPECT_EQ(causal, y.topRows(295) == z.topRows(295));
    EXPECT_NE(y.row(295), z.row(295));
  }
}

TEST(local_attention, sequences_do_not_see_each_other) {
  const local_attention<double> l({.inputs = 8, .heads = 2, .chunk = 4}, rng_key{1});
  const matrix<double> x = random(41, 8, 1), y = run(l, x, {.rows = {sequences}});
  for (std::size_t s = 0; s + 1 < sequences.size(); ++s)
    EXPECT_LT(difference(y.middleRows(sequences[s], sequences[s + 1] - sequences[s]),
                         run(l, matrix<double>(x.middleRows(sequences[s], sequences[s + 1] - sequences[s])), {})),
              1e-15);  // products of other shapes
}

template <class S>
void same_bits(index_t length, index_t heads, index_t chunk, index_t after) {
  const local_attention<S> l({.inputs = 16, .heads = heads, .head_width = 20, .chunk = chunk, .after = after, .dropout = 0.1}, rng_key{1});
  const offsets rows{0, length / 3, length / 3, length};
  expect_same_bits_for_any_workers(l, random<S>(length, 16, 1), {.rows = {rows}, .train = true});
}
TEST(local_attention, same_bits_for_any_number_of_workers) {
  same_bits<float>(2500, 3, 64, 0);
  same_bits<float>(1700, 1, 30, 1);
  same_bits<double>(700, 2, 16, 2);
}

template <class S>
class local_decoding : public testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(local_decoding, scalars);

TYPED_TEST(local_decoding, equals_the_full_pass) {
  using S = TypeParam;
  const double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;  // DESIGN: a row's bits may depend on how many rows come together
  for (const local_attention_config& c :
       {local_attention_config{.inputs = 12, .heads = 2, .chunk = 16, .causal = true},
        {.inputs = 12, .heads = 2, .head_width = 5, .outputs = 7, .chunk = 7, .before = 3, .after = 1, .causal = true, .circular = false},
        {.inputs = 12, .heads = 1, .chunk = 500, .causal = true}}) {
    const local_attention<S> l(c, rng_key{1});
    const parallel_executor exec(2);
    workspace work(exec);
    std::vector<matrix<S>> x{random<S>(500, 12, 1), random<S>(270, 12, 2)}, full;
    for (const auto& s : x) full.push_back(run(l, s, {}));
    auto cache = l.make_cache(2, 500);
    std::vector<std::size_t> in{0, 1};
    std::vector<index_t> done{0, 0};
    const auto feed = [&](index_t a, index_t b, bool keep = true) {
      const offsets rows{0, a, a + b};
      matrix<S> now(a + b, 12), y(a + b, l.config.outputs), expected(a + b, l.config.outputs);
      for (std::size_t s : {0U, 1U}) {
        const index_t n = rows[s + 1] - rows[s];
        now.middleRows(rows[s], n) = x[in[s]].middleRows(done[in[s]], n);
        expected.middleRows(rows[s], n) = full[in[s]].middleRows(done[in[s]], n);
        if (keep) done[in[s]] += n;
      }
      decode<local_attention<S>>(l, now, y, cache, {.exec = &exec, .work = &work, .rows = {rows}});
      EXPECT_LT(difference(y, expected), tolerance);
    };
    feed(200, 0);
    feed(1, 13);
    for (int step = 0; step < 40; ++step) feed(1, 1);
    feed(20, 3, false);  // a draft
    for (const std::size_t s : {0U, 1U}) truncate(l, cache, static_cast<index_t>(s), done[in[s]]);
    feed(9, 5);
    permute(l, cache, std::vector<index_t>{1, 0});
    std::swap(in[0], in[1]);
    feed(1, 2);
    feed(60, 40);
    fill<local_attention<S>>(l, matrix<S>(x[in[0]].middleRows(done[in[0]], 2)), cache, {.slots = std::vector<index_t>{0}});
    done[in[0]] += 2;
    feed(1, 0);
    permute(l, cache, std::vector<index_t>{1, 1});  // beams
    in[0] = in[1];
    matrix<S> y(2, l.config.outputs), twice(2, 12);
    twice.row(0) = twice.row(1) = x[in[1]].row(done[in[1]]);
    decode<local_attention<S>>(l, twice, y, cache, {.rows = {offsets{0, 1, 2}}});
    for (const index_t i : {0, 1}) EXPECT_LT(difference(y.row(i), full[in[1]].row(done[in[1]])), tolerance);
  }
}

TEST(local_attention, a_refused_decode_changes_nothing) {
  const local_attention<double> l({.inputs = 8, .heads = 2, .chunk = 4, .causal = true}, rng_key{1});
  auto cache = l.make_cache(2, 4);
  const matrix<double> x = random(6, 8, 1);
  matrix<double> y(6, 8);
  const offsets rows{0, 1, 6};
  EXPECT_THROW(l.decode(x, y, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.fill(x, cache, {.rows = {rows}}), state_error);
  EXPECT_THROW(l.decode(x, y, cache, {.slots = std::vector<index_t>{2}}), index_error);
  EXPECT_THROW(l.truncate(cache, 0, 1), index_error);
  EXPECT_EQ(cache.length, (offsets{0, 0}));
  EXPECT_THROW((void)local_attention<double>({.inputs = 8, .heads = 2}, rng_key{1}).make_cache(1, 1), config_error);  // not causal
  // The last chunk sees the first one behind it, which is another chunk once there are more tokens.
  const local_attention<double> around({.inputs = 8, .heads = 2, .chunk = 4, .after = 1, .causal = true}, rng_key{1});
  EXPECT_THROW((void)around.make_cache(1, 1), config_error);
  const matrix<double> twenty = random<double>(20, 8, 3), sixteen = twenty.topRows(16);
  const matrix<double> longer = run(around, twenty, {}).topRows(16);
  EXPECT_GT(difference(run(around, sixteen, {}), longer), 1e-3);
  EXPECT_THROW((void)l.make_cache(1, std::numeric_limits<index_t>::max()), config_error);
}

// A window holds NaN: its queries may give NaN, nobody else does, and nobody at all if the mask hides it.
TEST(local_attention, nan_stays_within_the_windows_that_hold_it) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const bool masked : {false, true}) {
      const local_attention<float> l({.inputs = 8, .heads = 2, .chunk = 10, .causal = true}, rng_key{1});
      matrix<float> x = random<float>(100, 8, 1), y(100, 8), dx(100, 8);
      x(65, 3) = bad;
      bytes_mask mask(100, 1);
      mask[65] = 0;
      context ctx;
      if (masked) ctx.mask = mask;
      local_attention<float>::record r;
      auto g = make_gradient(l);
      l.forward(x, y, r, ctx);
      l.backward(x, r, random<float>(100, 8, 2), dx, g, ctx);
      EXPECT_TRUE(y.topRows(60).allFinite());
      EXPECT_TRUE(y.bottomRows(20).allFinite());
      EXPECT_EQ(std::isnan(y(65, 0)), !masked);
      EXPECT_EQ(y.allFinite(), masked);
    }
}

TEST(local_attention, a_decoded_row_takes_nothing_from_a_later_one) {
  const local_attention<double> l({.inputs = 8, .heads = 2, .chunk = 10, .causal = true}, rng_key{1});
  for (const index_t n : {2, 7}) expect_nothing_from_a_later_row(l, n);
}

TEST(local_attention, takes_no_rows_one_row_and_nothing_but_padding) {
  for (const bool causal : {false, true}) {
    const local_attention<float> l({.inputs = 8, .heads = 2, .chunk = 4, .causal = causal}, rng_key{1});
    for (const index_t n : {0, 1, 3, 5}) {
      const matrix<float> x = random<float>(n, 8, 1);
      matrix<float> y(n, 8), dx(n, 8);
      const bytes_mask none(static_cast<std::size_t>(n), 0);
      for (const bool masked : {false, true}) {
        context ctx;
        if (masked) ctx.mask = none;
        local_attention<float>::record r;
        auto g = make_gradient(l);
        l.forward(x, y, r, ctx);
        l.backward(x, r, y, dx, g, ctx);
        EXPECT_TRUE(y.allFinite() && dx.allFinite());
      }
    }
  }
}

TEST(local_attention, steady_state_allocates_nothing) {
  const local_attention<float> l({.inputs = 16, .heads = 2, .chunk = 16, .causal = true, .dropout = 0.1}, rng_key{1});
  const parallel_executor exec(2);
  workspace work(exec);
  const offsets rows{0, 150, 200};
  const context ctx{.exec = &exec, .work = &work, .rows = {rows}, .train = true};
  const matrix<float> x = random<float>(200, 16, 1);
  matrix<float> y(200, 16), dx(200, 16);
  local_attention<float>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  EXPECT_EQ(bytes(r), 200U * (4 * 16 + 2) * sizeof(float));
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

TEST(local_attention, refuses_what_does_not_fit) {
  const auto make = [](local_attention_config c) { return local_attention<float>(c, rng_key{}); };
  EXPECT_THROW(make({.inputs = 10, .heads = 3}), config_error);
  EXPECT_THROW(make({.inputs = 0}), config_error);
  EXPECT_THROW(make({.inputs = 8, .chunk = 0}), config_error);
  EXPECT_THROW(make({.inputs = 8, .before = -1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .after = -1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .dropout = 1.1}), config_error);
  EXPECT_THROW(make({.inputs = 8, .head_width = -1}), config_error);
  const local_attention<float> l({.inputs = 8, .heads = 2}, rng_key{1});
  matrix<float> x = random<float>(6, 8, 1), y(6, 8), narrow(6, 7), dx(6, 8);
  local_attention<float>::record r;
  auto g = make_gradient(l);
  EXPECT_THROW(l.forward(narrow, y, {}), shape_error);
  EXPECT_THROW(l.forward(x, narrow, {}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.mask = bytes_mask(5, 1)}), shape_error);
  EXPECT_THROW(l.forward(x, y, {.rows = {offsets{0, 5}}}), shape_error);
  EXPECT_THROW(l.backward(x, r, y, dx, g, {}), state_error);
  EXPECT_THROW(l.backward(x, r, y, narrow, g, {}), shape_error);
}

TEST(local_attention, cost_counts_projections_and_the_window) {
  const local_attention<float> l({.inputs = 8, .heads = 4, .head_width = 3, .chunk = 10, .before = 2, .causal = true}, rng_key{1});
  const double p = static_cast<double>(count_parameters(l));
  EXPECT_EQ(l.forward_cost(1000).parameters, p);
  EXPECT_EQ(l.forward_cost(1000).flops, 2 * p + 4 * 25 * 12);
  EXPECT_EQ(l.forward_cost(7).bytes, 4 * (p + 2 * 7 * 12));
}

}  // namespace local_attention_tests
