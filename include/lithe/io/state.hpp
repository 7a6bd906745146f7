#pragma once

#include "lithe/io/safetensors.hpp"
#include "lithe/layers/parameters.hpp"

// One safetensors file holds a model, and beside it whatever resuming its training needs. The model's tensors (parameters and state,
// a shared table once) bear the names of the walk; those of training (moments, counters) stand under "training.". So a saved training run
// is a saved model, too. Metadata: `lithe.format`, and what the caller adds, by custom `config`, the JSON the model is built from.

namespace lithe::inline LITHE_ABI {

inline constexpr const char* state_format = "1";  ///< what `lithe.format` says
inline constexpr const char* training_prefix = "training.";

namespace detail {

struct any_visitor {
  template <class T>
  void operator()(const std::string&, T&&) const {}
};
/// An optimiser, a schedule: t.visit_state(f) calls f(name, x) for all its tensors, numbers and nested states, members
/// that live on. The f of a `state_reader` also answers f.contains(name), and runs f.then(action) when it loads: what a
/// state holds may depend on what the file holds.
template <class T>
concept visits_state = requires(T& t) {
  t.visit_state(any_visitor{});
};

/// A value table: rows reached one at a time.
template <class T>
concept row_table = requires(const T& t, index_t i, std::span<typename T::scalar> row) {
  t.read_row(i, row);
  { t.rows() } -> std::convertible_to<index_t>;
  { t.cols() } -> std::convertible_to<index_t>;
};

/// "state.part", or the part of a state without a name.
inline std::string part_name(const std::string& state, const std::string& part) {
  return state.empty() ? part : state + "." + part;
}

}  // namespace detail

/// Collects a model and its training state and writes them as one file, atomically. Keeps no copy: all must live until
/// `write`.
///
/// A file is meant to be gone on from, so a tensor with NaN or infinity in it is refused (numbers by themselves, a best
/// loss of infinity, are not): the older file stays. `require_finite = false` writes whatever there is, to look into a
/// run that went wrong; readers take it as it is.
///
///     state_writer file;
///     file.metadata["config"] = config_json;
///     file.add_model(model);
///     file.add_training("optimizer", optimizer);
///     file.add_training("step", step);
///     file.write("run.safetensors");
class state_writer {
 public:
  metadata_map metadata;
  bool require_finite = true;  ///< false: NaN and infinity are written, too

  /// All tensors of a model by their names. Throws config_error for a name that begins with "training." or comes twice.
  template <class L>
  void add_model(const L& model) {
    for_each_tensor(
        [&](const std::string& name, role, const auto& t) {
          require<config_error>(!name.starts_with(training_prefix), "state_writer: expected no model tensor under '", training_prefix, "', got ",
                                detail::quoted(name));
          add(name, t);
        },
        model);
  }
  /// A matrix, a value table, a number (counters as I64, others as F64), or whatever has visit_state.
  template <class T>
  void add_training(const std::string& name, T& state) {
    add(training_prefix + name, state);
  }
  /// Writes all that was added; a failure throws io_error and leaves an older file as it was. So does a tensor that is
  /// not finite.
  void write(const std::filesystem::path& path) {
    for (const auto& check : checks_)
      if (require_finite) check(path.string());
    file_.metadata = metadata;
    file_.metadata["lithe.format"] = state_format;
    file_.write(path);
  }

 private:
  template <class T>
  void add(const std::string& name, T& t) {
    if constexpr (std::is_arithmetic_v<std::remove_const_t<T>>) {
      using N = std::conditional_t<std::is_integral_v<T>, std::int64_t, double>;
      file_.add_rows<N>(name, 1, 1, [value = static_cast<N>(t)](index_t, std::span<N> out) { out[0] = value; });
    } else if constexpr (detail::visits_state<T>) {
      t.visit_state([&](const std::string& part, auto&& x) { this->add(detail::part_name(name, part), x); });
    } else if constexpr (matrix_like<T>) {
      const auto v = view(t);
      using S = typename decltype(v)::scalar;
      file_.add<S>(name, v);
      check_rows<S>(name, v.rows(), v.cols(), [v](index_t i, auto) { return v.row(i); });
    } else {
      static_assert(detail::row_table<T>, "lithe: only matrices, value tables, numbers and types with visit_state can be saved.");
      using S = typename T::scalar;
      check_rows<S>(name, t.rows(), t.cols(), [&t](index_t i, std::span<S> out) {
        t.read_row(i, out);
        return static_cast<const S*>(out.data());
      });
      file_.add_rows<S>(name, t.rows(), t.cols(), [&t](index_t i, std::span<S> out) { t.read_row(i, out); });
    }
  }

  /// Has `write` refuse rows that are not finite: row(i, room) gives row i, in `room` or where it is.
  template <class S, class F>
  void check_rows(const std::string& name, index_t rows, index_t cols, F row) {
    if constexpr (std::floating_point<S>)
      checks_.emplace_back([=](const std::string& path) {
        std::vector<S> room(static_cast<std::size_t>(cols));
        index_t bad = 0;
        for (index_t i = 0; i < rows; ++i) {
          const S* const numbers = row(i, std::span<S>(room));
          bad += std::count_if(numbers, numbers + cols, [](S x) { return !std::isfinite(x); });
        }
        require<io_error>(bad == 0, path, ": tensor ", detail::quoted(name), ": expected finite numbers, got ", bad,
                          " of ", rows * cols, " that are NaN or infinite; nothing was written");
      });
  }

  safetensors_writer file_;
  std::vector<std::function<void(const std::string&)>> checks_;
};

/// Reads what `state_writer` wrote, all or nothing: each `add` checks that the file holds such a tensor, of that shape
/// and kind of number, and of a layer's permutation that it is one; `load` checks that the file holds nothing else;
/// only then it writes. (A disk that fails while `load` reads is the exception: the error then leaves the model partly
/// loaded.) Training tensors may be there unasked if none of them is asked for.
///
/// What a layer has in a later version beside what files of version 0.1 hold (role::added_state, role::key) stays as it
/// is if the file lacks it. Numbers are taken as they are, NaN too. A matrix of one row may be stored as [cols] or [1,
/// cols]. Throws io_error that names file, tensor, expected and found.
class state_reader {
 public:
  /// strict = false: the file may hold tensors that nobody asked for, and need not come from Lithe.
  explicit state_reader(const std::filesystem::path& path, bool strict = true) : file_(path), strict_(strict) {
    const auto format = file_.metadata().find("lithe.format");
    const std::string found = format != file_.metadata().end() ? format->second : "";
    require<io_error>(found == state_format || (found.empty() && !strict), path.string(), ": expected metadata lithe.format '", state_format,
                      "', found ", found.empty() ? "none" : detail::quoted(found));
  }

  state_reader(const state_reader&) = delete;  // what `load` will do refers to this reader
  state_reader& operator=(const state_reader&) = delete;

  /// What is read from.
  [[nodiscard]] const safetensors_file& file() const { return file_; }

  /// Has `load` write the tensors of a model. Throws io_error for one that is missing or does not fit, state_error for one that comes twice.
  template <class L>
  void add_model(L& model) {
    bool has_key = false;  // whether the file has the key visited last: if not, it is of version 0.1
    for_each_tensor(
        [&](const std::string& name, role kind, auto& t) {
          if (kind == role::key) has_key = file_.contains(name);
          if ((kind == role::key || kind == role::added_state) && !has_key) return;
          add(name, t);
          if (kind == role::permutation) check_permutations(name, t);
          if (kind == role::key) check_key(name);
        },
        model);
    writes_.emplace_back([&model] { refresh(model); });
  }
  /// What add_training wrote, under the same name; the state must have its shapes already.
  template <class T>
  void add_training(const std::string& name, T& state) {
    training_ = true;
    add(training_prefix + name, state);
  }

  /// Writes what was asked for. Throws io_error, before anything is written, if a strict file holds more.
  void load() {
    if (strict_)
      for (const std::string& name : file_.names())
        require<io_error>(asked_.contains(name) || (!training_ && name.starts_with(training_prefix)), file_.path().string(), ": tensor ",
                          detail::quoted(name), ": expected no tensor of this name, found shape ", to_text(file_.info(name).shape));
    for (const auto& write : writes_) write();
  }

 private:
  struct part_reader {
    state_reader& reader;
    const std::string& state;
    template <class T>
    void operator()(const std::string& part, T&& x) const {
      reader.add(detail::part_name(state, part), x);
    }
    [[nodiscard]] bool contains(const std::string& part) const {
      return reader.file_.contains(detail::part_name(state, part));
    }
    void then(std::function<void()> action) const { reader.writes_.emplace_back(std::move(action)); }
  };

  template <class T>
  void add(const std::string& name, T& t) {
    static_assert(!std::is_const_v<T>, "lithe: what is loaded must not be const.");
    if constexpr (std::is_arithmetic_v<T>) {
      using N = std::conditional_t<std::is_integral_v<T>, std::int64_t, double>;
      expect<N>(name, 1, 1);
      const N value = file_.template read<N>(name)[0];
      require<io_error>(!std::is_integral_v<T> || static_cast<N>(static_cast<T>(value)) == value, file_.path().string(), ": tensor ",
                        detail::quoted(name), ": expected a number that fits into ", sizeof(T), " bytes, found ", value);
      writes_.emplace_back([&t, value] { t = static_cast<T>(value); });
    } else if constexpr (detail::visits_state<T>) {
      t.visit_state(part_reader{*this, name});
    } else if constexpr (matrix_like<T>) {
      const auto v = view(t);
      expect<typename decltype(v)::scalar>(name, v.rows(), v.cols());
      writes_.emplace_back([this, name, v] { file_.read_rows(name, 0, v); });
    } else {
      static_assert(detail::row_table<T>, "lithe: only matrices, value tables, numbers and types with visit_state can be loaded.");
      expect<typename T::scalar>(name, t.rows(), t.cols());
      writes_.emplace_back([this, name, &t] { load_rows(name, t); });
    }
  }

  template <tensor_number N>
  void expect(const std::string& name, index_t rows, index_t cols) {
    const std::string who = concat(file_.path().string(), ": tensor ", detail::quoted(name));
    require<state_error>(asked_.insert(name).second, who, ": expected to be asked for once, was asked for twice");
    require<io_error>(file_.contains(name), who, ": expected shape ", to_text(rows, cols), ", found no tensor of that name");
    const tensor_info& info = file_.info(name);
    require<io_error>(info.shape.size() <= 2 && info.rows() == rows && info.cols() == cols, who, ": expected shape ", to_text(rows, cols), ", found ",
                      to_text(info.shape));
    require<io_error>(std::floating_point<N> ? is_floating(info.type) : info.type == dtype_of<N>, who, ": expected ",
                      std::floating_point<N> ? "floating-point numbers" : dtype_name(dtype_of<N>), ", found ", info.type_name);
  }

  /// Before anything is written: a layer's own `refresh` comes after it.
  template <class T>
  void check_permutations(const std::string& name, const T& t) const {
    if constexpr (matrix_like<T>) {
      using N = typename decltype(view(t))::scalar;
      if constexpr (std::integral<N>) {
        const auto numbers = file_.template read<N>(name);
        detail::check_permutations<io_error>(std::span<const N>(numbers), t.cols(), concat(file_.path().string(), ": tensor ", detail::quoted(name)));
      }
    }
  }

  void check_key(const std::string& name) const {
    for (const double piece : file_.read<double>(name))
      require<io_error>(piece >= 0 && piece < 65536 && piece == std::floor(piece), file_.path().string(), ": tensor ",
                        detail::quoted(name), ": expected whole numbers from 0 to 65535, found ", piece);
  }

  template <class T>
  void load_rows(const std::string& name, T& table) const {
    using S = typename T::scalar;
    const index_t cols = table.cols(), row_bytes = cols * static_cast<index_t>(sizeof(S));
    matrix<S> block(std::min(table.rows(), std::max<index_t>(static_cast<index_t>(detail::io_block) / row_bytes, 1)), cols);
    for (index_t first = 0; first < table.rows(); first += block.rows()) {
      const auto rows = view(block).slice_rows(0, std::min(block.rows(), table.rows() - first));
      file_.read_rows(name, first, rows);
      for (index_t i = 0; i < rows.rows(); ++i) table.write_row(first + i, std::span<const S>(rows.row(i), static_cast<std::size_t>(cols)));
    }
  }

  safetensors_file file_;
  bool strict_, training_ = false;
  std::set<std::string> asked_;
  std::vector<std::function<void()>> writes_;
};

/// Saves every tensor of a model, float as F32, double as F64. `metadata`: by custom {"config": the JSON to build it
/// from}. NaN and infinity are an io_error, and the older file stays, unless require_finite is false. See
/// `state_writer`.
template <class L>
void save_model(const std::filesystem::path& path, const L& model, metadata_map metadata = {},
                bool require_finite = true) {
  state_writer file;
  file.metadata = std::move(metadata);
  file.require_finite = require_finite;
  file.add_model(model);
  file.write(path);
}

/// Loads a model that was built with the file's configuration, all or nothing, and refreshes it. See `state_reader`.
template <class L>
void load_model(const std::filesystem::path& path, L& model, bool strict = true) {
  state_reader file(path, strict);
  file.add_model(model);
  file.load();
}

/// The strings saved with a model: read "config" first, build the model from it, then load it.
[[nodiscard]] inline metadata_map read_model_metadata(const std::filesystem::path& path) { return state_reader(path).file().metadata(); }

}  // namespace lithe::inline LITHE_ABI
