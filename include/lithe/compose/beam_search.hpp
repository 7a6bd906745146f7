#pragma once

#include <numeric>

#include "lithe/compose/generator.hpp"

// B prompts, V tokens of a vocabulary
namespace lithe::inline LITHE_ABI {

namespace detail {

/// One search: the slots of a prompt are its beams, the first `alive` of them in use.
template <class Model>
class beam_search {
 public:
  using S = typename Model::scalar;

  beam_search(const Model& model, index_t prompts, index_t beams, const generator_config& config)
      : config_(config), beams_(beams), batch_(model), log_p_(at(prompts * beams), 0.0), alive_(at(prompts), 1) {
    out_.tokens.resize(at(prompts));
    out_.exits.resize(at(prompts));
    out_.scores.assign(at(prompts), impossible);
  }
  generation run(std::span<const std::vector<token_t>> prompts, const context& ctx) {
    batch_.start(prompts, beams_, capacity_for(config_, prompts), ctx);
    order_.resize(at(batch_.slots()));
    log_row_.resize(at(batch_.classes()));
    for (index_t t = 1; t <= config_.most; ++t) {
      batch_.live.clear();  // the first step has one beam for each prompt
      for (std::size_t b = 0; b < alive_.size(); ++b)
        for (index_t k = 0; k < alive_[b]; ++k) batch_.live.push_back(static_cast<index_t>(b) * beams_ + k);
      if (batch_.live.empty()) break;
      const auto logits = batch_.decode_newest(ctx);
      std::iota(order_.begin(), order_.end(), index_t{0});
      chosen_.clear();
      for (index_t b = 0, row = 0; b < static_cast<index_t>(alive_.size()); ++b) {
        const index_t n = alive_[at(b)];
        if (n > 0) choose(b, row, logits.slice_rows(row, n));
        row += n;
      }
      batch_.permute(order_);
      for (const choice& c : chosen_) {
        batch_.append(c.slot, c.token, c.exit);
        log_p_[at(c.slot)] = c.log_p;
      }
      if (t == config_.most) finish_all();
    }
    report_rows(batch_, out_);
    return std::move(out_);
  }

 private:
  struct choice {
    double log_p;
    index_t slot;  // before it is taken: the beam that it continues
    token_t token;
    std::int32_t exit;
  };
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

  /// Keeps the best continuations of the beams of prompt b, whose logits these are: row `first` of the step and those behind it.
  void choose(index_t b, index_t first, matrix_view<const S> logits) {
    candidates_.clear();
    for (index_t k = 0; k < logits.rows(); ++k) {
      token_log_probabilities<S>({logits.row(k), log_row_.size()}, log_row_);
      for (std::size_t v = 0; v < log_row_.size(); ++v)
        if (log_row_[v] > impossible)
          candidates_.push_back(
              {log_p_[at(b * beams_ + k)] + log_row_[v], k, static_cast<token_t>(v), batch_.exit_of_row(first + k)});
    }
    // Each beam can end in as many ways as there are stop tokens; behind these stand as many as go on.
    const auto wanted = std::min(candidates_.size(), (config_.stop.size() + 1) * at(beams_));
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(wanted), candidates_.end(),
                      [](const choice& p, const choice& q) {
                        return p.log_p != q.log_p ? p.log_p > q.log_p : p.slot != q.slot ? p.slot < q.slot : p.token < q.token;
                      });
    index_t& taken = alive_[at(b)] = 0;
    for (std::size_t i = 0; i < wanted && taken < beams_; ++i) {
      choice c = candidates_[i];
      const index_t from = b * beams_ + c.slot;
      if (is_stop(config_, c.token)) {
        finish(b, from, c.log_p, &c);
        continue;
      }
      c.slot = b * beams_ + taken++;
      order_[at(c.slot)] = from;
      chosen_.push_back(c);
    }
    for (; taken > 0 && !can_win(b, chosen_.back().log_p); --taken) {
      order_[at(chosen_.back().slot)] = chosen_.back().slot;
      chosen_.pop_back();
    }
  }
  /// Whether a text with this log probability may still end better than the best of its prompt: log p only falls, over
  /// at most `most` tokens.
  [[nodiscard]] bool can_win(index_t b, double log_p) const {
    return log_p / static_cast<double>(config_.most) > out_.scores[at(b)];
  }
  /// Keeps the text of a slot, with one more token if it ends with it, if it is the best of its prompt so far.
  void finish(index_t b, index_t slot, double log_p, const choice* end) {
    const auto tokens = batch_.continuation(slot);
    const auto exits = batch_.exits(slot);
    const double score = log_p / static_cast<double>(std::max<std::size_t>(1, tokens.size() + (end != nullptr)));
    if (!(score > out_.scores[at(b)])) return;
    out_.scores[at(b)] = score;
    out_.tokens[at(b)].assign(tokens.begin(), tokens.end());
    out_.exits[at(b)].assign(exits.begin(), exits.end());
    if (end == nullptr) return;
    out_.tokens[at(b)].push_back(end->token);
    if constexpr (exit_decoding<Model>) out_.exits[at(b)].push_back(end->exit);
  }
  /// At the last step: the best of what is left of the prompts of which nothing has ended.
  void finish_all() {
    for (index_t b = 0; b < static_cast<index_t>(alive_.size()); ++b) {
      const bool ended = out_.scores[at(b)] > impossible;
      for (index_t k = 0; !ended && k < alive_[at(b)]; ++k)
        finish(b, b * beams_ + k, log_p_[at(b * beams_ + k)], nullptr);
    }
  }

  static constexpr double impossible = -std::numeric_limits<double>::infinity();
  const generator_config& config_;
  index_t beams_;
  decoding_batch<Model> batch_;
  std::vector<double> log_p_, log_row_;  // of each slot, of each token behind one of them
  std::vector<index_t> alive_, order_;
  std::vector<choice> candidates_, chosen_;
  generation out_;
};

}  // namespace detail

/// Beam search: for each prompt the `beams` best continuations by Σ log p are kept; what ends is scored by Σ log p /
/// length, and the best of those (of what is left at `most` tokens, if none has ended) is the result. A beam goes on
/// while it may still end better than the best ending so far, that is while Σ log p / most is larger, since no token
/// adds to Σ log p: an early ending does not stop the search, `most` bounds its cost. With as many beams as there are
/// texts that go on, the result is the best of all texts that end. One beam without stop tokens is greedy.
///
/// The prompt is read once. A token whose logit is no number, or -infinity, is never taken; beside +infinity only
/// +infinity is; of equals the lower beam, then the lower token comes first. With exits every beam's tokens have exits
/// of their own. Nothing is drawn: `config.how` and drafts have no part in it. Throws config_error unless beams >= 1
/// and config.most >= 1, state_error for a row of logits that are all NaN or -infinity, and as `generator` does.
template <token_decoder Model>
[[nodiscard]] generation generate_by_beams(const Model& model, std::span<const std::vector<token_t>> prompts, index_t beams,
                                           const generator_config& config, const context& ctx = {}) {
  require<config_error>(beams >= 1, "generate_by_beams: expected at least 1 beam, got ", beams);
  require<config_error>(config.most >= 1, "generate_by_beams: expected a limit of at least 1 new token, got ", config.most);
  return detail::beam_search<Model>(model, static_cast<index_t>(prompts.size()), beams, config).run(prompts, ctx);
}

}  // namespace lithe::inline LITHE_ABI
