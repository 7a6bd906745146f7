// Continues prompts with a model that train_language_model or train_exits saved: one file holds all that is needed.
#include "../support/options.hpp"
#include "../support/text.hpp"
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
  int workers = 0;
};

/// Continues all prompts side by side. The first text is written while it comes, then what there is of the next one,
/// and so on.
template <class Model>
lithe::generation write(const Model& model, const run_config& r, index_t exits, const lithe::context& ctx) {
  std::vector<std::vector<token_t>> prompts;
  for (const std::string& p : r.prompts) prompts.push_back(to_tokens(p.empty() ? "\n" : p));
  lithe::generator<Model> g(model, r.text);
  g.start(prompts, lithe::rng_key{r.seed}, ctx);
  const double begin = support::now();
  support::byte_writer out(stdout, static_cast<int>(exits));
  out.put(r.prompts.front());
  std::size_t at = 0, done = 0;  // the text that is written, and how much of its continuation
  for (bool more = true; more;) {
    more = g.step(ctx) > 0 && !support::stop_asked();
    while (at < prompts.size()) {
      const auto text = g.text(static_cast<index_t>(at)).subspan(prompts[at].size());
      for (; done < text.size(); ++done)
        out.put(static_cast<char>(text[done]), exits == 0 ? 0 : g.exits(static_cast<index_t>(at))[done]);
      const bool over =
          static_cast<index_t>(done) >= r.text.most ||
          (done > 0 && std::find(r.text.stop.begin(), r.text.stop.end(), text[done - 1]) != r.text.stop.end());
      if (more && !over) break;
      out.end();
      done = 0;
      if (++at < prompts.size()) out.put(r.prompts[at]);
    }
  }
  lithe::generation all = g.result();
  std::size_t bytes = 0;
  for (const auto& text : all.tokens) bytes += text.size();
  std::fprintf(stderr, "%.0f bytes/s\n", static_cast<double>(bytes) / (support::now() - begin));
  return all;
}

int run(run_config r) {
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  const lithe::context ctx{.exec = &exec, .work = &work};
  const model_config config = read_config(r.path, {"train_language_model", "train_exits"});
  lithe::require<lithe::config_error>(config.objective == "causal", r.path,
                                      ": a masked model fills gaps, it cannot continue a prompt");
  r.text.capacity = config.context;
  r.text.stop = to_tokens(r.stop);
  std::size_t longest = 0;
  for (const auto& p : r.prompts) longest = std::max(longest, p.size());
  if (static_cast<index_t>(longest) + r.text.most > config.context)
    std::fprintf(stderr, "the model sees %td bytes: a text that grows longer goes on from its last half of them\n",
                 config.context);
  support::catch_signals();
  if (!has_exits(r.path)) {
    lithe::require<lithe::config_error>(r.exit == "full" && r.text.drafts == 0, r.path,
                                        ": --exit and --drafts need a model of train_exits");
    language_model model = make_model(config);
    lithe::load_model(r.path, model);
    lithe::prepack(model);
    write(model, r, 0, ctx);
    return support::stop_status();
  }
  exit_language_model model = make_exit_model(config);
  lithe::load_model(r.path, model);
  lithe::prepack(model);
  const lithe::exit_rule rule{.kind = exit_kinds.at(r.exit), .thresholds = {r.threshold}};
  const char* what = "the block after which each byte left";
  if (support::may_colour(stdout))
    support::print_legend(stdout, what, static_cast<int>(config.layers));
  else
    std::fprintf(stderr, "digits below: %s\n", what);
  const auto out = write(lithe::exit_decoder(model.words, model.stack, {}, rule), r, config.layers, ctx);
  std::fprintf(stderr, "mean exit %.2f of %td blocks", out.mean_exit(), config.layers);
  if (out.drafted > 0) std::fprintf(stderr, "; %td of %td drafts stood", out.accepted, out.drafted);
  std::fprintf(stderr, "\n");
  return support::stop_status();
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  run_config r;
  CLI::App app{"Continues prompts with a saved language model; one with exits shows the depth of every byte."};
  app.add_option("model", r.path, "file saved by train_language_model or train_exits")->required();
  app.add_option("--prompt", r.prompts, "given several times: texts side by side")
      ->allow_extra_args(false)
      ->capture_default_str();
  app.add_option("--length", r.text.most, "bytes to generate")
      ->check(between<index_t>(1, 1000000000))
      ->capture_default_str();
  app.add_option("--stop", r.stop, "each of these bytes ends a text");
  app.add_option("--temperature", r.text.how.temperature, "0 = the most likely byte")
      ->check(between(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--top-k", r.text.how.top_k, "draw from the k most likely bytes; 0 = all")
      ->check(between<index_t>(0, 256))
      ->capture_default_str();
  app.add_option("--top-p", r.text.how.top_p, "draw from the fewest bytes that reach this probability")
      ->check(between(1e-6, 1.0))
      ->capture_default_str();
  auto* exit = app.add_option("--exit", r.exit, "what decides that a byte leaves early")
                   ->check(CLI::IsMember(exit_kinds))
                   ->capture_default_str();
  app.add_option("--threshold", r.threshold, "of --exit: 0 = after the first block, 1 = never early")
      ->check(between(0.0, 1.0))
      ->needs(exit)
      ->capture_default_str();
  auto* drafts =
      app.add_option("--drafts", r.text.drafts,
                     "bytes that a lower exit drafts for the whole model to check: the same distribution, sooner")
          ->check(between<index_t>(0, 1000))
          ->capture_default_str();
  app.add_option("--draft-exit", r.text.draft_exit, "which exit drafts")
      ->check(between<index_t>(1, 256))
      ->needs(drafts)
      ->capture_default_str();
  support::add_seed(app, r.seed, "of the drawing");
  support::add_workers(app, r.workers);
  return support::run_program(app, argc, argv, [&] { return run(r); });
}
