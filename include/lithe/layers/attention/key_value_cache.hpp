#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/layer.hpp"
#include "lithe/layers/position_cache.hpp"

namespace lithe::inline LITHE_ABI {

/// Keys and values of `slots` sequences of up to `capacity` tokens, as `attend_few` reads them; what decoding layers build on.
template <class S>
struct key_value_cache : placed_cache {
  index_t heads = 0, width = 0;
  matrix<S> keys, values;  ///< (place, head, token) by row, each filled up to whole packets

  key_value_cache() = default;
  /// Empty slots; throws config_error in the name of `who` for sizes that a cache cannot have.
  key_value_cache(const char* who, index_t slots, index_t tokens_in_slot, index_t heads_, index_t width_)
      : placed_cache(who, slots, tokens_in_slot), heads(heads_), width(width_) {
    keys.resize(slots * heads * capacity, detail::tile::round_up<S>(width));
    values.resize(keys.rows(), keys.cols());
  }

  /// The first row of a head of a slot.
  [[nodiscard]] index_t row(index_t slot, index_t head) const { return row_at(place[static_cast<std::size_t>(slot)], head); }
  /// The first row of a head of the slot that keeps its rows in place `where`.
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
  /// Slot i becomes what slot order[i] was. copy(from place, to place, tokens) does for whatever else a layer keeps by place what is done for keys
  /// and values.
  template <class Copy>
  void permute(const char* who, std::span<const index_t> order, Copy&& copy) {
    placed_cache::permute(who, order, [&](index_t from, index_t to, index_t n) {
      for (index_t h = 0; h < heads; ++h) {
        keys.middleRows(row_at(to, h), n) = keys.middleRows(row_at(from, h), n);
        values.middleRows(row_at(to, h), n) = values.middleRows(row_at(from, h), n);
      }
      copy(from, to, n);
    });
  }
};

}  // namespace lithe::inline LITHE_ABI
