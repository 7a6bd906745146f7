#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "lithe/version.hpp"

#if __cplusplus < 202002L
#error "lithe: C++20 is needed; compile with -std=c++20 or newer."
#endif

// The instruction set is chosen from the compiler's flags. It changes the alignment of Eigen's matrices and the bodies of
// inline functions, so each choice lives in an inline namespace of its own: translation units that were built with different
// flags then link as strangers instead of silently sharing one body.
#if defined(LITHE_EIGEN_KERNELS)
#define LITHE_ABI eigen_kernels  ///< Eigen's path alone, whatever the machine has
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__AVX512VBMI2__)
#define LITHE_ABI avx512_vbmi2
#else
#define LITHE_ABI avx512
#endif
#define LITHE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define LITHE_ABI avx2
#define LITHE_AVX2 1
#else
#define LITHE_ABI portable
#endif

/// Checked inside kernels, where a failure is a defect of Lithe and not of its input; gone under NDEBUG.
#define LITHE_ASSERT(condition) assert(condition)

namespace lithe::inline LITHE_ABI {

using index_t = std::ptrdiff_t;  ///< sizes, rows, columns, offsets: always 64 bits, always signed
using token_t = std::int32_t;    ///< a token id, as given to `embedding`

}  // namespace lithe::inline LITHE_ABI
