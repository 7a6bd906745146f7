#include "golden_runner/golden_case.hpp"
#include "lithe/layers/mixture_of_experts.hpp"
#include "lithe/layers/parameters.hpp"

namespace golden {

template <class S>
void run_moe(golden_case<S>& c) {
  const auto& j = c.config;
  const std::string expert = j.at("expert");
  if (expert != "gelu" && expert != "relu" && expert != "swiglu") throw skipped("experts of kind " + expert);
  const bool gated = expert == "swiglu";
  mixture_of_experts<S> l({.features = j.at("width"), .hidden = j.at("inner"), .experts = j.at("experts"), .top_k = j.at("top_k"),
                           .kind = gated ? activation::silu : expert == "relu" ? activation::relu : activation::gelu, .gated = gated,
                           .renormalise = j.at("renormalise"), .balance = j.at("balance_coef"), .z_loss = j.at("z_coef")},
                          {});
  const char* up = gated ? "experts.up.weight" : "experts.fc1.weight";
  const char* down = gated ? "experts.down.weight" : "experts.fc2.weight";
  const char* gate = "experts.gate.weight";
  c.load("router", l.router);
  l.up = c.tensor(concat("param.", up));
  l.down = c.tensor(concat("param.", down));
  if (gated) l.gate = c.tensor(concat("param.", gate));

  const matrix<S> x = c.tensor("input.x"), dy = c.tensor("grad_output.y");
  matrix<S> y(dy.rows(), dy.cols()), dx(x.rows(), x.cols());
  record_of<mixture_of_experts<S>> r;
  auto g = make_gradient(l);
  l.forward(x, y, r, {});
  l.backward(x, r, dy, dx, g, {});

  std::vector<double> routes;
  for (index_t i = 0; i < r.routes.value.size(); ++i) routes.push_back(static_cast<double>(r.routes.value.data()[i]));
  if (c.has("mid.indices")) c.compare("mid.indices", routes);
  if (c.has("mid.probabilities")) c.compare("mid.probabilities", matrix_view<const S>(r.probabilities));
  const auto compare_loss = [&](const char* name, double loss, double coefficient) {
    if (c.has(name) && coefficient > 0) c.compare(name, std::vector<double>{loss / coefficient});
  };
  compare_loss("aux.balance_loss", static_cast<double>(r.balance.loss), l.config.balance);
  compare_loss("aux.z_loss", static_cast<double>(r.z.loss), l.config.z_loss);
  c.compare("output.y", matrix_view<const S>(y));
  c.compare("grad.input.x", matrix_view<const S>(dx));
  c.compare("grad.router.weight", matrix_view<const S>(g.router.weight));
  c.compare(concat("grad.", up), matrix_view<const S>(g.up));
  c.compare(concat("grad.", down), matrix_view<const S>(g.down));
  if (gated) c.compare(concat("grad.", gate), matrix_view<const S>(g.gate));
}

template void run_moe(golden_case<float>&);
template void run_moe(golden_case<double>&);

}  // namespace golden
