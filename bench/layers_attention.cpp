#include "lithe/layers/attention/attention.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t heads = 4, width = 64, features = heads * width;

/// The heads alone, one sequence: queries, keys and values are given (peers are timed so, too).
struct heads_alone {
  index_t length;
  runner run;
  matrix<float> q, k, v, o, log_sum_exp;
  explicit heads_alone(const benchmark::State& s)
      : length(s.range(0)), run(s.range(1)), q(random_matrix(length, features, 1)), k(random_matrix(length, features, 2)),
        v(random_matrix(length, features, 3)), o(length, features), log_sum_exp(heads, length) {}
  template <class Body>
  void time(benchmark::State& state, Body&& body) {
    body();
    for (auto _ : state) {
      body();
      benchmark::ClobberMemory();
    }
    count(state, length, 2 * length * features * 4);
  }
};

template <bool Causal>
void exact(benchmark::State& state) {
  heads_alone a(state);
  const lithe::detail::attention_heads<float> h{heads, heads, width, 1 / std::sqrt(static_cast<float>(width)), Causal};
  a.time(state, [&] { h.forward(a.q, a.k, a.v, a.o, a.log_sum_exp, a.run.ctx); });
}

template <bool Causal>
void exact_backward(benchmark::State& state) {
  heads_alone a(state);
  const lithe::detail::attention_heads<float> h{heads, heads, width, 1 / std::sqrt(static_cast<float>(width)), Causal};
  const matrix<float> d = random_matrix(a.length, features, 4);
  matrix<float> dq(a.length, features), dk(a.length, features), dv(a.length, features);
  h.forward(a.q, a.k, a.v, a.o, a.log_sum_exp, a.run.ctx);
  a.time(state, [&] { h.backward(a.q, a.k, a.v, a.o, a.log_sum_exp, d, dq, dk, dv, a.run.ctx); });
}

/// The whole matrix of scores in memory, a head at a time.
template <bool Causal>
void naive(benchmark::State& state) {
  heads_alone a(state);
  matrix<float> scores(a.length, a.length);
  a.time(state, [&] {
    for (index_t h = 0; h < heads; ++h) {
      a.run.exec.run(a.length, 256, [&](index_t first, index_t last) {
        const index_t n = last - first;
        auto s = scores.middleRows(first, n);
        s.noalias() = a.q.block(first, h * width, n, width) * a.k.middleCols(h * width, width).transpose();
        for (index_t t = first; t < last; ++t) {
          auto row = scores.row(t).array();
          if (Causal) row.tail(a.length - t - 1).setConstant(-std::numeric_limits<float>::infinity());
          row = ((row - row.maxCoeff()) * (1 / std::sqrt(static_cast<float>(width)))).exp();
          row /= row.sum();
        }
        a.o.block(first, h * width, n, width).noalias() = s * a.v.middleCols(h * width, width);
      });
    }
  });
}

/// The layer with its projections.
void layer_causal(benchmark::State& state) {
  runner run(state.range(1));
  inputs x(1, state.range(0), features);
  static const lithe::attention<float> layer = [] {
    lithe::attention<float> l({.inputs = features, .heads = heads, .causal = true}, key);
    lithe::prepack(l);
    return l;
  }();
  time_forward(state, layer, x, run.ctx, 4 * features * features * 4);
}

void cases(benchmark::internal::Benchmark* b, const std::vector<index_t>& lengths, const std::vector<index_t>& workers = {1, 2}) {
  b->ArgNames({"length", "workers"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const index_t length : lengths)
    for (const index_t w : workers) b->Args({length, w});
}
BENCHMARK(exact<true>)->Name("attention/exact_causal")->Apply([](auto* b) { cases(b, {512, 2048, 8192}); });
// Beside LSH attention; the longest takes minutes.
BENCHMARK(exact<true>)->Name("attention/exact_causal")->Apply([](auto* b) { cases(b, {4096, 16384, 65536, 262144}, {2}); });
BENCHMARK(exact<false>)->Name("attention/exact_bidirectional")->Apply([](auto* b) { cases(b, {512, 2048, 8192}); });
BENCHMARK(exact_backward<true>)->Name("attention/exact_causal_backward")->Apply([](auto* b) { cases(b, {512, 2048}); });
BENCHMARK(naive<true>)->Name("attention/naive_causal")->Apply([](auto* b) { cases(b, {512, 2048, 8192}); });
BENCHMARK(naive<false>)->Name("attention/naive_bidirectional")->Apply([](auto* b) { cases(b, {2048}); });
BENCHMARK(layer_causal)->Name("attention/layer_causal")->Apply([](auto* b) { cases(b, {512, 8192}); });

}  // namespace
