// Decoding against the full pass at a length where sums of float are long; in release alone, the full pass takes seconds.
#include <gtest/gtest.h>

#include "lithe/lithe.hpp"
#include "support/matrices.hpp"

namespace long_text_tests {

using namespace lithe;

#if defined(NDEBUG)
/// The last two of T rows, decoded behind a filled cache, and of the full pass.
template <class L>
void expect_decoded_rows_of_the_full_pass(const char* name, const L& l, index_t T) {
  using S = typename L::scalar;
  const parallel_executor exec(2);
  workspace work(exec);
  const context ctx{.exec = &exec, .work = &work};
  const matrix<S> x = random<S>(T, 8, 3);
  matrix<S> full(T, 8), last(2, 8);
  l.forward(x, full, ctx);
  auto cache = l.make_cache(1, T);
  l.fill(view(x).slice_rows(0, T - 2), cache, ctx);
  l.decode(view(x).slice_rows(T - 2, 2), last, cache, ctx);
  // Both sum T terms in blocks: 64 chains of some hundred units of 6e-8 each would give 4e-6.
  EXPECT_LE(difference(last, full.bottomRows(2)), 1e-5 * static_cast<double>(full.bottomRows(2).cwiseAbs().maxCoeff())) << name;
}

TEST(long_texts, decode_what_the_full_pass_gives) {
  const index_t T = 70'000;
  const rng_key k{1};
  expect_decoded_rows_of_the_full_pass("attention", attention<float>({.inputs = 8, .causal = true}, k), T);
  expect_decoded_rows_of_the_full_pass("local_attention", local_attention<float>({.inputs = 8, .causal = true, .circular = false}, k), T);
  expect_decoded_rows_of_the_full_pass("bucket_attention", bucket_attention<float>({.inputs = 8, .causal = true, .hash = {.rounds = 1, .buckets = {64}}}, k), T);
  expect_decoded_rows_of_the_full_pass("collaborative_attention", collaborative_attention<float>({.inputs = 8, .key_width = 8, .causal = true}, k), T);
}
#endif

}  // namespace long_text_tests
