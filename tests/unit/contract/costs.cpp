// What layers say that a token costs: numbers held, operations and bytes.
#include <gtest/gtest.h>

#include <map>

#include "layers.hpp"

namespace layer_cost_tests {

using namespace lithe;
using every_layer_tests::every_layer;

TEST(layer_costs, count_every_parameter_and_twice_the_bytes_for_numbers_of_twice_the_size) {
  const auto doubles = every_layer<double>();
  const auto floats = every_layer<float>();
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    SCOPED_TRACE(doubles[i]->name);
    const cost c = doubles[i]->forward_cost(10), f = floats[i]->forward_cost(10);
    EXPECT_EQ(c.parameters, static_cast<double>(doubles[i]->parameters()));
    EXPECT_EQ(c.bytes, 2 * f.bytes);
    EXPECT_EQ(c.flops, f.flops);
  }
}

// T tokens seen, D = 8 features. Products cost two operations a weight, norms 8 a feature.
TEST(layer_costs, are_those_of_the_equations) {
  constexpr double T = 10, linear_flops = 2 * 64 + 8, dense = 2 * 64;
  const std::map<std::string, double> flops{
      {"linear", linear_flops},
      {"layer_norm", 8 * 8},
      {"batch_norm", 2 * 8},
      {"feed_forward", 2 * (2 * 96) + 12 + 8},
      {"feed_forward, gated", 3 * (2 * 96) + 2 * 12 + 8},
      {"axial_positions", 8},
      {"attention", 4 * linear_flops + 4 * T * 8},
      {"local_attention, causal", 4 * dense + 4 * (4 * 0.5 + 4) * 8},
      {"lsh_attention", 3 * dense + 2 * (4 * (2 * 2 * 4) * 4 + 2 * 2 * 4 * 2)},  // keys of 2 rounds of 2 chunks; 2 directions a round of 4 buckets
      {"residual", 4 * linear_flops + 4 * T * 8},
      {"mixture_of_experts", 2 * (2 * 2 * 48) + 2 * 4 * 8},
      {"halting_head", 2 * linear_flops + 2 * 16 + 2},
  };
  std::size_t met = 0;
  for (const auto& l : every_layer<double>())
    if (const auto it = flops.find(l->name); it != flops.end()) {
      EXPECT_EQ(l->forward_cost(static_cast<index_t>(T)).flops, it->second) << l->name;
      ++met;
    }
  EXPECT_EQ(met, flops.size());
}

}  // namespace layer_cost_tests
