#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// The number of a row of a value table: tables have fewer than 2^31 rows.
using slot_t = std::int32_t;

/// The gradient of a table of which few rows were touched: `rows` ascending and unique, and for each its summed gradient as a row
/// of `values`. Empty means zero. The buffers keep their size from step to step, so `count()` rows of `storage` are in use.
template <class S>
struct row_gradient {
  /// Numbers that begin where Eigen's packets want them.
  using buffer = std::vector<S, Eigen::aligned_allocator<S>>;
  index_t total_rows = 0, cols = 0;  ///< of the table
  std::vector<slot_t> rows;          ///< touched rows, ascending
  buffer storage;                    ///< at least rows.size() * cols numbers
  std::vector<slot_t> spare_rows;    ///< what an accumulating `scatter_add` merges into, and then swaps with the two above
  buffer spare_storage;

  /// How many rows were touched.
  [[nodiscard]] index_t count() const { return static_cast<index_t>(rows.size()); }
  /// The gradients of the touched rows, [count x cols].
  [[nodiscard]] matrix_view<S> values() { return {storage.data(), count(), cols}; }
  /// The gradients of the touched rows, [count x cols].
  [[nodiscard]] matrix_view<const S> values() const { return {storage.data(), count(), cols}; }

  /// Room for the gradient of these rows, contents unspecified; keeps the allocation if it is large enough.
  void assign_rows(std::vector<slot_t>&& touched) {
    rows = std::move(touched);
    reserve();
  }
  /// `storage` large enough for `rows`.
  void reserve() { reserve(storage, rows.size()); }
  /// `values` large enough for n rows, contents unspecified. An eighth more than asked, because the number of touched rows differs
  /// a little from step to step.
  void reserve(buffer& values, std::size_t n) const {
    const auto need = n * static_cast<std::size_t>(cols);
    if (values.size() < need) {
      values.clear();  // the old contents are not copied
      values.resize(need + need / 8);
    }
  }
  /// No row is touched any more; the memory stays.
  void set_zero() { rows.clear(); }

  /// The position of a table row among the touched ones, or -1.
  [[nodiscard]] index_t find(slot_t row) const {
    const auto it = std::lower_bound(rows.begin(), rows.end(), row);
    return it == rows.end() || *it != row ? -1 : it - rows.begin();
  }
  /// One number of the gradient, zero where nothing was touched: for checks, not for loops.
  [[nodiscard]] S operator()(index_t row, index_t col) const {
    const index_t at = find(static_cast<slot_t>(row));
    return at < 0 ? S(0) : values()(at, col);
  }
};

/// The gradient of a table that several layers share: each layer's gradient holds this handle, all of them add to one
/// `row_gradient`. Made by `make_gradient`; a copy is another handle on the same rows.
template <class S>
struct shared_gradient {
  std::shared_ptr<row_gradient<S>> target;

  /// No row is touched any more, for all holders.
  void set_zero() {
    if (target) target->set_zero();
  }
  /// One number of the gradient, zero where nothing was touched: for checks, not for loops.
  [[nodiscard]] S operator()(index_t row, index_t col) const { return target ? (*target)(row, col) : S(0); }
};

/// The touched rows behind a gradient field that is sparse: its own, or those it shares. Throws state_error for a handle that
/// `make_gradient` did not make.
template <class S>
[[nodiscard]] row_gradient<S>& rows_of(row_gradient<S>& g) {
  return g;
}
template <class S>
[[nodiscard]] const row_gradient<S>& rows_of(const row_gradient<S>& g) {
  return g;
}
template <class S>
[[nodiscard]] row_gradient<S>& rows_of(const shared_gradient<S>& g) {
  require<state_error>(g.target != nullptr, "shared_gradient: expected a gradient from make_gradient, got an empty handle");
  return *g.target;
}

/// A gradient field of touched rows only, as against a matrix: what optimisers, savers and checkers ask before `rows_of`.
template <class G>
concept sparse_gradient = requires(G& g) { rows_of(g); };

}  // namespace lithe::inline LITHE_ABI
