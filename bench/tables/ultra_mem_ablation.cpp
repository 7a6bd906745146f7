// From product keys to UltraMem, one change after the other, and some numbers of it alone, on facts learnt by heart and on the bundled text
// (arXiv 2411.12364 section 4.5, table 5).
#include "../../examples/compress_attention/compressed_model.hpp"
#include "facts.hpp"

namespace {

using namespace lithe;

/// Product keys all of whose heads read one query.
using one_query_keys = sequential<linear<real>, batch_norm<real>, product_key_memory<real>>;
using unit = one_of<product_key_memory<real>, one_query_keys, ultra_mem<real>>;
/// Every block keeps its feed-forward; units stand beside the blocks.
template <class Mix>
using blocks_and_units = skip_stack<tapped_block<Mix, layer_norm<real>, feed_forward<real>>, unit>;
using text_mix = residual<sequential<layer_norm<real>, attention<real>>>;
using text_model = sequential<embedding<real>, blocks_and_units<text_mix>, layer_norm<real>, linear<real>>;
using fact_mix = dropout<real>;  // of nothing: a fact is one row, there is nothing to mix it with
using fact_model = sequential<linear<real>, blocks_and_units<fact_mix>, layer_norm<real>, linear<real>>;

constexpr index_t blocks = 3;

/// A row of the table.
struct variant {
  std::string name{};
  enum { product_keys, one_query, tucker } kind = product_keys;
  product_key_memory_config product{};
  ultra_mem_config ultra{};
  const char* ranges = "2:2";  // of the units, blocks counted from 1
  double value_times = 1;
  std::size_t base = 0;     // the row that it changes
  bool looks_back = false;  // says nothing about facts, which stand alone
};

/// All rows, those of one number alone if wanted; a table of `side`² rows of full width, or the same numbers in narrower rows. Two heads stay, and
/// the numbers that a token reads of the tables.
std::vector<variant> variants(index_t features, index_t side, index_t key_width, index_t top_k, bool single) {
  std::vector<variant> all;
  variant v{.product = {.inputs = features, .heads = 2, .sub_keys = side, .key_width = 2 * key_width, .top_k = top_k}};
  v.product.query.norm = query_normalisation::batch;
  v.ultra = {.features = features,
             .heads = 2,
             .sub_keys = side,
             .key_width = key_width,
             .rank = 1,
             .cores = 1,
             .top_k = top_k,
             .norm = score_norm_kind::none,
             .expansion = 1};
  const auto then = [&](std::string name, auto&& change) {
    v.base = all.empty() ? 0 : all.size() - 1;
    change(v);
    v.name = std::move(name);
    all.push_back(v);
  };
  then("product keys", [](variant&) {});
  then("no softmax", [](variant& x) { x.product.gate.kind = memory_gate_kind::identity; });
  then("rows of half the width, twice as many, a projection", [&](variant& x) {
    x.product.value_width = features / 2;
    x.product.sub_keys = std::lround(std::sqrt(2) * static_cast<double>(side));
    x.product.top_k = 2 * top_k;
    x.product.readout = {.kind = memory_readout_kind::linear, .bias = false};
  });
  then("one query for all heads", [](variant& x) {
    x.kind = variant::one_query;
    x.product.outputs = x.product.inputs;
    x.product.inputs = x.product.key_width;
    x.product.query = {.source = query_source::identity};
  });
  then("two units of half the rows and picks", [&](variant& x) {
    x.product.sub_keys = side;
    x.product.top_k = top_k;
    x.ranges = "1:1/2:2";
  });
  then("each joins a block later", [](variant& x) { x.ranges = "1:2/2:3"; });
  then("product of scores, not sum", [](variant& x) { x.kind = variant::tucker; });
  then("norm of queries and keys", [](variant& x) { x.ultra.norm = score_norm_kind::rms; });
  const auto expand = [=](index_t times) {
    return [=](variant& x) {
      x.ultra.expansion = times;
      x.ultra.sub_keys = side * std::lround(std::sqrt(static_cast<double>(times)));
    };
  };
  then("implicit value expansion, 4", expand(4));
  then("TDQKR, rank 2", [](variant& x) { x.ultra.rank = 2; });
  then("two cores", [](variant& x) { x.ultra.cores = 2; });
  then("the paper's start", [](variant& x) { x.ultra.start = {.kind = ultra_mem_start_kind::paper, .blocks = blocks}; });
  then("value rate falls from 4 times", [](variant& x) { x.value_times = 4; });
  const variant whole = v;
  const std::size_t of_whole = all.size() - 1;
  then("convolution before the query", [](variant& x) { x.ultra.query_conv = 5, x.looks_back = true; });
  if (!single) return all;
  const auto alone = [&](std::string name, auto&& change) {
    v = whole;
    then(std::move(name), change);
    all.back().base = of_whole;
  };
  for (const index_t times : {9, 16}) alone(concat("expansion ", times, " in place of 4"), expand(times));
  for (const index_t rank : {3, 4}) alone(concat("rank ", rank, " in place of 2"), [=](variant& x) { x.ultra.rank = rank; });
  for (const index_t cores : {4, 8}) alone(concat(cores, " cores in place of 2"), [=](variant& x) { x.ultra.cores = cores; });
  return all;
}

unit make_unit(const variant& v, rng_key key) {
  if (v.kind == variant::tucker) return ultra_mem<real>(v.ultra, key);
  const product_key_memory<real> keys(v.product, key.child(0));
  if (v.kind == variant::product_keys) return keys;
  return one_query_keys(linear<real>({v.product.outputs, v.product.inputs}, key.child(1)), batch_norm<real>(v.product.inputs), keys);
}
template <class Mix, class Make>
blocks_and_units<Mix> make_blocks(const variant& v, index_t features, index_t hidden, rng_key key, Make&& mix) {
  blocks_and_units<Mix> all;
  for (index_t i = 0; i < blocks; ++i) {
    const rng_key k = key.child(static_cast<std::uint64_t>(i));
    all.blocks.push_back({mix(k.child(0)), layer_norm<real>(features),
                          feed_forward<real>({.features = features, .hidden = hidden, .kind = activation::gelu}, k.child(1))});
  }
  all.ranges = parse_skip_ranges(v.ranges, blocks, 1);
  for (std::size_t u = 0; u < all.ranges.size(); ++u) all.units.push_back(make_unit(v, key.child(100 + u)));
  return all;
}

/// The share of facts that a model with the variant recalls.
double on_facts(const variant& v, const tables::options& o, const context& ctx, const std::function<void(double)>& tell,
                tables::table& t) {
  namespace facts = tables::facts;
  const rng_key key{o.seed};
  const facts::corpus known(o.pick<index_t>(200, 2000, 2000), key.child(0));
  fact_model model(linear<real>({2 * facts::width, facts::width}, key.child(1)),
                   make_blocks<fact_mix>(v, facts::width, 4 * facts::width, key.child(2), [](rng_key) { return fact_mix(0); }),
                   layer_norm<real>(facts::width), linear<real>({facts::width, facts::objects}, key.child(4)));
  t.skipped += facts::learn(model, known, {.steps = o.pick<index_t>(20, 500, 1000), .value_times = v.value_times},
                            key.child(3), ctx, tell);
  return static_cast<double>(facts::test(model, known, ctx).recalled) / static_cast<double>(known.count);
}

struct outcome {
  double bits_per_byte, training_rate;  // tokens a second
  index_t parameters;
};
outcome on_text(const variant& v, const model_config& c, const corpus& data, const tables::options& o,
                const context& ctx, const std::function<void(double)>& tell, tables::table& t) {
  const rng_key key{o.seed};
  text_model model(embedding<real>({.tokens = byte_values, .features = c.features, .positions = c.context, .deviation = 1}, key.child(0)),
                   make_blocks<text_mix>(v, c.features, c.hidden, key.child(1),
                                         [&](rng_key k) {
                                           return text_mix{sequential(layer_norm<real>(c.features),
                                                                      attention<real>({.inputs = c.features, .heads = c.heads, .causal = true}, k))};
                                         }),
                   layer_norm<real>(c.features), linear<real>({c.features, byte_values}, key.child(2)));
  const training_config r{.steps = o.pick<index_t>(3, 120, 400)};
  const learning_rate_schedule rate{.learning_rate = r.rate, .warmup_steps = r.steps / 10, .total_steps = r.steps, .final_ratio = 0.05};
  const value_rate_schedule times{.times = v.value_times, .total_steps = r.steps};
  optimiser<real> adam({.weight_decay = r.weight_decay, .groups = {{.pattern = "*.values"}, {.pattern = "*bias", .weight_decay = 0}}});
  support::step_guard guard(v.name);
  const double begin = tables::now();
  compressed::train(model, data, c.context, r.steps, r.batch, o.seed, ctx, [&](index_t step, auto& gradient, double loss) {
    const double norm = clip_by_global_norm(model, gradient, r.clip, ctx);
    adam.config.groups[0].rate = r.value_rate / r.rate * times(step);
    if (guard.accepts(loss, norm)) adam.step(model, gradient, rate(step), ctx);
    tell(static_cast<double>(step) / static_cast<double>(r.steps));
  });
  const double seconds = tables::now() - begin;
  guard.check();
  t.skipped += guard.skipped();
  const index_t all = static_cast<index_t>(data.text.size()) / c.context;
  return {compressed::bits_per_byte(model, data, c.context, all, ctx), static_cast<double>(r.steps * r.batch * c.context) / seconds,
          count_parameters(model)};
}

void make(const tables::options& o, const context& ctx, tables::table& t) {
  const model_config c;
  const corpus data(EXAMPLE_DATA "/kjv_new_testament.txt", c.context);
  const bool single = o.run != tables::length::usual;
  // Tables too small for all facts, or every variant would know them.
  const auto for_facts = variants(tables::facts::width, o.pick<index_t>(32, 40, 40), 32, 16, single);
  const auto for_text = variants(c.features, o.pick<index_t>(32, 256, 256), 32, 16, single);
  t = {.title = "From product keys to UltraMem",
       .source = "arXiv 2411.12364 section 4.5, table 5",
       .question =
           "Each row keeps the changes of the rows above it; one number in place of another is a change of the row of "
           "the value rate "
           "(--full): the share of random facts recalled with tables too small for all, and held-out bits per byte of "
           "the bundled text.",
       .columns = {"variant", "facts recalled", "change", "bits per byte", "change of bits", "million parameters",
                   "training tokens/s"},
       .figures = {{.title = "Facts recalled", .x = "variant", .y = "facts recalled"},
                   {.title = "Held-out bits per byte", .x = "variant", .y = "bits per byte"}}};
  std::vector<double> shares, bits;
  std::string better, worse;  // of the changes that lead to UltraMem
  std::size_t whole = 0;
  for (std::size_t i = 0; i < for_facts.size(); ++i) {
    const variant& v = for_facts[i];
    const auto tell = [&](double begin) {
      return [&, begin](double share) {
        tables::progress(v.name, (static_cast<double>(i) + begin + share / 2) / static_cast<double>(for_facts.size()));
      };
    };
    shares.push_back(v.looks_back ? shares[v.base] : on_facts(v, o, ctx, tell(0), t));
    const outcome text = on_text(for_text[i], c, data, o, ctx, tell(0.5), t);
    bits.push_back(text.bits_per_byte);
    const double more = shares[i] - shares[v.base], bits_more = bits[i] - bits[v.base];
    const nlohmann::json none;
    t.row({v.name, v.looks_back ? none : nlohmann::json(shares[i]), v.looks_back ? none : nlohmann::json(more), bits[i], bits_more,
           static_cast<double>(text.parameters) * 1e-6, text.training_rate});
    if (v.value_times > 1 && whole == 0) whole = i;
    if (i == 0 || v.base + 1 != i || v.looks_back) continue;
    constexpr double seen = 0.005;  // of one seed: less is not worth a word
    if (std::min(std::abs(more), std::abs(bits_more)) < seen) continue;
    std::string& list = more > 0 ? better : worse;
    if (more < 0 && bits_more > 0) t.last_row_is_against();
    if ((more > 0) == (bits_more < 0)) list += concat(list.empty() ? "" : "; ", v.name);
  }
  t.shown = shares[whole] > shares[0] && bits[whole] < bits[0];
  t.finding = tables::sentence("From product keys to UltraMem the share of facts goes from ", shares[0], " to ",
                               shares[whole], ", the loss from ", bits[0], " to ", bits[whole],
                               " bits per byte. Better in both: ", better.empty() ? "none" : better,
                               ". Worse in both: ", worse.empty() ? "none" : worse, ".");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
