#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>

#include "lithe/io/dtype.hpp"
#include "lithe/io/file.hpp"
#include "lithe/tensor/matrix_view.hpp"

// The safetensors format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header,
// little-endian; the header, a JSON object of name -> {dtype, shape, data_offsets} and `__metadata__`, strings to
// strings; the tensors' bytes, row-major, without gaps. What the format's own reader takes is taken (`__metadata__` of
// null, further keys beside the three, the types that Lithe cannot read), and what it refuses is refused; more
// strictly, as the format's text demands, a header begins with { and has no key twice.

namespace lithe::inline LITHE_ABI {

/// The strings that a file carries beside its tensors.
using metadata_map = std::map<std::string, std::string>;

/// What a file says about one of its tensors; checked against the file's size when it was opened.
struct tensor_info {
  dtype type = dtype::unknown;
  std::string type_name;  ///< as the file spells it, also of a type that Lithe cannot read
  std::vector<index_t> shape;
  std::uint64_t offset = 0, bytes = 0;  ///< of the data, from the beginning of the file

  /// As a matrix: the last dimension is the columns, all others are rows; a vector is one row, a scalar is [1 x 1].
  [[nodiscard]] index_t cols() const { return shape.empty() ? 1 : shape.back(); }
  /// The product of all dimensions but the last.
  [[nodiscard]] index_t rows() const {
    index_t n = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) n *= shape[i];
    return n;
  }
  /// How many numbers it has.
  [[nodiscard]] index_t size() const { return rows() * cols(); }
};

/// "[2, 3]", for messages.
[[nodiscard]] inline std::string to_text(std::span<const index_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += concat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

namespace detail {

inline constexpr std::uint64_t longest_header = 100'000'000;  ///< the reference implementation's limit
inline constexpr int deepest_json = 127;                      ///< arrays and objects in one another, its limit, too
inline constexpr std::size_t io_block = std::size_t{1} << 20;

/// The name in quotes, cut short if a hostile file made it long.
[[nodiscard]] inline std::string quoted(const std::string& name) {
  return name.size() <= 200 ? "'" + name + "'" : "'" + name.substr(0, 200) + "...'";
}

/// The text as JSON. Beyond what the parser refuses, keys that come twice are an error, and so is nesting that no such file needs.
[[nodiscard]] inline nlohmann::json parse_json(const std::string& text, const std::string& who) {
  using json = nlohmann::json;
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    require<io_error>(depth < deepest_json, who, ": expected JSON nested at most ", deepest_json, " deep, found more");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      require<io_error>(keys.back().insert(key).second, who, ": expected ", detail::quoted(key),
                        " once, found it twice");
    }
    return true;
  };
  // the parser takes NUL for the end of its input
  require<io_error>(text.starts_with('{') && text.find('\0') == std::string::npos, who, ": expected a JSON object, found other bytes");
  try {
    return json::parse(text, check);
  } catch (const json::exception& e) {
    throw io_error(concat(who, ": expected JSON, found: ", e.what()));
  }
}

/// A number of elements, an offset: a JSON integer in [0, 2^63).
[[nodiscard]] inline index_t parse_count(const nlohmann::json& value, const std::string& who) {
  require<io_error>(value.is_number_unsigned() && std::in_range<index_t>(value.get<std::uint64_t>()), who,
                    ": expected whole numbers from 0 to 2^63 - 1, found ", value.dump(-1, ' ', true).substr(0, 80));
  return static_cast<index_t>(value.get<std::uint64_t>());
}

[[nodiscard]] inline tensor_info parse_tensor(const nlohmann::json& entry, std::uint64_t data_begin, std::uint64_t data_bytes,
                                              const std::string& who) {
  require<io_error>(
      entry.is_object() && entry.contains("dtype") && entry.contains("shape") && entry.contains("data_offsets"), who,
      ": expected an object with dtype, shape and data_offsets, found something else");
  const auto &type = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  require<io_error>(type.is_string(), who, ": expected a string as dtype, found a JSON ", type.type_name());
  require<io_error>(shape.is_array(), who, ": expected an array as shape, found a JSON ", shape.type_name());
  require<io_error>(offsets.is_array() && offsets.size() == 2, who, ": expected two data_offsets, found something else");
  tensor_info info;
  info.type_name = type.get<std::string>();
  info.type = parse_dtype(info.type_name);
  index_t elements = 1;
  for (const auto& dimension : shape) {
    const index_t d = parse_count(dimension, who + ": shape");
    require<io_error>(d == 0 || elements <= std::numeric_limits<index_t>::max() / d, who, ": expected fewer than 2^63 elements, found more");
    elements *= d;
    info.shape.push_back(d);
  }
  const auto begin = static_cast<std::uint64_t>(parse_count(offsets[0], who + ": data_offsets"));
  const auto end = static_cast<std::uint64_t>(parse_count(offsets[1], who + ": data_offsets"));
  require<io_error>(begin <= end && end <= data_bytes, who, ": expected data_offsets in order and within the ", data_bytes,
                    " bytes of data in the file, found [", begin, ", ", end, "]");
  info.offset = data_begin + begin;
  info.bytes = end - begin;
  const std::size_t bits = info.type == dtype::unknown ? other_dtype_bits(info.type_name) : 8 * dtype_size(info.type);
  require<io_error>(bits != 0, who, ": expected a dtype of the format, found ", detail::quoted(info.type_name));
  const auto count = static_cast<std::uint64_t>(elements);
  require<io_error>(count <= std::numeric_limits<std::uint64_t>::max() / bits && info.bytes == count * bits / 8 &&
                        count * bits % 8 == 0,
                    who, ": expected ", elements, " elements of ", info.type_name, " for shape ", to_text(info.shape),
                    ", found ", info.bytes, " bytes of data");
  return info;
}

/// One file: its header, checked, and the door to its data.
struct safetensors_shard {
  input_file file;
  std::map<std::string, tensor_info> tensors;
  metadata_map metadata;

  explicit safetensors_shard(const std::filesystem::path& path) : file(path) {
    const std::string who = path.string();
    require<io_error>(file.size() >= 8, who, ": expected a safetensors file, found only ", file.size(), " bytes");
    std::uint64_t length = 0;
    file.read_at(0, &length, 8);
    require<io_error>(length <= longest_header && length <= file.size() - 8, who, ": expected a header of at most ",
                      std::min(longest_header, file.size() - 8), " bytes, found its length given as ", length);
    std::string text(static_cast<std::size_t>(length), ' ');
    file.read_at(8, text.data(), text.size());
    const nlohmann::json header = parse_json(text, who + ": header");
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__")
        read_metadata(entry, who);
      else
        tensors.emplace(name, parse_tensor(entry, 8 + length, file.size() - 8 - length,
                                           concat(who, ": tensor ", detail::quoted(name))));
    }
    check_cover(8 + length, who);
  }

 private:
  void read_metadata(const nlohmann::json& entry, const std::string& who) {
    if (entry.is_null()) return;
    require<io_error>(entry.is_object(), who, ": expected an object as __metadata__, found a JSON ", entry.type_name());
    for (const auto& [key, value] : entry.items()) {
      require<io_error>(value.is_string(), who, ": expected a string as metadata ", detail::quoted(key),
                        ", found a JSON ", value.type_name());
      metadata.emplace(key, value.get<std::string>());
    }
  }
  /// The tensors lie one after the other from the header to the end of the file: no overlap, no gap.
  void check_cover(std::uint64_t at, const std::string& who) const {
    std::vector<std::pair<const std::string*, const tensor_info*>> order;
    for (const auto& [name, info] : tensors) order.emplace_back(&name, &info);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->offset, a.second->bytes) < std::pair(b.second->offset, b.second->bytes);
    });
    for (const auto& [name, info] : order) {
      require<io_error>(info->offset == at, who, ": tensor ", detail::quoted(*name),
                        ": expected its data behind that of the tensor before it, at byte ", at,
                        " of the file, found at ", info->offset);
      at += info->bytes;
    }
    require<io_error>(at == file.size(), who, ": expected the file to end with its last tensor at byte ", at, ", found ", file.size(), " bytes");
  }
};

}  // namespace detail

}  // namespace lithe::inline LITHE_ABI
