#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lithe/training/accumulate.hpp"
#include "lithe/training/parameter_rows.hpp"

// The arithmetic of the optimisers, on runs of numbers: p parameters, g gradients, m and v first and second moments.
namespace lithe::inline LITHE_ABI::detail {

/// A matrix that starts at zero without being written: the system gives the memory of a large one when it is first touched, in huge
/// pages if it has them, so that moments of a value table cost what its used rows need and a random row costs no page walk.
template <class S>
class zeroed_matrix {
 public:
  zeroed_matrix() = default;
  zeroed_matrix(index_t rows, index_t cols) : rows_(rows), cols_(cols) {
    const std::size_t bytes = static_cast<std::size_t>(rows * cols) * sizeof(S), alignment = bytes >= 2 * huge_page ? huge_page : 64;
    auto* const whole = static_cast<std::byte*>(std::calloc(bytes + alignment, 1));
    if (whole == nullptr) throw std::bad_alloc();
    S* const begin = reinterpret_cast<S*>(whole + (alignment - reinterpret_cast<std::uintptr_t>(whole) % alignment));
    data_ = {begin, {whole}};
#if defined(__linux__)
    if (alignment == huge_page) madvise(begin, bytes / huge_page * huge_page, MADV_HUGEPAGE);  // a wish
#endif
  }
  [[nodiscard]] matrix_view<S> view() const {
    return data_ == nullptr ? matrix_view<S>() : matrix_view<S>(data_.get(), rows_, cols_);
  }
  [[nodiscard]] S* row(index_t i) const { return data_ == nullptr ? nullptr : data_.get() + i * cols_; }

 private:
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  struct free_whole {
    std::byte* whole = nullptr;
    void operator()(S*) const { std::free(whole); }
  };
  std::unique_ptr<S, free_whole> data_;  // begins within `whole`
  index_t rows_ = 0, cols_ = 0;
};

inline constexpr index_t update_block = 1024;  // numbers for which p, g, m and v stay in the first-level cache between passes

/// f(first, n) for blocks of a run of numbers.
template <class F>
void for_blocks(index_t n, F&& f) {
  for (index_t first = 0; first < n; first += update_block) f(first, std::min(update_block, n - first));
}
template <class S>
auto run_of(S* x, index_t n) {
  using array = Eigen::Array<std::remove_const_t<S>, Eigen::Dynamic, 1>;
  return Eigen::Map<std::conditional_t<std::is_const_v<S>, const array, array>>(x, n);
}

/// p -= rate (g + decay p).
template <class S>
struct sgd_update {
  S rate, keep;  // keep = 1 - rate * decay

  sgd_update(double learning_rate, double decay) : rate(static_cast<S>(learning_rate)), keep(static_cast<S>(1 - learning_rate * decay)) {}
  void operator()(S* p, const S* g, S*, S*, index_t n) const {
    for_blocks(n, [&](index_t at, index_t k) { run_of(p + at, k) = keep * run_of(p + at, k) - rate * run_of(g + at, k); });
  }
};

/// Adam's update at step s = 1, 2, ...; without a gradient, g = 0.
template <class S>
struct adam_update {
  S beta1, beta2, rest1, rest2;  // rest = 1 - beta
  S rate, root_scale, epsilon, keep;

  adam_update(double b1, double b2, double eps, double learning_rate, double decay, double s)
      : beta1(static_cast<S>(b1)),
        beta2(static_cast<S>(b2)),
        rest1(static_cast<S>(1 - b1)),
        rest2(static_cast<S>(1 - b2)),
        rate(static_cast<S>(learning_rate / (1 - std::pow(b1, s)))),
        root_scale(static_cast<S>(1 / std::sqrt(1 - std::pow(b2, s)))),
        epsilon(static_cast<S>(eps)),
        keep(static_cast<S>(1 - learning_rate * decay)) {}
  void operator()(S* p, const S* g, S* m, S* v, index_t n) const {
    for_blocks(n, [&](index_t at, index_t k) {
      auto mb = run_of(m + at, k), vb = run_of(v + at, k), pb = run_of(p + at, k);
      if (g != nullptr) {
        const auto gb = run_of(g + at, k);
        mb = beta1 * mb + rest1 * gb;
        vb = beta2 * vb + rest2 * gb.square();
      } else {
        mb *= beta1;
        vb *= beta2;
      }
      pb = keep * pb - rate * mb / (root_scale * vb.sqrt() + epsilon);
    });
  }
};

/// AdaGrad with one sum for a whole row, p -= rate decay p, v[0] += mean(g²), p -= rate g / (√v[0] + epsilon).
template <class S>
struct rowwise_adagrad_update {
  S rate, epsilon, keep;

  rowwise_adagrad_update(double learning_rate, double decay, double eps)
      : rate(static_cast<S>(learning_rate)),
        epsilon(static_cast<S>(eps)),
        keep(static_cast<S>(1 - learning_rate * decay)) {}
  void operator()(S* p, const S* g, S*, S* v, index_t n) const {
    v[0] += static_cast<S>(sum_of_squares(g, n) / static_cast<double>(n));
    const S step = rate / (std::sqrt(v[0]) + epsilon);
    run_of(p, n) = keep * run_of(p, n) - step * run_of(g, n);
  }
};

}  // namespace lithe::inline LITHE_ABI::detail
