#include "lithe/training/tensor_decomposition.hpp"

#include <gtest/gtest.h>

#include "lithe/core/parallel_executor.hpp"

namespace tensor_decomposition_tests {

using namespace lithe;

matrix<double> random(index_t rows, index_t cols, std::uint64_t seed, double bound = 1) {
  matrix<double> m(rows, cols);
  fill_uniform<double>(m, bound, rng_key{seed});
  return m;
}
/// The spec's deterministic numbers.
matrix<double> fill(index_t a, index_t rows, index_t cols) {
  matrix<double> m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) m.data()[k] = static_cast<double>((3 * k * k + 5 * k + a) % 13 - 6) / 10;
  return m;
}
/// The tensor itself, one [D x E] matrix a head.
std::vector<matrix<double>> tensor(const matrix<double>& wq, const matrix<double>& wk, index_t heads) {
  const index_t d = wq.rows() / heads;
  std::vector<matrix<double>> t;
  for (index_t h = 0; h < heads; ++h) t.emplace_back(wq.middleRows(h * d, d).transpose() * wk.middleRows(h * d, d));
  return t;
}
double reconstruction_error(const matrix<double>& wq, const matrix<double>& wk, const key_query_factors& f) {
  double error = 0, all = 0;
  const auto t = tensor(wq, wk, f.mixing.rows());
  for (index_t h = 0; h < f.mixing.rows(); ++h) {
    const matrix<double>& m = t[static_cast<std::size_t>(h)];
    error += (m - f.query.transpose() * f.mixing.row(h).asDiagonal() * f.key).squaredNorm();
    all += m.squaredNorm();
  }
  return std::sqrt(error / all);
}

TEST(tensor_decomposition, agrees_with_sweeps_by_hand_from_the_svd_start) {
  const matrix<double> wq = fill(1, 4, 4), wk = fill(2, 4, 4);
  const auto d = decompose(wq, wk, 2, {.rank = 3, .max_sweeps = 20, .tolerance = 0, .ridge = 0});
  ASSERT_EQ(d.errors.size(), 21U);
  EXPECT_NEAR(d.errors[0], 0.0628893505, 1e-10);
  EXPECT_NEAR(d.errors[1], 0.0558343392, 1e-10);
  EXPECT_NEAR(d.errors[2], 0.0534177053, 1e-10);
  EXPECT_NEAR(d.errors[10], 0.0478528635, 1e-10);
  EXPECT_NEAR(d.errors[20], 0.0424713309, 1e-10);
  EXPECT_NEAR(reconstruction_error(wq, wk, d.factors), d.error(), 1e-12);
}

TEST(tensor_decomposition, agrees_with_sweeps_by_hand_from_given_factors) {
  const matrix<double> wq = fill(1, 4, 4), wk = fill(2, 4, 4);
  const key_query_factors given{(1 + fill(3, 4, 3).array()).matrix().transpose(), (1 + fill(5, 4, 3).array()).matrix().transpose(),
                                (1 + fill(4, 2, 3).array()).matrix()};
  const auto d = decompose(wq, wk, 2, {.rank = 3, .max_sweeps = 20, .tolerance = 0, .ridge = 0}, {}, &given);
  EXPECT_NEAR(d.errors[0], 8.3995972323, 1e-9);
  EXPECT_NEAR(d.errors[1], 0.5095003863, 1e-10);
  EXPECT_NEAR(d.errors[2], 0.3095879086, 1e-10);
  EXPECT_NEAR(d.errors[10], 0.2025344401, 1e-10);
  EXPECT_NEAR(d.errors[20], 0.0747107690916, 1e-10);  // in 40 digits; the start is nearly collinear, so errors of solves grow
}

// Khatri-Rao products and the unfolded tensor, written out.
TEST(tensor_decomposition, structured_updates_equal_dense_ones) {
  const index_t H = 3, D = 5, E = 4, r = 3;
  const matrix<double> wq = random(6, D, 1), wk = random(6, E, 2);
  const auto t = tensor(wq, wk, H);
  key_query_factors f{random(r, D, 3), random(r, E, 4), random(H, r, 5)};
  const auto d = decompose(wq, wk, H, {.rank = r, .max_sweeps = 1, .ridge = 0, .balance = false}, {}, &f);
  const auto at = [&](index_t q, index_t h, index_t k) { return t[static_cast<std::size_t>(h)](q, k); };
  const auto solve = [](const matrix<double>& rows, const matrix<double>& g) -> matrix<double> {
    return Eigen::MatrixXd(g).ldlt().solve(Eigen::MatrixXd(rows));  // rows [r x n]
  };
  matrix<double> rows = matrix<double>::Zero(r, D);
  for (index_t j = 0; j < r; ++j)
    for (index_t q = 0; q < D; ++q)
      for (index_t h = 0; h < H; ++h)
        for (index_t k = 0; k < E; ++k) rows(j, q) += at(q, h, k) * f.mixing(h, j) * f.key(j, k);
  f.query = solve(rows, (f.mixing.transpose() * f.mixing).cwiseProduct(f.key * f.key.transpose()));
  rows = matrix<double>::Zero(r, H);
  for (index_t j = 0; j < r; ++j)
    for (index_t q = 0; q < D; ++q)
      for (index_t h = 0; h < H; ++h)
        for (index_t k = 0; k < E; ++k) rows(j, h) += at(q, h, k) * f.query(j, q) * f.key(j, k);
  f.mixing = solve(rows, (f.query * f.query.transpose()).cwiseProduct(f.key * f.key.transpose())).transpose();
  rows = matrix<double>::Zero(r, E);
  for (index_t j = 0; j < r; ++j)
    for (index_t q = 0; q < D; ++q)
      for (index_t h = 0; h < H; ++h)
        for (index_t k = 0; k < E; ++k) rows(j, k) += at(q, h, k) * f.query(j, q) * f.mixing(h, j);
  f.key = solve(rows, (f.query * f.query.transpose()).cwiseProduct(f.mixing.transpose() * f.mixing));
  // Rounding of solves whose condition numbers are some thousands.
  EXPECT_LT((d.factors.query - f.query).cwiseAbs().maxCoeff(), 1e-10 * f.query.cwiseAbs().maxCoeff());
  EXPECT_LT((d.factors.mixing - f.mixing).cwiseAbs().maxCoeff(), 1e-10 * f.mixing.cwiseAbs().maxCoeff());
  EXPECT_LT((d.factors.key - f.key).cwiseAbs().maxCoeff(), 1e-10 * f.key.cwiseAbs().maxCoeff());
  EXPECT_NEAR(d.error(), reconstruction_error(wq, wk, f), 1e-12);
}

TEST(tensor_decomposition, the_svd_start_has_the_error_of_the_dropped_singular_values) {
  const index_t H = 4, d = 6, r = 10;
  const matrix<double> wq = random(H * d, 20, 1), wk = random(H * d, 15, 2);
  std::vector<double> sigma;
  for (const auto& head : tensor(wq, wk, H)) {
    const Eigen::JacobiSVD<Eigen::MatrixXd> svd{Eigen::MatrixXd(head)};
    for (index_t i = 0; i < d; ++i) sigma.push_back(svd.singularValues()[i] * svd.singularValues()[i]);
  }
  std::sort(sigma.rbegin(), sigma.rend());
  const double all = std::accumulate(sigma.begin(), sigma.end(), 0.0), dropped = std::accumulate(sigma.begin() + r, sigma.end(), 0.0);
  for (const auto method : {decomposition_method::alternating, decomposition_method::head_svd}) {
    const auto result = decompose(wq, wk, H, {.rank = r, .method = method, .max_sweeps = 30});
    EXPECT_NEAR(result.errors[0], std::sqrt(dropped / all), 1e-12);
    if (method == decomposition_method::head_svd) {
      EXPECT_EQ(result.errors.size(), 1U);
    } else {
      EXPECT_LT(result.error(), 0.95 * result.errors[0]);
      for (std::size_t i = 1; i < result.errors.size(); ++i) EXPECT_LE(result.errors[i], result.errors[i - 1] + 1e-7);
    }
  }
}

TEST(tensor_decomposition, full_width_is_exact_without_iterations) {
  const matrix<double> wq = random(8, 10, 1), wk = random(8, 9, 2);
  for (const index_t r : {8, 11}) {
    const auto copied = decompose(wq, wk, 2, {.rank = r});
    EXPECT_TRUE(copied.converged);
    EXPECT_EQ(copied.errors, std::vector<double>{0});
    EXPECT_EQ(copied.factors.query.topRows(8), wq);
    EXPECT_EQ(copied.factors.key.topRows(8), wk);
    EXPECT_LT(reconstruction_error(wq, wk, copied.factors), 1e-15);  // rounding of the test's own sums
    const auto iterated = decompose(wq, wk, 2, {.rank = r, .exact_copy = false});
    EXPECT_LE(iterated.error(), 1e-7);  // the formula cancels 1e-16 of the square
    EXPECT_LT(reconstruction_error(wq, wk, iterated.factors), 1e-7);
    EXPECT_EQ(iterated.regularised, r == 11);  // the data support 8
  }
}

TEST(tensor_decomposition, every_start_and_method_gives_what_it_says) {
  const index_t H = 6, d = 8, D = 48, r = 24;  // heads that share a subspace of 20 dimensions, and some noise
  const matrix<double> shared_q = random(20, D, 1), shared_k = random(20, D, 2);
  matrix<double> wq = random(H * d, 20, 3) * shared_q + random(H * d, D, 4, 0.1), wk = random(H * d, 20, 5) * shared_k + random(H * d, D, 6, 0.1);
  std::map<std::string, double> error;
  for (const auto& [name, start] :
       {std::pair{"svd", decomposition_start::svd_heads}, {"norm", decomposition_start::top_norm}, {"random", decomposition_start::random}})
    error[name] = decompose(wq, wk, H, {.rank = r, .start = start, .max_sweeps = 60, .tolerance = 0}).error();
  error["heads"] = decompose(wq, wk, H, {.rank = r, .method = decomposition_method::head_svd}).error();
  const auto product = decompose(wq, wk, H, {.rank = r, .method = decomposition_method::product_svd});
  error["product"] = product.error();
  EXPECT_NEAR(product.error(), reconstruction_error(wq, wk, product.factors), 1e-12);
  for (const char* start : {"svd", "norm", "random"}) {
    EXPECT_LT(error[start], error["heads"]) << start;
    EXPECT_LT(error[start], error["product"]) << start;
  }
  EXPECT_LT(error["svd"], error["random"]);
}

TEST(tensor_decomposition, restarts_keep_the_best_and_seeds_decide) {
  const matrix<double> wq = random(12, 9, 1), wk = random(12, 9, 2);
  const decomposition_options one{.rank = 5, .start = decomposition_start::random, .max_sweeps = 15};
  auto many = one;
  many.restarts = 4;
  const auto d = decompose(wq, wk, 3, many);
  ASSERT_EQ(d.start_errors.size(), 5U);
  EXPECT_EQ(d.error(), *std::min_element(d.start_errors.begin(), d.start_errors.end()));
  EXPECT_EQ(decompose(wq, wk, 3, one).error(), d.start_errors[0]);
  EXPECT_EQ(decompose(wq, wk, 3, many).factors.mixing, d.factors.mixing);
  auto other = one;
  other.seed = rng_key{2};
  EXPECT_NE(decompose(wq, wk, 3, other).error(), d.start_errors[0]);
}

TEST(tensor_decomposition, random_tensors_of_rank_three_are_found) {
  std::vector<double> errors;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    // T[q, h, k] with query 6, heads 8, key 7 as weights: Wq_h = I, Wk_h = T[:, h, :].
    const auto uniform = [&](index_t rows, index_t cols, std::uint64_t i) -> matrix<double> {
      return (random(rows, cols, 100 * seed + i, 0.5).array() + 0.5).matrix();
    };
    const matrix<double> a = uniform(6, 3, 1), b = uniform(8, 3, 2), c = uniform(7, 3, 3);
    matrix<double> wq(48, 6), wk(48, 7);
    for (index_t h = 0; h < 8; ++h) {
      wq.middleRows(6 * h, 6).setIdentity();
      wk.middleRows(6 * h, 6) = a * b.row(h).asDiagonal() * c.transpose();
    }
    errors.push_back(
        decompose(wq, wk, 8, {.rank = 4, .start = decomposition_start::random, .max_sweeps = 70, .tolerance = 0, .seed = {seed}}).error());
  }
  std::sort(errors.begin(), errors.end());
  EXPECT_LT(errors[5], 0.01);
}

TEST(tensor_decomposition, stops_at_the_tolerance_or_the_target) {
  const matrix<double> wq = random(12, 9, 1), wk = random(12, 9, 2);
  const auto full = decompose(wq, wk, 3, {.rank = 6, .max_sweeps = 30, .tolerance = 0});
  EXPECT_EQ(full.errors.size(), 31U);
  EXPECT_FALSE(full.converged);
  const auto loose = decompose(wq, wk, 3, {.rank = 6, .max_sweeps = 30, .tolerance = 1});
  EXPECT_EQ(loose.errors.size(), 3U);  // the first test comes after sweep 2
  EXPECT_TRUE(loose.converged);
  const auto target = decompose(wq, wk, 3, {.rank = 6, .max_sweeps = 30, .tolerance = 0, .target_error = full.errors[4]});
  EXPECT_EQ(target.errors.size(), 5U);
  EXPECT_TRUE(target.converged);
  std::vector<double> seen;
  decomposition_options o{.rank = 6, .max_sweeps = 30, .tolerance = 0};
  o.progress = [&](index_t, index_t sweep, double error) {
    EXPECT_EQ(sweep, static_cast<index_t>(seen.size()));
    seen.push_back(error);
  };
  EXPECT_EQ(decompose(wq, wk, 3, o).errors, seen);
}

TEST(tensor_decomposition, balancing_and_rescaling_change_no_product) {
  const matrix<double> wq = random(12, 9, 1), wk = random(12, 9, 2);
  const auto plain = decompose(wq, wk, 3, {.rank = 5, .max_sweeps = 20, .balance = false});
  const auto balanced = decompose(wq, wk, 3, {.rank = 5, .max_sweeps = 20});
  EXPECT_GT((plain.factors.query - balanced.factors.query).norm(), 1e-3);
  for (index_t h = 0; h < 3; ++h) {
    const auto product = [&](const key_query_factors& f) -> matrix<double> { return f.query.transpose() * f.mixing.row(h).asDiagonal() * f.key; };
    EXPECT_LT((product(plain.factors) - product(balanced.factors)).cwiseAbs().maxCoeff(), 1e-12);
  }
  for (index_t j = 0; j < 5; ++j) {
    EXPECT_NEAR(balanced.factors.mixing.col(j).norm(), 1, 1e-12);
    EXPECT_NEAR(balanced.factors.query.row(j).norm(), balanced.factors.key.row(j).norm(), 1e-12);
  }
}

TEST(tensor_decomposition, same_bits_for_any_number_of_workers) {
  const matrix<double> wq = random(96, 130, 1), wk = random(96, 130, 2);
  decomposition first;
  for (const index_t workers : {1, 2, 7}) {
    const parallel_executor exec(workers, workers);
    workspace work(exec);
    auto d = decompose(wq, wk, 4, {.rank = 40, .max_sweeps = 3}, {.exec = &exec, .work = &work});
    if (workers == 1) first = d;
    EXPECT_EQ(d.errors, first.errors);
    EXPECT_EQ(d.factors.query, first.factors.query);
    EXPECT_EQ(d.factors.key, first.factors.key);
  }
}

TEST(tensor_decomposition, bad_input_is_refused_or_regularised_and_reported) {
  const matrix<double> wq = random(12, 9, 1), wk = random(12, 9, 2);
  const auto with = [&](decomposition_options o) { return decompose(wq, wk, 3, o); };
  EXPECT_THROW(with({.rank = 0}), config_error);
  EXPECT_THROW(with({.rank = 3, .max_sweeps = 0}), config_error);
  EXPECT_THROW(with({.rank = 3, .tolerance = -1}), config_error);
  EXPECT_THROW(with({.rank = 3, .ridge = -1}), config_error);
  EXPECT_THROW(static_cast<void>(decompose(wq, wk, 5, {.rank = 3})), config_error);
  EXPECT_THROW(static_cast<void>(decompose(wq, random(11, 9, 2), 1, {.rank = 3})), shape_error);
  const key_query_factors wrong{random(3, 9, 1), random(3, 9, 2), random(2, 3, 3)};
  EXPECT_THROW(static_cast<void>(decompose(wq, wk, 3, {.rank = 3}, {}, &wrong)), shape_error);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    matrix<double> spoiled = wk;
    spoiled(3, 4) = bad;
    EXPECT_THROW(static_cast<void>(decompose(wq, spoiled, 3, {.rank = 3})), config_error);
  }
  // Weights of rank 2 and a rank of 6: singular Gram matrices.
  const matrix<double> thin_q = random(12, 2, 1) * random(2, 9, 2), thin_k = random(12, 2, 3) * random(2, 9, 4);
  EXPECT_THROW(static_cast<void>(decompose(thin_q, thin_k, 3, {.rank = 9, .ridge = 0, .exact_copy = false})), std::runtime_error);
  const auto d = decompose(thin_q, thin_k, 3, {.rank = 9, .exact_copy = false});
  EXPECT_TRUE(d.regularised);
  EXPECT_LT(d.error(), 1e-6);
  EXPECT_TRUE(d.factors.query.allFinite() && d.factors.key.allFinite() && d.factors.mixing.allFinite());
  EXPECT_FALSE(decompose(wq, wk, 3, {.rank = 3}).regularised);
  const auto zero = decompose(matrix<double>::Zero(12, 9).eval(), wk, 3, {.rank = 3});
  EXPECT_EQ(zero.error(), 0);
  EXPECT_EQ(zero.factors.query.norm() + zero.factors.key.norm() + zero.factors.mixing.norm(), 0);
}

}  // namespace tensor_decomposition_tests
