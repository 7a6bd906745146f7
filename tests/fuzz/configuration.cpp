// Feeds text to everything that reads a configuration: that of examples/all_together and the config.json of Reformer models. Whatever it says,
// the outcome is a configuration or an error with a sentence, and a small model can be built from each configuration that was taken. Meant for
// -fsanitize=address,undefined. With clang: -DLITHE_LIBFUZZER -fsanitize=fuzzer; elsewhere main() below mutates texts of its own:
//
//     fuzz_configuration [inputs = 10000] [seed = 1]
#include <cstdlib>
#include <iostream>

#include "../../examples/all_together/model.hpp"
#include "lithe/io/reformer_checkpoints.hpp"

namespace {

using namespace lithe;

void check(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "fuzz_configuration: " << what << std::endl;
  std::abort();
}

/// Whether the text was taken; what was taken is built if it is small.
bool read_together(const std::string& text) {
  try {
    model_config c = parse_config(text);
    check(nlohmann::json(parse_config(nlohmann::json(c).dump())) == nlohmann::json(c), "a configuration changes when it is written and read");
    if (c.attention.size() > 4 || c.features > 64 || c.hidden > 256 || c.sub_keys > 32 || c.context > 512) return true;
    const auto model = make_model<float>(c);
    check(std::get<1>(model.layers).exits() * c.blocks_per_exit == static_cast<index_t>(c.attention.size()), "a model has the wrong depth");
    return true;
  } catch (const config_error& e) {
    check(std::string_view(e.what()).size() > 20, "a refusal without a sentence");
    return false;
  }
}

bool read_reformer(const std::string& text) {
  const auto given = nlohmann::json::parse(text, nullptr, false);
  if (given.is_discarded()) return false;
  try {
    const reformer_config c = read_reformer_config(given).model;
    index_t positions = 0;
    for (const index_t n : c.position_shape) positions = std::max(positions, n);
    for (const index_t n : {c.vocabulary, c.features, c.heads, c.head_width, c.hidden, positions, c.local_chunk, c.lsh_chunk, c.rounds})
      if (n > 64) return true;
    if (c.layers.size() > 2 || c.position_shape.size() > 3) return true;
    (void)make_reformer<float>(c, {1});
    return true;
  } catch (const io_error&) {
  } catch (const config_error&) {
  } catch (const shape_error&) {
  }
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  (void)read_together(text);
  (void)read_reformer(text);
  return 0;
}

#ifndef LITHE_LIBFUZZER
namespace {

const std::vector<std::string> inputs{
    R"({"attention": ["local", "lsh"], "feed_forward": ["chunked", "memory"], "blocks_per_exit": 2, "features": 16, "heads": 2, "window": 8, "sub_keys": 8})",
    R"({"attention": ["bucket"], "feed_forward": ["ultramem"], "features": 8, "heads": 4, "context": 64, "hidden": 16, "top_k": 2, "seed": 7, "sub_keys": 4})",
    R"({"attention": ["collaborative"], "feed_forward": ["chunked"], "rounds": 3, "dropout": 0.1, "exit_loss": 0, "features": 12, "sub_keys": 16})",
    R"({"attn_layers": ["local", "lsh"], "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 32, "vocab_size": 20,
        "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [4, 12], "max_position_embeddings": 32, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 8})",
    R"({"attn_layers": ["lsh"], "hidden_size": 8, "num_attention_heads": 1, "attention_head_size": 4, "feed_forward_size": 8, "vocab_size": 9, "hidden_act": "gelu",
        "axial_pos_embds": false, "max_position_embeddings": 16, "num_buckets": [2, 4], "num_hashes": 2, "is_decoder": true, "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4})"};
const std::vector<std::string> pieces{"-1", "0", "1e9", "9223372036854775808", "null", "true", "[]", "{}", "\"lsh\"", "\"local\", ", "\"bucket\"", "0.5", "[[[[",
                                      ", \"heads\": 3", ", \"features\": 7", "\"", "\\u0000", "\xff", "1", "2", ": ", ","};

std::string mutate(std::string text, rng_key key) {
  std::uint64_t draws = 0;
  const auto draw = [&](std::size_t n) { return static_cast<std::size_t>(philox(key, draws++)[0] % n); };
  for (std::size_t n = draw(4); n > 0; --n) {
    const std::size_t at = draw(text.size() + 1), length = std::min(draw(12), text.size() - at);
    const std::size_t digit = text.find_first_of("0123456789", at);
    switch (draw(5)) {
      case 0: text.erase(at, length); break;
      case 1: text.insert(at, pieces[draw(pieces.size())]); break;
      case 2: text.replace(at, length, pieces[draw(pieces.size())]); break;
      case 3: text.insert(at, inputs[draw(inputs.size())].substr(draw(80), draw(40))); break;
      default:
        if (digit != std::string::npos) text.replace(digit, 1, draw(2) == 0 ? std::to_string(draw(10)) : pieces[draw(pieces.size())]);
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000, seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::cout << "fuzz_configuration: " << count << " inputs, seed " << seed << std::endl;
  std::uint64_t together = 0, reformers = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::string text = mutate(inputs[i % inputs.size()], rng_key{seed}.child(i));
    together += read_together(text);
    reformers += read_reformer(text);
  }
  std::cout << "fuzz_configuration: " << together << " were configurations of all_together, " << reformers << " of a Reformer" << std::endl;
  // all refused, or none, would mean that the mutations test nothing
  check(count < 1000 || (together > count / 50 && together < count * 9 / 10 && reformers > count / 50 && reformers < count * 9 / 10), "the mutations test nothing");
}
#endif
