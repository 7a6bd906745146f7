#pragma once

#include <cmath>
#include <vector>

#include "lithe/kernels/top_k.hpp"
#include "lithe/layers/cache.hpp"

namespace lithe::inline LITHE_ABI {

/// How the next token is drawn from logits z: p ∝ exp(z / temperature) over the `top_k` most likely tokens, of these the fewest whose
/// probabilities reach `top_p` (nucleus sampling, arXiv 1904.09751).
struct sampling {
  double temperature = 1;  ///< 0 = the most likely token, the lowest of equals
  index_t top_k = 0;       ///< 0 = all
  double top_p = 1;
};

/// One token drawn from a row of logits by a number u in [0, 1). Throws config_error for settings out of range and state_error for
/// logits that are all NaN or -infinity.
template <class S>
token_t sample_token(std::span<const S> logits, const sampling& how, double u, const context& ctx) {
  require<config_error>(how.temperature >= 0 && std::isfinite(how.temperature), "sampling: expected a temperature of at least 0, got ",
                        how.temperature);
  require<config_error>(how.top_k >= 0, "sampling: expected top_k of at least 0, got ", how.top_k);
  require<config_error>(how.top_p > 0 && how.top_p <= 1, "sampling: expected top_p in (0, 1], got ", how.top_p);
  const auto n = static_cast<index_t>(logits.size());
  require<shape_error>(n > 0, "sampling: expected logits, got none");
  const index_t k = how.temperature == 0 ? 1 : how.top_k == 0 ? n : std::min(n, how.top_k);
  const scratch<S> value(ctx, k);
  const scratch<std::int32_t> token(ctx, k);
  top_k_row<S>(logits.data(), n, k, value.data(), token.data(), ctx);
  require<state_error>(value[0] > -std::numeric_limits<S>::infinity(), "sampling: no logit is a number above -infinity");
  if (k == 1) return token[0];
  const scratch<double> p(ctx, k);
  double total = 0;
  for (index_t i = 0; i < k; ++i) total += p[i] = value[i] == value[0] ? 1 : std::exp(static_cast<double>(value[i] - value[0]) / how.temperature);
  double kept = 0, drawn = 0;
  index_t count = 0;
  while (count < k && kept < how.top_p * total) kept += p[count++];
  for (index_t i = 0; i < count; ++i)
    if ((drawn += p[i]) > u * kept) return token[i];
  return token[count - 1];
}

struct generator_config {
  index_t capacity = 0;  ///< tokens of one sequence that the model sees; beyond them it goes on from the last half
  sampling how{};
  std::vector<token_t> stop{};  ///< tokens that end a sequence; they stay in its text
};

/// Continues token sequences of different lengths side by side, with decode caches:
///
///     generator<Model> g(model, {.capacity = 256, .how = {.temperature = 0.7}});
///     g.start(prompts, key, ctx);
///     while (g.live() > 0 && n-- > 0) g.step(ctx);      // one token for each sequence that has not stopped
///     g.text(i);                                        // prompt and continuation
///
/// Model: a layer from tokens to logits that can decode. Prompts are read in one pass. A sequence's draws depend on the key, its number
/// and its length, not on what stands beside it. Steps allocate nothing once `reserve`d, unless a text outgrows its capacity.
template <layer Model>
  requires std::same_as<input_of<Model>, std::span<const token_t>>
class generator {
 public:
  using scalar = typename Model::scalar;

  /// The model must outlive the generator. Throws config_error for a capacity below 2.
  generator(const Model& model, generator_config config) : model_(&model), config_(std::move(config)) {
    require<config_error>(config_.capacity >= 2, "generator: expected a capacity of at least 2 tokens, got ", config_.capacity);
  }

  /// Takes the prompts, each of at least one token. Throws shape_error for an empty one.
  void start(std::span<const std::vector<token_t>> prompts, rng_key key, const context& ctx) {
    for (std::size_t i = 0; i < prompts.size(); ++i)
      require<shape_error>(!prompts[i].empty(), "generator: prompt ", i, " is empty, expected at least one token");
    key_ = key;
    texts_.assign(prompts.begin(), prompts.end());
    cached_.assign(prompts.size(), {});
    live_.clear();
    for (std::size_t i = 0; i < prompts.size(); ++i) live_.push_back(static_cast<index_t>(i));
    cache_ = make_cache(*model_, static_cast<index_t>(prompts.size()), config_.capacity);
    if (!live_.empty()) logits_.resize(live(), model_->output_shape(std::span(texts_[0]).first(1)).cols);
    read(ctx);
  }
  /// Room for texts of `length` tokens.
  void reserve(index_t length) {
    for (auto& t : texts_) t.reserve(static_cast<std::size_t>(length));
  }

  /// Appends one token to every sequence that has not stopped; the sequences that still have not.
  index_t step(const context& ctx) {
    read(ctx);
    const index_t n = live();
    if (n == 0) return 0;
    fresh_.clear();
    offsets_.assign(1, 0);
    for (const index_t i : live_) {
      fresh_.push_back(text_of(i).back());
      offsets_.push_back(static_cast<index_t>(fresh_.size()));
      ++cached_[static_cast<std::size_t>(i)].count;
    }
    const matrix_view<scalar> logits = matrix_view<scalar>(logits_).slice_rows(0, n);
    decode(*model_, std::span<const token_t>(fresh_), logits, cache_, over(ctx));
    index_t still = 0;
    for (index_t r = 0; r < n; ++r) {
      const index_t i = live_[static_cast<std::size_t>(r)];
      auto& text = text_of(i);
      const double u = uniform(key_.child(static_cast<std::uint64_t>(i)), text.size());
      text.push_back(sample_token<scalar>({logits.row(r), static_cast<std::size_t>(logits.cols())}, config_.how, u, ctx));
      if (std::find(config_.stop.begin(), config_.stop.end(), text.back()) == config_.stop.end()) live_[static_cast<std::size_t>(still++)] = i;
    }
    live_.resize(static_cast<std::size_t>(still));
    return still;
  }

  [[nodiscard]] index_t live() const { return static_cast<index_t>(live_.size()); }
  [[nodiscard]] std::span<const token_t> text(index_t sequence) const { return texts_[static_cast<std::size_t>(sequence)]; }

 private:
  struct window {
    std::size_t start = 0, count = 0;  // the tokens of the text that are in the cache
  };

  std::vector<token_t>& text_of(index_t i) { return texts_[static_cast<std::size_t>(i)]; }

  /// Brings all tokens but the newest into the caches; a full cache starts again from half of what it may hold.
  void read(const context& ctx) {
    fresh_.clear();
    offsets_.assign(1, 0);
    for (const index_t i : live_) {
      const auto& text = text_of(i);
      window& w = cached_[static_cast<std::size_t>(i)];
      const auto capacity = static_cast<std::size_t>(config_.capacity);
      if (text.size() - w.start > capacity) {
        w = {text.size() - std::max<std::size_t>(1, capacity / 2), 0};
        truncate(*model_, cache_, i, 0);
      }
      const auto from = text.begin() + static_cast<std::ptrdiff_t>(w.start + w.count);
      w.count += static_cast<std::size_t>(text.end() - 1 - from);
      fresh_.insert(fresh_.end(), from, text.end() - 1);
      offsets_.push_back(static_cast<index_t>(fresh_.size()));
    }
    if (!fresh_.empty()) fill(*model_, std::span<const token_t>(fresh_), cache_, over(ctx));
  }
  /// The rows of `fresh_` belong to the live sequences.
  [[nodiscard]] context over(context ctx) const {
    ctx.rows = {offsets_};
    ctx.slots = live_;
    return ctx;
  }

  const Model* model_;
  generator_config config_;
  rng_key key_{};
  std::vector<std::vector<token_t>> texts_;
  std::vector<window> cached_;
  std::vector<index_t> live_, offsets_;
  std::vector<token_t> fresh_;
  matrix<scalar> logits_;
  cache_of<Model> cache_{};
};

}  // namespace lithe::inline LITHE_ABI
