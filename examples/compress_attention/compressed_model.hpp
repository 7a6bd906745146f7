#pragma once

// The model of train_language_model with collaborative heads, or with fewer heads, and what it takes to compare them.

#include <functional>

#include "trainer.hpp"

namespace compressed {

template <class Choice>
struct with_shared_heads;
template <class... Kind>
struct with_shared_heads<lithe::one_of<Kind...>> {
  using type = lithe::one_of<Kind..., lithe::collaborative_attention<real>>;
};
using layer = with_shared_heads<part_layer>::type;
using part = lithe::residual<lithe::sequential<lithe::layer_norm<real>, layer, lithe::dropout<real>>>;
using model = lithe::sequential<lithe::embedding<real>, lithe::stack<part>, lithe::layer_norm<real>, lithe::linear<real>>;

/// The model of the training program, whose blocks can now have shared heads; tensors keep their names.
inline model widen(const language_model& from) {
  lithe::stack<part> parts;
  for (const auto& block : std::get<1>(from.layers).blocks) {
    const auto& [norm, chosen, drop] = block.inner.layers;
    layer same = std::visit([](const auto& kind) { return layer(kind); }, chosen.value);
    parts.blocks.push_back({lithe::sequential(norm, std::move(same), drop)});
  }
  return model(std::get<0>(from.layers), std::move(parts), std::get<2>(from.layers), std::get<3>(from.layers));
}

/// The model with every attention re-parametrised, and the largest error of its layers.
inline model make(const model& from, const lithe::decomposition_options& o, const lithe::context& ctx, double& error) {
  model to = from;
  error = 0;
  for (auto& block : std::get<1>(to.layers).blocks) {
    layer& chosen = std::get<1>(block.inner.layers);
    if (const auto* separate = std::get_if<lithe::attention<real>>(&chosen.value)) {
      lithe::collaborative_attention<real> shared;
      error = std::max(error, lithe::reparametrise(*separate, shared, o, ctx).error());
      chosen = std::move(shared);
    }
  }
  return to;
}

/// The model in a file of train_language_model, or of this program: `key_width` shared dimensions, 0 for separate heads.
inline model read(const std::filesystem::path& path, const model_config& c, index_t key_width, const lithe::context& ctx) {
  model m = widen(make_model(c));
  double error = 0;
  if (key_width > 0) m = make(m, {.rank = key_width, .method = lithe::decomposition_method::head_svd}, ctx, error);  // its shapes, for now
  lithe::load_model(path, m);
  return m;
}

/// f(attention layer, its gradient) for every attention of separate heads.
template <class G, class F>
void for_each_attention(model& m, G& gradient, F&& f) {
  lithe::walk(
      [&](const std::string&, auto& l, auto& g) {
        if constexpr (std::same_as<std::remove_cvref_t<decltype(l)>, lithe::attention<real>>) f(l, g);
      },
      [](const auto&...) {}, "", m, gradient);
}

inline std::span<const token_t> held_out(const corpus& data, index_t at, index_t n) {
  return std::span<const token_t>(data.text).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n));
}

template <class Model>
double bits_per_byte(const Model& m, const corpus& data, index_t T, index_t pieces, const lithe::context& ctx) {
  double sum = 0;
  index_t counted = 0;
  matrix<real> logits(T, byte_values);
  const index_t last = static_cast<index_t>(data.text.size()) - 1;
  for (index_t at = data.held_out; at + T <= last && pieces > 0; at += T, --pieces) {
    m.forward(held_out(data, at, T), logits, ctx);
    const auto l = lithe::cross_entropy<real>(logits, held_out(data, at + 1, T), {.reduce = lithe::reduction::sum}, lithe::matrix_view<real>(), ctx);
    sum += l.loss;
    counted += l.counted;
  }
  return sum / static_cast<double>(std::max<index_t>(1, counted)) / std::numbers::ln2;
}

/// Batches of the training text, drawn by step; body(step, gradient, loss) after each backward pass.
template <class Model, class Body>
void train(Model& m, const corpus& data, index_t T, index_t steps, index_t batch, std::uint64_t seed, const lithe::context& base, Body&& body) {
  auto gradient = lithe::make_gradient(m);
  lithe::record_of<Model> record;
  std::vector<token_t> inputs(static_cast<std::size_t>(batch * T)), targets(inputs.size());
  std::vector<index_t> offsets{0};
  for (index_t b = 1; b <= batch; ++b) offsets.push_back(b * T);
  matrix<real> logits(batch * T, byte_values);
  lithe::context ctx = base;
  ctx.train = true;
  ctx.rows = {offsets};
  for (index_t step = 0; step < steps; ++step) {
    const lithe::rng_key key = lithe::rng_key{seed}.child(static_cast<std::uint64_t>(step));
    ctx.key = key.child(1);
    for (index_t b = 0; b < batch; ++b) {
      const auto at = static_cast<index_t>(lithe::uniform(key, static_cast<std::uint64_t>(b)) * static_cast<double>(data.held_out - T));
      std::copy_n(data.text.begin() + at, T, inputs.begin() + b * T);
      std::copy_n(data.text.begin() + at + 1, T, targets.begin() + b * T);
    }
    lithe::set_zero(m, gradient);
    m.forward(inputs, logits, record, ctx);
    const double loss = lithe::cross_entropy<real>(logits, targets, {}, logits, ctx).loss;
    m.backward(inputs, record, logits, lithe::nothing{}, gradient, ctx);
    body(step, gradient, loss);
  }
}

inline constexpr index_t batch = 8;  // pieces of text in a step of `fit`

struct fit_options {
  index_t steps = 0, warmup = 20;
  double rate = 3e-4;
  std::uint64_t seed = 77;
  std::vector<lithe::parameter_group> groups{{.pattern = "*bias", .weight_decay = 0}};
};

/// AdamW with clipped gradients over batches; the rate warms up and falls to a twentieth. tell(share of the steps) as it goes.
/// Returns how many steps were skipped because they were not finite.
template <class Model>
std::int64_t fit(
    Model& m, const corpus& data, index_t T, const fit_options& o, const lithe::context& ctx,
    const std::function<void(double)>& tell = [](double) {}) {
  lithe::optimiser<real> adam({.weight_decay = 0.01, .groups = o.groups});
  const lithe::learning_rate_schedule rate{
      .learning_rate = o.rate, .warmup_steps = std::min(o.warmup, o.steps), .total_steps = o.steps, .final_ratio = 0.05};
  support::step_guard guard;
  train(m, data, T, o.steps, batch, o.seed, ctx, [&](index_t step, auto& gradient, double loss) {
    const double norm = lithe::clip_by_global_norm(m, gradient, 1, ctx);
    if (guard.accepts(loss, norm)) adam.step(m, gradient, rate(step), ctx);
    tell(static_cast<double>(step) / static_cast<double>(o.steps));
  });
  guard.check();
  return guard.skipped();
}

/// Microseconds for one token whose sequence fills the context.
inline double decode_time(const model& m, const corpus& data, index_t T, const lithe::context& ctx) {
  auto cache = m.make_cache(1, T);
  matrix<real> logits(1, byte_values);
  m.fill(held_out(data, data.held_out, T - 1), cache, ctx);
  std::vector<double> times;
  for (int i = 0; i < 41; ++i) {
    const double begin = now();
    m.decode(held_out(data, data.held_out + T - 1, 1), logits, cache, ctx);
    times.push_back(1e6 * (now() - begin));
    m.truncate(cache, 0, T - 1);
  }
  std::nth_element(times.begin(), times.begin() + 20, times.end());
  return times[20];
}

/// What the attention layers of a model hold and keep.
struct attention_size {
  index_t parameters = 0, cached = 0;  // numbers; cached for a token
};
inline attention_size size_of_attention(const model& m) {
  attention_size s;
  lithe::walk(
      [&](const std::string&, const auto& l) {
        using L = std::remove_cvref_t<decltype(l)>;
        if constexpr (std::same_as<L, lithe::attention<real>>) s.cached += 2 * l.config.key_value_heads * l.config.head_width;
        if constexpr (std::same_as<L, lithe::collaborative_attention<real>>)
          s.cached += l.config.key_width + l.content_bias.weight.rows() + l.config.value_width;
        if constexpr (std::same_as<L, lithe::attention<real>> || std::same_as<L, lithe::collaborative_attention<real>>)
          s.parameters += lithe::count_parameters(l);
      },
      [](const auto&...) {}, "", m);
  return s;
}

}  // namespace compressed
