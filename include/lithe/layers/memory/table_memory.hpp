#pragma once

#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lithe/core/random.hpp"
#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// n zeros, aligned to 64 bytes; from 4 MiB on in huge pages if the system has them: a random row then costs no page walk.
template <class S>
class table_memory {
 public:
  table_memory() = default;
  explicit table_memory(index_t n) : table_memory(n, nullptr) {}
  table_memory(const table_memory& other) : table_memory(other.size_, other.data_) {}
  table_memory(table_memory&& other) noexcept { swap(other); }
  table_memory& operator=(table_memory other) noexcept {
    swap(other);
    return *this;
  }
  ~table_memory() { ::operator delete(data_, std::align_val_t{alignment(size_)}); }

  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] S* data() { return data_; }
  [[nodiscard]] const S* data() const { return data_; }

 private:
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  table_memory(index_t n, const S* from) : size_(n) {
    if (n == 0) return;
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(S);
    data_ = static_cast<S*>(::operator new(bytes, std::align_val_t{alignment(n)}));
#if defined(__linux__)
    if (alignment(n) == huge_page) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: tables work without
#endif
    if (from != nullptr)
      std::copy_n(from, n, data_);
    else
      std::fill_n(data_, n, S(0));
  }
  static std::size_t alignment(index_t n) { return static_cast<std::size_t>(n) * sizeof(S) >= 2 * huge_page ? huge_page : 64; }
  void swap(table_memory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  S* data_ = nullptr;
  index_t size_ = 0;
};

/// to[0..n) = row `row` of a table of normal numbers (Box-Muller, both numbers of each pair, on Eigen's arrays: tables are large).
template <class S>
void fill_normal_row(S* to, index_t n, double deviation, rng_key key, index_t row) {
  constexpr int block = 64;
  using array = Eigen::Array<S, block, 1>;
  for (index_t c = 0; c < n; c += 2 * block) {
    array u, v;
    for (int i = 0; i < block; i += 2) {
      const auto word = philox(key, static_cast<std::uint64_t>((c + 2 * i) / 4), static_cast<std::uint64_t>(row));
      u[i] = (static_cast<S>(word[0]) + S(0.5)) * S(0x1p-32);
      v[i] = static_cast<S>(word[1]) * S(0x1p-32);
      u[i + 1] = (static_cast<S>(word[2]) + S(0.5)) * S(0x1p-32);
      v[i + 1] = static_cast<S>(word[3]) * S(0x1p-32);
    }
    const array radius = static_cast<S>(deviation) * (S(-2) * u.log()).sqrt(), angle = S(2 * std::numbers::pi) * v;
    const array first = radius * angle.cos(), second = radius * angle.sin();
    std::copy_n(first.data(), std::min<index_t>(block, n - c), to + c);
    if (n - c > block) std::copy_n(second.data(), std::min<index_t>(block, n - c - block), to + c + block);
  }
}

}  // namespace lithe::inline LITHE_ABI::detail
