#pragma once

// The same numbers, bit for bit: in two models, and from one layer with any number of workers.
#include <gtest/gtest.h>

#include <functional>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/parameters.hpp"

namespace lithe::inline LITHE_ABI {

template <class L>
void expect_same_bits(const L& a, const L& b) {
  index_t compared = 0;
  for_each_tensor(
      [&](const std::string& name, role, const auto& p, const auto& q) {
        ++compared;
        if constexpr (requires { p.view(); })
          EXPECT_TRUE(p.view().map() == q.view().map()) << name;
        else
          EXPECT_TRUE(p == q) << name;
      },
      a, b);
  EXPECT_GT(compared, 20);
}

/// A layer's output with and without a record, the gradient of its input and of every tensor, and the matrix that `more`, if given, makes of it,
/// with 1, 2 and 7 workers in place of the context's.
template <class L>
void expect_same_bits_for_any_workers(const L& l, const matrix<typename L::scalar>& x, const context& base,
                                      const std::function<matrix<typename L::scalar>(const context&)>& more = {}) {
  using S = typename L::scalar;
  std::vector<std::pair<std::string, matrix<S>>> one;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    context ctx = base;
    ctx.exec = &exec;
    ctx.work = &work;
    const shape out = l.output_shape(x);
    matrix<S> plain(out.rows, out.cols), y(out.rows, out.cols), dy(out.rows, out.cols), dx(x.rows(), x.cols());
    fill_uniform<S>(dy, 1.0, rng_key{99});
    record_of<L> r;
    auto g = make_gradient(l);
    l.forward(x, plain, ctx);
    l.forward(x, y, r, ctx);
    l.backward(x, r, dy, dx, g, ctx);
    std::vector<std::pair<std::string, matrix<S>>> all{{"output", plain}, {"output with a record", y}, {"input's gradient", dx}};
    if (more) all.emplace_back("more", more(ctx));
    for_each_tensor(
        [&](const std::string& name, role, const auto&, const auto& q) {
          if constexpr (requires { q.values(); })
            all.emplace_back(name, q.values().map());
          else if constexpr (!std::same_as<std::remove_cvref_t<decltype(q)>, nothing>)
            all.emplace_back(name, q);
        },
        l, g);
    if (workers == 1) one = all;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto& [name, m] = all[i];
      ASSERT_EQ(m.rows(), one[i].second.rows()) << name << " with " << workers << " workers";  // touched rows of a table
      EXPECT_TRUE(m == one[i].second) << name << " with " << workers << " workers";
    }
  }
}

}  // namespace lithe::inline LITHE_ABI
