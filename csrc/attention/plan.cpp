#include "attention/plan.hpp"

#include <algorithm>
#include <mutex>
#include <string>

#include "base/error.hpp"

namespace radixkv::attention {
namespace {

constexpr std::int64_t kAppendRows = 256;  // rows per item of a parallel append

void check_cache(const std::string& who, const Cache& cache, DType dtype) {
  if (cache.dim < 8 || cache.dim > kMaxHeadDim || cache.dim % 8 != 0) {
    invalid(who + " is " + str(cache.dim) + ": it must be a multiple of 8 from 8 to " + str(kMaxHeadDim));
  }
  if (cache.dtype == DType::i4 && cache.dim % 16 != 0) {
    invalid(who + " is " + str(cache.dim) + ": rows of int4 need a multiple of 16");
  }
  if (has_row_scales(cache.dtype) && cache.dim > kMaxCodesDim) {
    invalid(who + " is " + str(cache.dim) + ": rows of int8 and int4 have at most " + str(kMaxCodesDim));
  }
  const bool quantized = cache.dtype == DType::f8 || has_row_scales(cache.dtype);
  if (cache.dtype != dtype && !quantized) {
    invalid(who + " is stored neither in the dtype of k and v nor as float8_e4m3fn, int8 or int4");
  }
  if (has_row_scales(cache.dtype) ? !cache.rotated : cache.rotated && cache.dtype != DType::f8) {
    invalid(who + ": rows of int8 and int4 are rotated, those of float8_e4m3fn may be, and no others");
  }
}

void check_latent(const std::string& who, const LayerKV& layer) {
  if (layer.v.dim > layer.k.dim) {
    invalid(who + "v_dim is " + str(layer.v.dim) + ": a latent value is a part of its key, of " + str(layer.k.dim));
  }
  if (layer.k.rotated || layer.k.centre != nullptr) {
    invalid(who + "a latent row is rotated or has a centre: its first " + str(layer.v.dim) +
            " numbers are no value then");
  }
}

void check_layer(std::size_t index, const LayerKV& layer, DType dtype) {
  const std::string who = "layer " + str(index) + ": ";
  if (layer.num_kv_heads < 1 || layer.num_qo_heads < 1 || layer.num_qo_heads % layer.num_kv_heads != 0) {
    invalid(who + "num_qo_heads is " + str(layer.num_qo_heads) + " and num_kv_heads is " + str(layer.num_kv_heads) +
            ": both must be positive and the first a multiple of the second");
  }
  check_cache(who + "k_dim", layer.k, dtype);
  check_cache(who + "v_dim", layer.v, dtype);
  if (layer.latent()) check_latent(who, layer);
}

}  // namespace

AttentionPlan::AttentionPlan(std::vector<LayerKV> layers, DType dtype, std::int32_t num_pages, std::int32_t page_size,
                             int num_threads, const char* isa)
    : layers_(std::move(layers)),
      dtype_(dtype),
      num_pages_(num_pages),
      page_size_(page_size),
      kernel_(kernel(isa)),
      pool_(num_threads) {
  if (dtype == DType::f8 || has_row_scales(dtype)) {
    invalid("dtype is of 8 or 4 bits: q, k, v and out are float32, bfloat16 or float16");
  }
  if (page_size < 1) invalid("page_size is " + str(page_size) + ": it must be at least 1");
  if (num_pages < 1) invalid("num_pages is " + str(num_pages) + ": it must be at least 1");
  if (static_cast<std::int64_t>(num_pages) * page_size > INT32_MAX) {
    invalid("num_pages * page_size is " + str(static_cast<std::int64_t>(num_pages) * page_size) +
            ": slots are int32, keep it below 2**31");
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    check_layer(i, layers_[i], dtype);
    const LayerShape shape(layers_[i]);
    const auto same = [&](const Schedule& schedule) { return schedule.shape == shape; };
    const auto found = std::find_if(schedules_.begin(), schedules_.end(), same);
    schedule_of_layer_.push_back(static_cast<std::size_t>(found - schedules_.begin()));
    if (found == schedules_.end()) schedules_.emplace_back(shape);
  }
  scratch_.resize(static_cast<std::size_t>(pool_.num_threads()));
  counts_.resize(layers_.size());
}

void AttentionPlan::set_num_threads(int num_threads) {
  const std::lock_guard lock(mutex_);
  pool_.set_num_threads(num_threads);
  scratch_.resize(static_cast<std::size_t>(num_threads));
  schedule();
}

void AttentionPlan::plan(const StepTable& table) {
  if (table.num_pages != num_pages_ || table.page_size != page_size_) {
    invalid("the page table is of " + str(table.num_pages) + " pages of " + str(table.page_size) +
            " tokens: this attention is for " + str(num_pages_) + " of " + str(page_size_));
  }
  const std::lock_guard lock(mutex_);
  finder_.find(table);
  table_ = table;
  schedule();
}

void AttentionPlan::schedule() {
  const PageTableView table = table_.view();
  carried_rows_.find(table, *finder_.found());
  for (Schedule& schedule : schedules_) schedule.make(table, *finder_.found(), carried_rows_, pool_.num_threads());
}

std::pair<StepTable, std::shared_ptr<const Cascade>> AttentionPlan::planned() {
  const std::lock_guard lock(mutex_);
  return {table_, finder_.found()};
}

void AttentionPlan::set_costs(const CascadeCosts& costs) {
  if (costs.granularity < 1 || costs.granularity % kTileKeys != 0) {
    invalid("granularity is " + str(costs.granularity) + ": it must be a multiple of " + str(kTileKeys));
  }
  const std::lock_guard lock(mutex_);
  finder_.costs = costs;
}

const LayerKV& AttentionPlan::layer_at(std::size_t layer) const {
  if (layer >= layers_.size()) invalid("layer is " + str(layer) + ": there are " + str(layers_.size()));
  return layers_[layer];
}

void AttentionPlan::append(std::size_t layer, const Rows& k, const Rows& v) {
  const LayerKV& kv = layer_at(layer);
  const std::lock_guard lock(mutex_);
  const PageLists::Use use(*table_.lists);
  const std::int64_t rows = num_rows();
  LayerCounts& counts = counts_[layer];
  const LayerCounts before = counts;
  std::mutex counting;
  const auto store = [&](std::int64_t item, int) {
    const std::int64_t begin = item * kAppendRows;
    const std::int64_t end = std::min(rows, begin + kAppendRows);
    const auto put = [&](const Cache& cache, const Rows& from, std::int64_t stored) {
      return store_rows(kernel_, dtype_, kv.num_kv_heads, page_size_, cache, from, table_.slots.data(), begin, end,
                        stored);
    };
    const RowCounts of_k = put(kv.k, k, before.k.rows);
    const RowCounts of_v = kv.latent() ? RowCounts{} : put(kv.v, v, before.v.rows);
    const std::lock_guard counts_lock(counting);
    counts.k.add(of_k);
    counts.v.add(of_v);
  };
  pool_.for_each((rows + kAppendRows - 1) / kAppendRows, store);
}

LayerCounts AttentionPlan::counts(std::size_t layer) {
  layer_at(layer);
  const std::lock_guard lock(mutex_);
  return counts_[layer];
}

// Scratch memory as this schedule needs it.
void AttentionPlan::reserve(const Schedule& schedule) {
  const std::int64_t vectors = schedule.max_block_vectors, v_dim = schedule.shape.v_dim;
  const std::size_t bytes = static_cast<std::size_t>(state_floats(vectors, v_dim)) * sizeof(float) +
                            kernel_.scratch_bytes(vectors, schedule.shape.k_dim, v_dim);
  for (AlignedBuffer& scratch : scratch_) scratch.reserve(bytes);
  states_.reserve(static_cast<std::size_t>(schedule.states_floats) * sizeof(float));
  if (schedule.splits.size() > num_pending_) {
    num_pending_ = schedule.splits.size();
    pending_ = std::make_unique<std::atomic<std::int32_t>[]>(num_pending_);
  }
  for (std::size_t i = 0; i < schedule.splits.size(); ++i) {
    pending_[i].store(schedule.splits[i].num_parts, std::memory_order_relaxed);
  }
  if (carried_rows_.count() == 0) return;
  const auto floats = static_cast<std::size_t>(carried_floats(schedule.shape));
  auto* const memory = static_cast<float*>(carried_.reserve(3 * floats * sizeof(float)));
  const std::int64_t all = carried_rows_.count() * schedule.shape.num_qo_heads;
  std::fill_n(state_at(memory, 1, all, v_dim).sum, all, 0.0f);
}

void AttentionPlan::run(std::size_t layer, const Rows& q, void* out, const Options& options) {
  const LayerKV& kv = layer_at(layer);
  const std::lock_guard lock(mutex_);
  const PageLists::Use use(*table_.lists);
  const Schedule& schedule = schedules_[schedule_of_layer_[layer]];
  Options scaled = options;
  scaled.sm_scale *= kv.k.product_scale();
  const Batch batch{
      kv, dtype_, table_.view(), scaled, q, out, carried_rows_.rows.data(), carried_rows_.positions.data()};
  reserve(schedule);
  std::int64_t begin = 0;
  for (const std::int64_t end : schedule.phase_ends) {
    const auto work = [&](std::int64_t i, int worker) {
      run_item(schedule, batch, schedule.items[static_cast<std::size_t>(begin + i)], worker);
    };
    if (schedule.serial) {
      for (std::int64_t i = 0; i < end - begin; ++i) work(i, 0);
    } else {
      pool_.for_each(end - begin, work);
    }
    begin = end;
  }
}

std::int64_t AttentionPlan::carried_floats(const LayerShape& shape) const {
  return state_floats(carried_rows_.count() * shape.num_qo_heads, shape.v_dim);
}

// The item's part of a state of all carried rows.
RowState AttentionPlan::carried(const Schedule& schedule, Carried which, const Item& item) {
  const LayerShape& shape = schedule.shape;
  float* const memory = static_cast<float*>(carried_.reserve(0)) + static_cast<int>(which) * carried_floats(shape);
  const RowState all = state_at(memory, shape.num_kv_heads, carried_rows_.count() * shape.group(), shape.v_dim);
  const std::int64_t row = item.block.head_begin * carried_rows_.count() + item.carried;
  return state_from(all, row * shape.group(), shape.v_dim);
}

// Where a part of a split block gathers its state. What precedes a carried block's first part is merged into already.
RowState AttentionPlan::part_state(const Schedule& schedule, const Item& item, std::int32_t part) {
  if (part == 0 && item.carried >= 0) return carried(schedule, Carried::state, item);
  const std::int64_t v_dim = schedule.shape.v_dim;
  const std::int64_t heads = item.block.head_end - item.block.head_begin, vectors = schedule.block_vectors(item.block);
  float* const memory = static_cast<float*>(states_.reserve(0)) +
                        schedule.splits[static_cast<std::size_t>(item.split)].state_offset +
                        part * state_floats(vectors, v_dim);
  return state_at(memory, heads, vectors / heads, v_dim);
}

void AttentionPlan::run_item(const Schedule& schedule, const Batch& batch, const Item& item, int worker) {
  const std::int64_t v_dim = schedule.shape.v_dim, vectors = schedule.block_vectors(item.block);
  const std::int64_t heads = item.block.head_end - item.block.head_begin;
  auto* scratch = static_cast<float*>(scratch_[static_cast<std::size_t>(worker)].reserve(0));
  void* kernel_scratch = scratch + state_floats(schedule.max_block_vectors, v_dim);
  const bool carries = item.carried >= 0 && item.part == 0;
  const bool whole_here = item.split < 0 && item.carried < 0;
  const RowState state =
      whole_here ? state_at(scratch, heads, vectors / heads, v_dim) : part_state(schedule, item, item.part);
  if (!carries) std::fill_n(state.sum, vectors, 0.0f);
  Span span{item.key_begin, item.key_end, state, state};
  if (item.carried >= 0) {
    // Every depth reads one of the two and writes the other: the parts of a split may run at the same time.
    const bool odd = item.depth % 2 != 0;
    span.open_in = carried(schedule, odd ? Carried::open_odd : Carried::open_even, item);
    span.open_out = carried(schedule, odd ? Carried::open_even : Carried::open_odd, item);
  }
  kernel_.attend(batch, item.block, span, state, kernel_scratch);
  RowState whole = state;
  if (item.split >= 0) {
    const auto split = static_cast<std::size_t>(item.split);
    if (pending_[split].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    whole = part_state(schedule, item, 0);
    for (std::int32_t part = 1; part < schedule.splits[split].num_parts; ++part) {
      kernel_.merge(heads, vectors / heads, v_dim, part_state(schedule, item, part), whole);
    }
  }
  if (!item.block.shared) kernel_.finish(batch, item.block, whole);
}

}  // namespace radixkv::attention
