#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "lithe/core/context.hpp"
#include "lithe/core/parallel_executor.hpp"

namespace executor_tests {

using namespace lithe;

TEST(executor, every_piece_runs_once_with_any_number_of_workers) {
  for (const index_t workers : {1, 2, 7, 40}) {
    const parallel_executor exec(workers);
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
  const parallel_executor exec(2);
  for (int round = 0; round < 50; ++round)
    EXPECT_THROW(exec.run(64, 1, [](index_t first, index_t) { require<config_error>(first != 40, "piece ", first); }), config_error);
  std::atomic<index_t> sum{0};
  exec.run(64, 1, [&](index_t first, index_t) { sum += first; });
  EXPECT_EQ(sum, 64 * 63 / 2);
}

TEST(executor, whoever_is_free_takes_the_pieces_of_a_worker_that_is_held_up) {
  const parallel_executor exec(2);
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
    const parallel_executor several(workers);
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
  const parallel_executor exec(2);
  std::atomic<index_t> n{0};
  exec.run(16, 1, [&](index_t, index_t) { exec.run(16, 1, [&](index_t, index_t) { exec.run(4, 1, [&](index_t, index_t) { ++n; }); }); });
  EXPECT_EQ(n, 16 * 16 * 4);
}

TEST(executor, two_callers_share_one_executor) {
  const parallel_executor exec(2);
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
  const parallel_executor exec(3);
  exec.run(64, 1, [&](index_t, index_t) {
    const index_t here = exec.worker();
    EXPECT_TRUE(1 <= here && here <= 3) << here;
    exec.run(4, 1, [&](index_t, index_t) { EXPECT_EQ(exec.worker(), here); });
    std::thread([&] { EXPECT_EQ(exec.worker(), 0); }).join();
  });
  EXPECT_EQ(exec.worker(), 0);
  exec.run(1, 1, [&](index_t, index_t) { EXPECT_EQ(exec.worker(), 0) << "a loop of one piece runs where it was called"; });
}

TEST(executor, refuses_no_workers) { EXPECT_THROW(parallel_executor(0), config_error); }

}  // namespace executor_tests
