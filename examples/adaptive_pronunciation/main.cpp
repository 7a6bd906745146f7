// Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone.
#include "../support/options.hpp"
#include "../support/text.hpp"
#include "compare.hpp"

namespace {

struct run_config {
  training_plan plan;
  std::string words, save, load, results, plot;
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
  const bool colour = support::may_colour(stdout);
  const spoken s = speak(p, std::span<const entry>(&e, 1), 1, how, ctx);
  std::printf("%s:", e.word.c_str());
  const auto N = static_cast<std::int32_t>(p.decoder.exits());
  for (std::size_t i = 0; i < s.phones[0].size(); ++i) {
    const auto n = s.exits[0][i];
    const char* phone = d.phones[static_cast<std::size_t>(s.phones[0][i])].c_str();
    if (colour)
      std::printf(" \033[38;5;%dm%s\033[0m\033[2m%d\033[0m", support::depth_colour(n, N), phone, n);
    else
      std::printf(" %s/%d", phone, n);
  }
  std::printf("   (block after which each phone left; %.2f of %d on average)\n", s.mean_exit(), N);
}

int run(const CLI::App& app, model_config c, const run_config& r) {
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const std::string words = support::given_or_bundled(r.words, "g2p_cmudict.tsv");
  support::outputs files;
  for (const std::string& path : {words, r.load}) files.reads(path);
  files.add_model("--save", r.save);
  files.add_lines("--results", r.results);
  files.add("--plot", r.plot);
  const dictionary d(words);
  bool with_heads = r.plan.exit_epochs > 0;
  if (!r.load.empty()) {
    const auto metadata = support::read_saved(r.load, {"adaptive_pronunciation"});
    const auto saved = support::read_settings<model_config>(r.load, metadata, "config");
    support::refuse_contradictions(app, r.load, c, saved);
    c = saved;
    const auto trained = metadata.find("exit_heads");
    with_heads = trained == metadata.end() || trained->second == "trained";
  }
  c.phones = std::ssize(d.phones);
  if (r.compare) {
    compare(d, c, r.plan, r.seeds, r.results, r.plot, ctx);
    return 0;
  }
  pronouncer model = make_pronouncer(c);
  if (r.load.empty()) {
    support::catch_signals();
    std::printf("%zu words to learn from, %zu to judge by\n", r.plan.limit > 0 ? std::min(d.train.size(), static_cast<std::size_t>(r.plan.limit)) : d.train.size(), d.test.size());
    std::fflush(stdout);
    model = train_trunk(d, c, r.plan, r.plan.mode, ctx);
    with_heads = with_heads && !support::stop_asked();
    model = train_with_exits(std::move(model), d, c, r.plan, ctx);
  } else {
    lithe::load_model(r.load, model);
  }
  if (!r.save.empty()) {
    lithe::save_model(r.save, model,
                      {{"program", "adaptive_pronunciation"}, {"config", nlohmann::json(c).dump()}, {"exit_heads", with_heads ? "trained" : "untrained"}});
    std::printf("saved %s\n", r.save.c_str());
  }
  if (support::stop_asked()) return support::stop_status();
  support::release_signals();
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
  using support::between;
  model_config c;
  run_config r;
  CLI::App app{"Trains a pronouncer whose decoder may answer after any block, and compares ways to choose the depth of each phone."};
  app.add_option("--words", r.words, "dictionary: word, tab, phones; the bundled part of CMUDICT unless given");
  app.add_option("--word", r.say, "says a word, with the depth of each phone, instead of the table");
  app.add_option("--training", r.plan.mode, "of the trunk: all exits at once, each of another pass, or the last one alone")
      ->check(CLI::IsMember({"aligned", "mixed", "top"}))
      ->capture_default_str();
  app.add_option("--distribution", c.distribution, "of exits; meta: none, a learned confidence")
      ->check(CLI::IsMember({"geometric", "multinomial", "sequence", "meta"}))
      ->capture_default_str();
  app.add_option("--oracle", r.plan.oracle, "what says which exit is right")->check(CLI::IsMember({"correctness", "likelihood"}))->capture_default_str();
  app.add_option("--penalty", r.plan.penalty, "of each block in the oracle")->check(between(0.0, 100.0))->capture_default_str();
  app.add_option("--sigma", r.plan.sigma, "smoothing of the oracle")->check(between(0.0, 100.0))->capture_default_str();
  app.add_option("--alpha", r.plan.alpha, "weight of the exit loss")->check(between(0.0, 100.0))->capture_default_str();
  app.add_flag("--detach", r.plan.detach, "the exit loss does not train the trunk");
  app.add_option("--classifiers", c.classifiers, "whether all exits answer with one classifier")
      ->check(CLI::IsMember({"shared", "independent"}))
      ->capture_default_str();
  app.add_option("--encoder-blocks", c.encoder_blocks, "of the encoder")->check(between<index_t>(1, 256))->capture_default_str();
  app.add_option("--blocks,--decoder-blocks", c.decoder_blocks, "of the decoder")->check(between<index_t>(1, 256))->capture_default_str();
  app.add_option("--features", c.features, "numbers that stand for a letter or a phone")->check(between<index_t>(1, 16384))->capture_default_str();
  app.add_option("--heads", c.heads, "of attention")->check(between<index_t>(1, 1024))->capture_default_str();
  app.add_option("--hidden", c.hidden, "of the feed-forward")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--dropout", c.dropout, "share of numbers left out in training")->check(between(0.0, 0.95))->capture_default_str();
  support::add_seed(app, c.seed, "of the weights and the order of words");
  app.add_option("--epochs", r.plan.epochs, "over the words, for the trunk")->check(between<index_t>(0, 1000000))->capture_default_str();
  app.add_option("--exit-epochs", r.plan.exit_epochs, "after those, with the exit loss")->check(between<index_t>(0, 1000000))->capture_default_str();
  app.add_option("--batch", r.plan.batch, "words a step")->check(between<index_t>(1, 65536))->capture_default_str();
  auto* seeds = app.add_option("--seeds", r.seeds, "of --compare: this many, from --seed")->check(between<index_t>(1, 1000))->capture_default_str();
  app.add_option("--limit", r.plan.limit, "words to train on; 0 = all")->check(between<index_t>(0, 1000000000))->capture_default_str();
  app.add_option("--rate", r.plan.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--search", r.search, "draws of the random search for thresholds; 0 = none")->check(between<index_t>(0, 1000000))->capture_default_str();
  app.add_option("--delta", r.delta, "tolerated risk of the calibrated threshold")->check(between(1e-6, 0.999999))->capture_default_str();
  support::add_workers(app, r.workers);
  app.add_option("--save", r.save, "file for the model, also on Ctrl-C");
  app.add_option("--load", r.load, "a saved model instead of training")
      ->excludes("--training", "--oracle", "--penalty", "--sigma", "--alpha", "--detach", "--epochs", "--exit-epochs", "--batch", "--limit", "--rate");
  app.add_option("--results", r.results, "file that gets the table as lines of JSON; --compare goes on behind the seeds that it has");
  app.add_option("--plot", r.plot, "SVG file: quality against depth");
  auto* compare = app.add_flag("--compare", r.compare, "trains fixed-depth baselines, aligned, mixed and every distribution and target")
                      ->excludes("--save", "--load", "--word", "--training", "--distribution", "--oracle", "--penalty", "--sigma");
  seeds->needs(compare);
  return support::run_program(app, argc, argv, [&] { return run(app, c, r); });
}
