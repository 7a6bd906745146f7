// Product keys against flat keys of as many slots: quality and speed against the size of the memory (arXiv 1907.05242 section 4.6, figure 6).
#include "language.hpp"

namespace {

void make(const tables::options& o, const lithe::context& ctx, tables::table& t) {
  const auto sides = o.pick<std::vector<index_t>>({16, 32}, {32, 64, 128}, {32, 64, 128, 256});
  std::vector<tables::contender> all;
  for (const index_t side : sides)
    for (const char* keys : {"flat", "memory"}) {
      model_config c;
      c.feed_forward = keys;
      c.sub_keys = side;
      all.push_back({lithe::concat(c.feed_forward == "flat" ? "flat" : "product", " keys, ", side, "² slots"), c});
    }
  training_config r;
  r.steps = o.pick<index_t>(5, 600, 1600);
  t = {.title = "Product keys against flat keys",
       .source = "arXiv 1907.05242 section 4.6, figure 6",
       .question = lithe::concat(r.steps, " steps of ", r.batch,
                                 " x 256 bytes: what a key for each slot costs, and what it is worth against two "
                                 "halves that all slots share."),
       .columns = {"memory", "keys", "slots", "parameters", "bits per byte", "used %", "training tokens/s",
                   "inference tokens/s"},
       .figures = {{.title = "Held-out bits per byte", .x = "slots", .y = "bits per byte", .by = "keys", .log_x = true},
                   {.title = "Inference speed",
                    .x = "slots",
                    .y = "inference tokens/s",
                    .by = "keys",
                    .log_x = true,
                    .log_y = true}}};
  struct pair {
    double quality = 0, speed = 0;
  } flat, product;  // of the largest memory
  const auto wins = [&] { return product.speed > flat.speed && product.quality < flat.quality + 0.02; };
  t.skipped = tables::compare(all, r, o, ctx, [&](const tables::contender& c, const tables::outcome& x) {
    const bool is_flat = c.config.feed_forward == "flat";
    t.row({c.name, is_flat ? "flat" : "product", slots_of(c.config), x.parameters, x.bits_per_byte, x.usage.counted.used, x.training_rate,
           x.inference_rate});
    (is_flat ? flat : product) = {x.bits_per_byte, x.inference_rate};
    if (!is_flat && !wins()) t.last_row_is_against();
  });
  t.shown = wins();
  t.finding = tables::sentence("With ", sides.back(), "² slots a model with product keys reads text ",
                               product.speed / flat.speed, " times as fast as one with flat keys, at ", product.quality,
                               " against ", flat.quality, " bits per byte.");
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
