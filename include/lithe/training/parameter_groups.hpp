#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "lithe/training/parameter_rows.hpp"

namespace lithe::inline LITHE_ABI {

/// How a tensor moves. With learning rate r, gradient g, decay λ, and s = 1, 2, ... the steps in which this tensor
/// moved (as torch.optim counts):
///
///     sgd              p -= r (g + λ p)
///     adam             p -= r λ p, m = β₁ m + (1 - β₁) g, v = β₂ v + (1 - β₂) g²,
///                      p -= r (m / (1 - β₁ˢ)) / (√(v / (1 - β₂ˢ)) + ε)
///                      (AdamW, Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)
///     lazy_adam        the same; of a row-sparse gradient only the touched rows move, their moments too;
///                      s counts the steps of the whole table
///     rowwise_adagrad  p -= r λ p, one sum for a row: a += mean(g²), p -= r g / (√a + ε)
///
/// Of a row-sparse gradient `sgd`, `lazy_adam` and `rowwise_adagrad` move the touched rows alone; `adam` moves every
/// row of the table, touched or not: the rule to compare with, not to train with.
enum class update_rule { sgd, adam, lazy_adam, rowwise_adagrad };

/// Settings of the parameters whose name fits `pattern`: * stands for any text, ? for any letter ("*.values", "*bias"),
/// a "!" in front for all names that do not fit. The first group that fits counts.
struct parameter_group {
  std::string pattern;
  double rate = 1;  ///< multiplies the learning rate; may be set anew before each step; 0 does what `frozen` does
  std::optional<double> own_rate{};  ///< instead of the learning rate given to `step`
  /// Instead of optimiser_config::weight_decay, under every rule; of a table whose touched rows alone move, a row
  /// decays in the steps that touch it.
  std::optional<double> weight_decay{};
  std::optional<update_rule> rule{};  ///< instead of `dense` or `sparse`
  bool frozen = false;  ///< does not move, does not decay; its moments stay as they are, its steps are not counted

  /// Whether the parameters of this group move.
  [[nodiscard]] bool moves() const { return !frozen && rate != 0 && own_rate != 0.0; }
};

/// The first group whose pattern fits a name, or null.
[[nodiscard]] inline const parameter_group* group_of(std::span<const parameter_group> groups, std::string_view name) {
  const auto fits = [&](const parameter_group& g) { return detail::matches(g.pattern, name); };
  const auto it = std::find_if(groups.begin(), groups.end(), fits);
  return it == groups.end() ? nullptr : &*it;
}

/// Which parameters a function over gradients counts: those whose name fits a pattern ("*.values", "!*.values": all but
/// those), or, given the groups of an optimiser, those that it moves. Made in the call that it is an argument of.
class parameter_choice {
 public:
  parameter_choice(std::string_view pattern = "*") : pattern_(pattern) {}                 ///< those whose name fits
  parameter_choice(const char* pattern) : pattern_(pattern) {}                            ///< those whose name fits
  parameter_choice(const std::string& pattern) : pattern_(pattern) {}                     ///< those whose name fits
  parameter_choice(const std::vector<parameter_group>& groups) : groups_(&groups) {}      ///< those that an optimiser moves

  /// Whether the parameter of this name counts.
  [[nodiscard]] bool operator()(std::string_view name) const {
    if (groups_ == nullptr) return detail::matches(pattern_, name);
    const parameter_group* g = group_of(*groups_, name);
    return g == nullptr || g->moves();
  }
  /// The pattern that must fit some name; none if groups choose, because all may be frozen.
  [[nodiscard]] std::optional<std::string_view> pattern() const {
    return groups_ == nullptr ? std::optional(pattern_) : std::nullopt;
  }

 private:
  std::string_view pattern_;
  const std::vector<parameter_group>* groups_ = nullptr;
};

}  // namespace lithe::inline LITHE_ABI
