// One step's attention: the page table copied, the work scheduled, then run once per layer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attention/attention.hpp"
#include "attention/schedule.hpp"
#include "base/fork_mutex.hpp"
#include "base/memory.hpp"
#include "base/thread_pool.hpp"
#include "step/cascade.hpp"

namespace radixkv::attention {

struct LayerCounts {
  RowCounts k;
  RowCounts v;
};

class AttentionPlan {
 public:
  // The layers' memory, of num_pages pages each, must outlive the plan. dtype: of q, k, v and out. Throws Error
  // (InvalidArgument) for a layer that the kernel does not take.
  AttentionPlan(std::vector<LayerKV> layers, DType dtype, std::int32_t num_pages, std::int32_t page_size,
                int num_threads, const char* isa = nullptr);

  // Copies the table and schedules its step. O(requests + rows) where the batch is that of the last step. The calls
  // below throw LeaseError once that step has ended. Throws Error (InvalidArgument) for a table of another pool,
  // LeaseError for one whose step has ended; then nothing has changed.
  void plan(const StepTable& table);

  // Writes k [rows, num_kv_heads, k_dim] and v [rows, num_kv_heads, v_dim] into the slots of a layer; of a latent one k.
  // Throws Error (InvalidArgument) for a layer that there is not; so does run.
  void append(std::size_t layer, const Rows& k, const Rows& v);

  // Attends q [rows, num_qo_heads, k_dim] to a layer; out: [rows, num_qo_heads, v_dim].
  void run(std::size_t layer, const Rows& q, void* out, const Options& options);

  // The planned table, and what its requests share.
  std::pair<StepTable, std::shared_ptr<const Cascade>> planned();

  // When shared segments are read once for all of their users; takes effect with the next plan. It never changes a bit
  // of the result. Throws Error (InvalidArgument) unless the granularity is a multiple of kTileKeys.
  void set_costs(const CascadeCosts& costs);

  // What append has stored of a layer in 8 or 4 bits so far.
  LayerCounts counts(std::size_t layer);

  std::int64_t num_rows() const { return table_.num_rows(); }
  const char* isa() const { return kernel_.isa; }
  int num_threads() const { return pool_.num_threads(); }
  void set_num_threads(int num_threads);

 private:
  enum class Carried { state, open_even, open_odd };

  void schedule();
  const LayerKV& layer_at(std::size_t layer) const;
  void reserve(const Schedule& schedule);
  std::int64_t carried_floats(const LayerShape& shape) const;
  RowState carried(const Schedule& schedule, Carried which, const Item& item);
  RowState part_state(const Schedule& schedule, const Item& item, std::int32_t part);
  void run_item(const Schedule& schedule, const Batch& batch, const Item& item, int worker);

  const std::vector<LayerKV> layers_;
  std::vector<LayerCounts> counts_;
  const DType dtype_;
  const std::int32_t num_pages_;
  const std::int32_t page_size_;
  const Kernel& kernel_;
  ThreadPool pool_;
  ForkMutex mutex_;  // one call at a time: the calls share scratch memory

  StepTable table_;
  CascadeFinder finder_;
  CarriedRows carried_rows_;
  std::vector<Schedule> schedules_;  // one for each shape of layers
  std::vector<std::size_t> schedule_of_layer_;
  std::unique_ptr<std::atomic<std::int32_t>[]> pending_;  // parts of each split not yet done
  std::size_t num_pending_ = 0;
  AlignedBuffer states_;
  AlignedBuffer carried_;  // of all carried rows: the state, and that of the open chunk, twice
  std::vector<AlignedBuffer> scratch_;
};

}  // namespace radixkv::attention
