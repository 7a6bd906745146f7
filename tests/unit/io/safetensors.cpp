#include "lithe/io/safetensors.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "lithe/core/random.hpp"

namespace safetensors_tests {

using namespace lithe;
namespace fs = std::filesystem;

fs::path golden_folder() {
  if (const char* folder = std::getenv("LITHE_TEST_DATA")) return fs::path(folder);
  return fs::path(__FILE__).parent_path() / "../../golden";
}

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
void spill(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

/// A file with this header and data, true or not; its header length, unless given, is right.
std::string raw_file(const std::string& header, std::size_t data_bytes, std::uint64_t length = ~std::uint64_t{}) {
  if (length == ~std::uint64_t{}) length = header.size();
  std::string text(8, '\0');
  std::memcpy(text.data(), &length, 8);
  return text + header + std::string(data_bytes, '\1');
}

struct safetensors : testing::Test {
  fs::path folder;
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lithe-safetensors-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { fs::remove_all(folder); }

  [[nodiscard]] fs::path file(const char* name = "x.safetensors") const { return folder / name; }
  [[nodiscard]] std::size_t files() const { return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), {})); }
};

/// f throws io_error, and its sentence holds all the pieces.
template <class F>
void expect_io_error(F&& f, const std::vector<std::string>& pieces) {
  try {
    f();
    ADD_FAILURE() << "expected an io_error with " << testing::PrintToString(pieces);
  } catch (const io_error& e) {
    for (const auto& piece : pieces) EXPECT_NE(std::string(e.what()).find(piece), std::string::npos) << e.what() << "\n  lacks: " << piece;
  }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
std::vector<T> extremes() {
  using limits = std::numeric_limits<T>;
  std::vector<T> v{T(0), T(1), limits::lowest(), limits::max(), limits::min()};
  if constexpr (std::floating_point<T>)
    v.insert(v.end(), {-T(0), limits::denorm_min(), -limits::infinity(), limits::infinity(), limits::quiet_NaN(), T(1) / 3});
  return v;
}

// ---- values ----

TEST_F(safetensors, writes_and_reads_every_type_bit_for_bit) {
  const auto f64 = extremes<double>();
  const auto f32 = extremes<float>();
  const auto i64 = extremes<std::int64_t>();
  const auto i32 = extremes<std::int32_t>();
  const auto u8 = extremes<std::uint8_t>();
  safetensors_writer out;
  const auto add = [&]<class T>(const char* name, const std::vector<T>& v) { out.add<T>(name, {static_cast<index_t>(v.size())}, v); };
  add("u8", u8), add("f32", f32), add("i32", i32), add("i64", i64), add("f64", f64);  // not in the order of their sizes
  out.metadata = {{"config", R"({"width": 3, "name": "é\n"})"}, {"", "empty key"}};
  out.write(file());

  const safetensors_file in(file());
  EXPECT_EQ(in.metadata(), out.metadata);
  EXPECT_EQ(in.names(), (std::vector<std::string>{"f32", "f64", "i32", "i64", "u8"}));
  EXPECT_TRUE(same_bits(in.read<double>("f64"), f64));
  EXPECT_TRUE(same_bits(in.read<float>("f32"), f32));
  EXPECT_TRUE(same_bits(in.read<std::int64_t>("i64"), i64));
  EXPECT_TRUE(same_bits(in.read<std::int32_t>("i32"), i32));
  EXPECT_TRUE(same_bits(in.read<std::uint8_t>("u8"), u8));
  for (const auto& name : in.names()) EXPECT_EQ(in.info(name).offset % dtype_size(in.info(name).type), 0U) << name << " is not aligned";

  EXPECT_EQ(in.read<double>("f32")[10], static_cast<double>(f32[10]));
  EXPECT_EQ(in.read<float>("f64")[10], static_cast<float>(1.0 / 3));
  EXPECT_EQ(in.read<std::int64_t>("u8"), (std::vector<std::int64_t>{0, 1, 0, 255, 0}));
  EXPECT_EQ(in.read<double>("i32")[2], -2147483648.0);
}

TEST_F(safetensors, reads_all_small_integers_and_truth_values) {
  spill(file(), raw_file(R"({"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[2],"data_offsets":[4,6]},)"
                         R"("c":{"dtype":"BOOL","shape":[1,1],"data_offsets":[6,7]}})",
                         7));
  const safetensors_file in(file());
  EXPECT_EQ(in.read<std::int64_t>("a"), (std::vector<std::int64_t>{257, 257}));
  EXPECT_EQ(in.read<float>("b"), (std::vector<float>{1, 1}));
  EXPECT_EQ(in.read<std::uint8_t>("c"), (std::vector<std::uint8_t>{1}));
}

TEST_F(safetensors, refuses_integers_that_do_not_fit_and_integers_from_numbers) {
  safetensors_writer out;
  const std::vector<std::int64_t> i{1, 2, std::int64_t{1} << 31};
  const std::vector<float> f{1};
  out.add<std::int64_t>("large", {3}, i);
  out.add<float>("number", {1}, f);
  out.write(file());
  const safetensors_file in(file());
  expect_io_error([&] { (void)in.read<std::int32_t>("large"); }, {"x.safetensors", "'large'", "4 bytes", "column 2"});
  expect_io_error([&] { (void)in.read<std::int64_t>("number"); }, {"x.safetensors", "'number'", "expected integers", "found dtype 'F32'"});
}

/// The value of a binary floating-point pattern, from its definition.
double value_of(unsigned bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, e = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double sign = (bits >> (exponent_bits + fraction_bits)) != 0 ? -1 : 1, fraction = static_cast<double>(bits & ((1U << fraction_bits) - 1));
  if (e == (1 << exponent_bits) - 1) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * std::ldexp(fraction + (e == 0 ? 0 : std::ldexp(1.0, fraction_bits)), std::max(e, 1) - bias - fraction_bits);
}

TEST_F(safetensors, reads_all_65536_bfloat16_and_float16_values) {
  std::string text = raw_file(R"({"b":{"dtype":"BF16","shape":[256,256],"data_offsets":[0,131072]},)"
                              R"("h":{"dtype":"F16","shape":[65536],"data_offsets":[131072,262144]}})",
                              262144);
  for (unsigned i = 0; i < 131072; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    std::memcpy(text.data() + text.size() - 262144 + 2 * i, &bits, 2);
  }
  spill(file(), text);
  const safetensors_file in(file());
  const auto b = in.read<float>("b"), h = in.read<float>("h");
  for (unsigned i = 0; i < 65536; ++i) {
    for (const auto& [found, expected] : {std::pair(b[i], value_of(i, 8, 7)), std::pair(h[i], value_of(i, 5, 10))}) {
      if (std::isnan(expected))
        ASSERT_TRUE(std::isnan(found)) << i;
      else
        ASSERT_TRUE(found == expected && std::signbit(found) == std::signbit(expected)) << i << " " << found << " " << expected;
    }
    const std::uint16_t back = to_bf16(b[i]);
    if (std::isnan(b[i]))
      ASSERT_TRUE(std::isnan(bf16_to_float(back)));
    else
      ASSERT_EQ(back, i);
  }
}

/// Nearest, ties to even, by comparing the two neighbours.
template <class S>
void check_bf16(S x) {
  const std::uint16_t found = to_bf16(x);
  const auto lower = static_cast<std::uint16_t>(std::bit_cast<std::uint64_t>(static_cast<double>(bf16_to_float(found))) == 0 ? 0 : found - 1);
  const double at = static_cast<double>(bf16_to_float(found)), v = static_cast<double>(x);
  if (!std::isfinite(at)) return;
  for (const std::uint16_t other : {lower, static_cast<std::uint16_t>(found + 1)}) {
    const double o = static_cast<double>(bf16_to_float(other));
    if (!std::isfinite(o) || std::signbit(o) != std::signbit(at)) continue;
    ASSERT_TRUE(std::fabs(v - at) < std::fabs(v - o) || (std::fabs(v - at) == std::fabs(v - o) && found % 2 == 0) || other == found)
        << v << " became " << at << ", but " << o << " is nearer or even";
  }
}

TEST_F(safetensors, rounds_to_bfloat16_to_nearest_even) {
  for (std::uint64_t i = 0; i < 20000; ++i) {
    const std::uint32_t bits = philox({7}, i)[0];
    if (const auto x = std::bit_cast<float>(bits); std::isfinite(x)) check_bf16(x);
    const auto tie = std::bit_cast<float>((bits & 0xBFFF0000U) | 0x8000U);  // half way between two neighbours
    check_bf16(tie);
    // a trifle off a tie: lost when rounded to float first
    check_bf16(static_cast<double>(tie) * (1 + 0x1p-50));
    check_bf16(static_cast<double>(tie) * (1 - 0x1p-50));
  }
  EXPECT_EQ(bf16_to_float(to_bf16(1.00390625)), 1.0F);  // tie, even is below
  EXPECT_EQ(bf16_to_float(to_bf16(1.00390625 + 0x1p-50)), 1.0078125F);
  EXPECT_EQ(bf16_to_float(to_bf16(1.01171875F)), 1.015625F);  // tie, even is above
  EXPECT_EQ(bf16_to_float(to_bf16(3.4e38F)), std::numeric_limits<float>::infinity());
  EXPECT_EQ(bf16_to_float(to_bf16(-1e300)), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(bf16_to_float(to_bf16(std::bit_cast<float>(0x7F800001U)))));  // a NaN whose upper half is infinity
  EXPECT_TRUE(std::signbit(bf16_to_float(to_bf16(-1e-300))));
}

TEST_F(safetensors, writes_bfloat16) {
  const std::vector<float> f{1.00390625F, 0x1p-133F, -INFINITY, 3.0F};
  const std::vector<double> d{1.00390625 + 0x1p-50, -2.0};
  safetensors_writer out;
  out.add<float>("f", {4}, f, dtype::bf16);
  out.add<double>("d", {2}, d, dtype::bf16);
  out.write(file());
  const safetensors_file in(file());
  EXPECT_EQ(in.info("f").type_name, "BF16");
  EXPECT_EQ(in.info("f").bytes, 8U);
  EXPECT_EQ(in.read<float>("f"), (std::vector<float>{1.0F, 0x1p-133F, -INFINITY, 3.0F}));
  EXPECT_EQ(in.read<float>("d"), (std::vector<float>{1.0078125F, -2.0F}));
}

// ---- shapes and views ----

TEST_F(safetensors, shapes_as_matrices) {
  const std::vector<double> v(24, 0.5);
  const std::vector<double> none;
  safetensors_writer out;
  out.add<double>("scalar", {}, std::span(v).first(1));
  out.add<double>("vector", {24}, v);
  out.add<double>("cube", {2, 3, 4}, v);
  out.add<double>("empty", {0, 7}, none);
  const matrix<double> row = matrix<double>::Ones(1, 5), column = matrix<double>::Ones(5, 1);
  out.add<double>("row", row);
  out.add<double>("column", column);
  out.write(file());
  const safetensors_file in(file());
  const auto shape = [&](const char* name) { return concat(to_text(in.info(name).shape), to_text(in.info(name).rows(), in.info(name).cols())); };
  EXPECT_EQ(shape("scalar"), "[][1 x 1]");
  EXPECT_EQ(shape("vector"), "[24][1 x 24]");
  EXPECT_EQ(shape("cube"), "[2, 3, 4][6 x 4]");
  EXPECT_EQ(shape("empty"), "[0, 7][0 x 7]");
  EXPECT_EQ(shape("row"), "[5][1 x 5]");
  EXPECT_EQ(shape("column"), "[5, 1][5 x 1]");
  EXPECT_EQ(in.read_matrix<float>("cube"), matrix<float>::Constant(6, 4, 0.5F));
  EXPECT_TRUE(in.read<double>("empty").empty());
  matrix<double> wrong(4, 6);
  expect_io_error([&] { in.read<double>("cube", wrong); }, {"x.safetensors", "'cube'", "expected shape [4 x 6]", "found [2, 3, 4]"});
  expect_io_error([&] { in.read_rows<double>("cube", 5, matrix_view<double>(wrong).slice_cols(0, 4)); }, {"'cube'", "expected rows 5 to 9"});
  expect_io_error([&] { (void)in.read<double>("absent"); }, {"x.safetensors", "'absent'", "no tensor"});
}

TEST_F(safetensors, strided_views_and_tables_longer_than_a_block) {
  const index_t rows = 701, cols = 1237;  // blocks of 1 MiB end within rows
  matrix<float> m(rows, cols + 3);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(uniform({3}, static_cast<std::uint64_t>(i)));
  const matrix_view<const float> part = matrix_view<const float>(m).slice_cols(2, cols);
  safetensors_writer out;
  out.add<float>("strided", part);
  out.add<float>("half", part, dtype::bf16);
  out.add_rows<float>("streamed", rows, cols, [&](index_t i, std::span<float> row) { std::copy_n(part.row(i), cols, row.data()); });
  out.write(file());

  const safetensors_file in(file());
  matrix<float> whole(rows, cols), wide = matrix<float>::Constant(rows, cols + 2, -1);
  const matrix_view<float> inside = matrix_view<float>(wide).slice_cols(1, cols);
  for (const char* name : {"strided", "streamed"}) {
    in.read<float>(name, whole);
    EXPECT_EQ(whole, part.map());
    inside.map().setZero();
    in.read<float>(name, inside);
    EXPECT_EQ(inside.map(), part.map());
  }
  in.read<float>("half", inside);
  EXPECT_EQ(inside.map(), part.map().unaryExpr([](float x) { return bf16_to_float(to_bf16(x)); }));
  EXPECT_TRUE((wide.col(0).array() == -1).all() && (wide.col(cols + 1).array() == -1).all());
  EXPECT_EQ(in.read_matrix<double>("strided"), part.map().cast<double>());

  matrix<float> some(3, cols);
  in.read_rows<float>("strided", 698, some);
  EXPECT_EQ(some, part.map().bottomRows(3));
  matrix<double> converted(3, cols);
  in.read_rows<double>("strided", 11, converted);
  EXPECT_EQ(converted, part.map().middleRows(11, 3).cast<double>());
}

TEST_F(safetensors, one_file_serves_several_threads) {
  std::vector<double> v(200000);
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<double>(i);
  safetensors_writer out;
  out.add<double>("v", {static_cast<index_t>(v.size())}, v);
  out.write(file());
  const safetensors_file in(file());
  std::vector<int> good(4);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < good.size(); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 5; ++i) good[t] += in.read<double>("v") == v && in.read<float>("v")[77] == 77;
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(good, std::vector<int>(4, 5));
}

TEST_F(safetensors, reads_the_golden_files) {
  const safetensors_file in(golden_folder() / "loss_cross_entropy.safetensors");
  EXPECT_EQ(in.metadata().at("case"), "loss_cross_entropy");
  EXPECT_EQ(nlohmann::json::parse(in.metadata().at("config"))["vocab"], 7);
  const auto logits = in.read_matrix<double>("input.logits");
  const auto targets = in.read<std::int64_t>("input.targets");
  const auto token_loss = in.read<double>("mid.token_loss");
  ASSERT_EQ(logits.rows(), 9);
  ASSERT_EQ(logits.cols(), 7);
  for (index_t i = 0; i < 9; ++i) {  // the bytes mean what the file's makers meant
    const std::int64_t target = targets[static_cast<std::size_t>(i)];
    double sum = 0;
    for (index_t j = 0; j < logits.cols(); ++j) sum += std::exp(logits(i, j));
    EXPECT_NEAR(token_loss[static_cast<std::size_t>(i)], target == -100 ? 0 : std::log(sum) - logits(i, target),
                1e-12);  // a handful of roundings of numbers around 1
  }
  int files = 0;
  for (const auto& entry : fs::directory_iterator(golden_folder())) {
    if (entry.path().extension() != ".safetensors") continue;
    const safetensors_file f(entry.path());
    for (const auto& name : f.names()) (void)f.read<double>(name);
    ++files;
  }
  EXPECT_GE(files, 130);
}

// ---- shards ----

struct sharded_safetensors : safetensors {
  void SetUp() override {
    safetensors::SetUp();
    const std::vector<float> a{1, 2}, b{3};
    safetensors_writer first, second;
    first.add<float>("a", {2}, a);
    first.add<float>("unlisted", {1}, b);
    first.metadata["format"] = "pt";
    second.add<float>("b", {1}, b);
    first.write(file("model-1-of-2.safetensors"));
    second.write(file("model-2-of-2.safetensors"));
  }
  [[nodiscard]] fs::path index(const std::string& text) const {
    spill(file("model.safetensors.index.json"), text);
    return file("model.safetensors.index.json");
  }
};

TEST_F(sharded_safetensors, read_as_one_by_their_index) {
  const safetensors_file in(index(R"({"metadata":{"total_size":16},"weight_map":{"a":"model-1-of-2.safetensors","b":"model-2-of-2.safetensors"}})"));
  EXPECT_EQ(in.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(in.read<float>("a"), (std::vector<float>{1, 2}));
  EXPECT_EQ(in.read<double>("b"), std::vector<double>{3});
  EXPECT_EQ(in.metadata().at("format"), "pt");
}

TEST_F(sharded_safetensors, refuse_a_lying_index) {
  const auto open = [&](const std::string& text) { return [&, text] { const safetensors_file in(index(text)); }; };
  const std::string name = "index.json";
  expect_io_error(open(R"({"weight_map":{"a":"model-3-of-2.safetensors"}})"), {"model-3-of-2.safetensors", "cannot be opened"});
  expect_io_error(open(R"({"weight_map":{"c":"model-1-of-2.safetensors"}})"), {name, "'c'", "'model-1-of-2.safetensors'", "no such tensor"});
  for (const char* file : {"../model-1-of-2.safetensors", "/etc/passwd", "..", ".", "", "sub/model", "a\\\\b", "model\\u0000"})
    expect_io_error(open(concat(R"({"weight_map":{"a":")", file, R"("}})")), {name, "'a'", "own folder"});
  expect_io_error(open(R"({"weight_map":{"a":7}})"), {name, "'a'", "number"});
  expect_io_error(open(R"({"weight_map":[]})"), {name, "weight_map"});
  expect_io_error(open(R"({})"), {name, "weight_map"});
  expect_io_error(open(R"({"weight_map":{"a":"model-1-of-2.safetensors","a":"model-2-of-2.safetensors"}})"), {name, "'a'", "twice"});
  expect_io_error(open(""), {name, "JSON"});
  spill(file("model-2-of-2.safetensors"), "short");
  expect_io_error(open(R"({"weight_map":{"b":"model-2-of-2.safetensors"}})"), {"model-2-of-2.safetensors", "5 bytes"});
}

// ---- files that lie ----

TEST_F(safetensors, refuses_files_that_are_not_there_or_no_files) {
  expect_io_error([&] { const safetensors_file in(file("none")); }, {"none", "cannot be opened", "No such file"});
  expect_io_error([&] { const safetensors_file in(folder); }, {folder.string(), "not a regular file"});
  ASSERT_EQ(::mkfifo(file("fifo").c_str(), 0600), 0);
  expect_io_error([&] { const safetensors_file in(file("fifo")); }, {"fifo", "not a regular file"});
}

TEST_F(safetensors, refuses_lying_headers) {
  const auto open = [&](const std::string& text) {
    return [&, text] {
      spill(file(), text);
      const safetensors_file in(file());
    };
  };
  const std::string path = file().string();
  // lengths
  expect_io_error(open(""), {path, "0 bytes"});
  expect_io_error(open("1234567"), {path, "7 bytes"});
  expect_io_error(open(raw_file("", 0)), {path, "JSON object"});
  expect_io_error(open(raw_file("{}", 0, 3)), {path, "at most 2 bytes", "given as 3"});
  expect_io_error(open(raw_file("{}", 0, ~std::uint64_t{} - 1)), {path, "given as 18446744073709551614"});
  expect_io_error(open(raw_file("{}", 0, 100'000'001)), {path, "given as 100000001"});
  expect_io_error(open(raw_file(R"({"a":)", 0)), {path, "header", "expected JSON"});  // cut
  // not JSON, or not this JSON
  expect_io_error(open(raw_file("garbage!", 0)), {path, "JSON object"});
  expect_io_error(open(raw_file(std::string("{}\0\0", 4), 0)), {path, "other bytes"});
  expect_io_error(open(raw_file(" {}", 0)), {path, "JSON object"});
  expect_io_error(open(raw_file("{} x", 0)), {path, "expected JSON"});
  expect_io_error(open(raw_file("{\"a\xff\":1}", 0)), {path, "expected JSON"});
  expect_io_error(open(raw_file(R"({"a":)" + std::string(1'000'000, '['), 0)), {path, "127 deep"});
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += R"({"a":)";
  expect_io_error(open(raw_file(objects, 0)), {path, "127 deep"});
  expect_io_error(open(raw_file(R"({"__metadata__":{"a":1}})", 0)), {path, "metadata 'a'", "string", "number"});
  expect_io_error(open(raw_file(R"({"__metadata__":[]})", 0)), {path, "__metadata__", "array"});
  expect_io_error(open(raw_file(R"({"__metadata__":{},"__metadata__":{}})", 0)), {path, "'__metadata__'", "twice"});
  // tensors
  const auto tensor = [&](const std::string& type, const std::string& shape, const std::string& offsets, std::size_t data) {
    return open(raw_file(concat(R"({"t":{"dtype":)", type, R"(,"shape":)", shape, R"(,"data_offsets":)", offsets, "}}"), data));
  };
  const std::string t = "tensor 't'";
  EXPECT_NO_THROW(tensor(R"("F32")", "[2]", "[0,8]", 8)());
  expect_io_error(tensor("7", "[2]", "[0,8]", 8), {path, t, "dtype", "number"});
  expect_io_error(tensor(R"("F32")", "{}", "[0,8]", 8), {path, t, "shape", "object"});
  expect_io_error(tensor(R"("F32")", "[2]", "[0,8,8]", 8), {path, t, "data_offsets"});
  expect_io_error(tensor(R"("F32")", "[2]", "8", 8), {path, t, "data_offsets"});
  expect_io_error(tensor(R"("F32")", "[-2]", "[0,8]", 8), {path, t, "shape", "found -2"});
  expect_io_error(tensor(R"("F32")", "[2.0]", "[0,8]", 8), {path, t, "shape", "found 2.0"});
  expect_io_error(tensor(R"("F32")", R"(["2"])", "[0,8]", 8), {path, t, "shape"});
  expect_io_error(tensor(R"("F32")", "[9223372036854775808]", "[0,8]", 8), {path, t, "shape", "found 9223372036854775808"});
  expect_io_error(tensor(R"("F32")", "[99999999999999999999999]", "[0,8]", 8), {path, t, "shape"});
  expect_io_error(tensor(R"("F32")", "[4294967296,4294967296]", "[0,8]", 8), {path, t, "2^63"});
  expect_io_error(tensor(R"("F32")", "[4294967296,4294967296,0]", "[0,0]", 0), {path, t, "2^63"});
  expect_io_error(tensor(R"("F32")", "[4611686018427387904]", "[0,0]", 0), {path, t, "found 0 bytes"});  // times 4 wraps to 0
  expect_io_error(tensor(R"("F32")", "[3]", "[0,8]", 8), {path, t, "3 elements", "8 bytes"});
  expect_io_error(tensor(R"("F32")", "[2]", "[0,9]", 9), {path, t, "2 elements", "9 bytes"});
  expect_io_error(tensor(R"("F32")", "[2]", "[0,8]", 7), {path, t, "7 bytes", "[0, 8]"});
  expect_io_error(tensor(R"("F32")", "[2]", "[8,0]", 8), {path, t, "in order", "[8, 0]"});
  expect_io_error(tensor(R"("F32")", "[2]", "[-8,0]", 8), {path, t, "found -8"});
  expect_io_error(tensor(R"("F32")", "[2]", "[9223372036854775800,9223372036854775807]", 8), {path, t, "9223372036854775800"});
  expect_io_error(tensor(R"("F32")", "[2]", "[4,12]", 12), {path, t, "behind"});
  expect_io_error(tensor(R"("F32")", "[2]", "[0,8]", 9), {path, "end with its last tensor"});
  expect_io_error(open(raw_file(R"({"t":{"dtype":"F32","shape":[2]}})", 8)), {path, t});
  expect_io_error(open(raw_file(R"({"t":3})", 8)), {path, t});
  const std::string u = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", v = R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})";
  expect_io_error(open(raw_file(concat(R"({"t":)", u, R"(,"t":)", u, "}"), 8)), {path, "'t'", "twice"});
  expect_io_error(open(raw_file(concat(R"({"t":)", u, R"(,"v":)", v, "}"), 12)), {path, "tensor 'v'", "behind"});  // overlap
  expect_io_error(open(raw_file(concat(R"({"t":)", u, R"(,"v":)", u, "}"), 8)), {path, "tensor 'v'", "behind"});
  expect_io_error(open(raw_file(concat(R"({")", std::string(10000, 'n'), R"(":3})"), 0)), {"nnn...'"});
}

TEST_F(safetensors, other_types_are_refused_only_when_they_are_read) {
  spill(file(), raw_file(R"({"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8));
  const safetensors_file in(file());
  EXPECT_EQ(in.read<float>("b").size(), 1U);
  EXPECT_EQ(in.info("a").type_name, "F8_E4M3");
  expect_io_error([&] { (void)in.read<float>("a"); }, {"x.safetensors", "'a'", "'F8_E4M3'"});
}

/// As the format's own reader: serde takes a null for an optional map, and passes over fields that it does not know.
TEST_F(safetensors, takes_what_the_formats_own_reader_takes) {
  const auto opens = [&](const std::string& header, std::size_t data) {
    spill(file(), raw_file(header, data));
    EXPECT_NO_THROW(safetensors_file{file()}) << header;
    return safetensors_file(file());
  };
  const std::string t = R"("t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  EXPECT_TRUE(opens("{}", 0).names().empty());
  EXPECT_TRUE(opens(R"({"__metadata__":null})", 0).metadata().empty());
  EXPECT_TRUE(opens(R"({"__metadata__":{}})", 0).metadata().empty());
  const auto null = opens(R"({"__metadata__":null,)" + t + "}", 8);
  EXPECT_TRUE(null.metadata().empty());
  EXPECT_EQ(null.read<float>("t").size(), 2U);
  for (const std::string& more : std::vector<std::string>{"1", "null", "\"x\"", "[1,2]", R"({"shape":[3]})",
                                                          std::string(100, '[') + std::string(100, ']')})
    EXPECT_EQ(opens(R"({"t":{"more":)" + more + R"(,"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8)
                  .read<float>("t")
                  .size(),
              2U);
  opens("{" + t + "}   \n\t ", 8);  // white space behind
  EXPECT_EQ(opens(R"({ "t" : {"shape":[2],"data_offsets":[0,8],"dtype":"F32"} })", 8).read<float>("t").size(),
            2U);  // and in between; any order
  EXPECT_EQ(opens(R"({"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", 1).read<std::uint8_t>(""),
            std::vector<std::uint8_t>{1});  // no name, no dimension
  const auto none = opens(
      R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("c":{"dtype":"F64","shape":[3,0,9],"data_offsets":[4,4]},"d":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
      R"("e":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}})",
      8);  // nothing at all between and before, and the order of names is not that of data
  EXPECT_EQ(none.read<double>("c").size() + none.read<float>("a").size() + none.read<float>("e").size(), 0U);
  EXPECT_EQ(none.read_matrix<float>("a").cols(), 0);
  EXPECT_EQ(none.read_matrix<double>("c").rows(), 0);
  EXPECT_EQ(none.read_matrix<float>("b").size(), 1);
  for (const auto& [type, shape, bytes] : {std::tuple{"F4", "[3,2]", 3},
                                           {"F6_E2M3", "[4]", 3},
                                           {"F6_E3M2", "[8]", 6},
                                           {"F8_E5M2", "[3]", 3},
                                           {"F8_E4M3", "[3]", 3},
                                           {"F8_E8M0", "[3]", 3},
                                           {"F8_E4M3FNUZ", "[3]", 3},
                                           {"F8_E5M2FNUZ", "[3]", 3},
                                           {"U16", "[3]", 6},
                                           {"U32", "[3]", 12},
                                           {"U64", "[3]", 24},
                                           {"C64", "[3]", 24}}) {
    const auto in =
        opens(concat(R"({"t":{"dtype":")", type, R"(","shape":)", shape, R"(,"data_offsets":[0,)", bytes, "]}}"),
              static_cast<std::size_t>(bytes));
    expect_io_error([&] { (void)in.read<float>("t"); }, {"'t'", type});
  }
}

TEST_F(safetensors, refuses_what_the_formats_own_reader_refuses) {
  const auto refused = [&](const std::string& entry, std::size_t data, const std::vector<std::string>& pieces) {
    expect_io_error(
        [&] {
          spill(file(), raw_file(R"({"t":)" + entry + "}", data));
          const safetensors_file in(file());
        },
        pieces);
  };
  refused(R"({"dtype":"X9","shape":[2],"data_offsets":[0,8]})", 8, {"'t'", "a dtype of the format", "'X9'"});
  refused(R"({"dtype":"f32","shape":[2],"data_offsets":[0,8]})", 8, {"'t'", "'f32'"});
  refused(R"({"dtype":"","shape":[2],"data_offsets":[0,8]})", 8, {"'t'", "''"});
  refused(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})", 1,
          {"'t'", "3 elements of F4", "1 bytes"});  // a byte and a half
  refused(R"({"dtype":"F4","shape":[3],"data_offsets":[0,2]})", 2, {"'t'", "3 elements of F4", "2 bytes"});
  refused(R"({"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,5]})", 5, {"'t'", "4 elements of F8_E4M3", "5 bytes"});
  refused(R"({"dtype":"U64","shape":[4611686018427387904],"data_offsets":[0,0]})", 0,
          {"'t'", "found 0 bytes"});  // times 64 wraps to 0
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"dtype":"F32"})", 4, {"'dtype'", "twice"});
  refused(R"({"dtype":"F32","shape":null,"data_offsets":[0,4]})", 4, {"'t'", "shape", "null"});
  refused("null", 0, {"'t'"});
  refused(R"(["F32",[1]])", 4, {"'t'"});
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1e999})", 4, {"JSON"});
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":)" + std::string(200, '[') + std::string(200, ']') +
              "}",
          4, {"127 deep"});
  expect_io_error(
      [&] {
        spill(file(), raw_file(R"({"__metadata__":{"a":null}})", 0));
        const safetensors_file in(file());
      },
      {"metadata 'a'", "null"});
}

TEST_F(safetensors, a_file_that_shrinks_while_it_is_open_is_an_error) {
  safetensors_writer out;
  const std::vector<float> v(1000, 1.0F);
  out.add<float>("v", {1000}, v);
  out.write(file());
  const safetensors_file in(file());
  fs::resize_file(file(), 2000);
  expect_io_error([&] { (void)in.read<float>("v"); }, {"x.safetensors", "end of the file"});
}

// ---- saving ----

TEST_F(safetensors, the_writer_refuses_what_cannot_be_true) {
  const std::vector<double> v(6);
  safetensors_writer out;
  out.add<double>("v", {2, 3}, v);
  EXPECT_THROW(out.add<double>("v", {6}, v), config_error);
  EXPECT_THROW(out.add<double>("__metadata__", {6}, v), config_error);
  EXPECT_THROW(out.add<double>("w", {5}, v), config_error);
  EXPECT_THROW(out.add<double>("x", {6}, v, dtype::f16), config_error);
  const std::vector<std::int64_t> i(6);
  EXPECT_THROW(out.add<std::int64_t>("i", {6}, i, dtype::bf16), config_error);
}

struct failing_save : safetensors {
  std::string old;
  std::vector<double> large = std::vector<double>(std::size_t{1} << 19, 1.0);
  safetensors_writer writer;
  void SetUp() override {
    safetensors::SetUp();
    const std::vector<double> v{42};
    safetensors_writer first;
    first.add<double>("old", {1}, v);
    first.write(file());
    old = slurp(file());
    writer.add<double>("large", {static_cast<index_t>(large.size())}, large);
  }
  void expect_old_file_alone() const {
    EXPECT_EQ(slurp(file()), old);
    EXPECT_EQ(files(), 1U) << "a temporary file was left";
  }
};

TEST_F(failing_save, a_full_disk_keeps_the_old_file) {
  struct rlimit before {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 1 << 20, before.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_io_error([&] { writer.write(file()); }, {file().string(), "cannot be written"});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  expect_old_file_alone();
}

TEST_F(failing_save, an_exception_from_a_row_keeps_the_old_file) {
  writer.add_rows<double>("rows", 1000, 4, [](index_t i, std::span<double>) { require<state_error>(i < 900, "row ", i); });
  EXPECT_THROW(writer.write(file()), state_error);
  expect_old_file_alone();
}

TEST_F(failing_save, a_name_that_is_no_text_keeps_the_old_file) {
  writer.add<double>("\xff", {1}, std::span<const double>(large).first(1));
  expect_io_error([&] { writer.write(file()); }, {file().string(), "UTF-8"});
  expect_old_file_alone();
}

TEST_F(failing_save, a_folder_is_not_replaced) {
  expect_io_error([&] { writer.write(folder); }, {folder.string(), "not a regular file"});
  expect_io_error([&] { writer.write(folder / "none" / "x"); }, {"cannot be created"});
  expect_old_file_alone();
}

TEST_F(failing_save, a_save_replaces_the_file_and_keeps_its_mode_and_its_link) {
  fs::permissions(file(), fs::perms::owner_read | fs::perms::owner_write);
  fs::create_symlink("x.safetensors", folder / "link");
  writer.write(folder / "link");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(fs::status(file()).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_EQ(safetensors_file(file()).read<double>("large"), large);
  EXPECT_EQ(files(), 2U);
}

TEST_F(failing_save, a_link_to_nothing_is_followed_and_a_link_to_itself_refused) {
  fs::create_symlink("new.safetensors", folder / "link");
  fs::create_symlink("link", folder / "second");
  writer.write(folder / "second");
  EXPECT_TRUE(fs::is_symlink(folder / "link") && fs::is_symlink(folder / "second"));
  EXPECT_EQ(safetensors_file(file("new.safetensors")).read<double>("large"), large);
  fs::create_symlink("round", folder / "round");
  expect_io_error([&] { writer.write(folder / "round"); }, {"round", "a link to itself"});
  EXPECT_EQ(files(), 5U);
}

TEST_F(failing_save, a_path_without_a_file_name_is_refused_at_once) {
  for (const fs::path& path : {fs::path(), folder / ""}) {
    expect_io_error([&] { writer.write(path); }, {"the name of a file"});
    expect_io_error([&] { require_writable(path); }, {"the name of a file"});
  }
  expect_old_file_alone();
}

TEST_F(failing_save, files_and_folders_that_may_not_be_written_stay) {
  struct user {  // the superuser may write everything, so the test is somebody else's
    const uid_t before = ::geteuid();
    user(const fs::path& folder, const fs::path& file) {
      constexpr uid_t nobody = 65534;
      if (before == 0 && ::chown(folder.c_str(), nobody, 0) == 0 && ::chown(file.c_str(), nobody, 0) == 0)
        changed = ::seteuid(nobody) == 0;
    }
    ~user() {
      if (changed && ::seteuid(before) != 0) std::abort();
    }
    bool changed = false;
  } const somebody(folder, file());
  ASSERT_NE(::geteuid(), 0U);
  fs::permissions(file(), fs::perms::owner_read);
  expect_io_error([&] { writer.write(file()); }, {file().string(), "cannot be replaced", "Permission denied"});
  expect_io_error([&] { require_writable(file()); }, {"cannot be replaced"});
  fs::permissions(file(), fs::perms::owner_read | fs::perms::owner_write);
  fs::permissions(folder, fs::perms::owner_read | fs::perms::owner_exec);
  expect_io_error([&] { writer.write(file()); }, {file().string(), "cannot be created", "Permission denied"});
  fs::permissions(folder, fs::perms::owner_all);
  expect_old_file_alone();
}

}  // namespace safetensors_tests
