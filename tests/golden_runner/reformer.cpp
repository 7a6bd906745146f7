#include "golden_runner/golden_case.hpp"
#include "lithe/io/reformer_checkpoints.hpp"
#include "lithe/training/losses.hpp"

namespace golden {

namespace {

/// A model of the file's configuration and parameters. `within`: what stands before the names of the file in those of a whole model.
template <class S>
reformer<S> load_model(golden_case<S>& c, const reformer_config& config, const std::string& within) {
  if (config.dropout != 0 || config.local_dropout != 0 || config.lsh_dropout != 0) throw skipped("dropout without the reference's draws");
  reformer<S> m = make_reformer<S>(config, {});
  visit_reformer(
      std::as_const(m), "reformer.",
      [&](const std::string& name, const std::vector<index_t>&, matrix<S>& t) {
        if (!name.starts_with(within)) return;
        const auto numbers = c.file.template read<S>("param." + name.substr(within.size()));
        if (static_cast<index_t>(numbers.size()) != t.size()) throw std::runtime_error(concat(name, ": expected ", t.size(), " numbers, found ", numbers.size()));
        std::copy(numbers.begin(), numbers.end(), t.data());
      },
      m);
  for (std::size_t i = 0; i < m.blocks.blocks.size(); ++i) {  // [heads, features, rounds, directions]
    auto* block = std::get_if<reformer_lsh_block<S>>(&m.blocks.blocks[i].value);
    const std::string name = within.empty() ? concat("random.rotations.", i) : "random.rotations";
    if (block == nullptr || !c.has(name)) continue;
    auto& a = std::get<0>(block->parts).inner;
    const auto given = c.file.template read<double>(name);
    const index_t H = config.heads, D = config.head_width, n = static_cast<index_t>(given.size()) / (H * D);
    a.hash.given.resize(H * n, D);
    for (index_t h = 0; h < H; ++h)
      for (index_t d = 0; d < D; ++d)
        for (index_t k = 0; k < n; ++k) a.hash.given(h * n + k, d) = static_cast<S>(given[static_cast<std::size_t>((h * D + d) * n + k)]);
  }
  return m;
}

template <class S>
void compare_gradients(golden_case<S>& c, const reformer<S>& m, const gradient_of<reformer<S>>& g, const std::string& within) {
  visit_reformer(
      m, "reformer.",
      [&](const std::string& name, const std::vector<index_t>&, const matrix<S>& p, const auto& q) {
        if (!name.starts_with(within) || !c.has("grad." + name.substr(within.size()))) return;
        std::vector<double> numbers;
        for (index_t i = 0; i < p.rows(); ++i)
          for (index_t j = 0; j < p.cols(); ++j) numbers.push_back(static_cast<double>(q(i, j)));
        c.compare("grad." + name.substr(within.size()), numbers);
      },
      m, g);
}

/// The bucket ids that a pass chose against `mid.buckets` [batch, heads, rounds length], which have the rounds' offsets added.
template <class S>
void check_buckets(golden_case<S>& c, const std::string& name, const reformer_lsh_block<S>& block, const record_of<reformer_lsh_block<S>>& r,
                   std::span<const std::uint8_t> mask, index_t length) {
  if (!c.has(name)) return;
  const auto& a = std::get<0>(block.parts).inner;
  const auto& ids = std::get<0>(r.parts).front().inner.buckets.value;
  const auto theirs = c.file.template read<std::int64_t>(name);
  const index_t heads = a.config.heads, rounds = a.config.hash.rounds;
  const bool padded = std::find(mask.begin(), mask.end(), 0) != mask.end();
  const index_t all = a.hash.buckets("golden", length, a.config.chunk).total() + (padded ? 1 : 0);
  for (std::size_t i = 0; i < theirs.size(); ++i) {
    const auto at = static_cast<index_t>(i), t = at % length, round = at / length % rounds, h = at / (length * rounds) % heads, b = at / (length * rounds * heads);
    if (ids(h * rounds + round, b * length + t) + round * all != theirs[i]) throw std::runtime_error(concat(name, " differs at ", i));
  }
}

template <class S>
matrix<S> side_by_side(const matrix<S>& a, const matrix<S>& b) {
  matrix<S> both(a.rows(), 2 * a.cols());
  both << a, b;
  return both;
}

/// The reference rounds where a query of a local layer sees no key (tests/golden/README.md, "Masks").
template <class S>
void allow_for_masks(golden_case<S>& c, const reformer<S>& m, std::span<const std::uint8_t> mask, index_t sequences, index_t length) {
  for (const auto& block : m.blocks.blocks)
    if (const auto* local = std::get_if<reformer_local_block<S>>(&block.value))
      if (sees_nothing(std::get<0>(local->parts).inner.config, mask, sequences, length)) c.double_tolerance = 1e-7;
}

struct equal_sequences {
  index_t sequences, length;
  std::vector<index_t> offsets;
  std::vector<std::uint8_t> mask;
  equal_sequences(index_t n, index_t l) : sequences(n), length(l) {
    for (index_t s = 0; s <= n; ++s) offsets.push_back(s * l);
  }
  [[nodiscard]] context ctx() const { return {.rows = {offsets}, .mask = mask}; }
};

template <class S>
void run_layer(golden_case<S>& c) {
  reformer_config config = read_reformer_config(c.config).model;
  const auto shape = c.file.info("input.hidden_states").shape;
  config.layers.resize(1);
  config.vocabulary = 1;  // neither words, positions nor head are in the file
  config.position_shape = {1};
  config.position_widths = {config.features};
  const std::string within = "reformer.encoder.layers.0.";
  const reformer<S> m = load_model(c, config, within);
  equal_sequences b(shape.at(0), shape.at(1));
  if (c.has("input.attention_mask"))
    for (const auto v : c.file.template read<std::int64_t>("input.attention_mask")) b.mask.push_back(v != 0);
  allow_for_masks(c, m, b.mask, b.sequences, b.length);
  matrix<S> xy = side_by_side(c.tensor("input.prev_attn_output"), c.tensor("input.hidden_states"));
  matrix<S> dxy = side_by_side(c.tensor("grad_output.attn_output"), c.tensor("grad_output.hidden_states"));
  record_of<reversible_stack<one_of<reformer_local_block<S>, reformer_lsh_block<S>>>> r;
  auto g = make_gradient(m);
  const auto half = [&](const matrix<S>& both, index_t i) { return view(both).slice_cols(i * config.features, config.features); };
  m.blocks.forward_in_place(xy, &r, b.ctx());
  c.compare("output.attn_output", half(xy, 0));
  c.compare("output.hidden_states", half(xy, 1));
  if (config.layers[0] == reformer_layer::lsh)
    check_buckets<S>(c, "mid.buckets", std::get<1>(m.blocks.blocks[0].value), std::get<1>(r.blocks[0].value), b.mask, b.length);
  m.blocks.reverse(xy, dxy, r, g.blocks, b.ctx());
  c.compare("reconstructed.prev_attn_output", half(xy, 0));
  c.compare("reconstructed.hidden_states", half(xy, 1));
  c.compare("grad.input.prev_attn_output", half(dxy, 0));
  c.compare("grad.input.hidden_states", half(dxy, 1));
  compare_gradients(c, m, g, within);
}

template <class S>
void run_language_model(golden_case<S>& c) {
  const bool decoding = c.has("output.logits_incremental");
  if (decoding && c.config.at("batch") != 1) throw skipped("the reference's cached decoding is right for a single sequence only");
  const reformer_config config = read_reformer_config(c.config).model;
  const reformer<S> m = load_model(c, config, "");
  const auto shape = c.file.info("input.input_ids").shape;
  const index_t sequences = shape.at(0), length = shape.at(1), multiple = reformer_padding(config);
  // The published model fills sequences up that are longer than the shorter chunk, and hides what it added.
  index_t shortest = std::numeric_limits<index_t>::max();
  for (const reformer_layer l : config.layers) shortest = std::min(shortest, l == reformer_layer::local ? config.local_chunk : config.lsh_chunk);
  const bool fill = length > shortest && length % multiple != 0;
  equal_sequences b(sequences, fill ? (length + multiple - 1) / multiple * multiple : length);
  const auto place = [&](index_t s, index_t t) { return static_cast<std::size_t>(s * b.length + t); };

  std::vector<token_t> ids(place(sequences, 0), 0), targets(ids.size(), -100);
  const auto given = c.file.template read<std::int64_t>("input.input_ids");
  const auto labels = c.has("input.labels") ? c.file.template read<std::int64_t>("input.labels") : std::vector<std::int64_t>{};
  const auto hidden = c.has("input.attention_mask") ? c.file.template read<std::int64_t>("input.attention_mask") : std::vector<std::int64_t>{};
  if (fill || !hidden.empty()) b.mask.assign(ids.size(), 0);
  for (index_t s = 0; s < sequences; ++s)
    for (index_t t = 0; t < length; ++t) {
      const auto i = static_cast<std::size_t>(s * length + t);
      ids[place(s, t)] = static_cast<token_t>(given[i]);
      if (!b.mask.empty()) b.mask[place(s, t)] = hidden.empty() || hidden[i] != 0;
      if (!labels.empty() && t + 1 < length) targets[place(s, t)] = static_cast<token_t>(labels[i + 1]);
    }

  allow_for_masks(c, m, b.mask, b.sequences, b.length);
  const index_t D = config.features, T = static_cast<index_t>(ids.size());
  const context ctx = b.ctx();
  matrix<S> logits(T, config.vocabulary);
  record_of<reformer<S>> r;
  m.forward(ids, logits, r, ctx);
  for (std::size_t i = 0; i < config.layers.size(); ++i)
    if (config.layers[i] == reformer_layer::lsh)
      check_buckets<S>(c, concat("mid.buckets.", i), std::get<1>(m.blocks.blocks[i].value), std::get<1>(r.blocks.blocks[i].value), b.mask, b.length);
  matrix<S> shown(sequences * length, config.vocabulary);
  for (index_t s = 0; s < sequences; ++s) shown.middleRows(s * length, length) = logits.middleRows(s * b.length, length);
  c.compare(decoding ? "output.logits_full" : "output.logits", matrix_view<const S>(shown));
  if (decoding) {  // the beginning in one call, then token by token
    auto cache = m.make_cache(1, length);
    for (index_t at = 0, n = c.config.at("prefix_len"); at < length; at += n, n = 1)
      m.decode(std::span(ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)), view(shown).slice_rows(at, n), cache, {});
    c.compare("output.logits_incremental", matrix_view<const S>(shown));
  }
  if (!c.has("output.loss")) return;

  c.compare("output.loss", std::vector<double>{cross_entropy<S>(logits, targets, {}, logits, ctx).loss});
  c.compare("grad.logits", matrix_view<const S>(logits));
  // The model's backward, stopped at the embeddings.
  auto g = make_gradient(m);
  matrix<S> xy = r.streams, dxy(T, 2 * D);
  m.head.backward(r.streams, r.head, logits, dxy, g.head, ctx.child(reformer<S>::head_child));
  m.blocks.reverse(xy, dxy, r.blocks, g.blocks, ctx.child(reformer<S>::block_child));
  const matrix<S> de = dxy.leftCols(D) + dxy.rightCols(D);
  if (c.has("grad.embedding_output")) c.compare("grad.embedding_output", matrix_view<const S>(de));
  g = make_gradient(m);
  m.backward(ids, r, logits, nothing{}, g, ctx);
  compare_gradients(c, m, g, "");
}

}  // namespace

/// Hugging Face's Reformer, one layer or the whole.
template <class S>
void run_reformer(golden_case<S>& c) {
  if (c.has("input.prev_attn_output"))
    run_layer(c);
  else
    run_language_model(c);
}

template void run_reformer(golden_case<float>&);
template void run_reformer(golden_case<double>&);

}  // namespace golden
