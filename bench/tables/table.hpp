#pragma once

// What the table programs share: options, a progress line, and a table that is printed as text and written as JSON for run.py.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <lithe/core/context.hpp>
#include <lithe/core/parallel_executor.hpp>
#include <lithe/io/file.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../machine.hpp"

namespace tables {

/// How long a table may take: --quick some seconds, by default minutes, --full as long as it takes.
enum class length { quick, usual, full };

struct options {
  length run = length::usual;
  int workers = 0;  // 0 = all processors
  std::uint64_t seed = 1;
  std::string json;
  std::string model;  // a saved model to look at instead of one trained here; for tables about one

  /// One of three by the length of the run.
  template <class T>
  T pick(T quick, T usual, T full) const {
    return run == length::quick ? quick : run == length::usual ? usual : full;
  }
};

/// The middle one; puts them in another order.
inline double median_of(std::vector<double>& x) {
  const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// A line that says how far a table is; on a terminal it overwrites itself.
inline void progress(const std::string& what, double share) {
  static const double begin = now();
  const bool terminal = isatty(STDERR_FILENO) != 0;
  static double last = -1;
  const double t = now();
  if (share < 1 && t - last < (terminal ? 0.2 : 20)) return;
  last = t;
  std::fprintf(stderr, "%s%5.1f %%  %4.0f s  %-70s%s", terminal ? "\r" : "", 100 * share, t - begin, what.c_str(), terminal && share < 1 ? "" : "\n");
}

/// A curve or points over two columns of the table; one line for each value of `by`, if that names a column. `only`: the rows that begin with this.
struct figure {
  std::string title, x, y;
  std::string by{}, only{};
  bool log_x = false, log_y = false;
};

/// One table of results.
struct table {
  std::string title, source, question;  // source: the paper and where in it
  std::vector<std::string> columns;
  std::vector<figure> figures{};
  std::string finding{};  // one sentence: what came out
  bool shown = false;     // whether the paper's effect is seen here

  std::vector<std::vector<nlohmann::json>> rows{};

  void row(std::vector<nlohmann::json> cells) { rows.push_back(std::move(cells)); }

  void print() const {
    std::vector<std::vector<std::string>> text{columns};
    for (const auto& r : rows) {
      text.emplace_back();
      for (const auto& cell : r) text.back().push_back(shown_as(cell));
    }
    std::vector<std::size_t> width(columns.size());
    for (const auto& r : text)
      for (std::size_t c = 0; c < r.size(); ++c) width[c] = std::max(width[c], r[c].size());
    std::printf("\n%s\n%s\n\n", title.c_str(), question.c_str());
    for (std::size_t i = 0; i < text.size(); ++i) {
      for (std::size_t c = 0; c < text[i].size(); ++c) std::printf("| %*s ", static_cast<int>(width[c]), text[i][c].c_str());
      std::printf("|\n");
      if (i > 0) continue;
      for (const std::size_t w : width) std::printf("|%s", std::string(w + 2, '-').c_str());
      std::printf("|\n");
    }
    std::printf("\n%s\n", finding.c_str());
  }
  [[nodiscard]] nlohmann::json json() const {
    nlohmann::json j{{"title", title}, {"source", source},   {"question", question}, {"columns", columns},
                     {"rows", rows},   {"finding", finding}, {"shown", shown}};
    for (const figure& f : figures)
      j["figures"].push_back({{"title", f.title}, {"x", f.x}, {"y", f.y}, {"by", f.by}, {"only", f.only}, {"log_x", f.log_x}, {"log_y", f.log_y}});
    return j;
  }

  static std::string shown_as(const nlohmann::json& cell) {
    if (cell.is_string()) return cell.get<std::string>();
    if (cell.is_null()) return "-";
    if (!cell.is_number_float()) return cell.dump();
    const double x = cell.get<double>();
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, std::abs(x) >= 1000 ? "%.0f" : "%.4g", x);
    return buffer;
  }
};

/// The main function of a table program: reads the options, makes the table, prints and writes it. `of_a_model`: a table about a trained model.
inline int main_of(int argc, char** argv, const std::function<table(const options&, const lithe::context&)>& make, bool of_a_model = false) {
  options o;
  bool quick = false, full = false;
  CLI::App app{"Makes one of the tables of bench/tables."};
  app.add_flag("--quick", quick, "seconds instead of minutes: shows that it works, not what comes out");
  app.add_flag("--full", full, "as long as it takes")->excludes("--quick");
  app.add_option("--workers", o.workers, "threads; 0 = all processors")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--json", o.json, "file for the results");
  if (of_a_model) app.add_option("--model", o.model, "a saved model to look at instead of training one")->check(CLI::ExistingFile);
  CLI11_PARSE(app, argc, argv);
  o.run = quick ? length::quick : full ? length::full : length::usual;
  if (o.workers == 0) o.workers = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  try {
    const double begin = now();
    std::optional<lithe::atomic_file> file;  // opened first: a run of an hour is not to end at a folder that is not there
    if (!o.json.empty()) file.emplace(o.json);
    const lithe::parallel_executor exec(o.workers);
    lithe::workspace work(exec);
    const table t = make(o, {.exec = &exec, .work = &work});
    progress("done", 1);
    t.print();
    if (!file) return 0;
    nlohmann::json j = t.json();
    j["seconds"] = now() - begin;
    j["machine"] = machine::cpu_field("model name");
    j["workers"] = o.workers;
    j["seed"] = o.seed;
    j["flags"] = LITHE_BENCH_FLAGS;
    j["length"] = o.pick("quick", "usual", "full");
    const std::string text = j.dump(1) + "\n";
    file->write(text.data(), text.size());
    file->commit();
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "\n%s: %s\n", argv[0], e.what());
    return 1;
  }
}

}  // namespace tables
