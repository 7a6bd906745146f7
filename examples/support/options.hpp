#pragma once

// What all programs ask on their command line, and how they begin and end.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <lithe/lithe.hpp>
#include <new>

#include "signals.hpp"

namespace support {

/// A number from low to high, both included: CLI::Range that knows "nan" and signs of what has none, and says its
/// bounds as they were written.
template <class T>
CLI::Validator between(T low, T high, std::string range = "") {
  if (range.empty()) range = lithe::concat(low, " to ", high);
  return CLI::Validator(
      [low, high, range](std::string& text) {
        T value{};
        const bool signed_text = std::is_unsigned_v<T> && text.starts_with('-');
        const bool fits = !signed_text && CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
        return fits ? std::string() : "expected " + range + ", got " + text;
      },
      range);
}
/// One of these names.
inline CLI::Validator one_of(std::vector<std::string> names) { return CLI::IsMember(std::move(names)); }

/// --seed, the same in all programs.
inline CLI::Option* add_seed(CLI::App& app, std::uint64_t& seed, const std::string& what) {
  return app.add_option("--seed", seed, what)
      ->check(between<std::uint64_t>(0, std::numeric_limits<std::uint64_t>::max(), "0 or more"))
      ->capture_default_str();
}
/// --workers, the same in all programs.
inline CLI::Option* add_workers(CLI::App& app, int& workers) {
  return app.add_option("--workers", workers, "threads; 0 = one for each processor that the program may use")
      ->check(between(0, 256))
      ->capture_default_str();
}
/// What that number means.
inline lithe::parallel_executor make_executor(int workers) {
  if (workers == 0) return lithe::parallel_executor();
  return lithe::parallel_executor(workers);
}

/// A path or a word as a shell takes it.
inline std::string quoted(const std::string& word) {
  const bool plain =
      !word.empty() &&
      word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+,/=:@%") == word.npos;
  if (plain) return word;
  std::string out = "'";
  for (const char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}
/// Another of these programs as a shell finds it from here: beside the one that runs, as the build puts it, or by its
/// name alone.
inline std::string sibling(const char* argv0, const std::string& name) {
  std::error_code ignored;
  const std::filesystem::path self(argv0);
  for (const auto& path : {self.parent_path() / ".." / name / name, self.parent_path() / name})
    if (self.has_parent_path() && std::filesystem::exists(path, ignored))
      return quoted("./" / std::filesystem::proximate(std::filesystem::weakly_canonical(path), ignored));
  return name;
}

/// Reads the command line, then runs the body, whose result is the exit status; an error is one sentence and status 1.
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, Body&& body) {
  const std::string name = std::filesystem::path(argv[0]).filename().string();
  CLI11_PARSE(app, argc, argv);
  try {
    return body();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s: not enough memory for what was asked for\n", name.c_str());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", name.c_str(), e.what());
  }
  return 1;
}

}  // namespace support
