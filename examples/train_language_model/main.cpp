// Trains a small byte-level language model with a product-key memory on any text, beside its dense twin.
#include "../support/text.hpp"
#include "model_options.hpp"
#include "trainer.hpp"

namespace {

/// What a run is asked for; `training`, `text` and `alone` are saved with its models, so that it can be resumed.
struct run_config {
  training_config training;
  std::string text, save, resume;
  int workers = 0, samples = 2;
  bool alone = false;
};

nlohmann::json training_of(const run_config& r) {
  nlohmann::json all = r.training;
  all["text"] = r.text;
  all["alone"] = r.alone;
  return all;
}

/// Where the dense twin of a model lies.
std::string twin_path(const std::string& path) {
  return std::filesystem::path(path).replace_extension(".dense.safetensors").string();
}

/// A resumed run is the file's: what the command line says of the model must be true, what it says of the training
/// replaces what the file says, and what it does not say is as it was.
void take_from_file(const CLI::App& app, model_config& model, run_config& r) {
  const auto metadata = support::read_saved(r.resume, {"train_language_model"});
  const auto saved = support::read_settings<model_config>(r.resume, metadata, "config");
  support::refuse_contradictions(app, r.resume, model, saved);
  model = saved;
  if (!metadata.contains("training")) {
    std::printf("%s is of version 0.1, which did not save how it was trained: batch %td, learning rate %g, %td steps\n",
                r.resume.c_str(), r.training.batch, r.training.rate, r.training.steps);
    return;
  }
  const auto training = support::read_settings<nlohmann::json>(r.resume, metadata, "training");
  const nlohmann::json all = support::merged(app, r.resume, training_of(r), training);
  all.get_to(r.training);
  all.at("text").get_to(r.text);
  all.at("alone").get_to(r.alone);
}

/// All models of a run, step by step; where the first one stood when it began.
index_t train(std::vector<trainer>& all, const corpus& data, const run_config& r, const lithe::context& ctx) {
  const std::int64_t first = all.front().step, steps = r.training.steps;
  support::progress line("step", steps, first);
  while (all.front().step < steps && !support::stop_asked()) {
    for (auto& t : all) t.train_step(data, r.training, ctx);
    std::vector<std::string> fields;
    for (const auto& t : all)
      fields.push_back(support::format("%s %.2f bits/byte", t.name.c_str(), t.loss / std::numbers::ln2));
    for (const auto& t : all) fields.push_back(t.guard.report());
    for (const auto& t : all)
      fields.push_back(support::format("%.1fk bytes/s", static_cast<double>(t.tokens) / t.seconds / 1000));
    line.show(all.front().step, std::move(fields));
  }
  line.end();
  for (const auto& t : all) t.guard.check();
  return static_cast<index_t>(first);
}

void print_usage(const lithe::usage_report& u) {
  std::printf(
      "memory use on held-out text: %.1f %% of slots (%.1f %% as a head's best), KL to uniform %.2f weighted, %.2f "
      "counted;\n"
      "  half of the weight lies in %td slots, 90 %% in %td, 99 %% in %td; heads share %.1f %% of their picks\n",
      u.counted.used, u.top1_used, u.weighted.kl_to_uniform, u.counted.kl_to_uniform, u.weighted.top50,
      u.weighted.top90, u.weighted.top99, 100 * u.head_overlap);
}

/// How good the models are, what their memories are used for, and what they write.
void report(std::vector<trainer>& all, const corpus& data, const run_config& r, const lithe::context& ctx) {
  const model_config& config = all.front().config;
  std::printf("\n%-8s %12s %16s %22s %23s\n", "model", "parameters", "held-out bits/b", "training tokens/s",
              "inference tokens/s");
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
  for (int i = 0; i < r.samples && config.objective == "causal"; ++i) {
    std::printf("\n--- sample %d\n", i + 1);
    support::byte_writer out(stdout);
    out.put(sample(all.front().model, config, "\n", 300, {.temperature = 0.7}, static_cast<std::uint64_t>(i), ctx));
    out.end();
  }
}

int run(const model_config& config, run_config r, const char* argv0) {
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const std::string text = support::given_or_bundled(r.text, "kjv_new_testament.txt");
  const bool with_twin = !r.alone && config.feed_forward != "dense";
  support::outputs files;
  files.reads(text);
  files.add_model("--save", r.save);
  if (with_twin && !r.save.empty()) files.add_model("--save", twin_path(r.save));
  const corpus data(text, config.context);

  std::vector<trainer> all;
  all.emplace_back(config.feed_forward, config, r.training);
  if (with_twin) {
    model_config dense = config;
    dense.feed_forward = "dense";
    all.emplace_back("dense", dense, r.training);
  }
  if (!r.resume.empty())
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::string path = i == 0 ? r.resume : twin_path(r.resume);
      all[i].resume(path);
      lithe::require<lithe::io_error>(all[i].step == all[0].step, path, ": expected the twin of ", r.resume,
                                      " after step ", all[0].step, ", found one after step ", all[i].step,
                                      " (--alone goes on without it)");
    }
  support::catch_signals();
  std::printf("%s: %zu bytes, the last 5 %% held out; %td blocks of %td features, %td bytes a step\n",
              std::filesystem::path(text).filename().c_str(), data.text.size(), config.layers, config.features,
              r.training.batch * config.context);
  if (!r.save.empty())
    std::printf("%s %s, at the end or on Ctrl-C\n", std::filesystem::exists(r.save) ? "replaces" : "saves",
                r.save.c_str());
  if (!r.resume.empty() && all.front().step >= r.training.steps)
    std::printf("all %td steps of this run are done; --steps says how many it is to have\n", r.training.steps);
  std::fflush(stdout);

  const index_t first = train(all, data, r, ctx);
  if (!r.save.empty() && !(r.save == r.resume && all.front().step == first))
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::string path = i == 0 ? r.save : twin_path(r.save);
      all[i].save(path, training_of(r));
      std::printf("saved %s after step %td\n", path.c_str(), static_cast<index_t>(all[i].step));
    }
  if (support::stop_asked()) {
    if (!r.save.empty())
      std::printf("goes on with: %s --resume %s\n", support::quoted(argv0).c_str(), support::quoted(r.save).c_str());
    return support::stop_status();
  }
  support::release_signals();
  report(all, data, r, ctx);
  if (!r.save.empty() && config.objective == "causal")
    std::printf("\nplay with it: %s %s --prompt 'And he said'\n", support::sibling(argv0, "generate").c_str(),
                support::quoted(r.save).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  model_config model;
  run_config r;
  CLI::App app{"Trains a byte-level language model with a memory layer beside its dense twin."};
  app.add_option("--text", r.text, "text file; the bundled King James New Testament unless given");
  add_model_options(app, model);
  app.add_option("--memory-at", model.memory_at,
                 "blocks with a memory or experts, from 0; block 1, or the only one, unless given")
      ->delimiter(',')
      ->check(between<index_t>(0, 255));
  app.add_option("--memory-placement", model.memory_placement,
                 "whether a memory stands in place of the feed-forward or after it")
      ->check(CLI::IsMember({"replace", "after"}))
      ->capture_default_str();
  app.add_option("--objective", model.objective, "causal: the next byte; masked: bytes behind masks")
      ->check(CLI::IsMember({"causal", "masked"}))
      ->capture_default_str();
  app.add_option("--sub-keys", model.sub_keys, "its square is the number of slots")
      ->check(between<index_t>(1, 8192))
      ->capture_default_str();
  app.add_option("--top-k", model.top_k, "slots that a head reads for a byte")
      ->check(between<index_t>(1, 8192))
      ->capture_default_str();
  app.add_option("--experts", model.experts, "of moe; 2 work on a byte")
      ->check(between<index_t>(2, 65536))
      ->capture_default_str();
  app.add_option("--dropout", model.dropout, "share of numbers left out in training")
      ->check(between(0.0, 0.95))
      ->capture_default_str();
  app.add_option("--steps", r.training.steps, "steps of the whole run")
      ->check(between<index_t>(0, 1000000000))
      ->capture_default_str();
  app.add_option("--batch", r.training.batch, "sequences a step")
      ->check(between<index_t>(1, 65536))
      ->capture_default_str();
  app.add_option("--rate", r.training.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--value-rate", r.training.value_rate, "learning rate of the memory's values")
      ->check(between(0.0, 10.0))
      ->capture_default_str();
  app.add_option("--value-times", r.training.value_times,
                 "what that is multiplied with at first, falling to 1; 0 = 4 for ultramem, else 1")
      ->check(between(0.0, 1000.0))
      ->capture_default_str();
  support::add_workers(app, r.workers);
  auto* save = app.add_option(
      "--save", r.save,
      "file for the model and its training state; unless given language_model.safetensors, with a number if that is "
      "taken, or the resumed file; empty for none");
  app.add_option("--resume", r.resume,
                 "goes on from a saved file with its model and settings; text and training may be given anew");
  app.add_option("--samples", r.samples, "samples of text at the end")->check(between(0, 1000))->capture_default_str();
  app.add_flag("--alone", r.alone, "no dense twin");
  return support::run_program(app, argc, argv, [&] {
    place_memory(app, model);
    if (!r.resume.empty()) take_from_file(app, model, r);
    if (save->count() == 0)
      r.save = r.resume.empty() ? support::free_name("language_model.safetensors", twin_path) : r.resume;
    return run(model, r, argv[0]);
  });
}
