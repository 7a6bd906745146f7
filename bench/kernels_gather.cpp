#include "lithe/layers/memory/value_table.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t tokens = 512, per_token = 128;

struct reads {
  lithe::dense_table<float> table;
  random_picks picks;
  matrix<float> y = random_matrix(tokens, 1);
  reads(index_t rows, index_t cols) : table(rows, cols), picks(8, tokens, per_token, rows), y(random_matrix(tokens, cols)) {
    fill_random(table.view());
  }
};

/// body(table, picks, y or dy, ctx) for fresh picks. Rows beyond the caches are cold, a small table stays hot.
template <class Body>
void time_reads(benchmark::State& state, Body&& body) {
  const index_t rows = state.range(0), cols = state.range(1);
  auto& r = made_for(rows * cols, [&] { return reads(rows, cols); });
  runner run(state.range(2));
  const auto once = [&] {
    body(r.table, lithe::picks<float>{r.picks.next(), r.picks.weights, per_token}, matrix_view<float>(r.y), run.ctx);
    benchmark::ClobberMemory();
  };
  once();
  for (auto _ : state) once();
  count(state, tokens, tokens * per_token * cols * 4);
}

using table = lithe::dense_table<float>;
using picks = lithe::picks<float>;

void gather_sum(benchmark::State& state) {
  time_reads(state, [](const table& t, picks p, matrix_view<float> y, const context& ctx) { t.gather_sum(p, y, ctx); });
}

/// Row after row in Eigen.
void naive_gather_sum(benchmark::State& state) {
  time_reads(state, [](const table& t, picks p, matrix_view<float> y, const context& ctx) {
    ctx.exec->run(y.rows(), 8, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        auto sum = y.map().row(i);
        sum.setZero();
        for (index_t j = i * per_token; j < (i + 1) * per_token; ++j)
          sum += p.weights[static_cast<std::size_t>(j)] * t.view().map().row(p.slots[static_cast<std::size_t>(j)]);
      }
    });
  });
}

void row_dots(benchmark::State& state) {
  std::vector<float> dw(static_cast<std::size_t>(tokens * per_token));
  time_reads(state, [&](const table& t, picks p, matrix_view<float> dy, const context& ctx) { t.row_dots(p.slots, per_token, dy, dw, ctx); });
}

void naive_row_dots(benchmark::State& state) {
  std::vector<float> dw(static_cast<std::size_t>(tokens * per_token));
  time_reads(state, [&](const table& t, picks p, matrix_view<float> dy, const context& ctx) {
    ctx.exec->run(dy.rows(), 8, [&](index_t first, index_t last) {
      for (index_t j = first * per_token; j < last * per_token; ++j)
        dw[static_cast<std::size_t>(j)] = dy.map().row(j / per_token).dot(t.view().map().row(p.slots[static_cast<std::size_t>(j)]));
    });
  });
}

void scatter_add(benchmark::State& state) {
  lithe::row_gradient<float> g;
  g.total_rows = state.range(0);
  g.cols = state.range(1);
  time_reads(state, [&](const table& t, picks p, matrix_view<float> dy, const context& ctx) {
    g.set_zero();
    t.scatter_add(p, dy, g, ctx);
  });
}

/// dV[slot] += w dy into a table-sized gradient, by one thread: rows meet.
void naive_scatter_add(benchmark::State& state) {
  auto& dv = made_for(state.range(0), [&] {
    lithe::dense_table<float> g(state.range(0), state.range(1));
    return g;
  });
  time_reads(state, [&](const table&, picks p, matrix_view<float> dy, const context&) {
    for (index_t j = 0; j < tokens * per_token; ++j)
      dv.view().map().row(p.slots[static_cast<std::size_t>(j)]) += p.weights[static_cast<std::size_t>(j)] * dy.map().row(j / per_token);
  });
}

void cold(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "cols", "workers"})->Args({262'144, 1024, 1})->Args({262'144, 1024, 2})->UseRealTime()->Unit(benchmark::kMillisecond);
}
void hot(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "cols", "workers"})->Args({1024, 1024, 1})->Args({1024, 1024, 2})->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(gather_sum)->Name("gather_sum")->Apply(cold);
BENCHMARK(naive_gather_sum)->Name("gather_sum/naive")->Apply(cold);
BENCHMARK(row_dots)->Name("row_dots")->Apply(cold);
BENCHMARK(naive_row_dots)->Name("row_dots/naive")->Apply(cold);
BENCHMARK(scatter_add)->Name("scatter_add")->Apply(cold);
BENCHMARK(naive_scatter_add)->Name("scatter_add/naive")->ArgNames({"rows", "cols", "workers"})->Args({262'144, 1024, 1})->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(gather_sum)->Name("gather_sum/hot")->Apply(hot);
BENCHMARK(naive_gather_sum)->Name("gather_sum/hot/naive")->Apply(hot);
BENCHMARK(row_dots)->Name("row_dots/hot")->Apply(hot);

}  // namespace
