// Size, heads, k and batch norm of a memory layer against its use and the model's quality (arXiv 1907.05242 section 4.6, tables 2 to 4).
#include "language.hpp"

namespace {

void make(const tables::options& o, const lithe::context& ctx, tables::table& t) {
  const auto model = [](index_t sub_keys, index_t heads, index_t top_k, bool batch_norm) {
    model_config c;
    c.sub_keys = sub_keys;
    c.memory_heads = heads;
    c.top_k = top_k;
    c.batch_norm = batch_norm;
    return tables::contender{
        lithe::concat(sub_keys, "² slots, ", heads, heads == 1 ? " head, k = " : " heads, k = ", top_k, batch_norm ? "" : ", no batch norm"), c};
  };
  const std::vector<tables::contender> all{model(64, 4, 16, true),  model(128, 4, 16, true), model(256, 4, 16, true), model(256, 4, 16, false),
                                           model(256, 1, 16, true), model(256, 2, 16, true), model(256, 4, 4, true),  model(256, 4, 32, true)};
  training_config r;
  r.steps = o.pick<index_t>(5, 1000, 2000);
  t = {.title = "Options of a memory layer",
       .source = "arXiv 1907.05242 section 4.6, figures 5, 6, tables 2 to 4",
       .question = lithe::concat(r.steps, " steps of ", r.batch,
                                 " x 256 bytes: how much of the table is used on held-out text, and what it is worth."),
       .columns = {"memory", "slots", "heads", "k", "batch norm", "bits per byte", "used %", "KL to uniform",
                   "training tokens/s"},
       .figures = {{.title = "Held-out bits per byte", .x = "memory", .y = "bits per byte"},
                   {.title = "Slots in use", .x = "memory", .y = "used %"}}};
  struct result {
    double bits, used;
  };
  std::vector<result> of;  // in the order of `all`
  t.skipped = tables::compare(all, r, o, ctx, [&](const tables::contender& c, const tables::outcome& x) {
    const model_config& m = c.config;
    t.row({c.name, m.sub_keys * m.sub_keys, m.memory_heads, m.top_k, m.batch_norm ? "yes" : "no", x.bits_per_byte, x.usage.counted.used,
           x.usage.weighted.kl_to_uniform, x.training_rate});
    of.push_back({x.bits_per_byte, x.usage.counted.used});
  });
  const auto [small, middle, large, no_norm, one_head, two_heads, few_picks, many_picks] = std::tie(of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7]);
  // More slots, heads and picks, and the norm, should each be worth something; rows are in the order of `all`.
  const auto no_better = [&](std::size_t row, const result& than) {
    if (of[row].bits >= than.bits) t.against.push_back(row);
  };
  no_better(1, small);
  no_better(7, large);
  if (large.bits >= std::min({middle.bits, no_norm.bits, two_heads.bits, few_picks.bits})) t.against.push_back(2);
  no_better(5, one_head);
  t.shown = large.used > no_norm.used && large.bits < small.bits && large.bits < one_head.bits && many_picks.bits < few_picks.bits;
  t.finding = tables::sentence("With batch norm on the query ", large.used, " % of the slots are used, without it ",
                               no_norm.used, " %. Bits per byte: ", small.bits, ", ", middle.bits, ", ", large.bits,
                               " with 64², 128², 256² slots; ", one_head.bits, ", ", two_heads.bits, ", ", large.bits,
                               " with 1, 2, 4 heads; ", few_picks.bits, ", ", large.bits, ", ", many_picks.bits,
                               " with k = 4, 16, 32.");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
