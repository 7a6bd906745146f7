#pragma once

#include "lithe/layers/layer.hpp"

namespace lithe::inline LITHE_ABI {

/// What a layer costs: numbers held, and for one token of a forward pass the floating-point operations (a multiply-add is two) and
/// the bytes of parameters and cached keys read when the token comes alone.
struct cost {
  double parameters = 0, flops = 0, bytes = 0;
  /// The cost of both, number by number.
  friend cost operator+(cost a, cost b) { return {a.parameters + b.parameters, a.flops + b.flops, a.bytes + b.bytes}; }
  /// Adds b, number by number.
  cost& operator+=(cost b) { return *this = *this + b; }
};

/// The cost of any layer for a token that sees `length` tokens (itself included; only attention asks).
template <class L>
[[nodiscard]] cost cost_of(const L& l, index_t length) {
  return l.forward_cost(length);
}

/// The cost of a product with a dense [outputs x inputs] weight of S.
template <class S>
[[nodiscard]] cost dense_cost(index_t outputs, index_t inputs) {
  const double n = static_cast<double>(outputs) * static_cast<double>(inputs);
  return {n, 2 * n, n * sizeof(S)};
}

}  // namespace lithe::inline LITHE_ABI
