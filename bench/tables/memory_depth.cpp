// A memory layer against twice the depth, and where in a model memories help (arXiv 1907.05242 sections 4.4 and 4.5).
#include "language.hpp"

namespace {

void make(const tables::options& o, const lithe::context& ctx, tables::table& t) {
  const auto model = [](index_t layers, std::vector<index_t> memory_at) {
    model_config c;
    c.layers = layers;
    c.feed_forward = memory_at.empty() ? "dense" : "memory";
    c.memory_at = memory_at.empty() ? std::vector<index_t>{0} : std::move(memory_at);
    return c;
  };
  const std::vector<tables::contender> all{{"3 blocks", model(3, {})},
                                           {"6 blocks", model(6, {})},
                                           {"3 blocks, memory in the first", model(3, {0})},
                                           {"3 blocks, memory in the second", model(3, {1})},
                                           {"3 blocks, memory in the last", model(3, {2})},
                                           {"3 blocks, memory in the first and last", model(3, {0, 2})}};
  training_config r;
  r.steps = o.pick<index_t>(5, 1100, 3000);
  t = {.title = "A memory layer against twice the depth",
       .source = "arXiv 1907.05242 sections 4.4, 4.5, figure 4",
       .question = lithe::concat(r.steps, " steps of ", r.batch,
                                 " x 256 bytes of the bundled text: held-out bits per byte and speed."),
       .columns = {"model", "parameters", "bits per byte", "training tokens/s", "inference tokens/s"},
       .figures = {{.title = "Held-out bits per byte", .x = "model", .y = "bits per byte"},
                   {.title = "Quality against speed", .x = "inference tokens/s", .y = "bits per byte", .by = "model"}}};
  double shallow = 0, deep = 0, deep_rate = 0, best = 1e9, best_rate = 0;
  std::vector<double> placed;
  t.skipped = tables::compare(all, r, o, ctx, [&](const tables::contender& c, const tables::outcome& x) {
    t.row({c.name, x.parameters, x.bits_per_byte, x.training_rate, x.inference_rate});
    const bool dense = c.config.feed_forward == "dense";
    if (dense && c.config.layers == 3) shallow = x.bits_per_byte;
    if (dense && c.config.layers == 6) deep = x.bits_per_byte, deep_rate = x.inference_rate;
    if (!dense && (x.bits_per_byte >= deep || x.inference_rate <= deep_rate)) t.last_row_is_against();
    if (!dense) placed.push_back(x.bits_per_byte);
    if (!dense && x.bits_per_byte < best) best = x.bits_per_byte, best_rate = x.inference_rate;
  });
  t.shown = best < deep && best_rate > deep_rate;
  t.finding = tables::sentence("3 blocks reach ", shallow, " bits per byte, 6 blocks ", deep, ", 3 blocks with memory ",
                               best, " at ", best_rate / deep_rate,
                               " times the speed of 6. Memory in the first, second or last block: ", placed[0], ", ",
                               placed[1], ", ", placed[2], "; in the first and the last: ", placed[3], ".");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
