#pragma once

#include <algorithm>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lithe/tensor/matrix_view.hpp"

namespace lithe::inline LITHE_ABI::detail {

/// n zeros, aligned to 64 bytes; from 4 MiB on in huge pages if the system has them: neither a random row nor a stream then waits for page walks.
template <class S>
class large_array {
 public:
  large_array() = default;
  explicit large_array(index_t n) : large_array(n, nullptr) {}
  large_array(const large_array& other) : large_array(other.size_, other.data_) {}
  large_array(large_array&& other) noexcept { swap(other); }
  large_array& operator=(large_array other) noexcept {
    swap(other);
    return *this;
  }
  ~large_array() { ::operator delete(data_, std::align_val_t{alignment(size_)}); }

  [[nodiscard]] index_t size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] S* data() { return data_; }
  [[nodiscard]] const S* data() const { return data_; }

 private:
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  large_array(index_t n, const S* from) : size_(n) {
    if (n == 0) return;
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(S);
    data_ = static_cast<S*>(::operator new(bytes, std::align_val_t{alignment(n)}));
#if defined(__linux__)
    if (alignment(n) == huge_page) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: arrays work without
#endif
    if (from != nullptr)
      std::copy_n(from, n, data_);
    else
      std::fill_n(data_, n, S(0));
  }
  static std::size_t alignment(index_t n) { return static_cast<std::size_t>(n) * sizeof(S) >= 2 * huge_page ? huge_page : 64; }
  void swap(large_array& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  S* data_ = nullptr;
  index_t size_ = 0;
};

}  // namespace lithe::inline LITHE_ABI::detail
