#pragma once

#include "lithe/layers/halting_head.hpp"

// R rows of all sequences, B sequences, D features, N exits
namespace lithe::inline LITHE_ABI {

/// One exit for a whole sequence (arXiv 1910.10073, section 4.1): s_b = the mean of the rows of sequence b that are no padding (ctx.rows,
/// ctx.mask), log q_b = log softmax(W s_b + c). x [R x D] is an encoder's output, or the states of a prompt after block 1; log_q [B x N]. Padding
/// has no part in it and gets no gradient. Throws shape_error for a sequence without real rows.
template <std::floating_point S>
struct sequence_halting {
  using scalar = S;
  struct record {
    matrix<S> mean, log_q;
    record_of<halting_head<S>> head;
  };
  struct gradient {
    gradient_of<halting_head<S>> head;
  };
  static constexpr bool looks_across = true;

  halting_head<S> head;

  sequence_halting() = default;
  /// `features` and `outputs` (the exits) as in the configuration of the head.
  sequence_halting(halting_head_config c, rng_key key) : head(c, key) {}

  /// Of one sequence; under segments it is a row for each.
  shape output_shape(matrix_view<const S> x) const { return {1, head.output_shape(x).cols}; }
  void forward(matrix_view<const S> x, matrix_view<S> log_q, const context& ctx) const {
    const scratch<S> mean(ctx, checked(x, log_q, ctx), x.cols());
    average(x, mean, ctx);
    head.forward(mean, log_q, ctx.position_wise());
    multinomial_exits<S>(log_q, log_q, ctx);
  }
  void forward(matrix_view<const S> x, matrix_view<S> log_q, record& r, const context& ctx) const {
    r.mean.resize(checked(x, log_q, ctx), x.cols());
    average(x, r.mean, ctx);
    head.forward(r.mean, log_q, r.head, ctx.position_wise());
    multinomial_exits<S>(log_q, log_q, ctx);
    r.log_q = log_q.map();
  }
  void backward(matrix_view<const S> x, const record& r, matrix_view<const S> dlog_q, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t B = checked(x, dlog_q, ctx);
    detail::check_like("sequence_halting", "dx", dx, x);
    check_gradient("sequence_halting", *this, g);
    recorded("sequence_halting", r.log_q, B, dlog_q.cols());
    recorded("sequence_halting", r.mean, B, x.cols());
    const scratch<S> dlogits(ctx, B, dlog_q.cols()), ds(ctx, B, x.cols());
    multinomial_exits_backward<S>(r.log_q, dlog_q, dlogits, ctx);
    head.backward(r.mean, r.head, dlogits, ds, g.head, ctx.position_wise());
    for (index_t b = 0; b < B; ++b) {
      const S share = S(1) / static_cast<S>(real_rows(x.rows(), b, ctx));
      for (index_t t = ctx.rows.begin(b); t < ctx.rows.end(b, x.rows()); ++t) {
        if (ctx.valid(t))
          dx.row_array(t) = share * ds.view().row_array(b);
        else
          dx.row_array(t).setZero();
      }
    }
  }
  [[nodiscard]] cost forward_cost(index_t length) const { return head.forward_cost(length); }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("", s.head...);
  }

 private:
  static index_t real_rows(index_t rows, index_t b, const context& ctx) {
    index_t n = 0;
    for (index_t t = ctx.rows.begin(b); t < ctx.rows.end(b, rows); ++t) n += ctx.valid(t);
    return n;
  }
  template <class T>
  index_t checked(matrix_view<const S> x, matrix_view<T> log_q, const context& ctx) const {
    ctx.check("sequence_halting", x.rows());
    require_shape("sequence_halting", "log q", log_q, ctx.rows.count(), output_shape(x).cols);
    return ctx.rows.count();
  }
  static void average(matrix_view<const S> x, matrix_view<S> mean, const context& ctx) {
    for (index_t b = 0; b < mean.rows(); ++b) {
      const index_t n = real_rows(x.rows(), b, ctx);
      require<shape_error>(n > 0, "sequence_halting: expected at least one row that is no padding in sequence ", b, ", got none");
      const scratch<double> sum(ctx, 1, x.cols());
      sum.map().setZero();
      for (index_t t = ctx.rows.begin(b); t < ctx.rows.end(b, x.rows()); ++t)
        if (ctx.valid(t)) sum.view().row_array(0) += x.row_array(t).template cast<double>();
      mean.row_array(b) = (sum.view().row_array(0) / static_cast<double>(n)).template cast<S>();
    }
  }
};

}  // namespace lithe::inline LITHE_ABI
