#include "lithe/layers/attention/local_attention.hpp"

#include "golden_runner/golden_case.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

namespace {

/// Whether a query's window holds no key that it may see. The reference's double softmax of scores of -1e9 is then off by 1e-8.
bool sees_nothing(const local_attention_config& c, const std::vector<std::uint8_t>& mask, index_t sequences, index_t length) {
  if (mask.empty()) return false;
  const index_t chunk = length <= c.chunk ? length : c.chunk, chunks = length / chunk;
  for (index_t s = 0; s < sequences; ++s)
    for (index_t t = 0; t < length; ++t) {
      bool any = false;
      for (index_t at = chunks == 1 ? 0 : -c.before; at <= (chunks == 1 ? 0 : c.after); ++at)
        for (index_t j = 0; j < chunk; ++j) {
          const index_t key = ((t / chunk + at) % chunks + chunks) % chunks * chunk + j;
          any = any || (mask[static_cast<std::size_t>(s * length + key)] != 0 && (!c.causal || key <= t));
        }
      if (!any) return true;
    }
  return false;
}

}  // namespace

template <class S>
void run_local(golden_case<S>& c) {
  const auto& j = c.config;
  const index_t heads = j.at("num_attention_heads"), width = j.at("attention_head_size");
  const matrix<S> x = c.tensor("input.hidden_states"), dy = c.tensor("grad_output.hidden_states");
  // The reference's layer ends before the output projection, so ours gets one that changes nothing.
  local_attention<S> l({.inputs = x.cols(),
                        .heads = heads,
                        .head_width = width,
                        .outputs = heads * width,
                        .chunk = j.at("local_attn_chunk_length"),
                        .before = j.at("local_num_chunks_before"),
                        .after = j.at("local_num_chunks_after"),
                        .causal = j.at("is_decoder"),
                        .dropout = j.at("local_attention_probs_dropout_prob")},
                       {});
  c.load("query", l.query);
  c.load("key", l.key);
  c.load("value", l.value);
  l.output.weight.setIdentity();

  const auto shape = c.file.info("input.hidden_states").shape;
  const auto sequences = static_cast<index_t>(shape.at(0)), length = static_cast<index_t>(shape.at(1));
  std::vector<index_t> offsets;
  for (index_t s = 0; s <= sequences; ++s) offsets.push_back(s * length);
  std::vector<std::uint8_t> mask;
  if (c.has("input.attention_mask"))
    for (const auto m : c.file.template read<std::int64_t>("input.attention_mask")) mask.push_back(m != 0);
  if (sees_nothing(l.config, mask, sequences, length)) c.double_tolerance = 1e-7;

  context ctx;
  ctx.rows = {offsets};
  ctx.mask = mask;
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  typename local_attention<S>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  l.backward(x, r, dy, dx, g, ctx);
  c.compare("output.hidden_states", matrix_view<const S>(y));
  c.compare("grad.input.hidden_states", matrix_view<const S>(dx));
  c.compare_linear_gradient("query", g.query);
  c.compare_linear_gradient("key", g.key);
  c.compare_linear_gradient("value", g.value);
}

template void run_local(golden_case<float>&);
template void run_local(golden_case<double>&);

}  // namespace golden
