#pragma once

// Words and how they are spoken.

#include <algorithm>
#include <fstream>
#include <lithe/core/error.hpp>
#include <lithe/core/random.hpp>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

using lithe::index_t;
using lithe::token_t;

inline constexpr token_t start_phone = 0, end_phone = 1, letters = 26;
inline constexpr index_t longest_word = 32, longest_answer = 24;

struct entry {
  std::string word;
  std::vector<token_t> spelling, phones;
};

/// The dictionary in three parts, shuffled: the first 1,000 words are never trained on, the next 500 choose thresholds.
struct dictionary {
  std::vector<std::string> phones{"<", ">"};
  std::vector<entry> test, tune, train;

  explicit dictionary(const std::string& path) {
    std::ifstream file(path);
    lithe::require<lithe::io_error>(file.good(), path, ": cannot be read");
    std::map<std::string, token_t> number;
    std::vector<entry> all;
    for (std::string line; std::getline(file, line);) {
      const auto tab = line.find('\t');
      lithe::require<lithe::io_error>(tab != std::string::npos, path, ": expected word, tab, phones, got '", line, "'");
      entry e;
      e.word = line.substr(0, tab);
      if (!spell(e.word, e.spelling)) continue;
      std::istringstream rest(line.substr(tab + 1));
      for (std::string phone; rest >> phone;) {
        const auto [it, fresh] = number.try_emplace(phone, static_cast<token_t>(phones.size()));
        if (fresh) phones.push_back(phone);
        e.phones.push_back(it->second);
      }
      if (!e.phones.empty() && static_cast<index_t>(e.phones.size()) < longest_answer) all.push_back(std::move(e));
    }
    lithe::require<lithe::io_error>(all.size() >= 3000, path, ": expected at least 3000 usable words, found ", all.size());
    std::vector<std::size_t> order(all.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [](std::size_t a, std::size_t b) { return lithe::philox({11}, a) < lithe::philox({11}, b); });
    for (std::size_t i = 0; i < order.size(); ++i) (i < 1000 ? test : i < 1500 ? tune : train).push_back(std::move(all[order[i]]));
  }

  /// The letters of a word; false if it has others.
  static bool spell(const std::string& word, std::vector<token_t>& out) {
    out.clear();
    for (const char c : word) {
      if (c < 'a' || c > 'z') return false;
      out.push_back(c - 'a');
    }
    return !out.empty() && static_cast<index_t>(out.size()) <= longest_word;
  }
};
