#pragma once

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "lithe/core/error.hpp"
#include "lithe/kernels/activation.hpp"

// Keys of the config.json beside a published model.
namespace lithe::inline LITHE_ABI::detail {

/// Reads a key into `value`, which stays as it is where the key is missing or null. Throws io_error that begins with
/// `who` and names the key if what stands there is of another type or does not fit.
template <class V>
void read_config_key(const nlohmann::json& json, const char* who, const char* key, V& value) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return;
  const auto whole = [&](const nlohmann::json& number) {
    require<io_error>(number.is_number_integer(), who, ": key '", key, "': expected an integer, found ", number.dump());
  };
  try {
    if constexpr (std::integral<V> && !std::same_as<V, bool>) {
      whole(*found);
      require<io_error>(std::in_range<V>(found->get<std::int64_t>()), who, ": key '", key,
                        "': too large: ", found->dump());
    }
    if constexpr (std::same_as<V, std::vector<index_t>>)
      for (const auto& number : *found) whole(number);
    found->get_to(value);
  } catch (const nlohmann::json::exception&) {
    throw io_error(concat(who, ": key '", key, "': expected another type, found ", found->dump()));
  }
}

/// An activation by its published name; none: `value` stays. Throws io_error as `read_config_key`.
inline void read_activation(const nlohmann::json& json, const char* who, const char* key, activation& value) {
  static const std::map<std::string, activation> kinds{{"relu", activation::relu},
                                                       {"gelu", activation::gelu},
                                                       {"gelu_new", activation::gelu_tanh},
                                                       {"gelu_fast", activation::gelu_tanh},
                                                       {"gelu_pytorch_tanh", activation::gelu_tanh},
                                                       {"silu", activation::silu},
                                                       {"swish", activation::silu}};
  std::string name;
  read_config_key(json, who, key, name);
  if (name.empty()) return;
  require<io_error>(kinds.contains(name), who, ": key '", key,
                    "': expected relu, gelu, gelu_new, silu or swish, found '", name, "'");
  value = kinds.at(name);
}

/// Throws io_error unless the config is an object, and of one of the model types if it says which.
inline void require_model_type(const nlohmann::json& json, const char* who, std::initializer_list<const char*> types) {
  require<io_error>(json.is_object(), who, ": expected a JSON object, found a JSON ", json.type_name());
  std::string type;
  read_config_key(json, who, "model_type", type);
  std::string names;
  for (const char* t : types) names += (names.empty() ? "" : ", ") + std::string(t);
  require<io_error>(type.empty() || std::find(types.begin(), types.end(), type) != types.end(), who,
                    ": key 'model_type': expected one of ", names, ", found '", type, "'");
}

}  // namespace lithe::inline LITHE_ABI::detail
