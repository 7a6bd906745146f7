#pragma once

#include <vector>

#include "lithe/layers/cache.hpp"
#include "lithe/layers/position_cache.hpp"
#include "lithe/tensor/scratch.hpp"

// V tokens of a vocabulary, a slot is one text's place in the cache
namespace lithe::inline LITHE_ABI {

/// A model that continues texts: a layer from tokens to logits [V] that can decode, or an `exit_decoder`.
template <class M>
concept token_decoder = requires {
  typename M::scalar;
}
&&requires(const M& m, std::span<const token_t> ids, matrix_view<typename M::scalar> y, typename M::cache c, const context& ctx, index_t n,
           std::span<const index_t> order) {
  { m.output_shape(ids) } -> std::same_as<shape>;
  { m.make_cache(n, n) } -> std::same_as<typename M::cache>;
  m.decode(ids, y, c, ctx);
  m.fill(ids, c, ctx);
  m.truncate(c, n, n);
  m.permute(c, order);
};

/// A `token_decoder` whose rows leave at exits of their own: its cache says where each row of the last step left.
template <class M>
concept exit_decoding = token_decoder<M> && requires(const M& m, const typename M::cache& c, index_t row) {
  { m.exits() } -> std::same_as<index_t>;
  { c.exits[0] } -> std::convertible_to<std::int32_t>;
};

/// Texts that grow side by side in one cache: what every way to generate shares. All tokens of a text but its newest
/// are in the cache; a text that outgrows the capacity, or the learned positions of the model, goes on from its last
/// half. Only the `live` slots take part in a step. Used through `generator` and `generate_by_beams`.
template <token_decoder Model>
class decoding_batch {
 public:
  using scalar = typename Model::scalar;

  /// The model must outlive the batch.
  explicit decoding_batch(const Model& model) : model_(&model) {}

  /// Takes the prompts, each into `copies` slots side by side, and reads each once: the first of its slots is live, and
  /// the others have a place in the cache that `permute` fills. Throws shape_error for an empty one.
  void start(std::span<const std::vector<token_t>> prompts, index_t copies, index_t capacity, const context& ctx) {
    for (std::size_t i = 0; i < prompts.size(); ++i)
      require<shape_error>(!prompts[i].empty(), "generator: prompt ", i, " is empty, expected at least one token");
    texts_.clear();
    prompt_lengths_.clear();
    for (const auto& p : prompts) {
      texts_.insert(texts_.end(), static_cast<std::size_t>(copies), p);
      prompt_lengths_.insert(prompt_lengths_.end(), static_cast<std::size_t>(copies), p.size());
    }
    capacity = std::min(capacity, longest_sequence(*model_));
    capacity_ = static_cast<std::size_t>(capacity);
    exits_.assign(texts_.size(), {});
    windows_.assign(texts_.size(), {});
    live.clear();
    for (index_t s = 0; s < slots(); s += copies) live.push_back(s);
    cache_ = model_->make_cache(slots(), capacity);
    if (live.empty()) return;
    if constexpr (requires { model_->start(index_t{}, cache_); }) model_->start(static_cast<index_t>(prompts.size()), cache_);
    logits_.resize(slots(), model_->output_shape(std::span(texts_[0]).first(1)).cols);
    read(ctx);
  }
  /// Room for texts of `length` tokens.
  void reserve(index_t length) {
    for (auto& t : texts_) t.reserve(static_cast<std::size_t>(length));
    for (auto& e : exits_) e.reserve(static_cast<std::size_t>(length));
  }

  /// The logits behind the newest token of each live text, in their order.
  matrix_view<const scalar> decode_newest(const context& ctx) {
    read(ctx);
    const matrix_view<scalar> logits = matrix_view<scalar>(logits_).slice_rows(0, rows());
    if (live.empty()) return logits;
    fresh_.clear();
    for (const index_t s : live) fresh_.push_back(text(s).back());
    model_->decode(fresh_, logits, cache_, over_rows(1, ctx));
    for (const index_t s : live) ++window_of(s).count;
    return logits;
  }
  /// The exit at which row r of the last step left; 0 for a model without exits.
  [[nodiscard]] std::int32_t exit_of_row(index_t r) const {
    if constexpr (exit_decoding<Model>)
      return cache_.exits[static_cast<std::size_t>(r)];
    else
      return 0;
  }
  /// Puts a token behind the text of a slot, and keeps the exit that gave it if the model has exits.
  void append(index_t slot, token_t token, std::int32_t exit) {
    texts_[static_cast<std::size_t>(slot)].push_back(token);
    if constexpr (exit_decoding<Model>) exits_[static_cast<std::size_t>(slot)].push_back(exit);
  }
  /// Slot s becomes what slot order[s] was.
  void permute(std::span<const index_t> order) {
    model_->permute(cache_, order);
    const auto reorder = [&](auto& of_slots) {
      const auto before = of_slots;
      for (std::size_t s = 0; s < order.size(); ++s) of_slots[s] = before[static_cast<std::size_t>(order[s])];
    };
    reorder(texts_);
    reorder(exits_);
    reorder(windows_);
  }

  /// Brings all tokens but the newest into the cache.
  void read(const context& ctx) {
    fresh_.clear();
    reading_.clear();
    offsets_.assign(1, 0);
    for (const index_t s : live) {
      const auto t = text(s);
      window& w = window_of(s);
      if (t.size() - w.start > capacity_) {
        w = {t.size() - std::max<std::size_t>(1, capacity_ / 2), 0};
        model_->truncate(cache_, s, 0);
      }
      const auto from = t.begin() + static_cast<std::ptrdiff_t>(w.start + w.count);
      if (from == t.end() - 1) continue;
      w.count += static_cast<std::size_t>(t.end() - 1 - from);
      fresh_.insert(fresh_.end(), from, t.end() - 1);
      reading_.push_back(s);
      offsets_.push_back(static_cast<index_t>(fresh_.size()));
    }
    if (!reading_.empty()) model_->fill(fresh_, cache_, over(reading_, ctx));
  }
  /// Rows of the next call: n for each live slot.
  [[nodiscard]] context over_rows(index_t n, const context& ctx) {
    offsets_.resize(live.size() + 1);
    for (std::size_t i = 0; i < offsets_.size(); ++i) offsets_[i] = static_cast<index_t>(i) * n;
    return over(live, ctx);
  }
  /// Tokens that fit a slot's cache beside those that are there.
  [[nodiscard]] index_t room(index_t slot) const { return static_cast<index_t>(capacity_ - windows_[static_cast<std::size_t>(slot)].count); }
  /// After a model has taken more rows of a slot: `kept` of them stay in the cache.
  void keep(index_t slot, index_t kept) {
    auto& count = window_of(slot).count;
    count += static_cast<std::size_t>(kept);
    model_->truncate(cache_, slot, static_cast<index_t>(count));
  }

  /// How many texts there are, live or not.
  [[nodiscard]] index_t slots() const { return static_cast<index_t>(texts_.size()); }
  /// How many rows the next step has: the live texts.
  [[nodiscard]] index_t rows() const { return static_cast<index_t>(live.size()); }
  [[nodiscard]] index_t classes() const { return logits_.cols(); }
  /// Prompt and continuation of a slot.
  [[nodiscard]] std::span<const token_t> text(index_t slot) const { return texts_[static_cast<std::size_t>(slot)]; }
  /// The exit of each token behind the prompt; empty for a model without exits.
  [[nodiscard]] std::span<const std::int32_t> exits(index_t slot) const { return exits_[static_cast<std::size_t>(slot)]; }
  /// The text behind the prompt.
  [[nodiscard]] std::span<const token_t> continuation(index_t slot) const {
    return text(slot).subspan(prompt_lengths_[static_cast<std::size_t>(slot)]);
  }
  /// What the model remembers of all slots.
  [[nodiscard]] typename Model::cache& cache() { return cache_; }
  /// What the model remembers of all slots.
  [[nodiscard]] const typename Model::cache& cache() const { return cache_; }

  std::vector<index_t> live;  ///< the slots that take part, in the order of the rows

 private:
  struct window {
    std::size_t start = 0, count = 0;  // the tokens of the text that are in the cache
  };
  [[nodiscard]] window& window_of(index_t slot) { return windows_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] context over(std::span<const index_t> who, context ctx) const {
    ctx.rows = {offsets_};
    ctx.slots = who;
    return ctx;
  }

  const Model* model_;
  std::size_t capacity_ = 0;
  std::vector<std::vector<token_t>> texts_;
  std::vector<std::vector<std::int32_t>> exits_;
  std::vector<std::size_t> prompt_lengths_;
  std::vector<window> windows_;
  std::vector<index_t> offsets_, reading_;  // reading_: the slots that take tokens in
  std::vector<token_t> fresh_;
  matrix<scalar> logits_;
  typename Model::cache cache_{};
};

}  // namespace lithe::inline LITHE_ABI
