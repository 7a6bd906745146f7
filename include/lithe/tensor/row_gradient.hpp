#pragma once

#include <algorithm>
#include <vector>

#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// The number of a row of a value table: tables have fewer than 2^31 rows.
using slot_t = std::int32_t;

/// The gradient of a table of which few rows were touched: `rows` ascending and unique, and for each its summed gradient as a row
/// of `values`. Empty means zero. The buffers keep their size from step to step, so `count()` rows of `storage` are in use.
template <class S>
struct row_gradient {
  index_t total_rows = 0, cols = 0;  ///< of the table
  std::vector<slot_t> rows;          ///< touched rows, ascending
  std::vector<S, Eigen::aligned_allocator<S>> storage;  ///< at least rows.size() * cols numbers

  [[nodiscard]] index_t count() const { return static_cast<index_t>(rows.size()); }
  [[nodiscard]] matrix_view<S> values() { return {storage.data(), count(), cols}; }
  [[nodiscard]] matrix_view<const S> values() const { return {storage.data(), count(), cols}; }

  /// Room for the gradient of these rows, contents unspecified; keeps the allocation if it is large enough.
  void assign_rows(std::vector<slot_t>&& touched) {
    rows = std::move(touched);
    reserve();
  }
  /// `storage` large enough for `rows`.
  void reserve() {
    const auto need = rows.size() * static_cast<std::size_t>(cols);
    if (storage.size() < need) {
      storage.clear();  // the old contents are not copied
      storage.resize(need);
    }
  }
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

}  // namespace lithe::inline LITHE_ABI
