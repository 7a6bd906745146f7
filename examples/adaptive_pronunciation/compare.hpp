#pragma once

// The paper's table (arXiv 1910.10073, tables 1 and 2): models of fixed depth, aligned against mixed training, every distribution and target.

#include "table.hpp"

/// How a model with this trained distribution, or none, speaks unless something else is asked for.
inline manner usual_manner(const std::string& distribution) {
  using lithe::exit_confidence;
  if (distribution == "geometric") return {.rule = {.kind = exit_confidence::geometric, .thresholds = {0.5}}};
  if (distribution == "multinomial") return {.rule = {.kind = exit_confidence::multinomial}};
  if (distribution == "sequence") return {};
  if (distribution == "meta") return {.rule = {.kind = exit_confidence::meta, .thresholds = {0.9}}};
  return {.rule = {.kind = exit_confidence::softmax_diff, .thresholds = {0.9}}};
}

/// All rows of one seed, the same names for every seed. Speed-ups are over the baseline of full depth.
inline std::vector<table_row> compare_seed(const dictionary& d, const model_config& base, const training_plan& plan, const lithe::context& ctx) {
  std::vector<table_row> rows;
  pronouncer deepest;  // the baseline of full depth
  table::print_head();
  const auto measure = [&](pronouncer p, auto&& add) {
    lithe::prepack(p);
    if (rows.empty()) deepest = p;
    table t(p, d, ctx, deepest);
    add(t);
    rows.insert(rows.end(), t.rows.begin(), t.rows.end());
  };
  for (index_t depth : {base.decoder_blocks, index_t{1}, index_t{2}, index_t{3}}) {
    if (depth >= base.decoder_blocks && !rows.empty()) continue;
    model_config c = base;
    c.decoder_blocks = depth;
    measure(train_trunk(d, c, plan, "top", ctx), [&](table& t) { t.add(lithe::concat("baseline of ", depth, " blocks"), table::fixed(depth)); });
  }
  const auto each_depth = [&](const char* name) {
    return [&, name](table& t) {
      for (index_t n = 1; n <= base.decoder_blocks; ++n) t.add(lithe::concat(name, ", all after block ", n), table::fixed(n));
      for (const double tau : {0.7, 0.9})
        t.add(lithe::concat(name, ", top-two difference ", tau), {.rule = {.kind = lithe::exit_confidence::softmax_diff, .thresholds = {tau}}});
    };
  };
  measure(train_trunk(d, base, plan, "mixed", ctx), each_depth("mixed"));
  const pronouncer trunk = train_trunk(d, base, plan, "aligned", ctx);
  measure(trunk, [&](table& t) {
    each_depth("aligned")(t);
    // Of the thresholds that leave early enough, those that were best for other words.
    std::vector<double> best;
    for (const auto& point : searched(t.model(), d, 100, ctx))
      if (point.cost <= static_cast<double>(base.decoder_blocks) / 3) best = point.thresholds;
    if (!best.empty()) t.add("aligned, largest probability, searched", {.rule = {.kind = lithe::exit_confidence::max_prob, .thresholds = best}});
  });
  const auto with_exits = [&](const std::string& distribution, const training_plan& how, auto&& add) {
    model_config c = base;
    c.distribution = distribution;
    pronouncer p = trunk;
    set_distribution(p, distribution, c.decoder_blocks, c.features, lithe::rng_key{c.seed}.child(3));
    measure(train_with_exits(std::move(p), d, c, how, ctx), add);
  };
  with_exits("meta", plan, [](table& t) {
    for (const double tau : {0.7, 0.9})
      t.add(lithe::concat("learned confidence ", tau), {.rule = {.kind = lithe::exit_confidence::meta, .thresholds = {tau}}});
  });
  struct target {
    const char *distribution, *oracle;
    double penalty, sigma;
  };
  for (const target t :
       {target{"sequence", "correctness", 0.1, 0}, target{"sequence", "likelihood", 0.1, 0}, target{"multinomial", "correctness", 0.1, 0},
        target{"multinomial", "correctness", 0.1, 1}, target{"multinomial", "likelihood", 0.05, 0}, target{"multinomial", "likelihood", 0.05, 1},
        target{"geometric", "correctness", 0.1, 0}, target{"geometric", "correctness", 0.1, 1}, target{"geometric", "likelihood", 0.05, 0},
        target{"geometric", "likelihood", 0.05, 1}}) {
    training_plan how = plan;
    how.oracle = t.oracle;
    how.penalty = t.penalty;
    how.sigma = t.sigma;
    with_exits(t.distribution, how, [&](table& of) {
      const std::string name = lithe::concat(t.distribution, ", ", t.oracle, ", penalty ", t.penalty, ", sigma ", t.sigma);
      of.add(name, usual_manner(t.distribution));
      if (t.distribution == std::string("geometric"))
        of.add(name + ", threshold 0.9", {.rule = {.kind = lithe::exit_confidence::geometric, .thresholds = {0.9}}});
    });
  }
  return rows;
}

/// Means over seeds; `spread` is half of the distance between the best and the worst error rate.
struct summary_row : table_row {
  double spread = 0;
};
inline std::vector<summary_row> summarise(const std::vector<std::vector<table_row>>& seeds) {
  std::vector<summary_row> out;
  const auto n = static_cast<double>(seeds.size());
  for (std::size_t i = 0; i < seeds[0].size(); ++i) {
    summary_row s;
    s.name = seeds[0][i].name;
    s.share.resize(seeds[0][i].share.size());
    double least = 100, most = 0;
    for (const auto& rows : seeds) {
      const table_row& r = rows[i];
      least = std::min(least, r.error_rate);
      most = std::max(most, r.error_rate);
      s.error_rate += r.error_rate / n;
      s.mean_exit += r.mean_exit / n;
      s.kiloflops += r.kiloflops / n;
      for (std::size_t k = 0; k < s.share.size(); ++k) s.share[k] += r.share[k] / n;
      for (std::size_t k = 0; k < 2; ++k) s.speed_up[k] += r.speed_up[k] / n, s.bound[k] += r.bound[k] / n;
    }
    s.spread = (most - least) / 2;
    out.push_back(s);
  }
  return out;
}

/// What the paper found, and whether it is found here.
inline void print_findings(const std::vector<summary_row>& rows, index_t blocks) {
  const auto say = [](const char* what, bool seen, const std::string& where = "") {
    std::printf("%s: %s%s\n", what, seen ? "seen" : "not seen", where.c_str());
  };
  const auto row = [&](const std::string& name) -> const summary_row& {
    return *std::find_if(rows.begin(), rows.end(), [&](const summary_row& r) { return r.name == name; });
  };
  const auto mean_of = [&](const std::string& beginning) {
    double sum = 0, n = 0;
    for (const auto& r : rows)
      if (r.name.starts_with(beginning)) sum += r.error_rate, ++n;
    return sum / n;
  };
  const summary_row& full = rows[0];
  const summary_row* early = nullptr;  // the best that leaves after a third of the blocks
  const summary_row* slowest = nullptr;
  double least = 1e9;  // of the speed-up that the mean exit gives
  for (const auto& r : rows) {
    const bool third = !fixed_depth(r) && r.mean_exit <= static_cast<double>(blocks) / 3;
    if (third && (early == nullptr || r.error_rate < early->error_rate)) early = &r;
    for (std::size_t k = 0; k < 2; ++k)
      if (r.speed_up[k] < least * r.bound[k]) least = r.speed_up[k] / r.bound[k], slowest = &r;
  }
  say("the full baseline's error rate, within the seeds' spread, at a third of its blocks",
      early != nullptr && early->error_rate <= full.error_rate + std::max(full.spread, early->spread),
      early == nullptr ? "" : " (" + early->name + ")");
  say("a model of 1 block a point worse", row("baseline of 1 blocks").error_rate >= full.error_rate + 1);
  say("at least 0.8 of the speed-up that the mean exit gives, at batch 1 and 32", least >= 0.8,
      lithe::concat(" (least ", least, ": ", slowest->name, ")"));
  say("aligned training over mixed, on average of all depths", mean_of("aligned, all after") < mean_of("mixed, all after"));
  for (const char* target : {"correctness, penalty 0.1, sigma 0", "correctness, penalty 0.1, sigma 1", "likelihood, penalty 0.05, sigma 0",
                             "likelihood, penalty 0.05, sigma 1"}) {
    const summary_row &g = row(std::string("geometric, ") + target), &m = row(std::string("multinomial, ") + target);
    char both[80];
    std::snprintf(both, sizeof both, " (%.2f %% at %.2f blocks against %.2f %% at %.2f)", g.error_rate, g.mean_exit, m.error_rate, m.mean_exit);
    say((std::string("Poisson-binomial over multinomial, no deeper: ") + target).c_str(), g.error_rate < m.error_rate && g.mean_exit <= m.mean_exit,
        both);
  }
}

inline void compare(const dictionary& d, model_config base, const training_plan& plan, index_t seeds, const std::string& results,
                    const std::string& plot, const lithe::context& ctx) {
  std::vector<std::vector<table_row>> all;
  for (index_t s = 0; s < seeds; ++s, ++base.seed) {
    all.push_back(results.empty() ? std::vector<table_row>() : read_results(results, "compare", base.seed));
    if (all.back().empty()) {
      all.back() = compare_seed(d, base, plan, ctx);
      if (!results.empty()) write_results(results, "compare", base.seed, all.back());
    }
    lithe::require<lithe::io_error>(std::ranges::equal(all[0], all.back(), {}, &table_row::name, &table_row::name), results,
                                    ": expected the same rows of every seed, found others of seed ", base.seed);
    const auto rows = summarise(all);
    std::printf("\n%td seeds%53s %8s %8s %9s %9s %9s\n", s + 1, "", "PER %", "spread", "mean exit", "batch 1 x", "batch 32 x");
    for (const auto& r : rows)
      std::printf("%-60s %8.2f %8.2f %9.2f %9.2f %9.2f\n", r.name.c_str(), r.error_rate, r.spread, r.mean_exit, r.speed_up[0], r.speed_up[1]);
    print_findings(rows, base.decoder_blocks);
    if (!plot.empty()) draw(plot, {rows.begin(), rows.end()}, base.decoder_blocks);
  }
}
