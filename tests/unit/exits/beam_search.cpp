// Beam search over small Markov chains, against all of their texts.
#include "lithe/compose/beam_search.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/axial_positions.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/layers/linear.hpp"

namespace beam_search_tests {

using namespace lithe;
using prompts_type = std::vector<std::vector<token_t>>;
constexpr double none = -std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();

/// A chain as a model: the logits behind tokens a, b are row a V + b of a table (b alone: row b), so that a wrong cache
/// shows. Counts its rows.
struct chain {
  using scalar = double;
  struct cache {
    std::vector<std::vector<token_t>> seen;
  };
  matrix<double> logits;
  mutable index_t filled = 0, decoded = 0;

  explicit chain(matrix<double> l) : logits(std::move(l)) {}
  chain(index_t V, std::uint64_t seed, double deviation) : logits(V * V, V) {
    fill_normal<double>(logits, deviation, rng_key{seed});
  }

  [[nodiscard]] auto row(token_t before, token_t newest) const { return logits.row(before * logits.cols() + newest); }
  [[nodiscard]] shape output_shape(std::span<const token_t> ids) const {
    return {static_cast<index_t>(ids.size()), logits.cols()};
  }
  [[nodiscard]] cache make_cache(index_t slots, index_t) const {
    return {std::vector<std::vector<token_t>>(static_cast<std::size_t>(slots))};
  }
  void decode(std::span<const token_t> ids, matrix_view<double> y, cache& c, const context& ctx) const {
    decoded += append(ids, c, ctx, [&](index_t r, const std::vector<token_t>& text) {
      y.map().row(r) = row(text.size() < 2 ? 0 : text[text.size() - 2], text.back());
    });
  }
  void fill(std::span<const token_t> ids, cache& c, const context& ctx) const {
    filled += append(ids, c, ctx, [](index_t, const std::vector<token_t>&) {});
  }
  void truncate(cache& c, index_t slot, index_t n) const {
    c.seen[static_cast<std::size_t>(slot)].resize(static_cast<std::size_t>(n));
  }
  void permute(cache& c, std::span<const index_t> order) const {
    const cache before = c;
    for (std::size_t i = 0; i < order.size(); ++i) c.seen[i] = before.seen[static_cast<std::size_t>(order[i])];
  }

 private:
  template <class F>
  static index_t append(std::span<const token_t> ids, cache& c, const context& ctx, F&& then) {
    const auto n = static_cast<index_t>(ids.size());
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      for (index_t r = ctx.rows.begin(s); r < ctx.rows.end(s, n); ++r) {
        auto& text = c.seen[static_cast<std::size_t>(ctx.slot(s))];
        text.push_back(ids[static_cast<std::size_t>(r)]);
        then(r, text);
      }
    return n;
  }
};

std::vector<double> log_softmax(const chain& m, token_t before, token_t newest) {
  const matrix<double> z = m.row(before, newest);
  const double largest = z.maxCoeff(), sum = std::log((z.array() - largest).exp().sum());
  std::vector<double> p;
  for (index_t v = 0; v < z.cols(); ++v) p.push_back(z(0, v) - largest - sum);
  return p;
}
/// Σ log p / length of a text behind a prompt of one token.
double score_of(const chain& m, token_t prompt, const std::vector<token_t>& text) {
  double sum = 0;
  token_t before = 0, newest = prompt;
  for (const token_t t : text) {
    sum += log_softmax(m, before, newest)[static_cast<std::size_t>(t)];
    before = newest;
    newest = t;
  }
  return sum / static_cast<double>(text.size());
}
/// The best score of all texts of at most `most` tokens that end with a stop token.
double best_of_all(const chain& m, token_t prompt, const std::vector<token_t>& stop, index_t most) {
  double best = none;
  std::function<void(token_t, token_t, double, index_t)> extend = [&](token_t before, token_t newest, double sum,
                                                                      index_t n) {
    if (n == most) return;
    const auto p = log_softmax(m, before, newest);
    for (token_t v = 0; v < m.logits.cols(); ++v) {
      const double now = sum + p[static_cast<std::size_t>(v)];
      if (std::find(stop.begin(), stop.end(), v) != stop.end())
        best = std::max(best, now / static_cast<double>(n + 1));
      else
        extend(newest, v, now, n + 1);
    }
  };
  extend(0, prompt, 0, 0);
  return best;
}
generator_config searching(index_t most, std::vector<token_t> stop) {
  return {.how = {.temperature = 0}, .stop = std::move(stop), .most = most};
}

TEST(beam_search_of_chains, enough_beams_find_the_best_text_that_ends) {
  // Two tokens go on, so after 4 tokens 16 texts have not ended: 16 beams keep them all.
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    const chain m(3, seed, 2);
    const auto out = generate_by_beams(m, prompts_type{{1}, {2}}, 16, searching(5, {0}));
    for (std::size_t i = 0; i < 2; ++i) {
      const token_t prompt = i == 0 ? 1 : 2;
      EXPECT_NEAR(out.scores[i], best_of_all(m, prompt, {0}, 5), 1e-12) << seed;
      EXPECT_NEAR(out.scores[i], score_of(m, prompt, out.tokens[i]), 1e-12) << seed;
      EXPECT_EQ(out.tokens[i].back(), 0);
    }
  }
}

TEST(beam_search_of_chains, scores_are_those_of_the_texts_and_one_beam_is_no_worse_than_greedy) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const chain m(4, seed, 1.5);
    const auto greedy = generate(m, prompts_type{{1}}, searching(7, {0})).tokens[0];
    for (index_t beams = 1; beams <= 16; ++beams) {
      const auto out = generate_by_beams(m, prompts_type{{1}}, beams, searching(7, {0}));
      EXPECT_NEAR(out.scores[0], score_of(m, 1, out.tokens[0]), 1e-12);
      if (out.tokens[0].back() == 0) {
        EXPECT_LE(out.scores[0], best_of_all(m, 1, {0}, 7) + 1e-12);
      }
      if (greedy.back() == 0 && beams == 1) {
        EXPECT_GE(out.scores[0], score_of(m, 1, greedy) - 1e-12) << seed << " with " << beams;
      }
    }
  }
}

// Ending at once scores log 0.4; on the long way every step offers an ending that is worse than going on, but better
// the later it comes.
TEST(beam_search_of_chains, early_endings_do_not_stop_the_search) {
  matrix<double> z(9, 3);
  z.setConstant(none);
  const auto set = [&](token_t before, token_t newest, std::vector<double> p) {
    for (index_t v = 0; v < 3; ++v) z(before * 3 + newest, v) = std::log(p[static_cast<std::size_t>(v)]);
  };
  for (token_t before = 0; before < 3; ++before) {
    set(before, 1, {0.4, 0, 0.6});  // behind the prompt: end or go on
    set(before, 2, {0.05, 0, 0.95});
  }
  const chain m(z);
  for (index_t beams = 2; beams <= 16; ++beams) {
    const auto out = generate_by_beams(m, prompts_type{{1}}, beams, searching(30, {0}));
    // The longest text: log 0.6, 28 times log 0.95, log 0.05.
    EXPECT_NEAR(out.scores[0], (std::log(0.6) + 28 * std::log(0.95) + std::log(0.05)) / 30, 1e-12) << beams;
    EXPECT_EQ(out.tokens[0].size(), 30U);
  }
}

TEST(beam_search_of_chains, several_stop_tokens_do_not_crowd_out_what_goes_on) {
  // Three stop tokens with 0.9 between them, and one that goes on for 7 tokens with 1 each, behind which the ending is
  // certain.
  matrix<double> z(16, 4);
  z.setConstant(none);
  for (index_t before = 0; before < 4; ++before) {
    z.row(before * 4 + 3) << std::log(0.3), std::log(0.3), std::log(0.3), std::log(0.1);
    if (before == 3) z.row(before * 4 + 3) << 0, none, none, none;
  }
  const auto out = generate_by_beams(chain(z), prompts_type{{3}}, 1, searching(8, {0, 1, 2}));
  EXPECT_NEAR(out.scores[0], std::log(0.1) / 2, 1e-12);  // -1.151 against log 0.3 = -1.204
  EXPECT_EQ(out.tokens[0], (std::vector<token_t>{3, 0}));
}

TEST(beam_search_of_chains, a_stop_token_that_is_impossible_is_never_taken) {
  matrix<double> z(4, 2);
  z.setZero();
  z.col(1).setConstant(none);
  const auto out = generate_by_beams(chain(z), prompts_type{{0}}, 2, searching(5, {1}));
  EXPECT_EQ(out.tokens[0], (std::vector<token_t>{0, 0, 0, 0, 0}));
  EXPECT_EQ(out.scores[0], 0);
}

TEST(beam_search_of_chains, beams_that_are_impossible_are_not_decoded) {
  matrix<double> z(9, 3);
  z.setConstant(none);
  z.col(2).setConstant(1);
  const chain m(z);
  const auto out = generate_by_beams(m, prompts_type{{0}}, 4, searching(5, {1}));
  EXPECT_EQ(out.tokens[0], (std::vector<token_t>{2, 2, 2, 2, 2}));
  EXPECT_EQ(m.decoded, 5);
}

TEST(beam_search_of_chains, logits_that_are_no_numbers_are_left_out_as_generate_does) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, inf, none})
    for (index_t column = 0; column < 4; ++column)
      for (index_t beams : {1, 2, 5}) {
        chain m(4, 3, 1), healthy = m;
        m.logits.col(column).setConstant(bad);
        healthy.logits.col(column).setConstant(bad == inf ? 1e3 : none);  // behind exp: the same
        const generator_config c = searching(6, {});
        const auto out = generate_by_beams(m, prompts_type{{1}}, beams, c),
                   expected = generate_by_beams(healthy, prompts_type{{1}}, beams, c);
        EXPECT_EQ(out.tokens, expected.tokens);
        EXPECT_NEAR(out.scores[0], expected.scores[0], 1e-12);
        if (beams == 1) {
          EXPECT_EQ(out.tokens, generate(m, prompts_type{{1}}, c).tokens);
        }
      }
  for (const double bad : {nan, none}) {
    chain m(4, 3, 1);
    m.logits.setConstant(bad);
    EXPECT_THROW((void)generate_by_beams(m, prompts_type{{1}}, 3, searching(4, {})), state_error);
    EXPECT_THROW((void)generate(m, prompts_type{{1}}, searching(4, {})), state_error);
  }
}

TEST(beam_search_of_chains, of_equal_texts_the_lowest_tokens_win) {
  matrix<double> z(9, 3);
  z.setZero();
  for (const index_t beams : {1, 2, 3, 9}) {
    const auto out = generate_by_beams(chain(z), prompts_type{{1}}, beams, searching(3, {}));
    EXPECT_EQ(out.tokens[0], (std::vector<token_t>{0, 0, 0})) << beams;
  }
}

TEST(beam_search_of_chains, the_prompt_is_read_once) {
  const chain m(5, 7, 1);
  std::vector<token_t> prompt;
  for (token_t t = 0; t < 200; ++t) prompt.push_back(t % 5);
  const auto out = generate_by_beams(m, prompts_type{prompt, {1, 2, 3}}, 8, searching(6, {}));
  EXPECT_EQ(m.filled, 199 + 2);
  const auto alone = generate_by_beams(m, prompts_type{{1, 2, 3}}, 8, searching(6, {}));
  EXPECT_EQ(out.tokens[1], alone.tokens[0]);
  EXPECT_EQ(out.scores[1], alone.scores[0]);
}

TEST(sampling_of_bad_logits, nan_counts_as_impossible_under_every_cut) {
  const std::vector<double> bad{0.5, nan, 2, none, 1, nan}, clean{0.5, none, 2, none, 1, none};
  for (const sampling& how : {sampling{},
                              {.temperature = 0.7},
                              {.top_k = 1},
                              {.top_k = 2},
                              {.top_k = 5},
                              {.top_p = 0.5},
                              {.top_p = 0.95},
                              {.temperature = 2, .top_k = 4, .top_p = 0.9},
                              {.temperature = 0},
                              {.temperature = 1e-300}}) {
    std::vector<double> p(6), q(6);
    token_probabilities<double>(bad, how, p, {});
    token_probabilities<double>(clean, how, q, {});
    EXPECT_EQ(p, q);
    double sum = 0;
    for (const double x : p) sum += x;
    EXPECT_NEAR(sum, 1, 1e-15);
  }
  const std::vector<float> infinite{1, std::numeric_limits<float>::infinity(), 3,
                                    std::numeric_limits<float>::infinity()};
  for (const sampling& how : {sampling{}, {.top_k = 3}, {.top_p = 0.99}}) {
    std::vector<double> p(4);
    token_probabilities<float>(infinite, how, p, {});
    EXPECT_EQ(p, (std::vector<double>{0, 0.5, 0, 0.5}));
  }
  EXPECT_EQ(sample_token<float>(infinite, {.temperature = 0}, 0.9, {}), 1);
}

TEST(sampling_of_bad_logits, log_probabilities_keep_far_logits_apart) {
  // 1e5 apart from zero a float has 2^-7 left, and an unlikely token a log probability whose exp is 0.
  const std::vector<float> z{100000, 100001, 99000};
  std::vector<double> p(3);
  token_log_probabilities<float>(z, p);
  const double sum = std::log(1 + std::exp(-1.0));
  EXPECT_NEAR(p[0], -1 - sum, 1e-14);
  EXPECT_NEAR(p[1], -sum, 1e-14);
  EXPECT_NEAR(p[2], -1001 - sum, 1e-12);
  EXPECT_THROW(token_log_probabilities<float>(std::vector<float>{}, {}), shape_error);
  EXPECT_THROW(token_log_probabilities<float>(std::vector<float>(3, std::numeric_limits<float>::quiet_NaN()), p),
               state_error);
}

TEST(generator_of_bad_logits, a_row_without_a_number_leaves_all_texts_as_they_are) {
  chain m(3, 1, 1);
  m.logits.row(2 * 3 + 2).setConstant(nan);  // behind 2 2
  generator<chain> g(m, {.capacity = 8, .how = {.temperature = 0}});
  g.start(prompts_type{{1, 1}, {2, 2}}, {}, {});
  EXPECT_THROW(g.step({}), state_error);
  EXPECT_EQ(g.text(0).size(), 2U);
  EXPECT_EQ(g.text(1).size(), 2U);
}

// --- learned positions --------------------------------------------------------------------------------------

template <class... L>
auto causal(L... first) {
  return sequential(first..., residual(attention<double>({.inputs = 8, .heads = 2, .causal = true}, rng_key{2})),
                    linear<double>({8, 11}, rng_key{3}));
}

template <class Model>
void expect_the_last_half_goes_on(const Model& model, index_t positions) {
  EXPECT_EQ(longest_sequence(model), positions);
  const prompts_type prompts{{1, 2, 3}, {4}};
  generator_config all{.how = {.temperature = 0.7}, .most = 40}, within = all, wide = all;
  within.capacity = positions;
  wide.capacity = 1000;
  const auto expected = generate(model, prompts, within, rng_key{1}).tokens;
  EXPECT_EQ(expected[0].size(), 40U);
  EXPECT_EQ(generate(model, prompts, all, rng_key{1}).tokens, expected);
  EXPECT_EQ(generate(model, prompts, wide, rng_key{1}).tokens, expected);
  const auto beams = generate_by_beams(model, prompts, 3, all),
             beams_within = generate_by_beams(model, prompts, 3, within);
  EXPECT_EQ(beams.tokens, beams_within.tokens);
  EXPECT_EQ(beams.tokens[1].size(), 40U);
}

TEST(generator_of_positions, texts_that_outgrow_them_go_on_from_their_last_half) {
  expect_the_last_half_goes_on(
      causal(embedding<double>({.tokens = 11, .features = 8, .positions = 16, .deviation = 1}, rng_key{1})), 16);
  expect_the_last_half_goes_on(causal(embedding<double>({.tokens = 11, .features = 8, .deviation = 1}, rng_key{1}),
                                      axial_positions<double>({.shape = {3, 5}, .widths = {4, 4}}, rng_key{4})),
                               15);
  EXPECT_EQ(longest_sequence(causal(embedding<double>({.tokens = 11, .features = 8}, rng_key{1}))),
            std::numeric_limits<index_t>::max());
}

}  // namespace beam_search_tests
