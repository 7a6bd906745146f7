#pragma once

#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include "lithe/core/executor.hpp"
#include "lithe/core/random.hpp"
#include "lithe/tensor/matrix_view.hpp"

// G thresholds on a grid, n calibration sequences, N exits
namespace lithe::inline LITHE_ABI {

/// p-value of the hypothesis that the expected loss exceeds δ, from the mean of n losses in [0, 1].
enum class risk_bound {
  hoeffding_bentkus,  ///< min(exp(-n h₁(min(E, δ), δ)), e P[Bin(n, δ) <= ⌈n E⌉]), h₁(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b)) (arXiv 2110.01052,
                      ///< section 3)
  hoeffding  ///< exp(-2 n max(0, δ - E)²)
};

namespace detail {

/// P[Bin(n, p) <= k], each term from logarithms so that no factor underflows.
inline double binomial_cdf(index_t k, index_t n, double p) {
  if (k >= n) return 1;
  double sum = 0;
  const auto count = static_cast<double>(n);
  for (index_t i = 0; i <= k; ++i) {
    const auto x = static_cast<double>(i);
    sum += std::exp(std::lgamma(count + 1) - std::lgamma(x + 1) - std::lgamma(count - x + 1) + x * std::log(p) + (count - x) * std::log1p(-p));
  }
  return std::min(1.0, sum);
}

}  // namespace detail

/// The p-value from the sum n E of losses (the sum, because rounding n times a mean may lift ⌈n E⌉ by one). Throws config_error unless 0 < δ < 1 and
/// n >= 1.
[[nodiscard]] inline double risk_p_value(risk_bound bound, double sum, index_t n, double delta) {
  require<config_error>(delta > 0 && delta < 1, "risk_p_value: expected a tolerated risk delta between 0 and 1, got ", delta);
  require<config_error>(n >= 1, "risk_p_value: expected at least 1 calibration sequence, got ", n);
  const auto count = static_cast<double>(n);
  const double mean = sum / count;
  if (bound == risk_bound::hoeffding) {
    const double gap = std::max(0.0, delta - mean);
    return std::exp(-2 * count * gap * gap);
  }
  const double a = std::min(mean, delta);
  const auto part = [](double x, double y) { return x == 0 ? 0.0 : x * std::log(x / y); };
  const double relative_entropy = part(a, delta) + part(1 - a, 1 - delta);
  return std::min(std::exp(-count * relative_entropy), std::numbers::e * detail::binomial_cdf(static_cast<index_t>(std::ceil(sum)), n, delta));
}

struct calibration_config {
  double delta = 0.1;     ///< tolerated risk
  double epsilon = 0.05;  ///< allowed probability that the risk is larger nevertheless
  risk_bound bound = risk_bound::hoeffding_bentkus;
};

/// Where leaving early is safe, and what each threshold of the grid came to.
struct calibration_result {
  double threshold = 1;  ///< the lowest that is safe; 1 (never leave early) if none is
  index_t accepted = 0;  ///< how many of the grid were accepted
  std::vector<double> mean_loss, p_values;
};

/// 1 - step, 1 - 2 step, ..., down to 0 or the last that is not below it. Throws config_error unless 0 < step <= 1.
[[nodiscard]] inline std::vector<double> calibration_grid(double step = 0.05) {
  require<config_error>(step > 0 && step <= 1, "calibration_grid: expected a step in (0, 1], got ", step);
  std::vector<double> grid;
  const auto n = static_cast<index_t>(std::floor(1 / step + 1e-9));
  for (index_t i = 1; i <= n; ++i) grid.push_back(std::max(0.0, 1 - static_cast<double>(i) * step));
  if (grid.back() < 1e-12) grid.back() = 0;
  return grid;
}

/// The loss of `risk` control: max(0, R(early) - R(full)); both as long as the result. Clipping to [0, 1] is `calibrate`'s.
inline void excess_risk(std::span<const double> early, std::span<const double> full, std::span<double> loss) {
  require<shape_error>(early.size() == full.size() && loss.size() == full.size(), "excess_risk: expected as many early as full risks, got ",
                       early.size(), " and ", full.size());
  for (std::size_t i = 0; i < loss.size(); ++i) loss[i] = std::max(0.0, early[i] - full[i]);
}

/// Learn-then-Test with fixed-sequence testing (arXiv 2110.01052; arXiv 2207.07061, section 4): goes down the thresholds while the p-value of their
/// losses is at most ε, and stops at the first that is not. Then P[risk of the threshold <= δ] >= 1 - ε.
///
/// thresholds [G] descending; losses [G x n], clipped to [0, 1] here. Throws config_error for empty or NaN losses, thresholds that do not
/// descend, δ or ε outside of (0, 1); shape_error.
[[nodiscard]] inline calibration_result calibrate(std::span<const double> thresholds, matrix_view<const double> losses,
                                                  const calibration_config& c = {}) {
  require<config_error>(c.epsilon > 0 && c.epsilon < 1, "calibrate: expected a level epsilon between 0 and 1, got ", c.epsilon);
  require<config_error>(losses.size() > 0, "calibrate: expected losses of at least 1 sequence, got none");
  require<shape_error>(static_cast<index_t>(thresholds.size()) == losses.rows(), "calibrate: expected losses for each of ", thresholds.size(),
                       " thresholds, got ", losses.rows(), " rows");
  calibration_result r;
  bool open = true;
  for (index_t g = 0; g < losses.rows(); ++g) {
    const double threshold = thresholds[static_cast<std::size_t>(g)];
    require<config_error>(g == 0 || threshold < thresholds[static_cast<std::size_t>(g - 1)], "calibrate: expected descending thresholds, got ",
                          threshold);
    double sum = 0;
    for (index_t i = 0; i < losses.cols(); ++i) {
      require<config_error>(!std::isnan(losses(g, i)), "calibrate: the loss of sequence ", i, " is not a number");
      sum += std::clamp(losses(g, i), 0.0, 1.0);
    }
    r.mean_loss.push_back(sum / static_cast<double>(losses.cols()));
    r.p_values.push_back(risk_p_value(c.bound, sum, losses.cols(), c.delta));
    open = open && r.p_values.back() <= c.epsilon;
    if (!open) continue;
    ++r.accepted;
    r.threshold = threshold;
  }
  return r;
}

/// One point of quality against cost: what a vector of thresholds gave on held-out data.
struct threshold_point {
  std::vector<double> thresholds;
  double quality = 0, cost = 0;
};

/// Thresholds by random search (arXiv 1910.10073, section 4.3): draws τ from U(0, 1)^{N-1}, lets `judge` fill in quality and cost (the mean exit,
/// say), and keeps the best quality in each of `bins` equal stretches of cost between `least` and `most`; empty stretches are left out. A pure
/// function of the key and of what `judge` says.
[[nodiscard]] inline std::vector<threshold_point> search_thresholds(index_t exits, index_t draws, index_t bins, double least, double most,
                                                                    rng_key key, function_ref<void(threshold_point&)> judge) {
  require<config_error>(exits >= 2 && draws >= 1 && bins >= 1 && least < most,
                        "search_thresholds: expected at least 2 exits, 1 draw, 1 bin and a range of costs, got ", exits, ", ", draws, ", ", bins,
                        " and ", least, " .. ", most);
  std::vector<threshold_point> best(static_cast<std::size_t>(bins));
  for (index_t d = 0; d < draws; ++d) {
    threshold_point p;
    for (index_t n = 0; n + 1 < exits; ++n) p.thresholds.push_back(uniform(key, static_cast<std::uint64_t>(d * (exits - 1) + n)));
    judge(p);
    if (!(p.cost >= least && p.cost <= most) || std::isnan(p.quality)) continue;
    const auto bin = std::min(bins - 1, static_cast<index_t>((p.cost - least) / (most - least) * static_cast<double>(bins)));
    auto& kept_point = best[static_cast<std::size_t>(bin)];
    if (kept_point.thresholds.empty() || p.quality > kept_point.quality) kept_point = std::move(p);
  }
  std::erase_if(best, [](const threshold_point& p) { return p.thresholds.empty(); });
  return best;
}

}  // namespace lithe::inline LITHE_ABI
