#pragma once

#include <span>

#include "lithe/core/error.hpp"

namespace lithe::inline LITHE_ABI {

/// Where each sequence of a ragged batch begins: sequence i is the rows offsets[i] .. offsets[i+1]-1. No offsets means one
/// sequence of all rows. A view: the offsets belong to the caller.
struct segments {
  std::span<const index_t> offsets{};

  /// How many sequences there are.
  [[nodiscard]] index_t count() const { return offsets.empty() ? 1 : static_cast<index_t>(offsets.size()) - 1; }
  /// The first row of sequence i.
  [[nodiscard]] index_t begin(index_t i) const { return offsets.empty() ? 0 : offsets[static_cast<std::size_t>(i)]; }
  /// The row behind the last of sequence i; `rows` is how many there are in all.
  [[nodiscard]] index_t end(index_t i, index_t rows) const {
    return offsets.empty() ? rows : offsets[static_cast<std::size_t>(i) + 1];
  }
  /// Throws shape_error unless the offsets rise from 0 to `rows`.
  void check(const char* who, index_t rows) const {
    if (offsets.empty()) return;
    bool rising = offsets.front() == 0 && offsets.back() == rows;
    for (std::size_t i = 1; i < offsets.size(); ++i) rising = rising && offsets[i - 1] <= offsets[i];
    require<shape_error>(rising, who, ": segments must rise from 0 to the ", rows, " rows given, got ", offsets.front(), " .. ",
                         offsets.back());
  }
};

}  // namespace lithe::inline LITHE_ABI
