// Where the keys of a tile lie, and getting them into the cache in time. Part of attention_kernel.hpp; see there.
#pragma once

#include "attention.hpp"
#include "simd.hpp"

namespace radixkv::attention::RADIXKV_ISA {

RADIXKV_INLINE int min_int(int a, int b) { return a < b ? a : b; }
RADIXKV_INLINE int max_int(int a, int b) { return a > b ? a : b; }
RADIXKV_INLINE std::int64_t min_int64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
RADIXKV_INLINE std::int64_t max_int64(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// The addresses of a tile's keys and values in the block's first head. Keys after the last are the last one again, up
// to whole vectors: their scores are computed and not used.
struct Addresses {
  int count;
  const char* keys[kTileKeys];
  const char* values[kTileKeys];
};

// The tile at hand of one block, and the one after it, which is loaded into the L2 cache meanwhile.
//
// Pages are short runs of memory that lie anywhere, which hardware prefetchers do not foresee, and a core keeps few
// loads in flight. So memory is the bottleneck of decode unless some loads are in flight all the time: between any two
// pieces of work the kernel calls tick(), which prefetches the next few keys and values.
class Tiles {
 public:
  Tiles(const Batch& batch, const Block& block, std::int64_t bytes) : batch_(batch), block_(block), bytes_(bytes) {
    const std::int64_t head_bytes = batch.layout.head_dim * bytes;
    const std::int64_t heads = block.head_end - block.head_begin;
    const bool together = batch.layout.head_stride == batch.layout.head_dim;
    num_runs_ = together ? 1 : heads;
    run_bytes_ = together ? heads * head_bytes : head_bytes;
    run_stride_ = together ? run_bytes_ : batch.layout.head_stride * bytes;
  }

  const Addresses& here() const { return tiles_[turn_]; }

  // The first tile: keys [begin, end), at most a tile of them.
  void start(std::int64_t begin, std::int64_t end) {
    resolve(begin, end, tiles_[turn_ ^ 1]);
    fetched_ = 0;
    fetch(2 * kTileKeys);
  }

  // Goes on to the next tile; after it comes one of keys [begin, end). It is fetched within so many ticks.
  void advance(std::int64_t begin, std::int64_t end) {
    turn_ ^= 1;
    resolve(begin, end, tiles_[turn_ ^ 1]);
    fetched_ = ticks_ = 0;
  }
  void expect_ticks(int ticks) { total_ticks_ = ticks; }

  __attribute__((always_inline)) void tick() {
    ++ticks_;
    fetch(min_int(ticks_, total_ticks_) * (2 * kTileKeys) / total_ticks_);
  }

 private:
  void resolve(std::int64_t begin, std::int64_t end, Addresses& to) const {
    const KvLayout& layout = batch_.layout;
    const std::int32_t* pages = batch_.table.kv_indices + batch_.table.kv_indptr[block_.request];
    const std::int64_t first_head = block_.head_begin * layout.head_stride;
    std::int64_t page = begin / layout.page_size;
    std::int64_t slot = begin % layout.page_size;
    to.count = static_cast<int>(max_int64(0, min_int64(end - begin, kTileKeys)));
    for (int i = 0; i < to.count;) {
      const int run = min_int(to.count - i, static_cast<int>(layout.page_size - slot));
      std::int64_t at = pages[page] * layout.page_stride + slot * layout.slot_stride + first_head;
      for (const int stop = i + run; i < stop; ++i, at += layout.slot_stride) {
        to.keys[i] = static_cast<const char*>(batch_.k_cache) + at * bytes_;
        to.values[i] = static_cast<const char*>(batch_.v_cache) + at * bytes_;
      }
      ++page;
      slot = 0;
    }
    if (to.count == 0) return;
    for (int i = to.count; i % kLanes != 0; ++i) to.keys[i] = to.keys[to.count - 1];
  }

  // Of the next tile, first keys and then values, those up to `until`, of all heads of the block: neighbours in memory,
  // as a rule. Into L2, which takes many more misses at a time than L1. Inlined by force: GCC deletes calls of
  // functions that only prefetch.
  __attribute__((always_inline)) void fetch(int until) {
    const Addresses& next = tiles_[turn_ ^ 1];
    for (; fetched_ < until; ++fetched_) {
      const bool is_key = fetched_ < kTileKeys;
      const int i = is_key ? fetched_ : fetched_ - kTileKeys;
      if (i >= next.count) continue;
      const char* const row = is_key ? next.keys[i] : next.values[i];
      const char* const end = row + run_stride_ * num_runs_;
      for (const char* run = row; run != end; run += run_stride_) {
        for (std::int64_t byte = 0; byte < run_bytes_; byte += 64) __builtin_prefetch(run + byte, 0, 2);
      }
    }
  }

  const Batch& batch_;
  const Block& block_;
  std::int64_t bytes_;                              // of an element
  std::int64_t num_runs_, run_bytes_, run_stride_;  // one key of all heads: so many runs of consecutive bytes
  int turn_ = 0;
  int fetched_ = 0, ticks_ = 0, total_ticks_ = 1;
  Addresses tiles_[2];
};

}  // namespace radixkv::attention::RADIXKV_ISA
