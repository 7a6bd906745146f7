#pragma once

#include <barrier>

#include "lithe/layers/memory/value_table.hpp"

namespace trials {

using namespace lithe;

/// Shards of one value table, and what stands for the network between the ranks that hold them: each rank is a thread of its own.
template <std::floating_point S>
struct shard_world {
  struct post {
    picks<S> read;
    matrix_view<const S> dy;
  };
  std::vector<dense_table<S>> shards;  // of equal size; rank r holds the slots r n .. (r + 1) n - 1
  std::vector<post> posts;
  std::barrier<> meet;

  explicit shard_world(std::vector<dense_table<S>> tables)
      : shards(std::move(tables)), posts(shards.size()), meet(static_cast<std::ptrdiff_t>(shards.size())) {}
  [[nodiscard]] index_t shard_rows() const { return shards.front().rows(); }
};

/// One rank's handle on a sharded table. Slots name rows of the whole table; gradient, read_row and write_row number the rank's own rows from
/// 0. `scatter_add` is collective: every rank calls it, and each gets what all of them send to its rows, in the order of the ranks.
template <std::floating_point S>
class sharded_table {
 public:
  using scalar = S;
  using gradient = shared_gradient<S>;

  sharded_table() = default;
  sharded_table(std::shared_ptr<shard_world<S>> world, std::size_t rank) : world_(std::move(world)), rank_(rank) {}

  [[nodiscard]] index_t slots() const { return world_ ? world_->shard_rows() * static_cast<index_t>(world_->shards.size()) : 0; }
  [[nodiscard]] index_t rows() const { return world_ ? world_->shard_rows() : 0; }
  [[nodiscard]] index_t cols() const { return world_ ? world_->shards.front().cols() : 0; }

  void gather_sum(picks<S> p, matrix_view<S> y, const context& ctx, update mode = update::assign) const {
    const scratch<slot_t> local(ctx, static_cast<index_t>(p.slots.size()));
    for (std::size_t r = 0; r < world_->shards.size(); ++r) {
      to_local(p.slots, r, local.span());
      world_->shards[r].gather_sum({local.span(), p.weights, p.per_token}, y, ctx, r == 0 ? mode : update::add);
    }
  }
  void row_dots(std::span<const slot_t> slots, index_t per_token, matrix_view<const S> dy, std::span<S> dw, const context& ctx) const {
    const scratch<slot_t> local(ctx, static_cast<index_t>(slots.size()));
    const scratch<S> part(ctx, static_cast<index_t>(slots.size()));
    std::fill(dw.begin(), dw.end(), S(0));
    for (std::size_t r = 0; r < world_->shards.size(); ++r) {
      to_local(slots, r, local.span());
      world_->shards[r].row_dots(local.span(), per_token, dy, part.span(), ctx);  // 0 where the row is another shard's
      for (std::size_t i = 0; i < dw.size(); ++i) dw[i] += part.span()[i];
    }
  }
  void scatter_add(picks<S> p, matrix_view<const S> dy, gradient& g, const context& ctx) const {
    world_->posts[rank_] = {p, dy};
    world_->meet.arrive_and_wait();
    for (const auto& sent : world_->posts) {
      const scratch<slot_t> local(ctx, static_cast<index_t>(sent.read.slots.size()));
      to_local(sent.read.slots, rank_, local.span());
      lithe::scatter_add<S>({local.span(), sent.read.weights, sent.read.per_token}, sent.dy, rows_of(g), ctx);
    }
    world_->meet.arrive_and_wait();  // the posts are views of the others' memory
  }
  void read_row(index_t i, std::span<S> out) const { world_->shards[rank_].read_row(i, out); }
  void write_row(index_t i, std::span<const S> in) { world_->shards[rank_].write_row(i, in); }

  // A handle, as shared_table is: its gradient is sized here and not by rows().
  [[nodiscard]] const void* identity() const { return world_ ? &world_->shards[rank_] : nullptr; }
  void share_gradient(std::shared_ptr<void>& handle, gradient& g) const {
    if (!handle) {
      auto target = std::make_shared<row_gradient<S>>();
      target->total_rows = rows();
      target->cols = cols();
      handle = std::move(target);
    }
    g.target = std::static_pointer_cast<row_gradient<S>>(handle);
  }

 private:
  void to_local(std::span<const slot_t> slots, std::size_t rank, std::span<slot_t> local) const {
    const auto n = static_cast<slot_t>(world_->shard_rows()), first = static_cast<slot_t>(rank) * n;
    for (std::size_t i = 0; i < slots.size(); ++i) local[i] = slots[i] >= first && slots[i] < first + n ? slots[i] - first : slot_t{-1};
  }

  std::shared_ptr<shard_world<S>> world_;
  std::size_t rank_ = 0;
};

}  // namespace trials
