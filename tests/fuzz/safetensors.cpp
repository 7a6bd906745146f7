// Feeds bytes to everything that reads a file of unknown origin: they are opened as a safetensors file, as the index of a sharded one,
// and as a saved model. Whatever they are, the outcome is numbers or an io_error, and a refused model is as it was. Meant for
// -fsanitize=address,undefined. With clang: -DLITHE_LIBFUZZER -fsanitize=fuzzer; elsewhere main() below mutates files of its own:
//
//     fuzz_safetensors [inputs = 4000] [seed = 1]
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "lithe/io/state.hpp"

namespace {

using namespace lithe;
namespace fs = std::filesystem;

struct small_model {
  using scalar = float;
  struct record {};
  struct gradient {};
  matrix<float> weight = matrix<float>::Constant(3, 5, 1), bias = matrix<float>::Constant(1, 5, 2);
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
  }
};

void check(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "fuzz_safetensors: " << what << std::endl;
  std::abort();
}

/// A folder of its own, with two shards that an index can name; removed at exit.
struct work_folder {
  fs::path path;
  work_folder() {
    std::string name = (fs::temp_directory_path() / "lithe-fuzz-XXXXXX").string();
    check(::mkdtemp(name.data()) != nullptr, "no temporary folder");
    path = name;
    const std::vector<float> v(6, 0.5F);
    safetensors_writer first, second;
    first.add<float>("a", {2, 3}, v);
    first.write(path / "1.safetensors");
    second.add<float>("b", {6}, v);
    second.write(path / "2.safetensors");
  }
  ~work_folder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};
const fs::path& folder() {
  static const work_folder f;
  return f.path;
}

void spill(const fs::path& path, const std::uint8_t* data, std::size_t size) {
  fs::remove(path);  // some file systems flush a file that is emptied and written again
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
}

/// Reads all that can be read; the number of tensors that could.
int read_all(const fs::path& path) {
  int good = 0;
  const auto attempt = [&](const auto& f) {
    try {
      f();
      ++good;
    } catch (const io_error&) {
    }
  };
  attempt([&] {
    const safetensors_file in(path);
    for (const auto& name : in.names()) {
      const tensor_info& info = in.info(name);
      attempt([&] { (void)in.read<double>(name); });
      attempt([&] { (void)in.read<std::int32_t>(name); });
      attempt([&] {
        if (info.bytes > 0 && info.type != dtype::unknown) {  // else its size is only a claim
          matrix<float> wide(std::min<index_t>(info.rows(), 2), info.cols() + 1);
          in.read_rows<float>(name, info.rows() - wide.rows(), matrix_view<float>(wide).slice_cols(1, info.cols()));
        }
      });
    }
  });
  return good;
}

/// Whether the file was taken for a model.
bool load_small(const fs::path& path) {
  small_model m;
  try {
    load_model(path, m);
    return true;
  } catch (const io_error&) {
    check((m.weight.array() == 1).all() && (m.bias.array() == 2).all(), "a model was half loaded");
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fs::path file = folder() / "x.safetensors", index = folder() / "x.json";
  spill(file, data, size);
  (void)read_all(file);
  (void)load_small(file);
  if (size > 0 && data[0] == '{') {
    spill(index, data, size);
    (void)read_all(index);
  }
  return 0;
}

#ifndef LITHE_LIBFUZZER
namespace {

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<std::string> first_inputs() {
  const fs::path file = folder() / "seed.safetensors";
  std::vector<std::string> inputs;
  save_model(file, small_model{}, {{"config", R"({"rows":3})"}});
  check(load_small(file), "the unchanged model was refused");
  inputs.push_back(slurp(file));

  const std::vector<double> f64{1, 2, 3, 4, 5, 6};
  const std::vector<std::int64_t> i64{1, -2};
  const std::vector<std::uint8_t> u8{1, 2, 3};
  safetensors_writer out;
  out.add<double>("cube", {1, 2, 3}, f64);
  out.add<double>("half", {6}, f64, dtype::bf16);
  out.add<std::int64_t>("i", {2}, i64);
  out.add<std::uint8_t>("u", {3, 1}, u8);
  out.add<std::uint8_t>("none", {0, 9}, std::span(u8).first(0));
  out.metadata["key"] = "value";
  out.write(file);
  check(read_all(file) == 14, "the unchanged file was refused");  // itself; 5 tensors as double, 3 of them as integers, 5 by rows
  inputs.push_back(slurp(file));

  inputs.emplace_back(R"({"metadata":{"total_size":48},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  std::ofstream(folder() / "seed.json") << inputs.back();
  check(read_all(folder() / "seed.json") == 5, "the unchanged index was refused");
  return inputs;
}

/// One to three small lies: in bytes, in numbers, in length, in structure.
std::string mutate(std::string text, const std::vector<std::string>& inputs, rng_key key) {
  std::uint64_t draws = 0;
  const auto draw = [&](std::size_t n) { return static_cast<std::size_t>(philox(key, draws++)[0]) % std::max<std::size_t>(n, 1); };
  static const std::vector<std::string> pieces{"0",
                                               "-1",
                                               "9223372036854775807",
                                               "18446744073709551615",
                                               "1e400",
                                               "4294967296",
                                               "[",
                                               "]",
                                               "{",
                                               "}",
                                               ",",
                                               ":",
                                               "\"",
                                               "null",
                                               "\"F64\"",
                                               "\"BF16\"",
                                               "\"X9\"",
                                               "\"../1.safetensors\"",
                                               "\"shape\"",
                                               "\"weight\"",
                                               "__metadata__",
                                               "\\u0000",
                                               std::string(1, '\0'),
                                               "\xff",
                                               std::string(40, '['),
                                               "\"a\":"};
  for (std::size_t lies = 1 + draw(3); lies > 0; --lies) {
    const std::size_t at = draw(text.size() + 1), length = std::min(draw(20), text.size() - at);
    switch (draw(8)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << draw(8)));
        break;
      case 1:
        if (at < text.size()) text[at] = static_cast<char>(draw(256));
        break;
      case 2:
        text.resize(at);
        break;
      case 3:
        text.erase(at, length);
        break;
      case 4:
        text.insert(at, pieces[draw(pieces.size())]);
        break;
      case 5:
        text.replace(at, length, pieces[draw(pieces.size())]);
        break;
      case 6: {  // a digit becomes another one
        const std::size_t digit = text.find_first_of("0123456789", at);
        if (digit != std::string::npos) text[digit] = static_cast<char>('0' + draw(10));
        break;
      }
      default: {  // a part of another file
        const std::string& other = inputs[draw(inputs.size())];
        const std::size_t from = draw(other.size());
        text.insert(at, other.substr(from, draw(100)));
      }
    }
  }
  // Half of the headers get their right length again, or no lie behind the first eight bytes would ever be looked at.
  if (text.size() > 8 && text[0] != '{' && draw(2) == 0) {
    const std::size_t end = text.rfind('}');
    const std::uint64_t length = end == std::string::npos || end < 8 ? text.size() - 8 : (end + 1 - 8 + 7) / 8 * 8;
    std::memcpy(text.data(), &length, 8);
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4000, seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::cout << "fuzz_safetensors: " << count << " inputs, seed " << seed << std::endl;
  const std::vector<std::string> inputs = first_inputs();
  std::uint64_t opened = 0, loaded = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::string text = mutate(inputs[i % inputs.size()], inputs, rng_key{seed}.child(i));
    const auto* data = reinterpret_cast<const std::uint8_t*>(text.data());
    LLVMFuzzerTestOneInput(data, text.size());
    opened += read_all(folder() / (text.starts_with('{') ? "x.json" : "x.safetensors")) > 0;
    loaded += load_small(folder() / "x.safetensors");
  }
  std::cout << "fuzz_safetensors: " << opened << " of them could be opened, " << loaded << " loaded into a model" << std::endl;
  // all refused, or none, would mean that the mutations test nothing
  check(count < 1000 || (opened > count / 50 && opened < count && loaded > 0), "the mutations do not reach the reader");
}
#endif
