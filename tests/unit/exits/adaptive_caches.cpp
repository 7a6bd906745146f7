// What the caches of models with exits refuse, and blocks that keep windows.
#include <gtest/gtest.h>

#include "lithe/compose/beam_search.hpp"
#include "lithe/compose/decoder_block.hpp"
#include "lithe/compose/exit_decoder.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/attention/local_attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "support/matrices.hpp"

namespace adaptive_caches_tests {

using namespace lithe;
using offsets = std::vector<index_t>;
using prompts_type = std::vector<std::vector<token_t>>;

constexpr index_t features = 8, classes = 9;
template <class A>
using block_of = residual<sequential<layer_norm<double>, A>>;
using plain_block = block_of<attention<double>>;
using window_block = block_of<local_attention<double>>;

template <class Block>
adaptive_depth<Block> make_model(index_t blocks) {
  adaptive_depth<Block> m;
  for (index_t n = 0; n < blocks; ++n) {
    const rng_key key{static_cast<std::uint64_t>(n + 1)};
    if constexpr (std::same_as<Block, window_block>)
      m.stack.blocks.push_back(window_block(
          sequential(layer_norm<double>(features),
                     local_attention<double>({.inputs = features, .heads = 2, .chunk = 4, .causal = true}, key))));
    else
      m.stack.blocks.push_back(plain_block(sequential(
          layer_norm<double>(features), attention<double>({.inputs = features, .heads = 2, .causal = true}, key))));
  }
  m.answers = exit_classifiers<double>({.exits = blocks,
                                        .features = features,
                                        .classes = classes,
                                        .norm = exit_sharing::independent,
                                        .classifier = exit_sharing::independent},
                                       {50});
  m.halt = halting<double>(
      {.kind = exit_distribution::geometric, .exits = blocks, .features = features, .per_block = true}, {51});
  return m;
}
embedding<double> tokens(index_t positions = 0) {
  return embedding<double>({.tokens = classes, .features = features, .positions = positions, .deviation = 1}, {60});
}

TEST(adaptive_cache, refuses_slots_lengths_and_orders_that_are_not_there_and_changes_nothing) {
  const auto m = make_model<plain_block>(3);
  auto c = make_adaptive_cache(m, 2, 8);
  const offsets rows{0, 3, 5};
  prefill(m, matrix_view<const double>(random(5, features, 1)), nothing{}, c, {.rows = {rows}});
  const auto filled = c.filled;
  const auto refused = [&](auto&& call, const std::string& sentence) {
    try {
      call();
      ADD_FAILURE() << sentence;
    } catch (const std::exception& e) {
      EXPECT_EQ(e.what(), sentence);
    }
    EXPECT_EQ(c.length, (offsets{3, 2}));
    EXPECT_EQ(c.start, (offsets{3, 2}));
    EXPECT_EQ(c.filled, filled);
  };
  refused([&] { truncate(m, c, 2, 0); }, "adaptive_cache: expected a slot below 2, got 2");
  refused([&] { truncate(m, c, -1, 0); }, "adaptive_cache: expected a slot below 2, got -1");
  refused([&] { truncate(m, c, 0, 4); }, "adaptive_cache: expected to keep 0 to 3 tokens of slot 0, got 4");
  refused([&] { truncate(m, c, 0, -1); }, "adaptive_cache: expected to keep 0 to 3 tokens of slot 0, got -1");
  refused([&] { permute(m, c, offsets{0}); }, "adaptive_cache: expected an order of 2 slots, got 1");
  refused([&] { permute(m, c, offsets{0, 2}); }, "adaptive_cache: expected a slot below 2, got 2");
  refused([&] { permute(m, c, offsets{-1, 0}); }, "adaptive_cache: expected a slot below 2, got -1");
  const auto other = make_model<plain_block>(4);
  const std::string another =
      "adaptive_cache: the cache is of another model: expected 4 exits and states of 8 features, got 3 and 8";
  refused([&] { truncate(other, c, 0, 0); }, another);
  refused([&] { permute(other, c, offsets{0, 1}); }, another);
  const matrix<double> x = random(2, features, 1);
  matrix<double> logits(2, classes);
  std::vector<std::int32_t> exits(2);
  refused(
      [&] {
        adaptive_step(other, matrix_view<const double>(x), nothing{}, matrix_view<double>(logits), exits, c,
                      exit_rule{}, {});
      },
      another);
  refused([&] { prefill(other, matrix_view<const double>(x), nothing{}, c, {}); }, another);
  const offsets one_slot{0}, both{0, 1, 2};
  refused([&] { prefill(m, matrix_view<const double>(x), nothing{}, c, {.rows = {both}, .slots = one_slot}); },
          "adaptive_depth: expected a slot for each of 2 sequences, got 1");
}

TEST(adaptive_cache, of_an_exit_decoder_keeps_tokens_and_states_together_when_it_refuses) {
  const auto m = make_model<window_block>(3);
  const auto words = tokens(2000);
  const exit_decoder decoder(words, m);
  auto c = decoder.make_cache(1, 2000);
  std::vector<token_t> ids;
  for (token_t t = 0; t < 1000; ++t) ids.push_back(t * t % classes);
  decoder.fill(ids, c, {});
  for (const index_t slot : {-1, 1}) EXPECT_THROW(decoder.truncate(c, slot, 0), index_error);
  const offsets two{0, 1, 2};
  matrix<double> logits(2, classes);
  EXPECT_THROW(decoder.decode(std::vector<token_t>{1, 2}, logits, c, {.rows = {two}}), shape_error);
  for (const index_t n : {-1, 5, 1001}) EXPECT_THROW(decoder.truncate(c, 0, n), index_error);
  EXPECT_EQ(c.tokens.length, (offsets{1000}));
  EXPECT_EQ(c.states.length, (offsets{1000}));
  decoder.truncate(c, 0, 1000 - placed_cache::reserve);
  EXPECT_EQ(c.tokens.length, c.states.length);
  decoder.truncate(c, 0, 0);
  EXPECT_EQ(c.tokens.length, (offsets{0}));
}

TEST(adaptive_cache, permutes_states_that_upper_blocks_have_not_seen) {
  // Tokens leave at exit 1, then the copies go through all blocks: these make keys and values from the states of the
  // copied slot.
  const auto m = make_model<plain_block>(3);
  const auto run = [&](bool moved) {
    auto c = make_adaptive_cache(m, 3, 12);
    std::vector<std::int32_t> exits(1);
    matrix<double> logits(1, classes), x = random(9, features, 1);
    const auto step = [&](index_t slot, index_t t, std::int32_t exit) {
      const offsets slots{slot};
      adaptive_step(m, matrix_view<const double>(x).slice_rows(t, 1), nothing{}, matrix_view<double>(logits), exits, c,
                    exit_rule{.exits = {exit}}, {.slots = slots});
    };
    for (index_t t = 0; t < 8; ++t) step(1, t, 1);
    if (moved) {
      permute(m, c, offsets{1, 0, 1});
      permute(m, c, offsets{2, 0, 2});
      EXPECT_EQ(c.length, (offsets{8, 8, 8}));
    }
    step(moved ? 2 : 1, 8, 3);
    return logits;
  };
  EXPECT_EQ(run(true), run(false));
}

TEST(exits_over_windows, decode_drafts_and_search_as_with_caches_that_keep_all) {
  // 400 tokens go far beyond a place of 2 (8 + 64) rows; the full pass tells what comes next.
  const auto m = make_model<window_block>(3);
  const auto words = tokens();
  const exit_decoder decoder(words, m);
  const prompts_type prompts{{1, 2, 3}, {4}};
  const generator_config c{.how = {.temperature = 0}, .most = 400};
  const auto plain = generate(decoder, prompts, c);
  for (std::size_t i = 0; i < 2; ++i) {
    auto text = prompts[i];
    text.insert(text.end(), plain.tokens[i].begin(), plain.tokens[i].end() - 1);
    const auto T = static_cast<index_t>(text.size());
    matrix<double> x(T, features), logits(3 * T, classes);
    words.forward(text, x, {});
    m.forward(x, nothing{}, logits, {});
    for (index_t t = 0; t < 400; ++t) {
      index_t best = 0;
      logits.row(3 * T - 400 + t).maxCoeff(&best);
      ASSERT_EQ(plain.tokens[i][static_cast<std::size_t>(t)], best) << t;
    }
  }
  for (const index_t drafts : {1, 7, 63, 200}) {
    generator_config d = c;
    d.drafts = drafts;
    EXPECT_EQ(generate(decoder, prompts, d).tokens, plain.tokens) << drafts;
  }
  EXPECT_EQ(generate_by_beams(decoder, prompts, 1, c).tokens, plain.tokens);
  EXPECT_GE(generate_by_beams(decoder, prompts, 3, {.most = 200}).scores[0],
            generate_by_beams(decoder, prompts, 1, {.most = 200}).scores[0] - 0.05);
}

TEST(exits_over_windows, a_call_that_fails_goes_back_as_far_as_the_window_is_there_or_empties_the_slot) {
  using self_part = residual<local_attention<double>>;
  using feed_part = residual<feed_forward<double>>;
  adaptive_depth<decoder_block<self_part, feed_part>> m;
  for (std::uint64_t n = 0; n < 2; ++n)
    m.stack.blocks.push_back(
        {self_part(local_attention<double>({.inputs = features, .heads = 2, .chunk = 4, .causal = true}, rng_key{n})),
         layer_norm<double>(features),
         cross_attention<double>({.inputs = features, .memory_inputs = 5, .heads = 2}, rng_key{n + 9}),
         dropout<double>(), feed_part(feed_forward<double>({features, 16, activation::gelu}, rng_key{n + 20}))});
  m.answers = exit_classifiers<double>({.exits = 2, .features = features, .classes = classes}, {50});
  m.halt = halting<double>({.kind = exit_distribution::geometric, .exits = 2, .features = features, .per_block = true},
                           {51});
  const matrix<double> source = random(6, 5, 1), other = random(4, 5, 1), x = random(1200, features, 2);
  const offsets zero{0};
  const memory_view<double> memory{source, {}}, wrong{other, {}};
  const auto begin = [&] {
    auto c = make_adaptive_cache(m, 1, 2000);
    start_memory(m, memory, zero, c);
    prefill(m, matrix_view<const double>(x).slice_rows(0, 600), memory, c, {});
    return c;
  };
  auto straight = begin();
  matrix<double> expected(20, features), y(20, features);
  const auto next = [&](auto& c, matrix<double>& to) {
    decode_blocks(m, 1, 2, matrix_view<const double>(x).slice_rows(600, 20), memory, matrix_view<double>(to), c, {});
  };
  next(straight, expected);
  for (const index_t n : {1, 40, 500}) {
    auto c = begin();
    // The self-attention has taken the rows in when cross-attention refuses the memory.
    EXPECT_THROW(prefill(m, matrix_view<const double>(x).slice_rows(600, n), wrong, c, {}), state_error);
    const bool kept = n <= placed_cache::reserve;
    EXPECT_EQ(c.length, (offsets{kept ? 600 : 0}));
    EXPECT_EQ(c.blocks[0].self.length, c.length);
    if (!kept) prefill(m, matrix_view<const double>(x).slice_rows(0, 600), memory, c, {});
    next(c, y);
    EXPECT_LT(difference(y, expected), 1e-12);
  }
}

TEST(exits_of_bad_logits, one_nan_is_left_out_and_a_row_without_a_number_throws_at_any_exit) {
  const auto good = make_model<plain_block>(3);
  const auto words = tokens();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const std::int32_t exit : {1, 3}) {
    const exit_rule rule{.exits = {exit}};
    auto one = good, all = good;
    one.answers.classifiers[static_cast<std::size_t>(exit - 1)].weight.row(4).setConstant(nan);
    all.answers.classifiers[static_cast<std::size_t>(exit - 1)].weight.setConstant(nan);
    const generator_config c{.how = {.temperature = 0}, .most = 6};
    const prompts_type prompts{{1}, {2}};
    const exit_decoder decoder(words, one, {}, rule);
    std::vector<std::vector<token_t>> best(2);
    const auto out = generate(decoder, prompts, c, {}, {}, [&](index_t i, std::span<const double> row) {
      EXPECT_TRUE(std::isnan(row[4]));
      token_t most = 0;
      for (token_t v = 1; v < classes; ++v)
        if (row[static_cast<std::size_t>(v)] > row[static_cast<std::size_t>(most)]) most = v;
      best[static_cast<std::size_t>(i)].push_back(most);
    });
    EXPECT_EQ(out.tokens, best);
    EXPECT_EQ(generate_by_beams(decoder, prompts, 1, c).tokens, best);
    for (const auto& text : generate_by_beams(decoder, prompts, 4, c).tokens)
      EXPECT_EQ(std::count(text.begin(), text.end(), 4), 0);
    const exit_decoder broken(words, all, {}, rule);
    EXPECT_THROW((void)generate(broken, prompts, c), std::runtime_error);
    auto cache = broken.make_cache(1, 4);
    matrix<double> logits(1, classes);
    EXPECT_THROW(broken.decode(std::vector<token_t>{1}, logits, cache, {}), std::runtime_error);
    EXPECT_EQ(cache.tokens.length, (offsets{0}));
    EXPECT_EQ(cache.states.length, (offsets{0}));
  }
}

TEST(exits_of_positions, texts_that_outgrow_them_go_on_from_their_last_half) {
  const auto m = make_model<plain_block>(3);
  const auto words = tokens(16);
  const exit_decoder decoder(words, m);
  EXPECT_EQ(longest_sequence(decoder), 16);
  const prompts_type prompts{{1, 2, 3}, {4}};
  const generator_config within{.capacity = 16, .how = {.temperature = 0.8}, .most = 40},
      all{.how = {.temperature = 0.8}, .most = 40};
  EXPECT_EQ(generate(decoder, prompts, all, rng_key{1}).tokens, generate(decoder, prompts, within, rng_key{1}).tokens);
  EXPECT_EQ(generate_by_beams(decoder, prompts, 2, all).tokens, generate_by_beams(decoder, prompts, 2, within).tokens);
}

TEST(cross_cache, refuses_orders_and_slots_that_are_not_there_and_caches_of_another_layer) {
  const cross_attention<double> l({.inputs = 8, .memory_inputs = 5, .heads = 2}, rng_key{1}),
      wide({.inputs = 64, .memory_inputs = 5, .heads = 2}, rng_key{1});
  const matrix<double> source = random(6, 5, 1), x = random(2, 8, 2), wide_x = random(2, 64, 2);
  const offsets sources{0, 4, 6}, of_slots{0, 1}, rows{0, 1, 2};
  const memory_view<double> memory{source, {sources}};
  auto c = make_cross_cache<double>(2);
  start_cross_cache(l, memory, of_slots, c);
  EXPECT_THROW(permute_cross_cache(c, offsets{0}), shape_error);
  for (const index_t from : {-1, 2}) EXPECT_THROW(permute_cross_cache(c, offsets{0, from}), index_error);
  EXPECT_EQ(c.source, (offsets{0, 1}));
  matrix<double> y(2, 8), wide_y(2, 64);
  const offsets beyond{0, 2}, one{0};
  EXPECT_THROW(cross_decode<double>(l, x, memory, y, c, {.rows = {rows}, .slots = beyond}), index_error);
  EXPECT_THROW(cross_decode<double>(l, x, memory, y, c, {.rows = {rows}, .slots = one}), shape_error);
  EXPECT_THROW(cross_decode<double>(wide, wide_x, memory, wide_y, c, {.rows = {rows}}), state_error);
  EXPECT_EQ(c.projected, 0);
  cross_decode<double>(l, x, memory, y, c, {.rows = {rows}});
  matrix<double> whole(2, 8);
  l.forward(x, memory, whole, {.rows = {rows}});
  EXPECT_LT(difference(y, whole), 1e-12);
}

}  // namespace adaptive_caches_tests
