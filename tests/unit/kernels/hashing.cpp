#include "lithe/kernels/hashing.hpp"

#include <gtest/gtest.h>

#include <numeric>

#include "lithe/core/parallel_executor.hpp"
#include "lithe/kernels/bucket_sort.hpp"
#include "lithe/kernels/key_norm.hpp"
#include "lithe/layers/initialise.hpp"

namespace hashing_tests {

using namespace lithe;

template <class S>
matrix<S> normal_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  matrix<S> m(rows, cols);
  fill_normal<S>(m, 1.0, rng_key{seed});
  return m;
}

template <class S>
matrix<bucket_t> rotations(const matrix<S>& q, const matrix<S>& directions, const bucket_factors& f, index_t rounds, const context& ctx = {}) {
  matrix<bucket_t> ids(rounds, q.rows());
  hash_rotations<S>(q, directions, f, ids, ctx);
  return ids;
}

// The definition, one number at a time.
template <class S>
index_t plain_argmax(const std::vector<S>& values) {
  index_t best = -1;
  for (index_t j = 0; j < static_cast<index_t>(values.size()); ++j) {
    const S v = values[static_cast<std::size_t>(j)];
    if (!std::isnan(v) && (best < 0 || v > values[static_cast<std::size_t>(best)])) best = j;
  }
  return std::max<index_t>(0, best);
}
template <class S>
index_t plain_bucket(const matrix<S>& q, index_t t, const matrix<S>& directions, index_t first, std::vector<index_t> factors) {
  index_t id = 0, step = 1;
  for (const index_t f : factors) {
    std::vector<S> p;
    for (index_t j = 0; j < f / 2; ++j) p.push_back(q.row(t).dot(directions.row(first + j)));
    for (index_t j = 0; j < f / 2; ++j) p.push_back(-p[static_cast<std::size_t>(j)]);
    id += step * plain_argmax(p);
    step *= f;
    first += f / 2;
  }
  return id;
}

// Small whole numbers: products are exact, so ties are ties and both sides must choose the lowest.
template <class S>
void compare_rotations(index_t T, index_t D, std::vector<index_t> factors, index_t rounds) {
  SCOPED_TRACE(concat(T, " tokens ", D, " wide ", factors.size(), " factors"));
  const bucket_factors f{std::span<const index_t>(factors)};
  matrix<S> q = (2 * normal_matrix<S>(T, D, 1)).array().round(), directions = normal_matrix<S>(rounds * f.directions(), D, 2).array().round();
  const auto ids = rotations<S>(q, directions, f, rounds);
  for (index_t r = 0; r < rounds; ++r)
    for (index_t t = 0; t < T; ++t) ASSERT_EQ(ids(r, t), plain_bucket<S>(q, t, directions, r * f.directions(), factors)) << r << " " << t;
}

TEST(hashing, rotations_equal_the_definition_with_ties) {
  for (const index_t T : {0, 1, 15, 16, 17, 129, 300}) {
    compare_rotations<float>(T, 8, {6}, 2);
    compare_rotations<double>(T, 5, {4, 2, 6}, 3);
  }
  compare_rotations<float>(70, 64, {512}, 1);
  compare_rotations<double>(70, 3, {2}, 4);
  compare_rotations<float>(200, 16, {64, 128}, 2);
}

TEST(hashing, a_list_of_one_factor_is_the_integer_rule_and_factors_count_up) {
  EXPECT_EQ(bucket_factors({16, 32}).total(), 512);
  EXPECT_EQ(bucket_factors({16, 32}).directions(), 24);
  EXPECT_GT(bucket_factors({65534, 65534, 65534, 65534, 65534}).total(), max_buckets);
  const matrix<double> q = normal_matrix<double>(400, 6, 3), a = normal_matrix<double>(2, 6, 4), b = normal_matrix<double>(3, 6, 5);
  matrix<double> both(5, 6);
  both << a, b;
  const auto ia = rotations<double>(q, a, {4}, 1), ib = rotations<double>(q, b, {6}, 1), iab = rotations<double>(q, both, {4, 6}, 1);
  for (index_t t = 0; t < 400; ++t) EXPECT_EQ(iab(0, t), ia(0, t) + 4 * ib(0, t));
}

TEST(hashing, nan_never_wins_and_nothing_but_nan_is_bucket_0) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  matrix<float> q(6, 2), directions = matrix<float>::Identity(2, 2);  // buckets: +x, +y, -x, -y
  q << 0, 0, nan, nan, inf, 1, -inf, 2, 3, -3, 0, -1;
  const auto ids = rotations<float>(q, directions, {4}, 1);
  const std::array<int, 6> expected{0, 0, 0, 2, 0, 3};  // inf * 0 is NaN in the other direction
  for (index_t t = 0; t < 6; ++t) EXPECT_EQ(ids(0, t), expected[static_cast<std::size_t>(t)]) << t;
}

TEST(hashing, scaling_keeps_ids_and_negation_moves_them_by_half) {
  const matrix<double> q = normal_matrix<double>(300, 7, 6), a = normal_matrix<double>(10, 7, 7);
  const auto ids = rotations<double>(q, a, {20}, 1), scaled = rotations<double>(matrix<double>(4 * q), a, {20}, 1),
             turned = rotations<double>(matrix<double>(-q), a, {20}, 1);
  EXPECT_EQ(ids, scaled);
  for (index_t t = 0; t < 300; ++t) EXPECT_EQ(turned(0, t), (ids(0, t) + 10) % 20);
}

TEST(hashing, signs_and_their_gray_codes) {
  const matrix<double> q = normal_matrix<double>(500, 6, 8), planes = normal_matrix<double>(2 * 5, 6, 9);
  const auto hash = [&](gray_code g) {
    matrix<bucket_t> ids(2, q.rows());
    hash_signs<double>(q, planes, g, ids, {});
    return ids;
  };
  const auto none = hash(gray_code::none), inverse = hash(gray_code::inverse), forward = hash(gray_code::forward);
  for (index_t r = 0; r < 2; ++r)
    for (index_t t = 0; t < q.rows(); ++t) {
      unsigned code = 0;
      for (index_t k = 0; k < 5; ++k) code |= (q.row(t).dot(planes.row(r * 5 + k)) > 0 ? 1U : 0U) << k;
      EXPECT_EQ(none(r, t), code);
      EXPECT_EQ(forward(r, t), code ^ (code >> 1));
      EXPECT_EQ(static_cast<unsigned>(inverse(r, t)) ^ (static_cast<unsigned>(inverse(r, t)) >> 1), code);
    }
}

// Collision rates 1 - θ/π for one plane and for two buckets, its power for several planes; 5 standard deviations of 40,000 draws are 0.0125.
TEST(hashing, collision_rates) {
  constexpr index_t draws = 40000;
  for (const double theta : {0.3, 1.0, 2.2})
    for (const index_t D : {2, 17}) {
      matrix<double> q = matrix<double>::Zero(2, D);
      q(0, 0) = 1;
      q(1, 0) = std::cos(theta);
      q(1, 1) = std::sin(theta);
      const matrix<double> a = normal_matrix<double>(3 * draws, D, 10);
      const auto rate = [&](const matrix<bucket_t>& ids) {
        index_t n = 0;
        for (index_t r = 0; r < ids.rows(); ++r) n += ids(r, 0) == ids(r, 1);
        return static_cast<double>(n) / static_cast<double>(ids.rows());
      };
      const double one = 1 - theta / std::numbers::pi;
      EXPECT_NEAR(rate(rotations<double>(q, a.topRows(draws), {2}, draws)), one, 0.0125);
      matrix<bucket_t> ids(draws, 2);
      hash_signs<double>(q, a, gray_code::inverse, ids, {});
      EXPECT_NEAR(rate(ids), one * one * one, 0.0125);
    }
}

TEST(hashing, same_ids_for_any_workers_and_strides) {
  const matrix<float> wide = normal_matrix<float>(777, 24, 11), q = wide.middleCols(3, 16), a = normal_matrix<float>(4 * 24, 16, 12);
  const auto expected = rotations<float>(q, a, {16, 32}, 4);
  for (const index_t workers : {2, 7}) {
    const parallel_executor exec(workers, workers);
    context ctx;
    ctx.exec = &exec;
    matrix<bucket_t> ids(4, q.rows());
    hash_rotations<float>(view(wide).slice_cols(3, 16), a, {16, 32}, ids, ctx);
    EXPECT_EQ(ids, expected);
  }
}

TEST(hashing, padding_gets_the_bucket_behind_all_others) {
  matrix<bucket_t> ids = matrix<bucket_t>::Constant(2, 4, 1);
  const std::vector<std::uint8_t> mask{1, 0, 1, 0};
  hash_padding(mask, 8, ids);
  for (index_t r = 0; r < 2; ++r)
    for (index_t t = 0; t < 4; ++t) EXPECT_EQ(ids(r, t), t % 2 == 0 ? 1 : 8);
  hash_padding({}, 9, ids);
  EXPECT_EQ(ids(0, 1), 8);
}

TEST(hashing, automatic_numbers_of_buckets) {
  using enum bucket_rule;
  EXPECT_EQ(automatic_buckets(power_of_two, 64, 8, 4096), (bucket_factors{16}));
  EXPECT_EQ(automatic_buckets(power_of_two, 1, 64), (bucket_factors{2}));
  EXPECT_EQ(automatic_buckets(power_of_two, 100, 8), (bucket_factors{16}));              // 2 * 12 = 24, down to 16
  EXPECT_EQ(automatic_buckets(power_of_two, 4096, 64, 4096), (bucket_factors{128}));     // the limit itself
  EXPECT_EQ(automatic_buckets(power_of_two, 16384, 64, 16384), (bucket_factors{16, 32}));
  EXPECT_EQ(automatic_buckets(power_of_two, 1 << 20, 64), (bucket_factors{128, 256}));
  EXPECT_EQ(automatic_buckets(power_of_two, 1 << 14, 1), (bucket_factors{1 << 7, 1 << 8}));
  EXPECT_EQ(automatic_buckets(power_of_two, 1 << 21, 64), (bucket_factors{128, 256}));  // 2^16 would need longer ids
  EXPECT_EQ(automatic_buckets(power_of_two, 1 << 20, 32), (bucket_factors{128, 256}));
  for (const bucket_rule rule : {power_of_two, trax, two_per_chunk, one_per_chunk})
    EXPECT_LE(automatic_buckets(rule, index_t{1} << 40, 16).total(), max_buckets);
  EXPECT_EQ(automatic_buckets(trax, 16, 64), (bucket_factors{2}));
  EXPECT_EQ(automatic_buckets(trax, 64 * 64, 64), (bucket_factors{128}));
  EXPECT_EQ(automatic_buckets(trax, 96 * 64, 64), (bucket_factors{16, 12}));
  EXPECT_EQ(automatic_buckets(two_per_chunk, 640, 64), (bucket_factors{20}));
  EXPECT_EQ(automatic_buckets(one_per_chunk, 640, 64), (bucket_factors{10}));
  EXPECT_EQ(automatic_buckets(one_per_chunk, 704, 64), (bucket_factors{12}));
}

TEST(hashing, too_many_factors_are_an_error) {
  const std::vector<index_t> many(17, 2);
  EXPECT_THROW(bucket_factors{std::span<const index_t>(many)}, config_error);
}

TEST(hashing, products_of_any_factors_are_defined) {
  constexpr index_t least = std::numeric_limits<index_t>::min(), most = std::numeric_limits<index_t>::max();
  EXPECT_EQ((bucket_factors{16, 32}.total()), 512);
  EXPECT_GT((bucket_factors{most, most, most}.total()), max_buckets);
  for (const bucket_factors& f : {bucket_factors{least, 4}, bucket_factors{4, least}, bucket_factors{-2, -2}, bucket_factors{most, 0}}) EXPECT_EQ(f.total(), 0);
}

TEST(bucket_sort, equals_a_stable_sort) {
  for (const index_t n : {0, 1, 5, 1000})
    for (const index_t buckets : {1, 7, 65536}) {
      std::vector<bucket_t> ids(static_cast<std::size_t>(n));
      for (std::size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<bucket_t>(static_cast<double>(buckets) * uniform(rng_key{3}, t));
      std::vector<index_t> starts(static_cast<std::size_t>(buckets) + 1, -1);
      std::vector<position_t> order(ids.size(), -1), expected(ids.size());
      bucket_sort(ids, starts, order);
      std::iota(expected.begin(), expected.end(), 0);
      std::stable_sort(expected.begin(), expected.end(), [&](position_t a, position_t b) { return ids[static_cast<std::size_t>(a)] < ids[static_cast<std::size_t>(b)]; });
      EXPECT_EQ(order, expected);
      EXPECT_EQ(starts.front(), 0);
      EXPECT_EQ(starts.back(), n);
      for (index_t b = 0; b < buckets; ++b)
        for (index_t i = starts[static_cast<std::size_t>(b)]; i < starts[static_cast<std::size_t>(b) + 1]; ++i)
          ASSERT_EQ(ids[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])], b);
    }
}

TEST(bucket_sort, an_id_out_of_range_is_an_error) {
  const std::vector<bucket_t> ids{0, 3, 1};
  std::vector<index_t> starts(4);
  std::vector<position_t> order(3);
  EXPECT_THROW(bucket_sort(ids, starts, order), index_error);
}

TEST(key_norm, scales_are_the_definition) {
  const matrix<double> q = normal_matrix<double>(5, 8, 13);
  std::vector<double> rms(5), unit(5);
  key_scales<double>(key_norm::rms, q, rms.data());
  key_scales<double>(key_norm::unit, q, unit.data());
  for (index_t t = 0; t < 5; ++t) {
    EXPECT_NEAR(rms[static_cast<std::size_t>(t)], 1 / std::sqrt(q.row(t).squaredNorm() / 8 + 1e-6) / std::sqrt(8.0), 1e-15);
    EXPECT_NEAR(unit[static_cast<std::size_t>(t)], 1 / q.row(t).norm() / std::sqrt(8.0), 1e-15);
  }
}

// Central differences of Σ w ∘ k(q) with step 1e-6: truncation 1e-12 and rounding 1e-10 relative to gradients of order 1.
TEST(key_norm, backward_equals_differences) {
  for (const key_norm norm : {key_norm::rms, key_norm::unit}) {
    matrix<double> q = normal_matrix<double>(4, 6, 14), dq = matrix<double>::Constant(4, 6, 0.5);
    const matrix<double> w = normal_matrix<double>(4, 6, 15);
    const auto loss = [&] {
      std::vector<double> s(4);
      key_scales<double>(norm, q, s.data());
      return (w.cwiseProduct(Eigen::Map<Eigen::VectorXd>(s.data(), 4).asDiagonal() * q)).sum();
    };
    std::vector<double> s(4);
    key_scales<double>(norm, q, s.data());
    const matrix<double> h = Eigen::Map<Eigen::VectorXd>(s.data(), 4).asDiagonal() * w;
    add_key_gradient<double>(norm, q, s.data(), h, dq);  // added to what is there
    for (index_t i = 0; i < 4; ++i) {
      EXPECT_NEAR((dq.row(i).array() - 0.5).matrix().dot(q.row(i)), 0, norm == key_norm::unit ? 1e-14 : 1e-5);  // only the epsilon leaves something along q
      for (index_t j = 0; j < 6; ++j) {
        const double was = q(i, j), step = 1e-6;
        q(i, j) = was + step;
        const double up = loss();
        q(i, j) = was - step;
        const double down = loss();
        q(i, j) = was;
        EXPECT_NEAR(dq(i, j) - 0.5, (up - down) / (2 * step), 1e-8);
      }
    }
  }
}

TEST(key_norm, a_zero_query_has_finite_scales_and_gradients) {
  for (const key_norm norm : {key_norm::rms, key_norm::unit}) {
    const matrix<float> q = matrix<float>::Zero(1, 4), h = matrix<float>::Ones(1, 4);
    matrix<float> dq = matrix<float>::Zero(1, 4);
    float s = 0;
    key_scales<float>(norm, q, &s);
    EXPECT_TRUE(std::isfinite(s));
    EXPECT_NEAR(s, norm == key_norm::rms ? 500 : 5e11, 1e-6 * s);  // 1000 / √4, 1e12 / √4
    add_key_gradient<float>(norm, q, &s, h, dq);
    EXPECT_EQ(dq, h);
  }
}

}  // namespace hashing_tests
