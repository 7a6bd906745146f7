#pragma once

#include <cmath>

#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// Angles of rotary positions (arXiv 2104.09864, equation 34, pairs split in halves): row t of `table` [T x width] is
/// cos(p θ_i), then sin(p θ_i), for position p = first + t and θ_i = base^(-2i / width), i < width / 2.
template <class S>
void rotary_angles(index_t first, double base, matrix_view<S> table, const context& ctx) {
  constexpr index_t block = 64;  // positions between two exact angles; the angles between come from the addition theorem, in double
  const index_t half = table.cols() / 2, near = std::min(block, table.rows());
  scratch<double> steps(ctx, near, 2 * half), theta(ctx, half);
  for (index_t i = 0; i < half; ++i) theta[i] = std::pow(base, -static_cast<double>(i) / static_cast<double>(half));
  const auto exact = [&](index_t position, double* to) {
    for (index_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * theta[i];
      to[i] = std::cos(angle);
      to[half + i] = std::sin(angle);
    }
  };
  ctx.exec->run(near, 8, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) exact(t, steps.row(t));
  });
  ctx.exec->run(table.rows(), block, [&](index_t begin, index_t end) {
    scratch<double> anchor(ctx, 2 * half);
    exact(first + begin, anchor.data());
    for (index_t t = begin; t < end; ++t) {
      const double* step = steps.row(t - begin);
      for (index_t i = 0; i < half; ++i) {
        table(t, i) = static_cast<S>(anchor[i] * step[i] - anchor[half + i] * step[half + i]);
        table(t, half + i) = static_cast<S>(anchor[half + i] * step[i] + anchor[i] * step[half + i]);
      }
    }
  });
}

/// Rotates the pairs (x_i, x_{i + width/2}) of one head's row by the angles of one row of the table, in place:
/// (a, b) -> (a cos - b sin, a sin + b cos), or back.
template <class S>
void rotate_pairs(S* x, const S* angles, index_t width, bool back = false) {
  const index_t half = width / 2;
  const S sign = back ? S(-1) : S(1);
  for (index_t i = 0; i < half; ++i) {
    const S a = x[i], b = x[half + i], c = angles[i], s = sign * angles[half + i];
    x[i] = a * c - b * s;
    x[half + i] = a * s + b * c;
  }
}

}  // namespace lithe::inline LITHE_ABI
