#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI {

static_assert(std::endian::native == std::endian::little, "lithe: safetensors files are little-endian, and so must be the machine.");

/// The element types of a safetensors file that Lithe reads; of others a file may speak, but they cannot be read.
enum class dtype : std::uint8_t { f64, f32, bf16, f16, i64, i32, i16, i8, u8, boolean, unknown };

namespace detail {

struct dtype_entry {
  std::string_view name;
  std::size_t size;
};
inline constexpr std::array<dtype_entry, 10> dtype_table{
    {{"F64", 8}, {"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}}};

/// Bits of an element of the format's other types, which may stand in a file and which Lithe does not read; 0: the
/// format has no such type.
[[nodiscard]] constexpr std::size_t other_dtype_bits(std::string_view name) {
  struct entry {
    std::string_view name;
    std::size_t bits;
  };
  constexpr entry others[] = {{"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"F8_E5M2", 8},
                              {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
                              {"U16", 16},    {"U32", 32},    {"U64", 64},        {"C64", 64}};
  for (const entry& e : others)
    if (e.name == name) return e.bits;
  return 0;
}

}  // namespace detail

/// The format's name for it: "F32".
[[nodiscard]] constexpr std::string_view dtype_name(dtype t) {
  return t == dtype::unknown ? "unknown" : detail::dtype_table[static_cast<std::size_t>(t)].name;
}
/// Bytes of one element; 0 if unknown.
[[nodiscard]] constexpr std::size_t dtype_size(dtype t) { return t == dtype::unknown ? 0 : detail::dtype_table[static_cast<std::size_t>(t)].size; }
[[nodiscard]] constexpr dtype parse_dtype(std::string_view name) {
  std::size_t i = 0;
  while (i < detail::dtype_table.size() && detail::dtype_table[i].name != name) ++i;
  return static_cast<dtype>(i);
}
[[nodiscard]] constexpr bool is_floating(dtype t) { return t <= dtype::f16; }

/// The number types that tensors are read into and written from, and the element type that stores each exactly.
template <class T>
concept tensor_number = std::same_as<T, double> || std::same_as<T, float> || std::same_as<T, std::int64_t> || std::same_as<T, std::int32_t> ||
    std::same_as<T, std::uint8_t>;
template <tensor_number T>
inline constexpr dtype dtype_of = std::same_as<T, double>         ? dtype::f64
                                  : std::same_as<T, float>        ? dtype::f32
                                  : std::same_as<T, std::int64_t> ? dtype::i64
                                  : std::same_as<T, std::int32_t> ? dtype::i32
                                                                  : dtype::u8;

/// bfloat16 is the upper half of a float.
[[nodiscard]] inline float bf16_to_float(std::uint16_t h) { return std::bit_cast<float>(std::uint32_t{h} << 16); }

/// IEEE 754 binary16, subnormals included.
[[nodiscard]] inline float f16_to_float(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000U) << 16, exponent = (h >> 10) & 0x1FU, fraction = h & 0x3FFU;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24F, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | ((exponent == 31 ? 255U : exponent + 112U) << 23) | (fraction << 13));
}

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN (made quiet).
[[nodiscard]] inline std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}
[[nodiscard]] inline std::uint16_t to_bf16(double x) {
  auto once = static_cast<float>(x);
  if (std::isnan(x) || static_cast<double>(once) == x) return to_bf16(once);
  // Rounding twice is wrong near ties; rounding to odd first (truncate, then set the last bit) is not.
  if (std::fabs(static_cast<double>(once)) > std::fabs(x)) once = std::nextafter(once, 0.0F);
  return to_bf16(std::bit_cast<float>(std::bit_cast<std::uint32_t>(once) | 1U));
}

namespace detail {

/// Whether elements of type `from` can be read as T: integers are never read from floating-point numbers.
template <tensor_number T>
[[nodiscard]] constexpr bool readable_as(dtype from) {
  return from != dtype::unknown && (std::floating_point<T> || !is_floating(from));
}

template <class Stored, class T, class Decode>
index_t convert_as(const std::byte* in, T* out, index_t n, Decode decode) {
  for (index_t i = 0; i < n; ++i) {
    Stored stored;
    std::memcpy(&stored, in + i * static_cast<index_t>(sizeof(Stored)), sizeof(Stored));
    const auto value = decode(stored);
    if constexpr (std::integral<T>) {
      if constexpr (std::integral<decltype(value)>) {
        if (!std::in_range<T>(value)) return i;
        out[i] = static_cast<T>(value);
      } else {
        return i;
      }
    } else {
      out[i] = static_cast<T>(value);
    }
  }
  return n;
}

/// Converts n numbers of type `from`; the number of those converted before one did not fit into T (n: all).
template <tensor_number T>
index_t convert(dtype from, const std::byte* in, T* out, index_t n) {
  const auto same = [](auto x) { return x; };
  switch (from) {
    case dtype::f64:
      return convert_as<double>(in, out, n, same);
    case dtype::f32:
      return convert_as<float>(in, out, n, same);
    case dtype::bf16:
      return convert_as<std::uint16_t>(in, out, n, bf16_to_float);
    case dtype::f16:
      return convert_as<std::uint16_t>(in, out, n, f16_to_float);
    case dtype::i64:
      return convert_as<std::int64_t>(in, out, n, same);
    case dtype::i32:
      return convert_as<std::int32_t>(in, out, n, same);
    case dtype::i16:
      return convert_as<std::int16_t>(in, out, n, same);
    case dtype::i8:
      return convert_as<std::int8_t>(in, out, n, same);
    case dtype::u8:
    case dtype::boolean:
      return convert_as<std::uint8_t>(in, out, n, same);
    case dtype::unknown:
      break;
  }
  return 0;
}

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
