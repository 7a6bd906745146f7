// accepted
#include "lithe/compose/residual.hpp"
#include "lithe/compose/sequential.hpp"
#include "lithe/layers/embedding.hpp"
#include "lithe/layers/linear.hpp"

// The twin of every refusal beside this file, as it should be written.
struct mdspan_shaped {
  double* p;
  double* data_handle() const { return p; }
  std::ptrdiff_t extent(int) const { return 3; }
  std::ptrdiff_t stride(int i) const { return i == 0 ? 4 : 1; }
};
struct own_matrix {
  double p[6];
};
template <>
struct lithe::matrix_access<own_matrix> {
  static double* data(own_matrix& m) { return m.p; }
  static const double* data(const own_matrix& m) { return m.p; }
  static std::ptrdiff_t rows(const own_matrix&) { return 2; }
  static std::ptrdiff_t cols(const own_matrix&) { return 3; }
  static std::ptrdiff_t stride(const own_matrix&) { return 3; }
};

void read(lithe::matrix_view<const double>);
void write(lithe::matrix_view<double>);

void accepted(lithe::matrix<double>& m, const lithe::matrix<double>& c, own_matrix& own, const own_matrix& const_own, double* p) {
  read(m);
  read(c);
  read(m.middleRows(1, 2));
  read(m.block(0, 0, 1, 2));
  read((m + m).eval());
  read(Eigen::RowVectorXd(3));
  read(Eigen::VectorXd(3));
  read(Eigen::Map<const lithe::matrix<double>>(p, 2, 2));
  read(mdspan_shaped{p});
  read(own);
  read(const_own);
  write(m);
  write(m.middleRows(1, 2));
  write(own);
  write(lithe::view(m).slice_cols(0, 1));

  const lithe::sequential<lithe::embedding<double>, lithe::residual<lithe::linear<double>>> model{};
  decltype(model)::record record;
  // Temporaries for contexts and views.
  model.forward(std::span<const lithe::token_t>{}, m, {});
  model.forward(std::span<const lithe::token_t>{}, m, record, lithe::context{}.child(1));
  lithe::bytes(record);
  lithe::forget(record);
}
