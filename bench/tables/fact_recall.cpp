// Random facts (subject, relation -> object) learnt by heart: what dense layers, experts and memories of equal inference time hold, and what a
// memory holds against the rows of its table.
#include <map>

#include "facts.hpp"

namespace {

using namespace lithe;
using tables::facts::batch, tables::facts::width;

/// A layer to compare. `equal`: one of those whose inference time is about that of the dense layer of 512.
struct contender {
  std::string name;
  index_t rows;
  bool equal;
  std::function<tables::facts::middle_layer(rng_key)> make;
};

contender product_keys(index_t side, bool equal) {
  auto c = tables::facts::product_key_settings(side);
  return {"product keys", side * side, equal, [=](rng_key key) { return product_key_memory<float>(c, key); }};
}
contender ultra_mems(index_t side, bool equal) {
  auto c = tables::facts::ultra_mem_settings(side);
  return {"UltraMem", side * side, equal, [=](rng_key key) { return ultra_mem<float>(c, key); }};
}
std::vector<contender> contenders(const tables::options& o) {
  std::vector<contender> all{
      {"dense", 0, true, [](rng_key key) { return tables::facts::dense(512, key); }},
      {"experts", 0, true, [](rng_key key) { return mixture_of_experts<float>({.features = width, .hidden = 160, .experts = 64}, key); }}};
  for (const index_t side : o.pick<std::vector<index_t>>({32, 128}, {32, 64, 128}, {16, 32, 64, 128, 256, 512})) {
    all.push_back(product_keys(side, side == 128));
    all.push_back(ultra_mems(side, side == 128));
  }
  return all;
}

/// A contender's model after training.
struct learnt {
  const contender* of;
  std::uint64_t seed;
  tables::facts::model model;
  index_t parameters, recalled;
  double microseconds = 1e9, layer = 1e9;  // a query: the model and the layer alone
};

/// Least times over rounds in which all take turns, so that what else the machine does falls on all.
void measure(std::vector<learnt>& all, int rounds, const context& ctx) {
  const tables::facts::corpus known(4000, {1});
  matrix<float> x, y(batch, width), logits(batch, tables::facts::objects);
  std::vector<token_t> target;
  for (int round = 0; round < rounds; ++round)
    for (learnt& l : all) {
      const rng_key key = rng_key{l.seed}.child(static_cast<std::uint64_t>(round));
      const auto ask = [&](rng_key k) {
        known.read([&](index_t i) { return static_cast<index_t>(uniform(k, static_cast<std::uint64_t>(i)) * static_cast<double>(known.count)); }, x,
                   target);
      };
      ask(key);
      const auto h = tables::facts::middle_input(l.model, x, ctx);
      const auto least = [&](double& seconds, auto&& run) {
        const double begin = tables::now();
        run();
        seconds = std::min(seconds, (tables::now() - begin) / batch * 1e6);
      };
      least(l.layer, [&] { std::get<1>(l.model.layers).blocks[1].forward(h, y, ctx); });
      ask(key.child(1));  // or the rows would still be in the cache
      least(l.microseconds, [&] { l.model.forward(x, logits, ctx); });
    }
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const index_t subjects = o.pick<index_t>(400, 4000, 4000);
  const tables::facts::training how{.steps = o.pick<index_t>(60, 2200, 2200)};
  const std::uint64_t seeds = o.pick<std::uint64_t>(1, 1, 3);
  const auto all = contenders(o);
  const auto seeds_of = [&](const contender& c) { return c.equal ? seeds : 1; };  // where a table gives out needs no spread
  std::uint64_t runs = 0;
  for (const contender& c : all) runs += seeds_of(c);

  std::vector<learnt> results;
  std::int64_t skipped = 0;
  for (const contender& c : all)
    for (std::uint64_t seed = o.seed; seed < o.seed + seeds_of(c); ++seed) {
      const rng_key key{seed};
      const tables::facts::corpus known(subjects, key.child(0));
      learnt l{&c, seed, tables::facts::make_model({c.make(key.child(1))}, key.child(2)), 0, 0};
      const auto done = static_cast<double>(results.size()), of = static_cast<double>(runs);
      tables::facts::training own = how;
      if (c.name == "UltraMem") own.value_times = 4;  // its paper's
      skipped += tables::facts::learn(l.model, known, own, key.child(3), ctx, [&](double share) {
        tables::progress(concat(c.name, " ", c.rows), (done + share) / of);
      });
      l.parameters = count_parameters(l.model);
      prepack(l.model);
      l.recalled = tables::facts::test(l.model, known, ctx).recalled;
      results.push_back(std::move(l));
    }
  measure(results, o.pick(5, 60, 60), ctx);

  const index_t count = subjects * tables::facts::relations;
  t = {.title = "Facts learnt by heart",
       .source = "arXiv 1907.05242 section 1, 2411.12364 section 4: memory layers add capacity at equal cost",
       .question = concat(count, " random facts, ", how.steps, " steps of ", batch,
                          ": how many objects come out first? The layers marked as equal ",
                          "cost about the same time; the others show what a table of other size holds."),
       .columns = {"layer", "table rows", "seed", "equal time", "parameters", "us a query", "us of the layer",
                   "recalled", "share", "times dense"}};
  t.skipped = skipped;
  std::map<std::string, double> least;  // of the layers of equal time, over the seeds
  std::map<std::uint64_t, double> dense;
  double fastest = 1e9, slowest = 0;
  for (const learnt& l : results) {
    const double share = static_cast<double>(l.recalled) / static_cast<double>(count);
    if (l.of->name == "dense") dense[l.seed] = share;
    const double times = share / dense[l.seed];
    t.row({l.of->name, l.of->rows, l.seed, l.of->equal ? "yes" : "no", l.parameters, l.microseconds, l.layer, l.recalled, share, times});
    if (l.of->rows > 0 && times < 1) t.last_row_is_against();
    if (!l.of->equal) continue;
    fastest = std::min(fastest, l.microseconds), slowest = std::max(slowest, l.microseconds);
    const auto [at, fresh] = least.try_emplace(l.of->name, times);
    at->second = std::min(at->second, times);
  }
  t.figures = {{.title = "Facts recalled against time", .x = "us a query", .y = "share", .by = "layer"},
               {.title = "Facts recalled against rows of the table", .x = "table rows", .y = "share", .by = "layer", .log_x = true}};
  t.shown = std::min(least["product keys"], least["UltraMem"]) >= 3 && slowest / fastest < 1.15;
  t.finding = tables::sentence("At equal time (slowest over fastest query ", slowest / fastest,
                               ") product keys recall at least ", least["product keys"],
                               " times what the dense layer does, UltraMem ", least["UltraMem"], " times, experts ",
                               least["experts"], " times.");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
