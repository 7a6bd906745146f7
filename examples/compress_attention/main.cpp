// Re-parametrises the attention of a trained language model with collaborative heads, beside its rivals at the same number of parameters;
// or that of a published checkpoint, from file to file.
#include <lithe/io/attention_checkpoints_encoder.hpp>

#include "../support/options.hpp"
#include "../support/text.hpp"
#include "compressed_model.hpp"

namespace {

struct settings {
  std::string model, text, prompt = "And he said unto them, ", save, plot = "captured_variance.svg", json, import,
                     output = "collaborative.safetensors";
  index_t train_steps = 600, fine_tune_steps = 100, pieces = 40, heads = 0, rank = 0, save_fraction = 4;
  double fine_tune_rate = 3e-4;
  int workers = 0;
};

void write_text(const std::string& path, const std::string& text) {
  support::write_file(path, text);
  std::printf("wrote %s\n", path.c_str());
}

lithe::decomposition_options with_progress(index_t rank, support::progress& line) {
  return {.rank = rank, .progress = [&line](index_t, index_t sweep, double error) { line.show(sweep, {support::format("error %.6f", error)}); }};
}
/// `fit` with a line of progress, which a table row then takes the place of.
void fit(compressed::model& m, const corpus& data, const model_config& c, const compressed::fit_options& o, const lithe::context& ctx) {
  support::progress line("step", 0, 0, stderr);
  compressed::fit(m, data, c.context, o, ctx, [&](double share) { line.show(std::lround(share * static_cast<double>(o.steps)) + 1); });
  line.clear();
}

int run_import(const settings& s, const lithe::context& ctx) {
  using namespace lithe;
  const safetensors_file from(s.import);
  index_t heads = s.heads;
  const auto config = std::filesystem::path(s.import).parent_path() / "config.json";
  if (heads == 0 && std::filesystem::exists(config)) {
    const auto j = nlohmann::json::parse(support::read_file(config), nullptr, false);
    require<io_error>(j.is_object(), config.string(), ": expected a JSON object");
    for (const char* name : {"num_attention_heads", "n_heads", "encoder_attention_heads"})
      if (heads == 0 && j.contains(name) && j.at(name).is_number_integer()) heads = j.at(name);
  }
  require<config_error>(heads > 0, "--import: expected --heads, or a config.json beside the file that says it");
  const auto all = find_attention(from);
  require<io_error>(!all.empty(), s.import, ": expected attention under the names of BERT, DistilBERT, ALBERT or Whisper, found none");
  const index_t rank =
      s.rank > 0 ? s.rank : from.info(published_tensors(from).stored(all.front().query + ".weight")).rows() / 2;
  std::printf("%zu attention layers of %td heads, %td shared dimensions\n", all.size(), heads, rank);
  support::progress line("sweep", 0, 0, stderr);
  reparametrise_checkpoint(from, s.output, heads, with_progress(rank, line), ctx, [&](const attention_names& n, const decomposition& d) {
    line.clear();
    std::printf("%-60s error %.4f after %zu sweeps%s%s\n", n.block.c_str(), d.error(), d.errors.size() - 1, d.converged ? "" : ", not converged",
                d.regularised ? ", regularised" : "");
  });
  std::printf("wrote %s\n", s.output.c_str());
  return 0;
}

void print_head() {
  std::printf("\n%-26s %8s %12s %12s %12s %10s %10s %10s\n%-26s %8s %12s %12s %12s %10s %10s %10s\n", "model", "error", "parameters", "kFLOP",
              "cached bytes", "decode", "bits/byte", "bits/byte", "", "", "of attention", "a token", "a token", "us/token", "at once", "fine-tuned");
}
/// One line of the table; the model after its fine-tuning.
compressed::model report(const std::string& name, compressed::model m, double error, const corpus& data, const model_config& c, const settings& s,
                         const lithe::context& ctx) {
  const auto size = compressed::size_of_attention(m);
  const double before = compressed::bits_per_byte(m, data, c.context, s.pieces, ctx);
  const double flops = lithe::cost_of(m, c.context).flops;
  const double decode = compressed::decode_time(m, data, c.context, ctx);
  fit(m, data, c, {.steps = s.fine_tune_steps, .rate = s.fine_tune_rate}, ctx);
  const double after = compressed::bits_per_byte(m, data, c.context, s.pieces, ctx);
  std::printf("%-26s %8.4f %12td %12.0f %12td %10.1f %10.3f %10.3f\n", name.c_str(), error, size.parameters, flops / 1000, 4 * size.cached, decode,
              before, after);
  std::fflush(stdout);
  return m;
}

int run(const settings& s) {
  using namespace lithe;
  const auto exec = support::make_executor(s.workers);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  const std::string text = support::given_or_bundled(s.text, "kjv_new_testament.txt");
  support::outputs files;
  for (const std::string& path : {text, s.model, s.import}) files.reads(path);
  if (!s.import.empty()) {
    files.add("--output", s.output);
    return run_import(s, ctx);
  }
  files.add_model("--save", s.save);
  files.add("--plot", s.plot);
  files.add("--json", s.json);

  model_config c;
  c.feed_forward = "dense";
  if (!s.model.empty()) c = read_config(s.model, {"train_language_model", "compress_attention"});
  require<config_error>(c.objective == "causal", s.model, ": expected a causal model, got a masked one");
  const corpus data(text, c.context);
  const auto metadata = s.model.empty() ? metadata_map{} : read_model_metadata(s.model);
  const index_t width = metadata.contains("key_width") ? support::read_settings<index_t>(s.model, metadata, "key_width") : 0;
  compressed::model model = s.model.empty() ? compressed::widen(make_model(c)) : compressed::read(s.model, c, width, ctx);
  if (width > 0) {
    print_head();
    report(concat("collaborative, r = ", width), model, 0, data, c, s, ctx);
    std::printf("\n");
    support::byte_writer out(stdout);
    out.put(sample(model, c, s.prompt, 200, {.temperature = 0.8, .top_k = 20}, c.seed, ctx));
    out.end();
    return 0;
  }
  if (s.model.empty()) {
    std::printf("no model given: training one for %td steps\n", s.train_steps);
    std::fflush(stdout);
    fit(model, data, c, {.steps = s.train_steps, .rate = 3e-3}, ctx);
  }

  // The paper's figure.
  std::vector<key_query_spectrum> spectra;
  lithe::for_each_attention(model, [&](const std::string& name, const attention<real>& l) {
    spectra.push_back(spectrum_of(name, key_query_weights_of(l), l.config.heads));
  });
  std::printf("\ncaptured variance of the key-query product, all heads together (and of single heads, mean):\n");
  for (const auto& l : spectra) {
    const auto all = captured_variance(l.all);
    std::printf("%-12s", l.name.c_str());
    for (const std::size_t share : {8, 4, 3, 2}) {
      double heads = 0;
      for (const auto& h : l.heads)
        heads += captured_variance(h)[std::max<std::size_t>(1, h.size() / share) - 1] / static_cast<double>(l.heads.size());
      std::printf("  1/%zu: %.3f (%.3f)", share, all[std::max<std::size_t>(1, all.size() / share) - 1], heads);
    }
    std::printf("\n");
  }
  if (!s.plot.empty()) write_text(s.plot, to_svg(spectra));
  if (!s.json.empty()) write_text(s.json, to_json(spectra));

  // Which heads matter, for the rival that leaves heads out.
  std::vector<std::vector<double>> importance;
  compressed::train(model, data, c.context, 8, 8, 5, ctx, [&](index_t, auto& gradient, double) {
    std::size_t layer = 0;
    compressed::for_each_attention(model, gradient, [&](const auto& l, const auto& g) {
      importance.resize(std::max(importance.size(), layer + 1));
      const auto now_important = head_importance(l, g);
      importance[layer].resize(now_important.size());
      for (std::size_t h = 0; h < now_important.size(); ++h) importance[layer][h] += now_important[h];
      ++layer;
    });
  });

  print_head();
  report("separate heads", model, 0, data, c, s, ctx);
  for (const index_t fraction : {1, 2, 3, 4, 8}) {
    const index_t rank = std::max<index_t>(1, c.features / fraction);
    index_t parameters = 0;
    for (const auto& [name, method] : {std::pair{"collaborative", decomposition_method::alternating},
                                       {"SVD of heads", decomposition_method::head_svd},
                                       {"SVD of their sum", decomposition_method::product_svd}}) {
      if (fraction == 1 && method != decomposition_method::alternating) continue;
      support::progress line("sweep", 0, 0, stderr);
      auto o = with_progress(rank, line);
      o.method = method;
      double error = 0;
      const compressed::model small = compressed::make(model, o, ctx, error);
      line.clear();
      parameters = compressed::size_of_attention(small).parameters;
      const compressed::model tuned = report(concat(name, ", r = ", rank), small, error, data, c, s, ctx);
      if (!s.save.empty() && fraction == s.save_fraction && method == decomposition_method::alternating) {
        save_model(s.save, tuned, {{"program", "compress_attention"}, {"config", config_text(c)}, {"key_width", std::to_string(rank)}});
        std::printf("saved %s\n", s.save.c_str());
      }
    }
    if (fraction == 1) continue;
    // As many heads as the collaborative layers' parameters pay for, in each layer the most important ones.
    const index_t keep = std::clamp<index_t>(c.heads * parameters / compressed::size_of_attention(model).parameters, 1, c.heads);
    compressed::model pruned = model;
    auto no_gradient = make_gradient(pruned);
    std::size_t layer = 0;
    compressed::for_each_attention(pruned, no_gradient, [&](auto& l, auto&) {
      const auto& weight = importance[layer++];
      std::vector<index_t> order(weight.size());
      std::iota(order.begin(), order.end(), index_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [&](index_t a, index_t b) { return weight[static_cast<std::size_t>(a)] > weight[static_cast<std::size_t>(b)]; });
      order.resize(static_cast<std::size_t>(keep));
      std::sort(order.begin(), order.end());
      l = prune_heads<real>(l, order);
    });
    report(concat(keep, " of ", c.heads, " heads"), pruned, 0, data, c, s, ctx);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  settings s;
  CLI::App app{"Re-parametrises trained attention with collaborative heads, beside truncated SVD and head pruning."};
  auto* model = app.add_option("model", s.model,
                               "file saved by train_language_model (causal), or by this program: then it is only judged; without one a small "
                               "model is trained");
  app.add_option("--text", s.text, "text file; the bundled King James New Testament unless given");
  app.add_option("--train-steps", s.train_steps, "steps of the small model")
      ->check(between<index_t>(0, 1000000000))
      ->excludes(model)
      ->capture_default_str();
  app.add_option("--fine-tune", s.fine_tune_steps, "steps after compression")->check(between<index_t>(0, 1000000000))->capture_default_str();
  app.add_option("--rate", s.fine_tune_rate, "learning rate of those")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--pieces", s.pieces, "held-out contexts to evaluate on")->check(between<index_t>(1, 1000000000))->capture_default_str();
  app.add_option("--plot", s.plot, "SVG of the captured variance; empty for none")->capture_default_str();
  app.add_option("--json", s.json, "file for the same as JSON");
  app.add_option("--prompt", s.prompt, "what a compressed model continues")->capture_default_str();
  auto* save = app.add_option("--save", s.save, "file for the chosen compressed model, fine-tuned");
  app.add_option("--save-fraction", s.save_fraction, "which: features / this dimensions")
      ->check(CLI::IsMember({1, 2, 3, 4, 8}))
      ->capture_default_str();
  auto* import = app.add_option("--import", s.import, "safetensors file with the attention of BERT, DistilBERT, ALBERT or Whisper: only converts it")
                     ->excludes(model, save);
  app.add_option("--heads", s.heads, "its heads; 0 = what config.json beside it says")
      ->check(between<index_t>(0, 1024))
      ->needs(import)
      ->capture_default_str();
  app.add_option("--rank", s.rank, "its shared dimensions; 0 = half of the key width")
      ->check(between<index_t>(0, 65536))
      ->needs(import)
      ->capture_default_str();
  app.add_option("--output", s.output, "the converted file")->needs(import)->capture_default_str();
  support::add_workers(app, s.workers);
  return support::run_program(app, argc, argv, [&] { return run(s); });
}
