#include <gtest/gtest.h>

#include <filesystem>

#include "lithe/io/state.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/training/clip.hpp"
#include "lithe/training/optimiser.hpp"

namespace frozen_tensors_tests {

using namespace lithe;

/// A weight, a bias and a table, whose gradients the tests set.
template <class S>
struct tensors {
  using scalar = S;
  struct record {};
  struct gradient {
    matrix<S> weight, bias;
    row_gradient<S> values;
  };
  matrix<S> weight = random(5, 3, 1), bias = random(1, 3, 2), values = random(7, 3, 3);

  static matrix<S> random(index_t rows, index_t cols, std::uint64_t seed) {
    matrix<S> m(rows, cols);
    fill_normal<S>(m, 1.0, rng_key{seed});
    return m;
  }
  /// The gradient of step s.
  void differentiate(gradient& g, std::uint64_t s) const {
    g.weight = random(5, 3, 10 * s + 4);
    g.bias = random(1, 3, 10 * s + 5);
    g.values.assign_rows({static_cast<slot_t>(s % 3), 5});
    fill_normal<S>(g.values.values(), 1.0, rng_key{10 * s + 6});
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("bias", s.bias...);
    f("values", s.values...);
  }
  friend bool operator==(const tensors&, const tensors&) = default;
};

std::filesystem::path file() {
  return std::filesystem::temp_directory_path() / concat("lithe_frozen_tensors_", ::getpid(), ".safetensors");
}
template <class S>
void save(const tensors<S>& t, optimiser<S>& o) {
  state_writer out;
  out.add_model(t);
  out.add_training("optimizer", o);
  out.write(file());
}
template <class S>
void load(tensors<S>& t, optimiser<S>& o) {
  o.prepare(t, make_gradient(t));
  state_reader in(file());
  in.add_model(t);
  in.add_training("optimizer", o);
  in.load();
}

/// Steps first .. last-1, those in `frozen` with weight and table held still.
template <class S>
void train(tensors<S>& t, optimiser<S>& o, const std::string& frozen, std::size_t first, std::size_t last) {
  auto g = make_gradient(t);
  for (std::size_t s = first; s < last; ++s) {
    o.config.groups[0].frozen = frozen[s] == 'f';
    t.differentiate(g, s);
    o.step(t, g, 0.01);
  }
}

template <class S>
class frozen_tensors : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(file()); }
};
using scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(frozen_tensors, scalars);

TYPED_TEST(frozen_tensors, a_run_saved_anywhere_resumes_with_the_same_bits_whatever_was_frozen_when) {
  using S = TypeParam;
  using rules = std::pair<update_rule, update_rule>;
  for (const auto& [dense, sparse] :
       {rules{update_rule::adam, update_rule::lazy_adam}, rules{update_rule::sgd, update_rule::rowwise_adagrad},
        rules{update_rule::rowwise_adagrad, update_rule::adam}})
    for (const std::string frozen : {"mmmm", "fffff", "ffmmm", "mmfff", "mmffmm", "fmfmf"}) {
      const optimiser_config config{
          .dense = dense, .sparse = sparse, .weight_decay = 0.1, .groups = {{.pattern = "!bias"}}};
      tensors<S> whole;
      optimiser<S> o(config);
      train(whole, o, frozen, 0, frozen.size());
      tensors<S> first;
      optimiser<S> a(config);
      for (std::size_t at = 1; at < frozen.size(); ++at) {
        train(first, a, frozen, at - 1, at);
        save(first, a);
        for (const char settings : {'m', 'f'}) {  // of the new run when it loads: the old ones of that time, or others
          SCOPED_TRACE(concat(frozen, ", saved after ", at, ", loaded with ", settings));
          tensors<S> second;
          optimiser<S> b(config);
          b.config.groups[0].frozen = settings == 'f';
          load(second, b);
          train(second, b, frozen, at, frozen.size());
          EXPECT_EQ(second, whole);
        }
      }
    }
}

TYPED_TEST(frozen_tensors, loading_forgets_what_the_optimiser_did_before) {
  using S = TypeParam;
  const optimiser_config config{.groups = {{.pattern = "!bias"}}};
  for (const std::string frozen : {"fffmmm", "mmmfmm", "mffmmm"}) {
    tensors<S> whole, saved, other;
    optimiser<S> o(config), a(config), b(config);
    train(whole, o, frozen, 0, 6);
    train(saved, a, frozen, 0, 3);
    save(saved, a);
    train(other, b, "mfmmfm", 0, 6);
    load(other, b);
    train(other, b, frozen, 3, 6);
    EXPECT_EQ(other, whole) << frozen;
  }
}

/// What version 0.1 wrote of an optimiser: the number of steps and the moments.
template <class S>
struct written_by_0_1 {
  optimiser<S>& o;
  template <class F>
  void visit_state(F&& f) {
    o.visit_state([&](const std::string& name, auto& x) {
      if (!name.starts_with("skipped_steps")) f(name, x);
    });
  }
};

TYPED_TEST(frozen_tensors, files_of_version_0_1_load_and_count_the_steps_of_the_run) {
  using S = TypeParam;
  const optimiser_config config{.groups = {{.pattern = "!bias"}}};
  tensors<S> t, resumed;
  optimiser<S> a(config), b(config);
  train(t, a, "mfff", 0, 4);
  state_writer out;
  out.add_model(t);
  written_by_0_1<S> old{a};
  out.add_training("optimizer", old);
  out.write(file());
  load(resumed, b);
  EXPECT_EQ(b.steps(), 4);
  auto g = make_gradient(resumed);
  g.weight.setZero();
  const matrix<S> before = resumed.weight;
  matrix<S> m, v;
  b.visit_state([&](const std::string& name, auto& x) {
    if constexpr (!std::is_arithmetic_v<std::remove_reference_t<decltype(x)>>) {
      if (name == "first_moment.weight") m = x.map();
      if (name == "second_moment.weight") v = x.map();
    }
  });
  b.config.groups[0].frozen = false;
  b.step(resumed, g, 0.01);
  const double c1 = 1 - std::pow(0.9, 5), c2 = 1 - std::pow(0.999, 5);
  const matrix<double> step = 0.01 * (0.9 * m.template cast<double>().array() / c1) /
                              ((0.999 * v.template cast<double>().array() / c2).sqrt() + 1e-8);
  EXPECT_LT((before.template cast<double>() - step - resumed.weight.template cast<double>()).cwiseAbs().maxCoeff(),
            1e-6);
  EXPECT_GT(step.cwiseAbs().minCoeff(), 1e-4);
}

TYPED_TEST(frozen_tensors, a_thawed_tensor_goes_on_with_the_bias_correction_of_its_own_steps) {
  using S = TypeParam;
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;  // rounding of numbers near 1
  for (const std::string moves : {"", "mmm"}) {                      // before 1,000 frozen steps
    tensors<S> t, reference;
    optimiser<S> o({.weight_decay = 0.1, .groups = {{.pattern = "!bias"}}}), never_frozen(o.config);
    const std::string frozen = moves + std::string(1000, 'f') + "mmmm";
    auto g = make_gradient(t);
    double longest = 0;
    for (std::size_t s = 0; s < frozen.size(); ++s) {
      const bool still = frozen[s] == 'f';
      o.config.groups[0].frozen = still;
      t.differentiate(g, s % 97);
      const matrix<S> before = t.weight;
      o.step(t, g, 1e-3);
      if (still) {
        ASSERT_EQ(t.weight, before);
        continue;
      }
      if (s >= 1000) longest = std::max(longest, static_cast<double>((t.weight - before).cwiseAbs().maxCoeff()));
      never_frozen.step(reference, g, 1e-3);
    }
    EXPECT_LT((t.weight - reference.weight).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_LT((t.values - reference.values).cwiseAbs().maxCoeff(), tolerance);
    EXPECT_LT(longest, 2e-3) << "a step of Adam is about one learning rate long";
  }
}

TYPED_TEST(frozen_tensors, a_rate_of_0_is_frozen_too) {
  using S = TypeParam;
  tensors<S> t;
  const tensors<S> before;
  auto g = make_gradient(t);
  t.differentiate(g, 1);
  optimiser<S> o(
      {.weight_decay = 0.1,
       .groups = {{.pattern = "weight", .rate = 0}, {.pattern = "values", .own_rate = 0, .weight_decay = 0.5}}});
  o.step(t, g, 0.1);
  EXPECT_EQ(t.weight, before.weight);
  EXPECT_EQ(t.values, before.values);
  EXPECT_NE(t.bias, before.bias);
  int kept = 0;
  o.visit_state([&](const std::string&, auto&) { ++kept; });
  EXPECT_EQ(kept, 3) << "steps, and the moments of the bias";
}

TYPED_TEST(frozen_tensors, clipping_counts_what_moves) {
  using S = TypeParam;
  tensors<S> t;
  auto g = make_gradient(t);
  for (parameter_group still :
       {parameter_group{.pattern = "weight", .frozen = true}, parameter_group{.pattern = "weight", .rate = 0},
        parameter_group{.pattern = "weight", .own_rate = 0}}) {
    const std::vector<parameter_group> groups{still, {.pattern = "*", .rate = 2}};
    g.weight.setConstant(S(1e6));
    g.bias.setConstant(S(1e-3));
    g.values.assign_rows({2});
    g.values.values().map().setConstant(S(1e-3));
    const double norm = std::sqrt(6.0) * 1e-3;
    EXPECT_NEAR(global_norm(t, g, {}, groups), norm, 1e-9);
    EXPECT_NEAR(clip_by_global_norm(t, g, 1.0, {}, groups), norm, 1e-9);
    EXPECT_EQ(g.bias(0, 0), S(1e-3)) << "its norm is below the limit";
    EXPECT_NEAR(clip_by_global_norm(t, g, norm / 4, {}, groups), norm, 1e-9);
    EXPECT_NEAR(g.bias(0, 0), 1e-3 / 4, 1e-9);
    EXPECT_NEAR(g.values.values()(0, 0), 1e-3 / 4, 1e-9);
    EXPECT_EQ(g.weight(0, 0), S(1e6));
    scale_gradient(t, g, 4, {}, groups);
    EXPECT_NEAR(g.bias(0, 0), 1e-3, 1e-9);
    EXPECT_EQ(g.weight(0, 0), S(1e6));
    EXPECT_GT(global_norm(t, g), 1e6) << "without groups all count";
  }
  const std::vector<parameter_group> all{{.pattern = "*", .frozen = true}};
  EXPECT_EQ(clip_by_global_norm(t, g, 1.0, {}, all), 0);
}

TYPED_TEST(frozen_tensors, weight_decay_of_a_table_decays_the_rows_that_are_touched) {
  using S = TypeParam;
  const double tolerance = std::is_same_v<S, float> ? 1e-6 : 1e-14;
  for (const update_rule rule : {update_rule::sgd, update_rule::lazy_adam, update_rule::rowwise_adagrad}) {
    tensors<S> decayed, plain;
    const tensors<S> before;
    auto g = make_gradient(decayed);
    decayed.differentiate(g, 4);  // rows 1 and 5
    optimiser<S> a({.sparse = rule, .groups = {{.pattern = "values", .weight_decay = 0.5}}}),
        b({.sparse = rule, .weight_decay = 0.5});
    a.step(decayed, g, 0.1);
    b.step(plain, g, 0.1);
    for (index_t i = 0; i < 7; ++i) {
      const bool touched = i == 1 || i == 5;
      const matrix<S> expected = plain.values.row(i) - S(touched ? 0.05 : 0) * before.values.row(i);
      EXPECT_LT((decayed.values.row(i) - expected).cwiseAbs().maxCoeff(), tolerance) << i;
      if (!touched) {
        EXPECT_EQ(decayed.values.row(i), before.values.row(i));
      }
    }
  }
  tensors<S> t;
  const tensors<S> before;
  auto g = make_gradient(t);  // zero: decay alone moves
  optimiser<S> o({.groups = {{.pattern = "weight", .weight_decay = 0.5, .rule = update_rule::rowwise_adagrad}}});
  o.step(t, g, 0.1);
  EXPECT_LT((t.weight - S(0.95) * before.weight).cwiseAbs().maxCoeff(), tolerance) << "a dense tensor by rows";
}

}  // namespace frozen_tensors_tests
