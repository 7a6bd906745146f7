#pragma once

// Files of programs: those that come with them, those that they read, and those that they will write.

#include <filesystem>
#include <fstream>
#include <lithe/io/state.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#if !defined(EXAMPLE_DATA)
#define EXAMPLE_DATA "examples/data"
#endif

namespace support {

/// A path that was given, or the file of that name that comes with the examples.
inline std::string given_or_bundled(const std::string& given, const char* name) {
  return given.empty() ? EXAMPLE_DATA "/" + std::string(name) : given;
}

/// All bytes of a file.
inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  lithe::require<lithe::io_error>(file.good() && !std::filesystem::is_directory(path), path, ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A text file in place of an older one, whole or not at all.
inline void write_file(const std::string& path, const std::string& text) {
  lithe::atomic_file file(path);
  file.write(text.data(), text.size());
  file.commit();
}

/// Which program saved a model with this metadata; empty if none of Lithe's. Version 0.1 did not write its name: then
/// its settings tell.
inline std::string writer_of(const lithe::metadata_map& metadata) {
  if (const auto named = metadata.find("program"); named != metadata.end()) return named->second;
  const auto found = metadata.find("config");
  const auto config = nlohmann::json::parse(found == metadata.end() ? "" : found->second, nullptr, false);
  const auto is = [&](const char* key) { return config.is_object() && config.contains(key); };
  if (is("memory_at"))
    return metadata.contains("exits")       ? "train_exits"
           : metadata.contains("key_width") ? "compress_attention"
                                            : "train_language_model";
  return is("head_width")        ? "long_context"
         : is("blocks_per_exit") ? "all_together"
         : is("encoder_blocks")  ? "adaptive_pronunciation"
                                 : "";
}

/// The metadata of a model that one of these programs saved. Throws io_error that names the file, who saved it, and
/// what was expected.
inline lithe::metadata_map read_saved(const std::string& path, std::initializer_list<const char*> programs) {
  std::string expected;
  for (const char* program : programs) expected += (expected.empty() ? "" : " or ") + std::string(program);
  lithe::require<lithe::io_error>(std::filesystem::exists(path), path, ": expected a model saved by ", expected,
                                  ", found no such file");
  lithe::metadata_map metadata;
  try {
    metadata = lithe::safetensors_file(path).metadata();
  } catch (const lithe::io_error& e) {
    throw lithe::io_error(
        lithe::concat(path, ": expected a model saved by ", expected, ", found another file (", e.what(), ")"));
  }
  const std::string writer = writer_of(metadata);
  lithe::require<lithe::io_error>(std::find(programs.begin(), programs.end(), writer) != programs.end(), path,
                                  ": expected a model saved by ", expected, ", found ",
                                  writer.empty() ? "a file of none of these programs" : "one saved by " + writer);
  return metadata;
}

/// The settings under a key of a saved model's metadata.
template <class Config>
Config read_settings(const std::string& path, const lithe::metadata_map& metadata, const char* key) {
  const auto found = metadata.find(key);
  lithe::require<lithe::io_error>(found != metadata.end(), path, ": expected settings under '", key, "', found none");
  try {
    return nlohmann::json::parse(found->second).get<Config>();
  } catch (const nlohmann::json::exception& e) {
    throw lithe::io_error(lithe::concat(path, ": expected other settings under '", key, "': ", e.what()));
  }
}

/// The files that a program will write, each tried before any work is done: they can be written, and none of them is
/// another one or is read.
class outputs {
 public:
  /// What the program reads must not be written over.
  void reads(const std::string& path) {
    if (!path.empty()) inputs_.push_back(std::filesystem::weakly_canonical(path));
  }
  /// A file that will be replaced as a whole; an empty path: none. Throws io_error that names the option.
  void add(const std::string& option, const std::string& path) {
    if (path.empty()) return;
    claim(option, path);
    try {
      lithe::require_writable(path);
    } catch (const lithe::io_error& e) {
      throw lithe::io_error(option + ": " + e.what());
    }
  }
  /// The same for a model, which does not replace what is no model of these programs.
  void add_model(const std::string& option, const std::string& path) {
    add(option, path);
    std::error_code ignored;
    if (path.empty() || !std::filesystem::exists(path) || std::filesystem::file_size(path, ignored) == 0) return;
    std::string writer;
    try {
      writer = writer_of(lithe::safetensors_file(path).metadata());
    } catch (const lithe::io_error&) {
    }
    lithe::require<lithe::io_error>(!writer.empty(), option, ": ", path,
                                    ": holds no model of these programs and is not replaced");
  }
  /// A file that lines will be added to.
  void add_lines(const std::string& option, const std::string& path) {
    if (path.empty()) return;
    claim(option, path);
    const bool fresh = !std::filesystem::exists(path);
    const bool works = std::ofstream(path, std::ios::app).good();
    lithe::require<lithe::io_error>(works, option, ": ", path, ": cannot be written");
    if (fresh) std::filesystem::remove(path);
  }

 private:
  void claim(const std::string& option, const std::string& path) {
    const auto real = std::filesystem::weakly_canonical(path);
    for (const auto& input : inputs_)
      lithe::require<lithe::io_error>(input != real, option, ": ", path, ": is read by this run and is not replaced");
    for (const auto& [other, taken] : taken_)
      lithe::require<lithe::io_error>(taken != real, option, ": ", path, ": is written by ", other, " already");
    taken_.emplace_back(option, real);
  }

  std::vector<std::filesystem::path> inputs_;
  std::vector<std::pair<std::string, std::filesystem::path>> taken_;
};

/// A name in the current directory that is free: name.ext, name-2.ext, ..., so that a model that nobody named a place
/// for replaces none. `companion`: the file that goes with it, which must be free, too.
inline std::string free_name(
    const std::string& name,
    std::string (*companion)(const std::string&) = [](const std::string& own) { return own; }) {
  const std::filesystem::path path(name);
  std::string next = name;
  for (int n = 2; std::filesystem::exists(next) || std::filesystem::exists(companion(next)); ++n)
    next = lithe::concat(path.stem().string(), "-", n, path.extension().string());
  return next;
}

}  // namespace support
