#pragma once

#include <Eigen/QR>
#include <Eigen/SVD>
#include <concepts>
#include <functional>
#include <numeric>

#include "lithe/kernels/gemm.hpp"
#include "lithe/layers/initialise.hpp"
#include "lithe/training/accumulate.hpp"

// H heads of width d, D query inputs, E key inputs, r rank
namespace lithe::inline LITHE_ABI {

/// Factors of a key-query tensor: T[q, h, k] ≈ Σ_j query(j, q) mixing(h, j) key(j, k); query [r x D], key [r x E], mixing [H x r].
struct key_query_factors {
  matrix<double> query, key, mixing;
};

enum class decomposition_method {
  alternating,  ///< least squares for one factor after the other
  head_svd,     ///< each head's product by its own largest singular values: the start `svd_heads`, left as it is
  product_svd,  ///< query and key from the truncated SVD of the sum of all heads' products, then the mixing by least squares
};
enum class decomposition_start {
  svd_heads,  ///< the r largest singular values of all heads' products, one-hot mixing
  top_norm,   ///< the r rows of largest |Wq(d)| |Wk(d)|, one-hot mixing
  random,     ///< numbers uniform in [0, 1), as tensorly's parafac
};

struct decomposition_options {
  index_t rank = 0;
  decomposition_method method = decomposition_method::alternating;
  decomposition_start start = decomposition_start::svd_heads;
  index_t max_sweeps = 100;
  double tolerance = 1e-6;  ///< stops when a sweep changes the error by less
  double target_error = 0;  ///< or when the error is no larger
  double ridge = 1e-12;     ///< times the mean diagonal of each Gram matrix, added to its diagonal
  bool exact_copy = true;   ///< at rank >= H d copy the weights, which is exact, instead of iterating
  bool balance = true;      ///< mixing columns to unit norm, columns of query and key to equal norms
  index_t restarts = 0;     ///< further random starts; the best of all is kept
  rng_key seed{1};          ///< of random starts
  std::function<void(index_t start, index_t sweep, double error)> progress{};
};

/// What a decomposition found, and how it got there.
struct decomposition {
  key_query_factors factors;
  std::vector<double> errors;        ///< ‖T - T̂‖ / ‖T‖ of the start and after each sweep, before balancing
  std::vector<double> start_errors;  ///< the last error of each start
  bool converged = false;            ///< a stop test was met, or there was nothing to iterate
  bool regularised = false;          ///< a Gram matrix was singular to rounding in some start (the rank is more than the weights need): the ridge decided

  [[nodiscard]] double error() const { return errors.back(); }  ///< ‖T - T̂‖ / ‖T‖ at the end, before balancing
};

namespace detail {

using doubles = matrix<double>;
using const_doubles = matrix_view<const double>;

/// e with all numbers below 2^e, if they are so small or large that sums of products of four of them leave the range of
/// double; else 0. Powers of two change no digit.
inline int far_exponent(const_doubles m) {
  int e = 0;
  if (m.size() != 0) std::frexp(m.map().cwiseAbs().maxCoeff(), &e);
  return std::abs(e) > 100 ? e : 0;
}
/// 2^e m
inline doubles times_power_of_two(const_doubles m, int e) {
  return m.map().unaryExpr([e](double v) { return std::ldexp(v, e); });
}

/// Thin singular value decomposition of aᵀ b for a [n x D], b [n x E], through the R factors of both: u [D x k], v [E x k].
struct product_svd_result {
  Eigen::VectorXd sigma;
  Eigen::MatrixXd u, v;
};
// Templates, all for double, so that whoever includes the umbrella and decomposes nothing compiles no SVD.
template <std::same_as<double> S = double>
product_svd_result svd_of_product(const_doubles a, const_doubles b, bool vectors) {
  const int far = far_exponent(a), away = far_exponent(b);
  const Eigen::MatrixXd at = times_power_of_two(a, -far).transpose(), bt = times_power_of_two(b, -away).transpose();
  const Eigen::HouseholderQR<Eigen::MatrixXd> qa(at), qb(bt);
  const index_t p = std::min(at.rows(), at.cols()), q = std::min(bt.rows(), bt.cols());
  const Eigen::MatrixXd ra = qa.matrixQR().topRows(p).triangularView<Eigen::Upper>(), rb = qb.matrixQR().topRows(q).triangularView<Eigen::Upper>();
  const Eigen::BDCSVD<Eigen::MatrixXd> svd(ra * rb.transpose(), vectors ? Eigen::ComputeThinU | Eigen::ComputeThinV : 0);
  product_svd_result out{
      svd.singularValues().unaryExpr([e = far + away](double s) { return std::ldexp(s, e); }), {}, {}};
  if (vectors) {
    const index_t k = out.sigma.size();
    out.u = Eigen::MatrixXd::Zero(at.rows(), k);
    out.v = Eigen::MatrixXd::Zero(bt.rows(), k);
    out.u.topRows(p) = svd.matrixU();
    out.v.topRows(q) = svd.matrixV();
    out.u.applyOnTheLeft(qa.householderQ());
    out.v.applyOnTheLeft(qb.householderQ());
  }
  return out;
}

/// One decomposition at work: the weights, the factors, and their products with the weights.
template <std::same_as<double> S = double>
class key_query_solver {
 public:
  key_query_solver(const_doubles wq, const_doubles wk, index_t heads, const decomposition_options& o, const context& ctx)
      : wq_(wq), wk_(wk), H_(heads), d_(wq.rows() / heads), r_(o.rank), o_(o), ctx_(ctx) {
    for (index_t h = 0; h < H_; ++h) {
      doubles gq(d_, d_), gk(d_, d_);
      gemm_nt<double>(head(wq_, h), head(wq_, h), gq, ctx_);
      gemm_nt<double>(head(wk_, h), head(wk_, h), gk, ctx_);
      norm2_ += (gq.array() * gk.array()).sum();
    }
  }
  [[nodiscard]] double norm2() const { return norm2_; }

  [[nodiscard]] key_query_factors svd_heads() const {
    struct candidate {
      double sigma;
      index_t head, place;
    };
    std::vector<product_svd_result> all;
    std::vector<candidate> order;
    for (index_t h = 0; h < H_; ++h) {
      all.push_back(svd_of_product<S>(head(wq_, h), head(wk_, h), true));
      for (index_t i = 0; i < all.back().sigma.size(); ++i) order.push_back({all.back().sigma[i], h, i});
    }
    std::stable_sort(order.begin(), order.end(), [](const candidate& a, const candidate& b) { return a.sigma > b.sigma; });
    key_query_factors f = zeros();
    for (index_t j = 0; j < std::min(r_, static_cast<index_t>(order.size())); ++j) {
      const candidate& c = order[static_cast<std::size_t>(j)];
      const auto& s = all[static_cast<std::size_t>(c.head)];
      f.query.row(j) = std::sqrt(c.sigma) * s.u.col(c.place).transpose();
      f.key.row(j) = std::sqrt(c.sigma) * s.v.col(c.place).transpose();
      f.mixing(c.head, j) = 1;
    }
    return f;
  }
  [[nodiscard]] key_query_factors top_norm() const {
    std::vector<index_t> order(static_cast<std::size_t>(wq_.rows()));
    std::iota(order.begin(), order.end(), index_t{0});
    const auto size = [&](index_t i) { return wq_.map().row(i).norm() * wk_.map().row(i).norm(); };
    std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return size(a) > size(b); });
    key_query_factors f = zeros();
    for (index_t j = 0; j < std::min(r_, wq_.rows()); ++j) {
      const index_t i = order[static_cast<std::size_t>(j)];
      f.query.row(j) = wq_.map().row(i);
      f.key.row(j) = wk_.map().row(i);
      f.mixing(i / d_, j) = 1;
    }
    return f;
  }
  [[nodiscard]] key_query_factors random(rng_key key) const {
    key_query_factors f = zeros();
    doubles* const all[3] = {&f.query, &f.mixing, &f.key};
    for (std::uint64_t i = 0; i < 3; ++i) {
      fill_uniform<double>(*all[i], 0.5, key.child(i));
      all[i]->array() += 0.5;
    }
    return f;
  }
  /// The weights themselves, and zero columns beyond them.
  [[nodiscard]] key_query_factors copy() const {
    key_query_factors f = zeros();
    f.query.topRows(wq_.rows()) = wq_.map();
    f.key.topRows(wk_.rows()) = wk_.map();
    for (index_t i = 0; i < wq_.rows(); ++i) f.mixing(i / d_, i) = 1;
    return f;
  }
  [[nodiscard]] key_query_factors product_svd() {
    const product_svd_result s = svd_of_product<S>(wq_, wk_, true);
    key_query_factors f = zeros();
    const index_t n = std::min(r_, static_cast<index_t>(s.sigma.size()));
    f.query.topRows(n) = s.sigma.head(n).cwiseSqrt().asDiagonal() * s.u.leftCols(n).transpose();
    f.key.topRows(n) = s.sigma.head(n).cwiseSqrt().asDiagonal() * s.v.leftCols(n).transpose();
    begin(f);
    fit_mixing(f);
    return f;
  }

  /// Computes what sweeps and `error` need beside the factors.
  void begin(const key_query_factors& f) {
    uq_.resize(wq_.rows(), r_);
    uk_.resize(wq_.rows(), r_);
    scaled_.resize(wq_.rows(), r_);
    gemm_nt<double>(wq_, f.query, uq_, ctx_);
    gemm_nt<double>(wk_, f.key, uk_, ctx_);
  }
  /// √(‖T‖² + ‖T̂‖² - 2 <T, T̂>) / ‖T‖ from inner products alone.
  [[nodiscard]] double error(const key_query_factors& f) {
    double inner = 0;
    for (index_t i = 0; i < uq_.rows(); ++i) inner += (uq_.row(i).array() * uk_.row(i).array() * f.mixing.row(i / d_).array()).sum();
    const double own = (gram(f.query, f.mixing).array() * rows_gram(f.key).array()).sum();
    return std::sqrt(std::max(0.0, norm2_ + own - 2 * inner) / norm2_);
  }
  /// Least squares for query, mixing and key, in this order.
  void sweep(key_query_factors& f) {
    scale_by_mixing(uk_, f);
    gemm_tn<double>(scaled_, wq_, f.query, ctx_);
    solve(gram(f.key, f.mixing), f.query);
    gemm_nt<double>(wq_, f.query, uq_, ctx_);
    fit_mixing(f);
    scale_by_mixing(uq_, f);
    gemm_tn<double>(scaled_, wk_, f.key, ctx_);
    solve(gram(f.query, f.mixing), f.key);
    gemm_nt<double>(wk_, f.key, uk_, ctx_);
  }
  [[nodiscard]] bool regularised() const { return regularised_; }

 private:
  [[nodiscard]] const_doubles head(const_doubles w, index_t h) const { return w.slice_rows(h * d_, d_); }
  [[nodiscard]] key_query_factors zeros() const { return {doubles::Zero(r_, wq_.cols()), doubles::Zero(r_, wk_.cols()), doubles::Zero(H_, r_)}; }

  [[nodiscard]] doubles rows_gram(const doubles& m) const {  // m mᵀ
    doubles g(r_, r_);
    gemm_nt<double>(m, m, g, ctx_);
    return g;
  }
  [[nodiscard]] doubles gram(const doubles& m, const doubles& mixing) const {  // (m mᵀ) ∘ (mixingᵀ mixing)
    doubles g(r_, r_);
    gemm_tn<double>(mixing, mixing, g, ctx_);
    return g.cwiseProduct(rows_gram(m));
  }
  void scale_by_mixing(const doubles& u, const key_query_factors& f) {
    ctx_.exec->run(u.rows(), 64, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) scaled_.row(i) = u.row(i).cwiseProduct(f.mixing.row(i / d_));
    });
  }
  void fit_mixing(key_query_factors& f) {
    doubles rows(r_, H_);
    for (index_t h = 0; h < H_; ++h)
      rows.col(h) = (uq_.middleRows(h * d_, d_).array() * uk_.middleRows(h * d_, d_).array()).colwise().sum().transpose();
    solve(rows_gram(f.query).cwiseProduct(rows_gram(f.key)), rows);
    f.mixing = rows.transpose();
  }
  /// x = (g + ridge)⁻¹ x.
  void solve(doubles g, doubles& x) {
    g.diagonal().array() += o_.ridge * g.trace() / static_cast<double>(r_);
    const Eigen::LDLT<Eigen::MatrixXd> factored(g);
    const auto pivots = factored.vectorD().array();
    const double least = pivots.minCoeff(), most = pivots.maxCoeff(), noise = 1e-15 * static_cast<double>(r_);
    require<std::runtime_error>(o_.ridge > 0 || least > noise * most, "decompose: a Gram matrix is singular (pivots from ", most, " down to ", least,
                                "): the rank ", r_, " is more than the weights support; give a ridge or a smaller rank");
    regularised_ = regularised_ || least <= std::max(noise, 10 * o_.ridge) * most;
    // The columns of the right-hand side are independent, so they are dealt out to the workers.
    ctx_.exec->run(x.cols(), 96, [&](index_t first, index_t last) {
      const Eigen::MatrixXd part = x.middleCols(first, last - first);
      x.middleCols(first, last - first) = factored.solve(part);
    });
  }

  const_doubles wq_, wk_;
  index_t H_, d_, r_;
  const decomposition_options& o_;
  const context& ctx_;
  double norm2_ = 0;
  doubles uq_, uk_, scaled_;  // Wq queryᵀ, Wk keyᵀ [H d x r], and one of them times the mixing
  bool regularised_ = false;
};

inline void balance(key_query_factors& f) {
  for (index_t j = 0; j < f.mixing.cols(); ++j) {
    const double m = f.mixing.col(j).norm(), q = f.query.row(j).norm() * m, k = f.key.row(j).norm();
    if (m == 0 || q == 0 || k == 0) {  // says nothing: a clean zero
      f.mixing.col(j).setZero();
      f.query.row(j).setZero();
      f.key.row(j).setZero();
      continue;
    }
    f.mixing.col(j) /= m;
    f.query.row(j) *= m * std::sqrt(k / q);
    f.key.row(j) *= std::sqrt(q / k);
  }
}

inline void check(const_doubles wq, const_doubles wk, index_t heads, const decomposition_options& o, bool given) {
  require<config_error>(heads >= 1 && wq.rows() % std::max<index_t>(1, heads) == 0, "decompose: expected weights whose rows the heads divide, got ",
                        wq.rows(), " rows and ", heads, " heads");
  require<shape_error>(wq.rows() == wk.rows() && wq.rows() >= 1, "decompose: expected query and key weights of as many rows, got ",
                       to_text(wq.rows(), wq.cols()), " and ", to_text(wk.rows(), wk.cols()));
  require<config_error>(o.rank >= 1, "decompose: expected a rank of at least 1, got ", o.rank);
  require<config_error>(o.tolerance >= 0 && o.target_error >= 0, "decompose: expected a tolerance and a target error of 0 or more, got ", o.tolerance,
                        " and ", o.target_error);
  require<config_error>(o.max_sweeps >= 1 && o.restarts >= 0, "decompose: expected at least 1 sweep and no negative restarts, got ", o.max_sweeps,
                        " and ", o.restarts);
  require<config_error>(
      o.method == decomposition_method::alternating || (o.restarts == 0 && !given),
      "decompose: expected neither restarts nor given factors for a method that does not iterate, got ", o.restarts,
      " restarts", given ? " and given factors" : "");
  require<config_error>(o.ridge >= 0 && std::isfinite(o.ridge), "decompose: expected a ridge of 0 or more, got ", o.ridge);
  require<config_error>(wq.map().allFinite() && wk.map().allFinite(), "decompose: the weights hold NaN or infinity");
}

}  // namespace detail

/// Decomposes the key-query tensor of separate heads, T[q, h, k] = Σ_d Wq_h(d, q) Wk_h(d, k), into r shared dimensions
/// (arXiv 2006.16362, section 4). T [D x H x E] is never formed: a sweep of alternating least squares costs four
/// products of the size of the projections. All numbers are in double, because the error formula cancels.
///
/// Wq [H d x D], Wk [H d x E], head h in rows h d .. , of any magnitude; `given` = factors to start from in place of
/// options.start, for the iterating method only. Throws config_error and shape_error for arguments that do not go
/// together and for weights with NaN or infinity, std::runtime_error for a singular Gram matrix under a ridge of 0.
/// Weights of zero give zero factors and error 0.
template <std::same_as<double> S = double>
[[nodiscard]] decomposition decompose(matrix_view<const double> wq, matrix_view<const double> wk, index_t heads, const decomposition_options& o,
                                      const context& ctx = {}, const key_query_factors* given = nullptr) {
  detail::check(wq, wk, heads, o, given != nullptr);
  if (given != nullptr) {
    require_shape<const double>("decompose", "given query factors", given->query, o.rank, wq.cols());
    require_shape<const double>("decompose", "given key factors", given->key, o.rank, wk.cols());
    require_shape<const double>("decompose", "given mixing factors", given->mixing, heads, o.rank);
  }
  if (const int q = detail::far_exponent(wq), k = detail::far_exponent(wk); q != 0 || k != 0) {
    key_query_factors start;
    if (given != nullptr)
      start = {detail::times_power_of_two(given->query, -q), detail::times_power_of_two(given->key, -k), given->mixing};
    decomposition d = decompose<S>(detail::times_power_of_two(wq, -q), detail::times_power_of_two(wk, -k), heads, o,
                                   ctx, given != nullptr ? &start : nullptr);
    const bool copied = o.exact_copy && o.rank >= wq.rows() && given == nullptr;
    const int to_query = copied || !o.balance ? q : (q + k) / 2;
    d.factors.query = detail::times_power_of_two(d.factors.query, to_query);
    d.factors.key = detail::times_power_of_two(d.factors.key, q + k - to_query);
    return d;
  }
  detail::key_query_solver<S> solver(wq, wk, heads, o, ctx);
  decomposition best;
  if (solver.norm2() == 0) {
    best.factors = {matrix<double>::Zero(o.rank, wq.cols()), matrix<double>::Zero(o.rank, wk.cols()), matrix<double>::Zero(heads, o.rank)};
    best.errors = best.start_errors = {0};
    best.converged = true;
    return best;
  }
  if (o.exact_copy && o.rank >= wq.rows() && given == nullptr) {
    best.factors = solver.copy();
    best.errors = best.start_errors = {0};
    best.converged = true;
    return best;
  }
  const bool iterate = o.method == decomposition_method::alternating;
  std::vector<double> start_errors;
  for (index_t s = 0; s <= (iterate ? o.restarts : 0); ++s) {
    decomposition d;
    if (o.method == decomposition_method::product_svd)
      d.factors = solver.product_svd();
    else if (s > 0 || (iterate && given == nullptr && o.start == decomposition_start::random))
      d.factors = solver.random(o.seed.child(static_cast<std::uint64_t>(s)));
    else if (iterate && given != nullptr)
      d.factors = *given;
    else
      d.factors = iterate && o.start == decomposition_start::top_norm ? solver.top_norm() : solver.svd_heads();
    solver.begin(d.factors);
    d.errors = {solver.error(d.factors)};
    d.converged = !iterate;
    if (o.progress) o.progress(s, 0, d.errors[0]);
    for (index_t sweep = 1; iterate && sweep <= o.max_sweeps && !d.converged; ++sweep) {
      solver.sweep(d.factors);
      d.errors.push_back(solver.error(d.factors));
      const double now = d.errors.back(), before = d.errors[d.errors.size() - 2];
      require<std::runtime_error>(std::isfinite(now), "decompose: sweep ", sweep, " gave numbers that are not finite");
      d.converged = now <= o.target_error || (sweep >= 2 && std::abs(before - now) < o.tolerance);
      if (o.progress) o.progress(s, sweep, now);
    }
    start_errors.push_back(d.error());
    if (best.errors.empty() || d.error() < best.error()) best = std::move(d);
  }
  best.start_errors = std::move(start_errors);
  best.regularised = solver.regularised();
  if (o.balance) detail::balance(best.factors);
  return best;
}

}  // namespace lithe::inline LITHE_ABI
