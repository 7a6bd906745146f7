// Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone.
#include <CLI/CLI.hpp>
#include <cstdlib>

#include "compare.hpp"

#if !defined(DEFAULT_DICTIONARY)
#define DEFAULT_DICTIONARY "examples/data/g2p_cmudict.tsv"
#endif

namespace {

struct run_config {
  training_plan plan;
  std::string words = DEFAULT_DICTIONARY, save, load, results, plot;
  std::vector<std::string> say;
  index_t search = 40, seeds = 3;
  double delta = 0.05;
  int workers = 0;
  bool compare = false;
};

/// Says one word, each phone in the colour of its depth: green left early, red went to the top.
void say(const pronouncer& p, const dictionary& d, const std::string& word, const manner& how, const lithe::context& ctx) {
  entry e;
  e.word = word;
  for (char& ch : e.word) ch = static_cast<char>(std::tolower(static_cast<unsigned char>(ch)));
  lithe::require<lithe::config_error>(dictionary::spell(e.word, e.spelling), "--word: expected 1 to ", longest_word, " letters from a to z, got '",
                                      word, "'");
  const bool colour = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  const spoken s = speak(p, std::span<const entry>(&e, 1), 1, how, ctx);
  std::printf("%s:", e.word.c_str());
  const auto N = static_cast<std::int32_t>(p.decoder.exits());
  constexpr int ramp[] = {46, 118, 190, 226, 214, 202, 196};
  for (std::size_t i = 0; i < s.phones[0].size(); ++i) {
    const auto n = s.exits[0][i];
    const char* phone = d.phones[static_cast<std::size_t>(s.phones[0][i])].c_str();
    if (colour)
      std::printf(" \033[38;5;%dm%s\033[0m\033[2m%d\033[0m", ramp[N > 1 ? (n - 1) * 6 / (N - 1) : 0], phone, n);
    else
      std::printf(" %s/%d", phone, n);
  }
  std::printf("   (block after which each phone left; %.2f of %d on average)\n", s.mean_exit(), N);
}

int run(model_config c, const run_config& r) {
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  for (const std::string& path : {r.save, r.results, r.plot})
    if (!path.empty()) lithe::require_writable(path);
  const dictionary d(r.words);
  bool with_heads = r.plan.exit_epochs > 0;
  if (!r.load.empty()) {
    const auto metadata = lithe::read_model_metadata(r.load);
    const auto found = metadata.find("config");
    lithe::require<lithe::io_error>(found != metadata.end(), r.load, ": expected a model saved by adaptive_pronunciation, found no configuration");
    c = nlohmann::json::parse(found->second).get<model_config>();
    const auto trained = metadata.find("exit_heads");
    with_heads = trained == metadata.end() || trained->second == "trained";
  }
  c.phones = std::ssize(d.phones);
  if (r.compare) {
    compare(d, c, r.plan, r.seeds, r.results, r.plot, ctx);
    return 0;
  }
  pronouncer model = make_pronouncer(c);
  if (!r.load.empty())
    lithe::load_model(r.load, model);
  else
    model = train_with_exits(train_trunk(d, c, r.plan, r.plan.mode, ctx), d, c, r.plan, ctx);
  if (!r.save.empty()) lithe::save_model(r.save, model, {{"config", nlohmann::json(c).dump()}, {"exit_heads", with_heads ? "trained" : "untrained"}});
  lithe::prepack(model);
  const manner usual = usual_manner(with_heads ? c.distribution : "");
  for (const auto& word : r.say) say(model, d, word, usual, ctx);
  if (!r.say.empty()) return 0;
  const auto rows = print_table(model, d, c, with_heads, r.search, r.delta, ctx);
  std::printf("\n");
  for (const char* word : {"banana", "psychology", "rough", "transformer"}) say(model, d, word, usual, ctx);
  if (!r.results.empty()) write_results(r.results, r.plan.mode + ", " + c.distribution, c.seed, rows);
  if (!r.plot.empty()) draw(r.plot, rows, c.decoder_blocks);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  model_config c;
  run_config r;
  CLI::App app{"Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone."};
  app.add_option("--words", r.words, "dictionary: word, tab, phones")->capture_default_str();
  app.add_option("--word", r.say, "says a word, with the depth of each phone, instead of the table");
  app.add_option("--training", r.plan.mode)->check(CLI::IsMember({"aligned", "mixed", "top"}))->capture_default_str();
  app.add_option("--distribution", c.distribution, "of exits; meta: none, a learned confidence")
      ->check(CLI::IsMember({"geometric", "multinomial", "sequence", "meta"}))
      ->capture_default_str();
  app.add_option("--oracle", r.plan.oracle)->check(CLI::IsMember({"correctness", "likelihood"}))->capture_default_str();
  app.add_option("--penalty", r.plan.penalty, "of each block in the oracle")->capture_default_str();
  app.add_option("--sigma", r.plan.sigma, "smoothing of the oracle")->capture_default_str();
  app.add_option("--alpha", r.plan.alpha, "weight of the exit loss")->capture_default_str();
  app.add_flag("--detach", r.plan.detach, "the exit loss does not train the trunk");
  app.add_option("--classifiers", c.classifiers)->check(CLI::IsMember({"shared", "independent"}))->capture_default_str();
  app.add_option("--encoder-blocks", c.encoder_blocks)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--blocks", c.decoder_blocks, "of the decoder")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", c.features)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--heads", c.heads)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--hidden", c.hidden)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dropout", c.dropout)->capture_default_str();
  app.add_option("--seed", c.seed)->capture_default_str();
  app.add_option("--epochs", r.plan.epochs)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--exit-epochs", r.plan.exit_epochs, "after those, with the exit loss")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--batch", r.plan.batch, "words a step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seeds", r.seeds, "of --compare: this many, from --seed")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--limit", r.plan.limit, "words to train on; 0 = all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--rate", r.plan.rate, "learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--search", r.search, "draws of the random search for thresholds; 0 = none")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--delta", r.delta, "tolerated risk of the calibrated threshold")->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  app.add_option("--save", r.save, "file for the model");
  app.add_option("--load", r.load, "a saved model instead of training");
  app.add_option("--results", r.results, "file that gets the table as lines of JSON; --compare goes on behind the seeds that it has");
  app.add_option("--plot", r.plot, "SVG file: quality against depth");
  app.add_flag("--compare", r.compare, "trains fixed-depth baselines, aligned, mixed and every distribution and target")
      ->excludes("--save", "--load", "--word", "--training", "--distribution", "--oracle", "--penalty", "--sigma");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(c, r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "adaptive_pronunciation: %s\n", e.what());
    return 1;
  }
}
