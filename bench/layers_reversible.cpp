// Reversible stacks against stacks that store everything: time, what their records hold, and how far the reconstructed input drifts.

#include "lithe/compose/pre_norm.hpp"
#include "lithe/compose/reversible_stack.hpp"
#include "lithe/layers/attention/attention.hpp"
#include "lithe/layers/feed_forward.hpp"
#include "support.hpp"

namespace {

using namespace bench;

template <class S>
using block = lithe::reversible<lithe::pre_norm<lithe::attention<S>>, lithe::pre_norm<lithe::feed_forward<S>>>;

template <class S>
block<S> make(index_t i, index_t features, index_t heads, index_t chunk) {
  const lithe::rng_key k = key.child(static_cast<std::uint64_t>(i));
  return block<S>({lithe::layer_norm<S>(features), lithe::attention<S>({.inputs = features, .heads = heads, .causal = true, .bias = false}, k.child(0))},
                  {lithe::layer_norm<S>(features), lithe::feed_forward<S>({.features = features, .hidden = 4 * features, .kind = lithe::activation::gelu}, k.child(1))},
                  chunk);
}
template <class S>
lithe::reversible_stack<block<S>> make_stack(index_t depth, index_t features, index_t heads, index_t chunk) {
  lithe::reversible_stack<block<S>> s;
  for (index_t i = 0; i < depth; ++i) s.blocks.push_back(make<S>(i, features, heads, chunk));
  return s;
}

constexpr index_t tokens = 1024, features = 256;

/// Forward and backward in sequences of 128 tokens; record_MiB is what stands in memory between the two.
template <class Model>
void train(benchmark::State& state, const Model& model) {
  runner run(state.range(1));
  run.ctx.train = true;
  std::vector<index_t> offsets;
  for (index_t i = 0; i <= tokens; i += 128) offsets.push_back(i);
  run.ctx.rows = {offsets};
  const matrix<float> x = random_matrix(tokens, 2 * features), dy = random_matrix(tokens, 2 * features, 2);
  matrix<float> y(tokens, 2 * features), dx(tokens, 2 * features);
  lithe::record_of<Model> record;
  auto gradient = lithe::make_gradient(model);
  const auto step = [&] {
    lithe::set_zero(model, gradient);
    model.forward(x, y, record, run.ctx);
    model.backward(x, record, dy, dx, gradient, run.ctx);
    benchmark::ClobberMemory();
  };
  step();
  for (auto _ : state) step();
  state.counters["record_MiB"] = static_cast<double>(lithe::bytes(record)) / (1 << 20);
  count(state, tokens);
}
void reversible(benchmark::State& state) { train(state, make_stack<float>(state.range(0), features, 4, 128)); }

/// Stores the record of every part of every block, as automatic differentiation would.
void stored(benchmark::State& state) {
  const auto model = make_stack<float>(state.range(0), features, 4, 0);
  runner run(state.range(1));
  run.ctx.train = true;
  std::vector<index_t> offsets;
  for (index_t i = 0; i <= tokens; i += 128) offsets.push_back(i);
  run.ctx.rows = {offsets};
  struct saved {
    matrix<float> in, between;
    std::pair<lithe::record_of<lithe::pre_norm<lithe::attention<float>>>, lithe::record_of<lithe::pre_norm<lithe::feed_forward<float>>>> parts;
  };
  std::vector<saved> all(model.blocks.size());
  const matrix<float> x = random_matrix(tokens, 2 * features), dy = random_matrix(tokens, 2 * features, 2);
  auto gradient = lithe::make_gradient(model);
  matrix<float> t(tokens, features);
  const auto step = [&] {
    lithe::set_zero(model, gradient);
    matrix<float> a = x.leftCols(features), b = x.rightCols(features);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto& [f, g] = model.blocks[i].parts;
      all[i].in = b;
      f.forward(b, t, all[i].parts.first, run.ctx);
      a += t;
      all[i].between = a;
      g.forward(a, t, all[i].parts.second, run.ctx);
      b += t;
    }
    a = dy.leftCols(features);
    b = dy.rightCols(features);
    for (std::size_t i = all.size(); i-- > 0;) {
      const auto& [f, g] = model.blocks[i].parts;
      auto& [df, dg] = gradient.blocks[i].parts;
      g.backward(all[i].between, all[i].parts.second, b, t, dg, run.ctx);
      a += t;
      f.backward(all[i].in, all[i].parts.first, a, t, df, run.ctx);
      b += t;
    }
    benchmark::ClobberMemory();
  };
  step();
  for (auto _ : state) step();
  std::size_t bytes = 0;
  for (const saved& s : all) bytes += lithe::bytes(s.in) + lithe::bytes(s.between) + lithe::bytes(s.parts.first) + lithe::bytes(s.parts.second);
  state.counters["record_MiB"] = static_cast<double>(bytes) / (1 << 20);
  count(state, tokens);
}
void cases(benchmark::internal::Benchmark* b) {
  b->ArgNames({"layers", "workers"})->ArgsProduct({{6, 24}, {1, 2}})->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(reversible)->Name("reversible/train")->Apply(cases);
BENCHMARK(stored)->Name("reversible/train_stored")->Apply(cases);

/// Worst error of the reconstructed input: 64 features, hidden 256, 2 heads, 128 tokens, weights of variance 1 / inputs or of a deviation of
/// 0.02. In float also that of the input's gradient, relative to the largest, against double.
template <class S>
struct passed {
  double error;
  matrix<S> gradient;
};
template <class S>
passed<S> there_and_back(index_t depth, bool small) {
  auto model = make_stack<double>(depth, 64, 2, 0);
  std::uint64_t n = 0;
  lithe::for_each_tensor(
      [&](const std::string& name, lithe::role, auto& p) {
        if (name.ends_with("weight") && name.find("norm") == std::string::npos)
          lithe::fill_normal<double>(p, small ? 0.02 : 1 / std::sqrt(static_cast<double>(p.cols())), key.child(++n));
      },
      model);
  auto mine = make_stack<S>(depth, 64, 2, 0);
  lithe::for_each_tensor([](const std::string&, lithe::role, auto& to, const auto& from) { to = from.template cast<S>(); }, mine, model);
  matrix<double> x(128, 128), dy(128, 128);
  lithe::fill_normal<double>(x, 1, {1});
  lithe::fill_normal<double>(dy, 1, {2});
  const matrix<S> start = x.cast<S>();
  matrix<S> xy = start, dxy = dy.cast<S>();
  lithe::record_of<lithe::reversible_stack<block<S>>> record;
  auto gradient = lithe::make_gradient(mine);
  mine.forward_in_place(xy, &record, {});
  mine.reverse(xy, dxy, record, gradient, {});
  return {static_cast<double>((xy - start).cwiseAbs().maxCoeff()), dxy};
}
void drift(benchmark::State& state) {
  const index_t depth = state.range(0);
  const bool small = state.range(1) != 0;
  for (auto _ : state) {
    const auto in_double = there_and_back<double>(depth, small);
    const auto in_float = there_and_back<float>(depth, small);
    const double size = in_double.gradient.cwiseAbs().maxCoeff();
    state.counters["double"] = in_double.error;
    state.counters["float"] = in_float.error;
    state.counters["float_gradient"] = (in_float.gradient.cast<double>() - in_double.gradient).cwiseAbs().maxCoeff() / size;
  }
}
BENCHMARK(drift)
    ->Name("reversible/drift")
    ->ArgNames({"layers", "small_weights"})
    ->ArgsProduct({{1, 3, 6, 12, 24, 48}, {0, 1}})
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
