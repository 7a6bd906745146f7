#pragma once

// Letters to phones: an encoder, and a decoder that can answer at every depth. The dictionary, the model, its training, and how well it speaks.

#include <algorithm>
#include <chrono>
#include <fstream>
#include <lithe/io/state.hpp>
#include <lithe/lithe.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

using real = float;
using lithe::index_t;
using lithe::matrix;
using lithe::matrix_view;
using lithe::token_t;

inline constexpr token_t start_phone = 0, end_phone = 1, letters = 26;
inline constexpr index_t longest_word = 32, longest_answer = 24;

struct entry {
  std::string word;
  std::vector<token_t> spelling, phones;
};

/// The dictionary in three parts, shuffled: the first 1,000 words are never trained on, the next 500 choose thresholds.
struct dictionary {
  std::vector<std::string> phones{"<", ">"};
  std::vector<entry> test, tune, train;

  explicit dictionary(const std::string& path) {
    std::ifstream file(path);
    lithe::require<lithe::io_error>(file.good(), path, ": cannot be read");
    std::map<std::string, token_t> number;
    std::vector<entry> all;
    for (std::string line; std::getline(file, line);) {
      const auto tab = line.find('\t');
      lithe::require<lithe::io_error>(tab != std::string::npos, path, ": expected word, tab, phones, got '", line, "'");
      entry e;
      e.word = line.substr(0, tab);
      if (!spell(e.word, e.spelling)) continue;
      std::istringstream rest(line.substr(tab + 1));
      for (std::string phone; rest >> phone;) {
        const auto [it, fresh] = number.try_emplace(phone, static_cast<token_t>(phones.size()));
        if (fresh) phones.push_back(phone);
        e.phones.push_back(it->second);
      }
      if (!e.phones.empty() && static_cast<index_t>(e.phones.size()) < longest_answer) all.push_back(std::move(e));
    }
    lithe::require<lithe::io_error>(all.size() >= 3000, path, ": expected at least 3000 usable words, found ", all.size());
    std::vector<std::size_t> order(all.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [](std::size_t a, std::size_t b) { return lithe::philox({11}, a) < lithe::philox({11}, b); });
    for (std::size_t i = 0; i < order.size(); ++i) (i < 1000 ? test : i < 1500 ? tune : train).push_back(std::move(all[order[i]]));
  }

  /// The letters of a word; false if it has others.
  static bool spell(const std::string& word, std::vector<token_t>& out) {
    out.clear();
    for (const char c : word) {
      if (c < 'a' || c > 'z') return false;
      out.push_back(c - 'a');
    }
    return !out.empty() && static_cast<index_t>(out.size()) <= longest_word;
  }
};

/// What a pronouncer is built from; saved in its file.
struct model_config {
  index_t encoder_blocks = 3, decoder_blocks = 6, features = 128, heads = 4, hidden = 256, phones = 0;
  std::string classifiers = "shared";      ///< shared or independent
  std::string distribution = "geometric";  ///< geometric, multinomial or sequence
  double dropout = 0.1;
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(model_config, encoder_blocks, decoder_blocks, features, heads, hidden, phones, classifiers, distribution, dropout,
                                   seed)

using attention_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, lithe::attention<real>, lithe::dropout<real>>>;
using feed_part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, lithe::feed_forward<real>, lithe::dropout<real>>>;
using encoder_block = lithe::sequential<attention_part, feed_part>;
using decoder_block = lithe::decoder_block<attention_part, feed_part>;
using decoder_type = lithe::adaptive_depth<decoder_block>;
using encoder_type = lithe::sequential<lithe::embedding<real>, lithe::dropout<real>, lithe::stack<encoder_block>, lithe::layer_norm<real>>;

struct pronouncer {
  using scalar = real;
  struct record {
    lithe::record_of<encoder_type> encoder;
    lithe::exit_training_record<decoder_type> decoder;
    lithe::record_of<lithe::sequence_halting<real>> whole;
  };
  struct gradient {
    lithe::gradient_of<encoder_type> encoder;
    lithe::gradient_of<lithe::embedding<real>> phones;
    lithe::gradient_of<decoder_type> decoder;
    lithe::gradient_of<lithe::sequence_halting<real>> whole;
  };

  encoder_type encoder;
  lithe::embedding<real> phones;
  decoder_type decoder;
  lithe::sequence_halting<real> whole;  ///< the sequence-level distribution over exits

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("encoder", s.encoder...);
    f("phones", s.phones...);
    f("decoder", s.decoder...);
    f("whole", s.whole...);
  }
};

inline void set_distribution(pronouncer& p, const std::string& kind, index_t exits, index_t features, lithe::rng_key key) {
  using namespace lithe;
  p.decoder.halt = {};
  p.whole = {};
  if (kind == "sequence")
    p.whole = sequence_halting<real>({.features = features, .outputs = exits}, key);
  else
    p.decoder.halt = halting<real>(
        {.kind = kind == "geometric" ? exit_distribution::geometric : exit_distribution::multinomial, .exits = exits, .features = features}, key);
}

inline pronouncer make_pronouncer(const model_config& c) {
  using namespace lithe;
  const rng_key key{c.seed};
  const index_t D = c.features;
  const auto attend = [&](bool causal, rng_key k) {
    return attention_part{
        sequential(layer_norm<real>(D), attention<real>({.inputs = D, .heads = c.heads, .causal = causal}, k), dropout<real>(c.dropout))};
  };
  const auto feed = [&](rng_key k) {
    return feed_part{sequential(layer_norm<real>(D), feed_forward<real>({.features = D, .hidden = c.hidden, .kind = activation::gelu}, k),
                                dropout<real>(c.dropout))};
  };
  pronouncer p;
  stack<encoder_block> blocks;
  for (index_t i = 0; i < c.encoder_blocks; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(100 + i));
    blocks.blocks.emplace_back(attend(false, k.child(0)), feed(k.child(1)));
  }
  p.encoder = encoder_type(embedding<real>({.tokens = letters, .features = D, .positions = longest_word, .deviation = 1}, key.child(0)),
                           dropout<real>(c.dropout), std::move(blocks), layer_norm<real>(D));
  p.phones = embedding<real>({.tokens = c.phones, .features = D, .positions = longest_answer, .deviation = 1}, key.child(1));
  for (index_t i = 0; i < c.decoder_blocks; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(200 + i));
    p.decoder.stack.blocks.push_back({attend(true, k.child(0)), layer_norm<real>(D),
                                      cross_attention<real>({.inputs = D, .memory_inputs = D, .heads = c.heads}, k.child(1)),
                                      dropout<real>(c.dropout), feed(k.child(2))});
  }
  p.decoder.answers = exit_classifiers<real>({.exits = c.decoder_blocks,
                                              .features = D,
                                              .classes = c.phones,
                                              .norm = c.classifiers == "shared" ? exit_sharing::shared : exit_sharing::independent,
                                              .classifier = c.classifiers == "shared" ? exit_sharing::shared : exit_sharing::independent},
                                             key.child(2));
  set_distribution(p, c.distribution, c.decoder_blocks, D, key.child(3));
  return p;
}

/// Words as ragged rows: spellings for the encoder, "<" and the phones for the decoder, the phones and ">" as its targets.
struct word_batch {
  std::vector<token_t> spelling, inputs, targets;
  std::vector<index_t> spelling_offsets{0}, phone_offsets{0};

  void add(const entry& e) {
    spelling.insert(spelling.end(), e.spelling.begin(), e.spelling.end());
    inputs.push_back(start_phone);
    inputs.insert(inputs.end(), e.phones.begin(), e.phones.end());
    targets.insert(targets.end(), e.phones.begin(), e.phones.end());
    targets.push_back(end_phone);
    spelling_offsets.push_back(static_cast<index_t>(spelling.size()));
    phone_offsets.push_back(static_cast<index_t>(inputs.size()));
  }
};

struct training_config {
  std::string mode = "aligned";  ///< aligned, mixed, or top (only the last exit is trained: a model of fixed depth)
  index_t passes = 2;            ///< of mixed training
  index_t batch = 64;            ///< words
  double rate = 2e-3;
  lithe::exit_training_config exits{};  ///< weights, oracle, α
};

/// A pronouncer in training.
struct trainer {
  pronouncer model;
  training_config config;
  lithe::optimiser<real> adam{lithe::optimiser_config{.beta2 = 0.98, .weight_decay = 0.01}};
  lithe::gradient_of<pronouncer> gradient;
  pronouncer::record record;
  index_t step = 0, steps = 1;
  double loss = 0;

  trainer(pronouncer m, training_config c, index_t all_steps)
      : model(std::move(m)), config(std::move(c)), gradient(lithe::make_gradient(model)), steps(all_steps) {
    config.exits.reduce = lithe::reduction::mean;
    if (config.mode == "top") {
      config.exits.weights.assign(static_cast<std::size_t>(model.decoder.exits()), 0.0);
      config.exits.weights.back() = 1;
    }
  }

  void train(const word_batch& words, std::uint64_t seed, const lithe::context& base) {
    using namespace lithe;
    const auto T = static_cast<index_t>(words.inputs.size()), X = static_cast<index_t>(words.spelling.size()), D = model.decoder.features();
    context enc = base, dec = base;
    enc.train = dec.train = true;
    enc.rows = {words.spelling_offsets};
    dec.rows = {words.phone_offsets};
    enc.key = rng_key{seed}.child(2 * static_cast<std::uint64_t>(step));
    dec.key = rng_key{seed}.child(2 * static_cast<std::uint64_t>(step) + 1);
    const scratch<real> memory(base, X, D), dmemory(base, X, D), x(base, T, D), dx(base, T, D);
    dmemory.map().setZero();
    set_zero(model, gradient);
    model.encoder.forward(words.spelling, memory, record.encoder, enc);
    model.phones.forward(words.inputs, x, dec);
    const memory_view<real> m{memory, enc.rows};
    if (config.mode == "mixed") {
      loss = mixed_exit_step(model.decoder, matrix_view<const real>(x), m, words.targets, config.passes, reduction::mean, -100, record.decoder,
                             dx.view(), dmemory.view(), gradient.decoder, dec)
                 .total;
    } else {
      loss = aligned_exit_step(model.decoder, matrix_view<const real>(x), m, words.targets, config.exits, step, record.decoder, dx.view(),
                               dmemory.view(), gradient.decoder, dec)
                 .total;
      if (config.exits.alpha > 0 && config.exits.targets.granularity == exit_granularity::sequence) train_whole(m, dmemory.view(), enc);
    }
    model.phones.backward(words.inputs, {}, dx, {}, gradient.phones, dec);
    model.encoder.backward(words.spelling, record.encoder, dmemory, {}, gradient.encoder, enc);
    clip_by_global_norm(model, gradient, 1.0, base);
    const learning_rate_schedule schedule{
        .learning_rate = config.rate, .warmup_steps = std::min<index_t>(200, steps), .total_steps = steps, .final_ratio = 0.02};
    adam.step(model, gradient, schedule(step++), base);
  }

 private:
  /// The sequence-level exit loss, which reads the encoder's output.
  void train_whole(lithe::memory_view<real> m, matrix_view<real> dmemory, const lithe::context& ctx) {
    const auto B = m.rows.count(), N = model.decoder.exits();
    const lithe::scratch<real> log_q(ctx, B, N), d(ctx, B, N), dm(ctx, m.x.rows(), m.x.cols());
    model.whole.forward(m.x, log_q, record.whole, ctx);
    loss += lithe::exit_loss<real>(log_q, record.decoder.exits, config.exits.alpha, lithe::reduction::mean, d).loss;
    model.whole.backward(m.x, record.whole, d, dm, gradient.whole, ctx);
    if (!config.exits.detach) lithe::add<real>(dm, dmemory, ctx);
  }
};

/// How well and how deep words are spoken, and how long the decoder took (the encoder apart).
struct spoken {
  std::vector<std::vector<token_t>> phones;
  std::vector<std::vector<std::int32_t>> exits;
  double seconds = 0;
  index_t errors = 0, reference = 0;
  std::vector<double> word_errors;  ///< errors / reference phones of each word, at most 1

  [[nodiscard]] double error_rate() const { return static_cast<double>(errors) / static_cast<double>(std::max<index_t>(1, reference)); }
  [[nodiscard]] double mean_exit() const {
    double sum = 0, n = 0;
    for (const auto& e : exits)
      for (const auto x : e) sum += x, n += 1;
    return n == 0 ? 0 : sum / n;
  }
};

inline index_t edit_distance(std::span<const token_t> a, std::span<const token_t> b) {
  std::vector<index_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), index_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    index_t diagonal = row[0];
    row[0] = static_cast<index_t>(i) + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const index_t change = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({change, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

/// Decodes a batch of words by whatever `decode(embedding, decoder, memory, prompts, context)` does.
template <class Decode>
spoken speak(const pronouncer& p, std::span<const entry> words, index_t batch, const lithe::context& base, Decode&& decode) {
  spoken out;
  const auto n = static_cast<index_t>(words.size());
  matrix<real> memory;
  for (index_t first = 0; first < n; first += batch) {
    const auto part = words.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(std::min(batch, n - first)));
    word_batch b;
    for (const entry& e : part) b.add(e);
    lithe::context ctx = base;
    ctx.rows = {b.spelling_offsets};
    memory.resize(static_cast<index_t>(b.spelling.size()), p.decoder.features());
    p.encoder.forward(b.spelling, memory, ctx);
    const lithe::memory_view<real> m{memory, ctx.rows};
    const std::vector<std::vector<token_t>> prompts(part.size(), {start_phone});
    const auto begin = std::chrono::steady_clock::now();
    auto said = decode(p.phones, p.decoder, m, std::span<const std::vector<token_t>>(prompts), ctx);
    out.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    for (std::size_t i = 0; i < part.size(); ++i) {
      auto phones = said.tokens[i];
      if (!phones.empty() && phones.back() == end_phone) phones.pop_back();
      const index_t wrong = edit_distance(phones, part[i].phones), length = static_cast<index_t>(part[i].phones.size());
      out.errors += wrong;
      out.reference += length;
      out.word_errors.push_back(std::min(1.0, static_cast<double>(wrong) / static_cast<double>(std::max<index_t>(1, length))));
      out.phones.push_back(std::move(phones));
      out.exits.push_back(std::move(said.exits[i]));
    }
  }
  return out;
}

/// Greedily with an exit rule; the sequence-level distribution plans its exits from the memory.
inline spoken speak(const pronouncer& p, std::span<const entry> words, index_t batch, const lithe::exit_rule& rule, const lithe::context& base) {
  const bool whole = rule.kind == lithe::exit_confidence::fixed && rule.exits.empty() && p.whole.head.output.weight.size() != 0;
  return speak(p, words, batch, base, [&](const auto& phones, const auto& decoder, const auto& m, auto prompts, const lithe::context& ctx) {
    lithe::generation_config c{.max_steps = longest_answer, .end = end_phone, .rule = rule};
    if (whole) {
      const lithe::scratch<real> log_q(ctx, m.rows.count(), decoder.exits());
      p.whole.forward(m.x, log_q, ctx);
      c.rule.exits.resize(static_cast<std::size_t>(m.rows.count()));
      lithe::most_probable_exits<real>(log_q, c.rule.exits);
    }
    return lithe::generate(phones, decoder, m, prompts, c, ctx);
  });
}
