// Continues prompts with a model that train_language_model or train_exits saved: one file holds all that is needed.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "exit_model.hpp"

namespace {

const std::map<std::string, lithe::exit_confidence> exit_kinds{
    {"full", lithe::exit_confidence::fixed},        {"geometric", lithe::exit_confidence::geometric},
    {"max_prob", lithe::exit_confidence::max_prob}, {"softmax_diff", lithe::exit_confidence::softmax_diff},
    {"entropy", lithe::exit_confidence::entropy},   {"state", lithe::exit_confidence::state}};

struct run_config {
  std::string path, exit = "full", stop;
  std::vector<std::string> prompts{"And it came to pass"};
  lithe::generator_config text{.how = {.temperature = 0.7}, .most = 400};
  double threshold = 0.9;
  std::uint64_t seed = 1;
  int workers = 1;
};

/// Each byte in the colour of its depth, green for the first block, red for the top; where there are no colours, digits below each line.
void print_depths(const std::string& prompt, std::span<const token_t> text, std::span<const std::int32_t> exits, index_t blocks) {
  const bool colour = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  constexpr int ramp[] = {46, 118, 190, 226, 214, 202, 196};
  std::printf("%s", prompt.c_str());
  std::string digits(prompt.size() - (prompt.rfind('\n') + 1), ' ');  // below what is on the last line
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<char>(text[i]);
    if (colour) {
      std::printf("\033[38;5;%dm%c\033[0m", ramp[(exits[i] - 1) * 6 / std::max<index_t>(1, blocks - 1)], byte);
      continue;
    }
    digits += static_cast<char>(exits[i] < 10 ? '0' + exits[i] : '+');
    if (byte != '\n') std::printf("%c", byte);
    if (byte == '\n' || i + 1 == text.size()) std::printf("\n%s\n", std::exchange(digits, "").c_str());
  }
  std::printf("\n");
}

template <class Model>
lithe::generation continued(const Model& model, const run_config& r, const lithe::context& ctx) {
  std::vector<std::vector<token_t>> prompts;
  for (const std::string& p : r.prompts) prompts.push_back(to_tokens(p.empty() ? "\n" : p));
  const auto begin = std::chrono::steady_clock::now();
  auto out = lithe::generate(model, prompts, r.text, lithe::rng_key{r.seed}, ctx);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::size_t bytes = 0;
  for (const auto& text : out.tokens) bytes += text.size();
  std::fprintf(stderr, "%.0f bytes/s\n", static_cast<double>(bytes) / seconds);
  return out;
}

void run(run_config r, const lithe::context& ctx) {
  const model_config config = read_config(r.path);
  lithe::require<lithe::config_error>(config.objective == "causal", r.path, ": a masked model fills gaps, it cannot continue a prompt");
  r.text.capacity = config.context;
  r.text.stop = to_tokens(r.stop);
  if (!has_exits(r.path)) {
    lithe::require<lithe::config_error>(r.exit == "full" && r.text.drafts == 0, r.path, ": --exit and --drafts need a model of train_exits");
    language_model model = make_model(config);
    lithe::load_model(r.path, model);
    lithe::prepack(model);
    const auto out = continued(model, r, ctx);
    for (std::size_t i = 0; i < r.prompts.size(); ++i)
      std::printf("%s%s\n", r.prompts[i].c_str(), std::string(out.tokens[i].begin(), out.tokens[i].end()).c_str());
    return;
  }
  exit_language_model model = make_exit_model(config);
  lithe::load_model(r.path, model);
  lithe::prepack(model);
  const lithe::exit_rule rule{.kind = exit_kinds.at(r.exit), .thresholds = {r.threshold}};
  const auto out = continued(lithe::exit_decoder(model.words, model.stack, {}, rule), r, ctx);
  for (std::size_t i = 0; i < r.prompts.size(); ++i) print_depths(r.prompts[i], out.tokens[i], out.exits[i], config.layers);
  std::fprintf(stderr, "mean exit %.2f of %td blocks", out.mean_exit(), config.layers);
  if (out.drafted > 0) std::fprintf(stderr, "; %td of %td drafts stood", out.accepted, out.drafted);
  std::fprintf(stderr, "\n");
}

}  // namespace

int main(int argc, char** argv) {
  run_config r;
  CLI::App app{"Continues prompts with a saved language model; one with exits shows the depth of every byte."};
  app.add_option("model", r.path, "file saved by train_language_model or train_exits")->required();
  app.add_option("--prompt", r.prompts, "given several times: texts side by side")->allow_extra_args(false)->capture_default_str();
  app.add_option("--length", r.text.most, "bytes to generate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--stop", r.stop, "each of these bytes ends a text");
  app.add_option("--temperature", r.text.how.temperature, "0 = the most likely byte")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-k", r.text.how.top_k, "draw from the k most likely bytes; 0 = all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--top-p", r.text.how.top_p, "draw from the fewest bytes that reach this probability")->capture_default_str();
  app.add_option("--exit", r.exit, "what decides that a byte leaves early")->check(CLI::IsMember(exit_kinds))->capture_default_str();
  app.add_option("--threshold", r.threshold, "of --exit: 0 = after the first block, 1 = never early")->capture_default_str();
  app.add_option("--drafts", r.text.drafts, "bytes that a lower exit drafts for the whole model to check: the same distribution, sooner")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--draft-exit", r.text.draft_exit, "which exit drafts")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seed", r.seed)->capture_default_str();
  app.add_option("--workers", r.workers, "threads")->check(CLI::PositiveNumber)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    const lithe::parallel_executor exec(r.workers);
    lithe::workspace work(exec);
    run(r, {.exec = &exec, .work = &work});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "generate: %s\n", e.what());
    return 1;
  }
}
