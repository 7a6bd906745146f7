#pragma once

// What the table programs share: options, a progress line, and a table that is printed as text and written as JSON for run.py.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../../examples/support/files.hpp"
#include "../../examples/support/options.hpp"
#include "../../examples/support/terminal.hpp"
#include "../machine.hpp"

namespace tables {

using support::now;

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

/// The line of progress of the one table that a program makes.
inline support::progress& progress_line() {
  static support::progress line("percent", 100, 0, stderr);
  return line;
}
/// What ends a table when Ctrl-C asked for it.
struct stopped {};
/// Says how far a table is. Throws `stopped` once the program was asked to end.
inline void progress(const std::string& what, double share) {
  if (support::stop_asked()) throw stopped{};
  progress_line().show(static_cast<std::int64_t>(100 * share), {what});
}

/// A number as a table or a sentence has it.
inline std::string number(double x) { return support::format(std::abs(x) >= 1000 ? "%.0f" : "%.4g", x); }
/// Words and numbers, as lithe::concat, with so many digits as can be read.
template <class... T>
std::string sentence(const T&... parts) {
  const auto readable = []<class P>(const P& part) {
    if constexpr (std::is_floating_point_v<P>)
      return number(part);
    else
      return lithe::concat(part);
  };
  return (readable(parts) + ...);
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
  std::string finding{};               // one sentence: what came out
  bool shown = false;                  // whether the paper's effect is seen here
  std::vector<std::size_t> against{};  // the rows that go against it
  std::int64_t skipped = 0;            // steps of training whose loss or gradient was not finite

  std::vector<std::vector<nlohmann::json>> rows{};

  void row(std::vector<nlohmann::json> cells) { rows.push_back(std::move(cells)); }
  void last_row_is_against() { against.push_back(rows.size() - 1); }

  [[nodiscard]] std::string verdict(length run) const {
    if (run == length::quick) return "A quick run: it shows that the program works, not what comes out.";
    const std::string rows_against = against.empty() ? ""
                                                     : lithe::concat("; ", against.size(), " of ", rows.size(),
                                                                     " rows, which are marked, go against it");
    const char* seen = !shown ? "not seen at this size" : against.empty() ? "seen here" : "seen in part";
    return lithe::concat(
        "The effect of the paper is ", seen, rows_against, ".",
        skipped == 0 ? "" : lithe::concat(" Steps skipped because they were not finite: ", skipped, "."));
  }
  /// Throws state_error unless all numbers are finite.
  void check() const {
    for (const auto& r : rows)
      for (std::size_t c = 0; c < r.size(); ++c)
        lithe::require<lithe::state_error>(!r[c].is_number_float() || std::isfinite(r[c].get<double>()),
                                           "expected finite numbers, got '", columns[c], "' = ", shown_as(r[c]),
                                           " in the row of ", shown_as(r[0]));
  }

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
      const bool marked = i > 0 && std::find(against.begin(), against.end(), i - 1) != against.end();
      std::printf(marked ? "| *\n" : "|\n");
      if (i > 0) continue;
      for (const std::size_t w : width) std::printf("|%s", std::string(w + 2, '-').c_str());
      std::printf("|\n");
    }
  }
  [[nodiscard]] nlohmann::json json() const {
    nlohmann::json j{{"title", title},     {"source", source},   {"question", question},
                     {"columns", columns}, {"rows", rows},       {"finding", finding},
                     {"shown", shown},     {"against", against}, {"skipped_steps", skipped}};
    for (const figure& f : figures)
      j["figures"].push_back({{"title", f.title}, {"x", f.x}, {"y", f.y}, {"by", f.by}, {"only", f.only}, {"log_x", f.log_x}, {"log_y", f.log_y}});
    return j;
  }

  static std::string shown_as(const nlohmann::json& cell) {
    if (cell.is_string()) return cell.get<std::string>();
    if (cell.is_null()) return "-";
    if (!cell.is_number_float()) return cell.dump();
    return number(cell.get<double>());
  }
};

/// The main function of a table program: reads the options, makes the table, prints and writes it. `of_a_model`: a table about a trained model.
inline int main_of(int argc, char** argv,
                   const std::function<void(const options&, const lithe::context&, table&)>& make,
                   bool of_a_model = false) {
  options o;
  bool quick = false, full = false;
  CLI::App app{"Makes one of the tables of bench/tables.", std::filesystem::path(argv[0]).filename().string()};
  app.add_flag("--quick", quick, "seconds instead of minutes: shows that it works, not what comes out");
  app.add_flag("--full", full, "as long as it takes")->excludes("--quick");
  support::add_workers(app, o.workers);
  support::add_seed(app, o.seed, "what all random numbers are drawn from");
  app.add_option("--json", o.json, "file for the results");
  if (of_a_model) app.add_option("--model", o.model, "a saved model to look at instead of training one")->check(CLI::ExistingFile);
  return support::run_program(app, argc, argv, [&] {
    o.run = quick ? length::quick : full ? length::full : length::usual;
    support::outputs files;
    files.reads(o.model);
    files.add("--json", o.json);
    support::catch_signals();
    const double begin = now();
    const lithe::parallel_executor exec = support::make_executor(o.workers);
    o.workers = static_cast<int>(exec.workers());
    lithe::workspace work(exec);
    table t;
    try {
      make(o, {.exec = &exec, .work = &work}, t);
      t.check();
    } catch (const stopped&) {
      progress_line().end();
      if (!t.rows.empty()) t.print();
      std::fprintf(stderr, "stopped with %zu rows; nothing was written\n", t.rows.size());
      return support::stop_status();
    } catch (...) {
      progress_line().end();
      throw;
    }
    progress_line().show(100);
    t.print();
    std::printf("\n%s\n%s\n", t.finding.c_str(), t.verdict(o.run).c_str());
    if (o.json.empty()) return 0;
    nlohmann::json j = t.json();
    j["verdict"] = t.verdict(o.run);
    j["seconds"] = now() - begin;
    j["machine"] = machine::cpu_field("model name");
    j["workers"] = o.workers;
    j["seed"] = o.seed;
    j["flags"] = LITHE_BENCH_FLAGS;
    j["length"] = o.pick("quick", "usual", "full");
    support::write_file(o.json, j.dump(1) + "\n");
    return 0;
  });
}

}  // namespace tables
