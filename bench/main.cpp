// Google Benchmark's main, with what a number is worth without: the machine, the compiler and its flags, whether limits can be judged.

#include <benchmark/benchmark.h>

#include "lithe/core/config.hpp"
#include "machine.hpp"

#define LITHE_BENCH_TEXT_(x) #x
#define LITHE_BENCH_TEXT(x) LITHE_BENCH_TEXT_(x)

int main(int argc, char** argv) {
  benchmark::AddCustomContext("machine", machine::cpu_field("model name"));
  benchmark::AddCustomContext("limits", machine::has_reference_figures()
                                            ? "reference figures of an AMD Zen 5 apply; each limit case says whether it is valid (within 20 %)"
                                            : "no reference figures for this machine (they are of an AMD Zen 5 with AVX-512): limits are as measured");
#if defined(__clang__)
  benchmark::AddCustomContext("compiler", "clang " __clang_version__);
#else
  benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
  benchmark::AddCustomContext("flags", LITHE_BENCH_FLAGS);
  benchmark::AddCustomContext("kernels", LITHE_BENCH_TEXT(LITHE_ABI));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
