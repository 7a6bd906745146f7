#pragma once

// What all programs ask on their command line, and how they begin and end.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <lithe/lithe.hpp>
#include <new>
#include <nlohmann/json.hpp>

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
/// The option of a setting: --memory-at of memory_at. Null if the program has none.
inline const CLI::Option* option_of(const CLI::App& app, std::string setting) {
  std::replace(setting.begin(), setting.end(), '_', '-');
  return app.get_option_no_throw("--" + setting);
}
/// Settings (an object of JSON) that a file fixes: throws config_error that names the option if one that was given says
/// something else.
inline void refuse_contradictions(const CLI::App& app, const std::string& path, const nlohmann::json& asked,
                                  const nlohmann::json& found) {
  for (const auto& [key, value] : asked.items()) {
    const CLI::Option* option = option_of(app, key);
    lithe::require<lithe::config_error>(option == nullptr || option->count() == 0 || found.value(key, value) == value,
                                        option == nullptr ? "" : option->get_name(), ": expected ", found[key],
                                        " as in ", path, ", got ", value);
  }
}
/// Settings that a file has and the command line may change: those that were given, which it says, else the file's.
inline nlohmann::json merged(const CLI::App& app, const std::string& path, const nlohmann::json& asked,
                             const nlohmann::json& found) {
  nlohmann::json all = asked;
  for (auto& [key, value] : all.items()) {
    const CLI::Option* option = option_of(app, key);
    if (!found.contains(key) || found[key] == value) continue;
    if (option == nullptr || option->count() == 0)
      value = found[key];
    else
      std::printf("%s %s instead of %s in %s\n", option->get_name().c_str(), value.dump().c_str(),
                  found[key].dump().c_str(), path.c_str());
  }
  return all;
}

/// Another of these programs as a shell finds it from here: beside the one that runs, as the build puts it, or by its
/// name alone.
inline std::string sibling(const char* argv0, const std::string& name) {
  std::error_code ignored;
  const std::filesystem::path self(argv0);
  for (const auto& path : {self.parent_path() / ".." / name / name, self.parent_path() / name})
    if (self.has_parent_path() && std::filesystem::exists(path, ignored)) {
      const auto from_here = std::filesystem::proximate(std::filesystem::weakly_canonical(path), ignored);
      return quoted((from_here.has_parent_path() ? from_here : "." / from_here).string());
    }
  return name;
}

/// Reads the command line, then runs the body, whose result is the exit status; an error is one sentence and status 1.
template <class Body>
int run_program(CLI::App& app, int argc, char** argv, Body&& body) {
  const std::string name = std::filesystem::path(argv[0]).filename().string();
  app.name(name);
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
