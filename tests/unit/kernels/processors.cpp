#include "lithe/core/processors.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace processors_tests {

using namespace lithe;

/// The processors of a quota that these files of a control group state.
index_t quota(const std::vector<std::pair<std::string, std::string>>& files) {
  const auto root = std::filesystem::temp_directory_path() / ("lithe-processors-" + std::to_string(std::random_device{}()));
  for (const auto& [name, text] : files) {
    const auto path = root / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  const index_t n = detail::processors_of_quota(root.string());
  EXPECT_EQ(processors(root.string()), n > 0 ? std::min(n, processors("/nonexistent")) : processors("/nonexistent"));
  std::filesystem::remove_all(root);
  return n;
}

TEST(processors, a_quota_of_version_2_counts_rounded_up) {
  const auto of = [](const std::string& text) { return quota({{"sys/fs/cgroup/cpu.max", text}}); };
  EXPECT_EQ(of("200000 100000\n"), 2);
  EXPECT_EQ(of("150000 100000\n"), 2);
  EXPECT_EQ(of("50000 100000\n"), 1);
  EXPECT_EQ(of("1000 1000000\n"), 1);
  EXPECT_EQ(of("300000\n"), 3);
  EXPECT_EQ(of("9223372036854775807 1\n"), 9223372036854775807);
  for (const char* none : {"max 100000\n", "max\n", "", "\n", "-1 100000\n", "0 100000\n", "12x 100000\n", "99999999999999999999 1\n"})
    EXPECT_EQ(of(none), 0) << none;
}

TEST(processors, a_quota_of_version_1_counts_rounded_up) {
  for (const std::string mount : {"sys/fs/cgroup/cpu/", "sys/fs/cgroup/cpu,cpuacct/", "sys/fs/cgroup/cpuacct,cpu/"}) {
    EXPECT_EQ(quota({{mount + "cpu.cfs_quota_us", "250000\n"}, {mount + "cpu.cfs_period_us", "100000\n"}}), 3);
    EXPECT_EQ(quota({{mount + "cpu.cfs_quota_us", "-1\n"}, {mount + "cpu.cfs_period_us", "100000\n"}}), 0);
    EXPECT_EQ(quota({{mount + "cpu.cfs_quota_us", "400000\n"}}), 4);
  }
}

TEST(processors, the_smallest_quota_of_a_group_and_those_above_it_counts) {
  const std::string at = "sys/fs/cgroup/";
  const std::pair<std::string, std::string> group{"proc/self/cgroup", "0::/a.slice/b:c/d\n"};
  EXPECT_EQ(quota({group, {at + "a.slice/b:c/d/cpu.max", "300000 100000"}}), 3);
  EXPECT_EQ(quota({group, {at + "a.slice/b:c/d/cpu.max", "max 100000"}, {at + "a.slice/cpu.max", "500000 100000"}}), 5);
  EXPECT_EQ(quota({group, {at + "a.slice/b:c/d/cpu.max", "800000 100000"}, {at + "a.slice/cpu.max", "500000 100000"}}), 5);
  EXPECT_EQ(quota({group, {at + "a.slice/b:c/d/cpu.max", "200000 100000"}, {at + "cpu.max", "500000 100000"}}), 2);
  EXPECT_EQ(quota({group, {at + "elsewhere/cpu.max", "100000 100000"}}), 0);
  const std::pair<std::string, std::string> old{"proc/self/cgroup", "5:cpuset:/x\n4:cpu,cpuacct:/docker/f00\n1:name=systemd:/y\n0::/z\n"};
  EXPECT_EQ(quota({old, {at + "cpu,cpuacct/docker/f00/cpu.cfs_quota_us", "200000"}}), 2);
  EXPECT_EQ(quota({old, {at + "cpu/cpu.cfs_quota_us", "300000"}}), 3) << "the mount shows the container's own group";
  EXPECT_EQ(quota({old, {at + "cpu/x/cpu.cfs_quota_us", "100000"}}), 0) << "the path of another controller";
  EXPECT_EQ(quota({old, {at + "unified/z/cpu.max", "100000 100000"}}), 1);
}

TEST(processors, files_that_are_missing_or_make_no_sense_are_no_quota) {
  EXPECT_EQ(quota({}), 0);
  for (const char* text : {"", "\n", "0", "0:", "0::", "::::", "0::../../x\n", "no colons\n", "4:cpu:\n"})
    EXPECT_EQ(quota({{"proc/self/cgroup", text}}), 0) << text;
  EXPECT_GE(processors(), 1);
}

#if defined(__linux__)
TEST(processors, only_those_count_that_the_scheduler_may_use) {
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  EXPECT_EQ(processors("/nonexistent"), CPU_COUNT(&before));
  CPU_ZERO(&one);
  for (std::size_t i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
    if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(processors("/nonexistent"), 1);
  EXPECT_EQ(processors(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
}
#endif

}  // namespace processors_tests
