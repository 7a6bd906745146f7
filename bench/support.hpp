#pragma once

#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/parameters.hpp"
#include "machine.hpp"

namespace bench {

using lithe::context;
using lithe::index_t;
using lithe::matrix;
using lithe::matrix_view;
using lithe::slot_t;

inline constexpr lithe::rng_key key{1};

/// Threads, scratch memory and the context of a case.
struct runner {
  lithe::parallel_executor exec;
  lithe::workspace work{exec};
  context ctx;
  explicit runner(index_t workers) : exec(workers) {
    ctx.exec = &exec;
    ctx.work = &work;
    ctx.key = key;
  }
};

/// What a case needs and Google Benchmark asks for several times (it looks for the number of iterations): made once for an argument,
/// given up for the next one, because some of it takes gigabytes.
template <class Make>
auto& made_for(index_t argument, Make&& make) {
  static std::unique_ptr<decltype(make())> made;
  static index_t made_argument = 0;
  if (!made || made_argument != argument) {
    made.reset();
    made = std::make_unique<decltype(make())>(make());
    made_argument = argument;
  }
  return *made;
}

/// Uniform in [-1, 1).
inline void fill_random(matrix_view<float> m, std::uint64_t seed = 1) {
  machine::random_bits random{seed * 0x9e3779b97f4a7c15ULL};
  for (index_t i = 0; i < m.rows(); ++i)
    for (index_t j = 0; j < m.cols(); ++j) m(i, j) = random.symmetric();
}
inline matrix<float> random_matrix(index_t rows, index_t cols, std::uint64_t seed = 1) {
  matrix<float> m(rows, cols);
  fill_random(m, seed);
  return m;
}

/// Inputs to take in turn: a call then does not find the rows that it picks in a cache.
class inputs {
 public:
  inputs(index_t sets, index_t rows, index_t cols) {
    for (index_t i = 0; i < sets; ++i) sets_.push_back(random_matrix(rows, cols, static_cast<std::uint64_t>(i) + 1));
  }
  const matrix<float>& next() { return sets_[at_++ % sets_.size()]; }

 private:
  std::vector<matrix<float>> sets_;
  std::size_t at_ = 0;
};
/// Enough of them: what they pick is larger than the caches.
inline index_t cold_sets(index_t tokens) { return tokens > 1 ? 8 : 256; }

/// Slots and weights of T tokens, drawn afresh for each of `sets` calls.
struct random_picks {
  index_t tokens, per_token;
  std::vector<std::vector<slot_t>> slots;
  std::vector<float> weights;
  random_picks(index_t sets, index_t tokens_, index_t per_token_, index_t rows) : tokens(tokens_), per_token(per_token_) {
    machine::random_bits random;
    for (index_t i = 0; i < tokens * per_token; ++i) weights.push_back(random.symmetric());
    for (index_t s = 0; s < sets; ++s) {
      auto& set = slots.emplace_back();
      for (index_t i = 0; i < tokens * per_token; ++i) set.push_back(random.below(static_cast<std::uint64_t>(rows)));
    }
  }
  const std::vector<slot_t>& next() { return slots[at_++ % slots.size()]; }

 private:
  std::size_t at_ = 0;
};

/// Items are tokens (or lists), bytes are bytes read.
inline void count(benchmark::State& state, index_t items, index_t bytes = 0) {
  state.SetItemsProcessed(items * static_cast<index_t>(state.iterations()));
  if (bytes != 0) state.SetBytesProcessed(bytes * static_cast<index_t>(state.iterations()));
}

/// Inference that reads so many bytes of parameters.
template <class L>
void time_forward(benchmark::State& state, const L& layer, inputs& x, context ctx, index_t bytes) {
  const lithe::shape out = layer.output_shape(x.next());
  matrix<float> y(out.rows, out.cols);
  layer.forward(x.next(), y, ctx);  // scratch memory grows
  for (auto _ : state) {
    layer.forward(x.next(), y, ctx);
    benchmark::ClobberMemory();
  }
  count(state, out.rows, bytes);
}

/// A training step without its optimiser: gradient to zero, forward, backward.
template <class L>
void time_training(benchmark::State& state, const L& layer, inputs& x, context ctx) {
  ctx.train = true;
  const lithe::shape out = layer.output_shape(x.next());
  matrix<float> y(out.rows, out.cols), dx(x.next().rows(), x.next().cols());
  const matrix<float> dy = random_matrix(out.rows, out.cols);
  auto gradient = lithe::make_gradient(layer);
  lithe::record_of<L> record;
  const auto step = [&] {
    const auto& in = x.next();
    lithe::set_zero(layer, gradient);
    layer.forward(in, y, record, ctx);
    layer.backward(in, record, dy, dx, gradient, ctx);
    benchmark::ClobberMemory();
  };
  step();
  for (auto _ : state) step();
  count(state, out.rows);
}


}  // namespace bench
