#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/compose/stack.hpp"
#include "lithe/layers/norms.hpp"
#include "lithe/training/optimiser.hpp"
#include "trial.hpp"
#include "tucker_memory.hpp"

namespace {

using namespace trials;

constexpr index_t features = 6;
using memory = tucker_memory<double>;
using model = stack<residual<sequential<layer_norm<double>, memory>>>;
static_assert(layer<memory> && layer<tucker_memory<float>> && layer<model>);

memory make_memory(std::uint64_t seed) { return memory({.features = features, .key_width = 4, .keys = 5, .rank = 2, .picks = 2}, rng_key{seed}); }
model make_model() {
  model m;
  for (std::uint64_t i = 0; i < 2; ++i) m.blocks.push_back({sequential<layer_norm<double>, memory>(layer_norm<double>(features), make_memory(i + 1))});
  return m;
}
memory& memory_of(model& m, std::size_t block) { return std::get<1>(m.blocks[block].inner.layers); }

template <class L>
std::vector<std::pair<std::string, matrix<double>>> save(const L& l) {
  std::vector<std::pair<std::string, matrix<double>>> saved;
  for_each_tensor([&](const std::string& name, role, const auto& p) { saved.emplace_back(name, p); }, l);
  return saved;
}

TEST(ultra_mem_state, gradients_skip_the_state) {
  const auto x = random_matrix(9, features, 3);
  const auto report = gradient_check(make_memory(1), x);
  EXPECT_LT(report.worst(), gradient_tolerance) << report.where();
  EXPECT_GT(report.smallest_gradient(), 1e-3);
  EXPECT_GT(report.at("core").checked, 0);
  EXPECT_THROW((void)report.at("u"), state_error);
  expect_right_gradients(make_model(), x);
  EXPECT_EQ(count_parameters(make_memory(1)), 8 * 6 + 2 * 10 * 4 + 4 + 25 * 6);
}

TEST(ultra_mem_state, follows_the_core_between_steps_with_a_continuous_sign) {
  auto m = make_model();
  const auto x = random_matrix(9, features, 3);
  matrix<double> y(9, features), dx = y;
  auto g = make_gradient(m);
  const auto first = memory_of(m, 0);
  optimiser<double> sgd({.dense = update_rule::sgd});
  for (int i = 0; i < 20; ++i) {
    record_of<model> r;
    m.forward(x, y, r, {});
    set_zero(m, g);
    m.backward(x, r, y, dx, g, {});
    const auto u_before = memory_of(m, 0).u, t_before = memory_of(m, 0).t;
    sgd.step(m, g, 1e-4);  // leaves u and t alone, then calls after_step
    const auto& now = memory_of(m, 0);
    EXPECT_GT(now.u.row(0).dot(u_before.row(0)), 0.9);
    EXPECT_GT(now.t.row(0).dot(t_before.row(0)), 0.9);
    // singular vectors: C t = λ u, to the accuracy of the decomposition
    const matrix<double> Ct = (now.core * now.t.transpose()).transpose();
    EXPECT_LT(largest_difference(Ct, Ct.norm() * now.u), 1e-12);
  }
  EXPECT_GT(largest_difference(memory_of(m, 0).u, first.u), 1e-4);  // it moved

  auto turned = first;  // the opposite sign is continued just as well: which one it is, is state and not a function of the core
  turned.u *= -1;
  turned.t *= -1;
  turned.after_step(make_gradient(turned));
  EXPECT_LT(largest_difference(turned.u, -first.u), 1e-14);
  record_of<memory> r, s;
  first.forward(x, y, r, {});
  turned.forward(x, y, s, {});
  EXPECT_NE(r.slots.value, s.slots.value);  // and it decides what is chosen
}

TEST(ultra_mem_state, is_saved_and_survives_refresh) {
  auto m = make_model();
  memory_of(m, 1).u *= -1;
  memory_of(m, 1).t *= -1;
  const auto saved = save(m);
  EXPECT_EQ(std::count_if(saved.begin(), saved.end(), [](const auto& s) { return s.first.ends_with(".u") || s.first.ends_with(".t"); }), 4);

  model loaded = make_model();
  for (auto& b : loaded.blocks) memory_of(loaded, static_cast<std::size_t>(&b - loaded.blocks.data())).core.setOnes();
  std::size_t at = 0;
  for_each_tensor(
      [&](const std::string& name, role, auto& p) {
        EXPECT_EQ(name, saved[at].first);
        p = saved[at++].second;
      },
      loaded);
  refresh(loaded);  // rebuilds derived copies; u and t are none
  const auto x = random_matrix(9, features, 3);
  matrix<double> y(9, features), z = y;
  m.forward(x, y, {});
  loaded.forward(x, z, {});
  EXPECT_EQ(y, z);
}

}  // namespace
