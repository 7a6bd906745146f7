// What the machine can do at most: multiply-adds out of registers, streaming reads, weighted sums of random rows. No code of Lithe,
// so that "percent of limit" compares with something that does not move when Lithe does.

#include <benchmark/benchmark.h>

#include <array>
#include <cstdio>
#include <vector>

#include "limit_loops.hpp"
#include "machine.hpp"

namespace {

using machine::lanes, machine::registers, machine::vec, machine::vector_bytes;

/// The best of a run against the figure once measured on the reference machine; the label tells whether this run's limits can be used.
void judge(benchmark::State& state, double attained, double reference, const char* unit) {
  char text[160];
  if (machine::has_reference_figures())
    std::snprintf(text, sizeof text, "%s: %.0f of %.0f %s", attained >= 0.8 * reference ? "limit valid" : "LIMIT NOT VALID", attained, reference, unit);
  else
    std::snprintf(text, sizeof text, "%.1f %s; no reference figures for this machine", attained, unit);
  state.SetLabel(text);
}

/// Repeats `work` and returns the seconds of the fastest repeat: the limit is what the machine does when nothing disturbs it.
template <class Work>
double fastest(benchmark::State& state, Work&& work) {
  double best = 1e30;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

void gemm(benchmark::State& state) {
  const auto workers = static_cast<int>(state.range(0));
  constexpr std::int64_t steps = 200'000;
  machine::pair_of_threads threads(workers);
  const double seconds = fastest(state, [&] {
    threads.run([](int, int) { benchmark::DoNotOptimize(machine::multiply_adds(steps)); });
  });
  const double flops = machine::multiply_add_flops(steps) * workers;
  state.SetItemsProcessed(static_cast<std::int64_t>(flops) * state.iterations());
  state.counters["best_GFLOP/s"] = flops / seconds * 1e-9;
  judge(state, flops / seconds * 1e-9, workers == 1 ? 253 : 500, "GFLOP/s");
}

/// Reads so many MiB again and again: from memory, or from the caches if they fit there.
template <std::size_t MiB>
void stream(benchmark::State& state) {
  const auto workers = static_cast<int>(state.range(0));
  static const machine::huge_array<char> buffer = [] { return machine::huge_array<char>(MiB << 20); }();
  static const bool touched = [] {
    std::fill(buffer.data(), buffer.data() + buffer.size(), char{0});
    return true;
  }();
  benchmark::DoNotOptimize(touched);
  machine::pair_of_threads threads(workers);
  const double seconds = fastest(state, [&] {
    threads.run([](int part, int parts) {
      const std::size_t share = buffer.size() / static_cast<std::size_t>(parts);
      machine::read_all(buffer.data() + share * static_cast<std::size_t>(part), share);
    });
  });
  const auto bytes = static_cast<double>(buffer.size());
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
  state.counters["best_GB/s"] = bytes / seconds * 1e-9;
  constexpr double reference[] = {MiB <= 12 ? 122 : MiB <= 32 ? 72 : 37, MiB <= 12 ? 244 : MiB <= 32 ? 144 : 45};
  judge(state, bytes / seconds * 1e-9, reference[workers - 1], "GB/s");
}

constexpr std::int64_t table_size = 1 << 28, picks = 128, tokens = 512;

/// y = sum of w[i] * row[slot[i]]. A block of columns over all rows, not row after row: many reads are under way at once.
template <std::int64_t Cols>
void sum_rows(const float* table, const std::int32_t* slot, const float* w, float* y) {
  constexpr int ahead = 8, accumulators = registers / 2;
  constexpr std::int64_t block = accumulators * lanes;
  for (std::int64_t first = 0; first < Cols; first += block) {
    vec c[accumulators]{};
    for (std::int64_t i = 0; i < picks; ++i) {
      const auto* row = reinterpret_cast<const vec*>(table + slot[i] * Cols + first);
      const auto* next = reinterpret_cast<const char*>(table + slot[std::min(i + ahead, picks - 1)] * Cols + first);
#pragma GCC unroll 16
      for (int j = 0; j < accumulators * vector_bytes; j += 64) __builtin_prefetch(next + j);
#pragma GCC unroll 16
      for (int j = 0; j < accumulators; ++j) c[j] += w[i] * row[j];
    }
#pragma GCC unroll 16
    for (int j = 0; j < accumulators; ++j) reinterpret_cast<vec*>(y + first)[j] = c[j];
  }
}

/// A gigabyte of value rows, however wide they are.
const float* value_table() {
  static const machine::huge_array<float> table(table_size);
  static const bool filled = [] {
    machine::random_bits random;
    for (std::size_t i = 0; i < table.size(); ++i) table.data()[i] = random.symmetric();
    return true;
  }();
  benchmark::DoNotOptimize(filled);
  return table.data();
}

template <std::int64_t Cols>
void random_rows(benchmark::State& state) {
  const auto workers = static_cast<int>(state.range(0));
  constexpr int sets = 8;  // fresh rows each time
  static const machine::huge_array<float> out(tokens * Cols);
  const float* table = value_table();
  static const auto picked = [] {
    machine::random_bits random;
    std::pair<std::vector<std::int32_t>, std::vector<float>> p;
    for (int i = 0; i < sets * tokens * picks; ++i) p.first.push_back(random.below(table_size / Cols)), p.second.push_back(random.symmetric());
    return p;
  }();
  const auto& [slots, weights] = picked;
  machine::pair_of_threads threads(workers);
  std::int64_t set = 0;
  const double seconds = fastest(state, [&] {
    threads.run([&, s = slots.data(), w = weights.data()](int part, int parts) {
      for (std::int64_t t = part * tokens / parts; t < (part + 1) * tokens / parts; ++t) {
        const std::int64_t at = (set * tokens + t) * picks;
        sum_rows<Cols>(table, s + at, w + at, out.data() + t * Cols);
      }
    });
    set = (set + 1) % sets;
  });
  const double bytes = 4.0 * Cols * picks * tokens;
  state.SetItemsProcessed(tokens * state.iterations());
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
  state.counters["best_GB/s"] = bytes / seconds * 1e-9;
  judge(state, bytes / seconds * 1e-9, workers == 1 ? 30 : 45, "GB/s");
}

void cases(benchmark::internal::Benchmark* b) { b->ArgName("workers")->Arg(1)->Arg(2)->UseRealTime(); }
BENCHMARK(gemm)->Name("limit/gemm")->Apply(cases);
BENCHMARK(stream<2048>)->Name("limit/stream/MiB:2048")->Apply(cases);
BENCHMARK(stream<32>)->Name("limit/stream/MiB:32")->Apply(cases);
BENCHMARK(stream<12>)->Name("limit/stream/MiB:12")->Apply(cases);
BENCHMARK(random_rows<1024>)->Name("limit/random_rows/cols:1024")->Apply(cases);
BENCHMARK(random_rows<256>)->Name("limit/random_rows/cols:256")->Apply(cases);

}  // namespace
