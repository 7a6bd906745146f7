#include "lithe/core/workspace.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/tensor/scratch.hpp"
#include "support/malloc_count.hpp"

namespace workspace_tests {

using namespace lithe;

/// Three workers, of whom the test says which one asks.
class chosen_worker final : public executor {
 public:
  index_t now = 0;
  [[nodiscard]] index_t workers() const override { return 3; }
  [[nodiscard]] index_t worker() const override { return now; }
};

/// One call of a layer: scratch of its own and two loops, whose pieces `of` says the workers of.
void call(const context& ctx, chosen_worker& exec, std::vector<index_t> of) {
  const scratch<double> own(ctx, 300, 70);
  for (std::size_t piece = 0; piece < of.size(); ++piece) {
    exec.now = of[piece];
    const scratch<float> first(ctx, 100 * static_cast<index_t>(piece * piece));
    const scratch<double> second(ctx, 40000 * static_cast<index_t>(piece % 2) + 1);
    std::ranges::fill(second.span(), 1.0);
  }
  exec.now = 0;
}

TEST(workspace, a_second_call_allocates_nothing_whoever_runs_which_piece) {
  chosen_worker exec;
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  call(ctx, exec, {1, 1, 1, 1, 1, 1, 1, 1});
  const auto held = work.bytes();
#if defined(LITHE_COUNTS_MALLOC)
  std::vector<std::vector<index_t>> calls{{1, 1, 1, 1, 1, 1, 1, 1}, {2, 2, 2, 2, 2, 2, 2, 2}, {3, 1, 2, 3, 1, 2, 3, 1}, {1, 2, 1, 2, 1, 3, 2, 2}};
  std::vector<long> taken;
  taken.reserve(calls.size());
  for (auto& of : calls) {
    const long before = mallocs;
    call(ctx, exec, std::move(of));
    taken.push_back(mallocs - before);
  }
  for (const long n : taken) EXPECT_EQ(n, 0);
#endif
  call(ctx, exec, {3, 2, 3, 2, 3, 2, 3, 2});
  EXPECT_EQ(work.bytes(), held);
}

TEST(workspace, a_check_that_passes_writes_no_text) {
#if defined(LITHE_COUNTS_MALLOC)
  const matrix_view<float> large(nullptr, 1048576, 1024);
  const long before = mallocs;
  require_shape("layer", "y", large, 1048576, 1024);
  EXPECT_EQ(mallocs, before);
#else
  GTEST_SKIP() << "malloc is not ours to count here";
#endif
}

TEST(workspace, memory_is_each_worker_s_own_and_comes_back_in_order) {
  chosen_worker exec;
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  std::vector<const std::byte*> first;
  for (exec.now = 0; exec.now <= 3; ++exec.now) {
    const scratch<std::byte> outer(ctx, 1000);
    const std::byte* inner = nullptr;
    for (int i = 0; i < 2; ++i) {
      const scratch<std::byte> again(ctx, 60000 + i);
      EXPECT_GE(again.data(), outer.data() + 1000);
      if (i == 0) inner = again.data();
      EXPECT_EQ(again.data(), inner);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(again.data()) % 64, 0U);
    }
    EXPECT_EQ(std::ranges::count(first, outer.data()), 0);
    first.push_back(outer.data());
  }
}

TEST(workspace, several_workers_may_grow_it_at_a_time) {
  const parallel_executor exec(7, 7);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  exec.run(400, 1, [&](index_t first, index_t) {
    const scratch<index_t> outer(ctx, 100 * first + 1), inner(ctx, 37 * (first % 50) + 1);
    std::ranges::fill(outer.span(), first);
    std::ranges::fill(inner.span(), -first);
    std::this_thread::yield();
    EXPECT_EQ(std::ranges::count(outer.span(), first), outer.cols());
    EXPECT_EQ(std::ranges::count(inner.span(), -first), inner.cols());
  });
}

TEST(workspace, names_the_executor_it_was_made_for) {
  chosen_worker exec;
  workspace work;
  exec.now = 2;
  const context ctx{.exec = &exec, .work = &work};
  EXPECT_THROW(scratch<float>(ctx, 1), state_error);
}

/// What a thread of its own is told when it takes scratch.
std::string told_to_another_thread(const context& ctx, index_t n = 100) {
  std::string message;
  std::thread([&] {
    try {
      const scratch<float> mine(ctx, n);
    } catch (const state_error& e) {
      message = e.what();
    }
  }).join();
  return message;
}
constexpr const char* belongs = "workspace: used by two threads at the same time; a workspace belongs to one caller at a time";

TEST(workspace, refuses_a_second_thread_while_the_first_one_holds_memory) {
  workspace work;
  const context ctx{.work = &work};
  for (const index_t n : {0, 1, 100000}) {
    const scratch<float> outer(ctx, n);
    EXPECT_EQ(told_to_another_thread(ctx), belongs);
    { const scratch<float> inner(ctx, 10), empty(ctx, 0); }
    EXPECT_EQ(told_to_another_thread(ctx), belongs) << "still held after what came later has gone";
  }
  EXPECT_EQ(told_to_another_thread(ctx), "") << "handed over between calls";
  EXPECT_NO_THROW(scratch<float>(ctx, 1));
}

TEST(workspace, refuses_a_second_caller_while_both_run_loops_of_one_executor) {
  const parallel_executor exec(2, 2);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  const scratch<float> outer(ctx, 10);
  exec.run(2, 1, [&](index_t, index_t) {
    const scratch<float> mine(ctx, 10);
    std::string message;
    std::thread([&] {
      try {
        exec.run(8, 1, [&](index_t, index_t) { const scratch<float> other(ctx, 10); });
      } catch (const state_error& e) {
        message = e.what();
      }
    }).join();
    EXPECT_EQ(message, belongs);
  });
}

TEST(workspace, finds_two_executors_that_use_it_at_the_same_time) {
  const parallel_executor first(2, 2), second(2, 2);
  workspace work(first);
  const context ctx{.exec = &first, .work = &work}, other{.exec = &second, .work = &work};
  first.run(2, 1, [&](index_t, index_t) {
    const scratch<float> mine(ctx, 10);
    std::atomic<int> refused{0};
    if (first.worker() != 1) return;
    std::thread([&] {
      second.run(8, 1, [&](index_t, index_t) {
        if (second.worker() != 1) return;
        try {
          const scratch<float> theirs(other, 10);
        } catch (const state_error&) {
          ++refused;
        }
      });
    }).join();
    EXPECT_GT(refused, 0);
  });
}

TEST(workspace, a_layer_gives_the_right_rows_or_says_that_its_workspace_is_shared) {
  const parallel_executor exec(2, 2);
  workspace work(exec);
  const auto compute = [&](std::vector<double>& y) {
    const context ctx{.exec = &exec, .work = &work};
    const scratch<double> outer(ctx, 64);
    std::ranges::fill(outer.span(), 1.0);
    exec.run(64, 4, [&](index_t first, index_t last) {
      const scratch<double> row(ctx, 500);
      for (index_t i = first; i < last; ++i) {
        std::ranges::fill(row.span(), static_cast<double>(i));
        y[static_cast<std::size_t>(i)] = outer[i] * std::accumulate(row.span().begin(), row.span().end(), 0.0);
      }
    });
  };
  std::atomic<int> wrong{0}, right{0};
  const auto call_often = [&] {
    std::vector<double> y(64);
    for (int round = 0; round < 2000; ++round) try {
        compute(y);
        bool equal = true;
        for (std::size_t i = 0; i < y.size(); ++i) equal = equal && y[i] == 500.0 * static_cast<double>(i);
        ++(equal ? right : wrong);
      } catch (const state_error&) {
      }
  };
  std::thread other(call_often);
  call_often();
  other.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(right, 0);
}

TEST(workspace, loops_in_loops_and_callers_that_take_turns_may_use_it) {
  const parallel_executor exec(3, 3);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  for (int turn = 0; turn < 20; ++turn)
    std::thread([&] {
      const scratch<float> outer(ctx, 10);
      exec.run(16, 1, [&](index_t, index_t) {
        const scratch<float> mine(ctx, 10);
        exec.run(4, 1, [&](index_t, index_t) { const scratch<float> inner(ctx, 10); });
      });
    }).join();
}

TEST(workspace, a_request_that_is_too_large_leaves_it_as_it_was) {
#if !defined(LITHE_COUNTS_MALLOC)
  GTEST_SKIP() << "a sanitizer ends the program here";
#endif
  workspace work;
  const context ctx{.work = &work};
  const index_t too_many = index_t{1} << 61;
  EXPECT_THROW(scratch<std::byte>(ctx, too_many), std::bad_alloc);
  EXPECT_EQ(told_to_another_thread(ctx), "");
  const scratch<float> outer(ctx, 10);
  EXPECT_THROW(scratch<std::byte>(ctx, too_many), std::bad_alloc);
  EXPECT_EQ(scratch<float>(ctx, 10).data(), outer.data() + 16);
}

TEST(workspace, says_that_it_was_moved) {
  const parallel_executor exec(2, 1);
  workspace from(exec), to(std::move(from));
  EXPECT_EQ(from.bytes(), 0U);
  const context ctx{.exec = &exec, .work = &from};
  EXPECT_EQ(told_to_another_thread(ctx), "workspace: its memory was moved to another workspace");
  EXPECT_EQ(told_to_another_thread({.exec = &exec, .work = &to}), "");
  from = std::move(to);
  EXPECT_EQ(told_to_another_thread(ctx), "");
}

}  // namespace workspace_tests
