#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI {

/// A matrix has the wrong number of rows or columns.
struct shape_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
/// A layer, optimiser or schedule was configured with values that do not go together.
struct config_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
/// A token, slot or row number lies outside its range.
struct index_error : std::out_of_range {
  using std::out_of_range::out_of_range;
};
/// A call came at the wrong time: replay without recorded choices, a full cache, a gradient of another model.
struct state_error : std::logic_error {
  using std::logic_error::logic_error;
};
/// A file cannot be read or written, or does not hold what it promises.
struct io_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The arguments, written one after the other: messages are built from pieces only when they are thrown.
template <class... T>
[[nodiscard]] std::string concat(const T&... pieces) {
  std::ostringstream out;
  (out << ... << pieces);
  return std::move(out).str();
}

/// Throws `Error` with the sentence made of `pieces` unless `condition` holds.
template <class Error, class... T>
void require(bool condition, const T&... pieces) {
  if (!condition) [[unlikely]]
    throw Error(concat(pieces...));
}

}  // namespace lithe::inline LITHE_ABI
