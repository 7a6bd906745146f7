// From product keys to UltraMem, one change after the other, on facts learnt by heart and on the bundled text (arXiv 2411.12364 section 4.5, table
// 5).
#include "facts.hpp"
#include "language.hpp"

namespace {

using namespace lithe;

/// A layer of the table: product keys with or without softmax and projection, or UltraMem with some of its parts.
struct variant {
  std::string name{};
  bool tucker = false;  ///< UltraMem in place of product keys
  product_key_memory_config product{};
  ultra_mem_config ultra{};
  index_t units = 1;  ///< layers; `side` tells the rows of all together
  double value_times = 1;
  bool looks_back = false;  ///< says nothing about facts, which stand alone
};

/// All of them, each with the changes of those before it. Two heads, the rows of a table and the picks of a token stay.
std::vector<variant> variants(index_t features, index_t side, index_t key_width, index_t top_k) {
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
    change(v);
    v.name = std::move(name);
    all.push_back(v);
  };
  then("product keys", [](variant&) {});
  then("no softmax", [](variant& x) { x.product.gate.kind = memory_gate_kind::identity; });
  then("half the value width, a projection", [&](variant& x) {
    x.product.value_width = features / 2;
    x.product.readout = {.kind = memory_readout_kind::linear, .bias = false};
  });
  then("one query for all heads, product of scores", [](variant& x) { x.tucker = true; });
  then("two units of half the rows", [&](variant& x) {
    x.units = 2;
    x.ultra.sub_keys = 2 * std::lround(static_cast<double>(side) / std::sqrt(8));  // even: the expansion comes later
  });
  then("norm of queries and keys", [](variant& x) { x.ultra.norm = score_norm_kind::rms; });
  then("implicit value expansion, 4", [](variant& x) { x.ultra.expansion = 4, x.ultra.sub_keys *= 2; });
  then("TDQKR, rank 2", [](variant& x) { x.ultra.rank = 2; });
  then("two cores", [](variant& x) { x.ultra.cores = 2; });
  then("the paper's start", [](variant& x) { x.ultra.start = {.kind = ultra_mem_start_kind::paper, .blocks = 3}; });
  then("value rate falls from 4 times", [](variant& x) { x.value_times = 4; });
  then("convolution before the query", [](variant& x) { x.ultra.query_conv = 5, x.looks_back = true; });
  return all;
}
template <class Layer>
Layer make_layer(const variant& v, rng_key key) {
  if (v.tucker) return ultra_mem<real>(v.ultra, key);
  return product_key_memory<real>(v.product, key);
}

/// The share of facts that a model with the variant recalls.
double on_facts(const variant& v, const tables::options& o, const context& ctx, const std::function<void(double)>& tell) {
  namespace facts = tables::facts;
  const rng_key key{o.seed};
  const facts::corpus known(o.pick<index_t>(200, 2000, 4000), key.child(0));
  std::vector<facts::middle_layer> middle;
  for (index_t i = 0; i < v.units; ++i) middle.push_back(make_layer<facts::middle_layer>(v, key.child(static_cast<std::uint64_t>(10 + i))));
  facts::model model = facts::make_model(std::move(middle), key.child(2));
  facts::learn(model, known, {.steps = o.pick<index_t>(20, 700, 2200), .value_times = v.value_times}, key.child(3), ctx, tell);
  return static_cast<double>(facts::recalled(model, known, ctx)) / static_cast<double>(known.count);
}

/// A model of three blocks whose second, or second and third, feed-forward is the variant.
tables::outcome on_text(const variant& v, const tables::options& o, const context& ctx, const std::function<void(double)>& tell) {
  model_config c;
  c.feed_forward = "dense";
  c.seed = o.seed;
  training_config r;
  r.steps = o.pick<index_t>(3, 150, 1600);
  r.value_times = v.value_times;
  return tables::train(c, r, ctx, tell, [&](language_model& m) {
    for (index_t i = 0; i < v.units; ++i) {
      auto& part = std::get<1>(m.layers).blocks[static_cast<std::size_t>(3 + 2 * i)];  // attention and feed-forward in turn
      std::get<1>(part.inner.layers) = make_layer<part_layer>(v, rng_key{o.seed}.child(static_cast<std::uint64_t>(20 + i)));
    }
  });
}

tables::table make(const tables::options& o) {
  const parallel_executor exec(o.workers);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  // Tables too small for all facts, or every variant would know them.
  const auto for_facts = variants(tables::facts::width, o.pick<index_t>(32, 40, 64), 32, 16);
  const auto for_text = variants(model_config{}.features, o.pick<index_t>(32, 256, 256), 32, 16);
  tables::table t{
      .title = "From product keys to UltraMem",
      .source = "arXiv 2411.12364 section 4.5, table 5",
      .question =
          "Each row keeps the changes of the rows above it: the share of random facts recalled with a table too small for all, and held-out "
          "bits per byte of the bundled text. (Units read and join at one block here: no skipping.)",
      .columns = {"variant", "facts recalled", "change", "bits per byte", "change of bits", "million parameters", "training tokens/s"},
      .figures = {{.title = "Facts recalled", .x = "variant", .y = "facts recalled"},
                  {.title = "Held-out bits per byte", .x = "variant", .y = "bits per byte"}}};
  double first_share = 0, last_share = 0, first_bits = 0, last_bits = 0;
  for (std::size_t i = 0; i < for_facts.size(); ++i) {
    const variant& v = for_facts[i];
    const auto tell = [&](double begin) {
      return [&, begin](double share) {
        tables::progress(v.name, (static_cast<double>(i) + begin + share / 2) / static_cast<double>(for_facts.size()));
      };
    };
    const double share = v.looks_back ? last_share : on_facts(v, o, ctx, tell(0));
    const tables::outcome text = on_text(for_text[i], o, ctx, tell(0.5));
    if (i == 0) first_share = last_share = share, first_bits = last_bits = text.bits_per_byte;
    const nlohmann::json none;
    t.row({v.name, v.looks_back ? none : nlohmann::json(share), v.looks_back ? none : nlohmann::json(share - last_share), text.bits_per_byte,
           text.bits_per_byte - last_bits, static_cast<double>(text.parameters) * 1e-6, text.training_rate});
    last_share = share, last_bits = text.bits_per_byte;
  }
  t.shown = last_share > first_share && last_bits < first_bits;
  t.finding = concat("From product keys to UltraMem the share of facts goes from ", first_share, " to ", last_share, ", the loss from ", first_bits,
                     " to ", last_bits, " bits per byte.");
  return t;
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
