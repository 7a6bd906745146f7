#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>
#if __has_include(<unistd.h>)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "lithe/core/context.hpp"
#include "lithe/core/parallel_executor.hpp"

namespace executor_tests {

using namespace lithe;

TEST(executor, every_piece_runs_once_with_any_number_of_workers) {
  for (const index_t workers : {1, 2, 7, 40}) {
    const parallel_executor exec(workers, workers);
    std::vector<std::atomic<int>> seen(1003);
    exec.run(1003, 10, [&](index_t first, index_t last) {
      EXPECT_EQ(first % 10, 0);
      EXPECT_LE(last - first, 10);
      for (index_t i = first; i < last; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    for (const auto& n : seen) EXPECT_EQ(n, 1);
  }
}

TEST(executor, an_exception_in_a_worker_reaches_the_caller_and_the_executor_goes_on) {
  const parallel_executor exec(2, 2);
  for (int round = 0; round < 50; ++round)
    EXPECT_THROW(exec.run(64, 1, [](index_t first, index_t) { require<config_error>(first != 40, "piece ", first); }), config_error);
  std::atomic<index_t> sum{0};
  exec.run(64, 1, [&](index_t first, index_t) { sum += first; });
  EXPECT_EQ(sum, 64 * 63 / 2);
}

TEST(executor, whoever_is_free_takes_the_pieces_of_a_worker_that_is_held_up) {
  const parallel_executor exec(2, 2);
  for (const index_t slow : {0, 15}) {  // in the share of the caller, and of the helper
    std::atomic<int> others{0};
    exec.run(16, 1, [&](index_t first, index_t) {
      if (first != slow) ++others;
      while (first == slow && others != 15) std::this_thread::yield();
    });
    EXPECT_EQ(others, 15);
  }
}

TEST(executor, starts_no_piece_after_one_has_thrown) {
  const parallel_executor exec(1);
  int ran = 0;
  EXPECT_THROW(exec.run(8, 1,
                        [&](index_t first, index_t) {
                          ++ran;
                          require<config_error>(first < 2, "piece ", first);
                        }),
               config_error);
  EXPECT_EQ(ran, 3);
  // Of several workers each may be inside a piece when the first one throws; if all pieces throw, that is one a worker.
  for (const index_t workers : {2, 7}) {
    const parallel_executor several(workers, workers);
    std::atomic<index_t> begun{0};
    const auto fail = [&](index_t, index_t) {
      ++begun;
      throw config_error("piece");
    };
    EXPECT_THROW(several.run(1000, 1, fail), config_error);
    EXPECT_LE(begun, workers);
  }
}

TEST(executor, nested_loops_do_not_deadlock) {
  const parallel_executor exec(2, 2);
  std::atomic<index_t> n{0};
  exec.run(16, 1, [&](index_t, index_t) { exec.run(16, 1, [&](index_t, index_t) { exec.run(4, 1, [&](index_t, index_t) { ++n; }); }); });
  EXPECT_EQ(n, 16 * 16 * 4);
}

TEST(executor, two_callers_share_one_executor) {
  const parallel_executor exec(2, 2);
  std::atomic<index_t> n{0};
  const auto work = [&] {
    for (int i = 0; i < 200; ++i) exec.run(8, 1, [&](index_t, index_t) { ++n; });
  };
  std::thread other(work);
  work();
  other.join();
  EXPECT_EQ(n, 2 * 200 * 8);
}

TEST(executor, numbers_its_workers_in_loops_and_nobody_outside) {
  const parallel_executor exec(3, 3);
  exec.run(64, 1, [&](index_t, index_t) {
    const index_t here = exec.worker();
    EXPECT_TRUE(1 <= here && here <= 3) << here;
    exec.run(4, 1, [&](index_t, index_t) { EXPECT_EQ(exec.worker(), here); });
    std::thread([&] { EXPECT_EQ(exec.worker(), 0); }).join();
  });
  EXPECT_EQ(exec.worker(), 0);
  exec.run(1, 1, [&](index_t, index_t) { EXPECT_EQ(exec.worker(), 0) << "a loop of one piece runs where it was called"; });
}

TEST(executor, refuses_no_workers) {
  EXPECT_THROW(parallel_executor(0), config_error);
  EXPECT_THROW(parallel_executor(-1, 1), config_error);
  EXPECT_THROW(parallel_executor(2, 0), config_error);
}

TEST(executor, takes_as_many_workers_as_there_are_processors) { EXPECT_EQ(parallel_executor().workers(), processors()); }

TEST(executor, runs_no_more_threads_than_there_are_processors_for) {
  const parallel_executor exec(16, 2);
  EXPECT_EQ(exec.workers(), 16);
  std::mutex lock;
  std::set<std::thread::id> threads;
  for (int round = 0; round < 20; ++round)
    exec.run(64, 1, [&](index_t, index_t) {
      std::this_thread::yield();
      const std::lock_guard hold(lock);
      threads.insert(std::this_thread::get_id());
    });
  EXPECT_LE(threads.size(), 2U);
}

#if __has_include(<unistd.h>)

double cpu_seconds_of_this_thread() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

TEST(executor, sleeps_while_it_waits_for_a_helper_and_then_goes_on_without_it_for_a_while) {
  const parallel_executor exec(2, 2);
  constexpr double held_up = 0.04;
  std::atomic<bool> inside{false};
  const double before = cpu_seconds_of_this_thread();
  exec.run(16, 1, [&](index_t, index_t) {
    if (exec.worker() == 2 && !inside.exchange(true)) std::this_thread::sleep_for(std::chrono::duration<double>(held_up));
    while (!inside) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_LT(cpu_seconds_of_this_thread() - before, held_up / 2) << "the caller has kept its processor busy";
  std::atomic<index_t> helped{0};
  const auto loop = [&] {
    exec.run(16, 1, [&](index_t, index_t) {
      if (exec.worker() == 2) ++helped;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  };
  loop();
  EXPECT_EQ(helped, 0);
  for (int round = 0; round < 1000 && helped == 0; ++round) loop();
  EXPECT_GT(helped, 0) << "the helper was given up for good";
}

/// How a child of fork ends that runs `what`; it is killed when it hangs.
template <class What>
int status_of_child(const What& what) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(what() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST(executor, works_and_goes_in_a_child_of_fork) {
  for (const bool asleep : {false, true}) {
    auto exec = std::make_unique<parallel_executor>(3, 3);
    const auto sum = [&] {
      std::atomic<index_t> n{0};
      exec->run(64, 1, [&](index_t first, index_t) { n += first; });
      return n == 64 * 63 / 2;
    };
    EXPECT_TRUE(sum());
    if (asleep) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the helpers linger no more
    EXPECT_EQ(status_of_child([&] {
                bool right = true;
                for (int round = 0; round < 10; ++round) right = sum() && right;
                exec.reset();
                return right;
              }),
              0);
#if !defined(__SANITIZE_THREAD__)  // which ends a child that starts threads
    EXPECT_EQ(status_of_child([&] {
                exec.reset();
                exec = std::make_unique<parallel_executor>(2, 2);
                return sum();
              }),
              0);
#endif
    EXPECT_TRUE(sum()) << "the parent goes on";
  }
}

TEST(executor, a_child_that_is_forked_inside_a_loop_is_told_what_is_missing) {
  const parallel_executor exec(2, 2);
  std::atomic<bool> inside{false};
  std::atomic<pid_t> child{-1};
  std::string message;
  try {
    exec.run(2, 1, [&](index_t, index_t) {
      if (exec.worker() == 2) {
        inside = true;
        while (child == -1) std::this_thread::yield();
      } else {
        while (!inside) std::this_thread::yield();
        child = fork();
        if (child == 0) alarm(20);
      }
    });
  } catch (const state_error& e) {
    message = e.what();
  }
  if (child == 0) _exit(message.find("forked inside a loop") != std::string::npos ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(message, "");
}

#endif

}  // namespace executor_tests
