#pragma once

// Which steps may move a model, and when a run cannot recover.

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace support {

/// A run whose numbers are not finite, step after step: nothing of it is worth saving.
struct diverged : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Judges each step of a run by its loss and the norm of its gradient, as `clip_by_global_norm` returns it:
///
///     step_guard guard;
///     ... forward, loss, backward ...
///     const double norm = clip_by_global_norm(model, gradient, 1.0, ctx);
///     if (guard.accepts(loss, norm)) adam.step(model, gradient, rate, ctx);
///     ... at the end of the run, before its model is saved ...
///     guard.check();
class step_guard {
 public:
  static constexpr std::int64_t patience = 10;  ///< skipped steps in a row that a run survives, but one

  /// `who`: the model, where several are trained side by side.
  explicit step_guard(std::string who = "") : who_(std::move(who)) {}

  /// Whether the optimiser may take the step: loss and norm are finite. Throws `diverged` at the last of `patience`
  /// steps in a row that it may not.
  [[nodiscard]] bool accepts(double loss, double norm) {
    const bool finite = std::isfinite(loss) && std::isfinite(norm);
    in_a_row_ = finite ? 0 : in_a_row_ + 1;
    skipped_ += finite ? 0 : 1;
    if (in_a_row_ >= patience) check();
    return finite;
  }
  /// Throws `diverged` if the last step was skipped: nothing shows that the model as it stands is any good.
  void check() const {
    if (in_a_row_ == 0) return;
    throw diverged((who_.empty() ? "" : who_ + ": ") + "the loss or its gradient was not finite in the last " +
                   (in_a_row_ == 1 ? std::string("step") : std::to_string(in_a_row_) + " steps") +
                   "; the model is not saved (a lower learning rate may help)");
  }
  /// How many steps were skipped so far.
  [[nodiscard]] std::int64_t skipped() const { return skipped_; }
  /// The same for the line of progress; empty if none was.
  [[nodiscard]] std::string report() const { return skipped_ == 0 ? "" : std::to_string(skipped_) + " steps skipped"; }

 private:
  std::string who_;
  std::int64_t skipped_ = 0, in_a_row_ = 0;
};

}  // namespace support
