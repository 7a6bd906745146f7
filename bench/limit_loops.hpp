#pragma once

// The loops under the limits of a machine, without any code of Lithe: multiply-adds out of registers and streaming reads.

#include <cstddef>
#include <cstdint>

namespace machine {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, registers = 32;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, registers = 16;
#else
constexpr int vector_bytes = 16, registers = 16;
#endif
constexpr int lanes = vector_bytes / 4;
using vec [[gnu::vector_size(vector_bytes)]] = float;

/// Independent multiply-adds that stay in registers: latency 4 on 2 ports needs 8 chains at least.
inline float multiply_adds(std::int64_t steps) {
  constexpr int chains = registers - 4;
  vec c[chains];
  for (int i = 0; i < chains; ++i) c[i] = vec{} + static_cast<float>(i);
  vec a = vec{} + 0.999F, b = vec{} + 1e-3F;
  asm volatile("" : "+v"(a), "+v"(b));
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) c[i] = c[i] * a + b;
  }
  vec sum{};
  for (int i = 0; i < chains; ++i) sum += c[i];
  return sum[0] + sum[lanes - 1];
}

/// Reads n bytes as `streams` runs side by side, which keeps the memory controller busier than one.
inline void read_all(const char* data, std::size_t n) {
  constexpr std::size_t streams = 8, ahead = 1024;
  const std::size_t run = n / streams;
  vec sum[streams]{};
  for (std::size_t at = 0; at < run; at += 64) {
#pragma GCC unroll 8
    for (std::size_t s = 0; s < streams; ++s) {
      const char* p = data + s * run + at;
      __builtin_prefetch(p + ahead);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 64; i += vector_bytes) sum[s] += *reinterpret_cast<const vec*>(p + i);
    }
  }
  for (vec& s : sum) asm volatile("" : : "v"(s));
}

inline constexpr double multiply_add_flops(std::int64_t steps) { return 2.0 * lanes * (registers - 4) * static_cast<double>(steps); }

}  // namespace machine
