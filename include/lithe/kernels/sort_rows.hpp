#pragma once

#include <array>
#include <bit>
#include <span>
#include <utility>

#include "lithe/tensor/row_gradient.hpp"

namespace lithe::inline LITHE_ABI {

/// A pick (its position among all picks) and the table row that it names.
struct row_pick {
  slot_t row;
  std::uint32_t pick;
};

/// Sorts the picks by row and, within a row, by position: a stable radix sort. Picks of row -1 are left out.
///
/// slots [P], each -1 or below `rows`; `sorted` and `spare` have room for P picks. Returns the number of picks sorted; they stand in
/// `sorted`. Costs one pass over the slots and one pass over the picks for every 11 bits of a row number. P must be below 2^32.
inline index_t sort_rows(std::span<const slot_t> slots, index_t rows, std::span<row_pick> sorted, std::span<row_pick> spare) {
  constexpr int max_bits = 11;  // 2048 counters and as many open cache lines stay in the second-level cache
  LITHE_ASSERT(slots.size() <= sorted.size() && slots.size() <= spare.size() && slots.size() >> 32 == 0);
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(rows > 0 ? rows - 1 : 0))));
  const int passes = (bits + max_bits - 1) / max_bits, digit = (bits + passes - 1) / passes;
  const auto mask = (std::uint32_t{1} << digit) - 1;
  std::array<std::array<std::uint32_t, std::size_t{1} << max_bits>, 3> start{};

  for (const slot_t s : slots) {
    LITHE_ASSERT(s >= -1 && s < rows);
    for (int p = 0; s >= 0 && p < passes; ++p) ++start[static_cast<std::size_t>(p)][(static_cast<std::uint32_t>(s) >> (p * digit)) & mask];
  }
  std::uint32_t n = 0;
  for (int p = 0; p < passes; ++p) {
    n = 0;
    for (auto& count : start[static_cast<std::size_t>(p)]) n += std::exchange(count, n);
  }
  // The passes alternate between the two buffers so that the last one ends in `sorted`.
  row_pick* to = passes % 2 == 1 ? sorted.data() : spare.data();
  for (std::size_t i = 0; i < slots.size(); ++i)
    if (slots[i] >= 0) to[start[0][static_cast<std::uint32_t>(slots[i]) & mask]++] = {slots[i], static_cast<std::uint32_t>(i)};
  for (int p = 1; p < passes; ++p) {
    const row_pick* from = to;
    to = from == sorted.data() ? spare.data() : sorted.data();
    for (std::uint32_t i = 0; i < n; ++i) to[start[static_cast<std::size_t>(p)][(static_cast<std::uint32_t>(from[i].row) >> (p * digit)) & mask]++] = from[i];
  }
  return static_cast<index_t>(n);
}

}  // namespace lithe::inline LITHE_ABI
