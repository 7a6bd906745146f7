#pragma once

#include "lithe/compose/adaptive_depth_decode.hpp"

// B sequences, N exits, V classes
namespace lithe::inline LITHE_ABI {

/// What decoding gave: for each sequence the tokens behind its prompt (the end token is the last, if it came) and the exit of each.
template <class S>
struct generation {
  std::vector<std::vector<token_t>> tokens;
  std::vector<std::vector<std::int32_t>> exits;
  matrix<S> logits;                    ///< if asked for: row b * max_steps + t; 0 where nothing was decoded
  std::vector<double> scores;          ///< beam search: log probability / length
  index_t projected = 0, visited = 0;  ///< rows of keys and values made, rows that went through a block
  index_t drafted = 0, accepted = 0;   ///< self-speculation: tokens drafted, and those of them that the full model agreed with

  /// Tokens that left at exits 1 .. N.
  [[nodiscard]] std::vector<index_t> histogram(index_t N) const {
    std::vector<index_t> counts(static_cast<std::size_t>(N), 0);
    for (const auto& row : exits)
      for (const auto n : row) ++counts[static_cast<std::size_t>(n - 1)];
    return counts;
  }
  [[nodiscard]] double mean_exit() const {
    double sum = 0, count = 0;
    for (const auto& row : exits)
      for (const auto n : row) {
        sum += n;
        ++count;
      }
    return count == 0 ? 0 : sum / count;
  }
};

struct generation_config {
  index_t max_steps = 1;
  token_t end = -1;  ///< a sequence is over behind this token; below 0: never
  exit_rule rule{};
  bool keep_logits = false;
};

namespace detail {

/// The first of the largest.
template <class S>
token_t most_probable(const S* logits, index_t classes) {
  return static_cast<token_t>(std::max_element(logits, logits + classes) - logits);
}

/// What all generators start with: the caches of embedding and stack, with all of the prompts but their last tokens taken in.
template <class Embed, class Block, class Norm>
struct generation_state {
  using S = typename Block::scalar;
  const Embed& embed;
  const adaptive_depth<Block, Norm>& model;
  cache_of<Embed> embed_cache;
  adaptive_cache<Block> cache;
  std::vector<token_t> last;  // of each slot

  /// `copies` slots for each prompt.
  generation_state(const Embed& e, const adaptive_depth<Block, Norm>& md, const memory_of<Block>& m, std::span<const std::vector<token_t>> prompts,
                   index_t copies, index_t max_steps, const context& ctx)
      : embed(e), model(md) {
    std::size_t longest = 0;
    for (const auto& p : prompts) {
      require<config_error>(!p.empty(), "generate: expected at least 1 token in each prompt");
      longest = std::max(longest, p.size());
    }
    const auto B = static_cast<index_t>(prompts.size());
    const index_t slots = B * copies, capacity = static_cast<index_t>(longest) + max_steps;
    embed_cache = lithe::make_cache(embed, slots, capacity);
    cache = make_adaptive_cache(model, slots, capacity);
    std::vector<token_t> ids;
    std::vector<index_t> offsets{0}, source;
    for (index_t s = 0; s < slots; ++s) {
      const auto& p = prompts[static_cast<std::size_t>(s / copies)];
      source.push_back(s / copies);
      last.push_back(p.back());
      ids.insert(ids.end(), p.begin(), p.end() - 1);
      offsets.push_back(static_cast<index_t>(ids.size()));
    }
    if constexpr (reads_memory<Block>)
      require<shape_error>(m.rows.count() == B, "generate: expected a sequence of the memory for each of ", B, " prompts, got ", m.rows.count());
    start_memory(model, m, source, cache);
    if (ids.empty()) return;
    context c = ctx;
    c.rows = {offsets};
    c.slots = {};
    const scratch<S> x(ctx, static_cast<index_t>(ids.size()), model.features());
    lithe::decode(embed, std::span<const token_t>(ids), x.view(), embed_cache, c);
    prefill(model, matrix_view<const S>(x), m, cache, c);
  }
  /// Embeds one token for each of the slots.
  void look_up(std::span<const token_t> ids, std::span<const index_t> slots, matrix_view<S> x, const context& ctx) {
    const scratch<index_t> offsets(ctx, x.rows() + 1);
    std::iota(offsets.data(), offsets.data() + x.rows() + 1, index_t{0});
    context c = ctx;
    c.rows = {offsets.span()};
    c.slots = slots;
    lithe::decode(embed, ids, x, embed_cache, c);
  }
};

}  // namespace detail

/// Greedy decoding with exits of rows that each start from a prompt of at least one token. `embed` is the layer that turns tokens into rows (an
/// `embedding`; its learned positions go on by themselves). A sequence that is over leaves the batch for good. Throws as `adaptive_step` does.
template <class Embed, class Block, class Norm>
[[nodiscard]] generation<typename Block::scalar> generate(const Embed& embed, const adaptive_depth<Block, Norm>& model,
                                                          const detail::memory_of<Block>& m, std::span<const std::vector<token_t>> prompts,
                                                          const generation_config& config, const context& ctx = {}) {
  using S = typename Block::scalar;
  const auto B = static_cast<index_t>(prompts.size());
  const index_t V = model.answers.classes();
  generation<S> out;
  out.tokens.resize(prompts.size());
  out.exits.resize(prompts.size());
  if (config.keep_logits) out.logits.setZero(B * config.max_steps, V);
  if (B == 0) return out;
  detail::generation_state<Embed, Block, Norm> state(embed, model, m, prompts, 1, config.max_steps, ctx);
  std::vector<index_t> active(prompts.size());
  std::iota(active.begin(), active.end(), index_t{0});
  std::vector<token_t> ids;
  std::vector<std::int32_t> exits;
  for (index_t t = 0; t < config.max_steps && !active.empty(); ++t) {
    const auto R = static_cast<index_t>(active.size());
    const scratch<S> x(ctx, R, model.features()), logits(ctx, R, V);
    ids.clear();
    for (const index_t s : active) ids.push_back(state.last[static_cast<std::size_t>(s)]);
    exits.resize(active.size());
    state.look_up(ids, active, x, ctx);
    context c = ctx;
    c.slots = active;
    adaptive_step<Block, Norm>(model, x, m, logits, exits, state.cache, config.rule, c);
    std::size_t left = 0;
    for (index_t i = 0; i < R; ++i) {
      const index_t b = active[static_cast<std::size_t>(i)];
      const token_t next = detail::most_probable(logits.row(i), V);
      out.tokens[static_cast<std::size_t>(b)].push_back(next);
      out.exits[static_cast<std::size_t>(b)].push_back(exits[static_cast<std::size_t>(i)]);
      if (config.keep_logits) out.logits.row(b * config.max_steps + t) = logits.map().row(i);
      state.last[static_cast<std::size_t>(b)] = next;
      if (config.end < 0 || next != config.end) active[left++] = b;
    }
    active.resize(left);
  }
  out.projected = state.cache.projected;
  out.visited = state.cache.visited;
  return out;
}

/// Lossless decoding in which the first blocks draft for all (arXiv 2404.16710, section 4.3): up to `drafts` tokens are taken from exit `draft_exit`,
/// then the blocks above check them all at once; those that equal the full model's choice are kept, and its next choice is added. The tokens are
/// those of greedy decoding without exits. `exits` says for each token whether the draft (draft_exit) or the full model (N) gave it.
///
/// Throws config_error unless 1 <= draft_exit < N and drafts >= 1.
template <class Embed, class Block, class Norm>
[[nodiscard]] generation<typename Block::scalar> generate_speculatively(const Embed& embed, const adaptive_depth<Block, Norm>& model,
                                                                        const detail::memory_of<Block>& m,
                                                                        std::span<const std::vector<token_t>> prompts, index_t draft_exit,
                                                                        index_t drafts, index_t max_steps, token_t end, const context& ctx = {}) {
  using S = typename Block::scalar;
  const auto B = static_cast<index_t>(prompts.size());
  const index_t V = model.answers.classes(), N = model.exits(), D = model.features();
  require<config_error>(draft_exit >= 1 && draft_exit < N && drafts >= 1, "generate_speculatively: expected a draft exit from 1 to ", N - 1,
                        " and at least 1 draft, got ", draft_exit, " and ", drafts);
  generation<S> out;
  out.tokens.resize(prompts.size());
  out.exits.resize(prompts.size());
  if (B == 0 || max_steps < 1) return out;
  detail::generation_state<Embed, Block, Norm> state(embed, model, m, prompts, 1, max_steps, ctx);
  std::vector<index_t> active(prompts.size());
  std::iota(active.begin(), active.end(), index_t{0});
  std::vector<token_t> fed;
  while (!active.empty()) {
    index_t U = drafts + 1;  // rows of each sequence in this round, none of them behind the last token that is wanted
    for (const index_t b : active) U = std::min(U, max_steps - static_cast<index_t>(out.tokens[static_cast<std::size_t>(b)].size()));
    const auto R = static_cast<index_t>(active.size());
    const scratch<S> x(ctx, R, D), y(ctx, R, D), early(ctx, R * U, D), final(ctx, R * U, D), draft_logits(ctx, R, V), logits(ctx, R * U, V);
    const scratch<token_t> guess(ctx, R, U);  // [i, u]: what is fed at position u of the round
    const scratch<index_t> ones(ctx, R + 1), groups(ctx, R + 1);
    for (index_t i = 0; i <= R; ++i) {
      ones[i] = i;
      groups[i] = i * U;
    }
    context one = ctx, all = ctx;
    one.slots = all.slots = active;
    one.rows = {ones.span()};
    all.rows = {groups.span()};
    for (index_t i = 0; i < R; ++i) guess.row(i)[0] = state.last[static_cast<std::size_t>(active[static_cast<std::size_t>(i)])];
    for (index_t u = 0; u < U; ++u) {
      fed.clear();
      for (index_t i = 0; i < R; ++i) fed.push_back(guess.row(i)[u]);
      state.look_up(fed, active, x, ctx);
      decode_blocks<Block, Norm>(model, 1, draft_exit, x, m, y, state.cache, one);
      for (index_t i = 0; i < R; ++i) std::copy_n(y.row(i), D, early.row(i * U + u));
      if (u + 1 == U) break;
      model.answers.answer(draft_exit, y, draft_logits, ctx);
      for (index_t i = 0; i < R; ++i) guess.row(i)[u + 1] = detail::most_probable(draft_logits.row(i), V);
    }
    decode_blocks<Block, Norm>(model, draft_exit + 1, N, early, m, final, state.cache, all);
    model.answers.answer(N, final, logits, ctx);
    advance<Block>(final, state.cache, all);
    std::size_t left = 0;
    for (index_t i = 0; i < R; ++i) {
      const index_t b = active[static_cast<std::size_t>(i)];
      auto& tokens = out.tokens[static_cast<std::size_t>(b)];
      auto& exits = out.exits[static_cast<std::size_t>(b)];
      const index_t before = state.cache.length[static_cast<std::size_t>(b)] - U;
      bool over = false;
      index_t kept_rows = 0;
      for (bool agreed = true; agreed && !over;) {
        const token_t next = detail::most_probable(logits.row(i * U + kept_rows), V);
        agreed = kept_rows + 1 < U && next == guess.row(i)[kept_rows + 1];
        out.accepted += agreed;
        tokens.push_back(next);
        exits.push_back(static_cast<std::int32_t>(agreed ? draft_exit : N));
        over = (end >= 0 && next == end) || static_cast<index_t>(tokens.size()) == max_steps;
        ++kept_rows;
      }
      out.drafted += U - 1;
      state.last[static_cast<std::size_t>(b)] = tokens.back();
      truncate(model, state.cache, b, before + kept_rows);
      lithe::truncate(embed, state.embed_cache, b, before + kept_rows);
      if (!over) active[left++] = b;
    }
    active.resize(left);
  }
  out.projected = state.cache.projected;
  out.visited = state.cache.visited;
  return out;
}

/// Beam search with exits: for each prompt the `beams` best continuations by Σ log p are kept; who ends is scored by Σ log p / length, and the best
/// of those (of what is left at max_steps, if none has ended) is the result. Every beam has exits of its own. Throws config_error unless beams >= 1,
/// and as `adaptive_step` does.
template <class Embed, class Block, class Norm>
[[nodiscard]] generation<typename Block::scalar> generate_by_beams(const Embed& embed, const adaptive_depth<Block, Norm>& model,
                                                                   const detail::memory_of<Block>& m, std::span<const std::vector<token_t>> prompts,
                                                                   index_t beams, const generation_config& config, const context& ctx = {}) {
  using S = typename Block::scalar;
  require<config_error>(beams >= 1, "generate_by_beams: expected at least 1 beam, got ", beams);
  const auto B = static_cast<index_t>(prompts.size());
  const index_t V = model.answers.classes(), slots = B * beams;
  struct hypothesis {
    std::vector<token_t> tokens;
    std::vector<std::int32_t> exits;
    double score = 0;
  };
  struct candidate {
    double score;
    index_t beam;
    token_t token;
  };
  generation<S> out;
  out.tokens.resize(prompts.size());
  out.exits.resize(prompts.size());
  out.scores.assign(prompts.size(), -std::numeric_limits<double>::infinity());
  if (B == 0) return out;
  detail::generation_state<Embed, Block, Norm> state(embed, model, m, prompts, beams, config.max_steps, ctx);
  std::vector<hypothesis> live(static_cast<std::size_t>(slots));
  std::vector<index_t> ended(prompts.size(), 0), alive(prompts.size(), 1), order(live.size()), active;  // alive: beams in use; the first step has one
  std::vector<candidate> candidates;
  std::vector<token_t> ids;
  std::vector<std::int32_t> exits;
  const auto finish = [&](index_t b, const hypothesis& h) {
    const double score = h.score / static_cast<double>(std::max<std::size_t>(1, h.tokens.size()));
    const auto i = static_cast<std::size_t>(b);
    if (!(score > out.scores[i])) return;
    out.scores[i] = score;
    out.tokens[i] = h.tokens;
    out.exits[i] = h.exits;
  };
  for (index_t t = 0; t < config.max_steps; ++t) {
    active.clear();
    ids.clear();
    for (index_t b = 0; b < B; ++b)
      for (index_t k = 0; k < alive[static_cast<std::size_t>(b)]; ++k) {
        active.push_back(b * beams + k);
        ids.push_back(state.last[static_cast<std::size_t>(active.back())]);
      }
    if (active.empty()) break;
    const auto R = static_cast<index_t>(active.size());
    const scratch<S> x(ctx, R, model.features()), logits(ctx, R, V);
    exits.resize(active.size());
    state.look_up(ids, active, x, ctx);
    context c = ctx;
    c.slots = active;
    adaptive_step<Block, Norm>(model, x, m, logits, exits, state.cache, config.rule, c);
    std::iota(order.begin(), order.end(), index_t{0});
    std::vector<hypothesis> next(live.size());
    index_t first = 0;
    for (index_t b = 0; b < B; ++b) {
      auto& n = alive[static_cast<std::size_t>(b)];
      candidates.clear();
      for (index_t k = 0; k < n; ++k) {
        const auto row = logits.view().row_array(first + k);
        const S largest = row.maxCoeff();
        const double log_sum = std::log(static_cast<double>((row - largest).exp().sum())) + static_cast<double>(largest);
        for (index_t v = 0; v < V; ++v)
          candidates.push_back(
              {live[static_cast<std::size_t>(b * beams + k)].score + static_cast<double>(row[v]) - log_sum, k, static_cast<token_t>(v)});
      }
      const auto better = [](const candidate& p, const candidate& q) {
        return p.score != q.score ? p.score > q.score : p.beam != q.beam ? p.beam < q.beam : p.token < q.token;
      };
      const auto wanted = std::min(candidates.size(), static_cast<std::size_t>(2 * beams));
      std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(wanted), candidates.end(), better);
      index_t taken = 0;
      for (std::size_t i = 0; i < wanted && taken < beams && n > 0; ++i) {
        const candidate& best = candidates[i];
        hypothesis h = live[static_cast<std::size_t>(b * beams + best.beam)];
        h.tokens.push_back(best.token);
        h.exits.push_back(exits[static_cast<std::size_t>(first + best.beam)]);
        h.score = best.score;
        if (config.end >= 0 && best.token == config.end) {
          finish(b, h);
          ++ended[static_cast<std::size_t>(b)];
          continue;
        }
        const index_t slot = b * beams + taken++;
        order[static_cast<std::size_t>(slot)] = b * beams + best.beam;
        state.last[static_cast<std::size_t>(slot)] = best.token;
        next[static_cast<std::size_t>(slot)] = std::move(h);
      }
      first += n;
      if (t + 1 == config.max_steps && out.tokens[static_cast<std::size_t>(b)].empty())
        for (index_t k = 0; k < taken; ++k) finish(b, next[static_cast<std::size_t>(b * beams + k)]);
      n = ended[static_cast<std::size_t>(b)] >= beams ? 0 : taken;
    }
    permute(model, state.cache, order, ctx);
    lithe::permute(embed, state.embed_cache, order);
    live.swap(next);
  }
  out.projected = state.cache.projected;
  out.visited = state.cache.visited;
  return out;
}

/// The paper's count of floating-point operations (arXiv 1910.10073, appendix): what one token costs at exit n of N.
struct decoder_flops {
  double width = 0, inner = 0, length = 0;     ///< d, d_f, and the tokens it sees
  double memory_length = 0, memory_width = 0;  ///< |x| and d_e; 0 without cross-attention
  double classes = 0;

  /// 12 d² + 4 d_f d + 4 t d + 4 |x| d.
  [[nodiscard]] double block() const { return 12 * width * width + 4 * inner * width + 4 * length * width + 4 * memory_length * width; }
  /// Keys and values of the memory, at a block's first visit: 4 |x| d d_e.
  [[nodiscard]] double first_visit() const { return 4 * memory_length * width * memory_width; }
  /// A skipped block's keys and values: 4 d².
  [[nodiscard]] double skipped() const { return 4 * width * width; }
  /// n blocks, N - n skipped ones, the exit tests and (unless the test has already made them) the logits.
  [[nodiscard]] double token(exit_confidence kind, index_t n, index_t exits) const {
    const auto left = static_cast<double>(n), all = static_cast<double>(exits);
    const double blocks = left * block() + (all - left) * skipped();
    switch (kind) {
      case exit_confidence::fixed:
      case exit_confidence::state:
        return blocks + 2 * classes * width;
      case exit_confidence::multinomial:
        return blocks + 2 * all * width + 2 * classes * width;
      case exit_confidence::geometric:
      case exit_confidence::meta:
        return blocks + 2 * width * left + 2 * classes * width;
      case exit_confidence::max_prob:
      case exit_confidence::softmax_diff:
      case exit_confidence::entropy:
        return blocks + 2 * left * classes * width;
    }
    return blocks;
  }
};

}  // namespace lithe::inline LITHE_ABI
