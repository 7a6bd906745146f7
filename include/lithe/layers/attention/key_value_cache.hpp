#pragma once

#include "lithe/kernels/attention_decode.hpp"
#include "lithe/layers/layer.hpp"
#include "lithe/layers/position_cache.hpp"

namespace lithe::inline LITHE_ABI {

/// Keys and values of `slots` sequences of up to `capacity` tokens, or of their windows, as `attend_few` reads them;
/// what decoding layers build on.
template <class S>
struct key_value_cache : placed_cache {
  index_t heads = 0, width = 0;
  matrix<S> keys, values;  ///< (place, head, token) by row, each filled up to whole packets

  key_value_cache() = default;
  /// Empty slots; throws config_error in the name of `who` for sizes that a cache cannot have.
  key_value_cache(const char* who, index_t slots, index_t tokens_in_slot, index_t heads_, index_t width_)
      : key_value_cache(placed_cache(who, slots, tokens_in_slot), heads_, width_) {}
  /// The same for empty slots that may keep a window alone.
  key_value_cache(placed_cache slots, index_t heads_, index_t width_)
      : placed_cache(std::move(slots)), heads(heads_), width(width_) {
    keys.resize(static_cast<index_t>(length.size()) * heads * room, detail::tile::round_up<S>(width));
    values.resize(keys.rows(), keys.cols());
  }

  /// The first row of a head of a slot.
  [[nodiscard]] index_t row(index_t slot, index_t head) const { return row_at(place[static_cast<std::size_t>(slot)], head); }
  /// The first row of a head of the slot that keeps its rows in place `where`.
  [[nodiscard]] index_t row_at(index_t where, index_t head) const { return (where * heads + head) * room; }

  /// Throws, before anything has changed, unless the cache is one of so many heads and the T new rows that ctx
  /// describes fit their slots.
  void check(const char* who, index_t T, const context& ctx, index_t heads_, index_t width_) {
    require<state_error>(heads == heads_ && width == width_, who, ": the cache is of another layer: expected ", heads_,
                         " heads of width ", width_, ", got ", heads, " of ", width);
    position_cache::check(who, T, ctx);
  }
  /// Appends the keys and values of new rows, both [T x heads width].
  void append(matrix_view<const S> k, matrix_view<const S> v, const context& ctx) {
    for (index_t s = 0; s < ctx.rows.count(); ++s)
      for (index_t i = ctx.rows.begin(s), end = ctx.rows.end(s, k.rows()); i < end;)
        i += append(ctx.slot(s), k.slice_rows(i, end - i), v.slice_rows(i, end - i));
  }
  /// Appends the first keys and values of new rows of one slot, as many as its place has room for; how many.
  index_t append(index_t slot, matrix_view<const S> k, matrix_view<const S> v) {
    const index_t W = keys.cols(), n = make_room(slot, k.rows(), [&](index_t where, index_t from, index_t rows) {
                                     for (index_t h = 0; h < heads; ++h)
                                       for (matrix<S>* m : {&keys, &values}) {
                                         S* const to = m->data() + row_at(where, h) * W;
                                         std::copy_n(to + from * W, rows * W, to);
                                       }
                                   });
    const index_t behind = tokens(slot) - first[static_cast<std::size_t>(slot)];
    for (index_t h = 0; h < heads; ++h) {
      const index_t to = (row(slot, h) + behind) * W;
      detail::tile::pad_rows<S>(k.slice_cols(h * width, width).slice_rows(0, n), keys.data() + to);
      detail::tile::pad_rows<S>(v.slice_cols(h * width, width).slice_rows(0, n), values.data() + to);
    }
    length[static_cast<std::size_t>(slot)] += n;
    return n;
  }
  /// Slot i becomes what slot order[i] was. copy(from place, to place, rows) does for whatever else a layer keeps by
  /// place what is done for keys and values.
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
