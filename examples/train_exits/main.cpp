// Trains a byte-level language model that can answer after every block: all exits together first, then also the head
// that chooses among them.
#include <numbers>

#include "../support/terminal.hpp"
#include "exit_trainer.hpp"
#include "model_options.hpp"

namespace {

struct run_config {
  std::string text, save;
  index_t steps = 1000, batch = 16;
  double rate = 2e-3, alpha = 0.1, penalty = 0.1;
  int workers = 0;
};

void train(exit_language_model& model, const model_config& c, const run_config& r, std::span<const token_t> text,
           const lithe::context& ctx) {
  const exit_run how{.steps = r.steps,
                     .batch = r.batch,
                     .rate = r.rate,
                     .exits = {.alpha = r.alpha,
                               .start_step = r.steps * 3 / 4,
                               .targets = {.penalty = r.penalty},
                               .reduce = lithe::reduction::mean}};
  support::progress line("step", r.steps);
  support::step_guard guard;
  train(model, c, how, text, ctx, guard, [&](index_t step, const lithe::exit_training_losses& loss) {
    line.show(step, {support::format("loss of all exits %.3f", loss.decoder),
                     support::format("loss of the choice %.3f", loss.exit), guard.report()});
  });
}

/// Held-out bits per byte of every exit.
void evaluate(const exit_language_model& model, const model_config& c, std::span<const token_t> text,
              const lithe::context& base) {
  std::vector<double> sum(static_cast<std::size_t>(c.layers), 0.0);
  matrix<real> x(c.context, c.features), logits(c.layers * c.context, byte_values);
  index_t pieces = 0;
  for (index_t at = 0; at + c.context < std::ssize(text); at += c.context, ++pieces) {
    stretches b;
    b.add(text, at, c.context);
    model.words.forward(b.inputs, x, base);
    model.stack.forward(x, logits, base);
    for (index_t n = 0; n < c.layers; ++n)
      sum[static_cast<std::size_t>(n)] +=
          lithe::cross_entropy<real>(lithe::matrix_view<const real>(logits).slice_rows(n * c.context, c.context),
                                     b.targets, {}, lithe::matrix_view<real>(), base)
              .loss;
  }
  for (index_t n = 0; n < c.layers; ++n)
    std::printf("all bytes from exit %td: %.3f bits a byte\n", n + 1,
                sum[static_cast<std::size_t>(n)] / static_cast<double>(pieces) / std::numbers::ln2);
}

int run(const model_config& c, const run_config& r, const char* argv0) {
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const std::string path = support::given_or_bundled(r.text, "kjv_new_testament.txt");
  support::outputs files;
  files.reads(path);
  files.add_model("--save", r.save);
  const std::vector<token_t> text = read_text(path);
  const std::size_t split = text.size() * 95 / 100;
  lithe::require<lithe::io_error>(std::ssize(text) >= 20 * (c.context + 1), path, ": expected at least ",
                                  20 * (c.context + 1), " bytes of text for a context of ", c.context, ", found ",
                                  text.size());
  exit_language_model model = make_exit_model(c);
  support::catch_signals();
  std::printf("%s: %zu bytes, the last 5 %% held out; %td blocks, %td parameters\n",
              std::filesystem::path(path).filename().c_str(), text.size(), c.layers, lithe::count_parameters(model));
  if (!r.save.empty())
    std::printf("%s %s, at the end or on Ctrl-C\n", std::filesystem::exists(r.save) ? "replaces" : "saves",
                r.save.c_str());
  std::fflush(stdout);
  train(model, c, r, std::span(text).first(split), ctx);
  if (!r.save.empty()) {
    lithe::save_model(r.save, model, {{"program", "train_exits"}, {"config", config_text(c)}, {"exits", "geometric"}});
    std::printf("saved %s\n", r.save.c_str());
  }
  if (support::stop_asked()) return support::stop_status();
  support::release_signals();
  evaluate(model, c, std::span(text).subspan(split), ctx);
  if (!r.save.empty())
    std::printf("\nplay with it: %s %s --exit geometric --threshold 0.5\n", support::sibling(argv0, "generate").c_str(),
                support::quoted(r.save).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  model_config c;
  run_config r;
  c.feed_forward = "dense";
  c.layers = 4;
  c.context = 128;
  CLI::App app{
      "Trains a byte-level language model that can answer after every block; examples/generate shows the depth of "
      "every byte."};
  app.add_option("--text", r.text, "text file; the bundled King James New Testament unless given");
  add_model_options(app, c);
  app.add_option("--steps", r.steps, "steps of the run")->check(between<index_t>(1, 1000000000))->capture_default_str();
  app.add_option("--batch", r.batch, "sequences a step")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--alpha", r.alpha, "weight of the loss of the choice, in the last quarter of the steps")
      ->check(between(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--penalty", r.penalty, "of each block when the right exit is chosen")
      ->check(between(0.0, 100.0))
      ->capture_default_str();
  auto* save = app.add_option(
      "--save", r.save,
      "file for the model; exits.safetensors, with a number if that is taken, unless given; empty for none");
  support::add_workers(app, r.workers);
  return support::run_program(app, argc, argv, [&] {
    place_memory(app, c);
    if (save->count() == 0) r.save = support::free_name("exits.safetensors");
    return run(c, r, argv[0]);
  });
}
