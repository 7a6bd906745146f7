// Decode time and bytes touched against batch: UltraMem, product keys and experts at equal parameters and equal active parameters, beside dense
// layers: those that both memories stand beside, others of equal active parameters, and ones four times as wide (arXiv 2411.12364 figure 6).
#include <lithe/lithe.hpp>

#include "../limit_loops.hpp"
#include "table.hpp"

namespace {

using namespace lithe;
using real = float;

constexpr index_t features = 512, blocks = 6, hidden = 2048, units = 2;
constexpr index_t equal = 2534;  // of a dense layer with as many active parameters as hidden, UltraMem's share included

/// What a batch of tokens costs at best, weights in main memory.
struct work {
  double bytes, flops;
};

/// The part of a model that differs: the feed-forward layers of all blocks, with what stands beside them.
struct contender {
  std::string name;
  index_t parameters;
  std::function<void(matrix_view<const real>, matrix_view<real>, const context&)> forward;
  std::function<work(double)> touched;
};

/// Of n things drawn `draws` times at random, those that are drawn at all.
double distinct(double n, double draws) { return n * (1 - std::pow(1 - 1 / n, draws)); }

template <class L>
contender contend(std::string name, std::vector<L> layers, std::function<work(double)> touched) {
  index_t parameters = 0;
  for (L& l : layers) {
    prepack(l);
    parameters += count_parameters(l);
  }
  return {std::move(name), parameters,
          [layers = std::make_shared<std::vector<L>>(std::move(layers))](auto x, auto y, const context& ctx) {
            for (const L& l : *layers) l.forward(x, y, ctx);
          },
          std::move(touched)};
}

std::vector<feed_forward<real>> dense(index_t width) {
  std::vector<feed_forward<real>> layers;
  for (index_t i = 0; i < blocks; ++i)
    layers.emplace_back(feed_forward_config{.features = features, .hidden = width, .bias = false}, rng_key{static_cast<std::uint64_t>(i)});
  return layers;
}
work dense_work(double width, double batch) {
  const double weights = 2.0 * features * width * blocks;
  return {4 * weights, 2 * weights * batch};
}
/// Two lists of layers as one contender.
contender both(std::string name, contender a, contender b) {
  return {std::move(name), a.parameters + b.parameters,
          [a, b](auto x, auto y, const context& ctx) {
            a.forward(x, y, ctx);
            b.forward(x, y, ctx);
          },
          [a, b](double batch) {
            const work p = a.touched(batch), q = b.touched(batch);
            return work{p.bytes + q.bytes, p.flops + q.flops};
          }};
}

contender experts(index_t count, index_t width) {
  std::vector<mixture_of_experts<real>> layers;
  for (index_t i = 0; i < blocks; ++i)
    layers.emplace_back(mixture_of_experts_config{.features = features, .hidden = width, .experts = count, .kind = activation::relu},
                        rng_key{static_cast<std::uint64_t>(i)});
  const double expert = 2.0 * features * static_cast<double>(width), n = static_cast<double>(count);
  return contend("experts", std::move(layers), [=](double batch) {
    return work{4 * blocks * (distinct(n, 2 * batch) * expert + n * features), 2 * blocks * batch * (2 * expert + n * features)};
  });
}
/// Units of a memory that reads `picks` rows of `width` numbers; `dense` numbers of it are read by every token.
template <class Memory>
contender memories(std::string name, std::vector<Memory> layers, double rows, double width, double picks) {
  const double all = static_cast<double>(count_parameters(layers.front())), weights = all - rows * width;
  return contend(std::move(name), std::move(layers), [=](double batch) {
    return work{4 * units * (weights + distinct(rows, batch * picks) * width), 2 * units * batch * (weights + picks * width)};
  });
}
contender ultra_mems(index_t keys) {
  std::vector<ultra_mem<real>> layers;
  for (index_t i = 0; i < units; ++i)
    layers.emplace_back(ultra_mem_config{.features = features, .heads = 2, .sub_keys = 2 * keys, .key_width = 80, .top_k = 42},
                        rng_key{static_cast<std::uint64_t>(i)});
  return memories("UltraMem", std::move(layers), static_cast<double>(keys * keys), features / 2, 84);
}
contender product_keys(index_t keys) {
  std::vector<product_key_memory<real>> layers;
  for (index_t i = 0; i < units; ++i) {
    product_key_memory_config c{.inputs = features,
                                .value_width = features / 2,
                                .heads = 2,
                                .sub_keys = keys,
                                .key_width = 560,  // for as many active parameters as UltraMem has
                                .top_k = 42};
    c.readout.kind = memory_readout_kind::linear;
    layers.emplace_back(c, rng_key{static_cast<std::uint64_t>(i)});
  }
  return memories("product keys", std::move(layers), static_cast<double>(keys * keys), features / 2, 84);
}

/// What all workers together can do at most. Measured again and again, because other programs of the machine take their share.
struct limit_meter {
  int workers;
  machine::huge_array<char> buffer{std::size_t{1} << 30};

  explicit limit_meter(int all) : workers(all) { std::fill(buffer.data(), buffer.data() + buffer.size(), char{1}); }

  /// Bytes and operations a second.
  [[nodiscard]] work measure() const {
    machine::pair_of_threads threads(workers);
    const auto best = [&](const std::function<void(int, int)>& loop) {
      double seconds = 1e9;
      for (int i = 0; i < 5; ++i) {
        const double begin = tables::now();
        threads.run(loop);
        seconds = std::min(seconds, tables::now() - begin);
      }
      return seconds;
    };
    constexpr std::int64_t steps = 1'000'000;
    const double read = best([&](int part, int parts) {
      const std::size_t share = buffer.size() / static_cast<std::size_t>(parts);
      machine::read_all(buffer.data() + share * static_cast<std::size_t>(part), share);
    });
    const double multiplied = best([](int, int) {
      const float sum = machine::multiply_adds(steps);
      asm volatile("" : : "v"(sum));
    });
    return {static_cast<double>(buffer.size()) / read, machine::multiply_add_flops(steps) * workers / multiplied};
  }
};

void make(const tables::options& o, const context&, tables::table& t) {
  const int workers = std::min(o.workers, 2);  // as many as the limits are measured with
  const parallel_executor exec(workers);
  workspace scratch_memory(exec);
  const context ctx{.exec = &exec, .work = &scratch_memory};
  const bool quick = o.run == tables::length::quick;
  const index_t keys = quick ? 128 : 676, expert_count = quick ? 4 : 32;  // keys² table rows
  const int repeats = o.pick(3, 20, 60);

  std::vector<contender> all;
  all.push_back(contend("dense", dense(hidden), [](double b) { return dense_work(hidden, b); }));
  all.push_back(contend("dense, equal FLOPs", dense(equal), [](double b) { return dense_work(equal, b); }));
  all.push_back(contend("dense, 4 times", dense(4 * hidden), [](double b) { return dense_work(4.0 * hidden, b); }));
  all.push_back(experts(expert_count, 1264));
  // Each with dense weights of its own, or one would find what the one before it has read in the cache.
  const auto beside_dense = [&](const char* name, contender memory) {
    return both(name, contend("dense", dense(hidden), [](double b) { return dense_work(hidden, b); }), std::move(memory));
  };
  all.push_back(beside_dense("UltraMem", ultra_mems(keys)));
  all.push_back(beside_dense("product keys", product_keys(keys)));

  t = {.title = "Decoding with UltraMem and with experts",
       .source = "arXiv 2411.12364 section 4.3, figure 6",
       .question =
           concat(blocks, " blocks of ", features,
                  " features, feed-forward parts only: one step for a batch of new random tokens. The router of the "
                  "untrained experts loads them evenly."),
       .columns = {"layers", "batch", "million parameters", "million active", "us a step", "MB touched",
                   "us at the limits", "of limits", "experts' time / its", "GB/s", "GFLOP/s"},
       .figures = {
           {.title = "Decode time", .x = "batch", .y = "us a step", .by = "layers", .log_x = true, .log_y = true},
           {.title = "Bytes touched", .x = "batch", .y = "MB touched", .by = "layers", .log_x = true, .log_y = true}}};
  const limit_meter meter(workers);
  const std::vector<index_t> batches = quick ? std::vector<index_t>{1, 64} : std::vector<index_t>{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
  double best_gap = 0, first_gap = 0, middle_gap = 1e9, over_dense = 0, of_limits = 1e9;
  std::string lost, farthest;       // batches at which experts are faster; the rival farthest from the limits
  for (const contender& c : all) {  // all weights once: what the system has put away meanwhile comes back
    const matrix<real> x = matrix<real>::Random(1024, features);
    matrix<real> y(1024, features);
    c.forward(x, y, ctx);
  }
  for (std::size_t b = 0; b < batches.size(); ++b) {
    const index_t batch = batches[b];
    const work most = meter.measure();
    std::vector<std::vector<double>> times(all.size());
    matrix<real> x(batch, features), y(batch, features);
    for (int repeat = -5; repeat < repeats; ++repeat) {
      tables::progress(concat("batch ", batch), (static_cast<double>(b) + (repeat + 5.0) / (repeats + 5)) / static_cast<double>(batches.size()));
      for (std::size_t i = 0; i < all.size(); ++i) {
        const rng_key key = rng_key{o.seed}.child(static_cast<std::uint64_t>(batch)).child(static_cast<std::uint64_t>(repeat + 5));
        for (index_t n = 0; n < x.size(); ++n) x.data()[n] = static_cast<real>(normal(key, static_cast<std::uint64_t>(n)));
        const double begin = tables::now();
        all[i].forward(x, y, ctx);
        if (repeat >= 0) times[i].push_back((tables::now() - begin) * 1e6);
      }
    }
    std::vector<double> median;
    for (auto& v : times) median.push_back(tables::median_of(v));
    const auto time_of = [&](const char* name) {
      return median[static_cast<std::size_t>(std::find_if(all.begin(), all.end(), [&](const contender& c) { return c.name == name; }) - all.begin())];
    };
    for (std::size_t i = 0; i < all.size(); ++i) {
      const work w = all[i].touched(static_cast<double>(batch));
      const double least = std::max(w.bytes / most.bytes, w.flops / most.flops) * 1e6;
      t.row({all[i].name, batch, static_cast<double>(all[i].parameters) * 1e-6, all[i].touched(1).flops / 2e6, median[i], w.bytes * 1e-6, least,
             least / median[i], time_of("experts") / median[i], most.bytes * 1e-9, most.flops * 1e-9});
      if (all[i].name == "UltraMem" && time_of("experts") < median[i]) t.last_row_is_against();
      if (all[i].name == "UltraMem" || least / median[i] >= of_limits) continue;
      of_limits = least / median[i];
      farthest = concat(all[i].name, " at batch ", batch);
    }
    const double gap = time_of("experts") / time_of("UltraMem");
    best_gap = std::max(best_gap, gap);
    if (batch == 1) first_gap = gap;
    if (batch >= 4 && batch <= 64) middle_gap = std::min(middle_gap, gap);
    if (batch == 64) over_dense = time_of("UltraMem") / time_of("dense, equal FLOPs");
    if (gap < 1) lost += concat(lost.empty() ? "" : ", ", batch);
  }
  t.shown = first_gap >= 0.9 && middle_gap > 1 && best_gap >= 2;  // "up to 6 times", most at 64
  t.finding = tables::sentence(
      "Experts of equal size take ", first_gap, " times as long as UltraMem at batch 1 (aim 0.9), at least ",
      middle_gap, " times from 4 to 64 (aim 2) and ", best_gap, " times at most (aim 4); UltraMem takes ", over_dense,
      " times as long as the dense layers of equal FLOPs at batch 64 (aim 1.3); the rivals reach at least ", of_limits,
      " of the limits (aim 0.67; ", farthest, "). ",
      lost.empty() ? "Experts are never faster." : concat("Experts are faster at batch ", lost, "."));
}

}  // namespace

int main(int argc, char** argv) { return tables::main_of(argc, argv, make); }
