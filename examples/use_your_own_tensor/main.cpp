// Your own matrix type, a type shaped like std::mdspan, and a layer of your own, checked by the gradient checker.
#include <array>
#include <cstdio>
#include <lithe/lithe.hpp>
#include <vector>

/// A matrix type that knows nothing of Lithe ...
struct image {
  std::vector<double> pixels;
  int height, width;
};
/// ... and what Lithe has to know of it.
template <>
struct lithe::matrix_access<image> {
  static double* data(image& m) { return m.pixels.data(); }
  static const double* data(const image& m) { return m.pixels.data(); }
  static std::ptrdiff_t rows(const image& m) { return m.height; }
  static std::ptrdiff_t cols(const image& m) { return m.width; }
  static std::ptrdiff_t stride(const image& m) { return m.width; }
};

/// Shaped like a rank-2 std::mdspan: recognised by its members, no specialisation needed.
struct span2d {
  double* at;
  std::array<std::ptrdiff_t, 2> extents, strides;
  double* data_handle() const { return at; }
  std::ptrdiff_t extent(std::size_t r) const { return extents[r]; }
  std::ptrdiff_t stride(std::size_t r) const { return strides[r]; }
};

/// A layer of your own: y = x ⊙ scale, one scale for each feature. It satisfies lithe::layer and stands wherever a layer may.
struct scale_features {
  using scalar = double;
  struct record {};
  struct gradient {
    lithe::matrix<double> scale;
  };
  lithe::matrix<double> scale;

  lithe::shape output_shape(lithe::matrix_view<const double> x) const {
    lithe::require_features("scale_features", scale.cols(), x);
    return {x.rows(), x.cols()};
  }
  void forward(lithe::matrix_view<const double> x, lithe::matrix_view<double> y, const lithe::context&) const {
    for (std::ptrdiff_t t = 0; t < x.rows(); ++t) y.row_array(t) = x.row_array(t) * scale.row(0).array();
  }
  void forward(lithe::matrix_view<const double> x, lithe::matrix_view<double> y, record&, const lithe::context& ctx) const { forward(x, y, ctx); }
  void backward(lithe::matrix_view<const double> x, const record&, lithe::matrix_view<const double> dy, lithe::matrix_view<double> dx, gradient& g,
                const lithe::context&) const {
    for (std::ptrdiff_t t = 0; t < x.rows(); ++t) {
      g.scale.row(0).array() += dy.row_array(t) * x.row_array(t);
      dx.row_array(t) = dy.row_array(t) * scale.row(0).array();
    }
  }
  template <class F, class... T>
  static void visit(F&& f, T&... s) {
    f("scale", s.scale...);
  }
};
static_assert(lithe::layer<scale_features>);

int main() {
  const lithe::linear<double> layer({.inputs = 3, .outputs = 2}, lithe::rng_key{1});

  image in{{1, 2, 3, 4, 5, 6}, 2, 3};
  std::array<double, 8> buffer{};  // two rows of two numbers, four apart
  layer.forward(in, span2d{buffer.data(), {2, 2}, {4, 1}}, {});
  std::printf("a user's image through linear into an mdspan: [%.3f %.3f] [%.3f %.3f]\n", buffer[0], buffer[1], buffer[4], buffer[5]);

  // The layer in a residual block between a linear map and a norm, checked against central differences.
  const lithe::residual<lithe::sequential<lithe::linear<double>, scale_features, lithe::layer_norm<double>>> block{
      lithe::sequential(lithe::linear<double>({.inputs = 3, .outputs = 3}, lithe::rng_key{2}),
                        scale_features{lithe::matrix<double>::Constant(1, 3, 0.5)}, lithe::layer_norm<double>(3))};
  const auto report = lithe::gradient_check(block, in);
  std::printf("gradients of %td numbers checked, worst %s\n", report.checked(), report.where().c_str());
  for (const auto& t : report.tensors) std::printf("  %-20s worst %.1e, largest gradient %.3f\n", t.name.c_str(), t.worst, t.largest);
  return report.worst() < 1e-5 ? 0 : 1;
}
