#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// How the scores of a head's picks become weights.
enum class memory_gate_kind { softmax, relu, sigmoid, identity };
/// What is taken from the weights of a head after the gate; the median is the lower one.
enum class score_shift { none, minimum, mean, median };

struct memory_gate_config {
  memory_gate_kind kind = memory_gate_kind::softmax;
  double temperature = 1;
  score_shift subtract = score_shift::none;
  bool divide_by_sum = false;  ///< divide by the sum of magnitudes, last
};

/// The gate of a memory layer: for the scores s of one head's picks, w̃ = gate(s / temperature) - shift, w = w̃ or w̃ / Σ|w̃|. All lists
/// are [lists x picks]. Where Σ|w̃| is 0 weights and gradients are 0.
template <std::floating_point S>
struct memory_gate {
  memory_gate_config config{};

  memory_gate() = default;
  /// Throws config_error unless the temperature and its inverse are above 0 and finite in S, and for a division by the
  /// sum of plain softmax weights, which is 1.
  explicit memory_gate(memory_gate_config c) : config(c) {
    constexpr double least = std::numeric_limits<S>::min(), most = 1 / least;  // beyond, the inverse loses digits
    require<config_error>(c.temperature >= least && c.temperature <= most, "memory gate: expected a temperature from ",
                          least, " to ", most, ", got ", c.temperature);
    require<config_error>(!(c.divide_by_sum && c.kind == memory_gate_kind::softmax && c.subtract == score_shift::none),
                          "memory gate: softmax weights already sum to 1; divide_by_sum needs a shift or another gate");
  }

  void forward(matrix_view<const S> scores, matrix_view<S> weights, const context& ctx) const {
    ctx.exec->run(scores.rows(), grain, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        auto w = weights.row_array(i);
        gate(scores.row_array(i), w);
        shift(w);
        if (config.divide_by_sum) divide(w);
      }
    });
  }

  /// ds from dw; the weights are computed again from the scores.
  void backward(matrix_view<const S> scores, matrix_view<const S> dw, matrix_view<S> ds, const context& ctx) const {
    ctx.exec->run(scores.rows(), grain, [&](index_t first, index_t last) {
      const scratch<S> gated(ctx, 1, scores.cols()), shifted(ctx, 1, scores.cols());
      for (index_t i = first; i < last; ++i) {
        const auto s = scores.row_array(i);
        auto g = gated.view().row_array(0), w = shifted.view().row_array(0), d = ds.row_array(i);
        gate(s, g);
        d = dw.row_array(i);
        if (config.divide_by_sum) {  // dw̃ = (dw - sign(w̃) Σ dw w) / Σ|w̃|
          w = g;
          shift(w);
          const S sum = w.abs().sum();
          if (sum > S(0))
            d = (d - w.sign() * (d * w).sum() / sum) / sum;
          else
            d.setZero();
        }
        if (config.subtract == score_shift::mean) d -= d.mean();
        if (config.subtract == score_shift::minimum || config.subtract == score_shift::median) {
          const S total = d.sum();
          d(chosen(g)) -= total;
        }
        switch (config.kind) {
          case memory_gate_kind::softmax: d = g * (d - (g * d).sum()); break;
          case memory_gate_kind::relu: d = (s > S(0)).select(d, S(0)); break;
          case memory_gate_kind::sigmoid: d *= g * (S(1) - g); break;
          case memory_gate_kind::identity: break;
        }
        d /= static_cast<S>(config.temperature);
      }
    });
  }

 private:
  static constexpr index_t grain = 256;

  template <class A, class B>
  void gate(const A& s, B& w) const {
    const S inverse = static_cast<S>(1 / config.temperature);
    switch (config.kind) {
      case memory_gate_kind::softmax:
        w = ((s - s.maxCoeff()) * inverse).exp();
        w /= w.sum();
        break;
      case memory_gate_kind::relu: w = (s < S(0)).select(S(0), s * inverse); break;
      case memory_gate_kind::sigmoid: w = (S(1) + (s * -inverse).exp()).inverse(); break;
      case memory_gate_kind::identity: w = s * inverse; break;
    }
  }
  /// The entry whose value is subtracted: the first minimum, or the first one that equals the lower median.
  template <class A>
  index_t chosen(const A& w) const {
    index_t at = 0;
    if (config.subtract == score_shift::minimum) {
      w.minCoeff(&at);
      return at;
    }
    for (index_t rank = (w.size() - 1) / 2; at < w.size(); ++at) {
      index_t below = 0, equal = 0;
      for (index_t j = 0; j < w.size(); ++j) {
        below += w(j) < w(at);
        equal += w(j) == w(at);
      }
      if (below <= rank && rank < below + equal) return at;
    }
    return 0;  // only with NaN
  }
  template <class A>
  void shift(A& w) const {
    if (config.subtract == score_shift::mean) w -= w.mean();
    if (config.subtract == score_shift::minimum || config.subtract == score_shift::median) {
      const S value = w(chosen(w));
      w -= value;
    }
  }
  template <class A>
  static void divide(A& w) {
    const S sum = w.abs().sum();
    if (sum > S(0))
      w /= sum;
    else if (sum == S(0))
      w.setZero();
  }
};

}  // namespace lithe::inline LITHE_ABI
