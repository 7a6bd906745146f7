// Texts longer than 65,536 tokens, where the numbers of 16 bits end.
#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/layers/attention/attention.hpp"

namespace long_texts {

using namespace lithe;

TEST(LongTexts, attention_decodes_what_the_full_pass_gives_at_70000_rows) {
  constexpr index_t rows = 70'000, features = 8;
  const parallel_executor threads(2);
  workspace scratch_memory(threads);
  const context ctx{.exec = &threads, .work = &scratch_memory};
  const attention<float> layer({.inputs = features, .heads = 1, .causal = true}, rng_key{1});
  matrix<float> x(rows, features), whole(rows, features), decoded(rows, features);
  fill_normal<float>(x, 1, rng_key{2});
  layer.forward(x, whole, ctx);
  auto cache = layer.make_cache(1, rows);
  constexpr index_t piece = 7'000;
  for (index_t first = 0; first < rows; first += piece)
    layer.decode(matrix_view<const float>(x).slice_rows(first, piece), matrix_view<float>(decoded).slice_rows(first, piece), cache, ctx);
  // The sum of 70,000 weights is taken in another order; values are at most some tenths.
  EXPECT_LT((whole - decoded).cwiseAbs().maxCoeff(), 1e-4F);
  EXPECT_GT(whole.bottomRows(1).cwiseAbs().maxCoeff(), 0);
}

}  // namespace long_texts
