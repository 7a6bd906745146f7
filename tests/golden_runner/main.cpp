// Compares Lithe with vectors made by the authors' own code: golden_runner [--float] FILE-OR-DIR...
//
// One line a file: PASS|FAIL|SKIP name n_outputs n_gradients max_rel_err_output max_rel_err_gradient reason; then a line of counts. Exits 1 on
// a failure. What a file is, its metadata says; its own name means nothing.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "golden_runner/golden_case.hpp"

namespace {

using namespace golden;

struct counts {
  int passed = 0, failed = 0, skipped = 0;
};

template <class S>
struct family {
  const char* prefix;
  void (*run)(golden_case<S>&);
};

template <class S>
void run_family(golden_case<S>& c, const std::string& name) {
  static const family<S> families[] = {
      {"attention_", run_attention<S>}, {"collab_", run_collaborative<S>}, {"xlm_", run_memory<S>},          {"lucid_", run_memory<S>}, {"fbmem_", run_memory<S>},
      {"ultramem_memory_plus", run_memory<S>}, {"optimizer_", run_optimiser<S>}, {"loss_", run_loss<S>},
      {"halt_", run_exits<S>}, {"exit_", run_exits<S>},
      {"moe_", run_moe<S>},              {"ultramem_", run_ultra_mem<S>}, {"local_", run_local<S>}, {"bucket_attention_", run_bucket<S>}, {"lsh_", run_lsh<S>},
      {"reformer_layer_", run_reformer<S>}, {"reformer_lm_", run_reformer<S>},
  };
  for (const auto& f : families)
    if (name.starts_with(f.prefix)) return f.run(c);
  throw skipped("no system of this kind here yet");
}

template <class S>
void run_file(const std::filesystem::path& path, counts& n) {
  std::string name = path.filename().string();
  const auto print = [&](const char* verdict, int outputs, int gradients, double output, double gradient, const std::string& reason) {
    std::printf("%s %s %d %d %.2e %.2e %s\n", verdict, name.c_str(), outputs, gradients, output, gradient, reason.c_str());
  };
  try {
    const safetensors_file file(path);
    if (!file.metadata().contains("case") || !file.metadata().contains("config")) throw skipped("its metadata names no case and config");
    name = file.metadata().at("case");
    golden_case<S> c(file);
    try {
      run_family(c, name);
      c.check_all_compared();
    } catch (const skipped&) {
      throw;
    } catch (const std::exception& e) {
      c.failures.push_back(e.what());
    }
    std::string reason = c.failures.empty() ? "ok" : c.failures.front();
    if (c.failures.size() > 1) reason += concat(" (and ", c.failures.size() - 1, " more)");
    print(c.failures.empty() ? "PASS" : "FAIL", c.outputs.count, c.gradients.count, c.outputs.worst, c.gradients.worst, reason);
    ++(c.failures.empty() ? n.passed : n.failed);
  } catch (const skipped& e) {
    print("SKIP", 0, 0, 0, 0, e.what());
    ++n.skipped;
  } catch (const std::exception& e) {
    print("FAIL", 0, 0, 0, 0, e.what());
    ++n.failed;
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool in_float = false;
  std::vector<std::filesystem::path> files;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--float") == 0) {
      in_float = true;
    } else if (std::filesystem::is_directory(argv[i])) {
      for (const auto& entry : std::filesystem::directory_iterator(argv[i]))
        if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    } else {
      files.emplace_back(argv[i]);
    }
  }
  if (files.empty()) {
    std::fprintf(stderr, "usage: golden_runner [--float] FILE-OR-DIR...   (no safetensors file was found)\n");
    return 2;
  }
  std::sort(files.begin(), files.end());
  counts n;
  for (const auto& file : files) in_float ? run_file<float>(file, n) : run_file<double>(file, n);
  std::printf("%d passed, %d failed, %d skipped\n", n.passed, n.failed, n.skipped);
  return n.failed > 0 ? 1 : 0;
}
