// Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>

#include "pronouncer.hpp"

#if !defined(DEFAULT_DICTIONARY)
#define DEFAULT_DICTIONARY "examples/data/g2p_cmudict.tsv"
#endif

namespace {

struct run_config {
  std::string words = DEFAULT_DICTIONARY, save, load, results, plot, oracle = "correctness", mode = "aligned";
  std::vector<std::string> say;
  index_t epochs = 12, exit_epochs = 2, batch = 64, limit = 0, search = 40;
  double rate = 2e-3, penalty = 0.1, sigma = 0, alpha = 0.2, delta = 0.05;
  int workers = 0;
  bool detach = false, compare = false;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Epochs over the dictionary in an order of the seed's.
void train(trainer& t, const dictionary& d, index_t epochs, std::uint64_t seed, const run_config& r, const lithe::context& ctx, const char* what) {
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const auto words = r.limit > 0 ? std::min(d.train.size(), static_cast<std::size_t>(r.limit)) : d.train.size();
  std::vector<std::size_t> order(words);
  const double begin = now();
  for (index_t epoch = 0; epoch < epochs; ++epoch) {
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto key = lithe::rng_key{seed}.child(static_cast<std::uint64_t>(1000 + epoch));
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return lithe::philox(key, a) < lithe::philox(key, b); });
    double sum = 0, count = 0;
    for (std::size_t first = 0; first < words; first += static_cast<std::size_t>(t.config.batch)) {
      word_batch b;
      for (std::size_t i = first; i < std::min(words, first + static_cast<std::size_t>(t.config.batch)); ++i) b.add(d.train[order[i]]);
      t.train(b, seed, ctx);
      sum += t.loss;
      ++count;
      if (terminal) {
        std::printf("\r%s: step %td/%td, loss %.3f, %.0f s   ", what, t.step, t.steps, sum / count, now() - begin);
        std::fflush(stdout);
      }
    }
    std::printf("%s%s: epoch %td/%td, loss %.3f, %.0f s\n", terminal ? "\r" : "", what, epoch + 1, epochs, sum / count, now() - begin);
    std::fflush(stdout);
  }
}

index_t steps_of(const dictionary& d, index_t epochs, const run_config& r) {
  const auto words = r.limit > 0 ? std::min(static_cast<index_t>(d.train.size()), r.limit) : static_cast<index_t>(d.train.size());
  return epochs * ((words + r.batch - 1) / r.batch);
}

lithe::exit_target_config oracle(const run_config& r, const std::string& distribution) {
  return {.oracle = r.oracle == "likelihood" ? lithe::exit_oracle::likelihood : lithe::exit_oracle::correctness,
          .granularity = distribution == "sequence" ? lithe::exit_granularity::sequence : lithe::exit_granularity::token,
          .penalty = r.penalty,
          .sigma = r.sigma};
}

/// Aligned or mixed training first, then the exit loss too (arXiv 1910.10073, section 5).
pronouncer train_with_exits(pronouncer model, const dictionary& d, const model_config& c, const run_config& r, const lithe::context& ctx) {
  if (r.exit_epochs == 0) return model;
  training_config t{.batch = r.batch, .rate = r.rate / 4};
  t.exits.alpha = r.alpha;
  t.exits.detach = r.detach;
  t.exits.targets = oracle(r, c.distribution);
  trainer with_exits(std::move(model), t, steps_of(d, r.exit_epochs, r));
  train(with_exits, d, r.exit_epochs, c.seed + 77, r, ctx, lithe::concat(c.distribution, " exits, ", r.oracle).c_str());
  return std::move(with_exits.model);
}
pronouncer train_trunk(const dictionary& d, const model_config& c, const run_config& r, const std::string& mode, const lithe::context& ctx) {
  trainer trunk(make_pronouncer(c), {.mode = mode, .batch = r.batch, .rate = r.rate}, steps_of(d, r.epochs, r));
  train(trunk, d, r.epochs, c.seed, r, ctx, lithe::concat(mode, ", ", c.decoder_blocks, " blocks, seed ", c.seed).c_str());
  return std::move(trunk.model);
}

// ---- the table -------------------------------------------------------------------------------------------------------------------

struct table_row {
  std::string name;
  double error_rate, mean_exit, one, many, bound_one, bound_many;  ///< speed-ups over the whole stack, and what the time of a block alone would give
};

/// Times a strategy at batch 1 and 32 beside the whole stack and one block, and prints its row.
class table {
 public:
  table(const pronouncer& p, const dictionary& d, const lithe::context& ctx) : p_(p), d_(d), ctx_(ctx) {
    std::printf("\n%-34s %8s %9s %18s %18s\n", "exits", "PER %", "mean exit", "speed-up batch 1", "speed-up batch 32");
    for (index_t i = 0; i < 2; ++i) {
      const auto full = best_time(fixed(p.decoder.exits()), i), shallow = best_time(fixed(1), i);
      const auto N = static_cast<double>(p.decoder.exits());
      full_[i] = full;
      block_[i] = N > 1 ? std::max(0.0, (full - shallow) / (N - 1)) : full;
      rest_[i] = full - N * block_[i];
    }
  }
  static lithe::exit_rule fixed(index_t n) { return {.exits = {static_cast<std::int32_t>(n)}}; }

  void add(const std::string& name, const lithe::exit_rule& rule) {
    const spoken all = speak(p_, d_.test, 32, rule, ctx_);
    report(name, all, best_time(rule, 0), best_time(rule, 1));
  }
  void report(const std::string& name, const spoken& all, double one, double many) {
    const double N = static_cast<double>(p_.decoder.exits()), exit = all.mean_exit();
    const auto bound = [&](index_t i) { return (N * block_[i] + rest_[i]) / (exit * block_[i] + rest_[i]); };
    rows.push_back({name, 100 * all.error_rate(), exit, full_[0] / one, full_[1] / many, bound(0), bound(1)});
    const auto& r = rows.back();
    std::printf("%-34s %8.2f %9.2f %8.2f (of %.2f) %8.2f (of %.2f)\n", name.c_str(), r.error_rate, r.mean_exit, r.one, r.bound_one, r.many,
                r.bound_many);
    std::fflush(stdout);
  }
  [[nodiscard]] std::span<const entry> timed_words(index_t i) const { return std::span<const entry>(d_.test).first(i == 0 ? 100 : 320); }
  [[nodiscard]] double best_time(const lithe::exit_rule& rule, index_t i) const {
    double best = 1e30;
    for (int time = 0; time < 3; ++time) best = std::min(best, speak(p_, timed_words(i), i == 0 ? 1 : 32, rule, ctx_).seconds);
    return best;
  }

  std::vector<table_row> rows;

 private:
  const pronouncer& p_;
  const dictionary& d_;
  lithe::context ctx_;
  double full_[2], block_[2], rest_[2];
};

/// The threshold of top-two difference that adds at most `delta` phone errors a phone, by Learn-then-Test on the tuning words.
double calibrated(const pronouncer& p, const dictionary& d, double delta, const lithe::context& ctx) {
  const auto grid = lithe::calibration_grid(0.05);
  const auto full = speak(p, d.tune, 32, table::fixed(p.decoder.exits()), ctx);
  matrix<double> losses(static_cast<index_t>(grid.size()), static_cast<index_t>(d.tune.size()));
  for (index_t g = 0; g < losses.rows(); ++g) {
    const auto early = speak(p, d.tune, 32, {.kind = lithe::exit_confidence::softmax_diff, .thresholds = {grid[static_cast<std::size_t>(g)]}}, ctx);
    lithe::excess_risk(early.word_errors, full.word_errors, {losses.data() + g * losses.cols(), early.word_errors.size()});
  }
  return lithe::calibrate(grid, losses, {.delta = delta}).threshold;
}

/// Thresholds of the largest probability, one for each block, by random search on the tuning words: the best of each stretch of a block's width.
std::vector<lithe::threshold_point> searched(const pronouncer& p, const dictionary& d, index_t draws, const lithe::context& ctx) {
  const index_t N = p.decoder.exits();
  return lithe::search_thresholds(N, draws, N - 1, 1, static_cast<double>(N), lithe::rng_key{5}, [&](lithe::threshold_point& point) {
    const auto s = speak(p, d.tune, 32, {.kind = lithe::exit_confidence::max_prob, .thresholds = point.thresholds}, ctx);
    point.quality = -s.error_rate();
    point.cost = s.mean_exit();
  });
}

std::vector<table_row> print_table(const pronouncer& p, const dictionary& d, const model_config& c, const run_config& r, const lithe::context& ctx) {
  using lithe::exit_confidence;
  const index_t N = p.decoder.exits();
  table t(p, d, ctx);
  for (index_t n = 1; n <= N; ++n) t.add(lithe::concat("all after block ", n), table::fixed(n));
  if (c.distribution == "geometric" && r.exit_epochs > 0)
    for (const double tau : {0.3, 0.5, 0.7, 0.9})
      t.add(lithe::concat("geometric, threshold ", tau), {.kind = exit_confidence::geometric, .thresholds = {tau}});
  if (c.distribution == "multinomial" && r.exit_epochs > 0) t.add("multinomial", {.kind = exit_confidence::multinomial});
  if (c.distribution == "sequence" && r.exit_epochs > 0) t.add("sequence", {});
  const std::pair<const char*, exit_confidence> kinds[] = {{"largest probability", exit_confidence::max_prob},
                                                           {"top-two difference", exit_confidence::softmax_diff},
                                                           {"entropy", exit_confidence::entropy},
                                                           {"state saturation", exit_confidence::state}};
  for (const auto& [name, kind] : kinds)
    for (const double tau : {0.7, 0.9, 0.97}) t.add(lithe::concat(name, ", threshold ", tau), {.kind = kind, .thresholds = {tau}});
  t.add("the same (0.9), whole batch", {.kind = exit_confidence::softmax_diff, .thresholds = {0.9}, .whole_batch = true});
  if (r.search > 0 && N > 1)
    for (const auto& point : searched(p, d, r.search, ctx))
      t.add(lithe::concat("largest probability, searched, ", std::round(point.cost * 10) / 10),
            {.kind = exit_confidence::max_prob, .thresholds = point.thresholds});
  const double safe = calibrated(p, d, r.delta, ctx);
  t.add(lithe::concat("top-two, calibrated to ", r.delta, ": ", safe), {.kind = exit_confidence::softmax_diff, .thresholds = {safe}});
  for (const index_t drafts : {3, 5}) {
    const auto by_drafts = [&](index_t batch, std::span<const entry> words) {
      return speak(p, words, batch, ctx, [&](const auto& phones, const auto& decoder, const auto& m, auto prompts, const lithe::context& c2) {
        return lithe::generate_speculatively(phones, decoder, m, prompts, 1, drafts, longest_answer, end_phone, c2);
      });
    };
    const auto all = by_drafts(32, d.test);
    t.report(lithe::concat("self-speculation, ", drafts, " drafts"), all, by_drafts(1, t.timed_words(0)).seconds,
             by_drafts(32, t.timed_words(1)).seconds);
  }
  return t.rows;
}

/// Quality against depth, as the paper draws it: one point a row.
void draw(const std::string& path, const std::vector<table_row>& rows, index_t exits) {
  std::ofstream svg(path);
  lithe::require<lithe::io_error>(svg.good(), path, ": cannot be written");
  double least = 100, most = 0;
  for (const auto& r : rows) least = std::min(least, r.error_rate), most = std::max(most, r.error_rate);
  const auto x = [&](double exit) { return 70 + (exit - 1) / static_cast<double>(std::max<index_t>(1, exits - 1)) * 480; };
  const auto y = [&](double rate) { return 320 - (rate - least) / std::max(0.1, most - least) * 270; };
  svg << "<svg xmlns='http://www.w3.org/2000/svg' width='640' height='380' font-family='sans-serif' font-size='11'>\n"
      << "<text x='250' y='370'>mean exit (blocks)</text><text x='12' y='200' transform='rotate(-90 12 200)'>phone error rate, %</text>\n";
  for (index_t n = 1; n <= exits; ++n) svg << "<text x='" << x(static_cast<double>(n)) - 3 << "' y='345'>" << n << "</text>\n";
  for (int i = 0; i <= 4; ++i)
    svg << "<text x='30' y='" << y(least + (most - least) * i / 4) + 4 << "'>" << std::round((least + (most - least) * i / 4) * 10) / 10
        << "</text>\n";
  for (const auto& r : rows) {
    const bool fixed = r.name.starts_with("all after");
    svg << "<circle cx='" << x(r.mean_exit) << "' cy='" << y(r.error_rate) << "' r='4' fill='" << (fixed ? "#888" : "#06c") << "'><title>" << r.name
        << ": " << r.error_rate << " % at " << r.mean_exit << "</title></circle>\n";
  }
  svg << "</svg>\n";
}

void write_results(const std::string& path, const std::string& model, std::uint64_t seed, const std::vector<table_row>& rows) {
  std::ofstream out(path, std::ios::app);
  lithe::require<lithe::io_error>(out.good(), path, ": cannot be written");
  for (const auto& r : rows)
    out << nlohmann::json{{"model", model},           {"seed", seed},        {"exits", r.name},       {"phone_error_rate", r.error_rate},
                          {"mean_exit", r.mean_exit}, {"speed_up_1", r.one}, {"speed_up_32", r.many}, {"bound_1", r.bound_one},
                          {"bound_32", r.bound_many}}
        << "\n";
}

/// Says one word, each phone in the colour of its depth: green left early, red went to the top.
void say(const pronouncer& p, const dictionary& d, const std::string& word, const lithe::exit_rule& rule, const lithe::context& ctx) {
  entry e;
  e.word = word;
  for (char& ch : e.word) ch = static_cast<char>(std::tolower(static_cast<unsigned char>(ch)));
  lithe::require<lithe::config_error>(dictionary::spell(e.word, e.spelling), "--word: expected 1 to ", longest_word, " letters from a to z, got '",
                                      word, "'");
  const bool colour = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  const spoken s = speak(p, std::span<const entry>(&e, 1), 1, rule, ctx);
  std::printf("%s:", e.word.c_str());
  const auto N = static_cast<std::int32_t>(p.decoder.exits());
  constexpr int ramp[] = {46, 118, 190, 226, 214, 202, 196};
  for (std::size_t i = 0; i < s.phones[0].size(); ++i) {
    const auto n = s.exits[0][i];
    const char* phone = d.phones[static_cast<std::size_t>(s.phones[0][i])].c_str();
    if (colour)
      std::printf(" \033[38;5;%dm%s\033[0m\033[2m%d\033[0m", ramp[N > 1 ? (n - 1) * 6 / (N - 1) : 0], phone, n);
    else
      std::printf(" %s/%d", phone, n);
  }
  std::printf("   (block after which each phone left; %.2f of %d on average)\n", s.mean_exit(), N);
}

lithe::exit_rule rule_to_say(const model_config& c, const run_config& r) {
  using lithe::exit_confidence;
  if (r.exit_epochs > 0 && c.distribution == "geometric") return {.kind = exit_confidence::geometric, .thresholds = {0.5}};
  if (r.exit_epochs > 0 && c.distribution == "multinomial") return {.kind = exit_confidence::multinomial};
  if (r.exit_epochs > 0 && c.distribution == "sequence") return {};
  return {.kind = exit_confidence::softmax_diff, .thresholds = {0.9}};
}

/// The paper's table: fixed-depth baselines, aligned against mixed, and every distribution and target on the same trunk.
void compare(const dictionary& d, const model_config& base, const run_config& r, const lithe::context& ctx) {
  const auto row = [&](const std::string& name, const pronouncer& p, const lithe::exit_rule& rule) {
    const auto s = speak(p, d.test, 32, rule, ctx);
    std::printf("== %-44s seed %llu: PER %.2f %%, mean exit %.2f\n", name.c_str(), static_cast<unsigned long long>(base.seed), 100 * s.error_rate(),
                s.mean_exit());
    std::fflush(stdout);
    if (!r.results.empty()) write_results(r.results, name, base.seed, {{name, 100 * s.error_rate(), s.mean_exit(), 0, 0, 0, 0}});
  };
  for (const index_t depth : {index_t{1}, index_t{2}, index_t{3}, base.decoder_blocks}) {
    model_config c = base;
    c.decoder_blocks = depth;
    row(lithe::concat("baseline of ", depth, " blocks"), train_trunk(d, c, r, "top", ctx), table::fixed(depth));
  }
  const auto each_depth = [&](const std::string& name, const pronouncer& p) {
    for (index_t n = 1; n <= base.decoder_blocks; ++n) row(lithe::concat(name, ", all after block ", n), p, table::fixed(n));
  };
  each_depth("mixed", train_trunk(d, base, r, "mixed", ctx));
  const pronouncer trunk = train_trunk(d, base, r, "aligned", ctx);
  each_depth("aligned", trunk);
  struct target {
    const char *distribution, *oracle;
    double penalty, sigma;
  };
  for (const target t :
       {target{"sequence", "correctness", 0.1, 0}, target{"sequence", "likelihood", 0.1, 0}, target{"multinomial", "correctness", 0.1, 0},
        target{"geometric", "correctness", 0.1, 0}, target{"geometric", "correctness", 0.1, 1}, target{"geometric", "likelihood", 0.05, 0},
        target{"geometric", "likelihood", 0.05, 1}}) {
    model_config c = base;
    run_config with = r;
    c.distribution = t.distribution;
    with.oracle = t.oracle;
    with.penalty = t.penalty;
    with.sigma = t.sigma;
    pronouncer p = trunk;
    set_distribution(p, c.distribution, c.decoder_blocks, c.features, lithe::rng_key{c.seed}.child(3));
    p = train_with_exits(std::move(p), d, c, with, ctx);
    row(lithe::concat(t.distribution, ", ", t.oracle, ", penalty ", t.penalty, ", sigma ", t.sigma), p, rule_to_say(c, with));
  }
}

int run(model_config c, const run_config& r) {
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const dictionary d(r.words);
  if (!r.load.empty()) {
    const auto metadata = lithe::safetensors_file(r.load).metadata();
    const auto found = metadata.find("config");
    lithe::require<lithe::io_error>(found != metadata.end(), r.load, ": expected a model saved by adaptive_pronunciation, found no configuration");
    c = nlohmann::json::parse(found->second).get<model_config>();
  }
  c.phones = static_cast<index_t>(d.phones.size());
  if (r.compare) {
    compare(d, c, r, ctx);
    return 0;
  }
  pronouncer model = make_pronouncer(c);
  if (!r.load.empty())
    lithe::load_model(r.load, model);
  else
    model = train_with_exits(train_trunk(d, c, r, r.mode, ctx), d, c, r, ctx);
  if (!r.save.empty()) {
    lithe::state_writer file;
    file.metadata["config"] = nlohmann::json(c).dump();
    file.add_model(model);
    file.write(r.save);
  }
  lithe::prepack(model);
  for (const auto& word : r.say) say(model, d, word, rule_to_say(c, r), ctx);
  if (!r.say.empty()) return 0;
  const auto rows = print_table(model, d, c, r, ctx);
  std::printf("\n");
  for (const char* word : {"banana", "psychology", "rough", "transformer"}) say(model, d, word, rule_to_say(c, r), ctx);
  if (!r.results.empty()) write_results(r.results, r.mode + ", " + c.distribution, c.seed, rows);
  if (!r.plot.empty()) draw(r.plot, rows, c.decoder_blocks);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  model_config c;
  run_config r;
  CLI::App app{"Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone."};
  app.add_option("--words", r.words, "dictionary: word, tab, phones")->capture_default_str();
  app.add_option("--word", r.say, "says a word, with the depth of each phone, instead of the table");
  app.add_option("--training", r.mode)->check(CLI::IsMember({"aligned", "mixed", "top"}))->capture_default_str();
  app.add_option("--distribution", c.distribution)->check(CLI::IsMember({"geometric", "multinomial", "sequence"}))->capture_default_str();
  app.add_option("--oracle", r.oracle)->check(CLI::IsMember({"correctness", "likelihood"}))->capture_default_str();
  app.add_option("--penalty", r.penalty, "of each block in the oracle")->capture_default_str();
  app.add_option("--sigma", r.sigma, "smoothing of the oracle")->capture_default_str();
  app.add_option("--alpha", r.alpha, "weight of the exit loss")->capture_default_str();
  app.add_flag("--detach", r.detach, "the exit loss does not train the trunk");
  app.add_option("--classifiers", c.classifiers)->check(CLI::IsMember({"shared", "independent"}))->capture_default_str();
  app.add_option("--encoder-blocks", c.encoder_blocks)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--blocks", c.decoder_blocks, "of the decoder")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", c.features)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--heads", c.heads)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--hidden", c.hidden)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dropout", c.dropout)->capture_default_str();
  app.add_option("--seed", c.seed)->capture_default_str();
  app.add_option("--epochs", r.epochs)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--exit-epochs", r.exit_epochs, "after those, with the exit loss")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--batch", r.batch, "words a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--limit", r.limit, "words to train on; 0 = all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->capture_default_str();
  app.add_option("--search", r.search, "draws of the random search for thresholds; 0 = none")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--delta", r.delta, "tolerated risk of the calibrated threshold")->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  app.add_option("--save", r.save, "file for the model");
  app.add_option("--load", r.load, "a saved model instead of training");
  app.add_option("--results", r.results, "file that gets the table as lines of JSON");
  app.add_option("--plot", r.plot, "SVG file: quality against depth");
  app.add_flag("--compare", r.compare, "trains fixed-depth baselines, aligned, mixed and every target and distribution");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(c, r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "adaptive_pronunciation: %s\n", e.what());
    return 1;
  }
}
