#include "lithe/layers/attention/lsh_attention.hpp"
#include "support.hpp"

namespace {

using namespace bench;
using lithe::view;

constexpr index_t heads = 4, width = 64, features = heads * width;

/// Causal, chunks of 64 with one before; the number of buckets is the automatic one.
lithe::lsh_attention_config config(index_t rounds) {
  return lithe::detail::resolved({.inputs = features, .heads = heads, .causal = true, .hash = {.rounds = rounds}});
}

/// The heads alone, one sequence: projected queries and values, and the buckets of the queries, are given.
struct core {
  index_t length;
  runner run;
  lithe::lsh_attention_config options;
  lithe::token_hash<float> hash;
  matrix<float> q, v, scales, o, maximum, sum, g, dots, dq, dv;
  matrix<lithe::bucket_t> ids;
  matrix<lithe::position_t> order;

  core(index_t length_, index_t rounds, index_t workers)
      : length(length_), run(workers), options(config(rounds)), hash("bench", options.hash, key), q(heads * length, width), v(random_matrix(heads * length, width, 2)),
        scales(heads, length), o(heads * length, width), maximum(heads, length), sum(heads, length), g(random_matrix(heads * length, width, 3)),
        dots(heads, length), dq(heads * length, width), dv(heads * length, width), ids(heads * rounds, length), order(heads * rounds, length) {
    run.exec.run(q.rows(), 1024, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) lithe::fill_normal<float>(view(q).slice_rows(i, 1), 1.0, key.child(static_cast<std::uint64_t>(i)));
    });
    const auto f = hash.buckets("bench", length, options.chunk);
    matrix<float> directions(rounds * hash.directions(f), width);
    for (index_t h = 0; h < heads; ++h) {
      const auto part = view(q).slice_rows(h * length, length);
      lithe::key_scales<float>(options.norm, part, scales.row(h).data());
      hash.draw("bench", h, heads, 0, f, directions, run.ctx);
      hash.hash(part, directions, f, view(ids).slice_rows(h * rounds, rounds), run.ctx);
    }
  }
  /// As many heads together as the layer takes.
  void forward() {
    each_group([&](index_t h, const auto& group) {
      group.sort();
      group.forward([&](index_t i) { return view(o).slice_rows((h + i) * length, length); }, view(maximum).slice_rows(h, group.count), view(sum).slice_rows(h, group.count));
    });
  }
  void backward() {
    each_group([&](index_t h, const auto& group) {
      const auto part = [&](matrix<float>& m) { return view(m).slice_rows(h * length, group.count * length); };
      group.sort();
      for (index_t i = 0; i < group.count; ++i)
        run.exec.run(length, 512, [&](index_t first, index_t last) {
          const index_t row = (h + i) * length + first, n = last - first;
          lithe::softmax_row_dots<float>(view(g).slice_rows(row, n), view(o).slice_rows(row, n), dots.row(h + i).data() + first);
          view(dq).slice_rows(row, n).map().setZero();
          view(dv).slice_rows(row, n).map().setZero();
        });
      group.backward(part(g), view(maximum).slice_rows(h, group.count), view(sum).slice_rows(h, group.count), view(dots).slice_rows(h, group.count), part(dq), part(dv));
    });
  }

 private:
  template <class F>
  void each_group(F&& f) {
    using group = lithe::detail::lsh_heads<float>;
    const index_t n = group::together(length, width, heads);
    for (index_t h = 0; h < heads; h += n)
      f(h, group{options, hash, run.ctx, length, h, std::min(n, heads - h), view(q).slice_rows(h * length, n * length), view(v).slice_rows(h * length, n * length),
                 scales.row(h).data(), ids, order});
  }
};

void forward(benchmark::State& state) {
  core c(state.range(0), state.range(1), state.range(2));
  c.forward();
  for (auto _ : state) {
    c.forward();
    benchmark::ClobberMemory();
  }
  count(state, c.length);
}
void backward(benchmark::State& state) {
  core c(state.range(0), state.range(1), state.range(2));
  c.forward();
  c.backward();
  for (auto _ : state) {
    c.backward();
    benchmark::ClobberMemory();
  }
  count(state, c.length);
}

lithe::lsh_attention<float> make_layer(index_t rounds) { return {config(rounds), key}; }

/// With projections and hashing.
void layer_forward(benchmark::State& state) {
  runner run(state.range(2));
  inputs x(1, state.range(0), features);
  time_forward(state, make_layer(state.range(1)), x, run.ctx, 4 * features * features * 4);
}
void layer_train(benchmark::State& state) {
  runner run(state.range(2));
  inputs x(1, state.range(0), features);
  time_training(state, make_layer(state.range(1)), x, run.ctx);
}

void cases(benchmark::internal::Benchmark* b, std::vector<index_t> lengths, std::vector<index_t> rounds) {
  b->ArgNames({"length", "rounds", "workers"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const index_t length : lengths)
    for (const index_t r : rounds)
      for (const index_t workers : {1, 2}) b->Args({length, r, workers});
}
BENCHMARK(forward)->Name("attention/lsh")->Apply([](auto* b) { cases(b, {4096, 8192, 16384, 65536, 262144}, {4, 8}); });
BENCHMARK(backward)->Name("attention/lsh_backward")->Apply([](auto* b) { cases(b, {4096, 16384, 65536}, {8}); });
BENCHMARK(layer_forward)->Name("attention/lsh_layer")->Apply([](auto* b) { cases(b, {4096, 16384, 65536}, {8}); });
BENCHMARK(layer_train)->Name("attention/lsh_layer_train")->Apply([](auto* b) { cases(b, {4096, 16384}, {8}); });

}  // namespace
