#include <gtest/gtest.h>
#include <unistd.h>

#include "lithe/io/attention_checkpoints_encoder.hpp"

namespace attention_checkpoints_tests {

using namespace lithe;

constexpr index_t D = 12, H = 3, F = 20;

struct temporary_file {
  std::filesystem::path path;
  explicit temporary_file(const char* name)
      : path(std::filesystem::temp_directory_path() / concat("lithe_attention_", ::getpid(), "_", name, ".safetensors")) {}
  ~temporary_file() { std::filesystem::remove(path); }
};

/// Tensors by name, as a training program would save them.
struct checkpoint {
  std::map<std::string, matrix<float>> tensors;

  void put(const std::string& name, index_t rows, index_t cols, double bound = 0.5) {
    matrix<float> m(rows, cols);
    fill_uniform<float>(m, bound, rng_key{std::hash<std::string>{}(name)});
    tensors[name] = m;
  }
  void linear(const std::string& name, index_t rows, index_t cols, bool bias = true) {
    put(name + ".weight", rows, cols);
    if (bias) put(name + ".bias", 1, rows);
  }
  void norm(const std::string& name, bool old = false) {
    put(name + (old ? ".gamma" : ".weight"), 1, D);
    put(name + (old ? ".beta" : ".bias"), 1, D);
  }
  void write(const std::filesystem::path& path) const {
    safetensors_writer out;
    for (const auto& [name, m] : tensors) out.add<float>(name, m);
    out.write(path);
  }
  [[nodiscard]] const matrix<float>& at(const std::string& name) const { return tensors.at(name); }
};

checkpoint bert(const std::string& prefix, index_t layers) {
  checkpoint c;
  c.put(prefix + "embeddings.word_embeddings.weight", 30, D);
  for (index_t i = 0; i < layers; ++i) {
    const std::string b = concat(prefix, "encoder.layer.", i, ".");
    for (const char* p : {"query", "key", "value"}) c.linear(b + "attention.self." + p, D, D);
    c.linear(b + "attention.output.dense", D, D);
    c.norm(b + "attention.output.LayerNorm", i == 0);
    c.linear(b + "intermediate.dense", F, D);
    c.linear(b + "output.dense", D, F);
    c.norm(b + "output.LayerNorm");
  }
  return c;
}
checkpoint distilbert(const std::string& prefix) {
  checkpoint c;
  const std::string b = prefix + "transformer.layer.0.";
  for (const char* p : {"q_lin", "k_lin", "v_lin", "out_lin"}) c.linear(b + "attention." + p, D, D);
  c.norm(b + "sa_layer_norm");
  c.linear(b + "ffn.lin1", F, D);
  c.linear(b + "ffn.lin2", D, F);
  c.norm(b + "output_layer_norm");
  return c;
}
checkpoint albert(const std::string& prefix) {
  checkpoint c;
  const std::string b = prefix + "encoder.albert_layer_groups.0.albert_layers.0.";
  for (const char* p : {"query", "key", "value", "dense"}) c.linear(b + "attention." + p, D, D);
  c.norm(b + "attention.LayerNorm");
  c.linear(b + "ffn", F, D);
  c.linear(b + "ffn_output", D, F);
  c.norm(b + "full_layer_layer_norm");
  return c;
}
checkpoint whisper(const std::string& prefix) {
  checkpoint c;
  for (const std::string side : {"encoder", "decoder"}) {
    const std::string b = prefix + side + ".layers.0.";
    for (const std::string part : {"self_attn", "encoder_attn"}) {
      if (side == "encoder" && part == "encoder_attn") continue;
      for (const char* p : {"q_proj", "v_proj", "out_proj"}) c.linear(b + part + "." + p, D, D);
      c.linear(b + part + ".k_proj", D, D, false);
      c.norm(b + part + "_layer_norm");
    }
    c.linear(b + "fc1", F, D);
    c.linear(b + "fc2", D, F);
    c.norm(b + "final_layer_norm");
  }
  return c;
}

matrix<double> wide(const matrix<float>& m) { return m.cast<double>(); }
matrix<double> input() {
  matrix<double> x(7, D);
  fill_uniform<double>(x, 1.0, rng_key{9});
  return x;
}

/// A post-norm block by plain loops, from names spelled out here.
matrix<double> post_norm_by_hand(const checkpoint& c, const std::string& q, const std::string& k, const std::string& v,
                                 const std::string& o, const std::string& norm1, const std::string& up,
                                 const std::string& down, const std::string& norm2, matrix<double> x, bool old,
                                 double epsilon = 1e-12, bool tanh_form = false) {
  const auto project = [&](const std::string& name, const matrix<double>& a) {
    matrix<double> y = a * wide(c.at(name + ".weight")).transpose();
    y.rowwise() += wide(c.at(name + ".bias")).row(0);
    return y;
  };
  const auto normalise = [&](const std::string& name, matrix<double> a, bool gamma) {
    for (index_t t = 0; t < a.rows(); ++t) {
      const double mean = a.row(t).mean(), variance = (a.row(t).array() - mean).square().mean();
      a.row(t) = ((a.row(t).array() - mean) / std::sqrt(variance + epsilon)).matrix();
    }
    matrix<double> y = a.array().rowwise() * wide(c.at(name + (gamma ? ".gamma" : ".weight"))).row(0).array();
    y.rowwise() += wide(c.at(name + (gamma ? ".beta" : ".bias"))).row(0);
    return y;
  };
  const matrix<double> Q = project(q, x), K = project(k, x), V = project(v, x);
  matrix<double> context = matrix<double>::Zero(x.rows(), D);
  const index_t d = D / H;
  for (index_t h = 0; h < H; ++h) {
    matrix<double> s = Q.middleCols(h * d, d) * K.middleCols(h * d, d).transpose() / std::sqrt(static_cast<double>(d));
    s = s.array().exp();
    for (index_t t = 0; t < s.rows(); ++t) s.row(t) /= s.row(t).sum();
    context.middleCols(h * d, d) = s * V.middleCols(h * d, d);
  }
  const matrix<double> h = normalise(norm1, x + project(o, context), old);
  matrix<double> u = project(up, h);
  u = u.unaryExpr([&](double a) {
    const double inner = tanh_form ? std::tanh(std::sqrt(2 / std::numbers::pi) * (a + 0.044715 * a * a * a))
                                   : std::erf(a / std::sqrt(2.0));
    return 0.5 * a * (1 + inner);
  });
  return normalise(norm2, h + project(down, u), false);
}
template <class L>
matrix<double> run(const L& l, const matrix<double>& x) {
  matrix<double> y(x.rows(), x.cols());
  l.forward(x, y, {});
  return y;
}
double difference(const matrix<double>& a, const matrix<double>& b) { return (a - b).cwiseAbs().maxCoeff(); }

using separate = attention<double>;
using shared_heads = collaborative_attention<double>;

TEST(attention_checkpoints, bert_distilbert_and_albert_load_by_their_names_with_any_prefix) {
  for (const std::string prefix : {"", "bert.", "module.bert."}) {
    const checkpoint c = bert(prefix, 2);
    const temporary_file file("bert");
    c.write(file.path);
    const auto encoder = import_encoder<separate>(safetensors_file(file.path), {.heads = H});
    ASSERT_EQ(encoder.blocks.size(), 2U);
    matrix<double> y = input();
    for (int i = 0; i < 2; ++i) {
      const std::string b = concat(prefix, "encoder.layer.", i, ".");
      y = post_norm_by_hand(c, b + "attention.self.query", b + "attention.self.key", b + "attention.self.value", b + "attention.output.dense",
                            b + "attention.output.LayerNorm", b + "intermediate.dense", b + "output.dense", b + "output.LayerNorm", y, i == 0);
    }
    EXPECT_LT(difference(run(encoder, input()), y), 1e-6);  // the normal distribution function is approximated to some 1e-7
  }
  {
    const checkpoint c = distilbert("distilbert.");
    const temporary_file file("distilbert");
    c.write(file.path);
    const std::string b = "distilbert.transformer.layer.0.";
    EXPECT_LT(difference(run(import_encoder<separate>(safetensors_file(file.path), {.heads = H}), input()),
                         post_norm_by_hand(c, b + "attention.q_lin", b + "attention.k_lin", b + "attention.v_lin", b + "attention.out_lin",
                                           b + "sa_layer_norm", b + "ffn.lin1", b + "ffn.lin2", b + "output_layer_norm", input(), false)),
              1e-6);
  }
  {
    const checkpoint c = albert("albert.");
    const temporary_file file("albert");
    c.write(file.path);
    const std::string b = "albert.encoder.albert_layer_groups.0.albert_layers.0.";
    EXPECT_LT(difference(run(import_encoder<separate>(safetensors_file(file.path), {.heads = H}), input()),
                         post_norm_by_hand(c, b + "attention.query", b + "attention.key", b + "attention.value",
                                           b + "attention.dense", b + "attention.LayerNorm", b + "ffn",
                                           b + "ffn_output", b + "full_layer_layer_norm", input(), false, 1e-12, true)),
              1e-6);
  }
}

TEST(attention_checkpoints, blocks_come_in_the_order_of_their_numbers) {
  const temporary_file file("order");
  bert("", 12).write(file.path);
  const auto all = find_attention(safetensors_file(file.path));
  ASSERT_EQ(all.size(), 12U);
  for (std::size_t i = 0; i < 12; ++i) EXPECT_EQ(all[i].block, concat("encoder.layer.", i, "."));
}

TEST(attention_checkpoints, whisper_has_self_and_cross_attention_and_no_key_bias) {
  const checkpoint c = whisper("model.");
  const temporary_file file("whisper");
  c.write(file.path);
  const safetensors_file in(file.path);
  const auto all = find_attention(in);
  ASSERT_EQ(all.size(), 3U);
  int cross = 0;
  for (const auto& n : all) {
    EXPECT_EQ(n.code, encoder_code::whisper);
    cross += n.query.find("encoder_attn") != std::string::npos;
    separate l;
    import_attention(in, n, H, l);
    EXPECT_EQ(l.key.bias.cwiseAbs().maxCoeff(), 0);
    EXPECT_EQ(l.query.weight, wide(c.at(n.query + ".weight")));
    EXPECT_EQ(l.value.bias, wide(c.at(n.value + ".bias")));
    if (n.block.find("encoder.") != std::string::npos) {
      const auto block = import_pre_norm_block<separate>(in, n, {.heads = H, .epsilon = 1e-5});
      EXPECT_TRUE(run(block, input()).allFinite());
    }
  }
  EXPECT_EQ(cross, 1);
}

TEST(attention_checkpoints, what_is_exported_is_imported_again) {
  for (const auto& [name, c] : {std::pair{"bert", bert("bert.", 1)}, {"distilbert", distilbert("")}, {"albert", albert("albert.")}}) {
    const temporary_file file(name), written(concat(name, "_written").c_str()), shared_file(concat(name, "_shared").c_str());
    c.write(file.path);
    const safetensors_file in(file.path);
    const auto names = find_attention(in).at(0);
    separate l, again;
    import_attention(in, names, H, l);
    {
      safetensors_writer out;
      export_attention(out, names, l);
      out.write(written.path);
    }
    import_attention(safetensors_file(written.path), names, H, again);
    EXPECT_EQ(run(again, input()), run(l, input()));

    shared_heads made, back;
    static_cast<void>(reparametrise(l, made, {.rank = 6}));
    made.head_mask.resize(1, H);
    made.head_mask << 0.5, 1.0, 1.5;
    {
      safetensors_writer out;
      export_collaborative(out, names, made);
      out.write(shared_file.path);
    }
    const safetensors_file shared_in(shared_file.path);
    const auto found = find_attention(shared_in);
    ASSERT_EQ(found.size(), 1U) << name;
    EXPECT_TRUE(found[0].collaborative);
    import_collaborative(shared_in, found[0], back);
    EXPECT_NEAR(back.config.scale, std::sqrt(H / 6.0), 1e-15);  // the public code's, so mixing and content bias were rescaled
    EXPECT_GT((back.mixing - made.mixing).cwiseAbs().maxCoeff(), 0.01);
    EXPECT_LT(difference(run(back, input()), run(made, input())), 1e-13);
  }
}

TEST(attention_checkpoints, another_scale_changes_nothing_and_shared_biases_fold) {
  shared_heads l({.inputs = D, .heads = H, .key_width = 5, .query_bias = true}, rng_key{1});
  fill_uniform<double>(l.query.bias, 1.0, rng_key{2});
  fill_uniform<double>(l.content_bias.weight, 1.0, rng_key{3});
  const matrix<double> y = run(l, input());
  shared_heads other = l;
  rescale(other, 0.2);
  EXPECT_EQ(other.config.scale, 0.2);
  EXPECT_LT(difference(run(other, input()), y), 1e-13);
  shared_heads folded = l;
  for (index_t h = 0; h < H; ++h) folded.content_bias.weight.row(h) += l.mixing.row(h).cwiseProduct(l.query.bias.row(0)) * l.key.weight;
  folded.query.bias.resize(0, 5);
  EXPECT_LT(difference(run(folded, input()), y), 1e-13);
  EXPECT_THROW(rescale(other, 0), config_error);
}

TEST(attention_checkpoints, a_whole_file_becomes_collaborative) {
  for (const auto& [name, c] : {std::pair{"bert", bert("bert.", 3)}, {"distilbert", distilbert("distilbert.")}, {"albert", albert("")}}) {
    const temporary_file file(name), shared_file(concat(name, "_shared").c_str());
    c.write(file.path);
    const safetensors_file in(file.path);
    std::size_t reported = 0;
    reparametrise_checkpoint(in, shared_file.path, H, {.rank = D}, {}, [&](const attention_names&, const decomposition& d) {
      EXPECT_EQ(d.error(), 0);
      ++reported;
    });
    EXPECT_EQ(reported, find_attention(in).size());
    const safetensors_file out(shared_file.path);
    if (out.contains("bert.embeddings.word_embeddings.weight")) {
      EXPECT_EQ(out.read_matrix<float>("bert.embeddings.word_embeddings.weight"), c.at("bert.embeddings.word_embeddings.weight"));
    }
    for (const auto& n : find_attention(out)) {
      EXPECT_TRUE(n.collaborative);
      for (const std::string& gone : {n.shared + "query.bias", n.shared + "key.bias"}) EXPECT_FALSE(out.contains(gone)) << gone;
    }
    const auto before = import_encoder<separate>(in, {.heads = H});
    const auto after = import_encoder<shared_heads>(out, {});
    EXPECT_LT(difference(run(after, input()), run(before, input())), 1e-5) << name;  // through float
    if (name == std::string("albert")) {
      EXPECT_TRUE(out.contains("encoder.albert_layer_groups.0.albert_layers.0.attention.layer_norm.weight"));
    }
    if (name == std::string("distilbert")) {
      EXPECT_TRUE(out.contains("distilbert.transformer.layer.0.attention.collab_layer.dense.weight"));
    }
    EXPECT_THROW(reparametrise_checkpoint(out, file.path, H, {.rank = 4}, {}, [](const auto&...) {}), config_error);
  }
}

TEST(attention_checkpoints, missing_tensors_are_named_and_no_bad_number_is_written) {
  checkpoint c = bert("", 1);
  c.tensors.erase("encoder.layer.0.attention.self.key.weight");
  const temporary_file file("missing"), target("target");
  c.write(file.path);
  const auto message = [&] {
    try {
      reparametrise_checkpoint(safetensors_file(file.path), target.path, H, {.rank = 4}, {}, [](const auto&...) {});
    } catch (const std::exception& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(message().find("'encoder.layer.0.attention.self.key.weight'"), std::string::npos) << message();
  c = bert("", 1);
  c.put("encoder.layer.0.attention.self.key.weight", D + 1, D);
  c.write(file.path);
  EXPECT_NE(message().find("key.weight': expected shape [12 x 0] (0: any), found [13 x 12]"), std::string::npos) << message();
  c = bert("", 1);
  c.tensors["encoder.layer.0.attention.self.key.weight"](2, 3) = std::numeric_limits<float>::quiet_NaN();
  c.write(file.path);
  EXPECT_NE(message().find("NaN"), std::string::npos);
  c = bert("", 1);
  c.write(file.path);
  EXPECT_THROW(reparametrise_checkpoint(safetensors_file(file.path), target.path, 5, {.rank = 4}, {}, [](const auto&...) {}), config_error);
  EXPECT_THROW(reparametrise_checkpoint(safetensors_file(file.path), target.path, H, {.rank = 0}, {}, [](const auto&...) {}), config_error);
  EXPECT_FALSE(std::filesystem::exists(target.path));
  shared_heads spoiled({.inputs = D, .heads = H}, rng_key{1});
  spoiled.mixing(0, 0) = std::numeric_limits<double>::infinity();
  safetensors_writer out;
  EXPECT_THROW(export_collaborative(out, find_attention(safetensors_file(file.path)).at(0), spoiled), config_error);
  checkpoint none;  // a shared layer of no heads
  none.put("a.mixing", 0, 4);
  none.write(file.path);
  shared_heads to({.inputs = D, .heads = H}, rng_key{1});
  attention_names names;
  names.shared = "a.";
  EXPECT_THROW(import_collaborative(safetensors_file(file.path), names, to), io_error);
}

// ---- what is not understood ----

/// What an import says; "" if nothing.
template <class F>
std::string refusal(const checkpoint& c, F&& import) {
  const temporary_file file("refused");
  c.write(file.path);
  const safetensors_file in(file.path);
  try {
    import(in);
  } catch (const io_error& e) {
    EXPECT_TRUE(std::string(e.what()).starts_with(file.path.string())) << e.what();
    return e.what();
  }
  return "";
}
std::string encoder_refusal(const checkpoint& c, const std::string& prefix = "") {
  return refusal(
      c, [&](const safetensors_file& in) { (void)import_encoder<separate>(in, {.heads = H, .prefix = prefix}); });
}
void expect_part(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks " << part;
}

checkpoint with(checkpoint c, const std::string& name, index_t rows = 1, index_t cols = D) {
  c.put(name, rows, cols);
  return c;
}
checkpoint both(checkpoint a, const checkpoint& b) {
  a.tensors.insert(b.tensors.begin(), b.tensors.end());
  return a;
}

TEST(attention_checkpoints, an_encoder_decoder_is_refused_by_its_cross_attention_and_a_prefix_chooses) {
  checkpoint decoder = bert("decoder.bert.", 2);
  for (const char* p : {"self.query", "self.key", "self.value", "output.dense"})
    decoder.linear(std::string("decoder.bert.encoder.layer.0.crossattention.") + p, D, D);
  const checkpoint all = both(bert("encoder.", 2), decoder);
  for (const std::string& said : {encoder_refusal(all), encoder_refusal(all, "decoder."), encoder_refusal(decoder)}) {
    expect_part(said, "'decoder.bert.encoder.layer.0.crossattention.output.dense.bias'");
    expect_part(said, "and 4 more");
    expect_part(said, "found attention to another sequence");
  }
  const temporary_file file("both"), alone("alone");
  all.write(file.path);
  bert("", 2).write(alone.path);
  checkpoint encoder;
  for (const auto& [name, m] : all.tensors)
    if (name.starts_with("encoder.")) encoder.tensors[name.substr(8)] = m;
  encoder.write(alone.path);
  std::vector<std::string> aside;
  const auto chosen =
      import_encoder<separate>(safetensors_file(file.path), {.heads = H, .prefix = "encoder.", .left_aside = &aside});
  ASSERT_EQ(chosen.blocks.size(), 2U);
  EXPECT_EQ(run(chosen, input()), run(import_encoder<separate>(safetensors_file(alone.path), {.heads = H}), input()));
  EXPECT_EQ(aside, std::vector<std::string>{"encoder.embeddings.word_embeddings.weight"});
  expect_part(refusal(all,
                      [&](const safetensors_file& in) {
                        reparametrise_checkpoint(in, alone.path, H, {.rank = 4}, {}, [](const auto&...) {});
                      }),
              "'decoder.bert.encoder.layer.0.crossattention.output.dense.bias'");
  expect_part(encoder_refusal(whisper("model.")), "encoder_attn");
}

TEST(attention_checkpoints, two_stacks_and_holes_are_refused) {
  expect_part(encoder_refusal(both(bert("question.", 1), bert("answer.", 1))),
              "found 'answer.encoder.layer.' and 'question.encoder.layer.'");
  EXPECT_EQ(encoder_refusal(both(bert("question.", 1), bert("answer.", 1)), "answer."), "");
  const auto without = [](checkpoint c, const std::string& part) {
    std::erase_if(c.tensors, [&](const auto& t) { return t.first.find(part) != std::string::npos; });
    return c;
  };
  expect_part(encoder_refusal(without(bert("bert.", 3), "layer.1.")),
              "found 'bert.encoder.layer.2.' where number 1 has to come");
  expect_part(encoder_refusal(without(bert("bert.", 3), "layer.0.")),
              "found 'bert.encoder.layer.1.' where number 0 has to come");
  expect_part(encoder_refusal(without(bert("", 12), "layer.9.")), "where number 9 has to come");
  EXPECT_EQ(encoder_refusal(bert("bert.", 12)), "");
  const checkpoint one = albert("albert.");
  checkpoint groups = one;
  for (const auto& [name, m] : one.tensors) {
    std::string other = name;
    other.replace(other.find("groups.0"), 8, "groups.2");
    groups.tensors[other] = m;
  }
  expect_part(encoder_refusal(groups), "albert_layer_groups.2.albert_layers.0.'");
  expect_part(encoder_refusal(bert("bert.", 1), "roberta."), "below 'roberta.', found none; there is no tensor");
  expect_part(encoder_refusal(with({}, "transformer.h.0.attn.c_attn.weight")),
              "it begins with tensor 'transformer.h.0.attn.c_attn.weight'");
}

TEST(attention_checkpoints, tensors_that_nobody_takes_are_refused_by_name) {
  const std::string b = "bert.encoder.layer.1.";
  for (const std::string& name :
       {b + "attention.self.distance_embedding.weight", b + "attention.output.adapters.fine.down.weight",
        b + "output.adapters.fine.down.weight", b + "attention.self.query.lora_A.default.weight",
        b + "attention.self.query.weight_scale", b + "attention.self.rotary.inv_freq",
        std::string("bert.encoder.relative_attention_bias.weight"), std::string("bert.encoder.rel_embeddings.weight"),
        std::string("surprise"), b + "output.LayerNorm.gamma"}) {
    const checkpoint c = with(bert("bert.", 2), name);
    expect_part(encoder_refusal(c), "tensor '" + name + "': expected no tensor of this name");
    EXPECT_EQ(refusal(c,
                      [&](const safetensors_file& in) {
                        (void)import_post_norm_block<separate>(in, find_attention(in).at(0), {.heads = H});
                      }),
              "");
    const std::string block = refusal(c, [&](const safetensors_file& in) {
      (void)import_post_norm_block<separate>(in, find_attention(in).at(1), {.heads = H});
    });
    EXPECT_EQ(block.empty(), !name.starts_with(b)) << name << block;
  }
  const std::string distance = "encoder.layer.0.attention.self.distance_embedding.weight";
  separate l;
  shared_heads shared;
  expect_part(refusal(with(bert("", 1), distance, 5, D / H),
                      [&](const safetensors_file& in) { import_attention(in, find_attention(in).at(0), H, l); }),
              distance);
  EXPECT_EQ(l.query.weight.size(), 0) << "nothing is half imported";
  const temporary_file target("target");
  expect_part(refusal(with(bert("", 1), distance, 5, D / H),
                      [&](const safetensors_file& in) {
                        reparametrise_checkpoint(in, target.path, H, {.rank = 4}, {}, [](const auto&...) {});
                      }),
              distance);
  checkpoint collaborative;
  collaborative.put("encoder.layer.0.attention.self.mixing", H, 4);
  for (const char* p : {"query", "key"})
    collaborative.linear(std::string("encoder.layer.0.attention.self.") + p, 4, D, false);
  collaborative.linear("encoder.layer.0.attention.self.value", D, D);
  const auto import_shared = [&](const safetensors_file& in) {
    import_collaborative(in, find_attention(in).at(0), shared);
  };
  EXPECT_EQ(refusal(collaborative, import_shared), "");
  expect_part(refusal(with(collaborative, distance), import_shared), distance);
  expect_part(
      refusal(collaborative, [&](const safetensors_file& in) { import_attention(in, find_attention(in).at(0), H, l); }),
      "found shared ones");
  const checkpoint many = with(with(with(with(with(with(bert("", 1), "x.a"), "x.b"), "x.c"), "x.d"), "x.e"), "x.f");
  expect_part(encoder_refusal(many), "tensors 'x.a', 'x.b', 'x.c', 'x.d' and 2 more: expected no tensor");
}

TEST(attention_checkpoints, heads_and_buffers_are_left_aside_by_name_and_reported) {
  checkpoint c = bert("bert.", 2);
  const std::vector<std::string> known{"bert.embeddings.LayerNorm.weight",
                                       "bert.embeddings.position_ids",
                                       "bert.embeddings.word_embeddings.weight",
                                       "bert.pooler.dense.weight",
                                       "classifier.weight",
                                       "cls.predictions.bias",
                                       "cls.seq_relationship.weight",
                                       "qa_outputs.bias"};
  for (const auto& name : known) c.put(name, 2, D);
  for (const std::string before : {"", "module.", "_orig_mod."}) {
    checkpoint renamed;
    for (const auto& [name, m] : c.tensors) renamed.tensors[before + name] = m;
    const temporary_file file("heads");
    renamed.write(file.path);
    std::vector<std::string> aside, expected;
    const auto encoder = import_encoder<separate>(safetensors_file(file.path), {.heads = H, .left_aside = &aside});
    for (const auto& name : known) expected.push_back(before + name);
    EXPECT_EQ(aside, expected);
    EXPECT_EQ(encoder.blocks.size(), 2U);
  }
}

TEST(attention_checkpoints, what_tools_add_to_names_does_not_matter) {
  const checkpoint c = bert("bert.", 2);
  const temporary_file plain("plain"), other("other"), shared("shared");
  c.write(plain.path);
  const auto y = run(import_encoder<separate>(safetensors_file(plain.path), {.heads = H}), input());
  const auto renamed = [&](const std::string& from, const std::string& to) {
    checkpoint r;
    for (const auto& [name, m] : c.tensors) {
      const auto at = name.find(from);
      r.tensors[at == std::string::npos ? name : name.substr(0, at) + to + name.substr(at + from.size())] = m;
    }
    return r;
  };
  for (const auto& [from, to] : {std::pair<std::string, std::string>{"bert.", "module.bert."},
                                 {"bert.", "module._orig_mod.bert."},
                                 {"layer.1.", "layer.1._orig_mod."},
                                 {"bert.", "base_model.model.bert."},
                                 {"attention.self.", "attention._checkpoint_wrapped_module.self."}}) {
    renamed(from, to).write(other.path);
    const safetensors_file in(other.path);
    EXPECT_EQ(run(import_encoder<separate>(in, {.heads = H}), input()), y) << to;
    const auto names = find_attention(in);
    ASSERT_EQ(names.size(), 2U) << to;
    EXPECT_EQ(names[1].block, "bert.encoder.layer.1.");
    reparametrise_checkpoint(in, shared.path, H, {.rank = D}, {}, [](const auto&...) {});
    EXPECT_LT(difference(run(import_encoder<shared_heads>(safetensors_file(shared.path), {}), input()), y), 1e-5)
        << to;  // through float
  }
  expect_part(encoder_refusal(both(c, renamed("bert.", "module.bert."))), "without what tools add");
}

TEST(attention_checkpoints, tensors_that_contradict_each_other_are_sentences) {
  const std::string b = "encoder.layer.1.";
  checkpoint c = bert("", 2);
  c.tensors.erase(b + "attention.self.key.bias");
  expect_part(encoder_refusal(c), "'" + b + "attention.self.key.bias'");
  c = bert("", 2);
  c.tensors.erase(b + "output.dense.bias");
  expect_part(encoder_refusal(c), "'" + b + "output.dense.bias'");
  c = bert("", 2);
  std::erase_if(c.tensors, [](const auto& t) {
    return t.first.ends_with("dense.bias") ||
           (t.first.ends_with(".bias") && t.first.find("self.") != std::string::npos);
  });
  EXPECT_EQ(encoder_refusal(c), "") << "no bias at all is no contradiction";
  c = bert("", 2);
  c.put(b + "attention.output.dense.weight", D + 1, D);
  c.put(b + "attention.output.dense.bias", 1, D + 1);
  expect_part(encoder_refusal(c),
              "'" + b + "attention.output.dense.weight': expected as many rows as inputs, 12, found 13");
  c = bert("", 2);
  c.put(b + "intermediate.dense.weight", F, D + 1);
  expect_part(encoder_refusal(c), "intermediate.dense.weight': expected shape [0 x 12] (0: any), found [20 x 13]");

  const temporary_file file("kinds");
  for (const bool cube : {false, true}) {
    safetensors_writer out;
    const checkpoint whole = bert("", 1);
    const std::vector<std::int32_t> integers(D * D, 1);
    const std::vector<float> numbers(D * D, 1);
    for (const auto& [name, m] : whole.tensors)
      if (name != "encoder.layer.0.attention.self.key.weight") out.add<float>(name, m);
    if (cube)
      out.add<float>("encoder.layer.0.attention.self.key.weight", {D, 1, D}, numbers);
    else
      out.add<std::int32_t>("encoder.layer.0.attention.self.key.weight", {D, D}, integers);
    out.write(file.path);
    try {
      (void)import_encoder<separate>(safetensors_file(file.path), {.heads = H});
      ADD_FAILURE() << cube;
    } catch (const io_error& e) {
      expect_part(e.what(), cube ? "key.weight': expected a matrix, found shape [12, 1, 12]"
                                 : "key.weight': expected floating-point numbers, found I32");
    }
  }
}

/// Small rows show a norm's epsilon: the attention gives nothing, so the first norm sees the input alone.
TEST(attention_checkpoints, norms_have_the_published_epsilon) {
  for (const auto& [prefix, epsilon] : {std::pair{"bert.", 1e-12}, {"roberta.", 1e-5}})
    for (const double deviation : {0.02, 0.005, 1e-4}) {
      checkpoint c = bert(prefix, 1);
      const std::string b = std::string(prefix) + "encoder.layer.0.";
      for (const char* part : {"weight", "bias"}) c.tensors[b + "attention.output.dense." + part].setZero();
      const temporary_file file("epsilon");
      c.write(file.path);
      const matrix<double> x = deviation * input();
      const auto by_hand = [&](double e) {
        return post_norm_by_hand(c, b + "attention.self.query", b + "attention.self.key", b + "attention.self.value",
                                 b + "attention.output.dense", b + "attention.output.LayerNorm",
                                 b + "intermediate.dense", b + "output.dense", b + "output.LayerNorm", x, true, e);
      };
      const safetensors_file in(file.path);
      EXPECT_LT(difference(run(import_encoder<separate>(in, {.heads = H}), x), by_hand(epsilon)), 1e-6)
          << prefix << deviation;
      EXPECT_LT(difference(run(import_encoder<separate>(in, {.heads = H, .epsilon = 1e-6}), x), by_hand(1e-6)), 1e-6);
    }
}

TEST(attention_checkpoints, configurations_are_read_or_refused_by_their_keys) {
  const auto read = [](const char* text) { return read_encoder_config(nlohmann::json::parse(text)); };
  const auto bert_config =
      read(R"({"model_type": "bert", "num_attention_heads": 12, "position_embedding_type": "absolute"})");
  EXPECT_EQ(bert_config.heads, 12);
  EXPECT_EQ(bert_config.epsilon, 1e-12);
  EXPECT_EQ(bert_config.kind, activation::gelu);
  const auto roberta =
      read(R"({"model_type": "roberta", "num_attention_heads": 2, "layer_norm_eps": 1e-05, "hidden_act": "relu"})");
  EXPECT_EQ(roberta.epsilon, 1e-5);
  EXPECT_EQ(roberta.kind, activation::relu);
  const auto distil =
      read(R"({"model_type": "distilbert", "n_heads": 3, "activation": "gelu_new", "layer_norm_eps": 1})");
  EXPECT_EQ(distil.heads, 3);
  EXPECT_EQ(distil.epsilon, 1e-12);  // its code has the number fixed
  EXPECT_EQ(distil.kind, activation::gelu_tanh);
  EXPECT_EQ(read(R"({"model_type": "albert", "num_attention_heads": 3})").kind, activation::gelu_tanh);
  for (const auto& [text, part] :
       {std::pair{R"({"num_attention_heads": 2, "position_embedding_type": "relative_key"})",
                  "'position_embedding_type'"},
        {R"({"num_attention_heads": 2, "is_decoder": true})", "'is_decoder'"},
        {R"({"num_attention_heads": 2, "add_cross_attention": true})", "'add_cross_attention'"},
        {R"({"num_attention_heads": 2, "hidden_act": "mish"})", "'hidden_act'"},
        {R"({"num_attention_heads": "two"})", "'num_attention_heads': expected an integer"},
        {R"({"num_attention_heads": 2, "model_type": "llama"})", "'model_type'"},
        {R"({})", "heads"},
        {R"([])", "JSON array"}})
    try {
      (void)read(text);
      ADD_FAILURE() << text;
    } catch (const io_error& e) {
      expect_part(e.what(), part);
    }
}

}  // namespace attention_checkpoints_tests
