#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lithe/core/error.hpp"

// Schedules are values: pure functions of the number of steps already taken, so resuming a run needs nothing but that number.
namespace lithe::inline LITHE_ABI {

enum class decay { constant, linear, cosine };

/// The learning rate before step t = 0, 1, ...: linear warm-up, then decay to a share of the rate r, with w warm-up and
/// n total steps:
///
///     t < w       r (start + (1 - start) t / w)
///     t < n       r (final + (1 - final) f),   f = (1 + cos(π (t - w) / (n - w))) / 2   or   f = 1 - (t - w) / (n - w)
///     else        r final
///
/// A constant rate stays at r after the warm-up and asks for no `total_steps`. (Cosine: Loshchilov and Hutter, arXiv
/// 1608.03983, equation 5.) Throws config_error for negative or infinite numbers and for a decay with fewer total than
/// warm-up steps.
struct learning_rate_schedule {
  double learning_rate = 1e-3;
  decay shape = decay::cosine;
  index_t warmup_steps = 0, total_steps = 0;
  double start_ratio = 0, final_ratio = 0;

  /// The rate before step t; throws config_error.
  [[nodiscard]] double operator()(index_t t) const {
    const auto usable = [](double r) { return r >= 0 && std::isfinite(r); };
    require<config_error>(
        usable(learning_rate) && usable(start_ratio) && usable(final_ratio) && warmup_steps >= 0 && t >= 0,
        "learning_rate_schedule: expected finite numbers that are not negative, got rate ", learning_rate,
        ", start ratio ", start_ratio, ", final ratio ", final_ratio, ", ", warmup_steps, " warm-up steps, step ", t);
    require<config_error>(shape == decay::constant || total_steps >= warmup_steps, "learning_rate_schedule: expected at least ", warmup_steps,
                          " total steps, as many as of warm-up, got ", total_steps);
    if (t < warmup_steps) return learning_rate * (start_ratio + (1 - start_ratio) * ratio(t, warmup_steps));
    if (shape == decay::constant) return learning_rate;
    if (t >= total_steps) return learning_rate * final_ratio;
    const double done = ratio(t - warmup_steps, total_steps - warmup_steps);
    const double left = shape == decay::cosine ? (1 + std::cos(std::numbers::pi * done)) / 2 : 1 - done;
    return learning_rate * (final_ratio + (1 - final_ratio) * left);
  }

 private:
  static double ratio(index_t a, index_t b) { return static_cast<double>(a) / static_cast<double>(b); }
};

/// What the rate of value tables is multiplied with: 1 + (times - 1) max(0, 1 - t / (rate n)), which falls from `times` to 1 over the
/// share `rate` of all n steps. Set it as the rate of the tables' parameter group before each step. Throws config_error
/// unless times >= 0, rate > 0 and n >= 1.
struct value_rate_schedule {
  double times = 4, rate = 1;
  index_t total_steps = 1;

  /// What the rate before step t is multiplied with; throws config_error.
  [[nodiscard]] double operator()(index_t t) const {
    require<config_error>(times >= 0 && std::isfinite(times) && rate > 0 && total_steps >= 1,
                          "value_rate_schedule: expected times >= 0, rate > 0 and total steps >= 1, got ", times, ", ",
                          rate, " and ", total_steps);
    return 1 + (times - 1) * std::max(0.0, 1 - static_cast<double>(t) / (static_cast<double>(total_steps) * rate));
  }
};

}  // namespace lithe::inline LITHE_ABI
