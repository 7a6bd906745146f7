#include "lithe/compose/skip_stack.hpp"

#include <gtest/gtest.h>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/gradient_check.hpp"

namespace skip_stack_tests {

using namespace lithe;
using mix = residual<sequential<rms_norm<double>, attention<double>>>;
using block = tapped_block<mix, rms_norm<double>, feed_forward<double>>;
using model = skip_stack<block, ultra_mem<double>>;
using in_place = tapped_block<mix, rms_norm<double>, ultra_mem<double>>;
static_assert(tapped_layer<block> && cached_layer<block> && layer<model> && cached_layer<model> && tapped_layer<in_place>);

constexpr index_t D = 8, T = 10;

block make_block(std::uint64_t i) {
  const rng_key key{i};
  return {mix{sequential<rms_norm<double>, attention<double>>(rms_norm<double>(D), attention<double>({.inputs = D, .heads = 2, .head_width = 4, .causal = true}, key))},
          rms_norm<double>(D), feed_forward<double>({.features = D, .hidden = 12, .kind = activation::gelu}, key.child(1))};
}
ultra_mem<double> make_unit(std::uint64_t i, index_t conv = 0) {
  ultra_mem<double> u({.features = D, .heads = 1, .sub_keys = 8, .key_width = 4, .top_k = 3, .value_width = 6, .query_conv = conv}, rng_key{100 + i});
  for (index_t r = 0; r < u.expansion.values.rows(); ++r) u.expansion.values.view().row_array(r) *= 30;
  return u;
}
model make(const std::vector<skip_range>& ranges, index_t conv = 0) {
  model m;
  for (std::uint64_t i = 0; i < 4; ++i) m.blocks.push_back(make_block(i + 1));
  for (std::uint64_t i = 0; i < ranges.size(); ++i) m.units.push_back(make_unit(i, conv));
  m.ranges = ranges;
  return m;
}
matrix<double> input(index_t rows = T, std::uint64_t key = 2) {
  matrix<double> x(rows, D);
  fill_normal<double>(x, 1.0, rng_key{key});
  return x;
}
context sequences(const std::vector<index_t>& offsets) {
  context ctx;
  ctx.rows = {offsets};
  return ctx;
}
const std::vector<index_t> offsets{0, 6, 6, T};

/// The definition, with every block's own tap.
matrix<double> reference(const model& m, const matrix<double>& x, const context& ctx) {
  matrix<double> state = x, next(x.rows(), D), tap(x.rows(), D), out(x.rows(), D);
  std::vector<matrix<double>> taps;
  for (std::size_t i = 0; i < m.blocks.size(); ++i) {
    m.blocks[i].forward_tapped(state, next, tap, ctx);
    taps.push_back(tap);
    for (std::size_t u = 0; u < m.units.size(); ++u)
      if (m.ranges[u].join == static_cast<index_t>(i)) {
        m.units[u].forward(taps[static_cast<std::size_t>(m.ranges[u].read)], out, ctx);
        next += out;
      }
    state = next;
  }
  return state;
}

TEST(skip_stack, units_read_at_one_block_and_join_after_another) {
  const auto ctx = sequences(offsets);
  const auto x = input();
  for (const auto& ranges : std::vector<std::vector<skip_range>>{{}, {{1, 3}}, {{0, 0}}, {{0, 2}, {1, 3}}, {{0, 3}, {1, 2}, {2, 2}}, {{0, 0}, {1, 1}, {2, 2}, {3, 3}}}) {
    const auto m = make(ranges);
    matrix<double> y(T, D), z(T, D);
    record_of<model> r;
    m.forward(x, y, ctx);
    m.forward(x, z, r, ctx);
    EXPECT_LT((y - reference(m, x, ctx)).cwiseAbs().maxCoeff(), 1e-12);
    EXPECT_LT((y - z).cwiseAbs().maxCoeff(), 1e-13);
    matrix<double> plain(T, D);
    make({}).forward(x, plain, ctx);
    EXPECT_EQ((y - plain).norm() > 1e-3, !ranges.empty());
  }
}

TEST(skip_stack, blocks_before_the_join_see_no_unit) {
  const auto with = make({{1, 3}}), without = make({});
  const auto x = input();
  matrix<double> y(T, D);
  record_of<model> a, b;
  with.forward(x, y, a, {});
  without.forward(x, y, b, {});
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(a.between[i], b.between[i]);
}

TEST(skip_stack, gradients) {
  const auto ctx = sequences(offsets);
  for (const auto& ranges : std::vector<std::vector<skip_range>>{{{1, 3}}, {{0, 2}, {1, 3}}, {{2, 2}}}) {
    const auto report = gradient_check(make(ranges, 3), input(), ctx, {.entries = 12});
    EXPECT_LT(report.worst(), 1e-5) << report.where();  // central differences with a step of 1e-5, through four blocks
    for (const auto& t : report.tensors)  // attention's key bias has none, softmax takes it out
      EXPECT_TRUE(t.largest > 1e-4 || t.name.ends_with("key.bias")) << t.name;
  }
}

TEST(skip_stack, a_memory_stands_in_place_of_the_feed_forward) {
  const in_place b{make_block(1).mix, rms_norm<double>(D), make_unit(1)};
  const auto report = gradient_check(b, input(), sequences(offsets));
  EXPECT_LT(report.worst(), 1e-5) << report.where();
}

TEST(skip_stack, concurrent_lookups_give_the_same_bits) {
  auto m = make({{0, 2}, {1, 3}, {2, 2}});
  const auto x = input();
  const auto run = [&](index_t workers, bool concurrent) {
    m.concurrent = concurrent;
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx = sequences(offsets);
    ctx.exec = &exec;
    ctx.work = &work;
    matrix<double> y(T, D), z(T, D), dx(T, D);
    record_of<model> r;
    auto g = make_gradient(m);
    m.forward(x, z, ctx);
    m.forward(x, y, r, ctx);
    m.backward(x, r, input(T, 3), dx, g, ctx);
    std::vector<double> all(y.data(), y.data() + y.size());
    all.insert(all.end(), z.data(), z.data() + z.size());
    all.insert(all.end(), dx.data(), dx.data() + dx.size());
    return all;
  };
  const auto one = run(1, false);
  for (const index_t workers : {1, 2, 7}) EXPECT_EQ(one, run(workers, true)) << workers;
  EXPECT_EQ(one, run(2, false));
}

TEST(skip_stack, decodes_what_the_full_pass_gives) {
  const auto m = make({{0, 2}, {1, 3}}, 3);
  const auto x = input(7);
  matrix<double> whole(7, D), y(1, D), prefill(3, D);
  m.forward(x, whole, {});
  auto cache = m.make_cache(1, 8);
  const matrix<double> first = x.topRows(3);
  m.decode(first, prefill, cache, {});
  EXPECT_LT((prefill - whole.topRows(3)).cwiseAbs().maxCoeff(), 1e-12);
  const auto step = [&](index_t t) {
    const matrix<double> row = x.row(t);
    m.decode(row, y, cache, {});
    EXPECT_LT((y - whole.row(t)).cwiseAbs().maxCoeff(), 1e-12) << t;
  };
  step(3);
  step(4);
  m.truncate(cache, 0, 4);
  const matrix<double> fifth = x.row(4);
  m.fill(fifth, cache, {});
  step(5);
  step(6);
}

TEST(skip_stack, replays_with_the_choices_kept) {
  const auto m = make({{0, 2}, {1, 3}});
  matrix<double> y(T, D), z(T, D);
  record_of<model> r;
  m.forward(input(), y, r, {});
  forget(r);
  context ctx;
  ctx.replay = true;
  m.forward(input(), z, r, ctx);
  EXPECT_LT((y - z).cwiseAbs().maxCoeff(), 1e-13);
}

TEST(skip_stack, no_token) {
  const auto m = make({{0, 2}});
  matrix<double> x(0, D), y(0, D), dx(0, D);
  record_of<model> r;
  auto g = make_gradient(m);
  m.forward(x, y, r, {});
  m.backward(x, r, y, dx, g, {});
  m.forward(x, y, {});
}

TEST(parse_skip_ranges, reads_published_paths) {
  using list = std::vector<skip_range>;
  EXPECT_EQ(parse_skip_ranges("3:7/8:12/13:17/18:22/23:27/28:32", 32, 1), (list{{2, 6}, {7, 11}, {12, 16}, {17, 21}, {22, 26}, {27, 31}}));
  EXPECT_EQ(parse_skip_ranges("2:5/6:9/10:13/14:17", 20, 0), (list{{2, 5}, {6, 9}, {10, 13}, {14, 17}}));
  EXPECT_EQ(parse_skip_ranges("0:2/1:3", 4, 0), (list{{0, 2}, {1, 3}}));  // overlapping
  EXPECT_EQ(parse_skip_ranges("full", 3, 0), (list{{0, 0}, {1, 1}, {2, 2}}));
}

TEST(parse_skip_ranges, refuses_anything_else_in_a_sentence) {
  const auto says = [](const char* text, index_t first, const std::string& sentence) {
    try {
      (void)parse_skip_ranges(text, 32, first);
      FAIL() << text;
    } catch (const config_error& e) {
      EXPECT_EQ(e.what(), "skip ranges: " + sentence);
    }
  };
  says("", 0, "expected read:join, two numbers, got '' in ''");
  says("3:7/", 0, "expected read:join, two numbers, got '' in '3:7/'");
  says("3-7", 0, "expected read:join, two numbers, got '3-7' in '3-7'");
  says("3:x", 0, "expected read:join, two numbers, got '3:x' in '3:x'");
  says("3:7:9", 0, "expected read:join, two numbers, got '3:7:9' in '3:7:9'");
  says(":7", 0, "expected read:join, two numbers, got ':7' in ':7'");
  says("99999999999999999999:7", 0, "expected read:join, two numbers, got '99999999999999999999:7' in '99999999999999999999:7'");
  says("28:32", 0, "block 32 of '28:32' is outside the blocks 0 .. 31");  // valid only counted from 1
  says("0:4", 1, "block 0 of '0:4' is outside the blocks 1 .. 32");
  says("-1:4", 0, "block -1 of '-1:4' is outside the blocks 0 .. 31");
  says("7:3", 0, "range 7:3 joins before the block that it reads");
  says("3:7/3:9", 0, "block 3 is read twice");
}

TEST(skip_stack, refuses_ranges_and_parts_that_do_not_fit) {
  auto m = make({{1, 3}});
  const auto x = input();
  matrix<double> y(T, D);
  m.ranges = {{1, 4}};
  EXPECT_THROW(m.forward(x, y, {}), config_error);
  m.ranges = {};
  EXPECT_THROW(m.forward(x, y, {}), config_error);
  m.ranges = {{1, 3}};
  m.units[0] = ultra_mem<double>({.features = D + 1, .sub_keys = 4, .key_width = 2, .top_k = 2, .value_width = 2}, rng_key{1});
  EXPECT_THROW(m.forward(x, y, {}), shape_error);
}

}  // namespace skip_stack_tests
