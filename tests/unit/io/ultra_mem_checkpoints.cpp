#include "lithe/io/ultra_mem_checkpoints.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include "lithe/io/state.hpp"

namespace ultra_mem_checkpoints_tests {

using namespace lithe;
using memory = ultra_mem<double>;

struct temporary_file {
  std::filesystem::path path = std::filesystem::temp_directory_path() / concat("lithe_ultra_mem_", ::getpid(), ".safetensors");
  ~temporary_file() { std::filesystem::remove(path); }
};

ultra_mem_config first() {
  return {.features = 10, .sub_keys = 10, .key_width = 6, .rank = 3, .cores = 2, .top_k = 4, .norm = score_norm_kind::layer, .norm_bias = true, .value_width = 8,
          .query_conv = 5};
}
ultra_mem_config second() {
  return {.features = 10, .heads = 1, .sub_keys = 8, .key_width = 6, .top_k = 4, .query = tucker_query::per_rank, .groups = 1, .value_width = 8, .table_rows = 32,
          .table_offset = 16, .pre_width = 6};
}
memory make(const ultra_mem_config& c, std::uint64_t key) {
  memory m(c, rng_key{key});
  for_each_tensor(
      [&](const std::string& name, role kind, auto& t) {  // norms and singular vectors that no start gives
        if constexpr (matrix_like<decltype(t)>)
          if constexpr (std::is_same_v<typename std::remove_cvref_t<decltype(t)>::Scalar, double>)
            if (kind == role::state || name.find("norm") != std::string::npos) fill_normal<double>(t, 1.0, rng_key{key}.child(static_cast<std::uint64_t>(name.size())));
      },
      m);
  return m;
}
matrix<double> output_of(const memory& m) {
  matrix<double> x(7, 10), y(7, 10);
  fill_normal<double>(x, 1.0, rng_key{3});
  m.forward(x, y, {});
  return y;
}

using tensors = std::map<std::string, std::pair<std::vector<index_t>, std::vector<double>>>;
/// The layer under public names; permuted dimensions are written out by the shapes of the specification, not by the importer's tables.
tensors public_tensors(const memory& m, const std::string& prefix, const std::string& table_prefix) {
  const auto& c = m.config;
  const index_t H = c.heads, n = c.sub_keys, d = c.key_width, r = c.rank;
  tensors all;
  const auto plain = [&](const std::string& name, std::vector<index_t> shape, const matrix<double>& t) {
    if (t.size() > 0) all[name] = {std::move(shape), std::vector<double>(t.data(), t.data() + t.size())};
  };
  const auto table = [&](const std::string& name, std::vector<index_t> shape, const dense_table<double>& t) {
    if (t.rows() > 0) plain(name, std::move(shape), t.view().map());
  };
  plain(prefix + "query_proj.weight", {m.query.outputs(), 10}, m.query.projection.weight);
  plain(prefix + "query_conv.weight", {10, c.query_conv}, m.query.convolution.weight.transpose().eval());
  plain(prefix + "query_norm.weight", {d}, m.query.norm.weight);
  plain(prefix + "query_norm.bias", {d}, m.query.norm.bias);
  plain(prefix + "keys_norm.weight", {d}, m.search.norm.weight);
  plain(prefix + "keys_norm.bias", {d}, m.search.norm.bias);
  std::vector<double> keys;
  for (index_t row = 0; row < H * 2 * n; ++row)
    for (index_t e = 0; e < d; ++e)
      for (index_t a = 0; a < r; ++a) keys.push_back(m.search.keys(row, a * d + e));
  all[prefix + "keys"] = {{H, 2, n, d, r}, keys};
  for (index_t core = 0; core < c.cores; ++core) plain(prefix + concat("tucker_core.", core), {H, r, r}, m.search.cores.middleRows(core * H * r, H * r));
  plain(prefix + "tucker_core_u", {1, H, 1, r}, m.search.u);
  plain(prefix + "tucker_core_v", {1, H, 1, r}, m.search.t);
  plain(prefix + "shuffle_index", {m.expansion.permutation.size()}, m.expansion.permutation.cast<double>());
  plain(prefix + "pre_values_proj.weight", {c.pre_width, 10}, m.expansion.pre_projection.weight);
  plain(prefix + "values_proj.weight", {10, m.expansion.projection.weight.cols()}, m.expansion.projection.weight);
  table(table_prefix + "values_for_look_up", {m.expansion.config.table_rows, 8}, m.expansion.values);
  table(table_prefix + "pre_values_for_look_up", {m.expansion.config.table_rows, c.pre_width}, m.expansion.pre_values);
  return all;
}
void write(const std::filesystem::path& path, const tensors& all) {
  safetensors_writer file;
  std::vector<std::int64_t> order;  // the writer keeps no copy
  for (const auto& [name, tensor] : all)
    if (name.ends_with("shuffle_index")) {
      order.assign(tensor.second.begin(), tensor.second.end());
      file.add<std::int64_t>(name, tensor.first, order);
    } else {
      file.add<double>(name, tensor.first, tensor.second);
    }
  file.write(path);
}

TEST(ultra_mem_checkpoints, imports_by_the_official_names) {
  const temporary_file file;
  const std::string unit = "transformer.mem_blocks.0.", shared = "transformer.full_memory_layer.";
  for (const auto& c : {first(), second()}) {
    const bool v2 = c.pre_width > 0;
    const auto saved = make(c, 5);
    write(file.path, public_tensors(saved, unit, v2 ? shared : unit));
    memory loaded(c, rng_key{9});
    prepack(loaded);
    EXPECT_GT((output_of(loaded) - output_of(saved)).norm(), 1e-3);
    import_ultra_mem(safetensors_file(file.path), loaded, {.prefix = unit, .table_prefix = v2 ? shared : ""});
    EXPECT_LT((output_of(loaded) - output_of(saved)).cwiseAbs().maxCoeff(), 1e-13 * std::max(1.0, output_of(saved).norm()));
    EXPECT_EQ(loaded.search.u, saved.search.u);  // read, not derived from the cores
    EXPECT_EQ(loaded.search.t, saved.search.t);
    EXPECT_EQ(loaded.expansion.permutation, saved.expansion.permutation);

    memory other(c, rng_key{9});
    const matrix<double> values = other.expansion.values.view().map();
    import_ultra_mem(safetensors_file(file.path), other, {.prefix = unit, .table_prefix = v2 ? shared : "", .values = false});
    EXPECT_EQ(matrix<double>(other.expansion.values.view().map()), values);
  }
}

TEST(ultra_mem_checkpoints, zero_singular_vectors_are_derived_or_refused) {
  const temporary_file file;
  const auto saved = make(first(), 5);
  auto all = public_tensors(saved, "", "");
  for (const char* name : {"tucker_core_u", "tucker_core_v"}) std::fill(all[name].second.begin(), all[name].second.end(), 0.0);
  write(file.path, all);
  memory loaded(first(), rng_key{9});
  import_ultra_mem(safetensors_file(file.path), loaded, {});
  EXPECT_NEAR(loaded.search.u.row(0).norm(), 1, 1e-12);
  EXPECT_THROW(import_ultra_mem(safetensors_file(file.path), loaded, {.derive_vectors = false}), io_error);
}

TEST(ultra_mem_checkpoints, bad_checkpoints_are_refused_in_a_sentence_and_change_nothing) {
  const temporary_file file;
  const auto saved = make(first(), 5);
  const auto refused = [&](const std::string& sentence, auto&& spoil) {
    auto all = public_tensors(saved, "", "");
    spoil(all);
    write(file.path, all);
    memory loaded(first(), rng_key{9});
    const auto before = output_of(loaded);
    try {
      import_ultra_mem(safetensors_file(file.path), loaded, {});
      FAIL() << sentence;
    } catch (const io_error& e) {
      EXPECT_NE(std::string(e.what()).find(sentence), std::string::npos) << e.what();
    }
    EXPECT_EQ(output_of(loaded), before);
  };
  refused("tucker_core_u': expected shape [1, 2, 1, 3], found no tensor of that name (the leading singular vectors are state", [](auto& all) { all.erase("tucker_core_u"); });
  refused("tucker_core_v': expected shape", [](auto& all) { all.erase("tucker_core_v"); });
  refused("shuffle_index': expected shape", [](auto& all) { all.erase("shuffle_index"); });
  refused("shuffle_index': not a permutation: ",
          [](auto& all) { all["shuffle_index"].second[3] = all["shuffle_index"].second[4]; });
  refused("shuffle_index': not a permutation: 7 goes to 100, outside 0 .. 99",
          [](auto& all) { all["shuffle_index"].second[7] = 100; });
  refused("shuffle_index': not a permutation: 7 goes to -1", [](auto& all) { all["shuffle_index"].second[7] = -1; });
  refused("keys': expected shape [2, 2, 10, 6, 3], found [2, 2, 10, 3, 6]", [](auto& all) { all["keys"].first = {2, 2, 10, 3, 6}; });
  refused("tensor 'unheard_of': expected no tensor of this name", [](auto& all) { all["unheard_of"] = {{1}, {0.0}}; });
}

TEST(ultra_mem_checkpoints, what_tools_add_does_not_matter_and_what_is_let_pass_is_reported) {
  const temporary_file file;
  const auto saved = make(first(), 5);
  auto all = public_tensors(saved, "module.unit._orig_mod.", "module.unit._orig_mod.");
  all["module.unit.more"] = {{1}, {0.0}};
  all["module.elsewhere"] = {{1}, {0.0}};  // not under the prefix
  write(file.path, all);
  memory loaded(first(), rng_key{9});
  EXPECT_THROW(import_ultra_mem(safetensors_file(file.path), loaded, {.prefix = "unit."}), io_error);
  std::vector<std::string> aside;
  import_ultra_mem(safetensors_file(file.path), loaded, {.prefix = "unit.", .strict = false, .left_aside = &aside});
  EXPECT_EQ(aside, std::vector<std::string>{"module.unit.more"});
  EXPECT_LT((output_of(loaded) - output_of(saved)).cwiseAbs().maxCoeff(),
            1e-13 * std::max(1.0, output_of(saved).norm()));
}

TEST(ultra_mem_checkpoints, our_own_files_keep_the_state) {
  const temporary_file file;
  auto saved = make(first(), 5);
  saved.search.u *= -1;
  saved.search.t *= -1;
  state_writer writer;
  writer.add_model(saved);
  writer.write(file.path);
  memory loaded(first(), rng_key{9});
  state_reader reader(file.path);
  reader.add_model(loaded);
  reader.load();
  EXPECT_EQ(output_of(loaded), output_of(saved));
  EXPECT_EQ(loaded.search.u, saved.search.u);
  EXPECT_EQ(loaded.expansion.permutation, saved.expansion.permutation);
}

}  // namespace ultra_mem_checkpoints_tests
