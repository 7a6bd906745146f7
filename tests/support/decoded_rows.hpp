#pragma once

// What causal layers with a cache owe each row that is decoded together with later ones.
#include <gtest/gtest.h>

#include <limits>

#include "support/matrices.hpp"

namespace lithe::inline LITHE_ABI {

/// Decodes n rows behind 20 held ones: a NaN or an infinity in the last reaches that row alone, all others keep their bits.
template <class L>
void expect_nothing_from_a_later_row(const L& l, index_t n) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    matrix<double> x = random(20 + n, 8, 1), clean(n, 8), y(n, 8);
    const auto decode = [&](matrix<double>& out) {
      auto cache = l.make_cache(1, 20 + n);
      l.fill(x.topRows(20), cache, {});
      l.decode(x.bottomRows(n), out, cache, {});
    };
    decode(clean);
    x(20 + n - 1, 3) = bad;
    decode(y);
    EXPECT_EQ(y.topRows(n - 1), clean.topRows(n - 1)) << n << " rows";
    EXPECT_TRUE(std::isnan(y(n - 1, 0)));
  }
}

}  // namespace lithe::inline LITHE_ABI
