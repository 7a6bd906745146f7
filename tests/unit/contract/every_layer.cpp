// What every layer and container owes its callers, whatever it computes: the list of layers is in layers.hpp.
#include <gtest/gtest.h>

#include "layers.hpp"

namespace every_layer_tests {

/// f(layer) for each, in double and in float.
template <class F>
void each(F&& f) {
  const auto run = [&]<class S>(S) {
    for (const auto& l : every_layer<S>()) {
      SCOPED_TRACE(concat(l->name, sizeof(S) == 8 ? ", double" : ", float"));
      f(*l);
    }
  };
  run(double{});
  run(float{});
}

/// A call of T tokens: its matrices, filled but for what the layer writes, which holds a sentinel.
template <class S>
struct call {
  static constexpr S sentinel = S(-77);
  const subject<S>& l;
  matrix<S> x, y, dy, dx;
  boxed record, g;

  call(const subject<S>& l_, index_t T, std::uint64_t seed = 5)
      : l(l_), x(random<S>(l.is.in * T, l.features, seed)), record(l.make_record()), g(l.make_gradient()) {
    const shape out = l.output_shape(x);
    y = matrix<S>::Constant(out.rows, out.cols, sentinel);
    dy = random<S>(out.rows, out.cols, seed + 1);
    dx = matrix<S>::Constant(x.rows(), x.cols(), sentinel);
  }
  void forward(const context& ctx = {}) { l.forward(x, y, ctx); }
  void record_forward(const context& ctx = {}) { l.forward(x, y, *record, ctx); }
  void backward(const context& ctx = {}) { l.backward(x, *record, dy, dx, *g, ctx); }
  void all(const context& ctx = {}) {
    record_forward(ctx);
    backward(ctx);
  }
  [[nodiscard]] bool wrote() const { return y.size() + dx.size() != 0 && ((y.array() != sentinel).any() || (dx.array() != sentinel).any()); }
  [[nodiscard]] bool added() const {
    for (const matrix<S>& t : l.tensors(*g))
      if ((t.array() != S(0)).any()) return true;
    return false;
  }
};

template <class S>
void expect_equal(const matrix<S>& a, const matrix<S>& b, const char* what) {
  EXPECT_TRUE(a.rows() == b.rows() && a.cols() == b.cols() && a == b) << what << " differ by " << (a.size() == b.size() ? difference(a, b) : -1);
}
/// Sums in another order: some units in the last place of the largest number.
template <class S>
void expect_near(const matrix<S>& a, const matrix<S>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  const double size = a.size() == 0 ? 0 : static_cast<double>(b.cwiseAbs().maxCoeff());
  EXPECT_LE(difference(a, b), 200 * static_cast<double>(std::numeric_limits<S>::epsilon()) * std::max(size, 0.1)) << what;
}
template <class S>
void expect_equal_gradients(const call<S>& a, const call<S>& b) {
  const auto one = a.l.tensors(*a.g), other = b.l.tensors(*b.g);
  for (std::size_t i = 0; i < one.size(); ++i) expect_equal(one[i], other[i], "gradients");
}
/// The rows that belong to tokens first .. first + n - 1 of T.
template <class S>
matrix<S> rows_of_tokens(const matrix<S>& m, index_t T, index_t first, index_t n) {
  matrix<S> part(T == 0 ? 0 : m.rows() / T * n, m.cols());
  for (index_t i = 0; T != 0 && i < m.rows() / T; ++i) part.middleRows(i * n, n) = m.middleRows(i * T + first, n);
  return part;
}
template <class S>
void set_token(matrix<S>& m, index_t T, index_t token, S value) {
  for (index_t i = token; i < m.rows(); i += T) m.row(i).setConstant(value);
}

/// f throws an Error whose sentence begins with the layer that speaks and holds every part.
template <class Error, class F>
void expect_refused(F&& f, std::initializer_list<const char*> parts) {
  try {
    f();
    ADD_FAILURE() << "not refused: " << *parts.begin();
  } catch (const Error& e) {
    const std::string sentence = e.what();
    EXPECT_NE(sentence.find(": "), std::string::npos) << sentence;
    for (const char* part : parts) EXPECT_NE(sentence.find(part), std::string::npos) << sentence << " has no '" << part << "'";
  } catch (const std::exception& e) {
    ADD_FAILURE() << "an error of another type: " << e.what();
  }
}

TEST(every_layer, takes_no_tokens) {
  each([]<class S>(const subject<S>& l) {
    call<S> c(l, 0);
    EXPECT_NO_THROW(c.forward());
    EXPECT_NO_THROW(c.all());
    EXPECT_FALSE(c.added());
    const std::vector<index_t> none{0, 0, 0};
    EXPECT_NO_THROW(c.all({.rows = {none}}));
  });
}

TEST(every_layer, takes_one_token) {
  each([]<class S>(const subject<S>& l) {
    call<S> c(l, 1);
    c.all();
    EXPECT_TRUE(c.y.allFinite() && (l.is.tokens || c.dx.allFinite()));
    EXPECT_TRUE((c.y.array() != call<S>::sentinel).any());
  });
}

TEST(every_layer, gives_empty_sequences_no_part) {
  each([]<class S>(const subject<S>& l) {
    const std::vector<index_t> with{0, 0, 4, 4, 4, 11, 11}, without{0, 4, 11};
    call<S> a(l, 11), b(l, 11);
    a.all({.rows = {with}});
    b.all({.rows = {without}});
    expect_near(a.y, b.y, "outputs");
    expect_near(a.dx, b.dx, "input gradients");
  });
}

TEST(every_layer, hides_everything) {
  each([]<class S>(const subject<S>& l) {
    const std::vector<std::uint8_t> mask(6, 0);
    call<S> c(l, 6);
    EXPECT_NO_THROW(c.forward({.mask = mask}));
    EXPECT_NO_THROW(c.all({.mask = mask}));
    EXPECT_TRUE(c.y.allFinite());
    EXPECT_TRUE(c.dx.allFinite());
    for (const auto& t : l.tensors(*c.g)) EXPECT_TRUE(t.allFinite());
  });
}

TEST(every_layer, lets_nothing_out_of_hidden_rows) {
  each([]<class S>(const subject<S>& l) {
    const index_t T = 11;
    const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0};
    for (const bool of_gradients : {false, true})
      for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(), -std::numeric_limits<S>::infinity()}) {
        call<S> clean(l, T), c(l, T);
        for (index_t t = 0; t < T; ++t)
          if (mask[static_cast<std::size_t>(t)] == 0) {
            set_token(clean.x, T, t, S(0));
            set_token(c.x, T, t, of_gradients ? S(0) : bad);
            set_token(clean.dy, T, t, S(0));
            set_token(c.dy, T, t, of_gradients ? bad : S(0));
          }
        const context ctx{.mask = mask};
        clean.all(ctx);
        c.all(ctx);
        for (index_t t = 0; t < T; ++t)
          if (mask[static_cast<std::size_t>(t)] != 0) {
            expect_equal(rows_of_tokens(c.y, T, t, 1), rows_of_tokens(clean.y, T, t, 1), "visible outputs");
            expect_equal(rows_of_tokens(c.dx, T, t, 1), rows_of_tokens(clean.dx, T, t, 1), "visible input gradients");
          }
        expect_equal_gradients(c, clean);
        c.forward(ctx);
        clean.forward(ctx);
        for (index_t t = 0; t < T; ++t)
          if (mask[static_cast<std::size_t>(t)] != 0)
            expect_equal(rows_of_tokens(c.y, T, t, 1), rows_of_tokens(clean.y, T, t, 1), "visible outputs without a record");
      }
  });
}

TEST(every_layer, lets_nothing_of_later_rows_reach_earlier_ones_if_causal) {
  each([]<class S>(const subject<S>& l) {
    if (!l.is.causal || l.is.tokens) return;
    for (const index_t T : {3, 14}) {
      call<S> clean(l, T), c(l, T);
      const index_t first = T - 2;
      for (index_t t = first; t < T; ++t) set_token(c.x, T, t, t % 2 == 0 ? std::numeric_limits<S>::quiet_NaN() : std::numeric_limits<S>::infinity());
      for (const bool record : {false, true}) {
        record ? clean.record_forward() : clean.forward();
        record ? c.record_forward() : c.forward();
        if (l.is.moves)
          EXPECT_TRUE(rows_of_tokens(c.y, T, 0, first).allFinite());
        else
          expect_near(rows_of_tokens(c.y, T, 0, first), rows_of_tokens(clean.y, T, 0, first), "earlier outputs");
      }
    }
  });
}

TEST(every_layer, works_in_place_of_wider_matrices) {
  each([]<class S>(const subject<S>& l) {
    const index_t T = 9;
    call<S> c(l, T);
    c.all();
    const auto wide = [](const matrix<S>& m) {
      matrix<S> w = matrix<S>::Constant(m.rows(), m.cols() + 5, call<S>::sentinel);
      w.middleCols(2, m.cols()) = m;
      return w;
    };
    const auto inner = [](auto& w) { return view(w).slice_cols(2, w.cols() - 5); };
    const auto untouched = [](const matrix<S>& w) {
      return (w.leftCols(2).array() == call<S>::sentinel).all() && (w.rightCols(3).array() == call<S>::sentinel).all();
    };
    matrix<S> x = wide(c.x), y = wide(matrix<S>::Zero(c.y.rows(), c.y.cols())), plain = y, dy = wide(c.dy), dx = wide(matrix<S>::Zero(c.x.rows(), c.x.cols()));
    const boxed record = l.make_record(), g = l.make_gradient();
    l.forward(inner(x), inner(plain), {});
    l.forward(inner(x), inner(y), *record, {});
    l.backward(inner(x), *record, inner(dy), inner(dx), *g, {});
    expect_near<S>(y.middleCols(2, c.y.cols()), c.y, "outputs");
    expect_near<S>(plain.middleCols(2, c.y.cols()), c.y, "outputs without a record");
    if (!l.is.tokens) expect_near<S>(dx.middleCols(2, c.dx.cols()), c.dx, "input gradients");
    EXPECT_TRUE(untouched(y) && untouched(plain) && untouched(dx));
    const auto one = l.tensors(*g), other = l.tensors(*c.g);
    for (std::size_t i = 0; i < one.size(); ++i) expect_near(one[i], other[i], "gradients");
  });
}

/// forward, forward with a record and backward refuse a context, and write nothing.
template <class Error, class S>
void expect_context_refused(const subject<S>& l, index_t T, const context& ctx, std::initializer_list<const char*> parts) {
  call<S> c(l, T);
  expect_refused<Error>([&] { c.forward(ctx); }, parts);
  expect_refused<Error>([&] { c.record_forward(ctx); }, parts);
  EXPECT_FALSE(c.wrote());
  c.record_forward();
  c.y.setConstant(call<S>::sentinel);
  expect_refused<Error>([&] { c.backward(ctx); }, parts);
  EXPECT_FALSE(c.wrote() || c.added());
}

TEST(every_layer, refuses_a_mask_of_other_rows) {
  each([]<class S>(const subject<S>& l) {
    const std::vector<std::uint8_t> mask(3, 1);
    expect_context_refused<shape_error>(l, 8, {.mask = mask}, {"expected a mask of", "8 rows", "got 3"});
  });
}

TEST(every_layer, refuses_segments_that_are_none) {
  each([]<class S>(const subject<S>& l) {
    for (const std::vector<index_t>& offsets : {std::vector<index_t>{0, 40}, {0, 5, 3, 8}, {1, 8}, {0, 4}, {-2, 8}, {8}})
      expect_context_refused<shape_error>(l, 8, {.rows = {offsets}}, {"segments must rise from 0 to the 8 rows"});
  });
}

TEST(every_layer, refuses_matrices_of_other_shapes) {
  each([]<class S>(const subject<S>& l) {
    call<S> c(l, 6);
    const boxed record = l.make_record();
    matrix<S> low(c.y.rows() + 1, c.y.cols()), wide(c.y.rows(), c.y.cols() + 1);
    for (matrix<S>* y : {&low, &wide}) {
      expect_refused<shape_error>([&] { l.forward(c.x, *y, {}); }, {"expected ", " of shape "});
      expect_refused<shape_error>([&] { l.forward(c.x, *y, *record, {}); }, {"expected ", " of shape "});
    }
    c.record_forward();
    for (matrix<S>* dy : {&low, &wide}) expect_refused<shape_error>([&] { l.backward(c.x, *c.record, *dy, c.dx, *c.g, {}); }, {"expected ", " of shape "});
    if (!l.is.tokens) {
      matrix<S> none, unsized(c.x.rows(), c.x.cols() + 1), more(c.x.rows() + 2, c.x.cols());
      for (matrix<S>* dx : {&none, &unsized, &more})
        expect_refused<shape_error>([&] { l.backward(c.x, *c.record, c.dy, *dx, *c.g, {}); }, {"expected dx of shape"});
      const matrix<S> x = random<S>(c.x.rows(), c.x.cols() + 2, 1);
      EXPECT_THROW(l.forward(x, c.y, {}), std::invalid_argument);
      expect_refused<shape_error>([&] { l.forward(matrix_view<const S>(nullptr, c.x.rows(), c.x.cols()), c.y, {}); }, {"got no data"});
      expect_refused<shape_error>([&] { l.backward(c.x, *c.record, c.dy, {nullptr, c.x.rows(), c.x.cols()}, *c.g, {}); }, {"got no data"});
    }
    expect_refused<shape_error>([&] { l.forward(c.x, {nullptr, c.y.rows(), c.y.cols()}, {}); }, {"got no data"});
    EXPECT_FALSE(c.added());
  });
}

TEST(every_layer, refuses_a_record_of_another_call) {
  each([]<class S>(const subject<S>& l) {
    call<S> c(l, 6), other(l, 5);
    c.record_forward();
    if (!l.records(*c.record)) return;
    other.record_forward();
    const boxed unfilled = l.make_record();
    for (const box* r : {other.record.get(), unfilled.get()}) {
      expect_refused<state_error>([&] { l.backward(c.x, *r, c.dy, c.dx, *c.g, {}); }, {"the record is of another call"});
      EXPECT_FALSE(c.added() || (c.dx.array() != call<S>::sentinel).any());
    }
  });
}

TEST(every_layer, refuses_a_gradient_that_was_never_made) {
  each([]<class S>(const subject<S>& l) {
    if (!l.trains()) return;
    call<S> c(l, 6);
    c.record_forward();
    const boxed unmade = l.unmade_gradient();
    expect_refused<state_error>([&] { l.backward(c.x, *c.record, c.dy, c.dx, *unmade, {}); }, {"expected a gradient", "make_gradient"});
    EXPECT_TRUE((c.dx.array() == call<S>::sentinel).all());
  });
}

TEST(every_layer, keeps_a_record_over_calls_of_other_shapes) {
  each([]<class S>(const subject<S>& l) {
    call<S> fresh(l, 5), again(l, 5), large(l, 12);
    large.record = std::move(again.record);
    large.record_forward({.key = {3}, .train = true});
    again.record = std::move(large.record);
    const context ctx{.key = {4}, .train = true};
    fresh.all(ctx);
    again.all(ctx);
    expect_equal(again.y, fresh.y, "outputs");
    expect_equal(again.dx, fresh.dx, "input gradients");
    expect_equal_gradients(again, fresh);
  });
}

TEST(every_layer, gives_the_same_with_and_without_a_record) {
  each([]<class S>(const subject<S>& l) {
    const std::vector<index_t> offsets{0, 4, 13};
    for (const bool train : {false, true}) {
      const context ctx{.key = {9}, .rows = {offsets}, .train = train};
      call<S> a(l, 13), b(l, 13);
      a.forward(ctx);
      b.record_forward(ctx);
      expect_near(a.y, b.y, train ? "outputs in training" : "outputs");
    }
  });
}

TEST(every_layer, gives_a_sequence_the_same_alone_and_in_a_batch) {
  each([]<class S>(const subject<S>& l) {
    const std::vector<index_t> offsets{0, 3, 10, 11};
    call<S> batch(l, 11), alone(l, 7);
    alone.x = rows_of_tokens(batch.x, 11, 3, 7);
    batch.forward({.rows = {offsets}});
    alone.forward();
    expect_near(alone.y, rows_of_tokens(batch.y, 11, 3, 7), "outputs");
  });
}

// Central differences along a direction with h = 1e-5: good to 1e-9 of functions of size 1 with derivatives of size 10 and more.
TEST(every_layer, gives_the_derivative_along_any_direction_of_x) {
  const std::vector<index_t> offsets{0, 4, 11};
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1};
  for (const auto& l : every_layer<double>()) {
    if (l->is.tokens) continue;
    SCOPED_TRACE(l->name);
    for (const bool train : {false, true})
      for (const bool masked : {false, true}) {
        context ctx{.key = {9}, .rows = {offsets}, .auxiliary = 0, .train = train};
        if (masked) ctx.mask = mask;
        call<double> c(*l, 11);
        for (index_t t = 0; masked && t < 11; ++t)
          if (!ctx.valid(t)) set_token(c.dy, 11, t, 0.0);  // what hidden rows give counts for nobody
        c.all(ctx);
        const matrix<double> x = c.x, direction = random(x.rows(), x.cols(), 31);
        const auto along = [&](double h) {
          c.x = x + h * direction;
          c.forward(ctx);
          return (c.y.array() * c.dy.array()).sum();
        };
        // Directions of hashing are drawn anew in each training call, from the same key: both calls choose alike.
        const double measured = (along(1e-5) - along(-1e-5)) / 2e-5, given = (c.dx.array() * direction.array()).sum();
        EXPECT_NEAR(given, measured, 1e-6 * std::max(1.0, std::abs(measured))) << (train ? "in training " : "") << (masked ? "masked" : "");
      }
  }
}

// Errors of single layers do not grow beyond what 32 of them in a row may have: 32 times some tens of units in the last place. Rows in which rounding
// changed a selection are far off, and few.
TEST(every_layer, is_as_exact_in_float_as_numbers_allow_over_32_layers) {
  const auto doubles = every_layer<double>();
  const auto floats = every_layer<float>();
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    const auto& l = *doubles[i];
    if (l.is.tokens || l.is.in != l.is.out) continue;
    SCOPED_TRACE(l.name);
    matrix<double> x = random(l.is.in * 24, l.features, 3), y;
    if (l.output_shape(x) != shape{x.rows(), x.cols()}) continue;
    matrix<float> narrow = x.cast<float>(), out;
    x = narrow.cast<double>();
    y.resize(x.rows(), x.cols());
    out.resize(x.rows(), x.cols());
    for (int n = 0; n < 32; ++n) {
      l.forward(x, y, {});
      floats[i]->forward(narrow, out, {});
      x += 0.1 * y;
      narrow += 0.1F * out;
    }
    std::vector<double> errors;
    for (index_t t = 0; t < x.rows(); ++t) errors.push_back((x.row(t) - narrow.row(t).cast<double>()).norm() / x.row(t).norm());
    std::sort(errors.begin(), errors.end());
    EXPECT_LT(l.is.selects ? errors[errors.size() / 2] : errors.back(), 1e-4);
    EXPECT_GT(errors.back(), 0);
  }
}

// Chunks have 4 tokens, so do windows; the rows are decoded one by one, some at once, and behind a filled cache.
TEST(every_layer, decodes_what_the_full_pass_gives) {
  each([]<class S>(const subject<S>& l) {
    if (!l.has_cache() || !l.is.decodes_exactly) return;
    for (const index_t T : {1, 3, 4, 5, 9}) {
      call<S> full(l, T);
      full.forward();
      for (const index_t at_once : {index_t{1}, index_t{3}, T})
        for (const index_t filled : {index_t{0}, T / 2}) {
          const boxed cache = l.make_cache(2, T);
          const std::vector<index_t> slot{1};
          const context ctx{.slots = slot};
          if (filled > 0) l.fill(view(full.x).slice_rows(0, filled), *cache, ctx);
          matrix<S> y(T - filled, full.y.cols());
          for (index_t t = filled; t < T; t += at_once) {
            const index_t n = std::min(at_once, T - t);
            l.decode(view(full.x).slice_rows(t, n), view(y).slice_rows(t - filled, n), *cache, ctx);
          }
          expect_near<S>(y, full.y.bottomRows(T - filled), "decoded rows");
        }
    }
  });
}

TEST(every_layer, refuses_slots_that_are_not_there_and_leaves_the_cache_as_it_was) {
  each([]<class S>(const subject<S>& l) {
    if (!l.has_cache() || !(l.is.decodes_exactly || l.is.moves)) return;  // where nothing is kept, no slot is looked at
    call<S> c(l, 4), fresh(l, 4);
    const boxed cache = l.make_cache(2, 4), untouched = l.make_cache(2, 4);
    const std::vector<index_t> offsets{0, 2, 4}, outside{0, 2}, below{-1, 0}, twice{1, 1}, few{1};
    const auto refused = [&]<class Error>(Error*, const context& ctx, std::initializer_list<const char*> parts) {
      expect_refused<Error>([&] { l.decode(c.x, c.y, *cache, ctx); }, parts);
      expect_refused<Error>([&] { l.fill(c.x, *cache, ctx); }, parts);
    };
    refused(static_cast<index_error*>(nullptr), {.rows = {offsets}, .slots = outside}, {"expected a slot below 2, got 2"});
    refused(static_cast<index_error*>(nullptr), {.rows = {offsets}, .slots = below}, {"expected a slot below 2, got -1"});
    refused(static_cast<state_error*>(nullptr), {.rows = {offsets}, .slots = twice}, {"slot 1 comes twice"});
    refused(static_cast<shape_error*>(nullptr), {.rows = {offsets}, .slots = few}, {"expected a slot for each of 2 sequences, got 1"});
    matrix<S> wide(c.y.rows(), c.y.cols() + 1);
    expect_refused<shape_error>([&] { l.decode(c.x, wide, *cache, {}); }, {"expected ", " of shape "});
    l.decode(c.x, c.y, *cache, {});
    l.decode(fresh.x, fresh.y, *untouched, {});
    expect_equal(c.y, fresh.y, "what is decoded after refusals");
    expect_refused<state_error>([&] { l.decode(c.x, c.y, *cache, {}); }, {"4 of 4 tokens"});
  });
}

}  // namespace every_layer_tests
