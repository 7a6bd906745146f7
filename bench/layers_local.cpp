#include "lithe/layers/attention/bucket_attention.hpp"
#include "lithe/layers/attention/local_attention.hpp"
#include "support.hpp"

namespace {

using namespace bench;

constexpr index_t heads = 4, width = 64, features = heads * width, chunk = 64;

/// The heads alone, causal, one sequence: queries, keys and values are given.
struct local_case {
  runner run;
  index_t length;
  matrix<float> q, k, v, o, log_sum_exp;
  lithe::detail::local_windows<float> windows{
      .heads = heads, .width = width, .chunk = chunk, .before = 1, .after = 0, .pad_to = chunk,
      .scale = 0.125F, .causal = true, .circular = true, .mean = true};

  explicit local_case(const benchmark::State& s)
      : run(s.range(1)),
        length(s.range(0)),
        q(random_matrix(length, features, 1)),
        k(random_matrix(length, features, 2)),
        v(random_matrix(length, features, 3)),
        o(length, features),
        log_sum_exp(heads, length) {
    windows.forward(q, k, v, o, log_sum_exp, run.ctx);
  }
};

void local(benchmark::State& state) {
  local_case c(state);
  for (auto _ : state) {
    c.windows.forward(c.q, c.k, c.v, c.o, c.log_sum_exp, c.run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, c.length);
}
void local_backward(benchmark::State& state) {
  local_case c(state);
  const matrix<float> d = random_matrix(c.length, features, 4);
  matrix<float> dq(c.length, features), dk(c.length, features), dv(c.length, features);
  const auto body = [&] { c.windows.backward(c.q, c.k, c.v, c.o, c.log_sum_exp, d, dq, dk, dv, c.run.ctx); };
  body();
  for (auto _ : state) {
    body();
    benchmark::ClobberMemory();
  }
  count(state, c.length);
}

/// As many buckets as give each 64 tokens if they are equally full.
lithe::bucket_factors factors(index_t length) {
  const index_t n = length / 64;
  index_t f = 1;
  while (f * f < n) f *= 2;
  return n <= 64 ? lithe::bucket_factors{n} : lithe::bucket_factors{n / f, f};
}

/// Tokens are hashed beforehand; sorting counts.
struct bucket_case {
  runner run;
  index_t length;
  matrix<float> q, v, scales, o, log_sum_exp;
  matrix<lithe::bucket_t> ids;
  lithe::detail::bucket_windows<float> windows;
  index_t largest = 0;

  explicit bucket_case(const benchmark::State& s)
      : run(s.range(2)),
        length(s.range(0)),
        q(random_matrix(length, features, 1)),
        v(random_matrix(length, features, 2)),
        scales(heads, length),
        o(length, features),
        log_sum_exp(heads, length),
        ids(heads * s.range(1), length),
        windows{.heads = heads, .width = width, .rounds = s.range(1), .buckets = factors(length).total(), .causal = true} {
    const auto f = factors(length);
    const lithe::token_hash<float> hash("bench", {.rounds = windows.rounds, .buckets = f}, key);
    matrix<float> directions(windows.rounds * hash.directions(f), width);
    for (index_t h = 0; h < heads; ++h) {
      const auto mine = lithe::view(q).slice_cols(h * width, width);
      lithe::key_scales<float>(lithe::key_norm::rms, mine, scales.row(h).data());
      hash.draw("bench", h, heads, 0, f, directions, run.ctx);
      hash.hash(mine, directions, f, lithe::view(ids).slice_rows(h * windows.rounds, windows.rounds), run.ctx);
    }
    for (index_t i = 0; i < ids.rows(); ++i) {
      std::vector<index_t> n(static_cast<std::size_t>(windows.buckets), 0);
      for (index_t t = 0; t < length; ++t) largest = std::max(largest, ++n[ids(i, t)]);
    }
    windows.forward(q, v, scales, ids, o, log_sum_exp, run.ctx);
  }
};

void bucket(benchmark::State& state) {
  bucket_case c(state);
  for (auto _ : state) {
    c.windows.forward(c.q, c.v, c.scales, c.ids, c.o, c.log_sum_exp, c.run.ctx);
    benchmark::ClobberMemory();
  }
  count(state, c.length);
  state.counters["largest_bucket"] = static_cast<double>(c.largest);
}
void bucket_backward(benchmark::State& state) {
  bucket_case c(state);
  const matrix<float> d = random_matrix(c.length, features, 4);
  matrix<float> dq(c.length, features), dk(c.length, features), dv(c.length, features);
  const auto body = [&] { c.windows.backward(c.q, c.v, c.scales, c.ids, c.o, c.log_sum_exp, d, dq, dk, dv, c.run.ctx); };
  body();
  for (auto _ : state) {
    body();
    benchmark::ClobberMemory();
  }
  count(state, c.length);
}

void local_cases(benchmark::internal::Benchmark* b) {
  b->ArgNames({"length", "workers"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const index_t length : {4096, 16384, 65536, 262144}) b->Args({length, 2});
}
void bucket_cases(benchmark::internal::Benchmark* b, std::vector<index_t> lengths) {
  b->ArgNames({"length", "rounds", "workers"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const index_t length : lengths)
    for (const index_t rounds : {1, 4, 8}) b->Args({length, rounds, 2});
}
BENCHMARK(local)->Name("attention/local")->Apply(local_cases);
BENCHMARK(local_backward)->Name("attention/local_backward")->Apply(local_cases);
BENCHMARK(bucket)->Name("attention/bucket")->Apply([](auto* b) { bucket_cases(b, {4096, 16384, 65536, 262144}); });
BENCHMARK(bucket_backward)->Name("attention/bucket_backward")->Apply([](auto* b) { bucket_cases(b, {4096, 16384}); });

}  // namespace
