#pragma once

#include "lithe/layers/parameters.hpp"

namespace lithe::inline LITHE_ABI {

/// Whether a layer's output at one token depends on other tokens. Containers answer for their parts; other layers do if they have a
/// cache.
template <class L>
inline constexpr bool looks_across_tokens = requires { typename L::cache; };
template <class L>
  requires requires { L::looks_across; }
inline constexpr bool looks_across_tokens<L> = L::looks_across;

namespace detail {

template <class L>
consteval bool explain_decoding() {
  static_assert(cached_layer<L> || !looks_across_tokens<L>, "lithe: this layer looks across tokens but has no cache, so it cannot decode as a part of "
                                                            "another; a stack with exits decodes in an exit_decoder.");
  return true;
}

}  // namespace detail

// The decode interface for any layer: a position-wise one has no cache and decodes by its forward.

/// A cache for `slots` sequences of up to `capacity` tokens.
template <class L>
[[nodiscard]] cache_of<L> make_cache(const L& l, index_t slots, index_t capacity) {
  static_assert(detail::explain_decoding<L>());
  if constexpr (cached_layer<L>)
    return l.make_cache(slots, capacity);
  else
    return {};
}
/// y = the outputs of the new rows x, given what the cache holds; appends x to the cache.
template <class L>
void decode(const L& l, input_of<L> x, matrix_view<typename L::scalar> y, cache_of<L>& c, const context& ctx) {
  if constexpr (cached_layer<L>)
    l.decode(x, y, c, ctx);
  else
    l.forward(x, y, ctx);
}
/// Appends x to the cache only.
template <class L>
void fill(const L& l, input_of<L> x, cache_of<L>& c, const context& ctx) {
  if constexpr (cached_layer<L>) l.fill(x, c, ctx);
}
/// The shortest length but 0 that `truncate` can cut a slot to: above 0 only for layers that keep a window of their
/// tokens, and what is made of them.
template <class L>
[[nodiscard]] index_t least_length(const L& l, const cache_of<L>& c, index_t slot) {
  if constexpr (requires { l.least_length(c, slot); })
    return l.least_length(c, slot);
  else
    return 0;
}
/// Forgets all but the first `length` tokens of a slot.
template <class L>
void truncate(const L& l, cache_of<L>& c, index_t slot, index_t length) {
  if constexpr (cached_layer<L>) l.truncate(c, slot, length);
}
/// Slot i becomes what slot order[i] was (beam search).
template <class L>
void permute(const L& l, cache_of<L>& c, std::span<const index_t> order) {
  if constexpr (cached_layer<L>) l.permute(c, order);
}

/// The longest sequence that all layers of a model take (learned positions end); the largest index_t if any length will
/// do.
template <class L>
[[nodiscard]] index_t longest_sequence(const L& model) {
  index_t longest = std::numeric_limits<index_t>::max();
  const auto ask = [&](const std::string&, const auto& part) {
    if constexpr (requires { part.longest_sequence(); }) longest = std::min(longest, part.longest_sequence());
  };
  if constexpr (has_parameters<L>)
    walk(
        ask, [](const auto&...) {}, "", model);
  else
    ask("", model);
  return longest;
}

namespace detail {

/// Throws index_error if a slot cannot be cut to `length`: what has parts asks before it cuts the first of them.
inline void check_cut(const char* who, index_t least, index_t slot, index_t length) {
  require<index_error>(length == 0 || length >= least, who, ": slot ", slot,
                       " keeps a window of its last tokens: expected to keep 0 or at least ", least, ", got ", length);
}

/// Throws state_error for a cache of another number of blocks.
inline void check_blocks(const char* who, std::size_t blocks, std::size_t caches) {
  require<state_error>(caches == blocks, who, ": the cache is of another model: expected one of ", blocks,
                       " blocks, got ", caches);
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
