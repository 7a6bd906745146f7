// Trains a byte-level language model of reversible blocks on sequences of up to a million bytes, and prints what it costs by length.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <numbers>
#include <stdexcept>

#include "../support/options.hpp"
#include "../support/steps.hpp"
#include "../support/terminal.hpp"
#include "long_model.hpp"

namespace {

using support::now;

struct run_config {
  std::string text, save;
  std::vector<index_t> lengths{4096};
  index_t steps = 20;
  double rate = 1e-3, clip = 1;
  int workers = 0;
};

/// What one length came to.
struct result {
  double bits_per_byte = 0, tokens_per_second = 0;
};

double gibibytes(long kib) { return static_cast<double>(kib) / (1024.0 * 1024.0); }

result train(const long_config& c, const run_config& r) {
  const auto text = read_text(support::given_or_bundled(r.text, "kjv_new_testament.txt"));
  const auto exec = support::make_executor(r.workers);
  lithe::workspace work(exec);
  long_model model = make_model(c);
  auto gradient = lithe::make_gradient(model);
  lithe::optimiser<real> adam({.weight_decay = 0.01, .groups = {{.pattern = "*bias", .weight_decay = 0}}});
  const auto T = static_cast<std::size_t>(c.length);
  std::printf("length %td, %s attention: %td blocks of %td features, %td parameters%s\n", c.length, c.attention.c_str(), c.layers, c.features,
              lithe::count_parameters(model), T + 1 > text.size() ? "; the text is shorter and is repeated" : "");
  std::fflush(stdout);

  std::vector<token_t> bytes(T + 1);
  result out;
  support::step_guard guard;
  support::progress line("step", r.steps);
  for (index_t step = 0; step < r.steps && !support::stop_asked(); ++step) {
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
    const double norm = lithe::clip_by_global_norm(model, gradient, r.clip, ctx);
    const lithe::learning_rate_schedule schedule{.learning_rate = r.rate, .warmup_steps = std::min<index_t>(50, r.steps / 10), .total_steps = r.steps, .final_ratio = 0.1};
    if (guard.accepts(loss, norm)) adam.step(model, gradient, schedule(step), ctx);
    out = {loss / std::numbers::ln2, static_cast<double>(c.length) / (now() - begin)};
    rusage use{};
    ::getrusage(RUSAGE_SELF, &use);
    line.show(step + 1, {support::format("%.3f bits/byte", out.bits_per_byte), guard.report(), support::format("%.0f bytes/s", out.tokens_per_second),
                         support::format("peak memory %.2f GiB", gibibytes(use.ru_maxrss))});
  }
  line.end();
  guard.check();
  if (!r.save.empty() && (c.length == r.lengths.back() || support::stop_asked())) {
    save(r.save, model, c);
    std::printf("saved %s\n", r.save.c_str());
  }
  return out;
}

/// Trains in a process of its own, so that the system counts each length's peak memory for itself. Returns that process's
/// status, which is not 0 if it failed and has said why, or was asked to end.
int train_apart(const long_config& c, const run_config& r, result& out, double& peak) {
  int ends[2];
  lithe::require<std::runtime_error>(::pipe(ends) == 0, "cannot open a pipe to the process that trains");
  std::fflush(stdout);
  const pid_t child = ::fork();
  lithe::require<std::runtime_error>(child >= 0, "cannot start a process that trains");
  if (child == 0) {
    int code = 1;
    try {
      const result mine = train(c, r);
      code = ::write(ends[1], &mine, sizeof(mine)) == sizeof(mine) ? support::stop_status() : 1;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "long_context: %s\n", e.what());
    }
    std::fflush(stdout);
    ::_exit(code);
  }
  support::pass_signals_on(child);
  ::close(ends[1]);
  const bool received = ::read(ends[0], &out, sizeof(out)) == sizeof(out);
  ::close(ends[0]);
  int status = 0;
  rusage use{};
  ::wait4(child, &status, 0, &use);
  support::pass_signals_on(0);
  peak = gibibytes(use.ru_maxrss);
  if (WIFSIGNALED(status)) {
    std::fprintf(stderr, "long_context: signal %d ended the process that trains at %td bytes%s\n", WTERMSIG(status), c.length,
                 WTERMSIG(status) == SIGKILL ? "; the system sends it when memory runs out" : "");
    return 1;
  }
  return WEXITSTATUS(status) == 0 && !received ? 1 : WEXITSTATUS(status);
}

int run(const long_config& asked, const run_config& r) {
  struct row {
    index_t length;
    result r;
    double peak;
  };
  support::outputs files;
  files.reads(support::given_or_bundled(r.text, "kjv_new_testament.txt"));
  files.add_model("--save", r.save);
  support::catch_signals();
  std::vector<row> table;
  for (const index_t length : r.lengths) {
    long_config c = asked;
    c.length = length;
    result out;
    double peak = 0;
    if (const int status = train_apart(c, r, out, peak); status != 0) return status;
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
  using support::between;
  CLI::App app{"Trains a reversible byte-level language model on long sequences"};
  long_config c;
  run_config r;
  app.add_option("--text", r.text, "any file; the bundled King James New Testament unless given");
  app.add_option("--length", r.lengths, "bytes in a sequence; several lengths are trained one after the other")
      ->check(between<index_t>(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--attention", c.attention, "kind of attention of all blocks")
      ->check(CLI::IsMember({"lsh", "bucket", "local", "exact"}))
      ->capture_default_str();
  app.add_option("--layers", c.layers, "reversible blocks")->check(between<index_t>(1, 256))->capture_default_str();
  app.add_option("--features", c.features, "of one of the two streams")->check(between<index_t>(4, 16384))->capture_default_str();
  auto* heads = app.add_option("--heads", c.heads, "of attention; features / head width unless given")->check(between<index_t>(1, 1024));
  app.add_option("--head-width", c.head_width, "features of a head")->check(between<index_t>(1, 1024))->capture_default_str();
  app.add_option("--rounds", c.rounds, "of hashing")->check(between<index_t>(1, 64))->capture_default_str();
  app.add_option("--chunk", c.chunk, "tokens that see each other and the chunk before")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--dropout", c.dropout, "share of numbers left out in training")->check(between(0.0, 0.95))->capture_default_str();
  support::add_seed(app, c.seed, "of the weights and the sequences");
  app.add_option("--steps", r.steps, "steps at each length")->check(between<index_t>(1, 1000000000))->capture_default_str();
  app.add_option("--rate", r.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  support::add_workers(app, r.workers);
  app.add_option("--save", r.save, "file for the model of the last length, or of the one that Ctrl-C ends");
  return support::run_program(app, argc, argv, [&] {
    if (heads->count() == 0) c.heads = std::max<index_t>(1, c.features / c.head_width);
    return run(c, r);
  });
}
