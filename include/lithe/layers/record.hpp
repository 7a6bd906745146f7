#pragma once

#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI {

/// A choice made in forward (slots, bucket ids, routes). It survives `forget`, and forward under `context::replay` uses it instead of
/// choosing again.
template <class T>
struct kept {
  T value{};
};

/// A loss that a layer adds of its own accord (balance of experts or keys). The layer writes the value in forward, its coefficient
/// included; backward adds `context::auxiliary` times its gradient. Containers need not know: `auxiliary_loss` finds it in any record.
template <class S>
struct auxiliary {
  S loss{};
};

// Records are aggregates; their fields are reached by structured bindings, so `bytes` and `forget` need no code from a layer's author.
namespace detail {

struct anything {
  template <class T>
  operator T() const;
};
template <class T, class... A>
constexpr int arity() {
  if constexpr (requires { T{A{}..., anything{}}; })
    return arity<T, A..., anything>();
  else
    return static_cast<int>(sizeof...(A));
}

template <class T>
inline constexpr bool is_kept = false;
template <class T>
inline constexpr bool is_kept<kept<T>> = true;
template <class T>
inline constexpr bool is_auxiliary = false;
template <class S>
inline constexpr bool is_auxiliary<auxiliary<S>> = true;
template <class T>
inline constexpr bool is_vector = false;
template <class T, class A>
inline constexpr bool is_vector<std::vector<T, A>> = true;
template <class T>
inline constexpr bool is_tuple = false;
template <class... T>
inline constexpr bool is_tuple<std::tuple<T...>> = true;
template <class T>
inline constexpr bool is_variant = false;
template <class... T>
inline constexpr bool is_variant<std::variant<T...>> = true;

template <class T>
inline constexpr bool is_numbers = false;  // a buffer of numbers, which counts as its bytes
template <class T, class A>
inline constexpr bool is_numbers<std::vector<T, A>> = std::is_arithmetic_v<T>;
template <class S, int R, int C, int O, int MR, int MC>
inline constexpr bool is_numbers<Eigen::Matrix<S, R, C, O, MR, MC>> = true;

template <class F, class T>
void each_field(F&& f, T& t) {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_empty_v<U>) {
  } else if constexpr (is_vector<U>) {
    for (auto& element : t) f(element);
  } else if constexpr (is_tuple<U>) {
    std::apply([&](auto&... e) { (f(e), ...); }, t);
  } else if constexpr (is_variant<U>) {
    std::visit(f, t);
  } else {
    static_assert(std::is_aggregate_v<U>, "lithe: a record is an aggregate of matrices, vectors, numbers and records.");
    constexpr int n = arity<U>();
    static_assert(n <= 8, "lithe: a record has at most 8 fields; group them.");
    const auto all = [&](auto&... e) { (f(e), ...); };
    if constexpr (n == 1) { auto& [a] = t; all(a); }
    else if constexpr (n == 2) { auto& [a, b] = t; all(a, b); }
    else if constexpr (n == 3) { auto& [a, b, c] = t; all(a, b, c); }
    else if constexpr (n == 4) { auto& [a, b, c, d] = t; all(a, b, c, d); }
    else if constexpr (n == 5) { auto& [a, b, c, d, e] = t; all(a, b, c, d, e); }
    else if constexpr (n == 6) { auto& [a, b, c, d, e, g] = t; all(a, b, c, d, e, g); }
    else if constexpr (n == 7) { auto& [a, b, c, d, e, g, h] = t; all(a, b, c, d, e, g, h); }
    else if constexpr (n == 8) { auto& [a, b, c, d, e, g, h, i] = t; all(a, b, c, d, e, g, h, i); }
  }
}

}  // namespace detail

/// The bytes that a record (or any of its fields) holds.
template <class T>
[[nodiscard]] std::size_t bytes(const T& t) {
  if constexpr (detail::is_numbers<T>) {
    return static_cast<std::size_t>(t.size()) * sizeof(*t.data());
  } else if constexpr (std::is_arithmetic_v<T> || std::is_enum_v<T>) {
    return sizeof(T);
  } else if constexpr (detail::is_kept<T>) {
    return bytes(t.value);
  } else {
    std::size_t n = 0;
    detail::each_field([&](const auto& field) { n += bytes(field); }, t);
    return n;
  }
}

/// The sum of all auxiliary losses in a record; `forget` leaves them.
template <class T>
[[nodiscard]] double auxiliary_loss(const T& t) {
  if constexpr (detail::is_auxiliary<T>) {
    return static_cast<double>(t.loss);
  } else if constexpr (detail::is_numbers<T> || std::is_arithmetic_v<T> || std::is_enum_v<T> || detail::is_kept<T>) {
    return 0;
  } else {
    double sum = 0;
    detail::each_field([&](const auto& field) { sum += auxiliary_loss(field); }, t);
    return sum;
  }
}

/// Multiplies all auxiliary losses in a record: those of a part of a call by its share, so that their sum is a mean
/// over the call.
template <class T>
void scale_auxiliary(T& t, double factor) {
  if constexpr (detail::is_auxiliary<T>)
    t.loss *= static_cast<decltype(t.loss)>(factor);
  else if constexpr (!detail::is_numbers<T> && !std::is_arithmetic_v<T> && !std::is_enum_v<T> && !detail::is_kept<T>)
    detail::each_field([&](auto& field) { scale_auxiliary(field, factor); }, t);
}

/// Frees everything that forward can compute again: all but the kept choices and plain numbers (keys).
template <class T>
void forget(T& t) {
  if constexpr (detail::is_numbers<T>)
    t = T{};
  else if constexpr (!std::is_arithmetic_v<T> && !std::is_enum_v<T> && !detail::is_kept<T>)
    detail::each_field([](auto& field) { forget(field); }, t);
}

}  // namespace lithe::inline LITHE_ABI
