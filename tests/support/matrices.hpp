#pragma once

// What tests of layers share: random matrices, and how far two matrices are apart.
#include "lithe/layers/initialise.hpp"

namespace lithe::inline LITHE_ABI {

template <class S = double>
matrix<S> random(index_t rows, index_t cols, std::uint64_t seed, double bound = 1) {
  matrix<S> m(rows, cols);
  fill_uniform<S>(m, bound, rng_key{seed});
  return m;
}
template <class A, class B>
double difference(const A& a, const B& b) {
  return a.size() == 0 ? 0 : static_cast<double>((a.template cast<double>() - b.template cast<double>()).cwiseAbs().maxCoeff());
}

}  // namespace lithe::inline LITHE_ABI
