// Random facts (subject, relation -> object) learnt by heart: how many a layer holds at equal inference time, and what its table holds.
#include <lithe/lithe.hpp>

#include "table.hpp"

namespace {

using namespace lithe;
using real = float;

constexpr index_t subjects = 4000, relations = 20, objects = 500, width = 64, batch = 2048;

/// Facts in random order: nothing in a subject or a relation tells the object.
struct facts {
  matrix<real> subject, relation;
  index_t count;

  explicit facts(index_t n, rng_key key) : subject(subjects, width), relation(relations, width), count(n) {
    const auto fill = [](matrix<real>& m, rng_key k) {
      for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<real>(normal(k, static_cast<std::uint64_t>(i)));
    };
    fill(subject, key.child(0));
    fill(relation, key.child(1));
    object_key_ = key.child(2);
  }
  void read(index_t fact, real* x, token_t& object) const {
    std::copy_n(subject.row(fact / relations).data(), width, x);
    std::copy_n(relation.row(fact % relations).data(), width, x + width);
    object = static_cast<token_t>(uniform(object_key_, static_cast<std::uint64_t>(fact)) * objects);
  }

 private:
  rng_key object_key_;
};

template <class Middle>
using part = residual<sequential<layer_norm<real>, Middle>>;
template <class Middle>
using model = sequential<linear<real>, part<feed_forward<real>>, part<Middle>, part<feed_forward<real>>, layer_norm<real>, linear<real>>;

struct result {
  index_t parameters, recalled;
  double microseconds;
};

/// Trains on all facts and counts the objects that come out first.
template <class Middle>
result learn(const Middle& middle, const facts& known, index_t steps, std::uint64_t seed, const context& base,
             const std::function<void(double)>& tell) {
  const rng_key key{seed};
  const auto dense = [&](std::uint64_t i) {
    return part<feed_forward<real>>{
        sequential(layer_norm<real>(width), feed_forward<real>({.features = width, .hidden = 4 * width, .kind = activation::gelu}, key.child(i)))};
  };
  model<Middle> m(linear<real>({2 * width, width}, key.child(1)), dense(2), part<Middle>{sequential(layer_norm<real>(width), middle)}, dense(3),
                  layer_norm<real>(width), linear<real>({width, objects}, key.child(4)));
  optimiser<real> adam;
  for_each_tensor(
      [&](const std::string& name, role, const auto&) {
        if (name.ends_with(".values")) adam.config.groups.push_back({.pattern = name, .rate = 5});
      },
      m);
  const learning_rate_schedule schedule{.learning_rate = 2e-3, .warmup_steps = steps / 20, .total_steps = steps, .final_ratio = 0.02};
  auto gradient = make_gradient(m);
  typename model<Middle>::record record;
  matrix<real> x(batch, 2 * width), logits(batch, objects);
  std::vector<token_t> target(batch);
  const auto draw = [&](auto&& fact_of) {
    for (index_t i = 0; i < batch; ++i) known.read(fact_of(i), x.row(i).data(), target[static_cast<std::size_t>(i)]);
  };
  context ctx = base;
  for (index_t step = 0; step < steps; ++step) {
    ctx.train = true;
    ctx.key = key.child(5).child(static_cast<std::uint64_t>(step));
    draw([&](index_t i) { return static_cast<index_t>(uniform(ctx.key, static_cast<std::uint64_t>(i)) * static_cast<double>(known.count)); });
    set_zero(m, gradient);
    m.forward(x, logits, record, ctx);
    cross_entropy<real>(logits, target, {}, logits, ctx);
    m.backward(x, record, logits, matrix<real>(batch, 2 * width), gradient, ctx);
    adam.step(m, gradient, schedule(step), ctx);
    tell(static_cast<double>(step) / static_cast<double>(steps));
  }
  result r{count_parameters(m), 0, 0};
  prepack(m);
  std::vector<double> times;
  for (index_t first = 0; first < known.count; first += batch) {
    draw([&](index_t i) { return std::min(first + i, known.count - 1); });
    const double begin = tables::now();
    m.forward(x, logits, base);
    times.push_back((tables::now() - begin) / batch * 1e6);
    for (index_t i = 0; i < std::min(batch, known.count - first); ++i) {
      index_t best = 0;
      logits.row(i).maxCoeff(&best);
      r.recalled += best == target[static_cast<std::size_t>(i)];
    }
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  r.microseconds = times[times.size() / 2];
  return r;
}

tables::table make(const tables::options& o) {
  const parallel_executor exec(o.workers);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  const index_t count = subjects * relations, steps = o.pick<index_t>(30, 2200, 2200);
  const std::uint64_t seeds = o.pick<std::uint64_t>(1, 1, 3);

  tables::table t{.title = "Facts learnt by heart",
                  .source = "arXiv 1907.05242 section 1, 2411.12364 section 4: memory layers add capacity at equal cost",
                  .question = concat(count, " random facts, ", steps, " steps of ", batch, ": how many objects come out first?"),
                  .columns = {"layer", "table rows", "seed", "parameters", "us a query", "recalled", "share"}};
  struct kind {
    std::string name;
    index_t rows;
    std::function<result(std::uint64_t, const std::function<void(double)>&)> learn;
  };
  std::vector<kind> kinds;
  const auto dense = [&](std::string name, index_t hidden) {
    kinds.push_back({std::move(name), 0, [&, hidden](std::uint64_t seed, const auto& tell) {
                       return learn(feed_forward<real>({.features = width, .hidden = hidden, .kind = activation::gelu}, rng_key{seed}.child(9)),
                                    facts(count, rng_key{seed}), steps, seed, ctx, tell);
                     }});
  };
  const auto memory = [&](index_t sub_keys) {
    kinds.push_back({"product keys", sub_keys * sub_keys, [&, sub_keys](std::uint64_t seed, const auto& tell) {
                       product_key_memory_config c{.inputs = width, .heads = 2, .sub_keys = sub_keys, .key_width = 64, .top_k = 16};
                       c.query.norm = query_normalisation::batch;
                       return learn(product_key_memory<real>(c, rng_key{seed}.child(9)), facts(count, rng_key{seed}), steps, seed, ctx, tell);
                     }});
  };
  dense("dense", 4 * width);
  dense("dense, 4 times as wide", 16 * width);
  for (const index_t n : o.run == tables::length::quick ? std::vector<index_t>{32, 128} : std::vector<index_t>{32, 64, 128, 256}) memory(n);

  double best_dense = 0, best_memory = 0;
  for (std::size_t i = 0; i < kinds.size(); ++i)
    for (std::uint64_t seed = o.seed; seed < o.seed + seeds; ++seed) {
      const auto done = static_cast<double>(i * seeds + seed - o.seed);
      const auto r =
          kinds[i].learn(seed, [&](double share) { tables::progress(kinds[i].name, (done + share) / static_cast<double>(kinds.size() * seeds)); });
      const double share = static_cast<double>(r.recalled) / static_cast<double>(count);
      (kinds[i].rows == 0 ? best_dense : best_memory) = std::max(kinds[i].rows == 0 ? best_dense : best_memory, share);
      t.row({kinds[i].name, kinds[i].rows, seed, r.parameters, r.microseconds, r.recalled, share});
    }
  t.figures = {{.title = "Facts recalled against time", .x = "us a query", .y = "share", .by = "layer"},
               {.title = "Facts recalled against rows of the table", .x = "table rows", .y = "share", .by = "layer"}};
  t.shown = best_memory >= 3 * best_dense;
  t.finding = concat("The best dense layer recalls ", std::lround(100 * best_dense), " % of the facts, the best memory ",
                     std::lround(100 * best_memory), " %.");
  return t;
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
