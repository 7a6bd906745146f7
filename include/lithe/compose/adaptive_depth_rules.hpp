#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lithe/layers/halting_distributions.hpp"

// N exits, V classes, t the number of the output token, from 0 behind what was last taken in as a prompt
namespace lithe::inline LITHE_ABI {

/// What decides that a token leaves after block n < N.
enum class exit_confidence {
  fixed,         ///< an exit given beforehand, for all or for each slot (the sequence-level distribution)
  geometric,     ///< χⁿ = σ(zⁿ) of the model's halting head (arXiv 1910.10073, section 4.2)
  multinomial,   ///< the most probable exit of the halting head after block 1
  max_prob,      ///< the largest probability (the same, section 4.3)
  softmax_diff,  ///< the largest minus the second (arXiv 2207.07061, section 3.2)
  entropy,       ///< 1 - H(p) / ln V
  state,         ///< cos(hⁿ, hⁿ⁻¹) for n >= 2 (arXiv 2207.07061, section 3.2)
  meta           ///< σ of the model's meta head (the same)
};

/// How a threshold λ falls with the output position t (arXiv 2207.07061, section 3.4): paper clip(0.9 λ + 0.1 exp(-temperature t / T_max), 0, 1), t5x
/// (its public code) 0.9 λ + 0.1 λ exp(-temperature t / T_max).
enum class threshold_decay { none, paper, t5x };
[[nodiscard]] inline double decayed_threshold(threshold_decay form, double threshold, double temperature, index_t t, index_t longest) {
  const double left = std::exp(-temperature * static_cast<double>(t) / static_cast<double>(std::max<index_t>(1, longest)));
  switch (form) {
    case threshold_decay::none:
      return threshold;
    case threshold_decay::paper:
      return std::clamp(0.9 * threshold + 0.1 * left, 0.0, 1.0);
    case threshold_decay::t5x:
      return 0.9 * threshold + 0.1 * threshold * left;
  }
  return threshold;
}

/// When tokens leave. An exit needs a confidence that reaches its threshold (`reaches`: 1 or more means never, 0 or less at the first exit that is
/// allowed).
struct exit_rule {
  exit_confidence kind = exit_confidence::fixed;
  std::vector<double> thresholds{0.5};  ///< one for all exits, or N - 1
  bool strict = false;                  ///< confidence > threshold instead of >=
  threshold_decay decay = threshold_decay::none;
  double temperature = 4;             ///< of the decay
  index_t longest = 1;                ///< T_max of the decay
  index_t first = 1, interval = 1;    ///< exits are allowed at first, first + interval, ..., and N
  bool whole_batch = false;           ///< the rows of a step leave together, once all of them would
  bool eager = false;                 ///< keys and values of skipped blocks at once, instead of when somebody needs them
  std::vector<std::int32_t> exits{};  ///< fixed: of each slot, or one for all; empty: N

  /// Throws config_error unless the rule fits a model of N exits.
  void check(index_t N) const {
    require<config_error>(thresholds.size() == 1 || static_cast<index_t>(thresholds.size()) == N - 1, "exit_rule: expected 1 threshold or ", N - 1,
                          ", got ", thresholds.size());
    for (const double t : thresholds) require<config_error>(!std::isnan(t), "exit_rule: a threshold is not a number");
    require<config_error>(first >= 1 && first <= N && interval >= 1, "exit_rule: expected a first exit from 1 to ", N,
                          " and an interval of at least 1, got ", first, " and ", interval);
    require<config_error>(longest >= 1 && std::isfinite(temperature),
                          "exit_rule: expected a longest output of at least 1 and a finite temperature, got ", longest, " and ", temperature);
    for (const auto n : exits) require<config_error>(n >= 1 && n <= N, "exit_rule: expected exits from 1 to ", N, ", got ", n);
  }
  /// Whether a token may leave after block n < N, from 1.
  [[nodiscard]] bool allowed(index_t n) const { return n >= first && (n - first) % interval == 0 && (kind != exit_confidence::state || n >= 2); }
  /// λ of exit n, from 1, for output position t, after the decay.
  [[nodiscard]] double threshold(index_t n, index_t t) const {
    return decayed_threshold(decay, thresholds.size() == 1 ? thresholds[0] : thresholds[static_cast<std::size_t>(n - 1)], temperature, t, longest);
  }
  /// Whether the confidence is computed from the logits of an exit.
  [[nodiscard]] bool reads_logits() const {
    return kind == exit_confidence::max_prob || kind == exit_confidence::softmax_diff || kind == exit_confidence::entropy;
  }
  /// Whether the exit is known before its block has run.
  [[nodiscard]] bool planned() const { return kind == exit_confidence::fixed || kind == exit_confidence::multinomial; }
};

/// log Σ exp z - Σ p z of V logits z with probabilities p, in nats; not a number if a logit is none.
template <class S>
[[nodiscard]] double answer_entropy(const S* logits, index_t classes) {
  const auto largest = static_cast<double>(*std::max_element(logits, logits + classes));
  double sum = 0, weighted = 0;
  for (index_t v = 0; v < classes; ++v) {
    const double x = static_cast<double>(logits[v]) - largest, e = std::exp(x);
    sum += e;
    weighted += e == 0 ? 0 : e * x;
  }
  return std::log(sum) - weighted / sum;
}

/// The confidence that V logits have in their answer: max_prob, softmax_diff or entropy; not a number if a logit is none.
template <class S>
[[nodiscard]] double answer_confidence(exit_confidence kind, const S* logits, index_t classes) {
  S largest = -std::numeric_limits<S>::infinity(), second = largest;
  bool valid = true;
  for (index_t v = 0; v < classes; ++v) {
    valid = valid && !std::isnan(logits[v]);
    second = std::max(second, std::min(largest, logits[v]));
    largest = std::max(largest, logits[v]);
  }
  if (!valid) return std::numeric_limits<double>::quiet_NaN();
  if (classes < 2) return 1;
  if (kind == exit_confidence::entropy) return 1 - answer_entropy(logits, classes) / std::log(static_cast<double>(classes));
  double sum = 0;
  for (index_t v = 0; v < classes; ++v) sum += std::exp(static_cast<double>(logits[v] - largest));
  return (kind == exit_confidence::max_prob ? 1 : -std::expm1(static_cast<double>(second - largest))) / sum;
}

}  // namespace lithe::inline LITHE_ABI
