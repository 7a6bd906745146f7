#include "lithe/core/workspace.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
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
  const parallel_executor exec(7);
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

}  // namespace workspace_tests
