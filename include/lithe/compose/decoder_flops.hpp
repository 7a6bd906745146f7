#pragma once

#include "lithe/compose/adaptive_depth_rules.hpp"

namespace lithe::inline LITHE_ABI {

/// The paper's count of floating-point operations (arXiv 1910.10073, appendix): what one token costs at exit n of N.
struct decoder_flops {
  double width = 0, inner = 0, length = 0;     ///< d, d_f, and the tokens it sees
  double memory_length = 0, memory_width = 0;  ///< |x| and d_e; 0 without cross-attention
  double classes = 0;

  /// 12 d² + 4 d_f d + 4 t d + 4 |x| d.
  [[nodiscard]] double block() const { return 12 * width * width + 4 * inner * width + 4 * length * width + 4 * memory_length * width; }
  /// Keys and values of the memory, at a block's first visit: 4 |x| d d_e.
  [[nodiscard]] double first_visit() const { return 4 * memory_length * width * memory_width; }
  /// A skipped block's keys and values: 4 d².
  [[nodiscard]] double skipped() const { return 4 * width * width; }
  /// n blocks, N - n skipped ones, the exit tests and (unless the test has already made them) the logits.
  [[nodiscard]] double token(exit_confidence kind, index_t n, index_t exits) const {
    const auto left = static_cast<double>(n), all = static_cast<double>(exits);
    const double blocks = left * block() + (all - left) * skipped();
    switch (kind) {
      case exit_confidence::fixed:
      case exit_confidence::state:
        return blocks + 2 * classes * width;
      case exit_confidence::multinomial:
        return blocks + 2 * all * width + 2 * classes * width;
      case exit_confidence::geometric:
      case exit_confidence::meta:
        return blocks + 2 * width * left + 2 * classes * width;
      case exit_confidence::max_prob:
      case exit_confidence::softmax_diff:
      case exit_confidence::entropy:
        return blocks + 2 * left * classes * width;
    }
    return blocks;
  }
};

}  // namespace lithe::inline LITHE_ABI
