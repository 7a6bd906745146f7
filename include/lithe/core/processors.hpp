#pragma once

#include <algorithm>
#include <charconv>
#include <fstream>
#include <string>
#include <thread>
#include <utility>
#if defined(__linux__)
#include <sched.h>
#endif

#include "lithe/core/config.hpp"

namespace lithe::inline LITHE_ABI {

namespace detail {

/// A number of a file of the kernel's, or `otherwise` if there is none that is positive ("max", -1, an empty or missing file).
inline long long positive(const std::string& word, long long otherwise) {
  long long n = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), n);
  return error == std::errc{} && end == word.data() + word.size() && n > 0 ? n : otherwise;
}

/// The least number of processors that a quota of `directory` or of one above it, up to `mount`, allows; 0: no quota.
inline index_t quota_at(const std::string& mount, std::string directory) {
  index_t least = 0;
  const auto read = [](const std::string& path) {
    std::ifstream file(path);
    std::string quota, period;
    file >> quota >> period;
    return std::pair(quota, period);
  };
  for (;;) {
    while (directory.ends_with('/')) directory.pop_back();
    const std::string here = mount + directory;
    auto [quota, period] = read(here + "/cpu.max");  // version 2: "quota period"
    if (quota.empty()) {  // version 1: a file for each
      quota = read(here + "/cpu.cfs_quota_us").first;
      period = read(here + "/cpu.cfs_period_us").first;
    }
    if (const long long time = positive(quota, 0), of = positive(period, 100000); time > 0) {
      const auto n = static_cast<index_t>(time / of + (time % of != 0 ? 1 : 0));
      least = least == 0 ? n : std::min(least, n);
    }
    if (directory.empty()) return least;
    const auto slash = directory.rfind('/');
    directory.resize(slash == std::string::npos ? 0 : slash);
  }
}

/// The processors that the quota of this process's control group allows, rounded up; 0: no quota. `root` stands for "/".
inline index_t processors_of_quota(const std::string& root) {
  index_t least = 0;
  const auto look = [&](const char* mount, const std::string& directory) {
    const index_t n = quota_at(root + "/sys/fs/cgroup" + mount, directory);
    if (n > 0) least = least == 0 ? n : std::min(least, n);
  };
  // A container may be shown the path of its group on the host beside a mount of the group itself: the mount's own files
  // count in any case.
  std::string unified = "/", divided = "/";
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
    if (controllers == ",,") unified = line.substr(second + 1);
    if (controllers.find(",cpu,") != std::string::npos) divided = line.substr(second + 1);
  }
  for (const char* mount : {"", "/unified"}) look(mount, unified);
  for (const char* mount : {"/cpu", "/cpu,cpuacct", "/cpuacct,cpu"}) look(mount, divided);
  return least;
}

/// The processors that the scheduler may run the calling thread on.
inline index_t processors_of_affinity() {
#if defined(__linux__)
  for (int most = 1024; most <= 1 << 20; most *= 2) {  // the kernel refuses a set that is smaller than its own
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(most));
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
    const int n = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (n > 0) return n;
  }
#endif
  return static_cast<index_t>(std::max(1U, std::thread::hardware_concurrency()));
}

}  // namespace detail

/// How many processors this process may use at a time, at least 1: those that its affinity allows (`taskset`), or fewer
/// where a Linux control group has a quota (containers; versions 1 and 2; 1.5 processors count as 2). On other systems all
/// that the machine has. The control group is read below `root`.
[[nodiscard]] inline index_t processors(const std::string& root = "") {
  const index_t allowed = detail::processors_of_affinity(), quota = detail::processors_of_quota(root);
  return quota > 0 ? std::min(allowed, quota) : allowed;
}

}  // namespace lithe::inline LITHE_ABI
