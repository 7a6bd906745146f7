#include "lithe/kernels/gather.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "lithe/core/parallel_executor.hpp"

// Each result is compared with plain loops in double. A sum of n products of numbers near 1 in precision e is off by at most about
// n e times the sum of their sizes; the tests allow 4 e times that sum and a constant for n, tested far below n e.

namespace gather_tests {

using namespace lithe;

/// T tokens of P picks out of a table of N rows of D columns, all with odd strides and offsets.
template <class S>
struct problem {
  index_t T, P, N, D;
  matrix<S> table_memory, dy_memory;
  std::vector<slot_t> slots;
  std::vector<S> weights;

  problem(index_t t, index_t p, index_t n, index_t d, std::uint64_t seed, index_t spread = 0, index_t pad = 3)
      : T(t), P(p), N(n), D(d), table_memory(n, d + pad), dy_memory(t, d + 2 * pad), slots(static_cast<std::size_t>(t * p)), weights(slots.size()) {
    fill(table_memory, seed + 1);
    fill(dy_memory, seed + 2);
    const index_t range = spread > 0 ? spread : n;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      slots[i] = static_cast<slot_t>(philox(rng_key{seed}, i)[0] % static_cast<std::uint64_t>(range));
      weights[i] = static_cast<S>(normal(rng_key{seed + 3}, i));
    }
  }
  static void fill(matrix<S>& m, std::uint64_t seed) {
    for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<S>(normal(rng_key{seed}, static_cast<std::uint64_t>(i)));
  }
  /// Makes every third pick none, with a weight that must not matter.
  void drop_picks() {
    for (std::size_t i = 0; i < slots.size(); i += 3) {
      slots[i] = -1;
      weights[i] = std::numeric_limits<S>::quiet_NaN();
    }
  }
  matrix_view<const S> table() const { return view(table_memory).slice_cols(table_memory.cols() - D, D); }
  matrix_view<const S> dy() const { return T == 0 ? matrix_view<const S>(nullptr, 0, D) : view(dy_memory).slice_cols((dy_memory.cols() - D) / 2, D); }
  picks<S> chosen() const { return {slots, weights, P}; }
  row_gradient<S> gradient() const {
    row_gradient<S> g;
    g.total_rows = N;
    g.cols = D;
    return g;
  }
};

template <class S>
void expect_close(double got, double want, double size, const char* what) {
  EXPECT_LE(std::abs(got - want), 8 * static_cast<double>(std::numeric_limits<S>::epsilon()) * (size + 1e-30)) << what << " " << got << " " << want;
}

template <class S>
void check_gather(const problem<S>& p, const context& ctx) {
  matrix<S> y_memory = matrix<S>::Constant(p.T, p.D + 5, S(3));
  const matrix_view<S> y = p.T == 0 ? matrix_view<S>(nullptr, 0, p.D) : view(y_memory).slice_cols(2, p.D);
  for (const update mode : {update::assign, update::add}) {
    y_memory.setConstant(S(3));
    gather_sum<S>(p.table(), p.chosen(), y, ctx, mode);
    for (index_t t = 0; t < p.T; ++t) {
      for (index_t c = 0; c < p.D; ++c) {
        double sum = mode == update::add ? 3 : 0, size = sum;
        for (index_t j = 0; j < p.P; ++j) {
          const auto at = static_cast<std::size_t>(t * p.P + j);
          if (p.slots[at] < 0) continue;
          const double product = static_cast<double>(p.weights[at]) * static_cast<double>(p.table()(p.slots[at], c));
          sum += product;
          size += std::abs(product);
        }
        expect_close<S>(static_cast<double>(y(t, c)), sum, size, "gather_sum");
      }
      EXPECT_EQ(y_memory(t, 1), S(3));
      EXPECT_EQ(y_memory(t, p.D + 2), S(3));
    }
  }
}

template <class S>
void check_dots(const problem<S>& p, const context& ctx) {
  std::vector<S> dw(p.slots.size(), S(3));
  row_dots<S>(p.table(), p.slots, p.P, p.dy(), dw, ctx);
  for (std::size_t i = 0; i < dw.size(); ++i) {
    double sum = 0, size = 0;
    for (index_t c = 0; c < p.D && p.slots[i] >= 0; ++c) {
      const double product = static_cast<double>(p.dy()(static_cast<index_t>(i) / p.P, c)) * static_cast<double>(p.table()(p.slots[i], c));
      sum += product;
      size += std::abs(product);
    }
    expect_close<S>(static_cast<double>(dw[i]), sum, size, "row_dots");
  }
}

/// Adds the gradient of p to `sum` and `size`.
template <class S>
void add_plain(const problem<S>& p, std::map<slot_t, std::vector<double>>& sum, std::map<slot_t, std::vector<double>>& size) {
  for (std::size_t i = 0; i < p.slots.size(); ++i) {
    if (p.slots[i] < 0) continue;
    auto &s = sum[p.slots[i]], &z = size[p.slots[i]];
    s.resize(static_cast<std::size_t>(p.D));
    z.resize(static_cast<std::size_t>(p.D));
    for (index_t c = 0; c < p.D; ++c) {
      const double product = static_cast<double>(p.weights[i]) * static_cast<double>(p.dy()(static_cast<index_t>(i) / p.P, c));
      s[static_cast<std::size_t>(c)] += product;
      z[static_cast<std::size_t>(c)] += std::abs(product);
    }
  }
}

template <class S>
void check_scatter(const std::vector<const problem<S>*>& calls, const context& ctx) {
  row_gradient<S> g = calls[0]->gradient();
  std::map<slot_t, std::vector<double>> sum, size;
  for (const auto* p : calls) {
    scatter_add<S>(p->chosen(), p->dy(), g, ctx);
    add_plain(*p, sum, size);
    ASSERT_EQ(g.rows.size(), sum.size());
    index_t r = 0;
    for (const auto& [row, want] : sum) {
      ASSERT_EQ(g.rows[static_cast<std::size_t>(r)], row);
      for (index_t c = 0; c < p->D; ++c)
        expect_close<S>(static_cast<double>(g.values()(r, c)), want[static_cast<std::size_t>(c)], size[row][static_cast<std::size_t>(c)], "scatter_add");
      ++r;
    }
  }
}

template <class S>
struct gather_test : testing::Test {};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(gather_test, scalars);

TYPED_TEST(gather_test, every_width) {
  for (index_t d = 1; d <= 300; ++d) {
    problem<TypeParam> p(3, 9, 40, d, static_cast<std::uint64_t>(d), 0, d % 4);
    if (d % 2 == 0) p.drop_picks();
    check_gather(p, {});
    check_dots(p, {});
    check_scatter<TypeParam>({&p}, {});
  }
}

TYPED_TEST(gather_test, every_number_of_picks) {
  for (index_t picks_per_token = 0; picks_per_token <= 70; ++picks_per_token) {
    problem<TypeParam> p(2, picks_per_token, 500, 80, static_cast<std::uint64_t>(picks_per_token));
    check_gather(p, {});
    check_dots(p, {});
    if (picks_per_token > 0) check_scatter<TypeParam>({&p}, {});
    p.drop_picks();
    check_gather(p, {});
    check_dots(p, {});
    check_scatter<TypeParam>({&p}, {});
  }
}

TYPED_TEST(gather_test, real_shapes) {
  for (const auto& [t, k, n, d] : {std::tuple<index_t, index_t, index_t, index_t>{1, 128, 500, 1024}, {20, 128, 700, 512}, {7, 33, 3000, 384}}) {
    const problem<TypeParam> p(t, k, n, d, 5, 0, 0);
    check_gather(p, {});
    check_dots(p, {});
    check_scatter<TypeParam>({&p}, {});
  }
}

TYPED_TEST(gather_test, nothing_to_do) {
  const problem<TypeParam> none(0, 8, 10, 20, 1);
  check_gather(none, {});
  check_dots(none, {});
  auto g = none.gradient();
  scatter_add<TypeParam>(none.chosen(), none.dy(), g, {});
  EXPECT_EQ(g.count(), 0);
  problem<TypeParam> masked(3, 4, 10, 20, 1);
  masked.slots.assign(masked.slots.size(), -1);
  check_gather(masked, {});
  check_dots(masked, {});
  scatter_add<TypeParam>(masked.chosen(), masked.dy(), g, {});
  EXPECT_EQ(g.count(), 0);
}

TYPED_TEST(gather_test, heavy_duplicates_go_to_one_row) {
  for (const index_t spread : {1, 2, 5}) {
    const problem<TypeParam> p(300, 16, 1000, 48, 7, spread);
    check_gather(p, {});
    check_scatter<TypeParam>({&p}, {});
  }
}

TYPED_TEST(gather_test, gradients_accumulate_over_calls) {
  const problem<TypeParam> first(20, 8, 400, 33, 1), second(20, 8, 400, 33, 2), few(5, 8, 400, 33, 3, 3);
  check_scatter<TypeParam>({&first, &second, &few}, {});   // rows come in between
  check_scatter<TypeParam>({&first, &first, &first}, {});  // no new row: in place
  check_scatter<TypeParam>({&few, &first, &second, &first}, {});
}

TYPED_TEST(gather_test, rows_of_tables_of_any_size_are_sorted) {
  for (const index_t rows : {index_t{1}, index_t{2}, index_t{2048}, index_t{2049}, index_t{1} << 22, (index_t{1} << 22) + 1, (index_t{1} << 31) - 1}) {
    std::vector<slot_t> slots(1000);
    for (std::size_t i = 0; i < slots.size(); ++i)
      slots[i] = i % 7 == 3 ? -1 : static_cast<slot_t>(philox(rng_key{9}, i / 2)[0] % static_cast<std::uint64_t>(rows));
    slots[500] = static_cast<slot_t>(rows - 1);
    std::vector<row_pick> sorted(1000), spare(1000);
    const index_t n = sort_rows(slots, rows, sorted, spare);
    std::vector<std::pair<slot_t, std::uint32_t>> want;
    for (std::size_t i = 0; i < slots.size(); ++i)
      if (slots[i] >= 0) want.emplace_back(slots[i], static_cast<std::uint32_t>(i));
    std::sort(want.begin(), want.end());
    ASSERT_EQ(n, static_cast<index_t>(want.size()));
    for (std::size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(sorted[i].row, want[i].first);
      EXPECT_EQ(sorted[i].pick, want[i].second);
    }
  }
}

TYPED_TEST(gather_test, the_token_of_a_pick_is_exact_for_any_number_of_picks) {
  for (const std::uint32_t per_token : {1U, 3U, 7U, 49U, 128U, 1000003U}) {
    const double inverse = 1.0 / per_token;
    for (const std::uint64_t near : {std::uint64_t{0}, std::uint64_t{1} << 16, std::uint64_t{1} << 31, (std::uint64_t{1} << 32) - per_token - 1})
      for (std::uint64_t multiple = near / per_token, i = 0; i < 3; ++i)
        for (const std::int64_t step : {-1, 0, 1}) {
          const auto pick = static_cast<std::int64_t>((multiple + i) * per_token) + step;
          if (pick >= 0 && pick >> 32 == 0) {
            EXPECT_EQ(static_cast<std::int64_t>((static_cast<double>(pick) + 0.5) * inverse), pick / per_token);
          }
        }
  }
}

TYPED_TEST(gather_test, the_same_bits_with_any_number_of_workers) {
  using S = TypeParam;
  for (const auto& [t, k, n, d] : {std::tuple<index_t, index_t, index_t, index_t>{1, 128, 500, 1024}, {60, 32, 900, 300}, {1500, 16, 9000, 100}}) {
    problem<S> p(t, k, n, d, 11), q(t, k, n, d, 12);
    p.drop_picks();
    matrix<S> y1;
    std::vector<S> dw1;
    row_gradient<S> g1;
    for (const index_t workers : {1, 2, 7}) {
      const parallel_executor exec(workers, workers);
      workspace work(exec);
      context ctx;
      ctx.exec = &exec;
      ctx.work = &work;
      matrix<S> y = matrix<S>::Zero(t, d);
      std::vector<S> dw(p.slots.size());
      row_gradient<S> g = p.gradient();
      gather_sum<S>(p.table(), p.chosen(), y, ctx);
      row_dots<S>(p.table(), p.slots, k, p.dy(), dw, ctx);
      scatter_add<S>(p.chosen(), p.dy(), g, ctx);
      scatter_add<S>(q.chosen(), q.dy(), g, ctx);
      if (workers == 1) {
        y1 = y, dw1 = dw, g1 = g;
        continue;
      }
      EXPECT_EQ(y, y1);
      EXPECT_EQ(dw, dw1);
      EXPECT_EQ(g.rows, g1.rows);
      EXPECT_EQ(g.values().map(), g1.values().map());
    }
  }
}

TYPED_TEST(gather_test, big_gradients_are_streamed) {
  const problem<TypeParam> p(50, 128, 12000, 256, 4, 0, 0), q(50, 128, 12000, 256, 5, 0, 0);
  const std::set<slot_t> touched(p.slots.begin(), p.slots.end());
  ASSERT_GE(static_cast<index_t>(touched.size() * 256 * sizeof(TypeParam)), detail::stream_bytes);
  const parallel_executor exec(2);
  context ctx;
  ctx.exec = &exec;
  check_scatter<TypeParam>({&p, &q}, ctx);
}

TYPED_TEST(gather_test, gradients_keep_their_memory) {
  const problem<TypeParam> p(20, 8, 400, 32, 1), q(20, 8, 400, 32, 2);
  auto g = p.gradient();
  const auto step = [&] {
    g.set_zero();
    scatter_add<TypeParam>(p.chosen(), p.dy(), g, {});
    scatter_add<TypeParam>(q.chosen(), q.dy(), g, {});
  };
  step();
  step();
  const std::set<const void*> before{g.storage.data(), g.spare_storage.data(), g.rows.data(), g.spare_rows.data()};
  step();
  EXPECT_EQ(before, (std::set<const void*>{g.storage.data(), g.spare_storage.data(), g.rows.data(), g.spare_rows.data()}));
}

}  // namespace gather_tests
