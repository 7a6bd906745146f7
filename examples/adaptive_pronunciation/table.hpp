#pragma once

// Ways to choose the depth of each phone, beside each other: quality, depth, speed.

#include <array>
#include <cmath>

#include "speaker.hpp"

struct table_row {
  std::string name;
  double error_rate = 0, mean_exit = 0;       ///< in %, in blocks
  std::vector<double> share;                  ///< of the phones that leave after each block, in %
  double kiloflops = 0;                       ///< of the decoder for a phone, by the paper's formula
  std::array<double, 2> speed_up{}, bound{};  ///< at batch 1 and 32, over the whole stack; and what the mean exit would give
};

/// Whether all phones leave after the same block, so that nothing is chosen.
inline bool fixed_depth(const table_row& r) { return r.name.find("all after") != std::string::npos || r.name.starts_with("baseline"); }

/// Measures a pronouncer's ways to speak and prints a row for each.
class table {
 public:
  /// Speed-ups are over all blocks of `deepest`, which are timed in turn with each row, as is one block alone.
  table(const pronouncer& p, const dictionary& d, const lithe::context& ctx, const pronouncer& deepest)
      : p_(p), d_(d), ctx_(ctx), deepest_(deepest) {}
  static manner fixed(index_t n) { return {.rule = {.exits = {static_cast<std::int32_t>(n)}}}; }
  static void print_head() {
    std::printf("\n%-60s %8s %9s %8s %18s %18s  %s\n", "exits", "PER %", "mean exit", "kFLOP", "speed-up batch 1", "speed-up batch 32",
                "% of phones after each block");
  }

  [[nodiscard]] const pronouncer& model() const { return p_; }
  void add(const std::string& name, const manner& how) {
    const spoken all = speak(p_, d_.test, 32, how, ctx_);
    const double exit = all.mean_exit();
    table_row r{name, 100 * all.error_rate(), exit, std::vector<double>(static_cast<std::size_t>(p_.decoder.exits())), 0, {}, {}};
    count(all, how, r);
    const auto N = static_cast<double>(deepest_.decoder.exits());
    for (std::size_t i = 0; i < 2; ++i) {
      const auto [whole, block, asked] = times(how, i);
      r.speed_up[i] = whole / asked;
      r.bound[i] = whole / (whole - (N - exit) * block);
    }
    std::printf("%-60s %8.2f %9.2f %8.0f %8.2f (of %.2f) %8.2f (of %.2f) ", name.c_str(), r.error_rate, r.mean_exit, r.kiloflops, r.speed_up[0],
                r.bound[0], r.speed_up[1], r.bound[1]);
    for (const double x : r.share) std::printf(" %3.0f", x);
    std::printf("\n");
    std::fflush(stdout);
    rows.push_back(std::move(r));
  }

  std::vector<table_row> rows;

 private:
  /// Where phones left, and what that costs them; with drafts each step has an exit of its own and the formula does not apply.
  void count(const spoken& all, const manner& how, table_row& r) const {
    double phones = 0, flops = 0;
    for (std::size_t w = 0; w < all.exits.size(); ++w) {
      lithe::decoder_flops cost{.width = static_cast<double>(p_.decoder.features()),
                                .inner = static_cast<double>(std::get<1>(p_.decoder.stack.blocks[0].feed.inner.layers).up.weight.rows()),
                                .memory_length = static_cast<double>(d_.test[w].spelling.size()),
                                .classes = static_cast<double>(d_.phones.size())};
      cost.memory_width = cost.width;
      for (const auto n : all.exits[w]) {
        cost.length += 1;
        flops += cost.token(how.rule.kind, n, p_.decoder.exits());
        r.share[static_cast<std::size_t>(n - 1)] += 1;
        phones += 1;
      }
    }
    for (double& x : r.share) x *= 100 / phones;
    r.kiloflops = how.drafts > 0 ? 0 : flops / phones / 1000;
  }
  /// Least seconds of all of the deepest blocks, of one block alone, and of what was asked for; in turn, so that a machine that changes its speed
  /// changes all, and twice, because the first time fetches the weights into the caches.
  [[nodiscard]] std::array<double, 3> times(const manner& how, std::size_t i) const {
    const auto words = std::span<const entry>(d_.test).first(i == 0 ? 100 : 320);
    const index_t batch = i == 0 ? 1 : 32;
    std::array<double, 3> least{1e30, 1e30, 1e30};
    const auto time = [&](const pronouncer& p, const manner& m, double& seconds) {
      for (int again = 0; again < 2; ++again) seconds = std::min(seconds, speak(p, words, batch, m, ctx_).seconds);
    };
    for (int round = 0; round < 3; ++round) {
      time(deepest_, fixed(deepest_.decoder.exits()), least[0]);
      least[1] = std::min(least[1], block_seconds(deepest_, words, batch, ctx_));
      time(p_, how, least[2]);
    }
    return least;
  }

  const pronouncer& p_;
  const dictionary& d_;
  lithe::context ctx_;
  const pronouncer& deepest_;
};

/// The threshold of top-two difference that adds at most `delta` phone errors a phone, by Learn-then-Test on the tuning words.
inline double calibrated(const pronouncer& p, const dictionary& d, double delta, const lithe::context& ctx) {
  const auto grid = lithe::calibration_grid(0.05);
  const auto full = speak(p, d.tune, 32, table::fixed(p.decoder.exits()), ctx);
  matrix<double> losses(std::ssize(grid), std::ssize(d.tune));
  for (index_t g = 0; g < losses.rows(); ++g) {
    const auto early =
        speak(p, d.tune, 32, {.rule = {.kind = lithe::exit_confidence::softmax_diff, .thresholds = {grid[static_cast<std::size_t>(g)]}}}, ctx);
    lithe::excess_risk(early.word_errors, full.word_errors, {losses.data() + g * losses.cols(), early.word_errors.size()});
  }
  return lithe::calibrate(grid, losses, {.delta = delta}).threshold;
}

/// Thresholds of the largest probability, one for each block, by random search on the tuning words: the best of each stretch of a block's width.
inline std::vector<lithe::threshold_point> searched(const pronouncer& p, const dictionary& d, index_t draws, const lithe::context& ctx) {
  const index_t N = p.decoder.exits();
  return lithe::search_thresholds(N, draws, N - 1, 1, static_cast<double>(N), lithe::rng_key{5}, [&](lithe::threshold_point& point) {
    const auto s = speak(p, d.tune, 32, {.rule = {.kind = lithe::exit_confidence::max_prob, .thresholds = point.thresholds}}, ctx);
    point.quality = -s.error_rate();
    point.cost = s.mean_exit();
  });
}

/// Every way that the model offers; `search` draws for thresholds, `delta` of tolerated risk.
inline std::vector<table_row> print_table(const pronouncer& p, const dictionary& d, const model_config& c, bool with_heads, index_t search,
                                          double delta, const lithe::context& ctx) {
  using lithe::exit_confidence;
  const index_t N = p.decoder.exits();
  table::print_head();
  table t(p, d, ctx, p);
  const auto add = [&](const std::string& name, exit_confidence kind, std::vector<double> thresholds) {
    t.add(name, {.rule = {.kind = kind, .thresholds = std::move(thresholds)}});
  };
  for (index_t n = 1; n <= N; ++n) t.add(lithe::concat("all after block ", n), table::fixed(n));
  if (with_heads && c.distribution == "geometric")
    for (const double tau : {0.3, 0.5, 0.7, 0.9}) add(lithe::concat("geometric, threshold ", tau), exit_confidence::geometric, {tau});
  if (with_heads && c.distribution == "meta")
    for (const double tau : {0.7, 0.9, 0.97}) add(lithe::concat("learned confidence, threshold ", tau), exit_confidence::meta, {tau});
  if (with_heads && c.distribution == "multinomial") t.add("multinomial", {.rule = {.kind = exit_confidence::multinomial}});
  if (with_heads && c.distribution == "sequence") t.add("sequence", {});
  const std::pair<const char*, exit_confidence> kinds[] = {{"largest probability", exit_confidence::max_prob},
                                                           {"top-two difference", exit_confidence::softmax_diff},
                                                           {"entropy", exit_confidence::entropy},
                                                           {"state saturation", exit_confidence::state}};
  for (const auto& [name, kind] : kinds)
    for (const double tau : {0.7, 0.9, 0.97}) add(lithe::concat(name, ", threshold ", tau), kind, {tau});
  for (const double tau : {0.9, 0.97})
    t.add(lithe::concat("top-two difference, threshold ", tau, " falling"),
          {.rule = {.kind = exit_confidence::softmax_diff, .thresholds = {tau}, .decay = lithe::threshold_decay::paper, .longest = longest_answer}});
  t.add("top-two difference, threshold 0.9, whole batch",
        {.rule = {.kind = exit_confidence::softmax_diff, .thresholds = {0.9}, .whole_batch = true}});
  if (search > 0 && N > 1)
    for (const auto& point : searched(p, d, search, ctx))
      add(lithe::concat("largest probability, searched, ", std::round(point.cost * 10) / 10), exit_confidence::max_prob, point.thresholds);
  const double safe = calibrated(p, d, delta, ctx);
  add(lithe::concat("top-two difference, calibrated to ", delta, ": ", safe), exit_confidence::softmax_diff, {safe});
  if (N > 1)
    for (const index_t drafts : {3, 5}) t.add(lithe::concat("self-speculation, ", drafts, " drafts"), {.drafts = drafts});
  return t.rows;
}

/// Quality against depth, as the paper draws it: a point a row, a colour for what its name begins with; hollow where all phones leave after one
/// block.
inline void draw(const std::string& path, const std::vector<table_row>& rows, index_t exits) {
  std::ostringstream svg;
  double least = 100, most = 0;
  for (const auto& r : rows) least = std::min(least, r.error_rate), most = std::max(most, r.error_rate);
  const auto x = [&](double exit) { return 70 + (exit - 1) / static_cast<double>(std::max<index_t>(1, exits - 1)) * 480; };
  const auto y = [&](double rate) { return 320 - (rate - least) / std::max(0.1, most - least) * 270; };
  svg << "<svg xmlns='http://www.w3.org/2000/svg' width='640' height='380' font-family='sans-serif' font-size='11'>\n"
      << "<rect width='640' height='380' fill='white'/>\n"
      << "<text x='250' y='370'>mean exit (blocks)</text><text x='16' y='240' transform='rotate(-90 16 240)'>phone error rate, %</text>\n";
  for (index_t n = 1; n <= exits; ++n)
    svg << "<text x='" << x(static_cast<double>(n)) - 3 << "' y='345'>" << n << "</text><path d='M" << x(static_cast<double>(n))
        << " 50V330' stroke='#eee'/>\n";
  for (int i = 0; i <= 4; ++i)
    svg << "<text x='30' y='" << y(least + (most - least) * i / 4) + 4 << "'>" << std::round((least + (most - least) * i / 4) * 10) / 10
        << "</text>\n";
  constexpr std::array colours{"#777", "#1b6ca8", "#d1495b", "#3c8d53", "#8d5a97", "#e08e1b", "#5c6b73", "#111"};
  std::vector<std::string> kinds;
  for (const auto& r : rows) {
    const std::string kind = r.name.substr(0, r.name.find_first_of(" ,"));
    const auto at = std::find(kinds.begin(), kinds.end(), kind);
    const char* colour = colours[static_cast<std::size_t>(at - kinds.begin()) % colours.size()];
    if (at == kinds.end()) {
      kinds.push_back(kind);
      svg << "<text x='490' y='" << 40 + 14 * std::ssize(kinds) << "' fill='" << colour << "'>" << kind << "</text>\n";
    }
    svg << "<circle cx='" << x(r.mean_exit) << "' cy='" << y(r.error_rate) << "' r='4' stroke='" << colour << "' fill='"
        << (fixed_depth(r) ? "white" : colour) << "'><title>" << r.name << ": " << r.error_rate << " % at " << r.mean_exit << "</title></circle>\n";
  }
  svg << "</svg>\n";
  support::write_file(path, svg.str());
}

/// The rows that a file of results has of a model and a seed, so that a long run goes on where it was stopped.
inline std::vector<table_row> read_results(const std::string& path, const std::string& model, std::uint64_t seed) {
  std::vector<table_row> rows;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const auto j = nlohmann::json::parse(line, nullptr, false);
    lithe::require<lithe::io_error>(j.is_object(), path, ": expected lines of JSON as --results writes them, found '", line, "'");
    if (j.at("model") != model || j.at("seed") != seed) continue;
    table_row r{.name = j.at("exits"),
                .error_rate = j.at("phone_error_rate"),
                .mean_exit = j.at("mean_exit"),
                .share = j.at("share"),
                .kiloflops = j.at("kiloflops")};
    j.at("speed_up").get_to(r.speed_up);
    j.at("bound").get_to(r.bound);
    rows.push_back(std::move(r));
  }
  return rows;
}
inline void write_results(const std::string& path, const std::string& model, std::uint64_t seed, const std::vector<table_row>& rows) {
  std::ofstream out(path, std::ios::app);
  lithe::require<lithe::io_error>(out.good(), path, ": cannot be written");
  for (const auto& r : rows)
    out << nlohmann::json{{"model", model},           {"seed", seed},     {"exits", r.name},          {"phone_error_rate", r.error_rate},
                          {"mean_exit", r.mean_exit}, {"share", r.share}, {"kiloflops", r.kiloflops}, {"speed_up", r.speed_up},
                          {"bound", r.bound}}
        << "\n";
}
