// Continues a prompt with a model that train_language_model saved: one file holds all that is needed.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>

#include "language_model.hpp"

int main(int argc, char** argv) {
  std::string path, prompt = "And it came to pass";
  index_t length = 400;
  lithe::sampling how{.temperature = 0.7};
  std::uint64_t seed = 1;
  int workers = 1;
  CLI::App app{"Continues a prompt with a saved language model."};
  app.add_option("model", path, "file saved by train_language_model")->required();
  app.add_option("--prompt", prompt)->capture_default_str();
  app.add_option("--length", length, "bytes to generate")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--temperature", how.temperature, "0 = the most likely byte")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-k", how.top_k, "draw from the k most likely bytes; 0 = all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-p", how.top_p, "draw from the fewest bytes that reach this probability")->capture_default_str();
  app.add_option("--seed", seed)->capture_default_str();
  app.add_option("--workers", workers, "threads")->check(CLI::PositiveNumber)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    const model_config config = read_config(path);
    lithe::require<lithe::config_error>(config.objective == "causal", path, ": a masked model fills gaps, it cannot continue a prompt");
    language_model model = make_model(config);
    lithe::load_model(path, model);
    lithe::prepack(model);
    const lithe::parallel_executor exec(workers);
    lithe::workspace work(exec);
    const auto begin = std::chrono::steady_clock::now();
    const std::string text = sample(model, config, prompt, length, how, seed, {.exec = &exec, .work = &work});
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%s%s\n", prompt.c_str(), text.c_str());
    std::fprintf(stderr, "%.0f bytes/s\n", static_cast<double>(length) / seconds);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "generate: %s\n", e.what());
    return 1;
  }
}
