#pragma once

#include "lithe/io/safetensors.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// The name without what tools add to it: `_orig_mod.` (torch.compile) and the wrappers of sharded and checkpointed
/// modules anywhere, `module.` (data-parallel training) and `base_model.model.` (adapters) at the front.
[[nodiscard]] inline std::string without_tools(std::string name) {
  for (const std::string_view tool : {"_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."})
    for (std::size_t at = 0; (at = name.find(tool, at)) != std::string::npos;) {
      if (at == 0 || name[at - 1] == '.')
        name.erase(at, tool.size());
      else
        at += tool.size();
    }
  for (bool again = true; again;) {
    again = false;
    for (const std::string_view tool : {"module.", "base_model.model."})
      if (name.starts_with(tool)) {
        name.erase(0, tool.size());
        again = true;
      }
  }
  return name;
}

/// Whether a tensor belongs to attention to another sequence, by the names of published encoder-decoders.
[[nodiscard]] inline bool is_cross_attention(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  return has("crossattention") || has("cross_attention") || has("cross_attn") || has("encoder_attn") ||
         has("encdecattention");
}

}  // namespace detail

/// The tensors of a published checkpoint, named without what tools add, and which of them an importer took. What it
/// does not take would change the result if it were passed over, so it is an error unless the importer leaves it aside
/// by name. Names are asked for with or without what tools add. Throws io_error that names the file and, as the file
/// spells them, the tensors.
class published_tensors {
 public:
  /// Those of an open file, of which none was taken yet. Throws io_error for two tensors of one name without what tools add.
  explicit published_tensors(const safetensors_file& file) : file_(&file) {
    for (const std::string& stored : file.names()) {
      const auto [at, added] = stored_.emplace(detail::without_tools(stored), stored);
      require<io_error>(added, file.path().string(), ": tensors ", detail::quoted(at->second), " and ",
                        detail::quoted(stored), ": expected one of them, for both are ", detail::quoted(at->first),
                        " without what tools add");
    }
  }

  /// The file that they stand in.
  [[nodiscard]] const safetensors_file& file() const { return *file_; }
  /// Names without what tools add, each with the file's own.
  [[nodiscard]] const std::map<std::string, std::string>& names() const { return stored_; }
  /// Whether there is a tensor of this name.
  [[nodiscard]] bool contains(const std::string& name) const { return stored_.contains(detail::without_tools(name)); }
  /// The file's own spelling; of a tensor that is not there the name itself.
  [[nodiscard]] const std::string& stored(const std::string& name) const {
    const auto at = stored_.find(detail::without_tools(name));
    return at == stored_.end() ? name : at->second;
  }
  /// "file: tensor 'name'", where sentences begin.
  [[nodiscard]] std::string who(const std::string& name) const {
    return concat(file_->path().string(), ": tensor ", detail::quoted(stored(name)));
  }

  /// Takes a tensor, which must be there with this shape and T's kind of number; see `safetensors_file::expect`.
  template <tensor_number T>
  void expect(const std::string& name, const std::vector<index_t>& shape, const char* hint = "") {
    file_->expect<T>(stored(name), shape, hint);
    take(name);
  }
  /// Takes a tensor of any shape with at most two dimensions, a vector as one row. rows, cols: 0 for any.
  template <std::floating_point S>
  [[nodiscard]] matrix<S> read_matrix(const std::string& name, index_t rows, index_t cols) {
    const tensor_info& i = file_->info(stored(name));
    require<io_error>(is_floating(i.type), who(name), ": expected floating-point numbers, found ", i.type_name);
    require<io_error>(i.shape.size() <= 2, who(name), ": expected a matrix, found shape ", to_text(i.shape));
    require<io_error>((rows == 0 || i.rows() == rows) && (cols == 0 || i.cols() == cols), who(name),
                      ": expected shape ", to_text(rows, cols), " (0: any), found ", to_text(i.rows(), i.cols()));
    take(name);
    return file_->read_matrix<S>(stored(name));
  }
  /// Marks a tensor as taken.
  void take(const std::string& name) { taken_.insert(detail::without_tools(name)); }

  /// Leaves aside what is below `scope`, not taken, and harmless by its name: harmless(name behind the scope).
  template <class F>
  void leave_aside(const std::string& scope, F&& harmless) {
    for_rest(scope, [&](const std::string& name, const std::string& below) {
      if (harmless(below)) aside_.insert(name);
    });
  }
  /// What was left aside, as the file spells it.
  void report(std::vector<std::string>* left_aside) const {
    if (left_aside == nullptr) return;
    left_aside->clear();
    for (const std::string& name : aside_) left_aside->push_back(stored(name));
  }

  /// Throws io_error that names the tensors below `scope` that were neither taken nor left aside, cross attention
  /// first: it says what the file is.
  void require_all_taken(const std::string& scope) const {
    std::vector<std::string> rest;
    for_rest(scope, [&](const std::string& name, const std::string&) { rest.push_back(stored(name)); });
    std::stable_partition(rest.begin(), rest.end(), detail::is_cross_attention);
    require<io_error>(rest.empty(), file_->path().string(), ": ", list(rest),
                      ": expected no tensor of this name; to pass it over would change the result");
  }

  /// "tensor 'a'", "tensors 'a', 'b', 'c', 'd' and 8 more".
  [[nodiscard]] static std::string list(const std::vector<std::string>& names) {
    constexpr std::size_t most = 4;
    std::string text = names.size() == 1 ? "tensor " : "tensors ";
    for (std::size_t i = 0; i < std::min(names.size(), most); ++i)
      text += (i == 0 ? "" : ", ") + detail::quoted(names[i]);
    return names.size() > most ? concat(text, " and ", names.size() - most, " more") : text;
  }

 private:
  template <class F>
  void for_rest(const std::string& scope, F&& f) const {
    const std::string below = detail::without_tools(scope);
    for (auto at = stored_.lower_bound(below); at != stored_.end() && at->first.starts_with(below); ++at)
      if (!taken_.contains(at->first) && !aside_.contains(at->first)) f(at->first, at->first.substr(below.size()));
  }

  const safetensors_file* file_;
  std::map<std::string, std::string> stored_;
  std::set<std::string> taken_, aside_;
};

}  // namespace lithe::inline LITHE_ABI
