#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <thread>
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#if __has_include(<Eigen/ThreadPool>)
#include <Eigen/ThreadPool>
#else
#include <unsupported/Eigen/CXX11/ThreadPool>
#endif

#include "lithe/core/error.hpp"
#include "lithe/core/executor.hpp"
#include "lithe/core/processors.hpp"

namespace lithe::inline LITHE_ABI {

/// Runs loops on the calling thread and some threads of Eigen's own pool. Threads are never pinned.
///
/// A loop is published in the executor; whoever is awake takes pieces of it, those of its own share first and then the last of
/// another's: what one loop leaves in a core's cache, the next one finds there. The caller never waits for a helper that has
/// not woken up yet, only for helpers that hold a piece: a loop shorter than a wake-up costs next to nothing. A helper that
/// runs out of pieces lingers for some microseconds before it sleeps, because a layer's loops follow one another closely.
///
/// No more threads run than there are processors for them. A caller that waits for a helper's piece until it would have been
/// faster alone concludes that another program has the helper's processor: it sleeps, and runs the loops of the next
/// milliseconds alone; of twice as many each time that help is again of no use.
///
/// In a child of `fork` there are no helpers: loops run on the calling thread, and the destructor returns at once. A child
/// that is forked inside a loop gets a state_error from that loop if a helper was inside too.
class parallel_executor final : public executor {
 public:
  /// `workers` as `workers()` will say; of these `running` at most run at the same time, by default as many as there are processors
  /// for them now. Throws config_error unless both are at least 1.
  explicit parallel_executor(index_t workers = processors(), index_t running = processors())
      : workers_(checked(workers, running)), threads_(std::min(workers, running)),
        linger_(threads_ <= processors() ? linger_spins : 0), pool_(make_pool(threads_ - 1)) {}

  ~parallel_executor() override {
    closing_.store(true, std::memory_order_relaxed);
    if (forked()) pool_.release();  // its destructor would wait for threads that the child does not have
  }

  [[nodiscard]] index_t workers() const override { return workers_; }
  [[nodiscard]] index_t worker() const override {
    if (pool_ == nullptr) return 0;
    if (const index_t helper = pool_->CurrentThreadId(); helper >= 0) return helper + 2;
    return caller_.load(std::memory_order_relaxed) == std::this_thread::get_id() ? 1 : 0;  // other threads may call layers meanwhile
  }

  void run(index_t n, index_t grain, body f) const override {
    if (n <= 0) return;
    // Nested loops, loops of one piece (or of more than a share can count) and loops of a second caller run where they are.
    if (n <= grain || n / grain >= most_pieces || threads_ == 1 || worker() != 0 || busy_.test_and_set(std::memory_order_acquire))
      return executor::run(n, grain, f);
    const auto begin = clock::now();
    loop now(f, n, grain, std::min(threads_, most_shares));
    if (begin >= alone_until_) open(now);
    caller_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    const index_t pieces = now.work(0);
    caller_.store({}, std::memory_order_relaxed);
    const bool whole = close(begin, pieces, (n + grain - 1) / grain);
    busy_.clear(std::memory_order_release);
    if (now.error) std::rethrow_exception(now.error);
    require<state_error>(whole, "parallel_executor: the process was forked inside a loop, and the child lacks its other threads");
  }

 private:
  using clock = std::chrono::steady_clock;
  static constexpr int linger_spins = 4000;  // pause instructions: some tens of microseconds
  static constexpr int least_alone = 16, most_alone = 256;  // helpers that were too late are left out for so many times the wait
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
    /// Runs pieces until none is left, and says how many it ran.
    index_t work(index_t own) {
      index_t ran = 0;
      for (index_t i = 0; i < shares; ++i) {
        share& s = of[(own + i) % shares];
        for (index_t piece = s.take(i == 0); piece >= 0; piece = s.take(i == 0), ++ran) {
          try {
            f(piece * grain, std::min(n, (piece + 1) * grain));
          } catch (...) {
            if (!failed.test_and_set()) error = std::current_exception();
            for (index_t other = 0; other < shares; ++other) of[other].set(0, 0);  // nobody starts another piece
          }
        }
      }
      return ran;
    }
  };

  static index_t checked(index_t workers, index_t running) {
    require<config_error>(workers >= 1, "parallel_executor: expected at least 1 worker, got ", workers);
    require<config_error>(running >= 1, "parallel_executor: expected at least 1 running worker, got ", running);
    return workers;
  }
  static std::unique_ptr<Eigen::ThreadPool> make_pool(index_t helpers) {
    if (helpers == 0) return nullptr;
    return std::make_unique<Eigen::ThreadPool>(static_cast<int>(helpers), /*allow_spinning=*/false);
  }
#if __has_include(<unistd.h>)
  [[nodiscard]] bool forked() const { return ::getpid() != process_; }
  pid_t process_ = ::getpid();
#else
  [[nodiscard]] bool forked() const { return false; }
#endif
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  // state_ = 4 * (helpers inside the loop) + 2 * (the caller sleeps until they are out) + (a loop is open). A helper enters
  // only while the last bit is set, so after close() has cleared it and seen zero helpers the loop on the caller's stack may go.
  void open(loop& l) const {
    loop_.store(&l, std::memory_order_relaxed);
    state_.fetch_add(1, std::memory_order_release);
    index_t wanted = threads_ - 1 - awake_.load(std::memory_order_relaxed);
    if (wanted > 0 && forked()) wanted = 0;
    for (; wanted > 0; --wanted) {
      awake_.fetch_add(1, std::memory_order_relaxed);
      pool_->Schedule([this] { help(); });
    }
  }
  /// Waits for the helpers inside the loop, which the caller began at `begin` and ran `pieces` of `all` of. False if they will never come out.
  bool close(clock::time_point begin, index_t pieces, index_t all) const {
    state_.fetch_and(~1, std::memory_order_acq_rel);
    if (state_.load(std::memory_order_acquire) == 0) return true;
    const auto done = clock::now();
    for (int spins = 0; spins < linger_ && state_.load(std::memory_order_acquire) != 0; ++spins) pause();
    if (state_.load(std::memory_order_acquire) == 0) return true;
    if (forked()) {
      state_.store(0, std::memory_order_relaxed);
      return false;
    }
    state_.fetch_or(2, std::memory_order_relaxed);
    for (int s = state_.load(std::memory_order_acquire); s >= 4; s = state_.load(std::memory_order_acquire))
      state_.wait(s, std::memory_order_acquire);
    state_.store(0, std::memory_order_relaxed);
    const auto end = clock::now();
    const bool of_use = (end - begin) * pieces < (done - begin) * all;  // faster than all pieces at the caller's pace
    alone_times_ = std::clamp(of_use ? alone_times_ / 2 : alone_times_ * 2, least_alone, most_alone);
    if (!of_use) alone_until_ = end + alone_times_ * (end - done);
    return true;
  }
  bool enter() const {
    for (auto s = state_.load(std::memory_order_relaxed); (s & 1) != 0;)
      if (state_.compare_exchange_weak(s, s + 4, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    return false;
  }
  void help() const {
    // Eigen runs a task on the scheduling thread when its queue is full; the caller must not help itself.
    for (int idle = 0; worker() != 0 && idle <= linger_ && !closing_.load(std::memory_order_relaxed);) {
      if (enter()) {
        loop_.load(std::memory_order_relaxed)->work(worker() - 1);
        if (state_.fetch_sub(4, std::memory_order_acq_rel) == 4 + 2) state_.notify_one();
        idle = 0;
        if (linger_ == 0) break;
      }
      ++idle;
      pause();
    }
    awake_.fetch_sub(1, std::memory_order_relaxed);
  }

  index_t workers_, threads_;
  int linger_;
  mutable std::atomic_flag busy_{};  // one loop at a time is shared out; not a mutex, because the owner may ask again
  mutable std::atomic<std::thread::id> caller_{};  // while it works on a loop
  mutable std::atomic<loop*> loop_{nullptr};
  mutable std::atomic<int> state_{0};
  mutable clock::time_point alone_until_{};  // of whoever has busy_
  mutable int alone_times_ = least_alone;
  mutable std::atomic<index_t> awake_{0};  // helpers scheduled or running
  std::atomic<bool> closing_{false};
  std::unique_ptr<Eigen::ThreadPool> pool_;  // last: its destructor waits for the helpers, which use the members above
};

}  // namespace lithe::inline LITHE_ABI
