// Trains a byte-level language model that can answer after every block: all exits together first, then also the head that chooses among them.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <numbers>

#include "exit_trainer.hpp"

#if !defined(DEFAULT_TEXT)
#define DEFAULT_TEXT "examples/data/kjv_new_testament.txt"
#endif

namespace {

struct run_config {
  std::string text = DEFAULT_TEXT, save = "exits.safetensors";
  index_t steps = 1000, batch = 16;
  double rate = 2e-3, alpha = 0.1, penalty = 0.1;
  int workers = 0;
};

void train(exit_language_model& model, const model_config& c, const run_config& r, std::span<const token_t> text, const lithe::context& ctx) {
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const exit_run how{.steps = r.steps,
                     .batch = r.batch,
                     .rate = r.rate,
                     .exits = {.alpha = r.alpha, .start_step = r.steps * 3 / 4, .targets = {.penalty = r.penalty}, .reduce = lithe::reduction::mean}};
  const auto begin = std::chrono::steady_clock::now();
  train(model, c, how, text, ctx, [&](index_t step, const lithe::exit_training_losses& loss) {
    if (!terminal && step % 100 != 0 && step != r.steps) return;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%sstep %td/%td | loss of all exits %.3f, of the choice %.3f | %.0f s left   %s", terminal ? "\r" : "", step, r.steps, loss.decoder,
                loss.exit, seconds / static_cast<double>(step) * static_cast<double>(r.steps - step), terminal && step < r.steps ? "" : "\n");
    std::fflush(stdout);
  });
}

/// Held-out bits per byte of every exit.
void evaluate(const exit_language_model& model, const model_config& c, std::span<const token_t> text, const lithe::context& base) {
  std::vector<double> sum(static_cast<std::size_t>(c.layers), 0.0);
  matrix<real> x(c.context, c.features), logits(c.layers * c.context, byte_values);
  index_t pieces = 0;
  for (index_t at = 0; at + c.context < std::ssize(text); at += c.context, ++pieces) {
    stretches b;
    b.add(text, at, c.context);
    model.words.forward(b.inputs, x, base);
    model.stack.forward(x, logits, base);
    for (index_t n = 0; n < c.layers; ++n)
      sum[static_cast<std::size_t>(n)] += lithe::cross_entropy<real>(lithe::matrix_view<const real>(logits).slice_rows(n * c.context, c.context),
                                                                     b.targets, {}, lithe::matrix_view<real>(), base)
                                              .loss;
  }
  for (index_t n = 0; n < c.layers; ++n)
    std::printf("all bytes from exit %td: %.3f bits a byte\n", n + 1,
                sum[static_cast<std::size_t>(n)] / static_cast<double>(pieces) / std::numbers::ln2);
}

int run(const model_config& c, const run_config& r) {
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  lithe::require_writable(r.save);
  const std::vector<token_t> text = read_text(r.text);
  const std::size_t split = text.size() * 95 / 100;
  lithe::require<lithe::io_error>(std::ssize(text) >= 20 * (c.context + 1), r.text, ": expected at least ", 20 * (c.context + 1),
                                  " bytes of text for a context of ", c.context, ", found ", text.size());
  exit_language_model model = make_exit_model(c);
  std::printf("%s: %zu bytes, the last 5 %% held out; %td blocks, %td parameters\n", r.text.c_str(), text.size(), c.layers,
              lithe::count_parameters(model));
  train(model, c, r, std::span(text).first(split), ctx);
  evaluate(model, c, std::span(text).subspan(split), ctx);
  lithe::save_model(r.save, model, {{"config", config_text(c)}, {"exits", "geometric"}});
  std::printf("saved %s\n", r.save.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  model_config c;
  run_config r;
  c.feed_forward = "dense";
  c.layers = 4;
  c.context = 128;
  CLI::App app{"Trains a byte-level language model that can answer after every block; examples/generate shows the depth of every byte."};
  app.add_option("--text", r.text, "text file")->capture_default_str();
  app.add_option("--feed-forward", c.feed_forward)
      ->check(CLI::IsMember({"dense", "memory", "flat", "peer", "ultramem", "moe"}))
      ->capture_default_str();
  app.add_option("--layers", c.layers)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", c.features)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--context", c.context)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seed", c.seed)->capture_default_str();
  app.add_option("--steps", r.steps)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--batch", r.batch, "sequences a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--alpha", r.alpha, "weight of the loss of the choice, in the last quarter of the steps")->capture_default_str();
  app.add_option("--penalty", r.penalty, "of each block when the right exit is chosen")->capture_default_str();
  app.add_option("--save", r.save, "file for the model")->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    return run(c, r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "train_exits: %s\n", e.what());
    return 1;
  }
}
