// Trains a byte-level language model that has all systems in it, described by a small JSON file, and lets it write with depth-adaptive exits.
#include "../support/options.hpp"
#include "../support/terminal.hpp"
#include "../support/text.hpp"
#include "trainer.hpp"

#if !defined(EXAMPLE_CONFIG)
#define EXAMPLE_CONFIG "examples/all_together/all_together.json"
#endif

namespace {

using model_type = model_of<float>;

const std::map<std::string, lithe::exit_confidence> exit_kinds{
    {"geometric", lithe::exit_confidence::geometric},       {"max_prob", lithe::exit_confidence::max_prob},
    {"softmax_diff", lithe::exit_confidence::softmax_diff}, {"entropy", lithe::exit_confidence::entropy},
    {"state", lithe::exit_confidence::state}};

/// How a model is trained; saved with it, so that the run can be resumed.
struct training_config {
  std::string text;
  index_t steps = 300, sequences = 8;
  double rate = 3e-3;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(training_config, text, steps, sequences, rate)

struct run_config {
  training_config training;
  std::string config, save, resume, prompt = "And it came to pass ", exit = "softmax_diff";
  index_t length = 200;
  double threshold = 0.8;
  lithe::sampling how{.temperature = 0};
  std::uint64_t seed = 1;
  int workers = 0;
};

/// The sequences of one step; the last 5 % of the text are left out.
batch draw(const std::vector<token_t>& text, const trainer<model_type>& t, index_t sequences) {
  batch b;
  const lithe::rng_key key = lithe::rng_key{t.config.seed}.child(7).child(static_cast<std::uint64_t>(t.step));
  const auto last = static_cast<double>(text.size()) * 0.95 - static_cast<double>(t.config.context) - 1;
  for (index_t i = 0; i < sequences; ++i)
    b.add(text, static_cast<std::size_t>(lithe::uniform(key, static_cast<std::uint64_t>(i)) * last), static_cast<std::size_t>(t.config.context));
  return b;
}

void train(trainer<model_type>& t, const std::vector<token_t>& text, const training_config& r, const lithe::context& ctx) {
  const lithe::learning_rate_schedule schedule{
      .learning_rate = r.rate, .warmup_steps = std::min<index_t>(50, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.05};
  const double begin = support::now();
  index_t bytes = 0;
  support::progress line("step", r.steps, t.step);
  while (t.step < r.steps && !support::stop_asked()) {
    const batch b = draw(text, t, r.sequences);
    const auto losses = t.train(b, schedule(static_cast<index_t>(t.step)), ctx);
    bytes += static_cast<index_t>(b.inputs.size());
    line.show(t.step, {support::format("%.3f bits/byte over all exits", losses.decoder / std::numbers::ln2),
                       support::format("exit loss %.3f", losses.exit), t.guard.report(),
                       support::format("%.0f bytes/s", static_cast<double>(bytes) / (support::now() - begin))});
  }
  line.end();
  t.guard.check();
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
  const std::vector<token_t> prompt = to_tokens(r.prompt.empty() ? "\n" : r.prompt);
  const index_t exits = t.decoder().exits();
  if (static_cast<index_t>(prompt.size()) + r.length > t.config.context)
    std::printf("\nthe model sees %td bytes: a text that grows longer goes on from its last half of them\n", t.config.context);
  const auto sample = [&](const char* name, const lithe::exit_rule& rule) {
    const double begin = support::now();
    const lithe::exit_decoder model(t.words(), t.decoder(), {}, rule);
    const auto g = lithe::generate(model, {&prompt, 1}, {.capacity = t.config.context, .how = r.how, .most = r.length}, lithe::rng_key{r.seed}, ctx);
    const double seconds = support::now() - begin;
    std::printf("\n--- %s: mean exit %.2f of %td, %.0f bytes/s\n", name, g.mean_exit(), exits, static_cast<double>(r.length) / seconds);
    support::byte_writer out(stdout);
    out.put(r.prompt);
    out.put(std::string(g.tokens[0].begin(), g.tokens[0].end()));
    out.end();
  };
  sample("all blocks", {});
  sample("with exits", with_exits);
}

int run(const model_config& config, const run_config& r, const char* argv0) {
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const std::string path = support::given_or_bundled(r.training.text, "kjv_new_testament.txt");
  support::outputs files;
  files.reads(path);
  files.reads(r.config);
  files.add_model("--save", r.save);
  const std::vector<token_t> text = to_tokens(support::read_file(path));
  lithe::require<lithe::io_error>(static_cast<index_t>(text.size()) >= 20 * (config.context + 1), path, ": expected at least ", 20 * (config.context + 1),
                                  " bytes of text for a context of ", config.context, ", found ", text.size());
  trainer<model_type> t(config, make_model<float>(config));
  if (!r.resume.empty()) t.resume(r.resume);
  r.how.check();
  const lithe::exit_rule with_exits{.kind = exit_kinds.at(r.exit), .thresholds = {r.threshold}};
  (void)lithe::exit_decoder(t.words(), t.decoder(), {}, with_exits);  // what does not fit is refused before training
  support::catch_signals();
  std::printf("%s: %zu bytes, the last 5 %% held out; %zu reversible blocks, %td exits, %td parameters\n", std::filesystem::path(path).filename().c_str(),
              text.size(), config.attention.size(), t.decoder().exits(), lithe::count_parameters(t.model));
  for (std::size_t i = 0; i < config.attention.size(); ++i)
    std::printf("  block %zu: %s attention, %s feed-forward\n", i + 1, config.attention[i].c_str(), config.feed_forward[i].c_str());
  std::fflush(stdout);
  train(t, text, r.training, ctx);
  if (!r.save.empty()) {
    t.save(r.save, r.training);
    std::printf("saved %s after step %td\n", r.save.c_str(), static_cast<index_t>(t.step));
  }
  if (support::stop_asked()) {
    if (!r.save.empty())
      std::printf("goes on with: %s --resume %s --save %s\n", support::quoted(argv0).c_str(), support::quoted(r.save).c_str(),
                  support::quoted(r.save).c_str());
    return support::stop_status();
  }
  support::release_signals();
  lithe::prepack(t.model);
  print_exits(t, text, ctx);
  if (r.length > 0) write(t, r, with_exits, ctx);
  return 0;
}

/// The model to build: that of a resumed file, which --config must not contradict, or the one that is described.
model_config config_of(const CLI::App& app, run_config& r) {
  const std::string path = r.config.empty() ? EXAMPLE_CONFIG : r.config;
  if (r.resume.empty()) return parse_config(support::read_file(path), path);
  const auto metadata = support::read_saved(r.resume, {"all_together"});
  const model_config saved = read_saved_config(r.resume);
  if (!r.config.empty()) {
    const nlohmann::json asked = parse_config(support::read_file(path), path), found = saved;
    for (const auto& [key, value] : found.items())
      lithe::require<lithe::config_error>(asked.at(key) == value, "--config: ", path, ": ", key, ": expected ", value, " as in ", r.resume, ", got ",
                                          asked.at(key));
  }
  if (metadata.contains("training"))
    support::merged(app, r.resume, r.training, support::read_settings<nlohmann::json>(r.resume, metadata, "training")).get_to(r.training);
  else
    std::printf("%s is of version 0.1, which did not save how it was trained: %td sequences a step, learning rate %g, %td steps\n", r.resume.c_str(),
                r.training.sequences, r.training.rate, r.training.steps);
  return saved;
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  run_config r;
  CLI::App app{"Trains a language model of reversible blocks with any attention, any memory and depth-adaptive exits."};
  app.add_option("--config", r.config, "JSON that describes the model; all_together.json beside the program's source unless given");
  app.add_option("--text", r.training.text, "any file; the bundled King James New Testament unless given");
  app.add_option("--steps", r.training.steps, "steps of the whole run; 0 = only generate")->check(between<index_t>(0, 1000000000))->capture_default_str();
  app.add_option("--sequences", r.training.sequences, "of one context, in a step")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--rate", r.training.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--save", r.save, "file for the model and its training state, also on Ctrl-C");
  app.add_option("--resume", r.resume, "goes on from a saved file with its model and settings; text and training may be given anew");
  app.add_option("--prompt", r.prompt, "what the model continues at the end")->capture_default_str();
  app.add_option("--length", r.length, "bytes to generate")->check(between<index_t>(0, 1000000000))->capture_default_str();
  app.add_option("--temperature", r.how.temperature, "0 = the most likely byte")->check(between(0.0, 100.0))->capture_default_str();
  app.add_option("--top-k", r.how.top_k, "draw from the k most likely bytes; 0 = all")->check(between<index_t>(0, 256))->capture_default_str();
  app.add_option("--top-p", r.how.top_p, "draw from the fewest bytes that reach this probability")->check(between(1e-6, 1.0))->capture_default_str();
  support::add_seed(app, r.seed, "of the drawing");
  app.add_option("--exit", r.exit, "what an exit is decided by")->check(CLI::IsMember(exit_kinds))->capture_default_str();
  app.add_option("--threshold", r.threshold, "confidence with which a byte leaves")->check(between(0.0, 1.0))->capture_default_str();
  support::add_workers(app, r.workers);
  return support::run_program(app, argc, argv, [&] {
    const model_config config = config_of(app, r);
    return run(config, r, argv[0]);
  });
}
