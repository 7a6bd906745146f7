#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/layer.hpp"
#include "lithe/layers/position_cache.hpp"

namespace lithe::inline LITHE_ABI {

/// Keys and values of `slots` sequences of up to `capacity` tokens, as `attend_few` reads them; what decoding layers build on.
template <class S>
struct key_value_cache : position_cache {
  index_t heads = 0, width = 0;
  std::vector<index_t> place;      ///< where the slot's keys and values stand
  std::vector<index_t> old_place;  // as old_length
  matrix<S> keys, values;          ///< (place, head, token) by row, each filled up to whole packets

  key_value_cache() = default;
  key_value_cache(const char* who, index_t slots, index_t tokens_in_slot, index_t heads_, index_t width_)
      : position_cache(who, slots, tokens_in_slot), heads(heads_), width(width_) {
    place.resize(length.size());
    for (index_t s = 0; s < slots; ++s) place[static_cast<std::size_t>(s)] = s;
    old_place = place;
    keys.resize(slots * heads * capacity, detail::tile::round_up<S>(width));
    values.resize(keys.rows(), keys.cols());
  }

  /// The first row of a head of a slot.
  [[nodiscard]] index_t row(index_t slot, index_t head) const { return row_at(place[static_cast<std::size_t>(slot)], head); }
  [[nodiscard]] index_t row_at(index_t where, index_t head) const { return (where * heads + head) * capacity; }

  /// Appends the keys and values of new rows, both [T x heads width].
  void append(matrix_view<const S> k, matrix_view<const S> v, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, k.rows()) - i, slot = ctx.slot(s);
      for (index_t h = 0; h < heads; ++h) {
        const index_t to = (row(slot, h) + tokens(slot)) * keys.cols();
        detail::tile::pad_rows<S>(k.slice_cols(h * width, width).slice_rows(i, n), keys.data() + to);
        detail::tile::pad_rows<S>(v.slice_cols(h * width, width).slice_rows(i, n), values.data() + to);
      }
    }
    advance(k.rows(), ctx);
  }
  /// Slot i becomes what slot order[i] was. Copies only what is wanted more than once; copy(from place, to place, tokens) does the same
  /// for whatever else a layer keeps by place.
  template <class Copy>
  void permute(const char* who, std::span<const index_t> order, Copy&& copy) {
    position_cache::permute(who, order);
    old_place.swap(place);
    std::fill(used.begin(), used.end(), std::uint8_t{0});
    for (const index_t from : order) used[static_cast<std::size_t>(old_place[static_cast<std::size_t>(from)])] = 1;
    std::size_t free = 0;
    // `used` is 2 once a slot has taken the place over; whoever comes later gets a copy in a place that nobody wants.
    for (std::size_t i = 0; i < order.size(); ++i) {
      const index_t from = old_place[static_cast<std::size_t>(order[i])];
      if (auto& state = used[static_cast<std::size_t>(from)]; state == 1) {
        state = 2;
        place[i] = from;
        continue;
      }
      while (used[free] != 0) ++free;
      used[free] = 2;
      place[i] = static_cast<index_t>(free);
      const index_t n = length[i];
      for (index_t h = 0; h < heads; ++h) {
        keys.middleRows(row_at(place[i], h), n) = keys.middleRows(row_at(from, h), n);
        values.middleRows(row_at(place[i], h), n) = values.middleRows(row_at(from, h), n);
      }
      copy(from, place[i], n);
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
