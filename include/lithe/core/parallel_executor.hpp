#pragma once

#include <atomic>
#include <exception>
#include <thread>

#if __has_include(<Eigen/ThreadPool>)
#include <Eigen/ThreadPool>
#else
#include <unsupported/Eigen/CXX11/ThreadPool>
#endif

#include "lithe/core/error.hpp"
#include "lithe/core/executor.hpp"

namespace lithe::inline LITHE_ABI {

/// Runs loops on the calling thread and `workers - 1` threads of Eigen's own pool. Threads are never pinned.
///
/// A loop is published in the executor; whoever is awake takes pieces of it, those of its own share first and then the last of another's: what
/// one loop leaves in a core's cache, the next one finds there. The caller never waits for a helper that has not woken up yet, only for helpers that
/// hold a piece: a loop shorter than a wake-up costs next to nothing. A helper that runs out of pieces lingers for some microseconds before it
/// sleeps, because a layer's loops follow one another closely.
class parallel_executor final : public executor {
 public:
  /// Throws config_error unless workers >= 1.
  explicit parallel_executor(index_t workers = static_cast<index_t>(std::max(1U, std::thread::hardware_concurrency())))
      : workers_(checked(workers)), linger_(workers <= static_cast<index_t>(std::thread::hardware_concurrency()) ? linger_spins : 0),
        pool_(static_cast<int>(std::max<index_t>(1, workers - 1)), /*allow_spinning=*/false) {}

  ~parallel_executor() override { closing_.store(true, std::memory_order_relaxed); }

  [[nodiscard]] index_t workers() const override { return workers_; }
  [[nodiscard]] index_t worker() const override {
    if (const index_t helper = pool_.CurrentThreadId(); helper >= 0) return helper + 2;
    return caller_.load(std::memory_order_relaxed) == std::this_thread::get_id() ? 1 : 0;  // other threads may call layers meanwhile
  }

  void run(index_t n, index_t grain, body f) const override {
    if (n <= 0) return;
    // Nested loops, loops of one piece (or of more than a share can count) and loops of a second caller run where they are.
    if (n <= grain || n / grain >= most_pieces || workers_ == 1 || worker() != 0 || busy_.test_and_set(std::memory_order_acquire))
      return executor::run(n, grain, f);
    loop now(f, n, grain, std::min(workers_, most_shares));
    open(now);
    caller_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    now.work(0);
    caller_.store({}, std::memory_order_relaxed);
    close();
    busy_.clear(std::memory_order_release);
    if (now.error) std::rethrow_exception(now.error);
  }

 private:
  static constexpr int linger_spins = 4000;  // about 20 to 50 microseconds of pause instructions
  static constexpr index_t most_shares = 32;  // on the caller's stack; more workers than that share them
  static constexpr index_t most_pieces = (index_t{1} << 32) - 1;

  struct loop {
    /// The pieces that one worker begins with, [first, last) in the halves of a word: it takes the first of them and the others the last,
    /// so that loop after loop nearly the same pieces change hands. A cache line of its own.
    struct alignas(64) share {
      std::atomic<std::uint64_t> left{0};

      /// Takes the pieces first .. last - 1; equal numbers leave nothing.
      void set(index_t first, index_t last) {
        left.store(static_cast<std::uint64_t>(first) << 32 | static_cast<std::uint64_t>(last), std::memory_order_relaxed);
      }
      /// A piece, or -1 if none is left.
      index_t take(bool front) {
        for (auto now = left.load(std::memory_order_relaxed);;) {
          const auto first = now >> 32, last = now & 0xffffffff;
          if (first >= last) return -1;
          const auto next = front ? now + (std::uint64_t{1} << 32) : now - 1;
          if (left.compare_exchange_weak(now, next, std::memory_order_relaxed)) return static_cast<index_t>(front ? first : last - 1);
        }
      }
    };
    const body& f;
    index_t n, grain, shares;
    share of[most_shares];
    std::atomic_flag failed{};
    std::exception_ptr error{};

    loop(const body& f_, index_t n_, index_t grain_, index_t shares_) : f(f_), n(n_), grain(grain_), shares(shares_) {
      const index_t pieces = (n + grain - 1) / grain;
      for (index_t s = 0; s < shares; ++s) of[s].set(pieces * s / shares, pieces * (s + 1) / shares);
    }
    void work(index_t own) {
      for (index_t i = 0; i < shares; ++i) {
        share& s = of[(own + i) % shares];
        for (index_t piece = s.take(i == 0); piece >= 0; piece = s.take(i == 0)) {
          try {
            f(piece * grain, std::min(n, (piece + 1) * grain));
          } catch (...) {
            if (!failed.test_and_set()) error = std::current_exception();
            for (index_t other = 0; other < shares; ++other) of[other].set(0, 0);  // nobody starts another piece
          }
        }
      }
    }
  };

  static index_t checked(index_t workers) {
    require<config_error>(workers >= 1, "parallel_executor: expected at least 1 worker, got ", workers);
    return workers;
  }
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  // state_ = 2 * (helpers inside the loop) + (a loop is open). A helper enters only while the bit is set, so after close() has
  // cleared it and seen zero helpers the loop on the caller's stack may go.
  void open(loop& l) const {
    loop_.store(&l, std::memory_order_relaxed);
    state_.fetch_add(1, std::memory_order_release);
    for (index_t wanted = workers_ - 1 - awake_.load(std::memory_order_relaxed); wanted > 0; --wanted) {
      awake_.fetch_add(1, std::memory_order_relaxed);
      pool_.Schedule([this] { help(); });
    }
  }
  void close() const {
    state_.fetch_sub(1, std::memory_order_acq_rel);
    for (int spins = 0; state_.load(std::memory_order_acquire) != 0; ++spins)
      spins < linger_spins ? pause() : std::this_thread::yield();
  }
  bool enter() const {
    for (auto s = state_.load(std::memory_order_relaxed); (s & 1) != 0;)
      if (state_.compare_exchange_weak(s, s + 2, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    return false;
  }
  void help() const {
    // Eigen runs a task on the scheduling thread when its queue is full; the caller must not help itself.
    for (int idle = 0; worker() != 0 && idle <= linger_ && !closing_.load(std::memory_order_relaxed);) {
      if (enter()) {
        loop_.load(std::memory_order_relaxed)->work(worker() - 1);
        state_.fetch_sub(2, std::memory_order_release);
        idle = 0;
        if (linger_ == 0) break;
      }
      ++idle;
      pause();
    }
    awake_.fetch_sub(1, std::memory_order_relaxed);
  }

  index_t workers_;
  int linger_;
  mutable std::atomic_flag busy_{};  // one loop at a time is shared out; not a mutex, because the owner may ask again
  mutable std::atomic<std::thread::id> caller_{};  // while it works on a loop
  mutable std::atomic<loop*> loop_{nullptr};
  mutable std::atomic<index_t> state_{0};
  mutable std::atomic<index_t> awake_{0};  // helpers scheduled or running
  std::atomic<bool> closing_{false};
  mutable Eigen::ThreadPool pool_;  // last: its destructor waits for the helpers, which use the members above
};

}  // namespace lithe::inline LITHE_ABI
