// Hugging Face Reformers: configurations, names, what is refused; and the model that they become.
#include "lithe/io/reformer_checkpoints.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "lithe/training/gradient_check.hpp"
#include "lithe/training/reversible_loss.hpp"

namespace reformer_checkpoints_tests {

using namespace lithe;

reformer_config small() {
  reformer_config c;
  c.vocabulary = 11;
  c.features = 8;
  c.heads = 2;
  c.head_width = 4;
  c.hidden = 12;
  c.kind = activation::gelu;
  c.layers = {reformer_layer::local, reformer_layer::lsh};
  c.position_shape = {4, 8};
  c.position_widths = {2, 6};
  c.causal = true;
  c.local_chunk = 4;
  c.lsh_chunk = 4;
  c.rounds = 2;
  c.buckets = {4};
  c.deviation = 0.4;
  return c;
}

struct temporary {
  std::filesystem::path path = std::filesystem::temp_directory_path() / concat("lithe_reformer_", ::getpid(), ".safetensors");
  ~temporary() { std::filesystem::remove(path); }
};

/// Writes a model with changed names, shapes or numbers: change(name, shape, numbers) returns false to leave the tensor out.
template <class Change>
void write_changed(const std::filesystem::path& path, const reformer<double>& m, Change change, const std::function<void(safetensors_writer&)>& more = {},
                   dtype as = dtype::f64) {
  std::vector<std::pair<std::string, std::vector<index_t>>> names;
  std::vector<std::vector<double>> numbers;
  visit_reformer(
      m, "reformer.",
      [&](std::string name, std::vector<index_t> shape, const matrix<double>& t) {
        std::vector<double> n(t.data(), t.data() + t.size());
        if (!change(name, shape, n)) return;
        names.emplace_back(name, shape);
        numbers.push_back(n);
      },
      m);
  safetensors_writer file;
  for (std::size_t i = names.size(); i-- > 0;)  // in another order
    file.add<double>(names[i].first, names[i].second, std::span<const double>(numbers[i]), as);
  if (more) more(file);
  file.write(path);
}
constexpr auto unchanged = [](const std::string&, const std::vector<index_t>&, const std::vector<double>&) { return true; };

/// Among the tensors that have a public name: all parameters.
index_t differences(const reformer<double>& a, const reformer<double>& b) {
  index_t n = 0;
  for_each_tensor([&](const std::string&, role kind, const auto& p,
                      const auto& q) { n += kind == role::parameter ? (p.array() != q.array()).count() : 0; },
                  a, b);
  return n;
}

std::string message(const std::filesystem::path& path, reformer<double>& into) {
  const reformer<double> before = into;
  try {
    import_reformer(safetensors_file(path), into);
  } catch (const io_error& e) {
    EXPECT_EQ(differences(before, into), 0);  // nothing half-loaded
    return e.what();
  }
  return "no error";
}

void expect_part(const std::string& text, const std::string& part) { EXPECT_NE(text.find(part), std::string::npos) << text; }

TEST(reformer_checkpoints, names_are_the_public_ones_and_come_in_any_order) {
  temporary t;
  const auto a = make_reformer<double>(small(), {1});
  auto b = make_reformer<double>(small(), {2});
  EXPECT_GT(differences(a, b), 100);
  write_changed(t.path, a, unchanged);
  import_reformer(safetensors_file(t.path), b);
  EXPECT_EQ(differences(a, b), 0);

  const safetensors_file file(t.path);
  for (const auto& [name, shape] : std::map<std::string, std::vector<index_t>>{
           {"reformer.embeddings.word_embeddings.weight", {11, 8}},
           {"reformer.embeddings.position_embeddings.weights.0", {4, 1, 2}},
           {"reformer.embeddings.position_embeddings.weights.1", {1, 8, 6}},
           {"reformer.encoder.layers.0.attention.layer_norm.bias", {8}},
           {"reformer.encoder.layers.0.attention.self_attention.key.weight", {8, 8}},
           {"reformer.encoder.layers.1.attention.self_attention.query_key.weight", {8, 8}},
           {"reformer.encoder.layers.1.attention.output.dense.weight", {8, 8}},
           {"reformer.encoder.layers.1.feed_forward.dense.dense.weight", {12, 8}},
           {"reformer.encoder.layers.1.feed_forward.output.dense.bias", {8}},
           {"reformer.encoder.layer_norm.weight", {16}},
           {"lm_head.decoder.weight", {11, 16}},
           {"lm_head.bias", {11}}})
    EXPECT_EQ(file.info(name).shape, shape) << name;
  EXPECT_EQ(file.names().size(), 3U + 12 + 11 + 2 + 2);
}

TEST(reformer_checkpoints, saving_and_loading_keeps_every_byte) {
  temporary t;
  const auto a = make_reformer<double>(small(), {1});
  auto b = make_reformer<double>(small(), {2});
  export_reformer(t.path, a, {{"config", "{}"}});
  import_reformer(safetensors_file(t.path), b);
  EXPECT_EQ(differences(a, b), 0);
}

TEST(reformer_checkpoints, bare_models_aliases_constants_and_short_numbers_load) {
  temporary t;
  const auto a = make_reformer<double>(small(), {1});
  const auto fresh = make_reformer<double>(small(), {2});
  auto b = fresh;
  write_changed(t.path, a, [](std::string& name, auto&, auto&) {
    if (name.starts_with("lm_head.")) return false;
    name = name.substr(9);
    return true;
  });
  import_reformer(safetensors_file(t.path), b);
  EXPECT_EQ(std::get<2>(b.head.layers).weight, std::get<2>(fresh.head.layers).weight);
  EXPECT_EQ(std::get<0>(b.head.layers).weight, std::get<0>(a.head.layers).weight);
  EXPECT_EQ(b.words.weight, a.words.weight);

  b = fresh;
  const std::vector<double> number{-1e5};
  write_changed(
      t.path, a,
      [](std::string& name, auto&, auto& n) {
        if (name == "lm_head.bias") {
          name = "lm_head.decoder.bias";
          n[3] = 5;
        }
        return true;
      },
      [&](safetensors_writer& file) {
        for (const char* buffer : {"self_mask_value_float16", "self_mask_value_float32", "mask_value_float16", "mask_value_float32"})
          file.add<double>(concat("reformer.encoder.layers.1.attention.self_attention.", buffer), {}, std::span<const double>(number));
      });
  import_reformer(safetensors_file(t.path), b);
  EXPECT_EQ(std::get<2>(b.head.layers).bias(0, 3), 5);

  b = fresh;
  write_changed(t.path, a, unchanged, {}, dtype::bf16);
  import_reformer(safetensors_file(t.path), b);
  EXPECT_LT((b.words.weight - a.words.weight).cwiseAbs().maxCoeff(), std::ldexp(a.words.weight.cwiseAbs().maxCoeff(), -8));  // 8 bits of fraction
  EXPECT_GT(differences(a, b), 100);
}

TEST(reformer_checkpoints, prefixes_and_heads_of_other_tasks) {
  temporary t;
  const auto a = make_reformer<double>(small(), {1});
  const auto fresh = make_reformer<double>(small(), {2});
  for (const auto& [before, prefix] : {std::pair{"module.", ""},
                                       {"_orig_mod.", ""},
                                       {"net.", "net."},
                                       {"module.net.", "net."},
                                       {"net.", "module.net."}}) {
    auto b = fresh;
    write_changed(t.path, a, [&, &put = before](std::string& name, auto&, auto&) {
      name = put + name;
      return true;
    });
    import_reformer(safetensors_file(t.path), b, prefix);
    EXPECT_EQ(differences(a, b), 0) << before << prefix;
  }
  auto b = fresh;
  const std::vector<double> numbers(4);
  std::vector<std::string> aside;
  write_changed(
      t.path, a, [](std::string& name, auto&, auto&) { return !name.starts_with("lm_head."); },
      [&](safetensors_writer& file) {
        file.add<double>("classifier.dense.bias", {4}, std::span<const double>(numbers));
      });
  import_reformer(safetensors_file(t.path), b, "", &aside);
  EXPECT_EQ(aside, std::vector<std::string>{"classifier.dense.bias"});
  EXPECT_EQ(std::get<2>(b.head.layers).weight, std::get<2>(fresh.head.layers).weight);
  EXPECT_EQ(b.words.weight, a.words.weight);
  b = fresh;
  write_changed(t.path, a, [](std::string& name, auto&, auto&) { return !name.starts_with("lm_head."); });
  expect_part(message(t.path, b),
              "tensor 'lm_head.decoder.weight': expected shape [11, 16], found no tensor of that name");
}

TEST(reformer_checkpoints, numbers_that_are_not_finite_are_not_exported) {
  temporary t;
  auto a = make_reformer<double>(small(), {1});
  a.words.weight(2, 3) = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(export_reformer(t.path, a), config_error);
  EXPECT_FALSE(std::filesystem::exists(t.path));
}

TEST(reformer_checkpoints, each_wrong_name_is_reported_and_nothing_is_loaded) {
  temporary t;
  const auto a = make_reformer<double>(small(), {1});
  auto b = make_reformer<double>(small(), {2});
  const std::string key = "reformer.encoder.layers.0.attention.self_attention.key.weight";
  write_changed(t.path, a, [&](std::string& name, auto&, auto&) { return name != key; });
  expect_part(message(t.path, b), "tensor '" + key + "': expected shape [8, 8], found no tensor of that name");
  write_changed(t.path, a, [&](std::string& name, auto& shape, auto&) {
    if (name == key) shape = {4, 16};
    return true;
  });
  expect_part(message(t.path, b), "tensor '" + key + "': expected shape [8, 8], found [4, 16]");
  const std::vector<double> one{1};
  write_changed(t.path, a, unchanged, [&](safetensors_writer& file) { file.add<double>("reformer.encoder.layers.7.x", {1}, std::span<const double>(one)); });
  expect_part(message(t.path, b), "tensor 'reformer.encoder.layers.7.x': expected no tensor of this name");
  const std::vector<double> bias(11, 3);
  write_changed(t.path, a, unchanged, [&](safetensors_writer& file) { file.add<double>("lm_head.decoder.bias", {11}, std::span<const double>(bias)); });
  expect_part(message(t.path, b), "tensor 'lm_head.decoder.bias': expected the numbers of 'lm_head.bias'");
  const std::vector<std::int64_t> integers(8, 1);
  write_changed(
      t.path, a, [](std::string& name, auto&, auto&) { return name != "reformer.encoder.layers.0.attention.layer_norm.bias"; },
      [&](safetensors_writer& file) { file.add<std::int64_t>("reformer.encoder.layers.0.attention.layer_norm.bias", {8}, std::span<const std::int64_t>(integers)); });
  expect_part(message(t.path, b), "expected floating-point numbers, found I64");

  auto other = small();  // the layers' kinds come from the configuration, and must be those of the names
  other.layers = {reformer_layer::lsh, reformer_layer::lsh};
  auto c = make_reformer<double>(other, {1});
  write_changed(t.path, a, unchanged);
  expect_part(message(t.path, c), "tensor 'reformer.encoder.layers.0.attention.self_attention.query_key.weight': expected shape [8, 8], found no tensor");
  {
    std::ofstream file(t.path, std::ios::binary | std::ios::in | std::ios::ate);
    std::filesystem::resize_file(t.path, std::filesystem::file_size(t.path) - 100);
  }
  EXPECT_THROW(safetensors_file{t.path}, io_error);
}

TEST(reformer_checkpoints, configurations_are_read_with_the_published_defaults) {
  const auto d = read_reformer_config(nlohmann::json::object());
  EXPECT_EQ(d.model.layers.size(), 6U);
  EXPECT_EQ(d.model.position_shape, (std::vector<index_t>{64, 64}));
  EXPECT_EQ(d.model.position_widths, (std::vector<index_t>{64, 192}));
  EXPECT_TRUE(d.model.buckets.empty());
  EXPECT_EQ(d.end_token, 2);
  const auto s = read_reformer_config(nlohmann::json::parse(
      R"({"hidden_act": "gelu", "attn_layers": ["lsh"], "axial_pos_embds": false, "max_position_embeddings": 96, "hidden_size": 24, "num_buckets": [4, 8],
          "num_hashes": 3, "is_decoder": true, "pad_token_id": null, "chunk_size_lm_head": 5, "chunk_size_feed_forward": 7, "layer_norm_eps": 1e-6,
          "lsh_attn_chunk_length": 16, "lsh_num_chunks_before": 2, "lsh_num_chunks_after": 1, "hidden_dropout_prob": 0.25, "hash_seed": null})"));
  EXPECT_EQ(s.model.kind, activation::gelu);
  EXPECT_EQ(s.model.layers, std::vector<reformer_layer>{reformer_layer::lsh});
  EXPECT_EQ(s.model.position_shape, std::vector<index_t>{96});
  EXPECT_EQ(s.model.position_widths, std::vector<index_t>{24});
  EXPECT_TRUE(s.model.buckets == (bucket_factors{4, 8}));
  EXPECT_TRUE(s.model.causal);
  EXPECT_EQ(std::tuple(s.model.rounds, s.model.lsh_chunk, s.model.lsh_before, s.model.lsh_after, s.head_chunk, s.model.feed_forward_chunk),
            (std::tuple<index_t, index_t, index_t, index_t, index_t, index_t>{3, 16, 2, 1, 5, 7}));
  EXPECT_DOUBLE_EQ(s.model.dropout, 0.25);
  EXPECT_DOUBLE_EQ(s.model.norm_epsilon, 1e-6);

  const auto refused = [](const char* text, const char* part) {
    try {
      (void)read_reformer_config(nlohmann::json::parse(text));
      ADD_FAILURE() << part;
    } catch (const io_error& e) {
      expect_part(e.what(), part);
    }
  };
  refused(R"({"hidden_size": "large"})", "key 'hidden_size': expected an integer, found \"large\"");
  refused(R"({"num_hashes": 1.5})", "key 'num_hashes': expected an integer");
  refused(R"({"attn_layers": ["local", "full"]})", "key 'attn_layers': expected local or lsh, found 'full'");
  refused(R"({"attn_layers": 3})", "key 'attn_layers': expected another type, found 3");
  refused(R"({"hidden_act": "tanh"})", "key 'hidden_act': expected relu, gelu, gelu_new, silu or swish, found 'tanh'");
  refused(R"({"axial_pos_shape": [64.5, 64]})", "key 'axial_pos_shape': expected an integer, found 64.5");
  refused(R"({"pad_token_id": 4294967298})", "key 'pad_token_id': too large: 4294967298");
  refused(R"({"num_buckets": [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]})", "key 'num_buckets': expected at most 16 factors, found 17");
  EXPECT_EQ(read_reformer_config(nlohmann::json::parse(R"({"attn_layers": null})")).model.layers.size(), 6U);
  refused("[]", "expected a JSON object, found a JSON array");
  refused(R"({"model_type": "bert"})", "key 'model_type': expected one of reformer, found 'bert'");
  auto c = small();
  c.position_widths = {2, 5};
  EXPECT_THROW((void)make_reformer<double>(c, {}), config_error);
  c = small();
  c.rounds = 0;
  EXPECT_THROW((void)make_reformer<double>(c, {}), config_error);
}

TEST(reformer_checkpoints, public_models_have_the_public_numbers_of_parameters) {
  const auto count = [](reformer_settings s) {
    s.model.deviation = s.model.position_deviation = 0;  // nothing to draw
    return count_parameters(make_reformer<float>(s.model, {}));
  };
  const auto crime = read_reformer_config(nlohmann::json::parse(
      R"({"attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"], "hidden_size": 256, "num_attention_heads": 2, "attention_head_size": 64,
          "feed_forward_size": 512, "axial_pos_shape": [512, 1024], "axial_pos_embds_dim": [64, 192], "max_position_embeddings": 524288, "vocab_size": 320,
          "num_buckets": [64, 128], "num_hashes": 1, "is_decoder": true})"));
  EXPECT_EQ(count(crime), 2748224);
  const auto enwik8 = read_reformer_config(nlohmann::json::parse(
      R"({"attn_layers": ["local", "local", "lsh", "local", "local", "local", "lsh", "local", "local", "local", "lsh", "local"], "hidden_size": 1024,
          "num_attention_heads": 8, "attention_head_size": 128, "feed_forward_size": 4096, "axial_pos_shape": [128, 512],
          "axial_pos_embds_dim": [256, 768], "max_position_embeddings": 65536, "vocab_size": 258, "local_attn_chunk_length": 128,
          "lsh_attn_chunk_length": 256, "num_buckets": 512, "num_hashes": 4, "is_decoder": true, "hidden_dropout_prob": 0.2})"));
  EXPECT_EQ(count(enwik8), 149182722);
}

struct sentence {
  std::vector<token_t> ids, targets;
  std::vector<index_t> offsets;
  explicit sentence(std::vector<index_t> o) : offsets(std::move(o)) {
    for (index_t i = 0; i < offsets.back(); ++i) {
      ids.push_back(static_cast<token_t>(uniform({3}, static_cast<std::uint64_t>(i)) * 11));
      targets.push_back(i % 5 == 0 ? -100 : static_cast<token_t>(uniform({4}, static_cast<std::uint64_t>(i)) * 11));
    }
  }
};

TEST(reformer, loss_by_chunks_equals_forward_loss_and_backward) {
  auto c = small();
  c.layers = {reformer_layer::lsh, reformer_layer::local, reformer_layer::lsh};
  c.feed_forward_chunk = 5;
  const auto m = make_reformer<double>(c, {1});
  const sentence text({0, 13, 13, 14, 31});
  workspace work;
  context ctx{.work = &work, .key = {7}, .rows = {text.offsets}, .train = true};
  record_of<reformer<double>> r;
  matrix<double> logits(31, 11);
  auto g = make_gradient(m);
  m.forward(text.ids, logits, r, ctx);
  const double loss = cross_entropy<double>(logits, text.targets, {}, logits, ctx).loss;
  m.backward(text.ids, r, logits, nothing{}, g, ctx);
  for (const index_t chunk : {1, 7, 31, 1024}) {
    auto h = make_gradient(m);
    EXPECT_NEAR(reversible_loss(m, text.ids, text.targets, {}, h, ctx, chunk).loss, loss, 1e-13);
    double worst = 0, size = 0;
    for_each_tensor(
        [&](const std::string&, role, const auto& p, const auto& a, const auto& b) {
          for (index_t i = 0; i < p.rows(); ++i)
            for (index_t j = 0; j < p.cols(); ++j) {
              worst = std::max(worst, std::abs(a(i, j) - b(i, j)));
              size = std::max(size, std::abs(a(i, j)));
            }
        },
        m, g, h);
    EXPECT_LT(worst, 1e-11 * size) << chunk;  // sums in another order through three blocks
    EXPECT_GT(size, 1e-3);
  }
}

TEST(reformer, gradients_with_the_buckets_held) {
  auto c = small();
  c.feed_forward_chunk = 5;
  const auto m = make_reformer<double>(c, {1});
  const sentence text({0, 13, 13, 14, 31});
  context ctx{.key = {7}, .rows = {text.offsets}, .train = true};
  const lithe::reformer<double>& model = m;
  const auto xy = [&] {
    matrix<double> x(31, 16);
    model.embed(text.ids, x, ctx);
    return x;
  }();
  // The blocks: central differences with h = 1e-5 are good to 1e-10; the checker's floor is 1e-3.
  const auto report = gradient_check(m.blocks, xy, ctx);
  EXPECT_LT(report.worst(), 2e-6) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
}

TEST(reformer, fused_attention_in_reverse_equals_the_stored_stack) {
  auto c = small();
  c.layers.assign(12, reformer_layer::lsh);
  const auto m = make_reformer<double>(c, {1});
  const sentence text({0, 13, 13, 14, 31});
  const context ctx{.key = {7}, .rows = {text.offsets}, .train = true};
  matrix<double> x(31, 16), y(31, 16), z(31, 16), dy(31, 16), dx(31, 16), dz(31, 16);
  m.embed(text.ids, x, ctx);
  fill_normal<double>(dy, 1.0, {5});
  // `stack` stores every block's input; each of its parts goes through forward and backward with whole records.
  using S = double;
  record_of<reversible_stack<one_of<reformer_local_block<S>, reformer_lsh_block<S>>>> r;
  auto g = make_gradient(m), h = make_gradient(m);
  m.blocks.forward(x, y, r, ctx);
  m.blocks.backward(x, r, dy, dx, g.blocks, ctx);
  matrix<S> a = x.leftCols(8), b = x.rightCols(8), t(31, 8);
  std::vector<std::tuple<matrix<S>, matrix<S>, record_of<pre_norm<lsh_attention<S>>>, record_of<pre_norm<feed_forward<S>>>>> saved;
  for (std::size_t i = 0; i < 12; ++i) {
    const auto& block = std::get<1>(m.blocks.blocks[i].value);
    auto& [in, between, f, q] = saved.emplace_back();
    in = b;
    std::get<0>(block.parts).forward(b, t, f, ctx.child(i).child(0));
    a += t;
    between = a;
    std::get<1>(block.parts).forward(a, t, q, ctx.child(i).child(1));
    b += t;
  }
  z << a, b;
  EXPECT_LT((y - z).cwiseAbs().maxCoeff(), 1e-12);  // heads one by one: another order of sums
  matrix<S> d1 = dy.leftCols(8), d2 = dy.rightCols(8);
  for (std::size_t i = 12; i-- > 0;) {
    const auto& block = std::get<1>(m.blocks.blocks[i].value);
    auto& to = std::get<1>(h.blocks.blocks[i].value);
    const auto& [in, between, f, q] = saved[i];
    std::get<1>(block.parts).backward(between, q, d2, t, std::get<1>(to.parts), ctx.child(i).child(1));
    d1 += t;
    std::get<0>(block.parts).backward(in, f, d1, t, std::get<0>(to.parts), ctx.child(i).child(0));
    d2 += t;
  }
  dz << d1, d2;
  EXPECT_LT((dx - dz).cwiseAbs().maxCoeff(), 1e-10 * dz.cwiseAbs().maxCoeff());
  double worst = 0, size = 0;
  for_each_tensor(
      [&](const std::string&, role, const auto& p, const auto& one, const auto& other) {
        for (index_t i = 0; i < p.rows(); ++i)
          for (index_t j = 0; j < p.cols(); ++j) {
            worst = std::max(worst, std::abs(one(i, j) - other(i, j)));
            size = std::max(size, std::abs(one(i, j)));
          }
      },
      m.blocks, g.blocks, h.blocks);
  EXPECT_LT(worst, 1e-10 * size);
  EXPECT_GT(size, 1e-2);
}

TEST(reformer, filling_up_with_hidden_tokens_changes_no_token) {
  for (const bool causal : {true, false})
    for (const index_t lsh_chunk : {4, 16})
      for (const index_t n : {5, 13}) {
        auto c = small();
        c.dropout = c.local_dropout = 0;
        c.causal = causal;
        c.lsh_chunk = lsh_chunk;
        const auto m = make_reformer<double>(c, {1});
        const sentence text({0, n});
        matrix<double> ragged(n, 11), filled(16, 11);
        m.forward(text.ids, ragged, {});
        auto ids = text.ids;
        ids.resize(16, 0);
        std::vector<std::uint8_t> mask(16, 1);
        std::fill(mask.begin() + n, mask.end(), std::uint8_t{0});
        // The published model fills 5 tokens up to 8 if that is whole chunks.
        const index_t whole = (n + reformer_padding(c) - 1) / reformer_padding(c) * reformer_padding(c);
        m.forward(std::span(ids).first(static_cast<std::size_t>(whole)), view(filled).slice_rows(0, whole),
                  {.mask = std::span<const std::uint8_t>(mask).first(static_cast<std::size_t>(whole))});
        EXPECT_LT((filled.topRows(n) - ragged).cwiseAbs().maxCoeff(), 1e-12) << causal << lsh_chunk << n;
      }
}

TEST(reformer, a_refused_decode_changes_nothing) {
  const auto m = make_reformer<double>(small(), {1});
  const sentence text({0, 9});
  auto cache = m.make_cache(1, 8), straight = m.make_cache(1, 8);
  matrix<double> y(9, 11), z(9, 11);
  m.decode(std::span(text.ids).first(6), view(y).slice_rows(0, 6), cache, {});
  EXPECT_THROW(m.decode(std::span(text.ids).last(3), view(y).slice_rows(6, 3), cache, {}), state_error);
  EXPECT_THROW(m.fill(std::span(text.ids).last(3), cache, {}), state_error);
  EXPECT_THROW(m.decode(std::span(text.ids).last(1), view(y).slice_rows(8, 1), cache, {.slots = std::vector<index_t>{1}}), index_error);
  m.decode(std::span(text.ids).subspan(6, 2), view(y).slice_rows(6, 2), cache, {});
  m.decode(std::span(text.ids).first(6), view(z).slice_rows(0, 6), straight, {});
  m.decode(std::span(text.ids).subspan(6, 2), view(z).slice_rows(6, 2), straight, {});
  EXPECT_EQ(y.topRows(8), z.topRows(8));
}

TEST(reformer, sequences_longer_than_the_grid_and_tokens_outside_the_vocabulary_are_refused) {
  const auto m = make_reformer<double>(small(), {1});
  std::vector<token_t> ids(33, 1);
  matrix<double> y(33, 11), one(1, 11);
  EXPECT_THROW(m.forward(ids, y, {}), index_error);
  EXPECT_THROW(m.forward(std::vector<token_t>{11}, one, {}), index_error);
}

TEST(reformer, a_dropout_for_a_fused_layer_belongs_into_it) {
  EXPECT_THROW(pre_norm<lsh_attention<double>>(layer_norm<double>(8), lsh_attention<double>({.inputs = 8}, {}), 0.1), config_error);
}

}  // namespace reformer_checkpoints_tests
