#pragma once

// Random facts (subject, relation -> object) and models that learn them by heart, for the tables about what memories hold.

#include <lithe/lithe.hpp>
#include <numbers>

#include "../../examples/support/steps.hpp"
#include "table.hpp"

namespace tables::facts {

using real = float;
using lithe::index_t;
using lithe::matrix;
using lithe::token_t;

inline constexpr index_t relations = 20, objects = 500, width = 64, batch = 2048;

/// Facts in random order: nothing in a subject or a relation tells the object.
struct corpus {
  index_t count;
  matrix<real> subject, relation;
  lithe::rng_key object_key;

  corpus(index_t subjects, lithe::rng_key key)
      : count(subjects * relations), subject(subjects, width), relation(relations, width), object_key(key.child(2)) {
    lithe::fill_normal<real>(subject, 1, key.child(0));
    lithe::fill_normal<real>(relation, 1, key.child(1));
  }
  /// Writes `batch` facts, the i-th of number fact_of(i).
  template <class F>
  void read(F&& fact_of, matrix<real>& x, std::vector<token_t>& object) const {
    x.resize(batch, 2 * width);
    object.resize(batch);
    for (index_t i = 0; i < batch; ++i) {
      const index_t fact = fact_of(i);
      x.row(i) << subject.row(fact / relations), relation.row(fact % relations);
      object[static_cast<std::size_t>(i)] = static_cast<token_t>(lithe::uniform(object_key, static_cast<std::uint64_t>(fact)) * objects);
    }
  }
};

using middle_layer =
    lithe::one_of<lithe::feed_forward<real>, lithe::product_key_memory<real>, lithe::ultra_mem<real>, lithe::mixture_of_experts<real>>;
using part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, middle_layer>>;
using model = lithe::sequential<lithe::linear<real>, lithe::stack<part>, lithe::layer_norm<real>, lithe::linear<real>>;

inline middle_layer dense(index_t hidden, lithe::rng_key key) {
  return lithe::feed_forward<real>({.features = width, .hidden = hidden, .kind = lithe::activation::gelu}, key);
}
// Memories with a table of side² rows. At a side of 128 they take about the time of a dense layer of 512 hidden features.
inline lithe::product_key_memory_config product_key_settings(index_t side) {
  lithe::product_key_memory_config c{.inputs = width, .heads = 2, .sub_keys = side, .key_width = 32, .top_k = 8};
  c.query.norm = lithe::query_normalisation::batch;
  return c;
}
inline lithe::ultra_mem_config ultra_mem_settings(index_t side) {
  return {.features = width, .heads = 1, .sub_keys = side, .key_width = 16, .top_k = 8, .expansion = 1, .value_width = width};
}

/// Dense parts with the layers to compare between them.
inline model make_model(std::vector<middle_layer> middle, lithe::rng_key key) {
  lithe::stack<part> parts;
  const auto add = [&](middle_layer l) { parts.blocks.push_back({lithe::sequential(lithe::layer_norm<real>(width), std::move(l))}); };
  add(dense(4 * width, key.child(2)));
  for (middle_layer& l : middle) add(std::move(l));
  add(dense(4 * width, key.child(3)));
  return model(lithe::linear<real>({2 * width, width}, key.child(1)), std::move(parts), lithe::layer_norm<real>(width),
               lithe::linear<real>({width, objects}, key.child(4)));
}

/// How a model is trained; value tables move at value_rate, at first value_times that (falling to 1).
struct training {
  index_t steps = 2200;
  double rate = 2e-3, value_rate = 1e-2, value_times = 1;
};

/// Trains on all facts, drawn at random; tell(share) hears how far it is. Returns the steps that were skipped because
/// they were not finite.
template <class Model>
std::int64_t learn(Model& m, const corpus& known, const training& how, lithe::rng_key key, const lithe::context& base,
                   const std::function<void(double)>& tell) {
  using namespace lithe;
  optimiser<real> adam;
  bool tables = false;
  for_each_tensor([&](const std::string& name, role, const auto& v) { tables = tables || (name.ends_with(".values") && v.rows() > 0); }, m);
  if (tables) adam.config.groups = {{.pattern = "*.values"}};
  const learning_rate_schedule schedule{.learning_rate = how.rate, .warmup_steps = how.steps / 20, .total_steps = how.steps, .final_ratio = 0.02};
  const value_rate_schedule times{.times = how.value_times, .total_steps = how.steps};
  auto gradient = make_gradient(m);
  record_of<Model> record;
  matrix<real> x, dx(batch, 2 * width), logits(batch, objects);
  std::vector<token_t> target;
  context ctx = base;
  ctx.train = true;
  support::step_guard guard;
  for (index_t step = 0; step < how.steps; ++step) {
    ctx.key = key.child(static_cast<std::uint64_t>(step));
    known.read([&](index_t i) { return static_cast<index_t>(uniform(ctx.key, static_cast<std::uint64_t>(i)) * static_cast<double>(known.count)); }, x,
               target);
    set_zero(m, gradient);
    m.forward(x, logits, record, ctx);
    const double loss = cross_entropy<real>(logits, target, {}, logits, ctx).loss;
    m.backward(x, record, logits, dx, gradient, ctx);
    if (tables) adam.config.groups[0].rate = how.value_rate / how.rate * times(step);
    if (guard.accepts(loss, global_norm(m, gradient, ctx))) adam.step(m, gradient, schedule(step), ctx);
    tell(static_cast<double>(step) / static_cast<double>(how.steps));
  }
  guard.check();
  return guard.skipped();
}

/// What a model knows of all facts.
struct knowledge {
  index_t recalled = 0;  ///< facts whose object comes out first
  double bits = 0;       ///< cross-entropy of a fact's object, mean
};
template <class Model>
knowledge test(const Model& m, const corpus& known, const lithe::context& ctx) {
  matrix<real> x, logits(batch, objects);
  std::vector<token_t> target;
  knowledge k;
  for (index_t first = 0; first < known.count; first += batch) {
    known.read([&](index_t i) { return std::min(first + i, known.count - 1); }, x, target);
    m.forward(x, logits, ctx);
    const index_t n = std::min(batch, known.count - first);
    for (index_t i = 0; i < n; ++i) {
      index_t best = 0;
      logits.row(i).maxCoeff(&best);
      k.recalled += best == target[static_cast<std::size_t>(i)];
    }
    const lithe::matrix_view<const real> seen = logits;
    k.bits += lithe::cross_entropy<real>(seen.slice_rows(0, n), std::span<const token_t>(target).first(static_cast<std::size_t>(n)),
                                         {.reduce = lithe::reduction::sum}, lithe::matrix_view<real>(), ctx)
                  .loss;
  }
  k.bits /= static_cast<double>(known.count) * std::numbers::ln2;
  return k;
}

/// What the compared layers of a model read when it sees the given facts: the input of its part 1.
inline matrix<real> middle_input(const model& m, const matrix<real>& x, const lithe::context& ctx) {
  matrix<real> projected(x.rows(), width), h(x.rows(), width);
  std::get<0>(m.layers).forward(x, projected, ctx);
  std::get<1>(m.layers).blocks[0].forward(projected, h, ctx);
  return h;
}

}  // namespace tables::facts
