#pragma once

#include <cmath>
#include <numbers>

#include "lithe/tensor/scratch.hpp"

namespace lithe::inline LITHE_ABI {

/// Elementwise non-linearities: relu max(x, 0); gelu x Φ(x) with the exact normal distribution Φ; gelu_tanh its tanh form
/// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 (arXiv 1606.08415); silu x σ(x).
enum class activation { relu, gelu, gelu_tanh, silu };

namespace detail {

inline constexpr index_t elementwise_grain = 1 << 14;  // numbers in one piece of an elementwise loop

/// The normal distribution function. In float by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7, which vectorises); in double
/// by the C library.
template <class S, int N>
Eigen::Array<S, N, 1> normal_cdf(const Eigen::Array<S, N, 1>& x) {
  if constexpr (std::same_as<S, float>) {
    const Eigen::Array<S, N, 1> z = x.abs() * S(std::numbers::sqrt2 / 2);
    const Eigen::Array<S, N, 1> t = (S(1) + S(0.3275911) * z).inverse();
    const Eigen::Array<S, N, 1> p =
        t * (S(0.254829592) + t * (S(-0.284496736) + t * (S(1.421413741) + t * (S(-1.453152027) + t * S(1.061405429)))));
    const Eigen::Array<S, N, 1> tail = S(0.5) * p * (-z * z).exp();  // Φ(-|x|)
    return (x < S(0)).select(tail, S(1) - tail);
  } else {
    return x.unaryExpr([](S v) { return S(0.5) * std::erfc(-v * S(std::numbers::sqrt2 / 2)); });
  }
}

template <class S, int N>
Eigen::Array<S, N, 1> logistic(const Eigen::Array<S, N, 1>& x) {
  return (S(1) + (-x).exp()).inverse();
}

template <class S, int N>
Eigen::Array<S, N, 1> gelu_tanh_argument(const Eigen::Array<S, N, 1>& x) {
  return S(std::numbers::sqrt2 * std::numbers::inv_sqrtpi) * (x + S(0.044715) * x.cube());
}

template <activation A, class S, int N>
Eigen::Array<S, N, 1> activate(const Eigen::Array<S, N, 1>& x) {
  if constexpr (A == activation::relu) return (x < S(0)).select(S(0), x);  // NaN stays NaN
  if constexpr (A == activation::gelu) return x * normal_cdf<S, N>(x);
  if constexpr (A == activation::gelu_tanh) return S(0.5) * x * (S(1) + gelu_tanh_argument<S, N>(x).tanh());
  if constexpr (A == activation::silu) return x * logistic<S, N>(x);
}

template <activation A, class S, int N>
Eigen::Array<S, N, 1> activation_slope(const Eigen::Array<S, N, 1>& x) {
  using array = Eigen::Array<S, N, 1>;
  if constexpr (A == activation::relu) return (x > S(0)).select(array::Ones(), array::Zero());
  if constexpr (A == activation::gelu)
    return normal_cdf<S, N>(x) + x * (x.square() * S(-0.5)).exp() * S(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
  if constexpr (A == activation::gelu_tanh) {
    const array t = gelu_tanh_argument<S, N>(x).tanh();
    return S(0.5) * (S(1) + t) +
           S(0.5) * x * (S(1) - t.square()) * S(std::numbers::sqrt2 * std::numbers::inv_sqrtpi) * (S(1) + S(3 * 0.044715) * x.square());
  }
  if constexpr (A == activation::silu) {
    const array s = logistic<S, N>(x);
    return s * (S(1) + x * (S(1) - s));
  }
}

/// f over n numbers, by pieces of fixed length so that the compiler sees whole vectors; the last one is padded with zeros.
template <class S, class F>
void by_pieces(index_t n, F&& f) {
  constexpr int width = 64;
  using piece = Eigen::Array<S, width, 1>;
  for (index_t i = 0; i < n; i += width) {
    const index_t m = std::min<index_t>(width, n - i);
    const auto load = [&](const S* from) {
      piece p;
      if (m == width) {
        p = Eigen::Map<const piece>(from + i);
      } else {
        p.setZero();
        std::copy_n(from + i, m, p.data());
      }
      return p;
    };
    const auto store = [&](S* to, const piece& p) {
      if (m == width)
        Eigen::Map<piece>(to + i) = p;
      else
        std::copy_n(p.data(), m, to + i);
    };
    f(load, store);
  }
}

template <class F>
void with_activation(activation a, F&& f) {
  switch (a) {
    case activation::relu: return f.template operator()<activation::relu>();
    case activation::gelu: return f.template operator()<activation::gelu>();
    case activation::gelu_tanh: return f.template operator()<activation::gelu_tanh>();
    case activation::silu: return f.template operator()<activation::silu>();
  }
}

inline index_t grain_rows(index_t cols) { return std::max<index_t>(1, elementwise_grain / std::max<index_t>(1, cols)); }

}  // namespace detail

/// y = a(x); x and y may be the same matrix.
template <class S>
void activate(activation a, matrix_view<const S> x, matrix_view<S> y, const context& ctx) {
  LITHE_ASSERT(x.rows() == y.rows() && x.cols() == y.cols());
  detail::with_activation(a, [&]<activation A>() {
    ctx.exec->run(x.rows(), detail::grain_rows(x.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        detail::by_pieces<S>(x.cols(), [&](auto load, auto store) { store(y.row(t), detail::activate<A>(load(x.row(t)))); });
    });
  });
}

/// dx = dy ⊙ a'(x); dy and dx may be the same matrix.
template <class S>
void activate_backward(activation a, matrix_view<const S> x, matrix_view<const S> dy, matrix_view<S> dx, const context& ctx) {
  LITHE_ASSERT(x.rows() == dx.rows() && x.cols() == dx.cols() && x.rows() == dy.rows() && x.cols() == dy.cols());
  detail::with_activation(a, [&]<activation A>() {
    ctx.exec->run(x.rows(), detail::grain_rows(x.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        detail::by_pieces<S>(x.cols(), [&](auto load, auto store) { store(dx.row(t), load(dy.row(t)) * detail::activation_slope<A>(load(x.row(t)))); });
    });
  });
}

/// y = a(u) ⊙ v, the gated form; y may be u or v.
template <class S>
void activate_gated(activation a, matrix_view<const S> u, matrix_view<const S> v, matrix_view<S> y, const context& ctx) {
  detail::with_activation(a, [&]<activation A>() {
    ctx.exec->run(u.rows(), detail::grain_rows(u.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        detail::by_pieces<S>(u.cols(), [&](auto load, auto store) { store(y.row(t), detail::activate<A>(load(u.row(t))) * load(v.row(t))); });
    });
  });
}

/// du = dy ⊙ v ⊙ a'(u) and dv = dy ⊙ a(u); either may be dy.
template <class S>
void activate_gated_backward(activation a, matrix_view<const S> u, matrix_view<const S> v, matrix_view<const S> dy, matrix_view<S> du,
                             matrix_view<S> dv, const context& ctx) {
  detail::with_activation(a, [&]<activation A>() {
    ctx.exec->run(u.rows(), detail::grain_rows(u.cols()), [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        detail::by_pieces<S>(u.cols(), [&](auto load, auto store) {
          const auto pu = load(u.row(t)), pv = load(v.row(t)), d = load(dy.row(t));
          store(dv.row(t), d * detail::activate<A>(pu));
          store(du.row(t), d * pv * detail::activation_slope<A>(pu));
        });
    });
  });
}

}  // namespace lithe::inline LITHE_ABI
