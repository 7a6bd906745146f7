// Trains a byte-level language model of reversible blocks on sequences of up to a million bytes, and prints what it costs by length.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <numbers>
#include <stdexcept>

#include "long_model.hpp"

#if !defined(DEFAULT_TEXT)
#define DEFAULT_TEXT "examples/data/kjv_new_testament.txt"
#endif

namespace {

struct run_config {
  std::string text = DEFAULT_TEXT, save;
  std::vector<index_t> lengths{4096};
  index_t steps = 20;
  double rate = 1e-3, clip = 1;
  int workers = 0;
};

/// What one length came to.
struct result {
  double bits_per_byte = 0, tokens_per_second = 0;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
double gibibytes(long kib) { return static_cast<double>(kib) / (1024.0 * 1024.0); }

result train(const long_config& c, const run_config& r) {
  const auto text = read_text(r.text);
  const lithe::parallel_executor exec(r.workers > 0 ? r.workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  lithe::workspace work(exec);
  long_model model = make_model(c);
  auto gradient = lithe::make_gradient(model);
  lithe::optimiser<real> adam({.weight_decay = 0.01, .groups = {{.pattern = "*bias", .weight_decay = 0}}});
  const auto T = static_cast<std::size_t>(c.length);
  std::printf("length %td, %s attention: %td blocks of %td features, %td parameters%s\n", c.length, c.attention.c_str(), c.layers, c.features,
              lithe::count_parameters(model), T + 1 > text.size() ? "; the text is shorter and is repeated" : "");

  std::vector<token_t> bytes(T + 1);
  result out;
  for (index_t step = 0; step < r.steps; ++step) {
    const double begin = now();
    const lithe::rng_key key = lithe::rng_key{c.seed}.child(7).child(static_cast<std::uint64_t>(step));
    const auto start = static_cast<std::size_t>(lithe::uniform(key, 0) * static_cast<double>(text.size()));
    for (std::size_t i = 0; i <= T; ++i) bytes[i] = text[(start + i) % text.size()];
    // A workspace keeps the largest buffers of every stage; at these lengths they go back to the system in between.
    const bool large = c.length > 32768;
    const lithe::context ctx{.exec = &exec, .work = large ? nullptr : &work, .key = key.child(1), .train = true};
    lithe::set_zero(model, gradient);
    const double loss =
        lithe::reversible_loss(model, std::span<const token_t>(bytes).first(T), std::span<const token_t>(bytes).subspan(1), {}, gradient, ctx).loss;
    lithe::clip_by_global_norm(model, gradient, r.clip, ctx);
    const lithe::learning_rate_schedule schedule{.learning_rate = r.rate, .warmup_steps = std::min<index_t>(50, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.1};
    adam.step(model, gradient, schedule(step), ctx);
    out = {loss / std::numbers::ln2, static_cast<double>(c.length) / (now() - begin)};
    rusage use{};
    ::getrusage(RUSAGE_SELF, &use);
    std::printf("step %td/%td | %.3f bits/byte | %.0f tokens/s | peak memory %.2f GiB\n", step + 1, r.steps, out.bits_per_byte, out.tokens_per_second,
                gibibytes(use.ru_maxrss));
    std::fflush(stdout);
  }
  if (!r.save.empty()) save(r.save, model, c);
  return out;
}

/// Trains in a process of its own, so that the system counts each length's peak memory for itself. Returns false if it failed and has said why.
bool train_apart(const long_config& c, const run_config& r, result& out, double& peak) {
  int ends[2];
  lithe::require<std::runtime_error>(::pipe(ends) == 0, "cannot open a pipe to the process that trains");
  std::fflush(stdout);
  const pid_t child = ::fork();
  lithe::require<std::runtime_error>(child >= 0, "cannot start a process that trains");
  if (child == 0) {
    int code = 1;
    try {
      const result mine = train(c, r);
      code = ::write(ends[1], &mine, sizeof(mine)) == sizeof(mine) ? 0 : 1;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "long_context: %s\n", e.what());
    }
    std::fflush(stdout);
    ::_exit(code);
  }
  ::close(ends[1]);
  const bool received = ::read(ends[0], &out, sizeof(out)) == sizeof(out);
  ::close(ends[0]);
  int status = 0;
  rusage use{};
  ::wait4(child, &status, 0, &use);
  peak = gibibytes(use.ru_maxrss);
  if (WIFSIGNALED(status))
    std::fprintf(stderr, "long_context: signal %d ended the process that trains at %td bytes%s\n", WTERMSIG(status), c.length,
                 WTERMSIG(status) == SIGKILL ? "; the system sends it when memory runs out" : "");
  return received && status == 0;
}

int run(const long_config& asked, const run_config& r) {
  struct row {
    index_t length;
    result r;
    double peak;
  };
  std::vector<row> table;
  for (const index_t length : r.lengths) {
    long_config c = asked;
    c.length = length;
    result out;
    double peak = 0;
    if (!train_apart(c, r, out, peak)) return 1;
    table.push_back({length, out, peak});
  }
  std::printf("\n%s attention, %td blocks of %td features, %td heads of %td%s\n", asked.attention.c_str(), asked.layers, asked.features, asked.heads,
              asked.head_width, asked.attention == "lsh" || asked.attention == "bucket" ? lithe::concat(", ", asked.rounds, " rounds").c_str() : "");
  std::printf("%10s %12s %12s %14s %16s\n", "length", "bits/byte", "tokens/s", "peak GiB", "bytes/token");
  for (const row& t : table)
    std::printf("%10td %12.3f %12.0f %14.2f %16.0f\n", t.length, t.r.bits_per_byte, t.r.tokens_per_second, t.peak,
                t.peak * 1024 * 1024 * 1024 / static_cast<double>(t.length));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains a reversible byte-level language model on long sequences"};
  long_config c;
  run_config r;
  app.add_option("--text", r.text, "any file; the bundled King James New Testament by default")->check(CLI::ExistingFile);
  app.add_option("--length", r.lengths, "bytes in a sequence; several lengths are trained one after the other")->check(CLI::Range(1, 1 << 24));
  app.add_option("--attention", c.attention)->check(CLI::IsMember({"lsh", "bucket", "local", "exact"}))->capture_default_str();
  app.add_option("--layers", c.layers)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--features", c.features, "of one of the two streams")->check(CLI::PositiveNumber)->capture_default_str();
  auto* heads = app.add_option("--heads", c.heads, "features / head width unless given")->check(CLI::PositiveNumber);
  app.add_option("--head-width", c.head_width)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rounds", c.rounds, "of hashing")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--chunk", c.chunk, "tokens that see each other and the chunk before")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--dropout", c.dropout)->capture_default_str();
  app.add_option("--seed", c.seed)->capture_default_str();
  app.add_option("--steps", r.steps)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--workers", r.workers, "threads; 0 = all processors")->capture_default_str();
  app.add_option("--save", r.save, "file for the model of the last length");
  CLI11_PARSE(app, argc, argv);
  if (heads->count() == 0) c.heads = std::max<index_t>(1, c.features / c.head_width);
  try {
    return run(c, r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "long_context: %s\n", e.what());
    return 1;
  }
}
