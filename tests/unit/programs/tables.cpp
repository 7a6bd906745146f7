// How table programs begin and end: what they write, and when they leave an older file as it is.
#include <gtest/gtest.h>

#include "../../../examples/support/steps.hpp"
#if !defined(LITHE_BENCH_FLAGS)
#define LITHE_BENCH_FLAGS ""
#endif
#include "../../../bench/tables/table.hpp"

namespace programs_tables_tests {

using maker = std::function<void(const tables::options&, const lithe::context&, tables::table&)>;

/// A table program with a file of older results.
struct Table : testing::Test {
  std::filesystem::path file = std::filesystem::path(testing::TempDir()) / lithe::concat("table-", ::getpid(), ".json");
  std::string before = "older results\n";

  Table() { support::write_file(file.string(), before); }
  ~Table() override {
    std::filesystem::remove(file);
    support::detail::signal_number = 0;
    for (const int number : {SIGINT, SIGTERM}) std::signal(number, SIG_DFL);
  }
  int run(const maker& make, std::vector<std::string> more = {}) {
    std::vector<std::string> words{"folder/table_of_tests", "--workers", "1", "--json", file.string()};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    const int status = tables::main_of(static_cast<int>(arguments.size()), arguments.data(), make);
    out = testing::internal::GetCapturedStdout();
    error = testing::internal::GetCapturedStderr();
    return status;
  }
  std::string written() const { return support::read_file(file.string()); }
  std::string out, error;
};

void one_row(tables::table& t, const nlohmann::json& number) {
  t = {.title = "A table", .source = "A paper", .question = "What comes out?", .columns = {"name", "number"}};
  t.row({"a row", number});
  t.shown = true;
}

TEST_F(Table, writes_rows_verdict_and_skipped_steps) {
  const auto make = [](const tables::options& o, const lithe::context& ctx, tables::table& t) {
    EXPECT_EQ(o.workers, 1);
    EXPECT_EQ(ctx.exec->workers(), 1);
    one_row(t, 1.5);
    t.skipped = 3;
  };
  ASSERT_EQ(run(make), 0) << error;
  const auto j = nlohmann::json::parse(written());
  EXPECT_EQ(j["rows"], nlohmann::json::parse(R"([["a row", 1.5]])"));
  EXPECT_EQ(j["skipped_steps"], 3);
  EXPECT_EQ(j["verdict"],
            "The effect of the paper is seen here. Steps skipped because they were not finite: 3.");
  EXPECT_NE(out.find("seen here"), std::string::npos);
}
TEST_F(Table, leaves_the_older_file_when_training_cannot_recover) {
  const auto make = [](const tables::options&, const lithe::context&, tables::table&) {
    support::step_guard guard("one model");
    const double nan = std::numeric_limits<double>::quiet_NaN();
    while (true) static_cast<void>(guard.accepts(nan, nan));
  };
  EXPECT_EQ(run(make), 1);
  EXPECT_EQ(written(), before);
  EXPECT_TRUE(error.find("table_of_tests: one model: ") != error.npos && error.find("not finite") != error.npos) << error;
  EXPECT_EQ(error.find("folder/"), std::string::npos) << error;
}
TEST_F(Table, leaves_the_older_file_for_numbers_that_are_not_finite) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(run([&](const auto&, const auto&, tables::table& t) { one_row(t, bad); }), 1);
    EXPECT_EQ(written(), before);
    EXPECT_TRUE(error.find("'number'") != error.npos && error.find("a row") != error.npos) << error;
  }
}
TEST_F(Table, is_stopped_by_ctrl_c_and_shows_the_rows_so_far) {
  const auto make = [](const tables::options&, const lithe::context&, tables::table& t) {
    one_row(t, 1.5);
    std::raise(SIGINT);
    tables::progress("the next row", 0.5);
    t.row({"never", 2});
  };
  EXPECT_EQ(run(make), 130);
  EXPECT_EQ(written(), before);
  EXPECT_TRUE(out.find("a row") != out.npos && out.find("never") == out.npos) << out;
}
TEST_F(Table, tries_its_file_before_it_begins) {
  file = "/no/such/folder/results.json";
  bool begun = false;
  EXPECT_EQ(run([&](const auto&, const auto&, tables::table&) { begun = true; }), 1);
  EXPECT_FALSE(begun);
  EXPECT_TRUE(error.find("--json: ") != error.npos && error.find("/no/such/folder") != error.npos) << error;
}
TEST_F(Table, claims_no_more_than_its_rows_show) {
  tables::table t;
  one_row(t, 1.5);
  t.row({"another", 2.5});
  EXPECT_EQ(t.verdict(tables::length::full), "The effect of the paper is seen here.");
  t.last_row_is_against();
  EXPECT_EQ(t.verdict(tables::length::full),
            "The effect of the paper is seen in part; 1 of 2 rows, which are marked, go against it.");
  t.shown = false;
  EXPECT_EQ(t.verdict(tables::length::full),
            "The effect of the paper is not seen at this size; 1 of 2 rows, which are marked, go against it.");
  EXPECT_NE(t.verdict(tables::length::quick).find("quick run"), std::string::npos);
  testing::internal::CaptureStdout();
  t.print();
  EXPECT_NE(testing::internal::GetCapturedStdout().find("| *\n"), std::string::npos);
}
TEST_F(Table, has_digits_that_can_be_read) {
  EXPECT_EQ(tables::sentence("of ", 1.8360455507167848, " in ", 36036.4, " and ", 3, " ", 0.0176719F, "."),
            "of 1.836 in 36036 and 3 0.01767.");
}

}  // namespace programs_tables_tests
