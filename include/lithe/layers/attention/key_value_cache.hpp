#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/layer.hpp"

namespace lithe::inline LITHE_ABI {

/// Keys and values of `slots` sequences of up to `capacity` tokens, as `attend_few` reads them; what decoding layers build on.
template <class S>
struct key_value_cache {
  index_t capacity = 0, heads = 0, width = 0;
  std::vector<index_t> length;     ///< tokens in each slot
  std::vector<index_t> place;      ///< where the slot's keys and values stand
  std::vector<index_t> old_place;  // `permute` needs them and must not allocate
  std::vector<std::uint8_t> used;
  matrix<S> keys, values;  ///< (place, head, token) by row, each filled up to whole packets

  key_value_cache() = default;
  key_value_cache(const char* who, index_t slots, index_t capacity_, index_t heads_, index_t width_)
      : capacity(capacity_), heads(heads_), width(width_) {
    require<config_error>(slots >= 0 && capacity >= 0, who, ": expected a cache of 0 or more slots and tokens, got ", slots, " and ", capacity);
    length.assign(static_cast<std::size_t>(slots), 0);
    place.resize(length.size());
    for (index_t s = 0; s < slots; ++s) place[static_cast<std::size_t>(s)] = s;
    old_place = place;
    used.resize(length.size());
    keys.resize(slots * heads * capacity, detail::tile::round_up<S>(width));
    values.resize(keys.rows(), keys.cols());
  }

  [[nodiscard]] index_t tokens(index_t slot) const { return length[static_cast<std::size_t>(slot)]; }
  /// The first row of a head of a slot.
  [[nodiscard]] index_t row(index_t slot, index_t head) const { return row_at(place[static_cast<std::size_t>(slot)], head); }
  [[nodiscard]] index_t row_at(index_t where, index_t head) const { return (where * heads + head) * capacity; }

  /// Throws, before anything has changed, unless the T new rows that ctx describes fit their slots.
  void check(const char* who, index_t T, const context& ctx) {
    ctx.rows.check(who, T);
    require<state_error>(ctx.mask.empty(), who, ": decoding takes no padding; leave the rows out");
    require<shape_error>(ctx.slots.empty() || static_cast<index_t>(ctx.slots.size()) == ctx.rows.count(), who, ": expected a slot for each of ",
                         ctx.rows.count(), " sequences, got ", ctx.slots.size());
    std::fill(used.begin(), used.end(), std::uint8_t{0});
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t slot = ctx.slot(s), n = ctx.rows.end(s, T) - ctx.rows.begin(s);
      check_slot(who, slot);
      require<state_error>(used[static_cast<std::size_t>(slot)]++ == 0, who, ": slot ", slot, " comes twice in one call");
      require<state_error>(tokens(slot) + n <= capacity, who, ": slot ", slot, " holds ", tokens(slot), " of ", capacity, " tokens; ", n,
                           " more do not fit");
    }
  }
  /// Appends the keys and values of new rows, both [T x heads width].
  void append(matrix_view<const S> k, matrix_view<const S> v, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s) {
      const index_t i = ctx.rows.begin(s), n = ctx.rows.end(s, k.rows()) - i, slot = ctx.slot(s);
      for (index_t h = 0; h < heads; ++h) {
        const index_t to = (row(slot, h) + tokens(slot)) * keys.cols();
        detail::tile::pad_rows<S>(k.slice_cols(h * width, width).slice_rows(i, n), keys.data() + to);
        detail::tile::pad_rows<S>(v.slice_cols(h * width, width).slice_rows(i, n), values.data() + to);
      }
      length[static_cast<std::size_t>(slot)] += n;
    }
  }
  /// Forgets all but the first n tokens of a slot.
  void truncate(const char* who, index_t slot, index_t n) {
    check_slot(who, slot);
    require<index_error>(n >= 0 && n <= tokens(slot), who, ": expected to keep 0 to ", tokens(slot), " tokens of slot ", slot, ", got ", n);
    length[static_cast<std::size_t>(slot)] = n;
  }
  /// Slot i becomes what slot order[i] was. Copies only what is wanted more than once; copy(from place, to place, tokens) does the same
  /// for whatever else a layer keeps by place.
  template <class Copy>
  void permute(const char* who, std::span<const index_t> order, Copy&& copy) {
    require<shape_error>(order.size() == length.size(), who, ": expected an order of ", length.size(), " slots, got ", order.size());
    for (const index_t from : order) check_slot(who, from);
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
      const index_t n = tokens(order[i]);
      for (index_t h = 0; h < heads; ++h) {
        keys.middleRows(row_at(place[i], h), n) = keys.middleRows(row_at(from, h), n);
        values.middleRows(row_at(place[i], h), n) = values.middleRows(row_at(from, h), n);
      }
      copy(from, place[i], n);
    }
    // The lengths follow their places, for which `old_place` is done with.
    for (std::size_t i = 0; i < order.size(); ++i) old_place[i] = tokens(order[i]);
    length.swap(old_place);
  }

 private:
  void check_slot(const char* who, index_t slot) const {
    require<index_error>(slot >= 0 && slot < static_cast<index_t>(length.size()), who, ": expected a slot below ", length.size(), ", got ", slot);
  }
};

}  // namespace lithe::inline LITHE_ABI
