// Caches that keep the window of a text alone, and caches of another layer.
#include <gtest/gtest.h>

#include "lithe/compose/one_of.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/bucket_attention.hpp"
#include "lithe/layers/attention/collaborative_attention.hpp"
#include "lithe/layers/attention/local_attention.hpp"
#include "lithe/layers/attention/lsh_attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/memory/query_convolution.hpp"
#include "support/matrices.hpp"

namespace window_caches_tests {

using namespace lithe;
using offsets = std::vector<index_t>;

// Long before a slot of this capacity is full its window has gone by many times.
constexpr index_t capacity = 1000000, reserve = placed_cache::reserve;

/// Decodes a text in slot 1 of 2 and compares each row with that of the full pass.
template <class L>
struct text {
  using S = typename L::scalar;
  // DESIGN: a row's bits may depend on how many rows come together.
  static constexpr double tolerance = sizeof(S) == 8 ? 1e-12 : 1e-5;

  const L& l;
  matrix<S> x, full;
  cache_of<L> c;
  index_t done = 0, slot = 1;

  text(const L& layer, index_t n, index_t inputs) : l(layer), x(random<S>(n, inputs, 1)), c(l.make_cache(2, capacity)) {
    full.resize(n, l.output_shape(x).cols);
    l.forward(x, full, {});
  }
  void feed(index_t n, bool keep = true) {
    const offsets slots{slot};
    matrix<S> y(n, full.cols());
    l.decode(x.middleRows(done, n), y, c, {.slots = slots});
    ASSERT_LT(difference(y, full.middleRows(done, n)), tolerance) << done << " + " << n;
    if (keep) done += n;
  }
  void fill(index_t n) {
    const offsets slots{slot};
    l.fill(x.middleRows(done, n), c, {.slots = slots});
    done += n;
  }
  void draft(index_t n) {
    feed(n, false);
    l.truncate(c, slot, done);
  }
};

template <class L>
void decodes_like_the_full_pass(const L& l, index_t inputs) {
  const index_t room = l.make_cache(1, capacity).room, n = 3 * room + 2 * reserve + 200;
  text<L> t(l, n, inputs);
  for (int i = 0; i < 90; ++i) t.feed(1);
  while (t.done + reserve + 60 < n) {  // all kinds of pieces, wherever the place is full
    t.feed(1);
    t.draft(1 + t.done % reserve);
    t.feed(2 + t.done % 17);
    t.draft(reserve);
    t.fill(1 + t.done % 5);
    const offsets turned{1, 0};
    l.permute(t.c, turned);
    t.slot = 1 - t.slot;
  }
  EXPECT_LE(t.c.room, room);
}
template <class L>
void takes_prompts_of(const L& l, index_t inputs, const std::vector<index_t>& lengths) {
  const index_t room = l.make_cache(1, capacity).room;
  std::vector<index_t> all = lengths;
  for (const index_t n : {room - 1, room, room + 1, 2 * room + 1, 5 * room}) all.push_back(n);
  for (const index_t n : all)
    for (const bool filled : {false, true}) {
      text<L> t(l, n + 4, inputs);
      filled ? t.fill(n) : t.feed(n);
      t.feed(1);
      t.draft(2);
      t.feed(3);
    }
}

template <class S>
local_attention<S> windows(index_t chunk, index_t before, index_t heads = 2) {
  return {{.inputs = 12,
           .heads = heads,
           .head_width = 5,
           .outputs = 7,
           .chunk = chunk,
           .before = before,
           .causal = true,
           .circular = false},
          rng_key{1}};
}

TEST(window_caches, local_attention_decodes_like_the_full_pass_however_often_the_place_is_full) {
  for (const auto& [chunk, before] : {std::pair<index_t, index_t>{16, 1}, {7, 3}, {1, 0}, {1, 4}, {5, 0}, {40, 1}}) {
    decodes_like_the_full_pass(windows<double>(chunk, before), 12);
    decodes_like_the_full_pass(windows<float>(chunk, before), 12);
  }
  decodes_like_the_full_pass(
      local_attention<double>({.inputs = 12, .heads = 2, .chunk = 16, .causal = true}, rng_key{1}), 12);  // circular
}

TEST(window_caches, local_attention_takes_prompts_of_any_length) {
  for (const auto& [chunk, before] : {std::pair<index_t, index_t>{16, 1}, {7, 3}, {1, 0}})
    takes_prompts_of(windows<double>(chunk, before), 12,
                     {1, (before + 1) * chunk, std::max<index_t>(1, chunk - 1), chunk, chunk + 1, 2 * chunk + 1});
}

TEST(window_caches, the_query_convolution_decodes_like_the_full_pass) {
  for (const index_t taps : {1, 2, 5, 100}) {
    decodes_like_the_full_pass(query_convolution<double>(taps, 6, rng_key{1}), 6);
    takes_prompts_of(query_convolution<float>(taps, 6, rng_key{1}), 6,
                     {1, taps, std::max<index_t>(1, taps - 1), taps + 1, 2 * taps + 1});
  }
}

TEST(window_caches, their_memory_does_not_grow_with_the_capacity) {
  const auto l = windows<float>(64, 1);
  const auto small = l.make_cache(3, 1000), large = l.make_cache(3, capacity), tiny = l.make_cache(3, 10);
  EXPECT_EQ(small.keys.size(), large.keys.size());
  EXPECT_EQ(large.keys.rows(), 3 * 2 * 2 * (128 + reserve));  // slots, heads, twice what may have to stay
  EXPECT_EQ(large.keys.size(), large.values.size());
  EXPECT_EQ(tiny.keys.rows(), 3 * 2 * 10);
  const query_convolution<float> conv(5, 8, rng_key{1});
  EXPECT_EQ(conv.make_cache(2, capacity).rows.rows(), 2 * 2 * (5 + reserve));
  EXPECT_EQ(conv.make_cache(2, 20).rows.rows(), 2 * 20);
}

template <class L>
void refuses_to_go_back_too_far(const L& l, index_t inputs) {
  text<L> t(l, 1500, inputs);
  t.feed(1000);
  const index_t least = l.least_length(t.c, 1);
  EXPECT_GT(least, 0);
  EXPECT_LE(least, 1000 - reserve);
  for (const index_t n : {index_t{1}, least - 1, index_t{1001}, index_t{-1}})
    EXPECT_THROW(l.truncate(t.c, 1, n), index_error) << n;
  try {
    l.truncate(t.c, 1, 1);
    FAIL();
  } catch (const index_error& e) {
    EXPECT_NE(std::string(e.what()).find(concat("keeps its window of the last tokens: expected to keep 0 or ", least,
                                                " to 1000 tokens, got 1")),
              std::string::npos)
        << e.what();
  }
  EXPECT_THROW(l.truncate(t.c, 2, 0), index_error);
  EXPECT_THROW((void)l.least_length(t.c, -1), index_error);
  t.feed(3);  // nothing has changed
  l.truncate(t.c, 1, least);
  t.done = least;
  for (int i = 0; i < 100; ++i) t.feed(1);
  l.truncate(t.c, 1, 0);
  t.done = 0;
  t.feed(700);
}
TEST(window_caches, going_back_further_than_what_is_kept_is_refused) {
  refuses_to_go_back_too_far(windows<double>(16, 1), 12);
  refuses_to_go_back_too_far(windows<double>(1, 0), 12);
  refuses_to_go_back_too_far(query_convolution<double>(5, 6, rng_key{1}), 6);
}

TEST(window_caches, copies_of_a_slot_go_on_by_themselves) {
  const auto l = windows<double>(7, 2);
  text<local_attention<double>> a(l, 900, 12);
  a.feed(600);
  const offsets twice{1, 1};
  l.permute(a.c, twice);
  a.draft(20);
  for (int i = 0; i < 250; ++i) a.feed(1);
  a.slot = 0;
  a.done = 600;
  for (int i = 0; i < 250; ++i) a.feed(1);
}

TEST(window_caches, a_refused_cut_changes_no_part_of_a_model) {
  const sequential model(
      embedding<double>({.tokens = 9, .features = 12, .positions = 2000, .deviation = 1}, rng_key{1}),
      stack<residual<local_attention<double>>>{
          {residual(local_attention<double>({.inputs = 12, .heads = 2, .chunk = 8, .causal = true}, rng_key{2})),
           residual(local_attention<double>({.inputs = 12, .heads = 2, .chunk = 32, .causal = true}, rng_key{3}))}},
      linear<double>({12, 9}, rng_key{4}));
  std::vector<token_t> ids;
  for (token_t t = 0; t < 1000; ++t) ids.push_back(t * t % 9);
  const std::span<const token_t> all(ids);
  matrix<double> full(1000, 9), y(10, 9);
  model.forward(all, full, {});
  auto c = model.make_cache(1, 2000);
  model.fill(all.first(900), c, {});
  const index_t least = model.least_length(c, 0);
  EXPECT_GT(least, 0);
  EXPECT_THROW(model.truncate(c, 0, 20), index_error);
  EXPECT_THROW(model.truncate(c, 0, least - 1), index_error);
  EXPECT_EQ(std::get<0>(c).length, (offsets{900}));
  model.decode(all.subspan(900, 10), y, c, {});
  EXPECT_LT(difference(y, full.middleRows(900, 10)), 1e-12);
  model.truncate(c, 0, least);
  model.decode(all.subspan(static_cast<std::size_t>(least), 10), y, c, {});
  EXPECT_LT(difference(y, full.middleRows(least, 10)), 1e-12);
}

// --- caches of another layer --------------------------------------------------------------------------------

template <class L>
void refuses_caches_of(const L& l, const std::vector<L>& others, index_t inputs) {
  const matrix<double> x = random(2, inputs, 1);
  matrix<double> y(2, l.output_shape(x).cols);
  for (const L& other : others) {
    auto c = other.make_cache(1, 8);
    const auto refused = [&](auto&& call) {
      try {
        call();
        ADD_FAILURE() << "a cache of another layer was taken";
      } catch (const state_error& e) {
        EXPECT_NE(std::string(e.what()).find("the cache is of another layer: expected"), std::string::npos) << e.what();
      }
    };
    refused([&] { l.decode(x, y, c, {}); });
    refused([&] { l.fill(x, c, {}); });
  }
  auto own = l.make_cache(1, 8);
  l.decode(x, y, own, {});
}
TEST(caches_of_another_layer, are_refused) {
  const auto plain = [](index_t heads, index_t width, index_t shared) {
    return attention<double>(
        {.inputs = 12, .heads = heads, .head_width = width, .causal = true, .key_value_heads = shared}, rng_key{1});
  };
  refuses_caches_of<attention<double>>(plain(4, 3, 4), {plain(2, 3, 2), plain(4, 5, 4), plain(4, 3, 1)}, 12);
  refuses_caches_of<local_attention<double>>(
      windows<double>(8, 1), {windows<double>(8, 1, 1), windows<double>(8, 2), windows<double>(4, 1)}, 12);
  const auto hashed = [](index_t heads, index_t rounds, direction_sharing sharing) {
    return lsh_attention<double>(
        {.inputs = 12, .heads = heads, .causal = true, .hash = {.rounds = rounds, .buckets = {4}, .sharing = sharing}},
        rng_key{1});
  };
  refuses_caches_of<lsh_attention<double>>(
      hashed(2, 2, direction_sharing::head),
      {hashed(3, 2, direction_sharing::head), hashed(2, 3, direction_sharing::head),
       hashed(2, 2, direction_sharing::head_and_sequence)},
      12);
  const auto bucketed = [](index_t heads, index_t rounds, index_t buckets) {
    return bucket_attention<double>(
        {.inputs = 12, .heads = heads, .causal = true, .hash = {.rounds = rounds, .buckets = {buckets}}}, rng_key{1});
  };
  refuses_caches_of<bucket_attention<double>>(
      bucketed(2, 2, 4), {bucketed(3, 2, 4), bucketed(2, 3, 4), bucketed(2, 2, 8), bucketed(4, 1, 4)}, 12);
  const auto shared = [](index_t heads, index_t key, index_t value) {
    return collaborative_attention<double>(
        {.inputs = 12, .heads = heads, .key_width = key, .value_width = value, .causal = true}, rng_key{1});
  };
  refuses_caches_of<collaborative_attention<double>>(shared(2, 6, 12),
                                                     {shared(3, 6, 12), shared(2, 5, 12), shared(2, 6, 8)}, 12);
  const auto taps = [](index_t width, index_t features) {
    return query_convolution<double>(width, features, rng_key{1});
  };
  refuses_caches_of<query_convolution<double>>(taps(4, 12), {taps(3, 12), taps(4, 11), taps(0, 12)}, 12);
}

TEST(caches_of_another_layer, do_not_move_what_they_lack) {
  // permute and truncate walk rows by the layer's own sizes.
  const auto make = [](index_t heads) {
    return bucket_attention<double>(
        {.inputs = 12, .heads = heads, .causal = true, .hash = {.rounds = 2, .buckets = {4}}}, rng_key{1});
  };
  auto c = make(2).make_cache(2, 8);
  EXPECT_THROW(make(4).truncate(c, 1, 0), state_error);
  EXPECT_THROW(make(4).permute(c, offsets{0, 0}), state_error);
  const collaborative_attention<double> wide({.inputs = 12, .heads = 4, .causal = true}, rng_key{1}),
      narrow({.inputs = 12, .heads = 2, .causal = true}, rng_key{1});
  auto d = narrow.make_cache(2, 8);
  EXPECT_THROW(wide.permute(d, offsets{0, 0}), state_error);
}

TEST(caches_of_another_layer, of_another_number_of_blocks_are_refused) {
  using part = residual<attention<double>>;
  const part one(attention<double>({.inputs = 8, .heads = 2, .causal = true}, rng_key{1}));
  const stack<part> two{{one, one}}, three{{one, one, one}};
  auto c = two.make_cache(1, 4);
  const matrix<double> x = random(1, 8, 1);
  matrix<double> y(1, 8);
  EXPECT_THROW(three.decode(x, y, c, {}), state_error);
  EXPECT_THROW(three.fill(x, c, {}), state_error);
  EXPECT_THROW(three.truncate(c, 0, 0), state_error);
  EXPECT_THROW(three.permute(c, offsets{0}), state_error);
  EXPECT_EQ(c[0].length, (offsets{0}));
}

TEST(caches_of_another_layer, of_another_kind_are_refused) {
  using either = one_of<attention<double>, local_attention<double>>;
  const either plain{attention<double>({.inputs = 8, .heads = 2, .causal = true}, rng_key{1})};
  const either local{local_attention<double>({.inputs = 8, .heads = 2, .causal = true}, rng_key{1})};
  auto c = plain.make_cache(1, 4);
  const matrix<double> x = random(1, 8, 1);
  matrix<double> y(1, 8);
  EXPECT_THROW(local.decode(x, y, c, {}), state_error);
  EXPECT_THROW(local.fill(x, c, {}), state_error);
  EXPECT_THROW(local.truncate(c, 0, 0), state_error);
  EXPECT_THROW(local.permute(c, offsets{0}), state_error);
}

}  // namespace window_caches_tests
