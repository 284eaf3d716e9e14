// Where the keys of a tile lie, and getting them into the cache in time. Part of block.hpp; see there.
#pragma once

#include "attention/attention.hpp"
#include "attention/isa/simd.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// The addresses of a tile's keys and values in the block's first head, and of their scales where rows have some. Keys
// after the last are the last one again, up to whole vectors: their scores are computed and not used. So is one value.
struct Addresses {
  int count;
  const char* keys[kTileKeys];
  const char* values[kTileKeys];
  const char* key_scales[kTileKeys];
  const char* value_scales[kTileKeys];
};

// The tile at hand of one block, and the one after it, which is loaded into the L2 cache meanwhile.
//
// Pages are short runs of memory that lie anywhere, which hardware prefetchers do not foresee, and a core keeps few
// loads in flight. So memory is the bottleneck of decode unless some loads are in flight all the time, and never so
// many that prefetches are lost: between any two pieces of work the kernel calls tick(), which prefetches the next few
// lines, at an even pace. A tile's keys and then its values are fetched in the order of their addresses, of all heads
// of the block, as runs of memory: slots and pages that follow each other are one. Latent values come with their keys.
class Tiles {
 public:
  Tiles(const Batch& batch, const Block& block)
      : batch_(batch), block_(block), caches_{&batch.layer.k, &batch.layer.v} {
    for (int i = 0; i < (batch.layer.latent() ? 1 : 2); ++i) {
      const std::int64_t head = caches_[i]->row_bytes();
      row_bytes_[i] = (block.head_end - block.head_begin) * head;
      fetches_ &= caches_[i]->head_stride == head;  // else a row is many runs; such layouts go without
    }
  }

  const Addresses& here() const { return tiles_[turn_]; }

  // The first tile: keys [begin, end), at most a tile of them.
  void start(std::int64_t begin, std::int64_t end) {
    resolve(begin, end, tiles_[turn_ ^ 1]);
    expect_ticks(1);
    tick();
  }

  // Goes on to the next tile; after it comes one of keys [begin, end). It is fetched within so many ticks.
  void advance(std::int64_t begin, std::int64_t end) {
    turn_ ^= 1;
    resolve(begin, end, tiles_[turn_ ^ 1]);
  }
  void expect_ticks(int ticks) { pace_ = (num_lines_ * kPart + ticks - 1) / ticks; }

  // Into L2, which takes many more misses at a time than L1. Inlined by force: GCC deletes calls of functions that only
  // prefetch.
  __attribute__((always_inline)) void tick() {
    due_ += pace_;
    for (; due_ >= kPart; due_ -= kPart) {
      if (at_ >= end_ && !next_run()) return;
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  static constexpr int kPart = 64;  // of a line
  struct Run {
    std::int64_t begin, end;  // bytes from the start of a cache
  };

  void resolve(std::int64_t begin, std::int64_t end, Addresses& to) {
    const std::int32_t* pages = batch_.table.pages[block_.request];
    const std::int32_t page_size = batch_.table.page_size;
    std::int64_t page = begin / page_size;
    std::int64_t slot = begin % page_size;
    to.count = static_cast<int>(max_int64(0, min_int64(end - begin, kTileKeys)));
    num_runs_[0] = num_runs_[1] = run_ = num_lines_ = due_ = of_ = 0;
    at_ = end_ = nullptr;
    for (int i = 0; i < to.count;) {
      const int slots = min_int(to.count - i, static_cast<int>(page_size - slot));
      locate(0, pages[page], slot, slots, to.keys + i, to.key_scales + i);
      locate(1, pages[page], slot, slots, to.values + i, to.value_scales + i);
      i += slots;
      ++page;
      slot = 0;
    }
    for (int of = 0; of < 2; ++of) {
      for (int i = 0; i < num_runs_[of]; ++i)
        num_lines_ += static_cast<int>((runs_[of][i].end - runs_[of][i].begin + kLine - 1) / kLine);
    }
    if (to.count == 0) return;
    if (to.count % 2 != 0) to.values[to.count] = to.values[to.count - 1];
    for (int i = to.count; i % kLanes != 0; ++i) {
      to.keys[i] = to.keys[to.count - 1];
      to.key_scales[i] = to.key_scales[to.count - 1];
    }
  }

  // The addresses of some slots of a page, of keys (0) or values (1).
  void locate(int of, std::int32_t page, std::int64_t slot, int slots, const char** to, const char** scales) {
    const Cache& cache = *caches_[of];
    const std::int64_t at = page * cache.page_stride + slot * cache.slot_stride + block_.head_begin * cache.head_stride;
    for (int i = 0; i < slots; ++i) to[i] = cache.data + at + i * cache.slot_stride;
    if (has_row_scales(cache.dtype)) {
      const char* const first = cache.data + page * cache.page_stride + cache.scales + slot * cache.scales_slot_stride +
                                block_.head_begin * kScaleBytes;
      for (int i = 0; i < slots; ++i) scales[i] = first + i * cache.scales_slot_stride;
    }
    if (fetches_ && (of == 0 || !batch_.layer.latent())) expect_slots(of, at, slots, cache.slot_stride);
  }

  void expect_slots(int of, std::int64_t at, int slots, std::int64_t stride) {
    const bool together = stride == row_bytes_[of];
    int& runs = num_runs_[of];
    for (int i = 0; i < (together ? 1 : slots); ++i, at += stride) {
      const std::int64_t end = at + (together ? slots : 1) * row_bytes_[of];
      if (runs > 0 && runs_[of][runs - 1].end == at) {
        runs_[of][runs - 1].end = end;
      } else {
        runs_[of][runs++] = {at, end};
      }
    }
  }

  __attribute__((always_inline)) bool next_run() {
    if (run_ == num_runs_[of_]) {
      if (of_ == 1) return false;
      of_ = 1;
      run_ = 0;
    }
    if (num_runs_[of_] == 0) return false;
    const Run& run = runs_[of_][run_++];
    at_ = caches_[of_]->data + run.begin;
    end_ = caches_[of_]->data + run.end;
    return true;
  }

  const Batch& batch_;
  const Block& block_;
  const Cache* caches_[2];     // of keys and of values
  std::int64_t row_bytes_[2];  // of one key, all heads of the block
  bool fetches_ = true;
  int turn_ = 0;
  // What is still to be fetched of the next tile: [at_, end_), then the runs of of_ from run_ on; of the keys first.
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  Run runs_[2][kTileKeys];
  int num_runs_[2] = {0, 0};
  int run_ = 0, of_ = 0, num_lines_ = 0;
  int pace_ = 0, due_ = 0;  // what to fetch at each tick, and now, in parts of a line
  Addresses tiles_[2];
};

}  // namespace radixkv::attention::RADIXKV_ISA
