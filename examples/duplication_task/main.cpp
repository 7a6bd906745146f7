// The duplication task of arXiv 2001.04451, table 2: sequences 0w0w with random symbols w, of which a causal language model with one layer is to
// predict the second w. Which earlier token holds the next symbol, only its position tells, so a query must find one key among all. Models
// are trained with N rounds of hashing and evaluated with M.
#include <lithe/lithe.hpp>

#include "../support/options.hpp"
#include "../support/steps.hpp"
#include "../support/terminal.hpp"

namespace {

using real = float;
using lithe::index_t;
using lithe::matrix;
using lithe::token_t;

constexpr index_t exact = 0;  // rounds

struct task_config {
  std::string attention = "lsh";
  index_t word = 127, vocabulary = 127;
  index_t features = 128, heads = 4, chunk = 16, buckets = 32;
  index_t steps = 800, batch = 8, warmup = 50, evaluations = 100;
  double rate = 1e-2;
  std::vector<index_t> train_rounds{1, 2, 4, 8, exact}, evaluation_rounds{1, 2, 4, 8, exact};
  std::uint64_t seed = 1;
  int workers = 0;

  [[nodiscard]] index_t length() const { return 2 * (word + 1); }
};

using attention_kind = lithe::one_of<lithe::lsh_attention<real>, lithe::bucket_attention<real>>;
using attention_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, attention_kind>>;
using dense_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, lithe::feed_forward<real>>>;
using model = lithe::sequential<lithe::embedding<real>, attention_part, dense_part, lithe::layer_norm<real>, lithe::linear<real>>;

model make_model(const task_config& c, index_t rounds) {
  const lithe::rng_key key{c.seed};
  const auto attend = [&]() -> attention_kind {
    lithe::token_hash_config hash{.rounds = std::max<index_t>(1, rounds), .buckets = {c.buckets}};
    if (c.attention == "bucket") {
      if (rounds == exact) hash.family = lithe::hash_family::constant;
      return lithe::bucket_attention<real>({.inputs = c.features, .heads = c.heads, .causal = true, .hash = hash}, key.child(0));
    }
    return lithe::lsh_attention<real>(
        {.inputs = c.features, .heads = c.heads, .causal = true, .hash = hash, .chunk = c.chunk, .exact_up_to = rounds == exact ? c.length() : 0},
        key.child(0));
  };
  using lithe::sequential;
  const auto norm = [&] { return lithe::layer_norm<real>(c.features); };
  return model(lithe::embedding<real>({.tokens = c.vocabulary + 1, .features = c.features, .positions = c.length(), .deviation = 1}, key.child(1)),
               attention_part{sequential(norm(), attend())},
               dense_part{sequential(norm(), lithe::feed_forward<real>({.features = c.features, .hidden = 2 * c.features}, key.child(2)))}, norm(),
               lithe::linear<real>({c.features, c.vocabulary + 1}, key.child(3)));
}

/// Sequences 0w0w, and the symbols to predict: those of the second w.
struct batch {
  std::vector<token_t> inputs, targets;
  std::vector<index_t> offsets{0};

  batch(const task_config& c, lithe::rng_key key) {
    for (index_t b = 0; b < c.batch; ++b) {
      for (index_t t = 0; t < c.length(); ++t) {
        const index_t i = t % (c.word + 1);
        const auto symbol = [&](index_t n) {
          return static_cast<token_t>(1 + lithe::uniform(key, static_cast<std::uint64_t>(b * c.word + n)) * static_cast<double>(c.vocabulary));
        };
        inputs.push_back(i == 0 ? 0 : symbol(i - 1));
        targets.push_back(t > c.word && i < c.word ? symbol(i) : -100);
      }
      offsets.push_back(static_cast<index_t>(inputs.size()));
    }
  }
};

/// The share of symbols that are predicted.
double accuracy(const model& m, const task_config& c, lithe::context ctx) {
  matrix<real> logits;
  index_t right = 0, all = 0;
  for (index_t seen = 0; seen < c.evaluations; seen += c.batch) {
    const batch data(c, lithe::rng_key{c.seed}.child(1).child(static_cast<std::uint64_t>(seen)));
    ctx.rows = {data.offsets};
    logits.resize(static_cast<index_t>(data.inputs.size()), c.vocabulary + 1);
    m.forward(data.inputs, logits, ctx);
    for (std::size_t t = 0; t < data.targets.size(); ++t) {
      if (data.targets[t] < 0) continue;
      index_t best = 0;
      logits.row(static_cast<index_t>(t)).maxCoeff(&best);
      right += best == data.targets[t] ? 1 : 0;
      ++all;
    }
  }
  return static_cast<double>(right) / static_cast<double>(all);
}

std::string name(index_t rounds) { return rounds == exact ? "exact" : std::to_string(rounds); }

model train(const task_config& c, index_t rounds, lithe::context ctx) {
  model m = make_model(c, rounds);
  lithe::optimiser<real> adam({.beta2 = 0.98});
  auto gradient = lithe::make_gradient(m);
  model::record record;
  matrix<real> logits;
  const lithe::learning_rate_schedule schedule{
      .learning_rate = c.rate, .warmup_steps = std::min(c.warmup, c.steps), .total_steps = c.steps, .final_ratio = 0.02};
  support::step_guard guard;
  support::progress line("rounds " + name(rounds) + ": step", c.steps);
  ctx.train = true;
  for (index_t step = 0; step < c.steps; ++step) {
    const batch data(c, lithe::rng_key{c.seed}.child(2).child(static_cast<std::uint64_t>(step)));
    ctx.rows = {data.offsets};
    ctx.key = lithe::rng_key{c.seed}.child(3).child(static_cast<std::uint64_t>(step));
    logits.resize(static_cast<index_t>(data.inputs.size()), c.vocabulary + 1);
    lithe::set_zero(m, gradient);
    m.forward(data.inputs, logits, record, ctx);
    const double loss = lithe::cross_entropy<real>(logits, data.targets, {}, logits, ctx).loss;
    m.backward(data.inputs, record, logits, lithe::nothing{}, gradient, ctx);
    const double norm = lithe::clip_by_global_norm(m, gradient, 1.0, ctx);
    if (guard.accepts(loss, norm)) adam.step(m, gradient, schedule(step), ctx);
    line.show(step + 1, {support::format("loss %.4f", loss), guard.report()});
  }
  guard.check();
  return m;
}

void run(const task_config& c) {
  const auto exec = support::make_executor(c.workers);
  lithe::workspace work(exec);
  lithe::context ctx;
  ctx.exec = &exec;
  ctx.work = &work;
  std::printf("0w0w with |w| = %td of %td symbols; %s attention, %td buckets, %td heads, %td features, %td steps of %td sequences\n", c.word,
              c.vocabulary, c.attention.c_str(), c.buckets, c.heads, c.features, c.steps, c.batch);
  std::vector<std::vector<double>> grid;
  for (const index_t trained : c.train_rounds) {
    const model m = train(c, trained, ctx);
    auto& row = grid.emplace_back();
    for (const index_t evaluated : c.evaluation_rounds) {
      model other = make_model(c, evaluated);
      lithe::for_each_tensor([](const std::string&, lithe::role, auto& to, const auto& from) { to = from; }, other, m);
      row.push_back(accuracy(other, c, ctx));
    }
  }
  std::printf("\naccuracy in %% (chance is %.1f)\ntrain \\ evaluate", 100.0 / static_cast<double>(c.vocabulary));
  for (const index_t rounds : c.evaluation_rounds) std::printf(" %8s", name(rounds).c_str());
  for (std::size_t i = 0; i < grid.size(); ++i) {
    std::printf("\n%16s", name(c.train_rounds[i]).c_str());
    for (const double a : grid[i]) std::printf(" %8.2f", 100 * a);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  using support::between;
  task_config c;
  CLI::App app{"Trains and evaluates LSH attention on the duplication task with different numbers of hash rounds."};
  app.add_option("--attention", c.attention, "kind of attention")->check(CLI::IsMember({"lsh", "bucket"}))->capture_default_str();
  app.add_option("--word", c.word, "symbols in w")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--vocabulary", c.vocabulary, "different symbols")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--train-rounds", c.train_rounds, "rounds of hashing to train with; 0 = exact attention")
      ->check(between<index_t>(0, 64))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--evaluation-rounds", c.evaluation_rounds, "rounds of hashing to evaluate with; 0 = exact attention")
      ->check(between<index_t>(0, 64))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--features", c.features, "numbers that stand for a symbol")->check(between<index_t>(1, 16384))->capture_default_str();
  app.add_option("--heads", c.heads, "of attention")->check(between<index_t>(1, 1024))->capture_default_str();
  app.add_option("--chunk", c.chunk, "sorted tokens in a chunk (lsh)")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--buckets", c.buckets, "of a round")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--steps", c.steps, "steps of each training")->check(between<index_t>(1, 1000000000))->capture_default_str();
  app.add_option("--batch", c.batch, "sequences a step")->check(between<index_t>(1, 65536))->capture_default_str();
  app.add_option("--rate", c.rate, "learning rate")->check(between(1e-9, 10.0))->capture_default_str();
  app.add_option("--evaluations", c.evaluations, "sequences to evaluate with")->check(between<index_t>(1, 1000000000))->capture_default_str();
  support::add_seed(app, c.seed, "of the weights and the sequences");
  support::add_workers(app, c.workers);
  return support::run_program(app, argc, argv, [&] {
    run(c);
    return 0;
  });
}
