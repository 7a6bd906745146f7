// Trains a byte-level language model that can answer after every block: all exits together first, then also the head that chooses among them.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <numbers>

#include "exit_model.hpp"

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

/// Stretches of text one below the other, and the byte behind each.
struct bytes {
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets{0};

  void add(std::span<const token_t> text, index_t at, index_t length) {
    const auto from = text.begin() + at;
    inputs.insert(inputs.end(), from, from + length);
    targets.insert(targets.end(), from + 1, from + length + 1);
    offsets.push_back(static_cast<index_t>(inputs.size()));
  }
};

void train(exit_language_model& model, const model_config& c, const run_config& r, std::span<const token_t> text, lithe::context ctx) {
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const lithe::exit_training_config exits{
      .alpha = r.alpha, .start_step = r.steps * 3 / 4, .targets = {.penalty = r.penalty}, .reduce = lithe::reduction::mean};
  const lithe::learning_rate_schedule schedule{
      .learning_rate = r.rate, .warmup_steps = std::min<index_t>(100, r.steps), .total_steps = r.steps, .final_ratio = 0.05};
  lithe::optimiser<real> adam({.weight_decay = 0.01, .groups = {{.pattern = "*bias", .weight_decay = 0}}});
  auto gradient = lithe::make_gradient(model);
  exit_language_model::record record;
  const auto begin = std::chrono::steady_clock::now();
  ctx.train = true;
  for (index_t step = 0; step < r.steps; ++step) {
    const lithe::rng_key key = lithe::rng_key{c.seed}.child(7).child(static_cast<std::uint64_t>(step));
    bytes b;
    for (index_t i = 0; i < r.batch; ++i)
      b.add(text, static_cast<index_t>(lithe::uniform(key, static_cast<std::uint64_t>(i)) * static_cast<double>(std::ssize(text) - c.context)),
            c.context);
    ctx.rows = {b.offsets};
    ctx.key = key.child(1);
    const lithe::scratch<real> x(ctx, std::ssize(b.inputs), c.features), dx(ctx, std::ssize(b.inputs), c.features);
    lithe::set_zero(model, gradient);
    model.words.forward(b.inputs, x, ctx);
    const auto loss = lithe::aligned_exit_step(model.stack, lithe::matrix_view<const real>(x), {}, b.targets, exits, step, record.stack, dx.view(),
                                               {}, gradient.stack, ctx);
    model.words.backward(b.inputs, {}, dx, {}, gradient.words, ctx);
    lithe::clip_by_global_norm(model, gradient, 1.0, ctx);
    adam.step(model, gradient, schedule(step), ctx);
    if (!terminal && (step + 1) % 100 != 0 && step + 1 != r.steps) continue;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%sstep %td/%td | loss of all exits %.3f, of the choice %.3f | %.0f s left   %s", terminal ? "\r" : "", step + 1, r.steps,
                loss.decoder, loss.exit, seconds / static_cast<double>(step + 1) * static_cast<double>(r.steps - step - 1),
                terminal && step + 1 < r.steps ? "" : "\n");
    std::fflush(stdout);
  }
}

/// Held-out bits per byte of every exit.
void evaluate(const exit_language_model& model, const model_config& c, std::span<const token_t> text, const lithe::context& base) {
  std::vector<double> sum(static_cast<std::size_t>(c.layers), 0.0);
  matrix<real> x(c.context, c.features), logits(c.layers * c.context, byte_values);
  index_t pieces = 0;
  for (index_t at = 0; at + c.context < std::ssize(text); at += c.context, ++pieces) {
    bytes b;
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
  app.add_option("--rate", r.rate, "learning rate")->capture_default_str();
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
