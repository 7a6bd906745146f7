#pragma once

// For one source file of a program: counts what goes to malloc, past operator new, too. Sanitizers bring allocators of their own; there
// LITHE_COUNTS_MALLOC is not defined and tests leave the count out.
#include <atomic>
#include <cstdlib>

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && defined(__GLIBC__)
#define LITHE_COUNTS_MALLOC 1
inline std::atomic<long> mallocs{0};
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t n) { return ++mallocs, __libc_malloc(n); }
void* calloc(std::size_t n, std::size_t size) { return ++mallocs, __libc_calloc(n, size); }
void* realloc(void* p, std::size_t n) { return ++mallocs, __libc_realloc(p, n); }
void* memalign(std::size_t alignment, std::size_t n) { return ++mallocs, __libc_memalign(alignment, n); }
void* aligned_alloc(std::size_t alignment, std::size_t n) { return ++mallocs, __libc_memalign(alignment, n); }
int posix_memalign(void** p, std::size_t alignment, std::size_t n) {
  ++mallocs;
  *p = __libc_memalign(alignment, n);
  return *p == nullptr ? 12 : 0;
}
}
#endif
