#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lithe/tensor/row_gradient.hpp"

namespace lithe::inline LITHE_ABI {

/// How evenly one distribution z over N slots is spread; z sums to 1.
struct usage_spread {
  double used = 0;          ///< percent of slots with z ≠ 0
  double kl_to_uniform = 0; ///< ln N + Σ z ln z
  double gini = 0;          ///< 1 - 2 mean(cumulative sum of z, ascending)
  index_t top50 = 0, top90 = 0, top99 = 0;  ///< slots that hold 50, 90, 99 % of z: N minus the first ascending position that leaves them out
};

/// Use of a memory over many tokens (arXiv 1907.05242 section 4.4): weighted by the gate, and counted.
struct usage_report {
  usage_spread weighted, counted;
  double top1_used = 0;     ///< percent of slots that were some head's best pick; top-k use saturates, this does not
  double head_overlap = 0;  ///< mean share of a head's picks of a token that another head of the token picked too
  double picks = 0;         ///< picks seen: a uniform picker would already use 1 - exp(-picks / N)
};

/// Gathers usage in evaluation. Weights must not be negative; they are summed in double.
class usage_meter {
 public:
  /// Throws config_error unless rows >= 1.
  explicit usage_meter(index_t rows) : weight_(checked(rows)), count_(weight_.size()), best_(weight_.size()) {}

  /// Adds the picks of T tokens, [T x heads picks], the first of each head its best; -1 is no pick. Throws config_error unless the columns are as
  /// many for each head, index_error for a slot outside the table, config_error for the weight of a pick that is negative or not a number; then
  /// nothing was added.
  template <class S>
  void add(matrix_view<const slot_t> slots, matrix_view<const S> weights, index_t heads) {
    require_shape("usage_meter", "weights", weights, slots.rows(), slots.cols());
    require<config_error>(heads >= 1 && slots.cols() % heads == 0, "usage_meter: expected as many picks for each head, got ", slots.cols(), " for ", heads,
                          " heads");
    for (index_t t = 0; t < slots.rows(); ++t)
      for (index_t p = 0; p < slots.cols(); ++p) {
        require<index_error>(slots(t, p) < rows(), "usage_meter: slot ", slots(t, p), " lies outside 0 .. ", rows() - 1);
        require<config_error>(slots(t, p) < 0 || weights(t, p) >= S(0), "usage_meter: expected weights that are not negative, got ", weights(t, p));
      }
    const index_t k = slots.cols() / heads;
    std::vector<std::pair<slot_t, index_t>> sorted;  // with its head
    for (index_t t = 0; t < slots.rows(); ++t) {
      for (index_t p = 0; p < slots.cols(); ++p) {
        const slot_t slot = slots(t, p);
        if (slot < 0) continue;
        weight_[static_cast<std::size_t>(slot)] += static_cast<double>(weights(t, p));
        count_[static_cast<std::size_t>(slot)] += 1;
        if (p % k == 0) best_[static_cast<std::size_t>(slot)] = 1;
        picks_ += 1;
      }
      sorted.clear();
      for (index_t p = 0; p < slots.cols(); ++p)
        if (slots(t, p) >= 0) sorted.emplace_back(slots(t, p), p / k);
      std::sort(sorted.begin(), sorted.end());
      for (std::size_t i = 0, end = 0; i < sorted.size(); i = end) {
        while (end < sorted.size() && sorted[end].first == sorted[i].first) ++end;
        if (sorted[i].second != sorted[end - 1].second) shared_ += static_cast<double>(end - i);
      }
    }
  }

  [[nodiscard]] index_t rows() const { return static_cast<index_t>(weight_.size()); }  ///< N, the slots that are watched
  /// The use of all picks that were added so far.
  [[nodiscard]] usage_report report() const {
    double best = 0;
    for (const auto b : best_) best += b;
    return {spread(weight_), spread(count_), 100 * best / static_cast<double>(rows()), picks_ > 0 ? shared_ / picks_ : 0, picks_};
  }

  /// The spread of any distribution; it is divided by its sum first.
  [[nodiscard]] static usage_spread spread(std::vector<double> z) {
    const auto n = static_cast<double>(z.size());
    double sum = 0;
    for (const double v : z) sum += v;
    usage_spread out;
    if (sum == 0) return out;
    std::sort(z.begin(), z.end());
    double cumulative = 0, area = 0;
    index_t at50 = -1, at90 = -1, at99 = -1;
    out.kl_to_uniform = std::log(n);
    for (std::size_t i = 0; i < z.size(); ++i) {
      const double p = z[i] / sum;
      if (p > 0) {
        out.used += 100 / n;
        out.kl_to_uniform += p * std::log(p);
      }
      cumulative += p;
      area += cumulative;
      const auto reached = [&](index_t& at, double level) {
        if (at < 0 && cumulative >= level) at = static_cast<index_t>(i);
      };
      reached(at50, 0.5);
      reached(at90, 0.1);
      reached(at99, 0.01);
    }
    out.gini = 1 - 2 * area / n;
    const auto all = static_cast<index_t>(z.size());
    out.top50 = all - at50;
    out.top90 = all - at90;
    out.top99 = all - at99;
    return out;
  }

 private:
  static std::size_t checked(index_t rows) {
    require<config_error>(rows >= 1, "usage_meter: expected at least 1 row, got ", rows);
    return static_cast<std::size_t>(rows);
  }

  std::vector<double> weight_, count_;
  std::vector<std::uint8_t> best_;
  double picks_ = 0, shared_ = 0;
};

}  // namespace lithe::inline LITHE_ABI
