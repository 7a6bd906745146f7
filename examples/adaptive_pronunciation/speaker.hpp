#pragma once

// A pronouncer at work: how well, how deep and how fast it speaks.

#include "trainer.hpp"

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

/// How well and how deep words were spoken, and how long the decoder took (the encoder apart).
struct spoken {
  std::vector<std::vector<token_t>> phones;
  std::vector<std::vector<std::int32_t>> exits;
  double seconds = 0;
  index_t errors = 0, reference = 0;
  std::vector<double> word_errors;  ///< errors / reference phones of each word, at most 1

  void add(const entry& e, std::vector<token_t> said, std::vector<std::int32_t> left) {
    if (!said.empty() && said.back() == end_phone) said.pop_back();
    const index_t wrong = edit_distance(said, e.phones), length = std::ssize(e.phones);
    errors += wrong;
    reference += length;
    word_errors.push_back(std::min(1.0, static_cast<double>(wrong) / static_cast<double>(std::max<index_t>(1, length))));
    phones.push_back(std::move(said));
    exits.push_back(std::move(left));
  }
  [[nodiscard]] double error_rate() const { return static_cast<double>(errors) / static_cast<double>(std::max<index_t>(1, reference)); }
  [[nodiscard]] double mean_exit() const {
    double sum = 0, n = 0;
    for (const auto& e : exits)
      for (const auto x : e) sum += x, n += 1;
    return n == 0 ? 0 : sum / n;
  }
};

/// When phones leave: by a rule, or drafted by exit 1 and checked by the whole stack. A model with the sequence-level distribution plans the exits of
/// a fixed rule without exits from the encoder's output.
struct manner {
  lithe::exit_rule rule{};
  index_t drafts = 0;
};

inline spoken speak(const pronouncer& p, std::span<const entry> words, index_t batch, manner how, const lithe::context& base) {
  spoken out;
  const auto n = static_cast<index_t>(words.size());
  const bool planned = how.rule.kind == lithe::exit_confidence::fixed && how.rule.exits.empty() && p.whole.head.output.weight.size() != 0;
  matrix<real> memory;
  for (index_t first = 0; first < n; first += batch) {
    const auto part = words.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(std::min(batch, n - first)));
    word_batch b;
    for (const entry& e : part) b.add(e);
    lithe::context ctx = base;
    ctx.rows = {b.spelling_offsets};
    memory.resize(static_cast<index_t>(b.spelling.size()), p.decoder.features());
    p.encoder.forward(b.spelling, memory, ctx);
    const std::vector<std::vector<token_t>> prompts(part.size(), {start_phone});
    const double begin = now();
    if (planned) {
      const lithe::scratch<real> log_q(ctx, std::ssize(part), p.decoder.exits());
      p.whole.forward(memory, log_q, ctx);
      how.rule.exits.resize(part.size());
      lithe::most_probable_exits<real>(log_q, how.rule.exits);
    }
    auto said = lithe::generate(lithe::exit_decoder(p.phones, p.decoder, {memory, ctx.rows}, how.rule), prompts,
                                {.how = {.temperature = 0}, .stop = {end_phone}, .most = longest_answer, .drafts = how.drafts}, {}, ctx);
    out.seconds += now() - begin;
    for (std::size_t i = 0; i < part.size(); ++i) out.add(part[i], std::move(said.tokens[i]), std::move(said.exits[i]));
  }
  return out;
}

/// Seconds that one block takes for all phones of some words: what their decoding takes longer through all blocks than through one, when every block
/// has read the memory before. (That a block reads the memory of a word at its first visit is no work for a phone.)
inline double block_seconds(const pronouncer& p, std::span<const entry> words, index_t batch, const lithe::context& base) {
  double seconds = 0;
  const auto n = static_cast<index_t>(words.size()), N = p.decoder.exits(), D = p.decoder.features();
  for (index_t first = 0; first < n; first += batch) {
    const auto part = words.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(std::min(batch, n - first)));
    const index_t R = std::ssize(part);
    word_batch b;
    for (const entry& e : part) b.add(e);
    lithe::context ctx = base;
    ctx.rows = {b.spelling_offsets};
    const lithe::scratch<real> memory(base, std::ssize(b.spelling), D), x(base, R, D), logits(base, R, p.decoder.answers.classes());
    p.encoder.forward(b.spelling, memory, ctx);
    const lithe::memory_view<real> m{memory, {b.spelling_offsets}};
    std::vector<index_t> sources(part.size()), slots, offsets;
    std::iota(sources.begin(), sources.end(), index_t{0});
    std::vector<token_t> ids;
    std::vector<std::int32_t> left(part.size());
    auto cache = lithe::make_adaptive_cache(p.decoder, R, longest_answer + 1);
    lithe::start_memory(p.decoder, m, sources, cache);
    const auto pass = [&](index_t exit) {
      for (const index_t s : sources) lithe::truncate(p.decoder, cache, s, 0);
      auto positions = p.phones.make_cache(R, longest_answer + 1);
      const double begin = now();
      for (index_t t = 0;; ++t) {
        ids.clear();
        slots.clear();
        offsets.assign(1, 0);
        for (const index_t s : sources)
          if (const index_t at = b.phone_offsets[static_cast<std::size_t>(s)] + t; at < b.phone_offsets[static_cast<std::size_t>(s) + 1]) {
            ids.push_back(b.inputs[static_cast<std::size_t>(at)]);
            slots.push_back(s);
            offsets.push_back(std::ssize(slots));
          }
        if (ids.empty()) return now() - begin;
        ctx.rows = {offsets};
        ctx.slots = slots;
        const auto rows = [&](const auto& of) { return of.view().slice_rows(0, std::ssize(ids)); };
        p.phones.decode(ids, rows(x), positions, ctx);
        lithe::adaptive_step(p.decoder, matrix_view<const real>(rows(x)), m, rows(logits), std::span(left).first(ids.size()), cache,
                             {.exits = {static_cast<std::int32_t>(exit)}}, ctx);
      }
    };
    pass(N);
    seconds += N > 1 ? (pass(N) - pass(1)) / static_cast<double>(N - 1) : pass(N);
  }
  return seconds;
}
