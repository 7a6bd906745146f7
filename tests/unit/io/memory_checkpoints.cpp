#include "lithe/io/memory_checkpoints.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include "lithe/layers/memory/memory_presets.hpp"

namespace memory_checkpoints_tests {

using namespace lithe;
using memory = product_key_memory<double>;

struct temporary_file {
  std::filesystem::path path = std::filesystem::temp_directory_path() / concat("lithe_memory_", ::getpid(), ".safetensors");
  ~temporary_file() { std::filesystem::remove(path); }
};

/// A layer's tensors under public names, with a prefix; `change` may spoil them.
void write_public(const std::filesystem::path& path, memory_code code, const memory& m, const std::string& prefix, const std::string& leave_out = "",
                  const std::string& add = "", const std::string& whole_numbers = "") {
  std::map<std::string, std::pair<std::vector<index_t>, std::vector<double>>> all;
  visit_public(
      code, m,
      [&](const public_rows& p, const auto& t) {
        if (t.rows() * t.cols() == 0 || p.name == leave_out) return;
        auto& [shape, numbers] = all[prefix + p.name];
        shape = p.shape;
        std::size_t size = 1;
        for (const index_t n : shape) size *= static_cast<std::size_t>(n);
        numbers.resize(size);
        std::vector<double> row(static_cast<std::size_t>(t.cols()));
        for (index_t i = 0; i < t.rows(); ++i) {
          if constexpr (requires { t.read_row(i, row); })
            t.read_row(i, row);
          else
            for (index_t j = 0; j < t.cols(); ++j) row[static_cast<std::size_t>(j)] = static_cast<double>(t(i, j));
          for (index_t j = 0; j < t.cols(); ++j)
            numbers[static_cast<std::size_t>(p.row(i) * t.cols() + j)] = row[static_cast<std::size_t>(j)] - p.offset;
        }
      },
      m);
  if (!add.empty()) all[prefix + add] = {{1}, {0.0}};
  safetensors_writer file;
  std::vector<std::int64_t> slots;  // lives until the write
  for (const auto& [name, tensor] : all)
    if (name.ends_with("head_permutations")) {
      slots.assign(tensor.second.begin(), tensor.second.end());
      file.add<std::int64_t>(name, tensor.first, slots);
    } else if (name == prefix + whole_numbers) {
      slots.assign(tensor.second.size(), 1);
      file.add<std::int64_t>(name, tensor.first, slots);
    } else {
      file.add<double>(name, tensor.first, tensor.second);
    }
  file.write(path);
}

matrix<double> output_of(const memory& m) {
  matrix<double> x(5, m.config.inputs), y(5, m.config.outputs);
  fill_uniform<double>(x, 1.0, {3});
  m.forward(x, y, {});
  return y;
}

product_key_memory_config smaller(product_key_memory_config c) {
  c.heads = 2;
  c.sub_keys = 7;
  c.key_width = 8;
  c.top_k = 3;
  return c;
}

TEST(memory_checkpoints, every_code_loads_by_its_public_names) {
  for (const auto& [code, config] : {std::pair{memory_code::xlm_notebook, xlm_memory(10)}, std::pair{memory_code::xlm, xlm_memory(10)},
                                     std::pair{memory_code::xlm_grouped, xlm_memory(10)}, std::pair{memory_code::memory_layers, memory_plus(10)},
                                     std::pair{memory_code::lucidrains_pkm, lucidrains_memory(10)},
                                     std::pair{memory_code::lucidrains_peer, peer_experts(10)}}) {
    auto c = smaller(config);
    if (code == memory_code::xlm_grouped) {
      c.query.per_group = true;
      c.query.hidden = {5};
    }
    const memory from(c, {1});
    for (const char* prefix : {"a.", "module.a."}) {
      const temporary_file file;
      write_public(file.path, code, from, prefix);
      memory to(c, {2});
      to.keys.keys.setZero();  // all memories start from the same keys
      EXPECT_NE(output_of(from), output_of(to));
      import_memory(code, safetensors_file(file.path), "a.", to);
      EXPECT_EQ(output_of(from), output_of(to)) << static_cast<int>(code);
    }
  }
}

/// XLM makes one map of the networks of all groups when they have no hidden layer: the same numbers as one network of all queries.
TEST(memory_checkpoints, networks_of_groups_without_hidden_layers_are_one_map) {
  auto c = smaller(xlm_memory(10));
  c.query.norm = query_normalisation::batch;
  const memory from(c, {1});
  const temporary_file file;
  write_public(file.path, memory_code::xlm, from, "a.");
  c.query.per_group = true;
  memory to(c, {2});
  to.keys.keys.setZero();
  import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to);
  EXPECT_LT((output_of(from) - output_of(to)).cwiseAbs().maxCoeff(), 1e-14);
}

TEST(memory_checkpoints, missing_foreign_and_unknown_tensors_are_named_and_nothing_is_loaded) {
  const temporary_file file;
  const auto c = smaller(xlm_memory(10));
  const memory from(c, {1});
  memory to(c, {2});
  const auto before = output_of(to);
  const auto message = [&](bool strict = true) -> std::string {
    try {
      import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to, strict);
    } catch (const io_error& e) {
      return std::string(e.what()).substr(file.path.string().size());
    }
    return "";
  };
  write_public(file.path, memory_code::xlm, from, "a.", "keys");
  EXPECT_EQ(message(), ": tensor 'a.keys': expected shape [2, 2, 7, 4], found no tensor of that name");
  auto other = c;
  other.sub_keys = 8;
  write_public(file.path, memory_code::xlm, memory(other, {1}), "a.");
  EXPECT_EQ(message(), ": tensor 'a.keys': expected shape [2, 2, 7, 4], found [2, 2, 8, 4]");
  write_public(file.path, memory_code::xlm, from, "a.", "", "surprise");
  EXPECT_EQ(message(),
            ": tensor 'a.surprise': expected no tensor of this name; to pass it over would change the result");
  write_public(file.path, memory_code::xlm, from, "a.", "", "", "values.weight");
  EXPECT_EQ(message(), ": tensor 'a.values.weight': expected floating-point numbers, found I64");
  EXPECT_EQ(output_of(to), before);
  write_public(file.path, memory_code::xlm, from, "a.", "", "query_proj.query_mlps.1.num_batches_tracked");
  EXPECT_EQ(message(), "");
  write_public(file.path, memory_code::xlm, from, "a.", "", "surprise");
  EXPECT_EQ(message(false), "");
  EXPECT_NE(output_of(to), before);
}

TEST(memory_checkpoints, a_shuffle_that_is_no_permutation_is_named_and_nothing_is_loaded) {
  const temporary_file file;
  auto c = smaller(xlm_memory(10));
  c.shuffle_slots = true;
  memory to(c, {2});
  const auto before = output_of(to);
  for (const std::int64_t slot : {std::int64_t{-1}, std::int64_t{49}, std::int64_t{3}}) {
    memory from(c, {1});
    from.permutation(1, 7) = slot == 3 ? from.permutation(1, 3) : slot;
    write_public(file.path, memory_code::xlm, from, "a.");
    try {
      import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to);
      ADD_FAILURE() << slot;
    } catch (const io_error& e) {
      EXPECT_TRUE(std::string(e.what()).starts_with(file.path.string() + ": tensor 'a.head_permutations': not a permutation: ")) << e.what();
    }
    EXPECT_EQ(output_of(to), before);
  }
}

TEST(memory_checkpoints, what_is_left_aside_is_reported) {
  const temporary_file file;
  const auto c = smaller(xlm_memory(10));
  const memory from(c, {1});
  memory to(c, {2});
  std::vector<std::string> aside{"of an earlier import"};
  write_public(file.path, memory_code::xlm, from, "a.");
  import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to, true, true, &aside);
  EXPECT_TRUE(aside.empty());
  write_public(file.path, memory_code::xlm, from, "module.a.", "", "query_proj.query_mlps.1.num_batches_tracked");
  import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to, true, true, &aside);
  EXPECT_EQ(aside, std::vector<std::string>{"module.a.query_proj.query_mlps.1.num_batches_tracked"});
  write_public(file.path, memory_code::xlm, from, "a.", "", "surprise");
  import_memory(memory_code::xlm, safetensors_file(file.path), "a.", to, false, true, &aside);
  EXPECT_EQ(aside, std::vector<std::string>{"a.surprise"});
}

TEST(memory_checkpoints, what_tools_add_to_names_does_not_matter) {
  const auto c = smaller(xlm_memory(10));
  const memory from(c, {1});
  for (const char* prefix : {"_orig_mod.a.", "module._orig_mod.a.", "a._orig_mod.", "base_model.model.a.",
                             "_fsdp_wrapped_module.a._fsdp_wrapped_module."})
    for (const char* asked : {"a.", prefix}) {
      const temporary_file file;
      write_public(file.path, memory_code::xlm, from, prefix);
      memory to(c, {2});
      import_memory(memory_code::xlm, safetensors_file(file.path), asked, to);
      EXPECT_EQ(output_of(from), output_of(to)) << prefix << " " << asked;
    }
}

/// x √D / max(|x|, 1e-12) (γ + 1), the norm of lucidrains/PEER-pytorch, by plain loops.
matrix<double> peer_normalised(const matrix<double>& x, const matrix<double>& weight) {
  matrix<double> y = x;
  for (index_t t = 0; t < x.rows(); ++t) {
    const double length = std::max(x.row(t).norm(), 1e-12);
    for (index_t j = 0; j < x.cols(); ++j)
      y(t, j) = x(t, j) / length * std::sqrt(static_cast<double>(x.cols())) * weight(0, j);
  }
  return y;
}

/// Where inputs are small, a norm's constant shows. `plain` has no norm and gets what the published code's norm makes
/// of the input.
TEST(memory_checkpoints, experts_normalise_short_inputs_as_the_published_code_does) {
  auto c = smaller(peer_experts(10));
  const memory from(c, {1});
  auto hand = c;
  hand.input_epsilon = 1e-5;  // a configuration that was not made from the preset
  const temporary_file file;
  write_public(file.path, memory_code::lucidrains_peer, from, "");
  memory imported(hand, {2});
  import_memory(memory_code::lucidrains_peer, safetensors_file(file.path), "", imported);
  EXPECT_EQ(imported.config.input_epsilon, c.input_epsilon);
  memory plain = from;
  plain.config.input_norm = memory_input_norm::none;
  product_key_memory<float> single(c, {1});
  for (const double deviation : {1.0, 0.02, 0.005, 1e-4, 1e-9, 0.0}) {
    matrix<double> x(5, 10), y(5, 10), z(5, 10);
    fill_normal<double>(x, deviation, {3});
    plain.forward(peer_normalised(x, from.rms.weight), z, {});
    const double share = 1e-12 / std::max(deviation, 1e-12), bound = share * share + 1e-12;  // of ε in the mean square
    for (const memory& m : {from, imported}) {
      m.forward(x, y, {});
      EXPECT_LT((y - z).cwiseAbs().maxCoeff(), bound) << deviation;
    }
    const matrix<float> short_x = x.cast<float>();
    matrix<float> short_y(5, 10);
    single.forward(short_x, short_y, {});
    EXPECT_LT((short_y.cast<double>() - z).cwiseAbs().maxCoeff(), 1e-4) << deviation;  // single precision
  }
}

TEST(memory_checkpoints, queries_are_normalised_with_the_published_constants) {
  for (const auto kind : {query_normalisation::layer, query_normalisation::rms, query_normalisation::batch})
    for (const double epsilon : {1e-5, 1e-6})
      for (const double deviation : {0.02, 0.005, 1e-4}) {
        query_config c{.bias = false, .norm = kind, .epsilon = epsilon};
        const query_network<double> q(6, 1, 2, 3, c, {1});
        matrix<double> x(4, 6), y(4, 6);
        fill_normal<double>(x, deviation, {3});
        q.forward(x, y, {});
        matrix<double> z = x * q.networks[0].maps[0].weight.transpose();
        for (index_t t = 0; t < 4; ++t)
          for (index_t half = 0; half < 2; ++half) {
            auto part = z.row(t).segment(3 * half, 3).array();
            const double mean = kind == query_normalisation::layer ? part.mean() : 0;
            const double square = kind == query_normalisation::batch
                                      ? 1
                                      : (part - mean).square().mean();  // the running variance starts at 1
            part = ((part - mean) / std::sqrt(square + epsilon)).eval();
          }
        EXPECT_LT((y - z).cwiseAbs().maxCoeff(), 1e-12) << static_cast<int>(kind) << " " << epsilon << " " << deviation;
      }
  EXPECT_THROW(query_network<double>(6, 1, 2, 3, {.norm = query_normalisation::rms, .epsilon = -1}, {1}), config_error);
  auto c = smaller(peer_experts(10));
  c.input_epsilon = 0;
  EXPECT_THROW(memory(c, {1}), config_error);
}

}  // namespace memory_checkpoints_tests
