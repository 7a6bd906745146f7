// What the example programs share: lines of progress, text for terminals, options, files, steps that are skipped,
// signals.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "../../../examples/support/files.hpp"
#include "../../../examples/support/options.hpp"
#include "../../../examples/support/steps.hpp"
#include "../../../examples/support/terminal.hpp"
#include "../../../examples/support/text.hpp"

namespace programs_support_tests {

using namespace support;

const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();

/// A terminal of so many columns, and what was written to it.
struct terminal {
  int master = ::posix_openpt(O_RDWR | O_NOCTTY);
  std::FILE* out = nullptr;

  explicit terminal(std::size_t columns) {
    EXPECT_EQ(::grantpt(master), 0);
    EXPECT_EQ(::unlockpt(master), 0);
    out = ::fdopen(::open(::ptsname(master), O_RDWR | O_NOCTTY), "w");
    const winsize size{.ws_row = 24, .ws_col = static_cast<unsigned short>(columns), .ws_xpixel = 0, .ws_ypixel = 0};
    EXPECT_EQ(::ioctl(master, TIOCSWINSZ, &size), 0);
  }
  ~terminal() {
    std::fclose(out);
    ::close(master);
  }
  std::string written() {
    std::fflush(out);
    ::fcntl(master, F_SETFL, O_NONBLOCK);
    std::string all;
    char piece[1024];
    for (ssize_t n; (n = ::read(master, piece, sizeof piece)) > 0;) all.append(piece, static_cast<std::size_t>(n));
    return all;
  }
};
/// What a file gets.
template <class F>
std::string written_to_file(F&& write) {
  std::FILE* file = std::tmpfile();
  write(file);
  std::rewind(file);
  std::string all(1 << 16, '\0');
  all.resize(std::fread(all.data(), 1, all.size(), file));
  std::fclose(file);
  return all;
}

/// The most columns between returns and newlines.
std::size_t widest(const std::string& text) {
  std::size_t most = 0, here = 0;
  for (const char c : text) {
    here = c == '\r' || c == '\n' ? 0 : here + 1;
    most = std::max(most, here);
  }
  return most;
}

TEST(programs_support, progress_stays_on_one_line_of_the_terminal) {
  for (const std::size_t columns : {20, 40, 80, 200}) {
    terminal t(columns);
    {
      progress line("step", 500, 0, t.out);
      for (int step = 1; step <= 500; ++step)
        line.show(step, {std::string(30, 'a'), std::string(30, 'b'), std::string(30, 'c')});
    }
    const std::string text = t.written();
    EXPECT_LT(widest(text), columns);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
    EXPECT_NE(text.find("step 500/500"), text.npos);
  }
}
TEST(programs_support, progress_says_a_line_now_and_then_where_there_is_no_terminal) {
  const std::string text = written_to_file([](std::FILE* file) {
    progress line("step", 1000, 0, file);
    for (int step = 1; step <= 1000; ++step) line.show(step, {std::string(100, 'a')});
  });
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 10);
  EXPECT_EQ(text.find('\r'), text.npos);
  EXPECT_NE(text.find("step 1000/1000 | 0:00 left | " + std::string(100, 'a') + "\n"), text.npos);
}
TEST(programs_support, progress_of_an_unknown_total_is_for_terminals_alone_and_is_wiped) {
  EXPECT_EQ(written_to_file([](std::FILE* file) { progress("sweep", 0, 0, file).show(3); }), "");
  terminal t(80);
  progress line("sweep", 0, 0, t.out);
  line.show(3);
  line.clear();
  EXPECT_EQ(t.written(), "\rsweep 3\r       \r");
}
TEST(programs_support, times_have_one_spelling) {
  EXPECT_EQ(duration(0), "0:00");
  EXPECT_EQ(duration(59.6), "1:00");
  EXPECT_EQ(duration(3599), "59:59");
  EXPECT_EQ(duration(3600), "1:00:00");
  EXPECT_EQ(duration(36061), "10:01:01");
  EXPECT_EQ(duration(infinity), "?");
  EXPECT_EQ(duration(nan), "?");
}

TEST(programs_support, a_letter_is_told_from_its_beginning_and_from_stray_bytes) {
  const auto is = [](std::string_view text, std::size_t bytes, bool letter) {
    const beginning b = beginning_of(text);
    return b.bytes == bytes && b.letter == letter;
  };
  EXPECT_TRUE(is(std::string_view("\0", 1), 1, true));
  EXPECT_TRUE(is("a\xC3", 1, true));
  EXPECT_TRUE(is("\xC3\xA9x", 2, true));
  EXPECT_TRUE(is("\xE2\x82\xAC", 3, true));
  EXPECT_TRUE(is("\xF0\x9F\x98\x80", 4, true));
  for (const char* part : {"\xC3", "\xE2", "\xE2\x82", "\xF0\x9F\x98"}) EXPECT_TRUE(is(part, 0, true)) << part;
  for (const char* stray :
       {"\x80", "\xC0\x80", "\xC3(", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"})
    EXPECT_TRUE(is(stray, 1, false)) << stray;
}
TEST(programs_support, nothing_that_a_terminal_obeys_reaches_it) {
  EXPECT_EQ(shown("a\tb\n"), "a\tb\n");
  EXPECT_EQ(shown(std::string_view("\0\x1b[2J\r\x7f", 7)), "\\x00\\x1b[2J\\x0d\\x7f");
  EXPECT_EQ(shown("\xC2\x9B\xC2\xA9"), "\\xc2\\x9b\xC2\xA9");                   // a C1 control, and a letter beside it
  EXPECT_EQ(shown("\xE2\x80\xAE\xE2\x82\xAC"), "\\xe2\\x80\\xae\xE2\x82\xAC");  // a mark that turns the line around
  EXPECT_EQ(shown("x\xC3"), "x\\xc3");
  EXPECT_EQ(shown("\xFF"
                  "a"),
            "\\xffa");
  for (int byte = 0; byte < 256; ++byte)
    for (const char c : shown(std::string(1, static_cast<char>(byte))))
      EXPECT_TRUE((c >= ' ' && c < 127) || c == '\t' || c == '\n') << byte;
}
TEST(programs_support, a_file_gets_all_bytes_and_each_letter_at_once) {
  const std::string text("a\0b\xC3\xA9\x1b\xFF\xE2\x82\xAC", 11);
  EXPECT_EQ(written_to_file([&](std::FILE* file) {
              byte_writer out(file);
              out.put(text);
              out.end();
            }),
            text + "\n");
  std::FILE* file = std::tmpfile();
  byte_writer out(file);
  const auto size = [&] { return std::filesystem::file_size("/proc/self/fd/" + std::to_string(::fileno(file))); };
  out.put('\xE2');
  out.put('\x82');
  EXPECT_EQ(size(), 0U);
  out.put('\xAC');
  EXPECT_EQ(size(), 3U);
  out.put('\xE2');
  EXPECT_EQ(size(), 3U);
  out.end();
  EXPECT_EQ(size(), 5U);
  std::fclose(file);
}
TEST(programs_support, colours_stand_around_whole_letters) {
  ::setenv("TERM", "xterm-256color", 1);
  ::unsetenv("NO_COLOR");
  terminal t(80);
  byte_writer out(t.out, 2);
  out.put("p");
  out.put('\xC3', 2);
  out.put('\xA9', 1);
  out.put('\0', 1);
  out.put('\n', 1);
  out.end();
  EXPECT_EQ(t.written(), "p\033[38;5;196m\xC3\xA9\033[0m\033[38;5;46m\\x00\033[0m\r\n\r\n");
}
TEST(programs_support, without_colours_digits_stand_below_their_letters) {
  const std::string text = written_to_file([](std::FILE* file) {
    byte_writer out(file, 4);
    out.put("ab\nc");
    out.put('\xC3', 1);
    out.put('\xA9', 3);
    out.put('\x01', 2);
    out.put('\n', 4);
    out.put('x', 1);
    out.end();
  });
  EXPECT_EQ(text, "ab\nc\xC3\xA9\\x01\n 322224\nx\n1\n");
}

TEST(programs_support, ranges_refuse_what_lies_outside_in_plain_numbers) {
  const auto refusal = [](CLI::Validator v, std::string text) { return v(text); };
  EXPECT_EQ(refusal(between<long>(1, 64), "64"), "");
  EXPECT_EQ(refusal(between<long>(1, 64), "0"), "expected 1 to 64, got 0");
  EXPECT_EQ(refusal(between<long>(1, 64), "1e3"), "expected 1 to 64, got 1e3");
  EXPECT_EQ(refusal(between(0.0, 1.0), "7"), "expected 0 to 1, got 7");
  EXPECT_EQ(refusal(between(0.0, 1.0), "nan"), "expected 0 to 1, got nan");
  EXPECT_EQ(refusal(between(1e-6, 10.0), "inf"), "expected 1e-06 to 10, got inf");
  CLI::App app;
  std::uint64_t seed = 1;
  int workers = 0;
  add_seed(app, seed, "of the run");
  add_workers(app, workers);
  EXPECT_THROW(app.parse("--seed -1"), CLI::ValidationError);
  EXPECT_THROW(app.parse("--workers -3"), CLI::ValidationError);
  app.parse("--seed 18446744073709551615 --workers 2");
  EXPECT_EQ(seed, 18446744073709551615U);
  EXPECT_EQ(make_executor(workers).workers(), 2);
  EXPECT_GE(make_executor(0).workers(), 1);
}
TEST(programs_support, words_are_quoted_for_a_shell) {
  EXPECT_EQ(quoted("build/model-2.safetensors"), "build/model-2.safetensors");
  EXPECT_EQ(quoted("my model"), "'my model'");
  EXPECT_EQ(quoted("it's"), "'it'\\''s'");
  EXPECT_EQ(quoted(""), "''");
}

TEST(programs_support, steps_that_are_not_finite_are_skipped_and_end_the_run) {
  step_guard guard("dense");
  EXPECT_TRUE(guard.accepts(1, 1));
  EXPECT_FALSE(guard.accepts(nan, 1));
  EXPECT_FALSE(guard.accepts(1, infinity));
  EXPECT_THROW(guard.check(), diverged);
  EXPECT_TRUE(guard.accepts(1, 1));
  guard.check();
  EXPECT_EQ(guard.skipped(), 2);
  EXPECT_EQ(guard.report(), "2 steps skipped");
  for (int i = 1; i < step_guard::patience; ++i) EXPECT_FALSE(guard.accepts(1, nan));
  EXPECT_THROW((void)guard.accepts(infinity, 1), diverged);
}

/// A folder of its own, which is gone at the end.
struct folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("lithe_programs_" + std::to_string(::getpid()));
  folder() { std::filesystem::create_directory(path); }
  ~folder() { std::filesystem::remove_all(path); }
  [[nodiscard]] std::string operator/(const char* name) const { return (path / name).string(); }
};
template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const lithe::io_error& e) {
    return e.what();
  }
  return "";
}

TEST(programs_support, outputs_are_tried_at_the_start) {
  const folder at;
  outputs files;
  write_file(at / "text", "words");
  files.reads(at / "text");
  files.add("--save", "");
  EXPECT_EQ(refusal([&] { files.add("--plot", at / "none/x"); }),
            "--plot: " + (at / "none/x") + ": cannot be created: No such file or directory");
  EXPECT_NE(refusal([&] { files.add_lines("--results", at / "none/x"); }), "");
  EXPECT_EQ(refusal([&] { files.add("--save", at / "text"); }),
            "--save: " + (at / "text") + ": is read by this run and is not replaced");
  files.add("--save", at / "model");
  EXPECT_EQ(refusal([&] { files.add("--plot", at / "./model"); }),
            "--plot: " + (at / "./model") + ": is written by --save already");
  files.add_lines("--results", at / "results");
  EXPECT_FALSE(std::filesystem::exists(at / "results"));
  write_file(at / "notes", "words");
  EXPECT_EQ(refusal([&] { files.add_model("--save", at / "notes"); }),
            "--save: " + (at / "notes") + ": holds no model of these programs and is not replaced");
  EXPECT_EQ(read_file(at / "notes"), "words");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(at.path), {}), 2);
}
TEST(programs_support, a_file_of_another_program_is_refused_by_name) {
  const folder at;
  const lithe::linear<float> layer({.inputs = 2, .outputs = 2}, lithe::rng_key{1});
  const auto saved = [&](const char* name, lithe::metadata_map metadata) {
    lithe::save_model(at / name, layer, std::move(metadata));
    return at / name;
  };
  EXPECT_EQ(writer_of(read_saved(saved("new", {{"program", "train_exits"}}), {"train_language_model", "train_exits"})),
            "train_exits");
  for (const auto& [key, program] : {std::pair{"memory_at", "train_language_model"},
                                     {"head_width", "long_context"},
                                     {"blocks_per_exit", "all_together"},
                                     {"encoder_blocks", "adaptive_pronunciation"}}) {
    const std::string old = saved("old", {{"config", std::string("{\"") + key + "\": 1}"}});
    EXPECT_EQ(writer_of(read_saved(old, {program})), program);
    EXPECT_EQ(
        refusal([&] {
          read_saved(old, {"duplication_task", "compress_attention"});
        }),
        old + ": expected a model saved by duplication_task or compress_attention, found one saved by " + program);
  }
  EXPECT_EQ(writer_of({{"config", "{\"memory_at\": 1}"}, {"exits", "geometric"}}), "train_exits");
  EXPECT_EQ(writer_of({{"config", "{\"memory_at\": 1}"}, {"key_width", "8"}}), "compress_attention");
  const std::string foreign = saved("foreign", {});
  EXPECT_EQ(refusal([&] { read_saved(foreign, {"train_exits"}); }),
            foreign + ": expected a model saved by train_exits, found a file of none of these programs");
}
TEST(programs_support, a_name_that_is_taken_gets_a_number) {
  const folder at;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(at.path);
  EXPECT_EQ(free_name("model.safetensors"), "model.safetensors");
  write_file("model.safetensors", "");
  EXPECT_EQ(free_name("model.safetensors"), "model-2.safetensors");
  write_file("model-2.safetensors", "");
  EXPECT_EQ(free_name("model.safetensors"), "model-3.safetensors");
  std::filesystem::current_path(before);
}

TEST(programs_support, signals_ask_for_an_end_and_two_at_once_are_one) {
  EXPECT_FALSE(stop_asked());
  EXPECT_EXIT(
      {
        catch_signals();
        std::raise(SIGTERM);
        std::raise(SIGTERM);
        std::exit(stop_asked() ? stop_status() : 0);
      },
      testing::ExitedWithCode(128 + SIGTERM), "");
}

}  // namespace programs_support_tests
