#pragma once

#include <cmath>

#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// The length that shared queries and keys give a key. `rms`: 1/√(mean(q²) + 1e-6), so about 1 after the scale of the scores; `unit`: 1/max(|q|, 1e-12).
enum class key_norm { rms, unit };

/// s_j = c n_j, the factor that makes the key k_j = s_j q_j of a shared query (arXiv 2001.04451, section 2): c = 1/√D and n_j by `norm`.
/// q [T x D], scales [T].
template <class S>
void key_scales(key_norm norm, matrix_view<const S> q, S* scales) {
  const S d = static_cast<S>(q.cols());
  for (index_t t = 0; t < q.rows(); ++t) {
    const S square = q.row_array(t).square().sum();
    scales[t] = norm == key_norm::rms ? S(1) / std::sqrt(square + d * S(1e-6)) : S(1) / (std::sqrt(d) * std::max(std::sqrt(square), S(1e-12)));
  }
}

/// Backward through the key's length: dq_j += h_j - (n_j² / e) (q_j · h_j) q_j, where h_j = s_j dk_j is the gradient of the key times its scale, and e = D
/// for `rms`, 1 for `unit` (where a query shorter than 1e-12 has no second term). q, h, dq [T x D]; scales [T] from `key_scales`.
template <class S>
void add_key_gradient(key_norm norm, matrix_view<const S> q, const S* scales, matrix_view<const S> h, matrix_view<S> dq) {
  const S d = static_cast<S>(q.cols()), longest = S(0.999) / (std::sqrt(d) * S(1e-12));
  for (index_t t = 0; t < q.rows(); ++t) {
    const S s = scales[t], along = norm == key_norm::rms ? s * s : s < longest ? d * s * s : S(0);
    const S shift = along * (q.row_array(t) * h.row_array(t)).sum();
    dq.row_array(t) += h.row_array(t) - shift * q.row_array(t);
  }
}

}  // namespace lithe::inline LITHE_ABI
