#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI {

/// A reference to a callable, for arguments that do not outlive the call: two words, no allocation.
template <class Signature>
class function_ref;
/// For callables that take A... and return R.
template <class R, class... A>
class function_ref<R(A...)> {
 public:
  /// Refers to f, which must outlive the reference.
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, function_ref> && std::is_invocable_r_v<R, F&, A...>)
  function_ref(F&& f)  // implicit, as for std::function: a lambda is written where the argument stands
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, A... a) -> R { return (*static_cast<std::remove_reference_t<F>*>(object))(a...); }) {}
  R operator()(A... a) const { return call_(object_, a...); }  ///< calls f

 private:
  void* object_;
  R (*call_)(void*, A...);
};

/// Runs loops. The base class runs them on the calling thread; `parallel_executor` on several. A loop is always cut into the
/// same pieces, so equal calls give equal bits with any number of workers.
class executor {
 public:
  /// What runs a piece of a loop, first .. last - 1.
  using body = function_ref<void(index_t first, index_t last)>;

  executor() = default;
  executor(const executor&) = delete;
  executor& operator=(const executor&) = delete;
  virtual ~executor() = default;

  /// How many threads may run pieces of one loop at the same time.
  [[nodiscard]] virtual index_t workers() const { return 1; }
  /// Who asks: 0 outside of loops and in loops that run where they were called, else one of 1 to `workers()`.
  [[nodiscard]] virtual index_t worker() const { return 0; }
  /// Calls body(first, last) once for each piece [0, grain), [grain, 2 grain), ... of [0, n). The first exception that a piece
  /// throws reaches the caller. May be called from inside a body: the inner loop then runs on that worker alone.
  virtual void run(index_t n, index_t grain, body f) const {
    for (index_t first = 0; first < n; first += grain) f(first, std::min(n, first + grain));
  }
};

/// The default executor: no threads, no state.
inline const executor serial_executor;

}  // namespace lithe::inline LITHE_ABI
