// One step's attention: the page table checked and copied, the work scheduled, then run once per layer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "attention.hpp"
#include "thread_pool.hpp"

namespace radixkv::attention {

// Memory that grows and is never initialised beyond zeroing.
class AlignedBuffer {
 public:
  void* reserve(std::size_t bytes);

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

// The schedule of one step, made once and run for every layer.
class AttentionPlan {
 public:
  // layout's strides are ignored here. Throws std::invalid_argument for a geometry that the kernel does not take.
  AttentionPlan(std::int32_t num_qo_heads, const KvLayout& layout, int num_threads, const char* isa = nullptr);

  // Copies and checks the page table: indptr monotone from 0, pages == ceil(kv_len / page_size) >= what the new rows
  // need, 1 <= last page length <= page_size, page ids and slots in range. A table that fails changes nothing.
  void plan(const PageTableView& table, const std::int32_t* slots, std::int64_t num_slots);

  // Writes k and v [rows, num_kv_heads, head_dim] into the slots.
  void append(const KvLayout& strides, void* k_cache, void* v_cache, const Rows& k, const Rows& v);

  void run(const KvLayout& strides, const void* k_cache, const void* v_cache, const Rows& q, void* out,
           const AttentionParams& params);

  std::int64_t num_rows() const { return static_cast<std::int64_t>(slots_.size()); }
  const char* isa() const { return kernel_.isa; }
  int num_threads() const { return pool_.num_threads(); }
  void set_num_threads(int num_threads);

 private:
  // A block, whole (split == -1) or one chunk of it.
  struct Item {
    Block block;
    std::int32_t chunk_begin;
    std::int32_t chunk_end;
    std::int32_t split;
    double cost;
  };
  // A block whose chunks are computed independently and merged by whoever finishes last.
  struct Split {
    std::int64_t state_offset;  // floats into states_, one state per chunk
    std::int32_t num_chunks;
  };

  void schedule();
  std::vector<Item> make_blocks() const;
  std::int64_t block_vectors(const Block& block) const;
  PageTableView view() const;
  void run_item(const Batch& batch, const Item& item, int worker);

  std::int32_t num_qo_heads_;
  std::int32_t group_;
  KvLayout layout_;
  const Kernel& kernel_;
  ThreadPool pool_;
  std::mutex mutex_;  // one call at a time: the calls share scratch memory

  std::vector<std::int32_t> qo_indptr_{0}, kv_indptr_{0}, kv_indices_, kv_last_page_len_, slots_;
  std::vector<Item> items_;
  std::vector<Split> splits_;
  std::unique_ptr<std::atomic<std::int32_t>[]> pending_;  // chunks of each split not yet done
  std::int64_t states_floats_ = 0;
  std::int64_t max_block_rows_ = 0;
  bool serial_ = true;  // too little work to wake a thread for
  AlignedBuffer states_;
  std::vector<AlignedBuffer> scratch_;
};

}  // namespace radixkv::attention
