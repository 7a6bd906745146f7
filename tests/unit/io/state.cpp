#include "lithe/io/state.hpp"

#include <gtest/gtest.h>

#include <fstream>

#include "lithe/layers/linear.hpp"
#include "lithe/layers/memory/product_key_memory.hpp"
#include "lithe/layers/memory/ultra_mem.hpp"
#include "lithe/layers/memory/value_table.hpp"
#include "lithe/training/optimiser.hpp"

namespace state_tests {

using namespace lithe;
namespace fs = std::filesystem;

/// A value table behind a handle: copies of the handle are the same table.
struct shared_rows {
  using scalar = float;
  std::shared_ptr<matrix<float>> rows_of;
  [[nodiscard]] index_t rows() const { return rows_of ? rows_of->rows() : 0; }
  [[nodiscard]] index_t cols() const { return rows_of ? rows_of->cols() : 0; }
  [[nodiscard]] const void* identity() const { return rows_of.get(); }
  void read_row(index_t i, std::span<float> out) const { std::copy_n(rows_of->row(i).data(), cols(), out.data()); }
  void write_row(index_t i, std::span<const float> in) { std::copy_n(in.data(), cols(), rows_of->row(i).data()); }
};

template <class S>
struct block {
  using scalar = S;
  struct record {};
  struct gradient {};
  linear<S> query;
  shared_rows values;
  matrix<S> running_mean;
  int refreshed = 0;
  void refresh() { ++refreshed; }

  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("query", s.query...);
    f("values", s.values...);
    f(field("running_mean", role::state), s.running_mean...);
  }
};

template <class S>
struct model {
  using scalar = S;
  struct record {};
  struct gradient {};
  block<S> first, second;

  explicit model(std::uint64_t seed = 1, index_t outputs = 3, bool bias = true, index_t rows = 1000)
      : first{linear<S>({4, outputs, bias}, rng_key{seed}), {}, matrix<S>(1, 4), 0}, second{first} {
    second.query = linear<S>({4, outputs, bias}, rng_key{seed + 1});
    const auto table = std::make_shared<matrix<float>>(rows, 700);  // more than one block of rows
    fill_normal<float>(*table, 1, rng_key{seed + 2});
    first.values.rows_of = second.values.rows_of = table;
    fill_normal<S>(first.running_mean, 1, rng_key{seed + 3});
    fill_normal<S>(second.running_mean, 1, rng_key{seed + 4});
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("first", s.first...);
    f("second", s.second...);
  }
};

template <class M>
std::map<std::string, std::vector<double>> numbers_of(const M& m) {
  std::map<std::string, std::vector<double>> all;
  for_each_tensor(
      [&](const std::string& name, role, const auto& t) {
        auto& v = all[name];
        if constexpr (requires { t.rows_of; })
          v.assign(t.rows_of->data(), t.rows_of->data() + t.rows_of->size());
        else if constexpr (requires { t.view(); })
          v.assign(t.view().data(), t.view().data() + t.rows() * t.cols());
        else
          v.assign(t.data(), t.data() + t.size());
      },
      m);
  return all;
}

struct state : testing::Test {
  fs::path folder;
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lithe-state-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { fs::remove_all(folder); }
  [[nodiscard]] fs::path file() const { return folder / "model.safetensors"; }
};

/// Loading throws io_error with all the pieces in its sentence, and changes nothing.
template <class M>
void expect_refused(const fs::path& path, M& m, const std::vector<std::string>& pieces) {
  const auto before = numbers_of(m);
  try {
    load_model(path, m);
    ADD_FAILURE() << "expected an io_error with " << testing::PrintToString(pieces);
  } catch (const io_error& e) {
    EXPECT_NE(std::string(e.what()).find(path.string()), std::string::npos) << e.what();
    for (const auto& piece : pieces) EXPECT_NE(std::string(e.what()).find(piece), std::string::npos) << e.what() << "\n  lacks: " << piece;
  }
  EXPECT_EQ(numbers_of(m), before);
  EXPECT_EQ(m.first.refreshed, 0);
}

/// The file at `path` again, but for what `change` does to its tensors.
void rewrite(const fs::path& path, const std::function<void(std::map<std::string, matrix<float>>&, metadata_map&)>& change) {
  std::map<std::string, matrix<float>> tensors;
  safetensors_writer out;
  {
    const safetensors_file in(path);
    for (const auto& name : in.names()) tensors[name] = in.read_matrix<float>(name);
    out.metadata = in.metadata();
  }
  change(tensors, out.metadata);
  for (const auto& [name, t] : tensors) out.add<float>(name, t);
  out.write(path);
}

TEST_F(state, a_model_returns_bit_for_bit_with_its_configuration) {
  const model<float> saved(1);
  save_model(file(), saved, {{"config", R"({"outputs": 3})"}});
  EXPECT_EQ(read_model_metadata(file()), (metadata_map{{"config", R"({"outputs": 3})"}, {"lithe.format", "1"}}));
  model<float> loaded(50);
  ASSERT_NE(numbers_of(loaded), numbers_of(saved));
  load_model(file(), loaded);
  EXPECT_EQ(numbers_of(loaded), numbers_of(saved));
  EXPECT_EQ(loaded.first.refreshed, 1);
  EXPECT_EQ(loaded.second.refreshed, 1);

  const model<double> wide(2);
  save_model(file(), wide);
  EXPECT_EQ(safetensors_file(file()).info("first.query.weight").type, dtype::f64);
  EXPECT_EQ(safetensors_file(file()).info("first.values").type, dtype::f32);
  model<double> again(60);
  load_model(file(), again);
  EXPECT_EQ(numbers_of(again), numbers_of(wide));
  load_model(file(), loaded);  // F64 into float: rounded
  EXPECT_EQ(loaded.first.query.weight, wide.first.query.weight.cast<float>());
}

TEST_F(state, names_come_from_the_walk_and_a_shared_table_comes_once) {
  save_model(file(), model<float>(1));
  const safetensors_file in(file());
  EXPECT_EQ(in.names(), (std::vector<std::string>{"first.query.bias", "first.query.weight", "first.running_mean", "first.values", "second.query.bias",
                                                  "second.query.weight", "second.running_mean"}));
  EXPECT_EQ(in.info("first.values").shape, (std::vector<index_t>{1000, 700}));
}

TEST_F(state, a_row_is_a_vector_and_both_shapes_are_taken) {
  const model<float> saved(1);
  save_model(file(), saved);
  EXPECT_EQ(safetensors_file(file()).info("first.query.bias").shape, std::vector<index_t>{3});
  safetensors_writer out;
  std::vector<matrix<float>> keep;
  const safetensors_file in(file());
  out.metadata = in.metadata();
  keep.reserve(in.names().size());
  for (const auto& name : in.names()) {
    const auto& m = keep.emplace_back(in.read_matrix<float>(name));
    out.add<float>(name, {m.rows(), m.cols()}, std::span<const float>(m.data(), static_cast<std::size_t>(m.size())));
  }
  out.write(folder / "two");
  ASSERT_EQ(safetensors_file(folder / "two").info("first.query.bias").shape, (std::vector<index_t>{1, 3}));
  model<float> loaded(50);
  load_model(folder / "two", loaded);
  EXPECT_EQ(numbers_of(loaded), numbers_of(saved));
}

TEST_F(state, packed_copies_follow_a_load) {
  const model<float> saved(1);
  save_model(file(), saved);
  model<float> loaded(50);
  prepack(loaded);
  load_model(file(), loaded);
  matrix<float> x = matrix<float>::Ones(2, 4), expected(2, 3), found(2, 3);
  saved.first.query.forward(x, expected, {});
  loaded.first.query.forward(x, found, {});
  EXPECT_TRUE(found.isApprox(expected, 1e-6F)) << "4 products of numbers below 1, summed in another order";
}

TEST_F(state, a_checkpoint_that_does_not_fit_changes_nothing) {
  model<float> m(50);
  expect_refused(folder / "none", m, {"cannot be opened"});
  save_model(file(), model<float>(1, 5));
  expect_refused(file(), m, {"'first.query.weight'", "expected shape [3 x 4]", "found [5, 4]"});
  save_model(file(), model<float>(1, 3, true, 999));
  expect_refused(file(), m, {"'first.values'", "expected shape [1000 x 700]", "found [999, 700]"});
  save_model(file(), model<float>(1, 3, false));
  expect_refused(file(), m, {"'first.query.bias'", "expected shape [1 x 3]", "found no tensor"});

  const model<float> saved(1);
  save_model(file(), saved);
  rewrite(file(), [](auto& tensors, auto&) { tensors.erase("second.running_mean"); });  // the last one to be looked for
  expect_refused(file(), m, {"'second.running_mean'", "expected shape [1 x 4]", "found no tensor"});
  save_model(file(), saved);
  rewrite(file(), [](auto& tensors, auto&) { tensors["third.weight"].setZero(2, 2); });
  expect_refused(file(), m, {"'third.weight'", "expected no tensor", "found shape [2, 2]"});
  load_model(file(), m, false);
  EXPECT_EQ(numbers_of(m), numbers_of(saved));
}

/// A number that is no slot, one number too high and a number that comes twice, in the last row of the permutation.
template <class L, class Order>
void expect_only_permutations_load(const fs::path& path, L m, const L& other, Order&& order, const std::string& name) {
  const auto kept = order(other);
  save_model(path, m);
  L loaded = other;
  load_model(path, loaded);
  EXPECT_EQ(order(loaded), order(m));
  const auto last = kept.rows() - 1;  // of a head, with product keys
  const auto good = order(m)(last, 5);
  for (const auto bad : {static_cast<decltype(good)>(-1), static_cast<decltype(good)>(kept.cols()), order(m)(last, 2)}) {
    order(m)(last, 5) = bad;
    save_model(path, m);
    loaded = other;
    try {
      load_model(path, loaded);
      ADD_FAILURE() << name << ": " << bad;
    } catch (const io_error& e) {
      EXPECT_TRUE(std::string(e.what()).starts_with(path.string() + ": tensor '" + name + "': not a permutation: ")) << e.what();
    }
    EXPECT_EQ(numbers_of(loaded), numbers_of(other));
  }
}

TEST_F(state, a_permutation_that_is_none_changes_nothing) {
  const product_key_memory_config keys{.inputs = 6, .heads = 2, .sub_keys = 4, .key_width = 4, .top_k = 2, .shuffle_slots = true};
  expect_only_permutations_load(
      file(), product_key_memory<float>(keys, {1}), product_key_memory<float>(keys, {2}), [](auto& m) -> auto& { return m.permutation; }, "permutation");
  const ultra_mem_config ultra{.features = 6, .sub_keys = 4, .key_width = 4, .top_k = 2, .value_width = 4};
  expect_only_permutations_load(
      file(), ultra_mem<float>(ultra, {1}), ultra_mem<float>(ultra, {2}), [](auto& m) -> auto& { return m.expansion.permutation; },
      "expansion.permutation");
}

TEST_F(state, an_unknown_format_is_refused) {
  model<float> m(50);
  const model<float> saved(1);
  save_model(file(), saved);
  rewrite(file(), [](auto&, auto& metadata) { metadata["lithe.format"] = "2"; });
  expect_refused(file(), m, {"lithe.format", "expected", "'1'", "found '2'"});
  EXPECT_THROW(load_model(file(), m, false), io_error);
  EXPECT_THROW((void)read_model_metadata(file()), io_error);
  rewrite(file(), [](auto&, auto& metadata) { metadata.clear(); });
  expect_refused(file(), m, {"lithe.format", "found none"});
  load_model(file(), m, false);  // another program's file with our names
  EXPECT_EQ(numbers_of(m), numbers_of(saved));
}

TEST_F(state, tensors_of_another_kind_are_refused) {
  safetensors_writer out;
  const std::vector<std::int64_t> i{1, 2};
  const std::vector<float> f{1, 2};
  out.metadata["lithe.format"] = "1";
  out.add<std::int64_t>("training.i", {2}, i);
  out.add<float>("training.f", {2}, f);
  out.add<float>("training.cube", {1, 1, 2}, f);
  out.write(file());
  state_reader in(file());
  matrix<float> row(1, 2);
  Eigen::Matrix<std::int64_t, 1, Eigen::Dynamic, Eigen::RowMajor> integers(2);
  EXPECT_THROW(in.add_training("i", row), io_error);
  EXPECT_THROW(in.add_training("f", integers), io_error);
  EXPECT_THROW(in.add_training("cube", row), io_error) << "three dimensions are not a matrix";
}

// ---- training ----

/// Stands for an optimiser: moments for each tensor, counters, nested state.
struct momentum {
  struct schedule {
    double rate = 0.1;
    std::uint8_t warm = 1;
    template <class F>
    void visit_state(F&& f) {
      f("rate", rate);
      f("warm", warm);
    }
  };
  std::map<std::string, matrix<float>> moments;
  std::int64_t step = 0;
  schedule plan;

  explicit momentum(const model<float>& m) {
    for_each_tensor(
        [&](const std::string& name, role kind, const auto& t) {
          if (kind == role::parameter) moments[name].setZero(t.rows(), t.cols());
        },
        m);
  }
  template <class F>
  void visit_state(F&& f) {
    for (auto& [name, m] : moments) f("first_moment." + name, m);
    f("step", step);
    f("plan", plan);
  }
  void train(model<float>& m) {
    ++step;
    plan.rate *= 0.99;
    plan.warm = static_cast<std::uint8_t>(step < 3);
    for_each_tensor(
        [&](const std::string& name, role kind, auto& t) {
          if (kind != role::parameter) return;
          matrix<float>& moment = moments.at(name);
          matrix<float> noise(t.rows(), t.cols());
          fill_normal<float>(noise, 1, rng_key{99}.child(static_cast<std::uint64_t>(step)));
          moment = 0.9F * moment + noise;
          if constexpr (requires { t.rows_of; })
            *t.rows_of -= static_cast<float>(plan.rate) * moment;
          else
            t -= static_cast<float>(plan.rate) * moment;
        },
        m);
  }
};

void save_run(const fs::path& path, const model<float>& m, momentum& optimizer, std::uint64_t position) {
  state_writer out;
  out.metadata["config"] = "{}";
  out.add_model(m);
  out.add_training("optimizer", optimizer);
  out.add_training("position", position);
  out.write(path);
}

TEST_F(state, resumed_training_gives_the_same_bits) {
  model<float> whole(1);
  momentum whole_optimizer(whole);
  for (int i = 0; i < 6; ++i) whole_optimizer.train(whole);

  {
    model<float> m(1);
    momentum optimizer(m);
    for (int i = 0; i < 3; ++i) optimizer.train(m);
    save_run(file(), m, optimizer, ~std::uint64_t{} - 5);
  }
  model<float> m(70);
  momentum optimizer(m);
  std::uint64_t position = 0;
  state_reader in(file());
  in.add_model(m);
  in.add_training("optimizer", optimizer);
  in.add_training("position", position);
  EXPECT_EQ(optimizer.step, 0) << "nothing is written before load";
  in.load();
  EXPECT_EQ(optimizer.step, 3);
  EXPECT_EQ(optimizer.plan.warm, 0);
  EXPECT_EQ(position, ~std::uint64_t{} - 5);
  for (int i = 0; i < 3; ++i) optimizer.train(m);
  EXPECT_EQ(numbers_of(m), numbers_of(whole));
  EXPECT_EQ(optimizer.moments, whole_optimizer.moments);
  EXPECT_EQ(optimizer.plan.rate, whole_optimizer.plan.rate);
}

struct memory {
  using scalar = float;
  struct record {};
  struct gradient {
    matrix<float> weight;
    shared_gradient<float> values;
  };
  matrix<float> weight = matrix<float>::Ones(3, 2);
  shared_table<dense_table<float>> values;
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("weight", s.weight...);
    f("values", s.values...);
  }
};
struct memories {
  using scalar = float;
  struct record {};
  struct gradient {
    memory::gradient first, second;
  };
  memory first, second;
  explicit memories(std::uint64_t seed) { first.values = second.values = shared_table(dense_table<float>(20, 5, rng_key{seed})); }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("first", s.first...);
    f("second", s.second...);
  }

  /// Steps first ... last - 1 with gradients that depend on the step alone.
  void train(optimiser<float>& o, std::uint64_t begin, std::uint64_t end) {
    auto g = make_gradient(*this);
    for (std::uint64_t step = begin; step < end; ++step) {
      set_zero(*this, g);
      fill_normal<float>(g.first.weight, 1, rng_key{step});
      fill_normal<float>(g.second.weight, 1, rng_key{step}.child(0));
      auto& rows = rows_of(g.first.values);
      rows.assign_rows({static_cast<slot_t>(step), 7});
      fill_normal<float>(rows.values(), 1, rng_key{step}.child(1));
      o.step(*this, g, 0.1);
    }
  }
};

TEST_F(state, the_optimisers_and_value_tables_of_the_library_resume_with_the_same_bits) {
  for (const update_rule sparse : {update_rule::lazy_adam, update_rule::rowwise_adagrad}) {
    const optimiser_config config{.sparse = sparse};
    memories whole(1);
    optimiser<float> whole_optimiser(config);
    whole.train(whole_optimiser, 0, 6);
    {
      memories m(1);
      optimiser<float> o(config);
      m.train(o, 0, 3);
      state_writer out;
      out.add_model(m);
      out.add_training("optimizer", o);
      out.write(file());
    }
    memories m(2);
    optimiser<float> o(config);
    o.prepare(m, make_gradient(m));
    state_reader in(file());
    in.add_model(m);
    in.add_training("optimizer", o);
    in.load();
    EXPECT_EQ(o.steps(), 3);
    m.train(o, 3, 6);
    EXPECT_EQ(m.first.weight, whole.first.weight);
    EXPECT_EQ(m.second.weight, whole.second.weight);
    EXPECT_EQ(m.first.values.table().view().map(), whole.first.values.table().view().map());
    EXPECT_FALSE(safetensors_file(file()).contains("second.values"));
  }
}

TEST_F(state, a_saved_run_is_a_saved_model) {
  model<float> m(1), loaded(50);
  momentum optimizer(m);
  optimizer.train(m);
  save_run(file(), m, optimizer, 1);
  load_model(file(), loaded);
  EXPECT_EQ(numbers_of(loaded), numbers_of(m));
}

TEST_F(state, a_run_that_does_not_fit_changes_nothing) {
  model<float> m(1), other(50);
  momentum optimizer(m), fresh(other);
  optimizer.train(m);
  save_run(file(), m, optimizer, 1);
  const auto before = numbers_of(other);
  std::uint64_t position = 0;
  {  // a part of the training state that nobody asks for
    state_reader in(file());
    in.add_model(other);
    in.add_training("position", position);
    try {
      in.load();
      ADD_FAILURE();
    } catch (const io_error& e) {
      EXPECT_NE(std::string(e.what()).find("'training.optimizer.first_moment.first.query.bias'"), std::string::npos) << e.what();
    }
  }
  {  // a part that is not there
    state_reader in(file());
    in.add_model(other);
    in.add_training("optimizer", fresh);
    EXPECT_THROW(in.add_training("epoch", position), io_error);
  }
  {  // a moment of another shape
    fresh.moments["second.query.weight"].setZero(1, 1);
    state_reader in(file());
    in.add_model(other);
    EXPECT_THROW(in.add_training("optimizer", fresh), io_error);
  }
  {  // a number that does not fit its counter
    save_run(file(), m, optimizer, 1000);
    std::uint8_t small = 7;
    state_reader in(file());
    EXPECT_THROW(in.add_training("position", small), io_error);
    EXPECT_EQ(small, 7);
    EXPECT_THROW(in.add_training("position", position), state_error) << "asked for twice";
  }
  EXPECT_EQ(numbers_of(other), before);
  EXPECT_EQ(fresh.step, 0);
  EXPECT_EQ(position, 0U);
}

TEST_F(state, a_file_cut_anywhere_changes_nothing) {
  save_model(file(), model<float>(1, 3, true, 2));
  std::string text;
  {
    std::ifstream in(file(), std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(in), {});
  }
  model<float> m(50, 3, true, 2);
  for (std::size_t n = 0; n < text.size(); n += n < 1000 ? 1 : 97) {
    fs::remove(file());  // some file systems flush a file that is emptied and written again
    std::ofstream(file(), std::ios::binary) << text.substr(0, n);
    expect_refused(file(), m, {});
  }
}

struct thief {
  using scalar = float;
  struct record {};
  struct gradient {};
  matrix<float> weight = matrix<float>::Zero(2, 2);
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("training.weight", s.weight...);
  }
};

TEST_F(state, a_model_may_not_use_the_names_of_training) {
  EXPECT_THROW(save_model(file(), thief{}), config_error);
  EXPECT_FALSE(fs::exists(file()));
}

// ---- numbers that are not finite ----

/// Saving throws io_error with all the pieces in its sentence, and the old file stays.
template <class F>
void expect_not_saved(const fs::path& path, F&& save, const std::vector<std::string>& pieces) {
  const auto old = safetensors_file(path).read<float>("first.query.weight");
  try {
    save();
    ADD_FAILURE() << "expected an io_error with " << testing::PrintToString(pieces);
  } catch (const io_error& e) {
    for (const auto& piece : pieces)
      EXPECT_NE(std::string(e.what()).find(piece), std::string::npos) << e.what() << "\n  lacks: " << piece;
  }
  EXPECT_EQ(safetensors_file(path).read<float>("first.query.weight"), old);
  EXPECT_EQ(std::distance(fs::directory_iterator(path.parent_path()), {}), 1);
}

TEST_F(state, weights_that_are_not_finite_are_refused_unless_asked_for) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  model<float> m(1);
  save_model(file(), m);
  m.first.query.weight *= 2;
  m.second.query.weight(1, 2) = nan;
  m.second.query.weight(2, 0) = -infinity;
  expect_not_saved(file(), [&] { save_model(file(), m); },
                   {file().string(), "'second.query.weight'", "got 2 of 12 that are NaN or infinite"});
  save_model(file(), m, {}, false);
  model<float> loaded(50);
  load_model(file(), loaded);
  EXPECT_TRUE(std::isnan(loaded.second.query.weight(1, 2)));
  EXPECT_EQ(loaded.second.query.weight(2, 0), -infinity);
  EXPECT_EQ(loaded.first.query.weight, m.first.query.weight);

  m = model<float>(1);
  (*m.first.values.rows_of)(999, 699) = infinity;
  expect_not_saved(file(), [&] { save_model(file(), m); }, {"'first.values'", "got 1 of 700000"});
  m = model<float>(1);
  m.first.running_mean(0, 3) = nan;
  expect_not_saved(file(), [&] { save_model(file(), m); }, {"'first.running_mean'", "got 1 of 4"});
}

TEST_F(state, moments_that_are_not_finite_are_refused_and_numbers_by_themselves_are_not) {
  model<float> m(1);
  momentum optimizer(m);
  save_run(file(), m, optimizer, 0);
  optimizer.moments.at("first.query.bias")(0, 1) = std::numeric_limits<float>::quiet_NaN();
  expect_not_saved(file(), [&] { save_run(file(), m, optimizer, 0); },
                   {"'training.optimizer.first_moment.first.query.bias'", "got 1 of 3"});
  state_writer out;
  const double best_loss = std::numeric_limits<double>::infinity();
  out.add_model(m);
  out.add_training("best_loss", best_loss);
  out.write(file());
  EXPECT_EQ(safetensors_file(file()).read<double>("training.best_loss").at(0), best_loss);
}

}  // namespace state_tests
