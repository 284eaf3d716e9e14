// One step's attention: the page table copied, the work scheduled, then run once per layer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attention/attention.hpp"
#include "base/fork_mutex.hpp"
#include "base/memory.hpp"
#include "base/thread_pool.hpp"
#include "step/cascade.hpp"

namespace radixkv::attention {

// The schedule of one step, made once and run for every layer.
class AttentionPlan {
 public:
  // layout's strides are ignored here. Throws Error (InvalidArgument) for a geometry that the kernel does not take.
  AttentionPlan(std::int32_t num_qo_heads, const KvLayout& layout, int num_threads, const char* isa = nullptr);

  // Copies the table and schedules its step. O(requests + rows) where the batch is that of the last step. The calls
  // below throw LeaseError once that step has ended. Throws Error (InvalidArgument) for a table of another pool,
  // LeaseError for one whose step has ended; then nothing has changed.
  void plan(const StepTable& table);

  // Writes k and v [rows, num_kv_heads, head_dim] into the slots; scales: of 8-bit caches.
  void append(const KvLayout& strides, void* k_cache, void* v_cache, const Rows& k, const Rows& v,
              const Scales& scales);

  void run(const KvLayout& strides, const void* k_cache, const void* v_cache, const Rows& q, void* out,
           const AttentionParams& params);

  // The planned table, and what its requests share.
  std::pair<StepTable, std::shared_ptr<const Cascade>> planned();

  // When shared segments are read once for all of their users; takes effect with the next plan. It never changes a bit
  // of the result. Throws Error (InvalidArgument) unless the granularity is a multiple of kTileKeys.
  void set_costs(const CascadeCosts& costs);

  std::int64_t num_rows() const { return table_.num_rows(); }
  const char* isa() const { return kernel_.isa; }
  int num_threads() const { return pool_.num_threads(); }
  void set_num_threads(int num_threads);

 private:
  // A block over some keys. Phases run one after the other: first the segments that begin at the root, then those that
  // continue them, and so on; last what is each request's own.
  struct Item {
    Block block;
    std::int64_t key_begin;
    std::int64_t key_end;
    std::int32_t phase;
    std::int32_t depth;    // used segments before it on its rows' path
    std::int32_t carried;  // the block's first carried row, or -1
    double cost;
    std::int32_t split = -1;  // or it is a part of this one
    std::int32_t part = 0;
  };
  // A block whose chunks are computed independently and merged by whoever finishes last.
  struct Split {
    std::int64_t state_offset;  // floats into states_, one state per part
    std::int32_t num_parts;
  };
  enum class Carried { state, open_even, open_odd };

  void schedule();
  void carry_rows();
  void add_segment(const Segment& segment, std::vector<Item>& items) const;
  void add_requests(std::vector<Item>& items) const;
  void add_item(const Item& item, double fair);
  std::int64_t block_vectors(const Block& block) const;
  std::int64_t kv_len(std::int32_t b) const { return view().kv_len(b); }
  PageTableView view() const { return table_.view(); }
  const Cascade& cascade() const { return *finder_.found(); }
  std::int64_t num_carried() const { return static_cast<std::int64_t>(carried_rows_.size()); }
  std::int64_t carried_floats() const { return state_floats(num_carried() * num_qo_heads_, layout_.head_dim); }
  RowState carried(Carried which, const Item& item);
  RowState part_state(const Item& item, std::int32_t part);
  void run_item(const Batch& batch, const Item& item, int worker);

  std::int32_t num_qo_heads_;
  std::int32_t group_;
  KvLayout layout_;
  const Kernel& kernel_;
  ThreadPool pool_;
  ForkMutex mutex_;  // one call at a time: the calls share scratch memory

  StepTable table_;
  CascadeFinder finder_;
  std::vector<std::int32_t> carried_rows_;        // the rows whose state goes from segment to segment, in cascade order
  std::vector<std::int64_t> carried_positions_;   // and their positions
  std::vector<std::int32_t> carried_of_request_;  // first carried row of each request, or -1
  std::vector<Item> items_;                       // by phase
  std::vector<std::int64_t> phase_ends_;
  std::vector<Split> splits_;
  std::unique_ptr<std::atomic<std::int32_t>[]> pending_;  // parts of each split not yet done
  std::int64_t states_floats_ = 0;
  std::int64_t max_block_rows_ = 0;
  bool serial_ = true;  // too little work to wake a thread for
  AlignedBuffer states_;
  AlignedBuffer carried_;  // of all carried rows: the state, and that of the open chunk, twice
  std::vector<AlignedBuffer> scratch_;
};

}  // namespace radixkv::attention
