#include <lithe/lithe.hpp>

#include <cstdio>

// Somebody else's program: one layer, two workers.
int main() {
  const lithe::linear<float> layer({16, 8}, lithe::rng_key{1});
  const lithe::matrix<float> x = lithe::matrix<float>::Ones(4, 16);
  lithe::matrix<float> y(4, 8);
  const lithe::parallel_executor threads(2);
  lithe::context ctx;
  ctx.exec = &threads;
  layer.forward(x, y, ctx);
  std::printf("lithe %d.%d.%d: %g\n", LITHE_VERSION_MAJOR, LITHE_VERSION_MINOR, LITHE_VERSION_PATCH, static_cast<double>(y.sum()));
  return y.allFinite() ? 0 : 1;
}
