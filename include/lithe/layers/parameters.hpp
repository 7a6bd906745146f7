#pragma once

#include <map>
#include <memory>
#include <set>

#include "lithe/layers/layer.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// "prefix.name", or the one of them that is not empty.
[[gnu::cold, gnu::noinline]] inline std::string join_names(const std::string& prefix, std::string_view name) {
  std::string joined = prefix;
  if (!prefix.empty() && !name.empty()) joined += '.';
  joined += name;
  return joined;
}

/// Throws `Error`, beginning with `who`, unless `order` has every number from 0 to its size - 1 once.
template <class Error, class N>
void check_permutation(std::span<const N> order, const std::string& who) {
  const auto n = static_cast<std::int64_t>(order.size());
  std::vector<bool> seen(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto to = static_cast<std::int64_t>(order[i]);
    require<Error>(to >= 0 && to < n, who, ": not a permutation: ", i, " goes to ", to, ", outside 0 .. ", n - 1);
    require<Error>(!seen[static_cast<std::size_t>(to)], who, ": not a permutation: ", to, " comes twice, the second time at ", i);
    seen[static_cast<std::size_t>(to)] = true;
  }
}
/// The same for each `length` numbers of several permutations, one after the other.
template <class Error, class N>
void check_permutations(std::span<const N> orders, index_t length, const std::string& who) {
  const auto n = static_cast<std::size_t>(length);
  for (std::size_t first = 0; first < orders.size(); first += n) check_permutation<Error>(orders.subspan(first, n), who);
}

}  // namespace detail

/// Depth-first walk over a model and any number of structs of the same tree (gradients, copies) in lockstep: node(prefix, model,
/// others...) at every layer, leaf(name, role, tensor, others...) at every tensor. Names are joined with dots.
template <class Node, class Leaf, class First, class... Rest>
void walk(Node&& node, Leaf&& leaf, const std::string& prefix, First& first, Rest&... rest) {
  node(prefix, first, rest...);
  std::remove_const_t<First>::visit(
      [&](const field& f, auto& a, auto&... b) {
        const std::string name = detail::join_names(prefix, f.name);
        if constexpr (has_parameters<std::remove_cvref_t<decltype(a)>>)
          walk(node, leaf, name, a, b...);
        else
          leaf(name, f.kind, a, b...);
      },
      first, rest...);
}

/// leaf(name, role, tensor, others...) for every tensor that is not empty, a shared table once.
template <class Leaf, class First, class... Rest>
void for_each_tensor(Leaf&& leaf, First& first, Rest&... rest) {
  std::set<const void*> seen;
  walk([](const auto&...) {},
       [&](const std::string& name, role kind, auto& a, auto&... b) {
         if (a.rows() * a.cols() == 0) return;
         if constexpr (requires { a.identity(); })
           if (!seen.insert(a.identity()).second) return;
         leaf(name, kind, a, b...);
       },
       "", first, rest...);
}

/// A zero gradient of the model's shape. Value tables and embeddings get a gradient of touched rows; a table that several layers
/// share gets one for all of them.
template <class L>
[[nodiscard]] gradient_of<L> make_gradient(const L& l) {
  gradient_of<L> g{};
  std::map<const void*, std::shared_ptr<void>> shared;
  walk(
      [](const std::string&, const auto& p, auto& q) {
        if constexpr (requires { p.prepare(q); }) p.prepare(q);
      },
      [&](const std::string&, role, const auto& p, auto& q) {
        if constexpr (std::same_as<std::remove_cvref_t<decltype(q)>, nothing>) {
        } else if constexpr (requires { p.identity(); }) {
          auto& handle = shared[p.identity()];
          p.share_gradient(handle, q);
        } else if constexpr (requires { q.total_rows; }) {
          q.total_rows = p.rows();
          q.cols = p.cols();
        } else {
          q.setZero(p.rows(), p.cols());
        }
      },
      "", l, g);
  return g;
}

/// Folds what training gathered beside gradients (running statistics) into the model, and refreshes packed copies; call it between
/// steps, after the optimiser. Parts come before the layer they belong to, which may keep something made from theirs.
template <class L>
void after_step(L& l, const gradient_of<L>& g) {
  L::visit(
      [](const field&, auto& p, const auto& q) {
        if constexpr (has_parameters<std::remove_cvref_t<decltype(p)>>) lithe::after_step(p, q);
      },
      l, g);
  if constexpr (requires { l.after_step(g); }) l.after_step(g);
}

/// Tells every layer that its parameters were changed from outside (loaded, averaged, edited), so that derived copies are rebuilt;
/// saved state stays as it is.
template <class L>
void refresh(L& l) {
  walk(
      [](const std::string&, auto& p) {
        if constexpr (requires { p.refresh(); }) p.refresh();
      },
      [](const auto&...) {}, "", l);
}

/// Makes the packed copies of all weights (kernels/gemm.hpp), for inference: products with them skip the packing. They follow
/// `after_step` and `refresh`; whoever edits a weight by hand calls `refresh`.
template <class L>
void prepack(L& l) {
  walk(
      [](const std::string&, auto& p) {
        if constexpr (requires { p.prepack(); }) p.prepack();
      },
      [](const auto&...) {}, "", l);
}

/// Sets an accumulated gradient back to zero, keeping its memory. What a gradient gathers beside the walked tensors (counts of
/// batches) it clears in its own `reset()`.
template <class L>
void set_zero(const L& l, gradient_of<L>& g) {
  walk(
      [](const std::string&, const auto&, auto& q) {
        if constexpr (requires { q.reset(); }) q.reset();
      },
      [](const std::string&, role, const auto&, auto& q) {
        if constexpr (requires { q.set_zero(); })
          q.set_zero();
        else if constexpr (!std::same_as<std::remove_cvref_t<decltype(q)>, nothing>)
          q.setZero();
      },
      "", l, g);
}

/// The number of trainable numbers; a shared table counts once.
template <class L>
[[nodiscard]] index_t count_parameters(const L& l) {
  index_t n = 0;
  for_each_tensor([&](const std::string&, role kind, const auto& p) { n += kind == role::parameter ? p.rows() * p.cols() : 0; }, l);
  return n;
}

}  // namespace lithe::inline LITHE_ABI
