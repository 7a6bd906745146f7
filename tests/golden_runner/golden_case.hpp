#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "lithe/io/safetensors.hpp"
#include "lithe/kernels/hashing.hpp"
#include "lithe/layers/attention/local_attention.hpp"
#include "lithe/layers/linear.hpp"

namespace golden {

using namespace lithe;

/// A file that the runner cannot judge, and why.
struct skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A field of a file's configuration that may be missing or null.
template <class T>
T option(const nlohmann::json& j, const char* name, T otherwise) {
  return j.contains(name) && !j.at(name).is_null() ? j.at(name).get<T>() : otherwise;
}

/// A number of buckets, a list of factors, or null for the automatic choice.
inline bucket_factors factors(const nlohmann::json& j) {
  if (j.is_null()) return {};
  if (j.is_number()) return {j.get<index_t>()};
  const auto list = j.get<std::vector<index_t>>();
  return bucket_factors(std::span<const index_t>(list));
}

/// Whether a query's window holds no key that it may see. The reference's double softmax of scores of -1e9 is then off by 1e-8.
inline bool sees_nothing(const local_attention_config& c, std::span<const std::uint8_t> mask, index_t sequences, index_t length) {
  if (mask.empty()) return false;
  const index_t chunk = length <= c.chunk ? length : c.chunk, chunks = length / chunk;
  for (index_t s = 0; s < sequences; ++s)
    for (index_t t = 0; t < length; ++t) {
      bool any = false;
      for (index_t at = chunks == 1 ? 0 : -c.before; at <= (chunks == 1 ? 0 : c.after); ++at)
        for (index_t j = 0; j < chunk; ++j) {
          const index_t key = ((t / chunk + at) % chunks + chunks) % chunks * chunk + j;
          any = any || (mask[static_cast<std::size_t>(s * length + key)] != 0 && (!c.causal || key <= t));
        }
      if (!any) return true;
    }
  return false;
}

/// One golden file, and what was compared with it so far. Errors are max |ours - file| / max |file| over a tensor; tensors that are zero
/// in the file are compared absolutely, exact zeros to 1e-12 in double, and those that are zero up to the rounding of the file's own sums, too.
/// S is what Lithe computes in; the file is always in double.
template <class S>
class golden_case {
 public:
  explicit golden_case(const safetensors_file& f) : file(f), config(nlohmann::json::parse(f.metadata().at("config"))) {}

  const safetensors_file& file;
  nlohmann::json config;

  /// A tensor of the file as a matrix [all but the last axis x last axis], in S.
  [[nodiscard]] matrix<S> tensor(const std::string& name) const { return file.read_matrix<S>(name); }
  [[nodiscard]] bool has(const std::string& name) const { return file.contains(name); }
  [[nodiscard]] std::vector<index_t> offsets(const std::string& name) const {
    std::vector<index_t> out;
    for (const auto v : file.read<std::int64_t>(name)) out.push_back(v);
    return out;
  }
  /// The parameters of a linear layer under `param.{name}.weight` and `.bias`.
  void load(const std::string& name, linear<S>& l) const {
    l.weight = tensor("param." + name + ".weight");
    l.bias.resize(0, l.weight.rows());
    if (has("param." + name + ".bias")) l.bias = tensor("param." + name + ".bias");
  }

  void compare(const std::string& name, matrix_view<const S> ours) {
    std::vector<double> flat;
    for (index_t i = 0; i < ours.rows(); ++i)
      for (index_t j = 0; j < ours.cols(); ++j) flat.push_back(static_cast<double>(ours(i, j)));
    compare(name, flat);
  }
  void compare(const std::string& name, const std::vector<double>& ours) {
    const auto theirs = file.read<double>(name);
    if (ours.size() != theirs.size()) throw std::runtime_error(concat(name, " has ", theirs.size(), " numbers, ours ", ours.size()));
    double largest = 0, error = 0;
    bool finite = true;
    for (std::size_t i = 0; i < ours.size(); ++i) {
      largest = std::max(largest, std::abs(theirs[i]));
      error = std::max(error, std::abs(ours[i] - theirs[i]));
      finite = finite && std::isfinite(ours[i]);
    }
    const bool gradient = name.starts_with("grad.");
    const bool in_double = std::is_same_v<S, double>;
    const bool zero = largest < 1e-12;
    const double tolerance = in_double ? (largest == 0 ? 1e-12 : double_tolerance) : zero ? 1e-6 : gradient ? 2e-5 : 1e-5;
    if (!zero) error /= largest;
    compared.insert(name);
    auto& [count, worst] = gradient ? gradients : outputs;
    ++count;
    if (!zero) worst = std::max(worst, error);
    if (!finite || error > tolerance) failures.push_back(concat(name, finite ? " is off by " : " is not finite, off by ", error));
  }
  void compare_linear_gradient(const std::string& name, const typename linear<S>::gradient& g) {
    compare("grad." + name + ".weight", matrix_view<const S>(g.weight));
    if (has("grad." + name + ".bias")) compare("grad." + name + ".bias", matrix_view<const S>(g.bias));
  }
  /// A tensor that no code of Lithe makes: comparing what the runner itself wrote could not fail.
  void pass_over(const std::string& name) { compared.insert(name); }
  /// Whatever should have been compared and was not is a failure.
  void check_all_compared() {
    for (const auto& name : file.names())
      if ((name.starts_with("output.") || name.starts_with("grad.") || name.starts_with("after.")) && !compared.contains(name))
        failures.push_back(name + " was not compared");
  }

  struct tally {
    int count = 0;
    double worst = 0;
  };
  tally outputs, gradients;
  double double_tolerance = 1e-9;  ///< a family raises it where the file's own reference rounds, and says why
  std::set<std::string> compared;
  std::vector<std::string> failures;
};

// The families; each builds what the metadata describes. Instantiated for float and double in a source file each.
template <class S>
void run_attention(golden_case<S>& c);
template <class S>
void run_collaborative(golden_case<S>& c);
template <class S>
void run_memory(golden_case<S>& c);
template <class S>
void run_moe(golden_case<S>& c);
template <class S>
void run_local(golden_case<S>& c);
template <class S>
void run_bucket(golden_case<S>& c);
template <class S>
void run_lsh(golden_case<S>& c);
template <class S>
void run_optimiser(golden_case<S>& c);
template <class S>
void run_ultra_mem(golden_case<S>& c);
template <class S>
void run_loss(golden_case<S>& c);
template <class S>
void run_exits(golden_case<S>& c);
template <class S>
void run_reformer(golden_case<S>& c);

}  // namespace golden
