// Trains a small byte-level language model with a product-key memory on any text, beside its dense twin.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <numbers>

#include "language_model.hpp"

#if !defined(DEFAULT_TEXT)
#define DEFAULT_TEXT "examples/data/kjv_new_testament.txt"
#endif

namespace {

volatile std::sig_atomic_t interrupted = 0;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct run_config {
  std::string text = DEFAULT_TEXT, save, resume;
  index_t steps = 1600, batch = 8, warmup = 100;
  double rate = 3e-3, value_rate = 1e-2, weight_decay = 0.01, clip = 1;
  int workers = 0, samples = 2;
  bool alone = false;
};

/// A stretch of text for training and the last 5 % for evaluation.
struct corpus {
  std::vector<token_t> text;
  index_t held_out;

  corpus(const std::string& path, index_t context) : text(read_text(path)), held_out(static_cast<index_t>(text.size()) * 95 / 100) {
    const index_t need = 20 * (context + 1);  // so that the last 5 % hold one context and its next byte
    lithe::require<lithe::io_error>(static_cast<index_t>(text.size()) >= need, path, ": expected at least ", need, " bytes of text for a context of ", context,
                                    ", found ", text.size());
  }
};

/// One model in training. Everything it does is a function of its configuration and the step, so a resumed run repeats an uninterrupted one.
struct trainer {
  std::string name;
  model_config config;
  language_model model;
  lithe::optimiser<real> adam;
  lithe::gradient_of<language_model> gradient;
  language_model::record record;
  matrix<real> logits;
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets;
  std::int64_t step = 0;
  double loss = 0, seconds = 0;
  index_t tokens = 0;

  trainer(std::string name_, const model_config& c, const run_config& r)
      : name(std::move(name_)), config(c), model(make_model(c)), adam(optimiser_settings(model, r)), gradient(lithe::make_gradient(model)) {
    adam.prepare(model, gradient);
  }

  static lithe::optimiser_config optimiser_settings(const language_model& model, const run_config& r) {
    lithe::optimiser_config o{.weight_decay = r.weight_decay};
    bool tables = false;
    lithe::for_each_tensor([&](const std::string& tensor, lithe::role, const auto&) { tables = tables || tensor.ends_with(".values"); }, model);
    if (tables) o.groups.push_back({.pattern = "*.values", .rate = r.value_rate / r.rate});
    o.groups.push_back({.pattern = "*bias", .weight_decay = 0});
    return o;
  }

  /// The input tokens of one batch and what to predict: the next byte, or the bytes behind the masks.
  void draw(const corpus& data, index_t batch) {
    const index_t T = config.context;
    const lithe::rng_key key = lithe::rng_key{config.seed}.child(7).child(static_cast<std::uint64_t>(step));
    inputs.resize(static_cast<std::size_t>(batch * T));
    targets.resize(inputs.size());
    offsets.resize(static_cast<std::size_t>(batch) + 1);
    for (index_t b = 0; b < batch; ++b) {
      const auto at = static_cast<index_t>(lithe::uniform(key, static_cast<std::uint64_t>(b)) * static_cast<double>(data.held_out - T));
      offsets[static_cast<std::size_t>(b) + 1] = (b + 1) * T;
      fill(data, at, static_cast<std::size_t>(b * T), key.child(1));
    }
  }
  void fill(const corpus& data, index_t at, std::size_t to, lithe::rng_key key) {
    for (std::size_t t = 0; t < static_cast<std::size_t>(config.context); ++t) {
      const token_t byte = data.text[static_cast<std::size_t>(at) + t];
      inputs[to + t] = byte;
      targets[to + t] = config.objective == "causal" ? data.text[static_cast<std::size_t>(at) + t + 1] : lithe::uniform(key, to + t) < 0.15 ? byte : -100;
      if (config.objective != "causal" && targets[to + t] >= 0) inputs[to + t] = mask_token;
    }
  }

  void train_step(const corpus& data, const run_config& r, lithe::context ctx) {
    const double begin = now();
    draw(data, r.batch);
    ctx.train = true;
    ctx.rows = {offsets};
    ctx.key = lithe::rng_key{config.seed}.child(8).child(static_cast<std::uint64_t>(step));
    logits.resize(static_cast<index_t>(inputs.size()), byte_values);
    lithe::set_zero(model, gradient);
    model.forward(inputs, logits, record, ctx);
    loss = lithe::cross_entropy<real>(logits, targets, {}, logits, ctx).loss;
    model.backward(inputs, record, logits, lithe::nothing{}, gradient, ctx);
    lithe::clip_by_global_norm(model, gradient, r.clip, ctx);
    const lithe::learning_rate_schedule schedule{.learning_rate = r.rate, .warmup_steps = std::min(r.warmup, r.steps), .total_steps = r.steps, .final_ratio = 0.05};
    adam.step(model, gradient, schedule(step), ctx);
    ++step;
    seconds += now() - begin;
    tokens += static_cast<index_t>(inputs.size());
  }

  struct result {
    double bits_per_byte = 0, tokens_per_second = 0;
  };
  /// Over the held-out text, in pieces of one context; the meter gets what the memory layers read.
  result evaluate(const corpus& data, const lithe::context& base, lithe::usage_meter* meter) {
    const index_t T = config.context, last = static_cast<index_t>(data.text.size()) - 1;
    double sum = 0, seconds_here = 0;
    index_t counted = 0, seen = 0;
    inputs.resize(static_cast<std::size_t>(T));
    targets.resize(inputs.size());
    matrix<real> out(T, byte_values);
    for (index_t at = data.held_out; at + T <= last; at += T) {
      fill(data, at, 0, lithe::rng_key{1}.child(static_cast<std::uint64_t>(at)));
      const double begin = now();
      model.forward(inputs, out, base);
      seconds_here += now() - begin;
      seen += T;
      const auto l = lithe::cross_entropy<real>(out, targets, {.reduce = lithe::reduction::sum}, lithe::matrix_view<real>(), base);
      sum += l.loss;
      counted += l.counted;
      if (meter == nullptr) continue;
      model.forward(inputs, out, record, base);
      for_each_memory(model, record, [&](const auto& memory, const auto& r) {
        matrix<lithe::slot_t> slots(T, memory.keys.picks());
        matrix<real> weights(T, memory.keys.picks());
        memory.picked(r, slots, weights, base);
        meter->add<real>(slots, weights, memory.config.heads);
      });
    }
    return {sum / static_cast<double>(std::max<index_t>(1, counted)) / std::numbers::ln2, static_cast<double>(seen) / seconds_here};
  }

  void save(const std::string& path) {
    lithe::state_writer file;
    file.metadata["config"] = config_text(config);
    file.add_model(model);
    file.add_training("optimizer", adam);
    file.add_training("step", step);
    file.write(path);
  }
  void resume(const std::string& path) {
    lithe::state_reader file(path);
    file.add_model(model);
    file.add_training("optimizer", adam);
    file.add_training("step", step);
    file.load();
  }
};

std::string twin_path(const std::string& path) { return std::filesystem::path(path).replace_extension(".dense.safetensors").string(); }

void progress(const std::vector<trainer>& all, const run_config& r, double seconds, index_t done, bool last) {
  const bool terminal = isatty(STDOUT_FILENO) != 0;
  const auto step = static_cast<index_t>(all.front().step);
  if (!terminal && !last && step % 100 != 0) return;
  std::printf("%sstep %td/%td", terminal ? "\r" : "", step, r.steps);
  for (const auto& t : all)
    std::printf(" | %s loss %.3f = %.2f bits/byte, %.1fk tokens/s", t.name.c_str(), t.loss, t.loss / std::numbers::ln2,
                static_cast<double>(t.tokens) / t.seconds / 1000);
  const double left = seconds / static_cast<double>(std::max<index_t>(1, done)) * static_cast<double>(r.steps - step);
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
  const model_config config = r.resume.empty() ? asked : read_config(r.resume);
  const corpus data(r.text, config.context);

  std::vector<trainer> all;
  all.emplace_back(config.feed_forward, config, r);
  if (!r.alone && config.feed_forward != "dense") {
    model_config dense = config;
    dense.feed_forward = "dense";
    all.emplace_back("dense", dense, r);
  }
  if (!r.resume.empty())
    for (std::size_t i = 0; i < all.size(); ++i) all[i].resume(i == 0 ? r.resume : twin_path(r.resume));
  std::printf("%s: %zu bytes, the last 5 %% held out; %td blocks of %td features, %td bytes a step\n", r.text.c_str(), data.text.size(), config.layers,
              config.features, r.batch * config.context);

  std::signal(SIGINT, [](int) { interrupted = 1; });
  const double begin = now();
  index_t done = 0;
  while (all.front().step < r.steps && interrupted == 0) {
    for (auto& t : all) t.train_step(data, r, ctx);
    progress(all, r, now() - begin, ++done, all.front().step == r.steps || interrupted != 0);
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
  const auto slots = memory_config(config).flat ? memory_config(config).sub_keys : config.sub_keys * config.sub_keys;
  if (config.feed_forward != "dense") {
    lithe::usage_meter meter(slots);
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
  app.add_option("--feed-forward", model.feed_forward)->check(CLI::IsMember({"dense", "memory", "flat", "peer"}))->capture_default_str();
  app.add_option("--memory-at", model.memory_at, "blocks with a memory, from 0")->delimiter(',')->capture_default_str();
  app.add_option("--memory-placement", model.memory_placement)->check(CLI::IsMember({"replace", "after"}))->capture_default_str();
  app.add_option("--objective", model.objective)->check(CLI::IsMember({"causal", "masked"}))->capture_default_str();
  app.add_option("--layers", model.layers)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", model.features)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--context", model.context)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--sub-keys", model.sub_keys, "its square is the number of slots")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--top-k", model.top_k)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dropout", model.dropout)->capture_default_str();
  app.add_option("--seed", model.seed)->capture_default_str();
  app.add_option("--steps", r.steps)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--batch", r.batch, "sequences a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->capture_default_str();
  app.add_option("--value-rate", r.value_rate, "learning rate of the memory's values")->capture_default_str();
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
