#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

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

namespace detail {

/// One piece of a message, its type forgotten, so that one function writes all sentences of the library.
struct message_piece {
  const void* value;
  void (*write)(std::ostream& out, const void* value);
};
template <class T>
message_piece piece_of(const T& value) {
  if constexpr (std::is_array_v<T>)
    return {value, [](std::ostream& out, const void* text) { out << static_cast<const char*>(text); }};
  else
    return {&value, [](std::ostream& out, const void* v) { out << *static_cast<const T*>(v); }};
}
[[gnu::cold, gnu::noinline]] inline std::string write_pieces(std::initializer_list<message_piece> pieces) {
  std::ostringstream out;
  for (const auto& p : pieces) p.write(out, p.value);
  return std::move(out).str();
}
template <class Error>
[[noreturn, gnu::cold, gnu::noinline]] void fail(std::initializer_list<message_piece> pieces) {
  throw Error(write_pieces(pieces));
}

}  // namespace detail

/// The arguments, written one after the other: messages are built from pieces only when they are thrown.
template <class... T>
[[nodiscard]] std::string concat(const T&... pieces) {
  return detail::write_pieces({detail::piece_of(pieces)...});
}

/// Throws `Error` with the sentence made of `pieces` unless `condition` holds.
template <class Error, class... T>
void require(bool condition, const T&... pieces) {
  if (!condition) [[unlikely]]
    detail::fail<Error>({detail::piece_of(pieces)...});
}

}  // namespace lithe::inline LITHE_ABI
