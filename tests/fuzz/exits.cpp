// Decodes with exits as the bytes say: models of every kind of block, sequences that go on at different times, prompts in pieces, exits of every
// row, slots that are cut back or change places. Every row must get what the full pass with the same exits gives (`forward_mixed`). Meant for
// -fsanitize=address,undefined. With clang: -DLITHE_LIBFUZZER -fsanitize=fuzzer; elsewhere main() below draws the bytes:
//
//     fuzz_exits [inputs = 10000] [seed = 1]
#include <cstdlib>
#include <iostream>

#include "../../examples/all_together/model.hpp"

namespace {

using namespace lithe;
using model_type = model_of<double>;

constexpr index_t slots = 3, capacity = 12, width = 16;

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "fuzz_exits: " << what << std::endl;
  std::abort();
}

/// One model of each kind of attention and feed-forward, of 2 or 3 exits.
const std::vector<model_type>& models() {
  static const std::vector<model_type> all = [] {
    std::vector<model_type> m;
    for (const char* attention : {"lsh", "bucket", "local", "collaborative"})
      for (const char* feed : {"chunked", "memory", "ultramem"}) {
        // A window of all tokens for LSH attention, whose chunks move with later ones.
        const bool whole = std::string(attention) == "lsh";
        model_config c{.features = width / 2, .heads = 2, .context = capacity, .window = whole ? capacity : 4, .hidden = 8, .sub_keys = 4, .top_k = 2};
        c.blocks_per_exit = m.size() % 2 == 0 ? 1 : 2;
        c.attention.assign(static_cast<std::size_t>(c.blocks_per_exit == 1 ? 3 : 4), attention);
        c.feed_forward.assign(c.attention.size(), feed);
        c.exit_loss = 0;
        m.push_back(make_model<double>(c));
      }
    return m;
  }();
  return all;
}

/// Bytes as numbers; zeros after the last.
struct source {
  const std::uint8_t* data;
  std::size_t size;
  index_t below(index_t n) { return size == 0 ? 0 : (--size, static_cast<index_t>(*data++) % n); }
};

/// What one slot has read: tokens and the exits with which they left.
struct sequence {
  std::vector<token_t> ids;
  std::vector<std::int32_t> exits;
};

/// The rows of a slot in the full pass.
matrix<double> full_pass(const model_type& m, const sequence& s) {
  const auto& [words, decoder] = m.layers;
  const auto T = static_cast<index_t>(s.ids.size()), N = decoder.exits();
  matrix<double> x(T, width), states(N * T, width), logits(T, byte_values);
  record_of<std::remove_cvref_t<decltype(decoder.stack)>> record;
  record_of<std::remove_cvref_t<decltype(decoder.answers)>> answers;
  words.forward(s.ids, x, {});
  decoder.stack.forward_mixed(x, nothing{}, s.exits, states, record, {});
  decoder.answers.forward_mixed(view(states).slice_rows((N - 1) * T, T), s.exits, logits, answers, {});
  return logits;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  source in{data, size};
  const model_type& m = models()[static_cast<std::size_t>(in.below(static_cast<index_t>(models().size())))];
  const auto& [words, decoder] = m.layers;
  const index_t N = decoder.exits();
  auto cache = make_adaptive_cache(decoder, slots, capacity);
  auto positions = words.make_cache(slots, capacity);
  std::vector<sequence> all(slots);
  exit_rule rule{.exits = {1, 1, 1}};
  while (in.size > 0) {
    const index_t action = in.below(8), chosen = in.below(slots);
    auto& s = all[static_cast<std::size_t>(chosen)];
    rule.eager = in.below(2) == 1;
    if (action == 0) {
      const index_t keep = in.below(static_cast<index_t>(s.ids.size()) + 1);
      truncate(decoder, cache, chosen, keep);
      words.truncate(positions, chosen, keep);
      s.ids.resize(static_cast<std::size_t>(keep));
      s.exits.resize(static_cast<std::size_t>(keep));
    } else if (action == 1) {
      const std::vector<index_t> order{chosen, in.below(slots), in.below(slots)};
      const auto before = all;
      permute(decoder, cache, order);
      words.permute(positions, order);
      for (std::size_t i = 0; i < order.size(); ++i) all[i] = before[static_cast<std::size_t>(order[i])];
    } else if (action == 2) {  // a prompt for one slot
      std::vector<token_t> ids;
      for (index_t n = 1 + in.below(4); n > 0 && static_cast<index_t>(s.ids.size() + ids.size()) < capacity; --n) ids.push_back(static_cast<token_t>(in.below(256)));
      const std::vector<index_t> offsets{0, static_cast<index_t>(ids.size())}, slot{chosen};
      const context ctx{.rows = {offsets}, .slots = slot};
      matrix<double> x(offsets[1], width);
      words.decode(ids, x, positions, ctx);
      prefill(decoder, matrix_view<const double>(x), nothing{}, cache, ctx);
      s.ids.insert(s.ids.end(), ids.begin(), ids.end());
      s.exits.resize(s.ids.size(), static_cast<std::int32_t>(N));
    } else {  // one token for some slots
      std::vector<index_t> active;
      std::vector<token_t> ids;
      for (index_t i = 0; i < slots; ++i) {
        auto& each = all[static_cast<std::size_t>(i)];
        if (in.below(4) == 0 || static_cast<index_t>(each.ids.size()) == capacity) continue;
        active.push_back(i);
        each.ids.push_back(static_cast<token_t>(in.below(256)));
        ids.push_back(each.ids.back());
        each.exits.push_back(rule.exits[static_cast<std::size_t>(i)] = 1 + static_cast<std::int32_t>(in.below(N)));
      }
      const auto R = static_cast<index_t>(active.size());
      std::vector<index_t> offsets;
      for (index_t i = 0; i <= R; ++i) offsets.push_back(i);
      const context ctx{.rows = {offsets}, .slots = active};
      matrix<double> x(R, width), logits(R, byte_values);
      std::vector<std::int32_t> left(active.size());
      words.decode(ids, x, positions, ctx);
      adaptive_step(decoder, x, nothing{}, logits, left, cache, rule, ctx);
      for (index_t r = 0; r < R; ++r) {
        const auto& each = all[static_cast<std::size_t>(active[static_cast<std::size_t>(r)])];
        check(left[static_cast<std::size_t>(r)] == each.exits.back(), "a row left at another exit than it was told");
        const matrix<double> want = full_pass(m, each).bottomRows(1);
        check((logits.row(r) - want).cwiseAbs().maxCoeff() < 1e-11 * want.cwiseAbs().maxCoeff(), "decoding differs from the full pass");
      }
    }
    for (index_t i = 0; i < slots; ++i)
      check(cache.length[static_cast<std::size_t>(i)] == static_cast<index_t>(all[static_cast<std::size_t>(i)].ids.size()), "a slot has the wrong length");
  }
  return 0;
}

#ifndef LITHE_LIBFUZZER
int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000, seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::cout << "fuzz_exits: " << count << " inputs, seed " << seed << std::endl;
  for (std::uint64_t i = 0; i < count; ++i) {
    const rng_key key = rng_key{seed}.child(i);
    std::vector<std::uint8_t> bytes(1 + philox(key, 0)[0] % (i % 10 == 0 ? 256 : 48));
    for (std::size_t b = 0; b < bytes.size(); ++b) bytes[b] = static_cast<std::uint8_t>(philox(key, 1 + b / 4)[b % 4]);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
#endif
