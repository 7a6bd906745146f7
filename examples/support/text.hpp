#pragma once

// Text of a byte model on its way out: letters stay whole, and a terminal gets nothing that it would obey.

#include <cstdio>
#include <string>
#include <string_view>

#include "terminal.hpp"

namespace support {

/// What a text begins with: a UTF-8 letter of `bytes` bytes, the beginning of one (0 bytes), or a byte that is in none.
struct beginning {
  std::size_t bytes;
  bool letter;
};
inline beginning beginning_of(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {1, true};
  const std::size_t bytes = lead >= 0xC2 && lead < 0xE0   ? 2
                            : lead >= 0xE0 && lead < 0xF0 ? 3
                            : lead >= 0xF0 && lead < 0xF5 ? 4
                                                          : 0;
  if (bytes == 0) return {1, false};
  for (std::size_t i = 1; i < bytes; ++i) {
    if (i == text.size()) return {0, true};
    // The second byte leaves out what has a shorter form, surrogates and what is beyond the last letter.
    const unsigned low = i > 1 ? 0x80U : lead == 0xE0 ? 0xA0U : lead == 0xF0 ? 0x90U : 0x80U;
    const unsigned high = i > 1 ? 0xBFU : lead == 0xED ? 0x9FU : lead == 0xF4 ? 0x8FU : 0xBFU;
    if (byte(i) < low || byte(i) > high) return {1, false};
  }
  return {bytes, true};
}

/// A letter, or a byte in none, as a terminal may get it: what it would obey (control bytes but tab and newline, marks
/// of direction) as \xNN.
inline std::string shown(std::string_view piece, bool letter) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(piece[i]); };
  const auto one = [&](std::string_view first, unsigned low, unsigned high) {
    return piece.size() == first.size() + 1 && piece.starts_with(first) && byte(first.size()) >= low &&
           byte(first.size()) <= high;
  };
  const bool obeyed = (one("", 0, 0x1F) && piece != "\t" && piece != "\n") || piece == "\x7F" ||
                      one("\xC2", 0x80, 0x9F) || one("\xE2\x80", 0x8E, 0x8F) || one("\xE2\x80", 0xA8, 0xAE) ||
                      one("\xE2\x81", 0xA6, 0xA9);
  if (letter && !obeyed) return std::string(piece);
  std::string out;
  for (std::size_t i = 0; i < piece.size(); ++i) out += format("\\x%02x", byte(i));
  return out;
}
/// A whole text so.
inline std::string shown(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const beginning b = beginning_of(text);
    const std::size_t n = b.bytes == 0 ? 1 : b.bytes;
    out += shown(text.substr(0, n), b.bytes != 0 && b.letter);
    text.remove_prefix(n);
  }
  return out;
}

/// The colour of a depth among `exits`: green left early, red went to the top.
inline int depth_colour(int exit, int exits) {
  constexpr int ramp[] = {46, 118, 190, 226, 214, 202, 196};
  return ramp[exits > 1 ? (exit - 1) * 6 / (exits - 1) : 0];
}
/// What the colours mean, in one line.
inline void print_legend(std::FILE* out, const char* what, int exits) {
  std::fprintf(out, "%s:", what);
  for (int n = 1; n <= exits; ++n) std::fprintf(out, " \033[38;5;%dm%d\033[0m", depth_colour(n, exits), n);
  std::fputc('\n', out);
}

/// Writes a text byte by byte as it comes, each letter as soon as it is whole. A terminal gets it as `shown`, anything
/// else byte for byte. With exits each letter has the depth of its deepest byte: a colour, or where there are none a
/// digit below.
class byte_writer {
 public:
  explicit byte_writer(std::FILE* out, int exits = 0)
      : out_(out), exits_(exits), safe_(exits > 0 || is_terminal(out)), colours_(exits > 0 && may_colour(out)) {}

  /// `exit`: the block after which the byte left, 0 for a byte of a prompt.
  void put(char byte, int exit = 0) {
    waiting_ += byte;
    depth_ = std::max(depth_, exit);
    for (beginning b; !waiting_.empty() && (b = beginning_of(waiting_)).bytes > 0;) write(b.bytes, b.letter);
    std::fflush(out_);
  }
  void put(std::string_view text) {
    for (const char byte : text) put(byte);
  }
  /// Writes what was no whole letter at the end of the text, and ends the line.
  void end() {
    while (!waiting_.empty()) write(1, false);
    std::fputc('\n', out_);
    write_digits();
    std::fflush(out_);
  }

 private:
  void write(std::size_t bytes, bool letter) {
    const std::string piece = waiting_.substr(0, bytes), text = safe_ ? shown(piece, letter) : piece;
    const bool newline = piece == "\n";
    if (colours_ && depth_ > 0 && !newline)
      std::fprintf(out_, "\033[38;5;%dm%s\033[0m", depth_colour(depth_, exits_), text.c_str());
    else
      std::fwrite(text.data(), 1, text.size(), out_);
    if (exits_ > 0 && !colours_) {
      const char digit = depth_ == 0 ? ' ' : depth_ < 10 ? static_cast<char>('0' + depth_) : '+';
      digits_ += piece == "\t" ? "\t" : std::string(text == piece ? 1 : text.size(), digit);
      if (newline) write_digits();
    }
    waiting_.erase(0, bytes);
    if (waiting_.empty()) depth_ = 0;
  }
  void write_digits() {
    if (digits_.find_first_not_of(" \t") != std::string::npos) std::fprintf(out_, "%s\n", digits_.c_str());
    digits_.clear();
  }

  std::FILE* out_;
  int exits_, depth_ = 0;  // depth_: of the bytes that wait for the rest of their letter
  bool safe_, colours_;
  std::string waiting_, digits_;
};

}  // namespace support
