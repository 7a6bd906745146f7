#include <algorithm>
#include <numeric>

#include "lithe/kernels/product_top_k.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t lists = 512 * 8;  // both halves of 4 heads

template <class Row>
void time_lists(benchmark::State& state, Row&& row) {
  const index_t n = state.range(0), k = state.range(1);
  runner run(state.range(2));
  const matrix<float> scores = random_matrix(lists, n);
  matrix<float> values(lists, k);
  matrix<std::int32_t> indices(lists, k);
  for (auto _ : state) {
    row(scores, values, indices, run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, lists, lists * n * 4);
}

void top_k(benchmark::State& state) {
  time_lists(state, [](matrix_view<const float> s, matrix_view<float> v, matrix_view<std::int32_t> i, const context& ctx) { lithe::top_k<float>(s, v, i, ctx); });
}

/// A partial sort of the indices.
void partial_sort_row(const float* row, index_t n, index_t k, float* values, std::int32_t* indices, std::vector<std::int32_t>& order) {
  order.resize(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](std::int32_t a, std::int32_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
  for (index_t j = 0; j < k; ++j) {
    indices[j] = order[static_cast<std::size_t>(j)];
    values[j] = row[indices[j]];
  }
}

void naive(benchmark::State& state) {
  time_lists(state, [](matrix_view<const float> s, matrix_view<float> v, matrix_view<std::int32_t> i, const context& ctx) {
    ctx.exec->run(s.rows(), 32, [&](index_t first, index_t last) {
      std::vector<std::int32_t> order;
      for (index_t t = first; t < last; ++t) partial_sort_row(s.row(t), s.cols(), v.cols(), v.row(t), i.row(t), order);
    });
  });
}

/// The k best sums of two descending lists of k: by the kernel, or (naive) a partial sort of all k² sums.
template <bool Naive>
void product(benchmark::State& state) {
  const index_t k = state.range(0);
  runner run(state.range(1));
  matrix<float> a = random_matrix(lists / 2, k, 1), b = random_matrix(lists / 2, k, 2), sums(lists / 2, k);
  matrix<std::int32_t> pairs(lists / 2, k);
  for (index_t t = 0; t < a.rows(); ++t) {
    std::sort(a.row(t).begin(), a.row(t).end(), std::greater<>());
    std::sort(b.row(t).begin(), b.row(t).end(), std::greater<>());
  }
  for (auto _ : state) {
    run.ctx.exec->run(a.rows(), 64, [&](index_t first, index_t last) {
      Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> all(Naive ? k : 0, k);
      std::vector<std::int32_t> order;
      for (index_t t = first; t < last; ++t) {
        if constexpr (Naive) {
          all = a.row(t).transpose().array().replicate(1, k) + b.row(t).array().replicate(k, 1);
          partial_sort_row(all.data(), k * k, k, sums.row(t).data(), pairs.row(t).data(), order);
        } else {
          lithe::product_top_k_row<float>(a.row(t).data(), b.row(t).data(), k, k, sums.row(t).data(), pairs.row(t).data(), run.ctx);
        }
      }
    });
    benchmark::ClobberMemory();
  }
  count(state, a.rows(), a.rows() * k * 8);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"n", "k", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const auto& [n, k] : {std::pair{512, 32}, {1024, 32}, {128, 16}})
    for (const index_t workers : {1, 2}) b->Args({n, k, workers});
}
BENCHMARK(top_k)->Name("top_k")->Apply(shapes);
BENCHMARK(naive)->Name("top_k/naive")->Apply(shapes);
BENCHMARK(product<false>)->Name("product_top_k")->ArgNames({"k", "workers"})->ArgsProduct({{32}, {1, 2}})->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(product<true>)->Name("product_top_k/naive")->ArgNames({"k", "workers"})->ArgsProduct({{32}, {1, 2}})->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
