#pragma once

#include <functional>
#include <memory>

#include "lithe/io/safetensors_header.hpp"

namespace lithe::inline LITHE_ABI {

/// A safetensors file open for reading, or the files of a sharded one if the path ends in ".json" (`model.safetensors.index.json`).
///
/// Opening reads the headers alone and checks all they say; tensors are read when asked for, straight into their place when type
/// and layout agree. Reading is const and safe from several threads. Throws io_error that names file, tensor, expected and found.
class safetensors_file {
 public:
  /// Opens a file, or the shards of an index (".json"). Throws io_error for what cannot be read or contradicts itself.
  explicit safetensors_file(const std::filesystem::path& path) : path_(path) {
    if (path.extension() == ".json")
      open_index();
    else
      open_shard(path);
  }

  /// The file or index that was opened.
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  /// The strings beside the tensors; if shards disagree, the first one's.
  [[nodiscard]] const metadata_map& metadata() const { return metadata_; }
  /// Ascending.
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, where] : tensors_) all.push_back(name);
    return all;
  }
  /// Whether there is a tensor of this name.
  [[nodiscard]] bool contains(const std::string& name) const { return tensors_.contains(name); }
  /// Type, shape and place of a tensor; throws io_error if there is none of this name.
  [[nodiscard]] const tensor_info& info(const std::string& name) const { return *find(name).info; }

  /// All numbers of a tensor, row-major. T: double, float, int64, int32 or uint8. Numbers become floating-point with rounding;
  /// integers are read from integers that fit, else it is an io_error.
  template <tensor_number T>
  [[nodiscard]] std::vector<T> read(const std::string& name) const {
    const tensor_info& i = readable<T>(name);
    std::vector<T> out(static_cast<std::size_t>(i.size()));
    read_rows<T>(name, 0, {out.data(), i.rows(), i.cols()});
    return out;
  }
  /// The tensor as a matrix [info.rows() x info.cols()].
  template <tensor_number T>
  [[nodiscard]] matrix<T> read_matrix(const std::string& name) const {
    const tensor_info& i = readable<T>(name);
    matrix<T> out(i.rows(), i.cols());
    read_rows<T>(name, 0, out);
    return out;
  }
  /// Throws io_error unless there is a tensor of this name and shape whose numbers are of T's kind: floating-point or whole. `hint` goes behind the
  /// sentence that it is missing.
  template <tensor_number T>
  void expect(const std::string& name, const std::vector<index_t>& shape, const char* hint = "") const {
    require<io_error>(contains(name), who(name), ": expected shape ", to_text(shape), ", found no tensor of that name", hint);
    require<io_error>(info(name).shape == shape, who(name), ": expected shape ", to_text(shape), ", found ", to_text(info(name).shape));
    const tensor_info& i = readable<T>(name);
    require<io_error>(!std::floating_point<T> || is_floating(i.type), who(name), ": expected floating-point numbers, found ", i.type_name);
  }
  /// Into a matrix that has the tensor's shape.
  template <tensor_number T>
  void read(const std::string& name, matrix_view<T> out) const {
    const tensor_info& i = info(name);
    require<io_error>(out.rows() == i.rows() && out.cols() == i.cols(), who(name), ": expected shape ", to_text(out.rows(), out.cols()), ", found ",
                      to_text(i.shape));
    read_rows(name, 0, out);
  }
  /// The rows from `first` on into `out`, so that a table larger than memory to spare can pass in pieces.
  template <tensor_number T>
  void read_rows(const std::string& name, index_t first, matrix_view<T> out) const {
    const tensor_info& i = readable<T>(name);
    require<io_error>(out.cols() == i.cols() && first >= 0 && first <= i.rows() && out.rows() <= i.rows() - first, who(name), ": expected rows ",
                      first, " to ", first + out.rows(), " of ", out.cols(), " columns, found shape ", to_text(i.shape));
    const auto size = static_cast<index_t>(dtype_size(i.type));
    const input_file& file = find(name).shard->file;
    const std::uint64_t begin = i.offset + static_cast<std::uint64_t>(first * out.cols() * size);
    const index_t n = out.size();
    if (n == 0) return;
    if (i.type == dtype_of<T> && (out.stride() == out.cols() || out.rows() == 1)) {
      file.read_at(begin, out.data(), static_cast<std::size_t>(n * size));
      return;
    }
    const index_t block = std::min(n, static_cast<index_t>(detail::io_block) / size);
    std::vector<std::byte> bytes(static_cast<std::size_t>(block * size));
    for (index_t at = 0; at < n; at += block) {
      const index_t have = std::min(block, n - at);
      file.read_at(begin + static_cast<std::uint64_t>(at * size), bytes.data(), static_cast<std::size_t>(have * size));
      for (index_t done = 0; done < have;) {
        const index_t row = (at + done) / out.cols(), col = (at + done) % out.cols(), piece = std::min(out.cols() - col, have - done);
        const index_t fitted = detail::convert(i.type, bytes.data() + done * size, out.row(row) + col, piece);
        require<io_error>(fitted == piece, who(name), ": expected integers of ", sizeof(T), " bytes, found a larger one at row ", first + row,
                          ", column ", col + fitted);
        done += piece;
      }
    }
  }

 private:
  struct place {
    const detail::safetensors_shard* shard;
    const tensor_info* info;
  };

  [[nodiscard]] std::string who(const std::string& name) const { return concat(path_.string(), ": tensor ", detail::quoted(name)); }

  [[nodiscard]] const place& find(const std::string& name) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) throw io_error(concat(who(name), ": expected in the file, found no tensor of that name"));
    return it->second;
  }
  template <tensor_number T>
  [[nodiscard]] const tensor_info& readable(const std::string& name) const {
    const tensor_info& i = info(name);
    if (!detail::readable_as<T>(i.type))
      throw io_error(concat(who(name), ": expected ", std::floating_point<T> ? "numbers" : "integers", " that Lithe reads, found dtype ",
                            detail::quoted(i.type_name)));
    return i;
  }

  const detail::safetensors_shard& open_shard(const std::filesystem::path& path, const std::set<std::string>* wanted = nullptr) {
    const auto& shard = *shards_.emplace_back(std::make_unique<detail::safetensors_shard>(path));
    for (const auto& [name, info] : shard.tensors)
      if (wanted == nullptr || wanted->contains(name)) tensors_.emplace(name, place{&shard, &info});
    metadata_.insert(shard.metadata.begin(), shard.metadata.end());
    return shard;
  }

  /// {"metadata": ..., "weight_map": {tensor: file beside the index}}. The index decides which tensors there are.
  void open_index() {
    const std::string index = path_.string();
    std::string text;
    {
      const input_file file(path_);
      require<io_error>(file.size() <= detail::longest_header, index, ": expected an index of at most ", detail::longest_header, " bytes, found ",
                        file.size());
      text.resize(static_cast<std::size_t>(file.size()));
      file.read_at(0, text.data(), text.size());
    }
    const nlohmann::json json = detail::parse_json(text, index);
    require<io_error>(json.contains("weight_map") && json["weight_map"].is_object(), index, ": expected an object 'weight_map', found none");
    std::map<std::string, std::set<std::string>> wanted;  // by shard
    for (const auto& [name, shard] : json["weight_map"].items()) {
      require<io_error>(shard.is_string(), index, ": tensor ", detail::quoted(name), ": expected the name of a file, found a JSON ",
                        shard.type_name());
      const auto& file = shard.get_ref<const std::string&>();
      require<io_error>(!file.empty() && file != "." && file != ".." && file.find_first_of(std::string("/\\\0", 3)) == std::string::npos, index,
                        ": tensor ", detail::quoted(name), ": expected the name of a file in the index's own folder, found ", detail::quoted(file));
      wanted[file].insert(name);
    }
    for (const auto& [file, names] : wanted) {
      const auto& shard = open_shard(path_.parent_path() / file, &names);
      for (const std::string& name : names)
        require<io_error>(shard.tensors.contains(name), index, ": tensor ", detail::quoted(name), ": expected in ", detail::quoted(file),
                          ", found no such tensor there");
    }
  }

  std::filesystem::path path_;
  std::vector<std::unique_ptr<const detail::safetensors_shard>> shards_;
  std::map<std::string, place> tensors_;
  metadata_map metadata_;
};

/// Collects tensors and writes them as one safetensors file, atomically. It keeps no copy: what is added must live until `write`.
///
/// Each `add` takes the element type of the file: T's own, or BF16 for floating-point numbers (to nearest, ties to even). Throws
/// config_error for a name that comes twice, a shape that does not fit the data, or another element type.
class safetensors_writer {
 public:
  metadata_map metadata;

  /// A tensor of any shape, row-major.
  template <tensor_number T>
  void add(const std::string& name, std::vector<index_t> shape, std::span<const T> data, dtype as = dtype_of<T>) {
    require<config_error>(count(shape) == data.size(), "safetensors_writer: tensor ", detail::quoted(name), ": expected data of shape ",
                          to_text(shape), ", got ", data.size(), " elements");
    append<T>(name, std::move(shape), as, [data, as](atomic_file& out) { put(out, data, as); });
  }
  /// A matrix; one row is written with shape [cols].
  template <tensor_number T>
  void add(const std::string& name, matrix_view<const T> m, dtype as = dtype_of<T>) {
    append<T>(name, matrix_shape(m.rows(), m.cols()), as, [m, as](atomic_file& out) {
      const bool whole = m.stride() == m.cols();
      for (index_t i = 0; i < (whole ? std::min<index_t>(m.rows(), 1) : m.rows()); ++i)
        put(out, std::span<const T>(m.row(i), static_cast<std::size_t>(whole ? m.size() : m.cols())), as);
    });
  }
  /// A matrix that is asked for row by row: read_row(i, std::span<T> out) fills row i.
  template <tensor_number T>
  void add_rows(const std::string& name, index_t rows, index_t cols, std::function<void(index_t, std::span<T>)> read_row, dtype as = dtype_of<T>) {
    append<T>(name, matrix_shape(rows, cols), as, [=](atomic_file& out) {
      std::vector<T> row(static_cast<std::size_t>(cols));
      for (index_t i = 0; i < rows; ++i) {
        read_row(i, row);
        put(out, std::span<const T>(row), as);
      }
    });
  }

  /// Writes the file; a failure throws io_error and leaves an older file of that name untouched.
  void write(const std::filesystem::path& path) const {
    // Without gaps, every tensor is aligned to its elements only if the larger elements come first.
    std::vector<const entry*> order;
    for (const entry& e : entries_) order.push_back(&e);
    std::stable_sort(order.begin(), order.end(), [](const entry* a, const entry* b) { return dtype_size(a->type) > dtype_size(b->type); });
    std::string header = header_text(order, path.string());
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const std::uint64_t length = header.size();
    require<io_error>(length <= detail::longest_header, path.string(), ": expected a header of at most ", detail::longest_header, " bytes, found ",
                      length);
    atomic_file out(path);
    out.write(&length, 8);
    out.write(header.data(), header.size());
    for (const entry* e : order) e->write(out);
    out.commit();
  }

 private:
  struct entry {
    std::string name;
    dtype type;
    std::vector<index_t> shape;
    std::uint64_t bytes;
    std::function<void(atomic_file&)> write;
  };

  static std::vector<index_t> matrix_shape(index_t rows, index_t cols) {
    return rows == 1 ? std::vector<index_t>{cols} : std::vector<index_t>{rows, cols};
  }

  static std::uint64_t count(const std::vector<index_t>& shape) {
    std::uint64_t n = 1;
    for (const index_t d : shape) n *= static_cast<std::uint64_t>(d);
    return n;
  }

  template <tensor_number T>
  void append(const std::string& name, std::vector<index_t> shape, dtype as, std::function<void(atomic_file&)> write) {
    require<config_error>(as == dtype_of<T> || (std::floating_point<T> && as == dtype::bf16), "safetensors_writer: tensor ", detail::quoted(name),
                          ": expected to write ", dtype_name(dtype_of<T>), std::floating_point<T> ? " or BF16" : "", ", got ", dtype_name(as));
    require<config_error>(name != "__metadata__" && names_.insert(name).second, "safetensors_writer: expected a new name, got ",
                          detail::quoted(name));
    const std::uint64_t bytes = count(shape) * dtype_size(as);
    entries_.push_back({name, as, std::move(shape), bytes, std::move(write)});
  }

  template <tensor_number T>
  static void put(atomic_file& out, std::span<const T> data, [[maybe_unused]] dtype as) {
    if constexpr (std::floating_point<T>) {
      if (as == dtype::bf16) {
        for (const T x : data) {
          const std::uint16_t h = to_bf16(x);
          out.write(&h, sizeof(h));
        }
        return;
      }
    }
    out.write(data.data(), data.size_bytes());
  }

  [[nodiscard]] std::string header_text(const std::vector<const entry*>& order, const std::string& who) const {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata.empty()) header["__metadata__"] = metadata;
    std::uint64_t at = 0;
    for (const entry* e : order) {
      header.push_back({e->name, {{"dtype", dtype_name(e->type)}, {"shape", e->shape}, {"data_offsets", {at, at + e->bytes}}}});
      at += e->bytes;
    }
    try {
      return header.dump();
    } catch (const nlohmann::json::exception& e) {
      throw io_error(concat(who, ": expected names and metadata in UTF-8, found: ", e.what()));
    }
  }

  std::vector<entry> entries_;
  std::set<std::string> names_;
};

}  // namespace lithe::inline LITHE_ABI
