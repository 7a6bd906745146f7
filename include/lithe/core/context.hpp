#pragma once

#include <algorithm>

#include "lithe/core/executor.hpp"
#include "lithe/core/random.hpp"
#include "lithe/core/segments.hpp"
#include "lithe/core/workspace.hpp"

namespace lithe::inline LITHE_ABI {

/// What a call needs beside its data. A small value, passed by const reference; a default one works: it runs on the calling thread
/// and takes scratch memory from the heap.
struct context {
  const executor* exec = &serial_executor;     ///< runs the loops
  workspace* work = nullptr;                   ///< scratch memory; none: the heap
  rng_key key{};                               ///< of this use of this layer
  segments rows{};                             ///< where sequences begin
  std::span<const std::uint8_t> mask{};        ///< one byte a row, 0 = padding; imported models only
  std::span<const index_t> slots{};            ///< decoding: the cache slot of each sequence; none: 0, 1, 2, ...
  /// backward adds this times the gradient of the layers' own losses (layers/record.hpp), which are means over the rows
  /// of a call. A batch that goes through in parts (micro-batches) whose gradients are summed wants each part's rows /
  /// all rows here, and `auxiliary_loss` times the same in the total; 1 in each part if the sum of the gradients is
  /// divided by the number of parts.
  double auxiliary = 1;
  bool train = false;                          ///< dropout draws, batch norm uses batch statistics
  bool replay = false;                         ///< forward keeps the choices in its record instead of choosing again
  index_t first_row = 0;                       ///< of a chunk: the number of its first row in the whole call, from which draws are counted

  /// The context of the i-th child: the same but for the key.
  [[nodiscard]] context child(std::uint64_t i) const {
    context c = *this;
    c.key = key.child(i);
    return c;
  }
  /// The same for rows that were regrouped (experts, chunks): a position-wise layer asks for no segments, padding or slots.
  [[nodiscard]] context position_wise() const {
    context c = *this;
    c.rows = {};
    c.mask = {};
    c.slots = {};
    return c;
  }
  /// The same for the rows from `first` on of a call that a position-wise layer is given in chunks: its values are those of the whole.
  [[nodiscard]] context chunk(index_t first, index_t n) const {
    context c = position_wise();
    c.first_row = first_row + first;
    if (!mask.empty()) c.mask = mask.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    return c;
  }
  /// The same, and `auxiliary` times the chunk's share of the rows of the whole call that are no padding: own losses
  /// are means over the call.
  [[nodiscard]] context chunk(index_t first, index_t n, double share) const {
    context c = chunk(first, n);
    c.auxiliary *= share;
    return c;
  }
  /// How many of the rows first .. first + n - 1 are no padding.
  [[nodiscard]] index_t count_valid(index_t first, index_t n) const {
    if (mask.empty()) return n;
    const auto part = mask.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    return n - static_cast<index_t>(std::count(part.begin(), part.end(), std::uint8_t{0}));
  }
  /// The cache slot of a sequence of this call.
  [[nodiscard]] index_t slot(index_t sequence) const {
    return slots.empty() ? sequence : slots[static_cast<std::size_t>(sequence)];
  }
  /// Throws shape_error unless segments and mask are of n rows.
  void check(const char* who, index_t n) const {
    rows.check(who, n);
    require<shape_error>(mask.empty() || static_cast<index_t>(mask.size()) == n, who, ": expected a mask of ", n, " rows, got ", mask.size());
  }
  /// Whether row i is no padding.
  [[nodiscard]] bool valid(index_t row) const { return mask.empty() || mask[static_cast<std::size_t>(row)] != 0; }
};

}  // namespace lithe::inline LITHE_ABI
