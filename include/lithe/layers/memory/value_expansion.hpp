#pragma once

#include <numeric>

#include "lithe/kernels/activation.hpp"
#include "lithe/layers/linear.hpp"
#include "lithe/layers/memory/value_table.hpp"

// T tokens, D features, K picks of a token, E virtual tables, P rows of the table that a layer sees, dv value width, M cores, G groups kept apart
namespace lithe::inline LITHE_ABI {

struct value_expansion_config {
  index_t features = 0;
  index_t expansion = 4;     ///< E, a square
  index_t groups = 0;        ///< G: E (0 means that), or 1: the virtual tables share one projection
  index_t rows = 0;          ///< P; E P addresses
  index_t value_width = 0;   ///< dv
  index_t cores = 2;         ///< M slices of a value, each with a score of its own
  index_t table_rows = 0;    ///< of the whole table, if several layers share it; 0 = rows
  index_t offset = 0;        ///< of this layer's first row in it
  index_t pre_width = 0;     ///< Dp; 0 = no pre-values
  bool pre_gelu = false;
};

namespace detail {

/// The rows that T tokens read, listed for each (token, group, core): lists [T G M] of `length` entries, padded with -1.
template <class S>
struct expanded_picks {
  matrix_view<const slot_t> group;  // of each pick [T x K]
  index_t groups, cores, length = 0;
  scratch<slot_t> place;  // [T x K]: where each pick stands in its list, -1 if nowhere
  scratch<slot_t> slots;
  scratch<S> weights;

  expanded_picks(matrix_view<const slot_t> rows, matrix_view<const slot_t> group_of_picks, index_t G, index_t M, const context& ctx)
      : group(group_of_picks), groups(G), cores(M), place(ctx, rows.rows(), rows.cols()), slots(ctx, list(rows, ctx), 1),
        weights(ctx, slots.rows(), 1) {
    const index_t K = rows.cols();
    ctx.exec->run(rows.rows(), 64, [&](index_t first, index_t last) {
      std::fill(slots.data() + first * G * M * length, slots.data() + last * G * M * length, slot_t{-1});
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < K; ++p)
          for (index_t c = 0; rows(t, p) >= 0 && c < M; ++c) slots[at(t, p, c)] = static_cast<slot_t>(rows(t, p) * M + c);
    });
  }
  /// Where the entry of a pick and core stands.
  [[nodiscard]] index_t at(index_t t, index_t p, index_t c) const {
    return ((t * groups + (groups == 1 ? 0 : group(t, p))) * cores + c) * length + place.row(t)[p];
  }
  [[nodiscard]] lithe::picks<S> picks() const { return {slots.span(), weights.span(), length}; }

 private:
  /// Gives every pick its place; returns the number of entries of all lists.
  index_t list(matrix_view<const slot_t> rows, const context& ctx) {
    const scratch<slot_t> filled(ctx, 1, groups);
    for (index_t t = 0; t < rows.rows(); ++t) {
      std::fill_n(filled.data(), groups, slot_t{0});
      for (index_t p = 0; p < rows.cols(); ++p) {
        place.row(t)[p] = rows(t, p) < 0 ? slot_t{-1} : filled[groups == 1 ? 0 : group(t, p)]++;
        length = std::max<index_t>(length, place.row(t)[p] + 1);
      }
    }
    return rows.rows() * groups * cores * length;
  }
};

}  // namespace detail

/// Implicit value expansion (arXiv 2411.12364 section 3.3) with multi-core scores (section 3.4) and, for UltraMemV2 (arXiv 2508.18756), pre-values. For a
/// token x with addresses a_κ and scores s^c_κ, κ < K:
///
///     A = permutation[a], row = (A mod P + offset) mod table_rows, group p = A div P;   w^c = s^c, or s^c ψ(<Z[row], W_p x>), ψ = identity or GELU
///     O[p, slice c] = Σ_κ w^c V[row, slice c];   y = W_o vec(O) = Σ_p W_o[:, p] O_p       (one group: O is summed over p)
///
/// One physical table acts as E virtual ones, each with its projection. Slices are M contiguous pieces of a value; the table holds them as
/// rows of their own (row M + c, width dv / M), so that any value_table serves. Address -1 reads nothing. `fold` multiplies the
/// projections into the values once, for inference: E M times the rows, of D numbers, and no projection any more.
template <std::floating_point S, value_table Table>
struct value_expansion {
  using scalar = S;
  struct record {
    matrix<S> read;       // O [T x G dv]
    matrix<S> pre_query;  // W_p x [T x Dp]
    matrix<S> dots;       // <Z[row], W_p x> [T x K]
  };
  struct gradient {
    nothing permutation;
    typename Table::gradient values, pre_values;
    gradient_of<linear<S>> pre_projection, projection;
  };

  value_expansion_config config;
  matrix<slot_t> permutation;  // [1 x E P], state: fixed for life
  Table values;                // [table_rows M x dv / M]
  Table pre_values;            // [table_rows x Dp]
  linear<S> pre_projection;    // W_p [Dp x D]
  linear<S> projection;        // W_o [D x G dv]
  dense_table<S> folded;       // [G table_rows M x D], made by `fold`

  value_expansion() = default;
  /// The permutation is drawn from `key`, projections start as `linear`. Throws config_error for settings that do not go together and tables of other shapes.
  value_expansion(value_expansion_config c, Table values_, Table pre_values_, rng_key key)
      : config(checked(c)), values(std::move(values_)), pre_values(std::move(pre_values_)),
        projection({config.groups * config.value_width, c.features, false}, key.child(1)) {
    require<config_error>(values.slots() == config.table_rows * c.cores && values.cols() * c.cores == c.value_width,
                          "ultra_mem: expected a table of ", to_text(config.table_rows * c.cores, c.value_width / c.cores), " (a row for each slice), got ",
                          to_text(values.slots(), values.cols()));
    require<config_error>(c.pre_width == 0 || (pre_values.slots() == config.table_rows && pre_values.cols() == c.pre_width),
                          "ultra_mem: expected a table of pre-values of ", to_text(config.table_rows, c.pre_width), ", got ",
                          to_text(pre_values.slots(), pre_values.cols()));
    if (c.pre_width > 0) pre_projection = linear<S>({c.features, c.pre_width, false}, key.child(2));
    permutation.resize(1, c.expansion * c.rows);
    std::iota(permutation.data(), permutation.data() + permutation.size(), slot_t{0});
    for (index_t i = permutation.size() - 1; i > 0; --i)
      std::swap(permutation(0, i), permutation(0, static_cast<index_t>(uniform(key.child(0), static_cast<std::uint64_t>(i)) * static_cast<double>(i + 1))));
  }
  /// The settings with their defaults filled in; throws config_error unless they go together.
  static value_expansion_config checked(value_expansion_config c) {
    if (c.groups == 0) c.groups = c.expansion;
    if (c.table_rows == 0) c.table_rows = c.rows;
    const auto root = static_cast<index_t>(std::lround(std::sqrt(static_cast<double>(std::max<index_t>(0, c.expansion)))));
    require<config_error>(c.expansion >= 1 && root * root == c.expansion, "ultra_mem: expected an expansion that is a square (1, 4, 9, ...), got ", c.expansion);
    require<config_error>(c.groups == 1 || c.groups == c.expansion, "ultra_mem: expected 1 group or one for each of the ", c.expansion,
                          " virtual tables, got ", c.groups);
    require<config_error>(c.features >= 1 && c.rows >= 1 && c.value_width >= 1 && c.pre_width >= 0,
                          "ultra_mem: expected at least 1 feature, table row and value column, got ", c.features, ", ", c.rows, " and ", c.value_width);
    require<config_error>(c.cores >= 1 && c.value_width % c.cores == 0, "ultra_mem: the value width must be divisible by the cores, got ", c.value_width,
                          " and ", c.cores);
    require<config_error>(c.expansion * c.rows < index_t{1} << 31, "ultra_mem: expected fewer than 2^31 addresses, got ", c.expansion * c.rows);
    require<config_error>(c.table_rows >= c.rows && c.table_rows * c.cores < index_t{1} << 31 && c.offset >= 0 && c.offset < c.table_rows,
                          "ultra_mem: expected a table of at least ", c.rows, " rows (fewer than 2^31 slices) and an offset within it, got ", c.table_rows,
                          " and ", c.offset);
    return c;
  }
  /// Table row and group of each address, all [T x K]; -1 stays -1.
  void locate(matrix_view<const slot_t> addresses, matrix_view<slot_t> rows, matrix_view<slot_t> group, const context& ctx) const {
    const auto P = static_cast<slot_t>(config.rows);
    ctx.exec->run(addresses.rows(), 64, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < addresses.cols(); ++p) {
          const slot_t address = addresses(t, p), to = address < 0 ? slot_t{-1} : permutation.data()[address];
          rows(t, p) = to < 0 ? slot_t{-1} : static_cast<slot_t>((to % P + config.offset) % config.table_rows);
          group(t, p) = to < 0 ? slot_t{0} : to / P;
        }
    });
  }

  /// addresses [T x K], scores [T x K M]; r may be null.
  void forward(matrix_view<const S> x, matrix_view<const slot_t> addresses, matrix_view<const S> scores, matrix_view<S> y, record* r,
               const context& ctx) const {
    const index_t T = x.rows(), K = addresses.cols(), width = config.groups * config.value_width;
    const bool pre = config.pre_width > 0, keep = r != nullptr, direct = !keep && folded.slots() > 0;
    if (keep) {
      r->read.resize(T, width);
      r->pre_query.resize(pre ? T : 0, config.pre_width);
      r->dots.resize(pre ? T : 0, K);
    }
    const scratch<slot_t> rows(ctx, T, K), group(ctx, T, K);
    const scratch<S> own_query(ctx, pre && !keep ? T : 0, config.pre_width), own_dots(ctx, pre && !keep ? T : 0, K), own_read(ctx, keep || direct ? 0 : T, width);
    const matrix_view<S> query = keep ? matrix_view<S>(r->pre_query) : own_query.view(), dots = keep ? matrix_view<S>(r->dots) : own_dots.view();
    const matrix_view<S> read = keep ? matrix_view<S>(r->read) : own_read.view();
    locate(addresses, rows, group, ctx);
    if (pre) {
      pre_projection.forward(x, query, ctx);
      pre_values.row_dots(rows.span(), K, query, {dots.data(), static_cast<std::size_t>(dots.size())}, ctx);
    }
    if (direct) return read_folded(rows, group, scores, dots, y, ctx);
    const detail::expanded_picks<S> picks(rows.view(), group.view(), config.groups, config.cores, ctx);
    weigh(picks, scores, dots, ctx);
    values.gather_sum(picks.picks(), by_slice(read), ctx);
    projection.forward(read, y, ctx);
  }

  /// dx is added to; ds [T x K M] is overwritten.
  void backward(matrix_view<const S> x, matrix_view<const slot_t> addresses, matrix_view<const S> scores, const record& r, matrix_view<const S> dy,
                matrix_view<S> ds, matrix_view<S> dx, gradient& g, const context& ctx) const {
    const index_t T = x.rows(), K = addresses.cols(), M = config.cores;
    const bool pre = config.pre_width > 0;
    recorded("ultra_mem", r.read, T, config.groups * config.value_width);
    recorded("ultra_mem", r.pre_query, pre ? T : 0, config.pre_width);
    recorded("ultra_mem", r.dots, pre ? T : 0, K);
    const scratch<slot_t> rows(ctx, T, K), group(ctx, T, K);
    const scratch<S> dread(ctx, T, r.read.cols());
    locate(addresses, rows, group, ctx);
    projection.backward(r.read, {}, dy, dread, g.projection, ctx);
    const detail::expanded_picks<S> picks(rows.view(), group.view(), config.groups, M, ctx);
    const scratch<S> dw(ctx, picks.slots.rows(), 1), ddots(ctx, pre ? T : 0, K);
    weigh(picks, scores, r.dots, ctx);
    values.row_dots(picks.slots.span(), picks.length, by_slice(dread.view()), dw.span(), ctx);
    values.scatter_add(picks.picks(), by_slice(dread.view()), g.values, ctx);

    ctx.exec->run(T, 64, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < K; ++p) {
          S along = 0;
          for (index_t c = 0; c < M; ++c) {
            const S d = rows.row(t)[p] < 0 ? S(0) : dw[picks.at(t, p, c)];
            along += d * scores(t, p * M + c);
            ds(t, p * M + c) = pre ? psi(r.dots(t, p)) * d : d;
          }
          if (pre) ddots.row(t)[p] = along * psi_slope(r.dots(t, p));
        }
    });
    if (!pre) return;
    const lithe::picks<S> read{rows.span(), ddots.span(), K};
    const scratch<S> dquery(ctx, T, config.pre_width);
    pre_values.scatter_add(read, r.pre_query, g.pre_values, ctx);
    pre_values.gather_sum(read, dquery, ctx, update::assign);
    pre_projection.add_backward(x, dquery, dx, g.pre_projection, ctx);
  }

  /// Multiplies the projections into the values, for inference.
  void fold() {
    const index_t M = config.cores, width = config.value_width / M, D = projection.weight.rows();
    folded = dense_table<S>(config.groups * config.table_rows * M, D);
    matrix<S> row(1, width), out(1, D);
    for (index_t i = 0; i < values.rows(); ++i) {
      values.read_row(i, {row.data(), static_cast<std::size_t>(width)});
      for (index_t p = 0; p < config.groups; ++p) {
        gemm_nt<S>(row, view(projection.weight).slice_cols((p * M + i % M) * width, width), out, {});
        folded.write_row(p * values.rows() + i, {out.data(), static_cast<std::size_t>(D)});
      }
    }
  }
  /// Throws config_error if somebody changed the permutation into something else.
  void refresh() {
    require<config_error>(permutation.size() == config.expansion * config.rows, "ultra_mem: expected a permutation of ", config.expansion * config.rows,
                          " addresses, got ", permutation.size());
    detail::check_permutation<config_error>(std::span<const slot_t>(permutation.data(), static_cast<std::size_t>(permutation.size())), "ultra_mem");
    if (folded.slots() > 0) fold();
  }
  void after_step(const gradient&) {
    if (folded.slots() > 0) fold();
  }

  [[nodiscard]] cost forward_cost(index_t length, index_t picks) const {
    const double read = static_cast<double>(picks * (config.value_width + config.pre_width));
    const double held = static_cast<double>(config.table_rows) * static_cast<double>(config.value_width + config.pre_width);
    return cost{held, 2 * read, read * sizeof(S)} + pre_projection.forward_cost(length) + projection.forward_cost(length);
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f(field("permutation", role::permutation), s.permutation...);
    f("values", s.values...);
    f("pre_values", s.pre_values...);
    f("pre_projection", s.pre_projection...);
    f("projection", s.projection...);
  }

 private:
  /// O [T x G dv] as a row for each (token, group, core).
  template <class E>
  matrix_view<E> by_slice(matrix_view<E> m) const {
    return m.cut_rows(config.value_width / config.cores);
  }
  S psi(S dot) const { return config.pre_gelu ? detail::activate<activation::gelu>(one(dot))(0) : dot; }
  S psi_slope(S dot) const { return config.pre_gelu ? detail::activation_slope<activation::gelu>(one(dot))(0) : S(1); }
  static Eigen::Array<S, 1, 1> one(S v) { return Eigen::Array<S, 1, 1>(v); }

  void weigh(const detail::expanded_picks<S>& picks, matrix_view<const S> scores, matrix_view<const S> dots, const context& ctx) const {
    const index_t M = config.cores;
    ctx.exec->run(scores.rows(), 64, [&](index_t first, index_t last) {
      for (index_t t = first; t < last; ++t)
        for (index_t p = 0; p < scores.cols() / M; ++p) {
          if (picks.place.row(t)[p] < 0) continue;
          const S factor = config.pre_width > 0 ? psi(dots(t, p)) : S(1);
          for (index_t c = 0; c < M; ++c) picks.weights[picks.at(t, p, c)] = factor * scores(t, p * M + c);
        }
    });
  }
  void read_folded(const scratch<slot_t>& rows, const scratch<slot_t>& group, matrix_view<const S> scores, matrix_view<const S> dots, matrix_view<S> y,
                   const context& ctx) const {
    const index_t T = rows.rows(), K = rows.cols(), M = config.cores, all = values.slots();
    const scratch<slot_t> slots(ctx, T, K * M);
    const scratch<S> weights(ctx, T, K * M);
    for (index_t t = 0; t < T; ++t)
      for (index_t p = 0; p < K; ++p)
        for (index_t c = 0; c < M; ++c) {
          const index_t from = config.groups == 1 ? 0 : group.row(t)[p] * all;
          slots.row(t)[p * M + c] = rows.row(t)[p] < 0 ? slot_t{-1} : static_cast<slot_t>(from + rows.row(t)[p] * M + c);
          weights.row(t)[p * M + c] = (config.pre_width > 0 ? psi(dots(t, p)) : S(1)) * scores(t, p * M + c);
        }
    folded.gather_sum({slots.span(), weights.span(), K * M}, y, ctx, update::assign);
  }
};

}  // namespace lithe::inline LITHE_ABI
