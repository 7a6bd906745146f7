#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "lithe/compose/beam_search.hpp"
#include "lithe/compose/decoder_block.hpp"
#include "lithe/compose/decoder_flops.hpp"
#include "lithe/compose/exit_decoder.hpp"
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "lithe/layers/halting_sequence.hpp"
#include "lithe/layers/parameters.hpp"
#include "support/malloc_count.hpp"

namespace adaptive_decoding_tests {

using namespace lithe;

constexpr index_t features = 8, classes = 9, depth = 4;
using attention_part = residual<sequential<layer_norm<double>, attention<double>>>;
using feed_part = residual<sequential<layer_norm<double>, feed_forward<double>>>;
using block = sequential<attention_part, feed_part>;
using cross_block = decoder_block<attention_part, feed_part>;
using model_type = adaptive_depth<block>;

// Decoding groups the same sums otherwise than the full pass, one row otherwise than several: equal to 1e-12 in double.
const double grouping = 1e-12;

matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}
template <class B = block>
adaptive_depth<B> make_model(index_t blocks = depth, exit_distribution kind = exit_distribution::geometric, bool tied = false) {
  adaptive_depth<B> m;
  for (index_t n = 0; n < (tied ? 1 : blocks); ++n) {
    const rng_key key{static_cast<std::uint64_t>(n + 1)};
    attention_part look{sequential(layer_norm<double>(features),
                                   attention<double>({.inputs = features, .heads = 2, .causal = true, .rotary_width = 4}, key.child(0)))};
    feed_part feed{sequential(layer_norm<double>(features), feed_forward<double>({features, 16, activation::gelu}, key.child(1)))};
    if constexpr (std::same_as<B, cross_block>)
      m.stack.blocks.push_back({look, layer_norm<double>(features),
                                cross_attention<double>({.inputs = features, .memory_inputs = 5, .heads = 2}, key.child(2)), dropout<double>(),
                                feed});
    else
      m.stack.blocks.push_back(B(look, feed));
  }
  m.stack.depth = tied ? blocks : 0;
  m.answers = exit_classifiers<double>(
      {.exits = blocks, .features = features, .classes = classes, .norm = exit_sharing::independent, .classifier = exit_sharing::independent}, {50});
  m.halt = halting<double>({.kind = kind, .exits = blocks, .features = features, .per_block = kind == exit_distribution::geometric}, {51});
  m.meta = halting_head<double>({.features = features}, {52});
  for (auto& c : m.answers.classifiers) c.weight *= 3;  // answers differ enough between blocks
  return m;
}
const embedding<double>& tokens() {
  static const embedding<double> e({.tokens = classes, .features = features, .deviation = 1}, {60});
  return e;
}
using prompts_type = std::vector<std::vector<token_t>>;
const prompts_type starts{{0}, {3}, {5}, {7}, {8}};
exit_rule rule(exit_confidence kind, double threshold) { return {.kind = kind, .thresholds = {threshold}}; }
/// A generation and the logits that its tokens were drawn from: row i * steps + t for token t of text i.
struct decoded : generation {
  matrix<double> logits;
};
generator_config greedy(index_t steps, token_t end = -1) {
  generator_config c{.how = {.temperature = 0}, .most = steps};
  if (end >= 0) c.stop = {end};
  return c;
}
generator_config drafting(index_t exit, index_t drafts, index_t steps, token_t end = -1) {
  generator_config c = greedy(steps, end);
  c.draft_exit = exit;
  c.drafts = drafts;
  return c;
}
template <class B = block>
decoded run(const adaptive_depth<B>& m, const exit_rule& r, const prompts_type& p = starts, index_t steps = 12, token_t end = -1,
            const detail::memory_of<B>& memory = {}, const context& ctx = {}) {
  decoded out;
  out.logits.setZero(static_cast<index_t>(p.size()) * steps, classes);
  std::vector<index_t> done(p.size(), 0);
  static_cast<generation&>(out) =
      generate(exit_decoder(tokens(), m, memory, r), p, greedy(steps, end), {}, ctx, [&](index_t i, std::span<const double> row) {
        std::copy(row.begin(), row.end(), out.logits.row(i * steps + done[static_cast<std::size_t>(i)]++).data());
      });
  return out;
}
template <class B>
std::set<std::int32_t> depths(const B& out) {
  std::set<std::int32_t> seen;
  for (const auto& row : out.exits) seen.insert(row.begin(), row.end());
  return seen;
}
/// The model made of the first n blocks.
model_type truncated(const model_type& m, index_t n) {
  model_type t = m;
  t.stack.blocks.resize(static_cast<std::size_t>(n));
  t.answers.exits = t.halt.exits = n;
  t.answers.norms.resize(static_cast<std::size_t>(n));
  t.answers.classifiers.resize(static_cast<std::size_t>(n));
  return t;
}
const std::pair<exit_confidence, double> every_rule[] = {
    {exit_confidence::geometric, 0.55}, {exit_confidence::max_prob, 0.7}, {exit_confidence::softmax_diff, 0.5}, {exit_confidence::entropy, 0.5},
    {exit_confidence::state, 0.96},     {exit_confidence::meta, 0.5},     {exit_confidence::multinomial, 0.5}};

TEST(decoding, lazy_eager_batches_and_single_rows_agree) {
  for (const auto& [kind, threshold] : every_rule) {
    const auto m = make_model(depth, kind == exit_confidence::multinomial ? exit_distribution::multinomial : exit_distribution::geometric);
    exit_rule lazy = rule(kind, threshold), eager = lazy;
    eager.eager = true;
    const auto a = run(m, lazy), b = run(m, eager);
    EXPECT_GT(depths(a).size(), 1U) << static_cast<int>(kind);  // or nothing is shown
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.exits, b.exits);
    EXPECT_LT((a.logits - b.logits).cwiseAbs().maxCoeff(), grouping);
    EXPECT_LE(a.projected, b.projected);
    EXPECT_EQ(b.projected, depth * 5 * 12);
    for (std::size_t i = 0; i < starts.size(); ++i) {
      const auto one = run(m, lazy, {starts[i]});
      EXPECT_EQ(one.tokens[0], a.tokens[i]);
      EXPECT_EQ(one.exits[0], a.exits[i]);
      EXPECT_LT((one.logits - a.logits.middleRows(12 * static_cast<index_t>(i), 12)).cwiseAbs().maxCoeff(), grouping);
    }
  }
}

TEST(decoding, is_what_mixed_training_computes) {
  // All positions at once, with the exits and tokens that decoding found.
  const auto m = make_model();
  const auto out = run(m, rule(exit_confidence::geometric, 0.55), {{3}});
  std::vector<token_t> fed{3};
  fed.insert(fed.end(), out.tokens[0].begin(), out.tokens[0].end() - 1);
  matrix<double> x(12, features), states(depth * 12, features), logits(12, classes);
  tokens().forward(fed, x, {});
  record_of<adaptive_stack<block>> r;
  record_of<exit_classifiers<double>> s;
  m.stack.forward_mixed(x, {}, out.exits[0], states, r, {});
  m.answers.forward_mixed(states.bottomRows(12).eval(), out.exits[0], logits, s, {});
  EXPECT_LT((logits - out.logits).cwiseAbs().maxCoeff(), grouping);
}

TEST(decoding, threshold_nought_leaves_at_block_one_and_threshold_one_is_the_full_model) {
  const auto m = make_model();
  const auto full = run(m, {});
  EXPECT_EQ(depths(full), std::set<std::int32_t>{depth});
  for (const auto& [kind, unused] : every_rule) {
    if (kind == exit_confidence::multinomial) continue;  // it has no threshold
    const auto shallow = run(m, rule(kind, 0));
    EXPECT_EQ(depths(shallow), std::set<std::int32_t>{kind == exit_confidence::state ? 2 : 1});
    if (kind != exit_confidence::state) {
      EXPECT_EQ(shallow.projected, 5 * 12);
    }
    const auto deep = run(m, rule(kind, 1));
    EXPECT_EQ(deep.exits, full.exits);
    EXPECT_EQ(deep.tokens, full.tokens);
    EXPECT_LT((deep.logits - full.logits).cwiseAbs().maxCoeff(), grouping);
  }
}

TEST(decoding, a_fixed_exit_is_the_truncated_model) {
  const auto m = make_model();
  for (index_t n = 1; n <= depth; ++n) {
    const auto a = run(m, {.exits = {static_cast<std::int32_t>(n)}}), b = run(truncated(m, n), {});
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.logits, b.logits);
    EXPECT_DOUBLE_EQ(a.mean_exit(), static_cast<double>(n));
    EXPECT_EQ(a.histogram(depth)[static_cast<std::size_t>(n - 1)], 5 * 12);
  }
}

TEST(decoding, exits_planned_for_each_sequence) {
  const auto m = make_model();
  const auto out = run(m, {.exits = {1, 4, 2, 3, 1}});
  for (std::size_t i = 0; i < 5; ++i) {
    const std::int32_t planned = std::vector<std::int32_t>{1, 4, 2, 3, 1}[i];
    EXPECT_EQ(out.exits[i], std::vector<std::int32_t>(12, planned));
    EXPECT_EQ(out.tokens[i], run(truncated(m, planned), {}, {starts[i]}).tokens[0]);
  }
}

TEST(decoding, sequence_level_exits_from_the_mean_of_the_prompts_first_block_states) {
  // What a decoder without an encoder has to plan by (arXiv 1910.10073, section 4.1).
  const auto m = make_model();
  const sequence_halting<double> head({.features = features, .outputs = depth}, {70});
  const prompts_type prompts{{0, 4, 2}, {3, 3}, {5, 1, 7, 2}, {8, 6}, {2}};
  const auto planned = [&](const prompts_type& p) {
    std::vector<token_t> ids;
    std::vector<index_t> offsets{0};
    for (const auto& text : p) {
      ids.insert(ids.end(), text.begin(), text.end());
      offsets.push_back(std::ssize(ids));
    }
    context ctx;
    ctx.rows = {offsets};
    matrix<double> x(std::ssize(ids), features), h(x.rows(), features), log_q(std::ssize(p), depth);
    tokens().forward(ids, x, ctx);
    m.stack.block(1).forward(x, h, ctx);
    head.forward(h, log_q, ctx);
    std::vector<std::int32_t> exits(p.size());
    most_probable_exits<double>(log_q, exits);
    return exits;
  };
  const auto exits = planned(prompts);
  EXPECT_GT(std::set<std::int32_t>(exits.begin(), exits.end()).size(), 1U);
  const auto out = run(m, {.exits = exits}, prompts);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(planned({prompts[i]})[0], exits[i]);
    EXPECT_EQ(out.exits[i], std::vector<std::int32_t>(12, exits[i]));
  }
}

TEST(generation, reports_mean_exit_and_histogram) {
  generation g;
  g.exits = {{1, 4, 1}, {}, {2}};
  EXPECT_EQ(g.histogram(4), (std::vector<index_t>{2, 1, 0, 1}));
  EXPECT_DOUBLE_EQ(g.mean_exit(), 2);
  EXPECT_EQ(generation{}.mean_exit(), 0);
}

TEST(decoding, tied_blocks_have_a_cache_at_each_depth) {
  const auto m = make_model<block>(depth, exit_distribution::geometric, true);
  model_type untied = m;
  untied.stack.blocks.assign(static_cast<std::size_t>(depth), m.stack.blocks[0]);
  untied.stack.depth = 0;
  const auto a = run(m, rule(exit_confidence::geometric, 0.5)), b = run(untied, rule(exit_confidence::geometric, 0.5));
  EXPECT_EQ(a.logits, b.logits);
  EXPECT_EQ(a.exits, b.exits);
}

TEST(decoding, same_bits_with_any_number_of_workers) {
  const auto m = make_model();
  decoded first;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    const context ctx{.exec = &exec, .work = &work};
    const auto out = run(m, rule(exit_confidence::geometric, 0.55), starts, 12, -1, {}, ctx);
    if (workers == 1) first = out;
    EXPECT_EQ(out.logits, first.logits);
    EXPECT_EQ(out.exits, first.exits);
  }
}

TEST(decoding, the_invariant_of_lazy_filling_holds_after_each_step) {
  const auto m = make_model();
  auto c = make_adaptive_cache(m, 3, 10);
  std::vector<std::vector<std::int32_t>> history(3);
  std::vector<std::int32_t> exits(3);
  matrix<double> logits(3, classes);
  for (index_t t = 0; t < 10; ++t) {
    adaptive_step(m, matrix_view<const double>(random_matrix(3, features, static_cast<std::uint64_t>(t + 100))), nothing{},
                  matrix_view<double>(logits), exits, c, rule(exit_confidence::geometric, 0.55), {});
    index_t sum = 0;
    for (index_t s = 0; s < 3; ++s) {
      history[static_cast<std::size_t>(s)].push_back(exits[static_cast<std::size_t>(s)]);
      for (index_t k = 1; k <= depth; ++k) {
        index_t filled = 0;
        for (index_t i = 0; i <= t; ++i)
          if (history[static_cast<std::size_t>(s)][static_cast<std::size_t>(i)] >= k) filled = i + 1;
        EXPECT_EQ(c.filled_to(k, s), filled);
        sum += filled;
      }
    }
    EXPECT_EQ(c.projected, sum);
  }
}

TEST(decoding, sequences_that_end_leave_the_batch) {
  const auto m = make_model();
  const auto all = run(m, rule(exit_confidence::geometric, 0.55));
  const token_t end = all.tokens[1][3];
  const auto out = run(m, rule(exit_confidence::geometric, 0.55), starts, 12, end);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const auto stop = std::find(all.tokens[i].begin(), all.tokens[i].end(), end);
    const std::vector<token_t> expected(all.tokens[i].begin(), stop == all.tokens[i].end() ? stop : stop + 1);
    EXPECT_EQ(out.tokens[i], expected);
  }
  EXPECT_LT(out.visited, all.visited);
}

TEST(decoding, prompts_are_taken_in_by_all_blocks) {
  const auto m = make_model();
  const prompts_type prompts{{0, 4, 2}, {3}, {5, 1}};
  const auto out = run(m, rule(exit_confidence::geometric, 0.55), prompts);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(out.tokens[i], run(m, rule(exit_confidence::geometric, 0.55), {prompts[i]}).tokens[0]);
  // The first token behind a prompt is what the full pass says.
  matrix<double> x(3, features), logits(depth * 3, classes);
  tokens().forward(prompts[0], x, {});
  m.forward(x, logits, {});
  EXPECT_EQ(run(m, {}, {prompts[0]}, 1).tokens[0][0], sample_token<double>({logits.row(depth * 3 - 1).data(), classes}, {.temperature = 0}, 0, {}));
}

TEST(decoding, a_text_beyond_the_capacity_goes_on_from_its_last_half) {
  const auto m = make_model();
  for (const index_t drafts : {0, 2}) {
    const exit_decoder decoder(tokens(), m, {}, drafts == 0 ? rule(exit_confidence::max_prob, 0.7) : exit_rule{});
    generator_config c = drafts == 0 ? greedy(0) : drafting(1, drafts, 0);
    c.capacity = 6;
    generator<exit_decoder<embedding<double>, block, layer_norm<double>>> g(decoder, c);
    g.start(prompts_type{{0, 4, 2, 5, 1, 3}}, {}, {});
    g.step({});  // only one row fits, so nothing is drafted
    ASSERT_EQ(g.text(0).size(), 7U);
    const prompts_type tail{{g.text(0).begin() + 4, g.text(0).end()}};
    g.step({});
    EXPECT_EQ(g.text(0)[7], generate(decoder, tail, drafts == 0 ? greedy(1) : drafting(1, 2, 1)).tokens[0][0]);
    EXPECT_EQ(g.exits(0).size(), g.text(0).size() - 6);
  }
}

TEST(exit_rule, each_option_changes_who_leaves_when) {
  const auto m = make_model();
  const exit_rule plain = rule(exit_confidence::max_prob, 0.9);
  const auto before = run(m, plain);
  exit_rule late = plain, every_other = plain, falling = plain, together = plain, several = plain;
  late.first = 2;
  EXPECT_EQ(*depths(run(m, late)).begin(), 2);
  every_other.first = 1;
  every_other.interval = 2;
  EXPECT_EQ(depths(run(m, every_other)).count(2), 0U);
  falling.decay = threshold_decay::t5x;
  falling.temperature = 50;
  falling.longest = 12;
  EXPECT_LT(run(m, falling).mean_exit(), before.mean_exit());
  several.thresholds = {1, 1, 0};
  EXPECT_EQ(depths(run(m, several)), std::set<std::int32_t>{3});
  together.whole_batch = true;
  const auto out = run(m, together);
  for (std::size_t t = 0; t < 12; ++t)
    for (std::size_t i = 1; i < 5; ++i) EXPECT_EQ(out.exits[i][t], out.exits[0][t]);
  EXPECT_GT(out.mean_exit(), before.mean_exit());
  EXPECT_EQ(run(m, together, {starts[2]}).exits[0], run(m, plain, {starts[2]}).exits[0]);
}

TEST(exit_rule, decay_and_confidences_have_the_specification_s_values) {
  const double paper[] = {0.91, 0.8467879, 0.8235335, 0.8118316}, t5x[] = {0.90, 0.8431091, 0.8221802, 0.8116484};
  for (std::size_t i = 0; i < 4; ++i) {
    const index_t t = std::vector<index_t>{0, 2, 4, 8}[i];
    EXPECT_NEAR(decayed_threshold(threshold_decay::paper, 0.9, 4, t, 8), paper[i], 1e-7);
    EXPECT_NEAR(decayed_threshold(threshold_decay::t5x, 0.9, 4, t, 8), t5x[i], 1e-7);
  }
  const double logits[] = {std::log(.9), std::log(.05), std::log(.05)};
  EXPECT_NEAR(answer_confidence(exit_confidence::entropy, logits, 3), 1 - 0.3589962496, 1e-10);
  EXPECT_NEAR(answer_confidence(exit_confidence::max_prob, logits, 3), .9, 1e-15);
  EXPECT_NEAR(answer_confidence(exit_confidence::softmax_diff, logits, 3), .85, 1e-15);
  const double nan[] = {0, std::numeric_limits<double>::quiet_NaN()};
  EXPECT_TRUE(std::isnan(answer_confidence(exit_confidence::max_prob, nan, 2)));
}

TEST(exit_rule, bad_rules_are_refused_in_a_sentence) {
  const auto m = make_model();
  const auto refused = [&](const exit_rule& r, const std::string& sentence) {
    try {
      (void)run(m, r);
      FAIL() << sentence;
    } catch (const std::invalid_argument& e) {
      EXPECT_EQ(e.what(), sentence);
    }
  };
  refused({.kind = exit_confidence::max_prob, .thresholds = {0.1, 0.2}}, "exit_rule: expected 1 threshold or 3, got 2");
  refused({.kind = exit_confidence::max_prob, .thresholds = {std::numeric_limits<double>::quiet_NaN()}}, "exit_rule: a threshold is not a number");
  refused({.exits = {5}}, "exit_rule: expected exits from 1 to 4, got 5");
  refused({.exits = {1, 2}}, "exit_rule: expected an exit for each of 5 slots, or one for all, got 2");
  refused({.first = 5}, "exit_rule: expected a first exit from 1 to 4 and an interval of at least 1, got 5 and 1");
  refused({.kind = exit_confidence::multinomial}, "exit_rule: the model has no halting head of the kind that the rule asks for");
  model_type bare = m;
  bare.meta = {};
  EXPECT_THROW((void)run(bare, rule(exit_confidence::meta, 0.5)), config_error);
}

TEST(decoding, parts_of_another_number_of_exits_are_refused) {
  const auto fits = make_model();
  const auto refused = [&](const model_type& m, const std::string& got) {
    const std::string sentence = "adaptive_depth: expected classifiers and a halting distribution of 4 exits, got " + got;
    auto c = make_adaptive_cache(fits, 2, 2);
    std::vector<std::int32_t> exits(2);
    matrix<double> logits(2, classes);
    const auto x = random_matrix(2, features, 1);
    const auto says = [&](auto&& call) {
      try {
        call();
        ADD_FAILURE() << sentence;
      } catch (const config_error& e) {
        EXPECT_EQ(e.what(), sentence);
      }
    };
    says([&] { (void)make_adaptive_cache(m, 2, 2); });
    says([&] {
      adaptive_step(m, matrix_view<const double>(x), nothing{}, matrix_view<double>(logits), exits, c, rule(exit_confidence::geometric, 2), {});
    });
    EXPECT_EQ(c.length, (std::vector<index_t>{0, 0}));
  };
  auto m = fits;
  m.halt = make_model(3).halt;  // a head for each of 2 blocks: block 3 has none
  refused(m, "4 and 3");
  m = fits;
  m.answers = make_model(3).answers;
  refused(m, "3 and 4");
}

TEST(decoding, a_full_slot_throws_before_anything_changes) {
  const auto m = make_model();
  auto c = make_adaptive_cache(m, 2, 2);
  std::vector<std::int32_t> exits(2);
  matrix<double> logits(2, classes), again(2, classes);
  const auto x = random_matrix(2, features, 1);
  const auto step = [&](matrix<double>& out) {
    adaptive_step(m, matrix_view<const double>(x), nothing{}, matrix_view<double>(out), exits, c, rule(exit_confidence::geometric, 0.5), {});
  };
  step(logits);
  step(logits);
  const auto filled = c.filled;
  EXPECT_THROW(step(again), std::length_error);
  EXPECT_EQ(c.filled, filled);
  truncate(m, c, 0, 1);
  truncate(m, c, 1, 1);
  step(again);
  EXPECT_LT((again - logits).cwiseAbs().maxCoeff(), grouping);
}

TEST(decoding, a_step_that_fails_inside_a_block_leaves_nothing_behind) {
  const auto m = make_model<cross_block>();
  const auto source = random_matrix(6, 5, 2), x = random_matrix(2, features, 1);
  const std::vector<index_t> offsets{0, 4, 6}, sources{0, 1};
  const memory_view<double> memory{source, {offsets}};
  std::vector<std::int32_t> exits(2);
  const auto steps = [&](bool fail) {
    auto c = make_adaptive_cache(m, 2, 4);
    matrix<double> logits(2, classes), all(4, classes), y(2, features);
    const auto step = [&] {
      adaptive_step(m, matrix_view<const double>(x), memory, matrix_view<double>(logits), exits, c, rule(exit_confidence::geometric, 0.5), {});
    };
    const std::vector<index_t> ones{0, 1, 2};
    context ctx;
    ctx.rows = {ones};
    if (fail) {  // without a memory the self-attention has already taken the row in when cross-attention throws
      EXPECT_THROW(step(), state_error);
      EXPECT_THROW(prefill(m, matrix_view<const double>(x), memory, c, ctx), state_error);
      EXPECT_THROW(decode_blocks(m, 1, 2, matrix_view<const double>(x), memory, matrix_view<double>(y), c, ctx), state_error);
    }
    start_memory(m, memory, sources, c);
    step();
    all.topRows(2) = logits;
    step();
    all.bottomRows(2) = logits;
    return all;
  };
  EXPECT_EQ(steps(true), steps(false));
}

TEST(decoding, a_failed_step_keeps_positions_and_states_together) {
  const embedding<double> learned({.tokens = classes, .features = features, .positions = 8, .deviation = 1}, {60});
  const auto fine = make_model();
  auto broken = fine;
  broken.answers.classifiers.back().weight.setConstant(std::numeric_limits<double>::quiet_NaN());
  const exit_decoder good(learned, fine), bad(learned, broken);
  const auto two_steps = [&](bool fail) {
    auto c = good.make_cache(1, 8);
    matrix<double> logits(1, classes);
    const std::vector<token_t> ids{3};
    const std::vector<index_t> offsets{0, 1};
    context ctx;
    ctx.rows = {offsets};
    good.decode(ids, logits, c, ctx);
    if (fail) {
      EXPECT_THROW(bad.decode(ids, logits, c, ctx), std::runtime_error);
    }
    good.decode(ids, logits, c, ctx);
    return logits;
  };
  EXPECT_EQ(two_steps(true), two_steps(false));
}

TEST(decoding, a_text_that_outgrows_its_cache_changes_nothing_for_its_neighbour) {
  const auto m = make_model();
  exit_rule falling = rule(exit_confidence::max_prob, 0.9);
  falling.decay = threshold_decay::t5x;
  falling.temperature = 50;
  falling.longest = 12;
  const exit_decoder decoder(tokens(), m, {}, falling);
  const auto exits_of = [&](const prompts_type& prompts) {
    generator<exit_decoder<embedding<double>, block, layer_norm<double>>> g(decoder, {.capacity = 8, .how = {.temperature = 0}});
    g.start(prompts, {}, {});
    for (int i = 0; i < 6; ++i) g.step({});
    return std::vector<std::int32_t>(g.exits(0).begin(), g.exits(0).end());
  };
  EXPECT_EQ(exits_of({{3}, {0, 4, 2, 5, 1, 3, 7}}), exits_of({{3}}));
}

TEST(decoding, numbers_that_are_none_never_leave_early_and_throw_at_the_top) {
  const auto m = make_model();
  auto c = make_adaptive_cache(m, 2, 4);
  std::vector<std::int32_t> exits(2);
  matrix<double> logits(2, classes), clean(2, classes);
  const auto good = random_matrix(2, features, 1);
  const auto step = [&](const matrix<double>& x, matrix<double>& out) {
    adaptive_step(m, matrix_view<const double>(x), nothing{}, matrix_view<double>(out), exits, c, rule(exit_confidence::max_prob, 0.3), {});
  };
  auto bad = good;
  bad(1, 3) = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(step(bad, logits), std::runtime_error);
  truncate(m, c, 0, 0);  // the good row has left and stays; the bad one is as before
  EXPECT_EQ(c.length, (std::vector<index_t>{0, 0}));
  step(good, logits);
  auto fresh = make_adaptive_cache(m, 2, 4);
  std::swap(c, fresh);
  step(good, clean);
  EXPECT_EQ(logits, clean);
}

TEST(decoding, an_empty_batch_is_an_empty_result) {
  const auto m = make_model();
  EXPECT_TRUE(run(m, {}, {}).tokens.empty());
  EXPECT_THROW((void)run(m, {}, {{}}), shape_error);
  auto c = make_adaptive_cache(m, 0, 4);
  adaptive_step(m, matrix_view<const double>(nullptr, 0, features), nothing{}, matrix_view<double>(nullptr, 0, classes), {}, c, exit_rule{}, {});
}

TEST(decoding, no_allocation_in_steady_state) {
#if !defined(LITHE_COUNTS_MALLOC)
  GTEST_SKIP() << "malloc is not ours to count here";
#else
  const auto m = make_model();
  workspace work;
  context ctx;
  ctx.work = &work;
  for (const index_t drafts : {0, 3}) {
    const exit_decoder decoder(tokens(), m, {}, drafts > 0 ? exit_rule{} : rule(exit_confidence::geometric, 0.55));
    generator<exit_decoder<embedding<double>, block, layer_norm<double>>> g(
        decoder, {.capacity = 400, .how = {.temperature = 0.9, .top_k = 5}, .drafts = drafts});
    const auto twenty = [&] {
      g.start(prompts_type{{1, 2, 3}, {4}, {5}}, rng_key{1}, ctx);
      g.reserve(400);
      for (int i = 0; i < 10; ++i) g.step(ctx);
      const long before = mallocs;
      for (int i = 0; i < 20; ++i) g.step(ctx);
      return mallocs - before;
    };
    twenty();
    EXPECT_EQ(twenty(), 0) << drafts;
  }
#endif
}

TEST(self_speculation, emits_the_full_model_s_greedy_tokens) {
  const auto m = make_model();
  const prompts_type prompts{{0}, {3, 1}, {5}, {7, 2, 2}};
  const auto full = run(m, {}, prompts, 14);
  for (index_t exit = 1; exit < depth; ++exit)
    for (const index_t drafts : {1, 2, 5, 20}) {
      const auto out = generate(exit_decoder(tokens(), m), prompts, drafting(exit, drafts, 14));
      EXPECT_EQ(out.tokens, full.tokens) << exit << " " << drafts;
      EXPECT_LE(out.accepted, out.drafted);
    }
  const token_t end = full.tokens[0][5];
  EXPECT_EQ(generate(exit_decoder(tokens(), m), prompts, drafting(2, 3, 14, end)).tokens, run(m, {}, prompts, 14, end).tokens);
}

TEST(self_speculation, every_draft_is_accepted_if_the_blocks_above_add_nothing) {
  auto m = make_model();
  for (std::size_t n = 2; n < 4; ++n) {
    std::get<1>(std::get<0>(m.stack.blocks[n].layers).inner.layers).output.weight.setZero();
    std::get<1>(std::get<0>(m.stack.blocks[n].layers).inner.layers).output.bias.setZero();
    std::get<1>(std::get<1>(m.stack.blocks[n].layers).inner.layers).down.weight.setZero();
    std::get<1>(std::get<1>(m.stack.blocks[n].layers).inner.layers).down.bias.setZero();
    m.answers.norms[n] = m.answers.norms[1];
    m.answers.classifiers[n] = m.answers.classifiers[1];
  }
  const auto out = generate(exit_decoder(tokens(), m), starts, drafting(2, 3, 12));
  EXPECT_EQ(out.accepted, out.drafted);
  EXPECT_EQ(out.drafted, 5 * 9);  // three rounds of three drafts and one more token
  EXPECT_EQ(out.tokens, run(m, {}).tokens);
}

TEST(self_speculation, samples_are_distributed_as_the_full_model_s) {
  const auto m = make_model();
  const exit_decoder full(tokens(), m);
  const sampling how{.temperature = 1.5, .top_k = 6};
  const index_t n = 20000;
  const auto out = generate(full, prompts_type(static_cast<std::size_t>(n), {3}), {.how = how, .most = 2, .drafts = 1, .draft_exit = 1}, rng_key{1});
  EXPECT_LT(out.accepted, out.drafted);  // or the draft is the full model
  EXPECT_GT(out.accepted, out.drafted / 20);
  const auto probabilities = [&](const std::vector<token_t>& text) {
    std::vector<double> p(classes);
    (void)generate(full, prompts_type{text}, greedy(1), {}, {}, [&](index_t, std::span<const double> row) { token_probabilities<double>(row, how, p, {}); });
    return p;
  };
  const auto first = probabilities({3});
  for (token_t a = 0; a < classes; ++a) {
    const auto second = probabilities({3, a});
    for (token_t b = 0; b < classes; ++b) {
      const double p = first[static_cast<std::size_t>(a)] * second[static_cast<std::size_t>(b)];
      const auto seen = static_cast<double>(std::count(out.tokens.begin(), out.tokens.end(), std::vector<token_t>{a, b}));
      EXPECT_NEAR(seen / static_cast<double>(n), p, 5 * std::sqrt(p * (1 - p) / static_cast<double>(n))) << a << " " << b;  // five deviations
    }
  }
}

TEST(self_speculation, bad_input_is_refused) {
  const auto m = make_model();
  for (const auto& [exit, drafts] : {std::pair<index_t, index_t>{0, 1}, {depth, 1}, {1, -1}})
    EXPECT_THROW((void)generate(exit_decoder(tokens(), m), starts, drafting(exit, drafts, 4)), config_error);
}

TEST(beam_search, one_beam_is_greedy) {
  const auto m = make_model();
  for (const auto& r : {exit_rule{}, rule(exit_confidence::geometric, 0.55)}) {
    const auto out = generate_by_beams(exit_decoder(tokens(), m, {}, r), starts, 1, greedy(8));
    EXPECT_EQ(out.tokens, run(m, r, starts, 8).tokens);
    EXPECT_EQ(out.exits, run(m, r, starts, 8).exits);
  }
}

TEST(beam_search, enough_beams_find_the_best_of_all_continuations) {
  // Every pair of tokens behind the start, each in a pass of its own, exits as the rule has them.
  const auto m = make_model();
  const exit_rule r = rule(exit_confidence::geometric, 0.55);
  const auto out = generate_by_beams(exit_decoder(tokens(), m, {}, r), starts, classes, greedy(3));
  for (std::size_t i = 0; i < starts.size(); ++i) {
    double best = -1e9;
    std::vector<token_t> best_tokens;
    std::function<void(std::vector<token_t>, double)> extend = [&](std::vector<token_t> text, double score) {
      if (text.size() == 4) {
        if (score > best) best = score, best_tokens.assign(text.begin() + 1, text.end());
        return;
      }
      // One step at a time, so that every earlier token has the exit that it really took.
      auto c = make_adaptive_cache(m, 1, 4);
      std::vector<std::int32_t> exits(1);
      matrix<double> x(1, features), logits(1, classes);
      for (const token_t t : text) {
        tokens().forward(std::vector<token_t>{t}, x, {});
        adaptive_step(m, matrix_view<const double>(x), nothing{}, matrix_view<double>(logits), exits, c, r, {});
      }
      const double log_sum = std::log(logits.array().exp().sum());
      for (token_t v = 0; v < classes; ++v) {
        auto longer = text;
        longer.push_back(v);
        extend(longer, score + logits(0, v) - log_sum);
      }
    };
    extend(starts[i], 0);
    // 9 beams keep all first tokens; they may drop a second token whose continuation would have won, so the search cannot beat the best.
    EXPECT_LE(out.scores[i] * 3, best + 1e-12);
    EXPECT_GT(out.scores[i] * 3, best - 0.3);
    if (out.tokens[i] == best_tokens) {
      EXPECT_NEAR(out.scores[i] * 3, best, 1e-12);
    }
  }
}

TEST(cross_attention_decoding, equals_the_full_pass_and_projects_the_memory_once) {
  const auto m = make_model<cross_block>();
  const auto memory = random_matrix(6, 5, 3);
  const std::vector<index_t> sources{0, 2, 2, 6};  // the second has no rows
  const memory_view<double> view_of_memory{memory, {sources}};
  const prompts_type prompts{{0}, {3}, {5}};
  const auto out = run(m, {}, prompts, 6, -1, view_of_memory);
  std::vector<token_t> fed;
  for (std::size_t i = 0; i < 3; ++i) {
    fed.push_back(prompts[i][0]);
    fed.insert(fed.end(), out.tokens[i].begin(), out.tokens[i].end() - 1);
  }
  const std::vector<index_t> offsets{0, 6, 12, 18};
  context ctx;
  ctx.rows = {offsets};
  embedding<double> e = tokens();
  matrix<double> x(18, features), logits(depth * 18, classes);
  e.forward(fed, x, ctx);
  m.forward(x, view_of_memory, logits, ctx);
  EXPECT_LT((logits.bottomRows(18) - out.logits).cwiseAbs().maxCoeff(), grouping);
}

TEST(cross_attention_decoding, another_number_of_sources_than_prompts_is_refused) {
  const auto m = make_model<cross_block>();
  const auto memory = random_matrix(6, 5, 3);
  const std::vector<index_t> sources{0, 2, 6};
  try {
    (void)run(m, {}, starts, 2, -1, {memory, {sources}});
    FAIL() << "five prompts read two sources";
  } catch (const shape_error& e) {
    EXPECT_STREQ(e.what(), "exit_decoder: expected a sequence of the memory for each of 5 prompts, got 2");
  }
}

TEST(cross_attention_decoding, blocks_that_nobody_reaches_never_see_the_memory) {
  const auto m = make_model<cross_block>();
  const auto memory = random_matrix(6, 5, 3);
  const std::vector<index_t> sources{0, 2, 6}, of_slots{0, 1};
  const memory_view<double> v{memory, {sources}};
  auto c = make_adaptive_cache(m, 2, 4);
  start_memory(m, v, of_slots, c);
  std::vector<std::int32_t> exits(2);
  matrix<double> logits(2, classes);
  const auto x = random_matrix(2, features, 1);
  const auto step = [&](std::vector<std::int32_t> planned) {
    adaptive_step(m, matrix_view<const double>(x), v, matrix_view<double>(logits), exits, c, exit_rule{.exits = std::move(planned)}, {});
    std::vector<index_t> projected;
    for (const auto& b : c.blocks) projected.push_back(b.cross.projected);
    return projected;
  };
  EXPECT_EQ(step({1, 2}), (std::vector<index_t>{6, 4, 0, 0}));
  EXPECT_EQ(step({3, 1}), (std::vector<index_t>{6, 6, 2, 0}));  // late in the sequence
  EXPECT_EQ(step({3, 3}), (std::vector<index_t>{6, 6, 6, 0}));
}

TEST(cross_attention_decoding, beams_share_their_source_and_agree_with_greedy) {
  const auto m = make_model<cross_block>();
  const auto memory = random_matrix(6, 5, 3);
  const std::vector<index_t> sources{0, 2, 6};
  const memory_view<double> v{memory, {sources}};
  const prompts_type prompts{{0}, {3}};
  const generator_config c = greedy(6);
  const exit_rule r = rule(exit_confidence::geometric, 0.5);
  const exit_decoder both(tokens(), m, v, r);
  const auto wide = generate_by_beams(both, prompts, 4, c), narrow = generate_by_beams(both, prompts, 1, c);
  EXPECT_EQ(narrow.tokens, generate(both, prompts, c).tokens);
  for (std::size_t i = 0; i < 2; ++i) {
    const memory_view<double> own{matrix_view<const double>(memory).slice_rows(sources[i], sources[i + 1] - sources[i]), {}};
    const auto alone = generate_by_beams(exit_decoder(tokens(), m, own, r), prompts_type{prompts[i]}, 4, c);
    EXPECT_EQ(alone.tokens[0], wide.tokens[i]);
    EXPECT_EQ(alone.exits[0], wide.exits[i]);
  }
  EXPECT_GE(wide.scores[0] + wide.scores[1], narrow.scores[0] + narrow.scores[1] - 0.2);
}

TEST(decoder_flops, the_specification_s_numbers) {
  const decoder_flops f{.width = 256, .inner = 1024, .length = 10, .memory_length = 20, .memory_width = 512, .classes = 10000};
  EXPECT_EQ(f.block(), 1865728);
  EXPECT_EQ(f.first_visit(), 10485760);
  EXPECT_EQ(f.skipped(), 262144);
  EXPECT_EQ(f.token(exit_confidence::geometric, 2, 6), 9901056);
  EXPECT_GT(f.token(exit_confidence::max_prob, 3, 6), f.token(exit_confidence::geometric, 3, 6));
}

}  // namespace adaptive_decoding_tests
