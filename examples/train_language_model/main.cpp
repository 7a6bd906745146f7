// Trains a small byte-level language model with a product-key memory on any text, beside its dense twin.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "trainer.hpp"

#if !defined(DEFAULT_TEXT)
#define DEFAULT_TEXT "examples/data/kjv_new_testament.txt"
#endif

namespace {

volatile std::sig_atomic_t interrupted = 0;

struct run_config {
  training_config training;
  std::string text = DEFAULT_TEXT, save, resume;
  int workers = 0, samples = 2;
  bool alone = false;
};

std::string twin_path(const std::string& path) { return std::filesystem::path(path).replace_extension(".dense.safetensors").string(); }

void progress(const std::vector<trainer>& all, const run_config& r, double seconds, index_t done, bool last) {
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const auto step = static_cast<index_t>(all.front().step);
  if (!terminal && !last && step % 100 != 0) return;
  std::printf("%sstep %td/%td", terminal ? "\r" : "", step, r.training.steps);
  for (const auto& t : all)
    std::printf(" | %s loss %.3f = %.2f bits/byte, %.1fk tokens/s", t.name.c_str(), t.loss, t.loss / std::numbers::ln2,
                static_cast<double>(t.tokens) / t.seconds / 1000);
  const double left = seconds / static_cast<double>(std::max<index_t>(1, done)) * static_cast<double>(r.training.steps - step);
  std::printf(" | %d:%02d left   %s", static_cast<int>(left) / 60, static_cast<int>(left) % 60, terminal && !last ? "" : "\n");
  std::fflush(stdout);
}

void print_usage(const lithe::usage_report& u) {
  std::printf("memory use on held-out text: %.1f %% of slots (%.1f %% as a head's best), KL to uniform %.2f weighted, %.2f counted;\n"
              "  half of the weight lies in %td slots, 90 %% in %td, 99 %% in %td; heads share %.1f %% of their picks\n",
              u.counted.used, u.top1_used, u.weighted.kl_to_uniform, u.counted.kl_to_uniform, u.weighted.top50, u.weighted.top90, u.weighted.top99,
              100 * u.head_overlap);
}

int run(const model_config& asked, const run_config& r) {
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  if (!r.save.empty()) lithe::require_writable(r.save);
  const model_config config = r.resume.empty() ? asked : read_config(r.resume);
  const corpus data(r.text, config.context);

  std::vector<trainer> all;
  all.emplace_back(config.feed_forward, config, r.training);
  if (!r.alone && config.feed_forward != "dense") {
    model_config dense = config;
    dense.feed_forward = "dense";
    all.emplace_back("dense", dense, r.training);
  }
  if (!r.resume.empty())
    for (std::size_t i = 0; i < all.size(); ++i) all[i].resume(i == 0 ? r.resume : twin_path(r.resume));
  std::printf("%s: %zu bytes, the last 5 %% held out; %td blocks of %td features, %td bytes a step\n", r.text.c_str(), data.text.size(), config.layers,
              config.features, r.training.batch * config.context);

  std::signal(SIGINT, [](int) { interrupted = 1; });
  const double begin = now();
  index_t done = 0;
  while (all.front().step < r.training.steps && interrupted == 0) {
    for (auto& t : all) t.train_step(data, r.training, ctx);
    progress(all, r, now() - begin, ++done, all.front().step == r.training.steps || interrupted != 0);
  }
  if (!r.save.empty())
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::string path = i == 0 ? r.save : twin_path(r.save);
      all[i].save(path);
      std::printf("saved %s after step %td\n", path.c_str(), static_cast<index_t>(all[i].step));
    }
  if (interrupted != 0) return 130;

  std::printf("\n%-8s %12s %16s %22s %23s\n", "model", "parameters", "held-out bits/b", "training tokens/s", "inference tokens/s");
  for (auto& t : all) {
    lithe::prepack(t.model);
    const auto e = t.evaluate(data, ctx, nullptr);
    std::printf("%-8s %12td %16.3f %22.0f %23.0f\n", t.name.c_str(), lithe::count_parameters(t.model), e.bits_per_byte,
                static_cast<double>(t.tokens) / std::max(t.seconds, 1e-9), e.tokens_per_second);
  }
  if (has_slots(config)) {
    lithe::usage_meter meter(slots_of(config));
    all.front().evaluate(data, ctx, &meter);
    print_usage(meter.report());
  }
  for (int i = 0; i < r.samples && config.objective == "causal"; ++i)
    std::printf("\n--- sample %d\n%s\n", i + 1, sample(all.front().model, config, "\n", 300, {.temperature = 0.7}, static_cast<std::uint64_t>(i), ctx).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  model_config model;
  run_config r;
  CLI::App app{"Trains a byte-level language model with a memory layer beside its dense twin."};
  app.add_option("--text", r.text, "text file")->capture_default_str();
  app.add_option("--feed-forward", model.feed_forward)->check(CLI::IsMember({"dense", "memory", "flat", "peer", "ultramem", "moe"}))->capture_default_str();
  app.add_option("--memory-at", model.memory_at, "blocks with a memory or experts, from 0")->delimiter(',')->capture_default_str();
  app.add_option("--memory-placement", model.memory_placement)->check(CLI::IsMember({"replace", "after"}))->capture_default_str();
  app.add_option("--objective", model.objective)->check(CLI::IsMember({"causal", "masked"}))->capture_default_str();
  app.add_option("--layers", model.layers)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", model.features)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--context", model.context)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--sub-keys", model.sub_keys, "its square is the number of slots")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--top-k", model.top_k)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--experts", model.experts)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dropout", model.dropout)->capture_default_str();
  app.add_option("--seed", model.seed)->capture_default_str();
  app.add_option("--steps", r.training.steps)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--batch", r.training.batch, "sequences a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rate", r.training.rate, "learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--value-rate", r.training.value_rate, "learning rate of the memory's values")->capture_default_str();
  app.add_option("--value-times", r.training.value_times, "what that is multiplied with at first, falling to 1; 0 = 4 for ultramem, else 1")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  app.add_option("--save", r.save, "file for the model and its training state, also on Ctrl-C");
  app.add_option("--resume", r.resume, "goes on from a saved file; the model is the file's");
  app.add_option("--samples", r.samples, "samples of text at the end")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_flag("--alone", r.alone, "no dense twin");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(model, r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "train_language_model: %s\n", e.what());
    return 1;
  }
}
