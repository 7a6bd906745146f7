#pragma once

// What the limit cases need, and nothing of Lithe: large pages, a second thread that is awake, the name of the machine.

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <fstream>
#include <functional>
#include <new>
#include <string>
#include <thread>

namespace machine {

/// Numbers on huge pages, zero at first.
template <class T>
class huge_array {
 public:
  explicit huge_array(std::size_t n) : size_(n), bytes_((n * sizeof(T) + page - 1) / page * page + page) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = p;
    data_ = reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(p) + page - 1) / page * page);
    madvise(data_, bytes_ - page, MADV_HUGEPAGE);
  }
  huge_array(const huge_array&) = delete;
  huge_array& operator=(const huge_array&) = delete;
  ~huge_array() { munmap(base_, bytes_); }
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t page = std::size_t{1} << 21;
  std::size_t size_, bytes_;
  void* base_;
  T* data_;
};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

/// One or two threads that start together: the caller does part 0, a thread that spins does part 1.
class pair_of_threads {
 public:
  explicit pair_of_threads(int n) : n_(n) {
    if (n_ == 2) helper_ = std::thread([this] { serve(); });
  }
  pair_of_threads(const pair_of_threads&) = delete;
  pair_of_threads& operator=(const pair_of_threads&) = delete;
  ~pair_of_threads() {
    if (n_ != 2) return;
    work_ = nullptr;
    turn_.store(turn_.load() + 1, std::memory_order_release);
    helper_.join();
  }
  /// work(part, parts) for every part at once; returns when all are done.
  void run(const std::function<void(int, int)>& work) {
    if (n_ == 1) return work(0, 1);
    work_ = &work;
    const int now = turn_.load(std::memory_order_relaxed) + 1;
    turn_.store(now, std::memory_order_release);
    work(0, 2);
    while (done_.load(std::memory_order_acquire) != now) pause();
  }

 private:
  void serve() {
    for (int seen = 0;;) {
      while (turn_.load(std::memory_order_acquire) == seen) pause();
      ++seen;
      if (work_ == nullptr) return;
      (*work_)(1, 2);
      done_.store(seen, std::memory_order_release);
    }
  }
  int n_;
  const std::function<void(int, int)>* work_ = nullptr;
  alignas(64) std::atomic<int> turn_{0};
  alignas(64) std::atomic<int> done_{0};
  std::thread helper_;
};

/// A field of the first processor in /proc/cpuinfo, or "".
inline std::string cpu_field(const std::string& name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line) && !line.empty();) {
    const auto colon = line.find(':');
    if (colon != std::string::npos && line.compare(0, name.size(), name) == 0 &&
        line.find_first_not_of(" \t", name.size()) == colon)
      return line.substr(std::min(line.size(), colon + 2));
  }
  return "";
}

/// Whether limits were once measured on this kind of machine: AMD Zen 5 (family 26), built for AVX-512.
inline bool has_reference_figures() {
#if defined(__AVX512F__)
  return cpu_field("vendor_id") == "AuthenticAMD" && cpu_field("cpu family") == "26";
#else
  return false;
#endif
}

/// Cheap random bits (xorshift64*), for data that only has to be unpredictable.
struct random_bits {
  std::uint64_t state = 0x9e3779b97f4a7c15ULL;
  std::uint64_t operator()() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dULL;
  }
  /// In [0, n), n below 2^32.
  std::int32_t below(std::uint64_t n) { return static_cast<std::int32_t>(((*this)() >> 32) * n >> 32); }
  /// In [-1, 1).
  float symmetric() { return static_cast<float>(static_cast<std::int32_t>((*this)() >> 32)) * 0x1p-31F; }
};

}  // namespace machine
