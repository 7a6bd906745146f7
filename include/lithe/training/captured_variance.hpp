#pragma once

#include "lithe/training/reparametrise.hpp"

namespace lithe::inline LITHE_ABI {

/// How much of a matrix its k largest singular values hold: (σ_1² + ... + σ_k²) / Σ σ², for k = 1 .. n. All 1 for a zero matrix.
[[nodiscard]] inline std::vector<double> captured_variance(std::span<const double> sigma) {
  std::vector<double> out;
  double largest = 0, sum = 0;
  for (const double s : sigma) largest = std::max(largest, s);
  for (const double s : sigma)
    out.push_back(sum += largest == 0 ? 0 : s / largest * (s / largest));  // squares of small numbers are 0
  for (double& c : out) c = sum == 0 ? 1 : c / sum;
  return out;
}

/// The key-query products of one layer (arXiv 2006.16362, section 3.1): singular values, descending, of each head's Wq_hᵀ Wk_h and of the
/// concatenated heads' Wqᵀ Wk. Single heads are not of low rank; what they have in common often is.
struct key_query_spectrum {
  std::string name;
  std::vector<std::vector<double>> heads;  ///< d values each
  std::vector<double> all;                 ///< H d values (or the number of inputs, if that is less)
};
template <std::same_as<double> S = double>
[[nodiscard]] key_query_spectrum spectrum_of(std::string name, const key_query_weights& w, index_t heads) {
  const auto sigma = [](matrix_view<const double> a, matrix_view<const double> b) {
    const auto s = detail::svd_of_product<S>(a, b, false).sigma;
    return std::vector<double>(s.data(), s.data() + s.size());
  };
  key_query_spectrum out{std::move(name), {}, sigma(w.query, w.key)};
  const index_t d = w.query.rows() / heads;
  for (index_t h = 0; h < heads; ++h) out.heads.push_back(sigma(view(w.query).slice_rows(h * d, d), view(w.key).slice_rows(h * d, d)));
  return out;
}

/// {"layers": [{"name": ..., "heads": [[captured variance at k = 1 ..], ...], "all": [...]}, ...]}
[[nodiscard]] inline std::string to_json(std::span<const key_query_spectrum> layers) {
  std::ostringstream out;
  out.precision(9);
  const auto list = [&](const std::vector<double>& sigma) {
    out << '[';
    const auto c = captured_variance(sigma);
    for (std::size_t i = 0; i < c.size(); ++i) out << (i == 0 ? "" : ", ") << c[i];
    out << ']';
  };
  out << "{\"layers\": [";
  for (std::size_t l = 0; l < layers.size(); ++l) {
    out << (l == 0 ? "\n" : ",\n") << " {\"name\": \"";
    for (const char c : layers[l].name) out << (c == '"' || c == '\\' ? "\\" : "") << c;
    out << "\",\n  \"heads\": [";
    for (std::size_t h = 0; h < layers[l].heads.size(); ++h) {
      out << (h == 0 ? "" : ",\n            ");
      list(layers[l].heads[h]);
    }
    out << "],\n  \"all\": ";
    list(layers[l].all);
    out << '}';
  }
  out << "\n]}\n";
  return std::move(out).str();
}

/// The paper's figure: captured variance against the share of dimensions kept, a curve for each layer, single heads (their mean) on the
/// left, all heads together on the right.
[[nodiscard]] inline std::string to_svg(std::span<const key_query_spectrum> layers) {
  constexpr int width = 300, height = 220, left = 50, top = 40, gap = 60;
  std::ostringstream out;
  out.precision(4);
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << 2 * width + left + gap + 150 << "\" height=\"" << height + top + 50
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  const auto colour = [&](std::size_t l) {  // from light to dark with depth
    const int shade = layers.size() < 2 ? 40 : static_cast<int>(200 - 170 * l / (layers.size() - 1));
    return concat("rgb(", shade / 2, ",", shade, ",", 120 + shade / 2, ")");
  };
  for (int panel = 0; panel < 2; ++panel) {
    const int x0 = left + panel * (width + gap);
    out << "<text x=\"" << x0 + width / 2 << "\" y=\"" << top - 14 << "\" text-anchor=\"middle\">"
        << (panel == 0 ? "single heads (mean)" : "all heads together") << "</text>\n<rect x=\"" << x0 << "\" y=\"" << top << "\" width=\"" << width
        << "\" height=\"" << height << "\" fill=\"none\" stroke=\"#888\"/>\n";
    for (int tick = 0; tick <= 4; ++tick) {
      const int y = top + height - tick * height / 4, x = x0 + tick * width / 4;
      out << "<text x=\"" << x0 - 6 << "\" y=\"" << y + 4 << "\" text-anchor=\"end\">" << 25 * tick << "</text><text x=\"" << x << "\" y=\""
          << top + height + 16 << "\" text-anchor=\"middle\">" << 25 * tick << "</text>\n";
    }
    out << "<text x=\"" << x0 + width / 2 << "\" y=\"" << top + height + 36 << "\" text-anchor=\"middle\">% of dimensions kept</text>\n";
    for (std::size_t l = 0; l < layers.size(); ++l) {
      std::vector<double> curve;
      if (panel == 1) {
        curve = captured_variance(layers[l].all);
      } else {
        for (const auto& head : layers[l].heads) {
          const auto c = captured_variance(head);
          curve.resize(c.size());
          for (std::size_t i = 0; i < c.size(); ++i) curve[i] += c[i] / static_cast<double>(layers[l].heads.size());
        }
      }
      out << "<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"" << colour(l) << "\" points=\"" << x0 << "," << top + height;
      for (std::size_t i = 0; i < curve.size(); ++i)
        out << ' ' << x0 + width * static_cast<double>(i + 1) / static_cast<double>(curve.size()) << ',' << top + height * (1 - curve[i]);
      out << "\"/>\n";
      if (panel == 1)
        out << "<text x=\"" << x0 + width + 14 << "\" y=\"" << top + 12 + 14 * static_cast<int>(l) << "\" fill=\"" << colour(l) << "\">layer "
            << l + 1 << "</text>\n";
    }
  }
  out << "<text x=\"14\" y=\"" << top + height / 2 << "\" text-anchor=\"middle\" transform=\"rotate(-90 14 " << top + height / 2
      << ")\">% of variance captured</text>\n</svg>\n";
  return std::move(out).str();
}

}  // namespace lithe::inline LITHE_ABI
