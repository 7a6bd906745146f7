#pragma once

// Every layer and container of the library, with the options that change how it works. A new one joins by a line.
#include "subject.hpp"

namespace every_layer_tests {

template <class S>
std::vector<std::unique_ptr<subject<S>>> every_layer() {
  std::vector<std::unique_ptr<subject<S>>> all;
  const auto add = [&]<class L>(std::string name, L l, traits is = {}) { all.push_back(std::make_unique<subject_of<L>>(std::move(name), std::move(l), is)); };
  const rng_key k{1};
  constexpr traits position_wise{.causal = true}, exact{.causal = true, .decodes_exactly = true};
  const auto memory_config = [](memory_readout_kind kind) {
    return product_key_memory_config{.inputs = 8, .heads = 2, .sub_keys = 6, .key_width = 8, .top_k = 3, .readout = {.kind = kind}};
  };
  const ultra_mem_config ultra{.features = 8, .heads = 2, .sub_keys = 6, .key_width = 4, .top_k = 3, .value_width = 6};
  const feed_forward_config plain{.features = 8, .hidden = 12, .kind = activation::gelu};

  add("linear", linear<S>({8, 8}, k), position_wise);
  add("layer_norm", layer_norm<S>(8), position_wise);
  add("rms_norm", rms_norm<S>(8), position_wise);
  add("batch_norm", batch_norm<S>(8), position_wise);
  add("dropout", dropout<S>(0.3), position_wise);
  add("activation_layer", activation_layer<S>{activation::silu}, position_wise);
  add("feed_forward", feed_forward<S>(plain, k), position_wise);
  add("feed_forward, gated", feed_forward<S>({.features = 8, .hidden = 12, .kind = activation::silu, .gated = true, .dropout = 0.2}, k), position_wise);
  add("feed_forward, in chunks", feed_forward<S>({.features = 8, .hidden = 12, .chunk = 3}, k), position_wise);
  add("embedding", embedding<S>({.tokens = 16, .features = 8, .positions = 64}, k), {.causal = true, .decodes_exactly = true, .most = 64});
  add("axial_positions", axial_positions<S>({.shape = {8, 8}, .widths = {3, 5}}, k), {.causal = true, .decodes_exactly = true, .most = 64});

  add("attention", attention<S>({.inputs = 8, .heads = 2}, k));
  add("attention, causal", attention<S>({.inputs = 8, .heads = 2, .causal = true}, k), exact);
  add("attention, rotary, grouped", attention<S>({.inputs = 8, .heads = 4, .head_width = 4, .causal = true, .rotary_width = 4, .key_value_heads = 2}, k), exact);
  add("cross_attention", beside<cross_attention<S>>{cross_attention<S>({.inputs = 8, .memory_inputs = 8, .heads = 2}, k)}, position_wise);
  add("local_attention", local_attention<S>({.inputs = 8, .heads = 2, .chunk = 4, .before = 1, .after = 1}, k));
  add("local_attention, causal", local_attention<S>({.inputs = 8, .heads = 2, .chunk = 4, .causal = true, .circular = false}, k), exact);
  add("bucket_attention", bucket_attention<S>({.inputs = 8, .heads = 2, .hash = {.rounds = 2, .buckets = {4}}}, k), {.selects = true});
  add("bucket_attention, causal", bucket_attention<S>({.inputs = 8, .heads = 2, .causal = true, .hash = {.rounds = 2, .buckets = {4}}}, k),
      {.causal = true, .decodes_exactly = true, .selects = true});
  add("lsh_attention", lsh_attention<S>({.inputs = 8, .heads = 2, .hash = {.rounds = 2, .buckets = {4}}, .chunk = 4}, k), {.moves = true, .selects = true});
  add("lsh_attention, causal", lsh_attention<S>({.inputs = 8, .heads = 2, .causal = true, .hash = {.rounds = 2, .buckets = {4}}, .chunk = 4}, k),
      {.causal = true, .moves = true, .selects = true});
  add("collaborative_attention", collaborative_attention<S>({.inputs = 8, .heads = 2, .key_width = 6}, k));
  add("collaborative_attention, causal", collaborative_attention<S>({.inputs = 8, .heads = 2, .key_width = 6, .causal = true}, k), exact);
  add("collaborative_cross_attention", beside<collaborative_cross_attention<S>>{collaborative_cross_attention<S>({.inputs = 8, .heads = 2}, 8, k)}, position_wise);

  add("product_key_memory", product_key_memory<S>(memory_config(memory_readout_kind::plain), k), {.causal = true, .selects = true});
  add("product_key_memory, gated", product_key_memory<S>(memory_config(memory_readout_kind::silu_gated), k), {.causal = true, .selects = true});
  add("product_key_memory, experts", product_key_memory<S>(memory_config(memory_readout_kind::experts), k), {.causal = true, .selects = true});
  {
    auto c = memory_config(memory_readout_kind::linear);
    c.input_norm = memory_input_norm::layer;
    c.query.hidden = {10};
    c.query.norm = query_normalisation::rms;
    c.query.unit_length = true;
    c.concat_heads = c.separate_values = c.shuffle_slots = true;
    c.readout.output_norm = c.readout.scalar_gate = true;
    add("product_key_memory, with every norm", product_key_memory<S>(c, k), {.causal = true, .selects = true});
  }
  add("ultra_mem", ultra_mem<S>(ultra, k), {.causal = true, .selects = true});
  {
    auto c = ultra;
    c.query_conv = 3;
    c.pre_width = 4;
    c.pre_gelu = true;
    c.balance = 0.01;
    add("ultra_mem, with a convolution", ultra_mem<S>(c, k), {.causal = true, .decodes_exactly = true, .selects = true});
  }
  add("mixture_of_experts", mixture_of_experts<S>({.features = 8, .hidden = 6, .experts = 4}, k), {.causal = true, .selects = true});
  add("mixture_of_experts, gated", mixture_of_experts<S>({.features = 8, .hidden = 6, .experts = 4, .kind = activation::silu, .gated = true, .renormalise = true}, k),
      {.causal = true, .selects = true});

  const attention<S> look({.inputs = 8, .heads = 2, .causal = true}, k);
  const feed_forward<S> feed(plain, k);
  const auto block = [&] {
    return sequential(residual{sequential(layer_norm<S>(8), look)}, residual{sequential(layer_norm<S>(8), feed)});
  };
  using block_type = decltype(block());
  add("sequential", sequential(linear<S>({8, 10}, k), activation_layer<S>{}, linear<S>({10, 8}, k)), position_wise);
  add("sequential, from tokens", sequential(embedding<S>({.tokens = 16, .features = 8}, k), look, linear<S>({8, 5}, k)), exact);
  add("residual", residual{look}, exact);
  add("stack", stack<block_type>{{block(), block(), block()}}, exact);
  add("one_of", one_of<linear<S>, attention<S>>(look), exact);
  add("pre_norm", pre_norm<feed_forward<S>>(layer_norm<S>(8), feed, 0.2), position_wise);
  add("pre_norm, cross-attention",
      beside<pre_norm<cross_attention<S>>>{{layer_norm<S>(8), cross_attention<S>({.inputs = 8, .memory_inputs = 8, .heads = 2}, k)}}, position_wise);
  add("decoder_block", beside<decoder_block<residual<attention<S>>, residual<feed_forward<S>>>>{
                           {{look}, layer_norm<S>(8), cross_attention<S>({.inputs = 8, .memory_inputs = 8, .heads = 2}, k), dropout<S>(0.2), {feed}}},
      position_wise);
  const attention<S> narrow({.inputs = 4, .heads = 2, .causal = true}, k);
  const feed_forward<S> narrow_feed({.features = 4, .hidden = 6}, k);
  using streams = reversible<pre_norm<attention<S>>, pre_norm<feed_forward<S>>>;
  const streams both(pre_norm<attention<S>>(layer_norm<S>(4), narrow, 0.2), pre_norm<feed_forward<S>>(layer_norm<S>(4), narrow_feed), 3);
  add("reversible", both, exact);
  add("reversible_stack", reversible_stack<streams>{{both, both}}, exact);
  {
    using lsh = pre_norm<lsh_attention<S>>;
    lsh_attention_config c{.inputs = 4, .heads = 2, .causal = true, .hash = {.rounds = 2, .buckets = {4}}, .chunk = 4};
    add("reversible, lsh_attention", reversible<lsh, pre_norm<feed_forward<S>>>(lsh(layer_norm<S>(4), lsh_attention<S>(c, k)),
                                                                                pre_norm<feed_forward<S>>(layer_norm<S>(4), narrow_feed)),
        {.causal = true, .moves = true, .selects = true});
  }
  {
    reversible_language_model<streams> m;
    m.words = embedding<S>({.tokens = 16, .features = 4}, k);
    m.positions = axial_positions<S>({.shape = {64}, .widths = {4}}, k);
    m.blocks.blocks = {both, both};
    m.head = sequential(layer_norm<S>(8), dropout<S>(0.1), linear<S>({8, 5}, k));
    add("reversible_language_model", m, {.causal = true, .decodes_exactly = true, .most = 64});
  }
  using tapped = tapped_block<residual<attention<S>>, layer_norm<S>, feed_forward<S>>;
  add("tapped_block", tapped{{look}, layer_norm<S>(8), feed}, exact);
  {
    skip_stack<tapped, ultra_mem<S>> s;
    s.blocks = {tapped{{look}, layer_norm<S>(8), feed}, tapped{{look}, layer_norm<S>(8), feed}};
    s.units = {ultra_mem<S>(ultra, k)};
    s.ranges = {{0, 1}};
    add("skip_stack", s, {.causal = true, .decodes_exactly = true, .selects = true});
  }
  adaptive_stack<block_type> depth;
  depth.blocks = {block(), block()};
  add("adaptive_stack", depth, {.causal = true, .out = 2});
  add("exit_classifiers", exit_classifiers<S>({.exits = 2, .features = 8, .classes = 5, .classifier = exit_sharing::independent}, k),
      {.causal = true, .in = 2, .out = 2});
  add("halting", halting<S>({.exits = 3, .features = 8, .hidden_layers = 1}, k), {.causal = true, .in = 3});
  add("halting, multinomial", halting<S>({.kind = exit_distribution::multinomial, .exits = 3, .features = 8}, k), {.causal = true, .in = 3});
  add("halting_head", halting_head<S>({.features = 8, .outputs = 2, .hidden_layers = 2}, k), position_wise);
  {
    adaptive_depth<block_type> m;
    m.stack = depth;
    m.answers = exit_classifiers<S>({.exits = 2, .features = 8, .classes = 5}, k);
    add("adaptive_depth", m, {.causal = true, .out = 2});
  }
  return all;
}

}  // namespace every_layer_tests
