#pragma once

#include <gtest/gtest.h>

#include "lithe/training/gradient_check.hpp"

// What the trials share.
namespace trials {

using namespace lithe;

inline matrix<double> random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<double> m(rows, cols);
  fill_normal<double>(m, 1.0, rng_key{seed});
  return m;
}

/// A training context with a key, a workspace and sequences of 5, 0 and 7 tokens.
struct training {
  std::vector<index_t> offsets{0, 5, 5, 12};
  workspace work;
  context ctx;
  static constexpr index_t tokens = 12;

  explicit training(std::uint64_t key = 17) {
    ctx.work = &work;
    ctx.key = {key};
    ctx.rows = {offsets};
    ctx.train = true;
  }
};

inline double largest_number(const matrix<double>& m) {
  double largest = 0;
  for (index_t i = 0; i < m.size(); ++i) largest = std::isnan(m.data()[i]) ? INFINITY : std::max(largest, std::abs(m.data()[i]));
  return largest;
}
inline double largest_difference(const matrix<double>& a, const matrix<double>& b) { return largest_number(a - b); }

/// The largest difference of two gradients of one model, over all tensors, and the largest number in the first.
template <class L>
std::pair<double, double> compare_gradients(const L& model, const gradient_of<L>& a, const gradient_of<L>& b) {
  double difference = 0, largest = 0;
  for_each_tensor(
      [&](const std::string&, role, const auto& p, const auto& q, const auto& r) {
        for (index_t i = 0; i < p.rows(); ++i)
          for (index_t j = 0; j < p.cols(); ++j) {
            difference = std::max(difference, std::abs(static_cast<double>(q(i, j) - r(i, j))));
            largest = std::max(largest, std::abs(static_cast<double>(q(i, j))));
          }
      },
      model, a, b);
  return {difference, largest};
}

// Central differences with h = 1e-5 of functions of size 1 are good to h² plus 1e-16 / h: 1e-10 and 1e-11, divided by gradients that may
// be as small as the checker's floor of 1e-3.
inline constexpr double gradient_tolerance = 2e-6;

template <class... A>
void expect_right_gradients(const A&... layer_and_input) {
  const auto report = gradient_check(layer_and_input...);
  EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
  for (const auto& tensor : report.tensors) EXPECT_GT(tensor.largest, 1e-3) << tensor.name;  // zero would equal zero
}

}  // namespace trials
