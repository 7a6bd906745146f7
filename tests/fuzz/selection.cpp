// Feeds lists full of ties, NaN and infinities to everything that selects: top-k, the product top-k and the bucket sort. Each answer must
// be that of a full stable sort. Meant for -fsanitize=address,undefined: lists stand in buffers of exactly their size. With clang:
// -DLITHE_LIBFUZZER -fsanitize=fuzzer; elsewhere main() below draws the bytes:
//
//     fuzz_selection [inputs = 10000] [seed = 1]
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <vector>

#include "lithe/core/random.hpp"
#include "lithe/kernels/bucket_sort.hpp"
#include "lithe/kernels/product_top_k.hpp"
#include "lithe/kernels/top_k.hpp"

namespace {

using namespace lithe;

void check(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "fuzz_selection: " << what << std::endl;
  std::abort();
}

/// Bytes as numbers; zeros after the last.
struct source {
  const std::uint8_t* data;
  std::size_t size;
  std::uint32_t take(std::size_t bytes) {
    std::uint32_t x = 0;
    for (std::size_t i = 0; i < bytes && size > 0; ++i, --size) x = x << 8 | *data++;
    return x;
  }
};

/// One score: mostly one of a few numbers, so that there are ties, sometimes any bits at all.
template <class S>
S score(source& in, std::uint32_t kinds) {
  static const S few[]{0, S(-0.0), 1, -1, 2, std::numeric_limits<S>::infinity(), -std::numeric_limits<S>::infinity(),
                       std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::denorm_min(), std::numeric_limits<S>::lowest()};
  const std::uint32_t byte = in.take(1);
  if (byte % 8 < kinds) return few[byte / 8 % std::size(few)];
  const std::uint32_t bits = in.take(4);
  float f;
  std::memcpy(&f, &bits, 4);
  return static_cast<S>(f);
}

/// The order that every selection promises: by value, NaN as -infinity, then by place.
template <class S>
std::vector<std::int32_t> sorted_order(const S* x, index_t n) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  const auto value = [&](std::int32_t i) { return std::isnan(x[i]) ? -std::numeric_limits<S>::infinity() : x[i]; };
  std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return value(i) > value(j); });
  return order;
}

template <class S>
void check_top_k(source in) {
  const std::uint32_t limit = in.take(1) % 4 == 0 ? 3000 : 200;
  const auto n = static_cast<index_t>(1 + in.take(2) % limit), k = static_cast<index_t>(1 + in.take(2) % static_cast<std::uint32_t>(n));
  const std::uint32_t kinds = in.take(1) % 9;
  const auto scores = std::make_unique<S[]>(static_cast<std::size_t>(n)), values = std::make_unique<S[]>(static_cast<std::size_t>(k));
  const auto indices = std::make_unique<std::int32_t[]>(static_cast<std::size_t>(k));
  for (index_t i = 0; i < n; ++i) scores[static_cast<std::size_t>(i)] = score<S>(in, kinds);
  top_k_row<S>(scores.get(), n, k, values.get(), indices.get(), {});
  const auto order = sorted_order(scores.get(), n);
  for (std::size_t j = 0; j < static_cast<std::size_t>(k); ++j) {
    const S want = scores[static_cast<std::size_t>(order[j])];
    check(indices[j] == order[j] && values[j] == (std::isnan(want) ? -std::numeric_limits<S>::infinity() : want), "top_k differs from a stable sort");
  }
}

template <class S>
void check_product(source in) {
  const auto k = static_cast<index_t>(1 + in.take(1) % 48);
  const auto final_k = static_cast<index_t>(1 + in.take(2) % static_cast<std::uint32_t>(in.take(1) % 2 == 0 ? k : k * k));
  const std::uint32_t kinds = in.take(1) % 9;
  const auto size = static_cast<std::size_t>(k);
  std::vector<S> half[2];
  for (auto& h : half) {  // sorted, and without NaN, as top-k leaves them
    std::vector<S> raw(size);
    for (S& x : raw) x = score<S>(in, kinds);
    for (const auto i : sorted_order(raw.data(), k)) {
      const S x = raw[static_cast<std::size_t>(i)];
      h.push_back(std::isnan(x) ? -std::numeric_limits<S>::infinity() : x);
    }
  }
  const auto sums = std::make_unique<S[]>(static_cast<std::size_t>(final_k));
  const auto pairs = std::make_unique<std::int32_t[]>(static_cast<std::size_t>(final_k));
  product_top_k_row<S>(half[0].data(), half[1].data(), k, final_k, sums.get(), pairs.get(), {});
  std::vector<S> all;
  for (const S a : half[0])
    for (const S b : half[1]) all.push_back(a + b);
  const auto order = sorted_order(all.data(), k * k);
  for (std::size_t j = 0; j < static_cast<std::size_t>(final_k); ++j) {
    check(pairs[j] >= 0 && pairs[j] < k * k, "product_top_k leaves the square");
    const S want = all[static_cast<std::size_t>(order[j])];
    if (want > -std::numeric_limits<S>::infinity()) check(pairs[j] == order[j] && sums[j] == want, "product_top_k differs from all sums sorted");
  }
}

void check_sort(source in) {
  const std::uint32_t buckets = 1 + in.take(2) % 300;
  std::vector<bucket_t> ids(in.take(2) % 2000);
  const bool bad = in.take(1) % 16 == 0;
  for (bucket_t& id : ids) id = static_cast<bucket_t>(in.take(2) % (bad ? buckets + 1 : buckets));
  std::vector<index_t> starts(buckets + 1, -1);
  std::vector<position_t> order(ids.size(), -1);
  const bool refused = std::any_of(ids.begin(), ids.end(), [&](bucket_t id) { return id >= buckets; });
  try {
    bucket_sort(ids, starts, order);
    check(!refused, "bucket_sort took an id that is no bucket");
  } catch (const index_error&) {
    return check(refused && starts[0] == -1, "bucket_sort refused good ids, or wrote before it refused");
  }
  std::vector<position_t> want(ids.size());
  std::iota(want.begin(), want.end(), 0);
  std::stable_sort(want.begin(), want.end(), [&](auto i, auto j) { return ids[static_cast<std::size_t>(i)] < ids[static_cast<std::size_t>(j)]; });
  check(order == want, "bucket_sort differs from a stable sort");
  for (std::uint32_t b = 0; b <= buckets; ++b)
    check(starts[b] == std::count_if(ids.begin(), ids.end(), [&](bucket_t id) { return id < b; }), "bucket_sort has a wrong start");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const source in{data + 1, size - 1};
  switch (data[0] % 5) {
    case 0: check_top_k<float>(in); break;
    case 1: check_top_k<double>(in); break;
    case 2: check_product<float>(in); break;
    case 3: check_product<double>(in); break;
    default: check_sort(in);
  }
  return 0;
}

#ifndef LITHE_LIBFUZZER
int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000, seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::cout << "fuzz_selection: " << count << " inputs, seed " << seed << std::endl;
  for (std::uint64_t i = 0; i < count; ++i) {
    const rng_key key = rng_key{seed}.child(i);
    std::vector<std::uint8_t> bytes(1 + philox(key, 0)[0] % (i % 10 == 0 ? 16384 : 1024));
    for (std::size_t b = 0; b < bytes.size(); ++b) bytes[b] = static_cast<std::uint8_t>(philox(key, 1 + b / 4)[b % 4]);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
#endif
