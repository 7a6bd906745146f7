#pragma once

// How far a run is, in one line that fits the terminal.

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace support {

/// Seconds of a clock that only goes forward.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* how, ...) {
  char out[256];
  std::va_list values;
  va_start(values, how);
  std::vsnprintf(out, sizeof out, how, values);
  va_end(values);
  return out;
}

/// The one spelling of a time: m:ss, from an hour on h:mm:ss; "?" for what is no time.
inline std::string duration(double seconds) {
  if (!(seconds >= 0 && seconds < 1e9)) return "?";
  const long s = std::lround(seconds);
  return s < 3600 ? format("%ld:%02ld", s / 60, s % 60) : format("%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
}

inline bool is_terminal(std::FILE* out) { return ::isatty(::fileno(out)) != 0; }
/// Whether a terminal is there that may be coloured (https://no-color.org).
inline bool may_colour(std::FILE* out) {
  const char *no = std::getenv("NO_COLOR"), *kind = std::getenv("TERM");
  return is_terminal(out) && (no == nullptr || *no == '\0') && (kind == nullptr || std::string_view(kind) != "dumb");
}
/// Columns of a terminal; 80 if it does not say.
inline std::size_t terminal_width(std::FILE* out) {
  winsize size{};
  return ::ioctl(::fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/// As many of the fields, in their order, as fit into `width` columns; the first one is cut if it must be. Empty ones
/// are left out.
inline std::string fitted(const std::vector<std::string>& fields, std::size_t width) {
  std::string line;
  for (const std::string& field : fields) {
    if (field.empty()) continue;
    const std::string next = line.empty() ? field : " | " + field;
    if (line.size() + next.size() > width) break;
    line += next;
  }
  return line.empty() && !fields.empty() ? fields.front().substr(0, width) : line;
}

/// A run's line of progress: on a terminal one line that is written over, elsewhere a line now and then.
class progress {
 public:
  /// Counts `what` from `first` up to `total`; 0: nobody knows how many there are, and only a terminal is told.
  explicit progress(std::string what, std::int64_t total, std::int64_t first = 0, std::FILE* out = stdout)
      : what_(std::move(what)), total_(total), first_(first), told_(first), out_(out), terminal_(is_terminal(out)) {}
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() { end(); }

  /// `done` of the total are done. The most important fields come first: those that do not fit are left out.
  void show(std::int64_t done, std::vector<std::string> fields = {}) {
    const double time = now();
    const bool last = total_ > 0 && done >= total_;
    if (!last &&
        (terminal_ ? time - told_at_ < 0.1 : total_ == 0 || (done - told_ < (total_ + 9) / 10 && time - told_at_ < 60)))
      return;
    told_ = done;
    told_at_ = time;
    const std::string count = what_ + " " + std::to_string(done);
    if (total_ > 0) {
      const double each = (time - begin_) / static_cast<double>(std::max<std::int64_t>(1, done - first_));
      fields.insert(fields.begin(), duration(each * static_cast<double>(total_ - done)) + " left");
      fields.insert(fields.begin(), count + "/" + std::to_string(total_));
    } else {
      fields.insert(fields.begin(), count);
    }
    const std::size_t width = terminal_ ? terminal_width(out_) - 1 : std::string::npos;
    const std::string line = fitted(fields, width);
    if (terminal_)
      std::fprintf(out_, "\r%-*s", static_cast<int>(std::min(width, std::max(line.size(), open_))), line.c_str());
    else
      std::fprintf(out_, "%s\n", line.c_str());
    open_ = terminal_ ? line.size() : 0;
    std::fflush(out_);
    if (last) end();
  }
  /// Ends the line, so that what is said next begins on one of its own.
  void end() {
    if (open_ > 0) std::fputc('\n', out_);
    open_ = 0;
  }
  /// Takes the line off the terminal.
  void clear() {
    if (open_ > 0) std::fprintf(out_, "\r%-*s\r", static_cast<int>(open_), "");
    open_ = 0;
    std::fflush(out_);
  }

 private:
  std::string what_;
  std::int64_t total_, first_, told_;
  std::FILE* out_;
  bool terminal_;
  std::size_t open_ = 0;  // columns of the line that stands on the terminal
  double begin_ = now(), told_at_ = terminal_ ? 0 : begin_;
};

}  // namespace support
