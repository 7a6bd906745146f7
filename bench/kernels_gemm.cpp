#include "lithe/kernels/gemm.hpp"
#include "support.hpp"

namespace {

using namespace bench;

/// A layer's product: x [m x k] by w [n x k]. Items are FLOPs.
struct product {
  index_t m, n, k;
  runner run;
  matrix<float> x, w, c;
  explicit product(const benchmark::State& s)
      : m(s.range(0)), n(s.range(1)), k(s.range(2)), run(s.range(3)), x(random_matrix(m, k)), w(random_matrix(n, k)), c(m, n) {}
  template <class Body>
  void time(benchmark::State& state, Body&& body) {
    body();
    for (auto _ : state) {
      body();
      benchmark::ClobberMemory();
    }
    count(state, 2 * m * n * k, 4 * n * k);
  }
};

void packed(benchmark::State& state) {
  product p(state);
  lithe::packed_matrix<float> w;
  w.assign(p.w);
  p.time(state, [&] { lithe::gemm_packed<float>(p.x, w, p.c, p.run.ctx); });
}
void nt(benchmark::State& state) {
  product p(state);
  p.time(state, [&] { lithe::gemm_nt<float>(p.x, p.w, p.c, p.run.ctx); });
}
/// dx = dy w
void nn(benchmark::State& state) {
  product p(state);
  p.time(state, [&] { lithe::gemm_nn<float>(p.c, p.w, p.x, p.run.ctx); });
}
/// dw = dyᵀ x
void tn(benchmark::State& state) {
  product p(state);
  p.time(state, [&] { lithe::gemm_tn<float>(p.c, p.x, p.w, p.run.ctx); });
}
/// Eigen's own product, a block of rows for each worker.
void eigen(benchmark::State& state) {
  product p(state);
  const index_t share = (p.m + p.run.exec.workers() - 1) / p.run.exec.workers();
  p.time(state, [&] {
    p.run.exec.run(p.m, share, [&](index_t first, index_t last) {
      p.c.middleRows(first, last - first).noalias() = p.x.middleRows(first, last - first) * p.w.transpose();
    });
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"m", "n", "k", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const index_t workers : {1, 2})
    for (const auto& [m, n, k] : {std::tuple{512, 4096, 1024}, {512, 1024, 4096}, {64, 4096, 1024}, {1, 4096, 1024}, {4096, 512, 128}}) b->Args({m, n, k, workers});
}
BENCHMARK(packed)->Name("gemm/packed")->Apply(shapes);
BENCHMARK(nt)->Name("gemm/nt")->Apply(shapes);
BENCHMARK(nn)->Name("gemm/nn")->Apply(shapes);
BENCHMARK(tn)->Name("gemm/tn")->Apply(shapes);
BENCHMARK(eigen)->Name("gemm/eigen")->Apply(shapes);

}  // namespace
