#pragma once

#include "lithe/layers/layer.hpp"

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

}  // namespace lithe::inline LITHE_ABI
