#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lithe/core/error.hpp"

// N blocks, numbered l = 0 .. N-1 here as in the paper
namespace lithe::inline LITHE_ABI {

/// Stochastic depth that grows with depth (arXiv 2404.16710, section 4.1): p_l = S(t) D(l) p_max with D(l) = exp(l ln 2 / (N - 1)) - 1, and S(t) = 1,
/// or exp(t ln 2 / (steps - 1)) - 1 when `steps` >= 2 are given: what `adaptive_stack::drop_rates` takes. Throws config_error for p_max outside [0,
/// 1].
[[nodiscard]] inline std::vector<double> layer_drop_rates(index_t exits, double p_max, index_t step = 0, index_t steps = 0) {
  require<config_error>(exits >= 1 && p_max >= 0 && p_max <= 1 && step >= 0,
                        "layer_drop_rates: expected at least 1 block, p_max in [0, 1] and a step of at least 0, got ", exits, ", ", p_max, " and ",
                        step);
  const auto grows = [](index_t i, index_t n) {
    return n < 2 ? 0.0 : std::exp2(static_cast<double>(std::min(i, n - 1)) / static_cast<double>(n - 1)) - 1;
  };
  std::vector<double> p;
  for (index_t l = 0; l < exits; ++l) p.push_back((steps >= 2 ? grows(step, steps) : 1) * grows(l, exits) * p_max);
  return p;
}

enum class exit_curriculum {
  all,         ///< every exit in every step
  rotational,  ///< every R-th block, shifted by one each step
  gradual      ///< one block more from the top in every steps / (2 N) steps
};

/// Weights c_l of the exits' losses (the same, section 4.1): c_l = a_l e_l / Σ a e with e_l = es (0 + ... + l) for l < N - 1 and e_{N-1} = N - 1 + es
/// (0 + ... + N-2); a_l says which exits the curriculum has on in this step, the last always. They are the weights of `aligned_exit_loss`. Throws
/// config_error for es below 0, a period below 1.
[[nodiscard]] inline std::vector<double> exit_loss_weights(index_t exits, double scale, exit_curriculum curriculum = exit_curriculum::all,
                                                           index_t step = 0, index_t period = 1, index_t steps = 1) {
  require<config_error>(exits >= 1 && scale >= 0 && period >= 1 && steps >= 1 && step >= 0,
                        "exit_loss_weights: expected at least 1 exit, a scale of at least 0, a period, steps and a step, got ", exits, ", ", scale,
                        ", ", period, ", ", steps, " and ", step);
  std::vector<double> c;
  double sum = 0;
  for (index_t l = 0; l < exits; ++l) {
    const auto x = static_cast<double>(l), last = static_cast<double>(exits - 1);
    const double e = l + 1 < exits ? scale * x * (x + 1) / 2 : exits == 1 ? 1 : last + scale * (last - 1) * last / 2;
    const bool on = l + 1 == exits || curriculum == exit_curriculum::all || (curriculum == exit_curriculum::rotational && (l - step) % period == 0) ||
                    (curriculum == exit_curriculum::gradual &&
                     static_cast<double>(exits - 1 - l) * static_cast<double>(steps) <= 2.0 * static_cast<double>(exits) * static_cast<double>(step));
    c.push_back(on ? e : 0);
    sum += c.back();
  }
  for (double& w : c) w /= sum;
  return c;
}

}  // namespace lithe::inline LITHE_ABI
