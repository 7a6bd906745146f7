#include "lithe/layers/attention/lsh_attention.hpp"

#include "golden_runner/golden_case.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

/// The self-attention of Hugging Face's Reformer: heads side by side, without the projection behind them.
template <class S>
void run_lsh(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t batch = j.at("batch"), length = j.at("seq_len"), heads = j.at("num_attention_heads"), width = j.at("attention_head_size"),
                rounds = j.at("num_hashes");
  lsh_attention_config a{.inputs = j.at("hidden_size"), .heads = heads, .head_width = width, .outputs = heads * width, .causal = j.at("is_decoder"),
                         .chunk = j.at("lsh_attn_chunk_length"), .before = j.at("lsh_num_chunks_before"), .after = j.at("lsh_num_chunks_after")};
  a.hash = {.rounds = rounds, .buckets = factors(j.at("num_buckets")), .most_positions = j.at("max_position_embeddings")};
  if (j.at("lsh_attention_probs_dropout_prob") != 0) throw skipped("dropout without the reference's draws");

  lsh_attention<S> l(a, {});
  c.load("query_key", l.query_key);
  c.load("value", l.value);
  l.output.weight.setIdentity();
  if (c.has("random.rotations")) {  // [heads, features, rounds, directions]
    const auto given = c.file.template read<double>("random.rotations");
    const index_t n = static_cast<index_t>(given.size()) / (heads * width * rounds);
    l.hash.given.resize(heads * rounds * n, width);
    for (index_t h = 0; h < heads; ++h)
      for (index_t d = 0; d < width; ++d)
        for (index_t i = 0; i < rounds * n; ++i) l.hash.given(h * rounds * n + i, d) = static_cast<S>(given[static_cast<std::size_t>((h * width + d) * rounds * n + i)]);
  }

  std::vector<index_t> offsets;
  for (index_t b = 0; b <= batch; ++b) offsets.push_back(b * length);
  std::vector<std::uint8_t> mask;
  if (c.has("input.attention_mask"))
    for (const auto v : c.file.template read<std::int64_t>("input.attention_mask")) mask.push_back(v != 0);
  context ctx;
  ctx.rows = {offsets};
  ctx.mask = mask;

  const matrix<S> x = c.tensor("input.hidden_states"), dy = c.tensor("grad_output.hidden_states");
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  typename lsh_attention<S>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, g, ctx);

  if (c.has("mid.buckets")) {  // [batch, heads, rounds length], with the rounds' offsets added
    const auto theirs = c.file.template read<std::int64_t>("mid.buckets");
    const bool padded = std::find(mask.begin(), mask.end(), 0) != mask.end();
    const index_t all = l.hash.buckets("golden", length, a.chunk).total() + (padded ? 1 : 0);
    for (std::size_t i = 0; i < theirs.size(); ++i) {
      const auto at = static_cast<index_t>(i), t = at % length, round = at / length % rounds, h = at / (length * rounds) % heads, b = at / (length * rounds * heads);
      if (r.buckets.value(h * rounds + round, b * length + t) + round * all != theirs[i]) throw std::runtime_error(concat("mid.buckets differs at ", i));
    }
  }
  c.compare("output.hidden_states", matrix_view<const S>(y));
  c.compare("grad.input.hidden_states", matrix_view<const S>(dx));
  c.compare_linear_gradient("query_key", g.query_key);
  c.compare_linear_gradient("value", g.value);
}

template void run_lsh(golden_case<float>&);
template void run_lsh(golden_case<double>&);

}  // namespace golden
