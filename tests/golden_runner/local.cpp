#include "lithe/layers/attention/local_attention.hpp"

#include "golden_runner/golden_case.hpp"
#include "lithe/layers/attention/bucket_attention.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

namespace {

/// random.rotations [H, D, R, N] as the layer has its directions: [H R N x D].
template <class S>
matrix<S> directions(const golden_case<S>& c) {
  const auto& shape = c.file.info("random.rotations").shape;
  const index_t H = shape.at(0), D = shape.at(1), R = shape.at(2), N = shape.at(3);
  const matrix<S> given = c.tensor("random.rotations");  // [H D R x N]
  matrix<S> out(H * R * N, D);
  for (index_t h = 0; h < H; ++h)
    for (index_t d = 0; d < D; ++d)
      for (index_t r = 0; r < R; ++r)
        for (index_t n = 0; n < N; ++n) out((h * R + r) * N + n, d) = given((h * D + d) * R + r, n);
  return out;
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

template <class S>
void run_bucket(golden_case<S>& c) {
  const auto& j = c.config;
  if (j.at("window") != "bucket") throw skipped("a window of another kind");
  const index_t heads = j.at("num_attention_heads"), width = j.at("attention_head_size");
  const matrix<S> x = c.tensor("input.hidden_states"), dy = c.tensor("grad_output.hidden_states");
  // Here, too, the file ends before the output projection.
  bucket_attention<S> l({.inputs = x.cols(),
                         .heads = heads,
                         .head_width = width,
                         .outputs = heads * width,
                         .causal = j.at("is_decoder"),
                         .hash = {.rounds = j.at("num_hashes"), .buckets = factors(j.at("num_buckets"))}},
                        {});
  c.load("query_key", l.query_key);
  c.load("value", l.value);
  l.output.weight.setIdentity();
  l.hash.given = directions(c);
  const auto offsets = c.offsets("input.segments");
  context ctx;
  ctx.rows = {offsets};
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  typename bucket_attention<S>::record r;
  auto g = make_gradient(l);
  l.forward(x, y, r, ctx);
  const auto buckets = c.file.template read<std::int64_t>("mid.buckets");
  if (!std::equal(buckets.begin(), buckets.end(), r.buckets.value.data(), r.buckets.value.data() + r.buckets.value.size()))
    throw std::runtime_error("mid.buckets differ");
  l.backward(x, r, dy, dx, g, ctx);
  c.compare("output.hidden_states", matrix_view<const S>(y));
  c.compare("mid.log_sum_exp", matrix_view<const S>(r.log_sum_exp));
  c.compare("grad.input.hidden_states", matrix_view<const S>(dx));
  c.compare_linear_gradient("query_key", g.query_key);
  c.compare_linear_gradient("value", g.value);
}

template void run_bucket(golden_case<float>&);
template void run_bucket(golden_case<double>&);
template void run_local(golden_case<float>&);
template void run_local(golden_case<double>&);

}  // namespace golden
