// What the decode cache of LSH attention does when it forgets, and directions that belong to a sequence.
#include <gtest/gtest.h>

#include "lithe/layers/attention/lsh_attention.hpp"
#include "support/matrices.hpp"

namespace lsh_caches_tests {

using namespace lithe;
using layer_type = lsh_attention<double>;
using offsets = std::vector<index_t>;

lsh_attention_config small(direction_sharing sharing = direction_sharing::head) {
  return {.inputs = 6,
          .heads = 2,
          .head_width = 5,
          .outputs = 4,
          .causal = true,
          .hash = {.rounds = 3, .buckets = {6}, .sharing = sharing},
          .chunk = 5};
}

/// The tokens of each bucket of each list, which stand there forwards and backwards.
std::vector<std::vector<position_t>> listed(const lsh_cache<double>& c) {
  std::vector<std::vector<position_t>> all;
  for (index_t row = 0; row < c.count.rows(); ++row)
    for (index_t b = 0; b < c.count.cols(); ++b) {
      const index_t n = c.count(row, b);
      std::vector<position_t> forwards, backwards;
      for (position_t t = n == 0 ? -1 : c.first(row, b); t >= 0; t = c.next(row, t)) forwards.push_back(t);
      for (position_t t = n == 0 ? -1 : c.last(row, b); t >= 0; t = c.previous(row, t))
        backwards.insert(backwards.begin(), t);
      EXPECT_EQ(static_cast<index_t>(forwards.size()), n);
      EXPECT_EQ(forwards, backwards);
      all.push_back(forwards);
    }
  return all;
}

TEST(lsh_cache, forgetting_leaves_the_lists_of_a_shorter_text) {
  const layer_type l(small(), rng_key{1});
  const matrix<double> x = random(60, 6, 2);
  for (const index_t n : {0, 1, 4, 5, 6, 11, 37, 59, 60}) {
    auto cut = l.make_cache(1, 80), fresh = l.make_cache(1, 80);
    l.fill(x, cut, {});
    l.truncate(cut, 0, n);
    if (n > 0) l.fill(x.topRows(n), fresh, {});
    EXPECT_EQ(listed(cut), listed(fresh)) << n;
    matrix<double> a(9, 4), b(9, 4);
    const matrix<double> more = random(9, 6, 3);
    l.decode(more, a, cut, {});
    l.decode(more, b, fresh, {});
    EXPECT_LT(difference(a, b), 1e-12) << n;
  }
}

TEST(lsh_cache, forgetting_looks_at_what_is_forgotten_alone) {
  const layer_type l(small(), rng_key{1});
  auto c = l.make_cache(1, 80);
  l.fill(random(60, 6, 2), c, {});
  const auto before = listed(c);
  c.ids.leftCols(50).setConstant(
      63);  // a bucket that is not there: reading one of these numbers is writing beyond the lists
  l.truncate(c, 0, 60);
  EXPECT_EQ(listed(c), before);
  l.truncate(c, 0, 50);
  index_t kept = 0;
  for (const auto& list : listed(c)) {
    for (const position_t t : list) EXPECT_LT(t, 50);
    kept += static_cast<index_t>(list.size());
  }
  EXPECT_EQ(kept, 50 * 6);  // in 2 heads of 3 rounds
}

TEST(lsh_cache, a_refused_cut_or_order_changes_nothing) {
  const layer_type l(small(), rng_key{1});
  auto c = l.make_cache(2, 80);
  l.fill(random(30, 6, 2), c, {});
  const auto before = listed(c);
  for (const index_t slot : {-1, 2}) EXPECT_THROW(l.truncate(c, slot, 0), index_error);
  for (const index_t n : {-1, 31}) EXPECT_THROW(l.truncate(c, 0, n), index_error);
  EXPECT_THROW(l.permute(c, offsets{0}), shape_error);
  for (const index_t from : {-1, 2}) EXPECT_THROW(l.permute(c, offsets{0, from}), index_error);
  EXPECT_EQ(listed(c), before);
  EXPECT_EQ(c.tokens.length, (offsets{30, 0}));
}

TEST(lsh_cache, a_slot_decodes_with_the_directions_of_its_sequence) {
  const layer_type l(small(direction_sharing::head_and_sequence), rng_key{1});
  const matrix<double> x = random(70, 6, 2);
  const offsets rows{0, 40, 70};
  const context ctx{.rows = {rows}};
  matrix<double> whole(70, 4), y(70, 4);
  l.forward(x, whole, ctx);
  auto c = l.make_cache(2, 80);
  l.decode(x, y, c, ctx);
  EXPECT_LT(difference(y, whole), 1e-12);
  // The sequences do not hash alike: with the directions of the first the second would be another.
  matrix<double> first(30, 4);
  l.forward(x.bottomRows(30), first, {});
  EXPECT_GT(difference(first, whole.bottomRows(30)), 1e-3);
}

TEST(lsh_cache, directions_move_with_their_text_and_begin_anew_with_the_slot) {
  const layer_type l(small(direction_sharing::head_and_sequence), rng_key{1});
  const matrix<double> x = random(60, 6, 2), more = random(12, 6, 3);
  matrix<double> straight(12, 4), moved(12, 4), prefill(60, 4), expected(60, 4), both(120, 4);
  const offsets one{1}, two{2}, rows{0, 60, 120};
  auto a = l.make_cache(3, 80), b = l.make_cache(3, 80);
  l.fill(x, a, {.slots = one});
  l.decode(more, straight, a, {.slots = one});
  l.fill(x, b, {.slots = one});
  l.permute(b, offsets{1, 0, 1});
  l.decode(more, moved, b, {.slots = two});
  EXPECT_LT(difference(moved, straight), 1e-12);
  l.truncate(b, 2, 0);  // now a text of slot 2, not of slot 1
  l.decode(x, prefill, b, {.slots = two});
  matrix<double> thrice(180, 6);
  thrice << x, x, x;
  matrix<double> all(180, 4);
  const offsets three{0, 60, 120, 180};
  l.forward(thrice, all, {.rows = {three}});
  EXPECT_LT(difference(prefill, all.bottomRows(60)), 1e-12);
  EXPECT_GT(difference(prefill, all.middleRows(60, 60)), 1e-3);
}

TEST(lsh_cache, holds_directions_for_each_slot_only_where_sequences_have_their_own) {
  const auto numbers = [](direction_sharing sharing) {
    return layer_type(small(sharing), rng_key{1}).make_cache(4, 8).hash.given.size();
  };
  EXPECT_EQ(numbers(direction_sharing::head), 2 * 3 * 3 * 5);  // heads, rounds, half of the buckets, features
  EXPECT_EQ(numbers(direction_sharing::head_and_sequence), 4 * numbers(direction_sharing::head));
}

}  // namespace lsh_caches_tests
