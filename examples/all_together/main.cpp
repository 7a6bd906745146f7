// Trains a byte-level language model that has all systems in it, described by a small JSON file, and lets it write with depth-adaptive exits.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>

#include "trainer.hpp"

#if !defined(DEFAULT_TEXT)
#define DEFAULT_TEXT "examples/data/kjv_new_testament.txt"
#define DEFAULT_CONFIG "examples/all_together/all_together.json"
#endif

namespace {

using model_type = model_of<float>;

struct run_config {
  std::string config = DEFAULT_CONFIG, text = DEFAULT_TEXT, save, resume, prompt = "And it came to pass ";
  index_t steps = 300, sequences = 8, length = 200;
  double rate = 3e-3, threshold = 0.8;
  lithe::sampling how{.temperature = 0};
  std::uint64_t seed = 1;
  lithe::exit_confidence exit = lithe::exit_confidence::softmax_diff;
  int workers = 0;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The sequences of one step; the last 5 % of the text are left out.
batch draw(const std::vector<token_t>& text, const trainer<model_type>& t, index_t sequences) {
  batch b;
  const lithe::rng_key key = lithe::rng_key{t.config.seed}.child(7).child(static_cast<std::uint64_t>(t.step));
  const auto last = static_cast<double>(text.size()) * 0.95 - static_cast<double>(t.config.context) - 1;
  for (index_t i = 0; i < sequences; ++i)
    b.add(text, static_cast<std::size_t>(lithe::uniform(key, static_cast<std::uint64_t>(i)) * last), static_cast<std::size_t>(t.config.context));
  return b;
}

void train(trainer<model_type>& t, const std::vector<token_t>& text, const run_config& r, const lithe::context& ctx) {
  const lithe::learning_rate_schedule schedule{
      .learning_rate = r.rate, .warmup_steps = std::min<index_t>(50, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.05};
  const double begin = now();
  index_t bytes = 0;
  while (t.step < r.steps) {
    const batch b = draw(text, t, r.sequences);
    const auto losses = t.train(b, schedule(static_cast<index_t>(t.step)), ctx);
    bytes += static_cast<index_t>(b.inputs.size());
    if (t.step % 50 == 0 || t.step == r.steps)
      std::printf("step %td/%td | %.3f bits/byte over all exits | exit loss %.3f | %.0f bytes/s\n", static_cast<index_t>(t.step), r.steps,
                  losses.decoder / std::numbers::ln2, losses.exit, static_cast<double>(bytes) / (now() - begin));
    std::fflush(stdout);
  }
}

/// What each exit is worth on text that was not trained on.
void print_exits(const trainer<model_type>& t, const std::vector<token_t>& text, const lithe::context& ctx) {
  batch held_out;
  const auto T = static_cast<std::size_t>(t.config.context);
  for (std::size_t at = text.size() * 95 / 100, n = 0; n < 16 && at + T + 1 <= text.size(); at += T, ++n) held_out.add(text, at, T);
  const auto losses = t.evaluate(held_out, ctx);
  for (std::size_t n = 0; n < losses.size(); ++n) std::printf("exit %zu: %.3f bits/byte held out\n", n + 1, losses[n] / std::numbers::ln2);
}

void write(const trainer<model_type>& t, const run_config& r, const lithe::exit_rule& with_exits, const lithe::context& ctx) {
  const std::vector<token_t> prompt = to_tokens(r.prompt);
  const index_t room = t.config.context - static_cast<index_t>(prompt.size());
  lithe::require<lithe::config_error>(room >= 1, "prompt: expected less than the context of ", t.config.context, " bytes, got ", prompt.size());
  const index_t most = std::min(r.length, room), exits = t.decoder().exits();
  const auto sample = [&](const char* name, const lithe::exit_rule& rule) {
    const double begin = now();
    const lithe::exit_decoder model(t.words(), t.decoder(), {}, rule);
    const auto g = lithe::generate(model, {&prompt, 1}, {.how = r.how, .most = most}, lithe::rng_key{r.seed}, ctx);
    const double seconds = now() - begin;
    std::printf("\n--- %s: mean exit %.2f of %td, %.0f bytes/s\n%s%s\n", name, g.mean_exit(), exits, static_cast<double>(most) / seconds, r.prompt.c_str(),
                std::string(g.tokens[0].begin(), g.tokens[0].end()).c_str());
  };
  sample("all blocks", {});
  sample("with exits", with_exits);
}

int run(const run_config& r) {
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  if (!r.save.empty()) lithe::require_writable(r.save);
  const model_config config = r.resume.empty() ? parse_config(read_file(r.config)) : read_saved_config(r.resume);
  const std::vector<token_t> text = to_tokens(read_file(r.text));
  lithe::require<lithe::io_error>(static_cast<index_t>(text.size()) >= 20 * (config.context + 1), r.text, ": expected at least ", 20 * (config.context + 1),
                                  " bytes of text for a context of ", config.context, ", found ", text.size());
  trainer<model_type> t(config, make_model<float>(config));
  if (!r.resume.empty()) t.resume(r.resume);
  r.how.check();
  const lithe::exit_rule with_exits{.kind = r.exit, .thresholds = {r.threshold}};
  (void)lithe::exit_decoder(t.words(), t.decoder(), {}, with_exits);  // what does not fit is refused before training
  std::printf("%zu reversible blocks, %td exits, %td parameters\n", config.attention.size(), t.decoder().exits(), lithe::count_parameters(t.model));
  for (std::size_t i = 0; i < config.attention.size(); ++i)
    std::printf("  block %zu: %s attention, %s feed-forward\n", i + 1, config.attention[i].c_str(), config.feed_forward[i].c_str());
  train(t, text, r, ctx);
  if (!r.save.empty()) t.save(r.save);
  lithe::prepack(t.model);
  print_exits(t, text, ctx);
  if (r.length > 0) write(t, r, with_exits, ctx);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  using lithe::exit_confidence;
  run_config r;
  CLI::App app{"Trains a language model of reversible blocks with any attention, any memory and depth-adaptive exits."};
  app.add_option("--config", r.config, "JSON that describes the model")->check(CLI::ExistingFile)->capture_default_str();
  app.add_option("--text", r.text, "any file")->check(CLI::ExistingFile)->capture_default_str();
  app.add_option("--steps", r.steps, "0 = only generate")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--sequences", r.sequences, "of one context, in a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--save", r.save, "file for the model and its training state");
  app.add_option("--resume", r.resume, "goes on from a saved file; the model is the file's");
  app.add_option("--prompt", r.prompt)->capture_default_str();
  app.add_option("--length", r.length, "bytes to generate")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--temperature", r.how.temperature, "0 = the most likely byte")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-k", r.how.top_k, "draw from the k most likely bytes; 0 = all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-p", r.how.top_p, "draw from the fewest bytes that reach this probability")->capture_default_str();
  app.add_option("--seed", r.seed, "of the drawing")->capture_default_str();
  const std::map<std::string, exit_confidence> kinds{{"geometric", exit_confidence::geometric}, {"max_prob", exit_confidence::max_prob},
                                                     {"softmax_diff", exit_confidence::softmax_diff}, {"entropy", exit_confidence::entropy},
                                                     {"state", exit_confidence::state}};
  app.add_option("--exit", r.exit, "what an exit is decided by")->transform(CLI::CheckedTransformer(kinds));
  app.add_option("--threshold", r.threshold, "confidence with which a byte leaves")->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    return run(r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "all_together: %s\n", e.what());
    return 1;
  }
}
