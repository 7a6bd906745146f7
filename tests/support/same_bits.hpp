#pragma once

// Whether two models of one shape hold the same numbers, bit for bit.
#include <gtest/gtest.h>

#include "lithe/layers/parameters.hpp"

namespace lithe::inline LITHE_ABI {

template <class L>
void expect_same_bits(const L& a, const L& b) {
  index_t compared = 0;
  for_each_tensor(
      [&](const std::string& name, role, const auto& p, const auto& q) {
        ++compared;
        if constexpr (requires { p.view(); })
          EXPECT_TRUE(p.view().map() == q.view().map()) << name;
        else
          EXPECT_TRUE(p == q) << name;
      },
      a, b);
  EXPECT_GT(compared, 20);
}

}  // namespace lithe::inline LITHE_ABI
