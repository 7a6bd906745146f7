#pragma once

#include "lithe/compose/decoding_batch.hpp"
#include "lithe/compose/sampling.hpp"

// V tokens of a vocabulary, N exits, R live texts, U rows of each in a round of drafts
namespace lithe::inline LITHE_ABI {

struct generator_config {
  /// Tokens of one text that the model sees, never more than it has positions; beyond them it goes on from the last
  /// half. 0 = the longest prompt and `most`.
  index_t capacity = 0;
  sampling how{};
  std::vector<token_t> stop{};  ///< tokens that end a text; they stay in it
  index_t most = 0;             ///< tokens behind the prompt at most; 0 = no limit
  /// Models with exits: tokens, up to 63 in a round, that exit `draft_exit` drafts for the full model to check; 0 = none.
  index_t drafts = 0;
  index_t draft_exit = 1;
};

/// What generation gave: of each text the tokens behind its prompt (a stop token is the last) and, from a model with exits, the exit of each token.
struct generation {
  std::vector<std::vector<token_t>> tokens;
  std::vector<std::vector<std::int32_t>> exits;
  std::vector<double> scores;          ///< beam search: log probability / length
  index_t drafted = 0, accepted = 0;   ///< tokens that were drafted, and those of them that the full model let stand
  index_t projected = 0, visited = 0;  ///< models with exits: rows of keys and values made, rows that went through a block

  /// Tokens that left at exits 1 .. N.
  [[nodiscard]] std::vector<index_t> histogram(index_t N) const {
    std::vector<index_t> counts(static_cast<std::size_t>(N), 0);
    for (const auto& text : exits)
      for (const auto n : text) ++counts[static_cast<std::size_t>(n - 1)];
    return counts;
  }
  /// The mean exit over all tokens; 0 if there are none.
  [[nodiscard]] double mean_exit() const {
    double sum = 0, count = 0;
    for (const auto& text : exits)
      for (const auto n : text) sum += n, ++count;
    return count == 0 ? 0 : sum / count;
  }
};

namespace detail {

/// The capacity that a configuration asks for. Throws config_error for one that fits nothing.
inline index_t capacity_for(const generator_config& c, std::span<const std::vector<token_t>> prompts) {
  require<config_error>(c.most >= 0, "generator: expected at most 0 (no limit) or more new tokens, got ", c.most);
  require<config_error>(c.capacity >= 2 || (c.capacity == 0 && c.most > 0),
                        "generator: expected a capacity of at least 2 tokens, or 0 with a limit of new ones, got ", c.capacity);
  if (c.capacity > 0) return c.capacity;
  std::size_t longest = 1;
  for (const auto& p : prompts) longest = std::max(longest, p.size());
  return static_cast<index_t>(longest) + c.most;
}
inline bool is_stop(const generator_config& c, token_t t) { return std::find(c.stop.begin(), c.stop.end(), t) != c.stop.end(); }
/// What projected and visited rows a model with exits has counted.
template <class Model>
void report_rows(const decoding_batch<Model>& batch, generation& out) {
  if constexpr (exit_decoding<Model>) {
    out.projected = batch.cache().states.projected;
    out.visited = batch.cache().states.visited;
  }
}
struct watch_nothing {
  template <class Row>
  void operator()(index_t, const Row&) const {}
};

}  // namespace detail

/// Continues texts of different lengths side by side, with decode caches:
///
///     generator<Model> g(model, {.capacity = 256, .how = {.temperature = 0.7}});
///     g.start(prompts, key, ctx);
///     while (g.live() > 0 && n-- > 0) g.step(ctx);      // one token for each text that is not over
///     g.text(i);                                        // prompt and continuation
///
/// Prompts are read in one pass. A text's draws depend on the key, its number and its length, not on what stands beside it (with drafts at a
/// temperature above 0 on the length of a round, too, which the text with the least room sets). Steps allocate nothing once `reserve`d, unless a text
/// outgrows its capacity.
///
/// With exits (`exit_decoder`) every token has an exit of its own. With `drafts` a step is a round of self-speculation (arXiv 2404.16710, section
/// 4.3): exit `draft_exit` drafts tokens, the blocks above check them all at once, those that stand are kept, and the full model adds one. The texts
/// are distributed as the full model's (arXiv 2211.17192); at temperature 0 they are its texts. The exit of a token then says who gave it:
/// draft_exit, or N.
template <token_decoder Model>
class generator {
 public:
  using scalar = typename Model::scalar;

  /// The model must outlive the generator. Throws config_error for a capacity of 1 or below 0 (0 needs `most`), settings of `sampling` out of range,
  /// drafts of a model without exits, below 0, from an exit outside 1 .. N - 1, or beside an exit rule.
  generator(const Model& model, generator_config config) : model_(&model), config_(std::move(config)), batch_(model) {
    detail::capacity_for(config_, {});
    config_.how.check();
    require<config_error>(config_.drafts >= 0, "generator: expected at least 0 drafts, got ", config_.drafts);
    if constexpr (exit_decoding<Model>) {
      require<config_error>(config_.drafts == 0 || (config_.draft_exit >= 1 && config_.draft_exit < model.exits()),
                            "generator: expected a draft exit from 1 to ", model.exits() - 1, ", got ", config_.draft_exit);
      require<config_error>(config_.drafts == 0 || model.full_depth(), "generator: all blocks check what was drafted, so no exit rule goes with drafts");
    } else {
      require<config_error>(config_.drafts == 0, "generator: expected a model with exits for drafts, got one without");
    }
  }

  /// Takes the prompts, each of at least one token. Throws shape_error for an empty one.
  void start(std::span<const std::vector<token_t>> prompts, rng_key key, const context& ctx) {
    key_ = key;
    drafted_ = accepted_ = 0;
    batch_.start(prompts, 1, detail::capacity_for(config_, prompts), ctx);
  }
  /// Room for texts of `length` tokens.
  void reserve(index_t length) { batch_.reserve(length); }

  /// Appends one token, with drafts up to drafts + 1, to every text that is not over; the texts that still are not.
  /// `watch(text, logits)` sees each row of logits from which a token is drawn (with drafts: the full model's). Throws
  /// what the model throws, and state_error for logits that are all NaN or -infinity; then the texts go on from another
  /// `start` alone.
  template <class Watch = detail::watch_nothing>
  index_t step(const context& ctx, Watch&& watch = {}) {
    if constexpr (exit_decoding<Model>)
      if (config_.drafts > 0) return step_by_drafts(ctx, watch);
    const auto logits = batch_.decode_newest(ctx);
    const scratch<token_t> next(ctx, logits.rows());
    for (index_t r = 0; r < logits.rows(); ++r) {
      const index_t i = batch_.live[static_cast<std::size_t>(r)];
      const std::span<const scalar> row(logits.row(r), static_cast<std::size_t>(logits.cols()));
      watch(i, row);
      next[r] = sample_token<scalar>(row, config_.how, draw(i, 0, 0), ctx);
    }
    for (index_t r = 0; r < logits.rows(); ++r)
      batch_.append(batch_.live[static_cast<std::size_t>(r)], next[r], batch_.exit_of_row(r));
    return keep_going();
  }

  /// How many texts are not over.
  [[nodiscard]] index_t live() const { return batch_.rows(); }
  /// Prompt and continuation of text i.
  [[nodiscard]] std::span<const token_t> text(index_t i) const { return batch_.text(i); }
  /// Of a model with exits: the exit of each token behind the prompt of text i.
  [[nodiscard]] std::span<const std::int32_t> exits(index_t i) const { return batch_.exits(i); }
  /// All texts so far.
  [[nodiscard]] generation result() const {
    generation out;
    out.drafted = drafted_;
    out.accepted = accepted_;
    for (index_t i = 0; i < batch_.slots(); ++i) {
      const auto tokens = batch_.continuation(i);
      const auto exits = batch_.exits(i);
      out.tokens.emplace_back(tokens.begin(), tokens.end());
      out.exits.emplace_back(exits.begin(), exits.end());
    }
    detail::report_rows(batch_, out);
    return out;
  }

 private:
  /// The number for the token `ahead` of the end of text i; `purpose` tells the several numbers of one token apart.
  [[nodiscard]] double draw(index_t i, index_t ahead, std::uint64_t purpose) const {
    const rng_key key = key_.child(static_cast<std::uint64_t>(i));
    return uniform(purpose == 0 ? key : key.child(purpose), batch_.text(i).size() + static_cast<std::size_t>(ahead));
  }
  [[nodiscard]] bool over(index_t i) const {
    return detail::is_stop(config_, batch_.text(i).back()) ||
           (config_.most > 0 && static_cast<index_t>(batch_.continuation(i).size()) >= config_.most);
  }
  index_t keep_going() {
    std::erase_if(batch_.live, [&](index_t i) { return over(i); });
    return live();
  }

  /// Rows of each text in a round of drafts: none behind the last token that is wanted, or that the cache can hold.
  [[nodiscard]] index_t rows_of_round() const {
    index_t U = std::min(config_.drafts, placed_cache::reserve - 1) + 1;  // all of them may have to be taken back
    for (const index_t i : batch_.live) {
      U = std::min(U, batch_.room(i));
      if (config_.most > 0) U = std::min(U, config_.most - static_cast<index_t>(batch_.continuation(i).size()));
    }
    return U;
  }
  template <class Watch>
  index_t step_by_drafts(const context& ctx, Watch& watch) {
    batch_.read(ctx);
    const index_t R = live(), U = R == 0 ? 0 : rows_of_round(), V = batch_.classes(), D = model_->features();
    if (R == 0) return 0;
    const scratch<scalar> early(ctx, R * U, D), logits(ctx, R * U, V);
    const scratch<token_t> fed(ctx, R, U);                    // [r, u]: the token at position u of the round
    const scratch<double> q(ctx, R * (U - 1), V), p(ctx, V);  // by which fed[r, u + 1] was drawn: row r (U - 1) + u
    draft(early, fed.view(), q.view(), ctx);
    model_->verify(config_.draft_exit, early, logits, batch_.cache(), batch_.over_rows(U, ctx));
    drafted_ += R * (U - 1);
    for (index_t r = 0; r < R; ++r) {
      const index_t i = batch_.live[static_cast<std::size_t>(r)];
      index_t u = 0;
      for (bool stands = true; stands && (u == 0 || !over(i)); ++u) {
        const std::span<const scalar> row(logits.row(r * U + u), static_cast<std::size_t>(V));
        watch(i, row);
        token_probabilities<scalar>(row, config_.how, p.span(), ctx);
        stands = u + 1 < U;
        const token_t next =
            stands ? correct_token(fed.row(r)[u + 1], {q.row(r * (U - 1) + u), static_cast<std::size_t>(V)}, p.span(), draw(i, 0, 2), draw(i, 0, 3))
                   : draw_token(p.span(), draw(i, 0, 0));
        stands = stands && next == fed.row(r)[u + 1];
        accepted_ += stands;
        batch_.append(i, next, static_cast<std::int32_t>(stands ? config_.draft_exit : model_->exits()));
      }
      batch_.keep(i, u);
    }
    return keep_going();
  }
  /// Feeds each live text its newest token and drafts; their states after block draft_exit, and what they were drawn by.
  void draft(matrix_view<scalar> early, matrix_view<token_t> fed, matrix_view<double> q, const context& ctx) {
    const index_t R = fed.rows(), U = fed.cols(), V = q.cols();
    const scratch<scalar> x(ctx, R, early.cols()), logits(ctx, R, V);
    const scratch<token_t> ids(ctx, R);
    const context one = batch_.over_rows(1, ctx);
    for (index_t u = 0; u < U; ++u) {
      for (index_t r = 0; r < R; ++r) ids[r] = fed(r, u) = u == 0 ? batch_.text(batch_.live[static_cast<std::size_t>(r)]).back() : fed(r, u);
      model_->draft(config_.draft_exit, ids.span(), x, batch_.cache(), one);
      for (index_t r = 0; r < R; ++r) std::copy_n(x.row(r), early.cols(), early.row(r * U + u));
      if (u + 1 == U) return;
      model_->answer(config_.draft_exit, x, logits, ctx);
      for (index_t r = 0; r < R; ++r) {
        const std::span<double> by(q.row(r * (U - 1) + u), static_cast<std::size_t>(V));
        token_probabilities<scalar>({logits.row(r), by.size()}, config_.how, by, ctx);
        fed(r, u + 1) = draw_token(by, draw(batch_.live[static_cast<std::size_t>(r)], u, 1));
      }
    }
  }

  const Model* model_;
  generator_config config_;
  rng_key key_{};
  decoding_batch<Model> batch_;
  index_t drafted_ = 0, accepted_ = 0;
};

/// Continues all prompts until they are over, by `generator`. Throws config_error without a limit of new tokens, and as `generator` does.
template <token_decoder Model, class Watch = detail::watch_nothing>
[[nodiscard]] generation generate(const Model& model, std::span<const std::vector<token_t>> prompts, const generator_config& config, rng_key key = {},
                                  const context& ctx = {}, Watch&& watch = {}) {
  require<config_error>(config.most >= 1, "generate: expected a limit of at least 1 new token, got ", config.most);
  generator<Model> g(model, config);
  g.start(prompts, key, ctx);
  while (g.step(ctx, watch) > 0) continue;
  return g.result();
}

}  // namespace lithe::inline LITHE_ABI
