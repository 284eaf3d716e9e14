// The schedule of one step: which blocks there are, which are split into chunks, and how they run on the threads.
#include "attention/plan.hpp"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <string>

#include "base/error.hpp"

namespace radixkv::attention {
namespace {

constexpr std::int64_t kBlockVectorsTarget = 96;  // query vectors per block: enough to pay for packing a tile
constexpr std::int32_t kFewRows = 4;              // new rows of a request up to which it is bound by memory
constexpr double kSerialCost = 2.0e6;             // multiply-adds: below this, waking a thread costs more than it gives
constexpr double kKeyCost = 4.0;                  // loading and packing a key, in query vectors' worth of work
constexpr std::int32_t kSharedVectorsTarget = 256;  // query vectors per block of a shared segment, over all heads
constexpr std::int32_t kSharedVectorsLimit = 256;   // and of one head: beyond it K and V are read again
constexpr std::int64_t kAppendRows = 256;           // rows per item of a parallel append

}  // namespace

AttentionPlan::AttentionPlan(std::int32_t num_qo_heads, const KvLayout& layout, int num_threads, const char* isa)
    : num_qo_heads_(num_qo_heads), group_(0), layout_(layout), kernel_(kernel(isa)), pool_(num_threads) {
  if (layout.head_dim < 8 || layout.head_dim > kMaxHeadDim || layout.head_dim % 8 != 0) {
    invalid("head_dim is " + str(layout.head_dim) + ": it must be a multiple of 8 from 8 to " + str(kMaxHeadDim));
  }
  if (layout.num_kv_heads < 1 || num_qo_heads < 1 || num_qo_heads % layout.num_kv_heads != 0) {
    invalid("num_qo_heads is " + str(num_qo_heads) + " and num_kv_heads is " + str(layout.num_kv_heads) +
            ": both must be positive and the first a multiple of the second");
  }
  if (layout.kv_dtype != layout.dtype && layout.kv_dtype != DType::f8) {
    invalid("kv_dtype is neither dtype nor float8_e4m3fn");
  }
  if (layout.page_size < 1) invalid("page_size is " + str(layout.page_size) + ": it must be at least 1");
  if (layout.num_pages < 1) invalid("num_pages is " + str(layout.num_pages) + ": it must be at least 1");
  if (static_cast<std::int64_t>(layout.num_pages) * layout.page_size > INT32_MAX) {
    invalid("num_pages * page_size is " + str(static_cast<std::int64_t>(layout.num_pages) * layout.page_size) +
            ": slots are int32, keep it below 2**31");
  }
  group_ = num_qo_heads / layout.num_kv_heads;
  scratch_.resize(static_cast<std::size_t>(pool_.num_threads()));
}

void AttentionPlan::set_num_threads(int num_threads) {
  const std::lock_guard lock(mutex_);
  pool_.set_num_threads(num_threads);
  scratch_.resize(static_cast<std::size_t>(num_threads));
  schedule();
}

void AttentionPlan::plan(const StepTable& table) {
  if (table.num_pages != layout_.num_pages || table.page_size != layout_.page_size) {
    invalid("the page table is of " + str(table.num_pages) + " pages of " + str(table.page_size) +
            " tokens: this attention is for " + str(layout_.num_pages) + " of " + str(layout_.page_size));
  }
  const std::lock_guard lock(mutex_);
  finder_.find(table);
  table_ = table;
  schedule();
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

std::int64_t AttentionPlan::block_vectors(const Block& block) const {
  return static_cast<std::int64_t>(block.head_end - block.head_begin) * (block.row_end - block.row_begin) * group_;
}

// Numbers the rows of requests that have a used segment, in the order in which the users of a segment are neighbours.
void AttentionPlan::carry_rows() {
  const PageTableView table = view();
  carried_rows_.clear();
  carried_positions_.clear();
  carried_of_request_.assign(static_cast<std::size_t>(table.batch_size), -1);
  for (const std::int32_t b : cascade().order) {
    if (cascade().shared_pages[b] == 0) continue;
    carried_of_request_[b] = static_cast<std::int32_t>(carried_rows_.size());
    const std::int32_t rows = table.num_rows(b);
    for (std::int32_t r = 0; r < rows; ++r) {
      carried_rows_.push_back(table.qo_indptr[b] + r);
      carried_positions_.push_back(kv_len(b) - rows + r);
    }
  }
}

// The rows of all users against the keys of their segment.
void AttentionPlan::add_segment(const Segment& segment, std::vector<Item>& items) const {
  const std::int32_t first_user = cascade().order[segment.user_begin];
  const std::int32_t last_user = cascade().order[segment.user_end - 1];
  const std::int32_t begin = carried_of_request_[first_user];
  const std::int32_t end = carried_of_request_[last_user] + view().num_rows(last_user);
  const std::int32_t heads = layout_.num_kv_heads;
  const std::int32_t step = std::clamp(kSharedVectorsTarget / (group_ * (end - begin)), 1, heads);
  const std::int32_t rows_per_block = std::max(1, kSharedVectorsLimit / group_);
  const std::int64_t key_begin = segment.token_begin, key_end = segment.token_end;
  for (std::int32_t row = begin; row < end; row += rows_per_block) {
    for (std::int32_t head = 0; head < heads; head += step) {
      const Block block{first_user, head, std::min(heads, head + step), row, std::min(end, row + rows_per_block), true};
      const double per_key = static_cast<double>(block_vectors(block)) + kKeyCost * (block.head_end - head);
      const double cost = per_key * static_cast<double>((key_end - key_begin) * layout_.head_dim);
      items.push_back(Item{block, key_begin, key_end, segment.level, segment.level, row, cost});
    }
  }
}

// Blocks of about kBlockVectorsTarget query vectors. Where a request has few rows, reading K and V is what costs, and a
// block takes all kv heads so that memory is read in the order of addresses; unless that leaves threads without work.
void AttentionPlan::add_requests(std::vector<Item>& items) const {
  const PageTableView table = view();
  const std::int32_t heads = layout_.num_kv_heads;
  const auto target = static_cast<std::int32_t>(std::max<std::int64_t>(1, kBlockVectorsTarget / group_));
  const auto served = [&](std::int32_t b) { return cascade().token_at(cascade().shared_pages[b]); };
  std::int64_t chunks = 0;
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    chunks += table.num_rows(b) * ((kv_len(b) - served(b) + kChunkKeys - 1) / kChunkKeys);
  }
  const std::int32_t threads = pool_.num_threads();
  const std::int32_t widest = chunks >= threads ? heads : std::max(1, heads / threads);
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    const std::int32_t rows = table.num_rows(b);
    const std::int64_t key_begin = served(b);
    const bool few = rows <= kFewRows;
    const std::int32_t step = few ? widest : 1;
    const std::int32_t rows_per_block = few ? rows : target;
    for (std::int32_t begin = 0; begin < rows; begin += rows_per_block) {
      const std::int32_t end = std::min(rows, begin + rows_per_block);
      const std::int64_t keys = kv_len(b) - rows + end;
      const std::int64_t key_end = (keys + kChunkKeys - 1) / kChunkKeys * kChunkKeys;
      const std::int32_t carried = carried_of_request_[b] < 0 ? -1 : carried_of_request_[b] + begin;
      for (std::int32_t head = 0; head < heads; head += step) {
        const Block block{b, head, std::min(heads, head + step), begin, end};
        const double per_key = static_cast<double>(block_vectors(block)) + kKeyCost * (block.head_end - head);
        const double cost = per_key * static_cast<double>((keys - key_begin) * layout_.head_dim);
        items.push_back(Item{block, key_begin, key_end, cascade().levels, cascade().depths[b], carried, cost});
      }
    }
  }
}

// The items of every phase, the costly ones first. Nothing of this changes a bit of the result.
void AttentionPlan::schedule() {
  carry_rows();
  std::vector<Item> blocks;
  for (const Segment& segment : cascade().segments) {
    if (segment.verdict == Verdict::used) add_segment(segment, blocks);
  }
  add_requests(blocks);
  std::vector<double> totals(static_cast<std::size_t>(cascade().levels) + 1, 0.0);
  max_block_rows_ = 0;
  for (const Item& item : blocks) {
    totals[item.phase] += item.cost;
    max_block_rows_ = std::max(max_block_rows_, block_vectors(item.block));
  }
  serial_ = pool_.num_threads() == 1 || std::accumulate(totals.begin(), totals.end(), 0.0) < kSerialCost;
  items_.clear();
  splits_.clear();
  states_floats_ = 0;
  for (const Item& item : blocks) {
    const double fair = totals[item.phase] / (4.0 * pool_.num_threads());
    serial_ ? items_.push_back(item) : add_item(item, fair);
  }
  std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
    return a.phase != b.phase ? a.phase < b.phase : a.cost > b.cost;
  });
  phase_ends_.assign(totals.size(), 0);
  for (const Item& item : items_) ++phase_ends_[item.phase];
  std::partial_sum(phase_ends_.begin(), phase_ends_.end(), phase_ends_.begin());
  pending_ = std::make_unique<std::atomic<std::int32_t>[]>(splits_.size());
}

// A block that would keep one thread busy while the others idle is split into its chunks.
void AttentionPlan::add_item(const Item& item, double fair) {
  const auto parts =
      static_cast<std::int32_t>((item.key_end + kChunkKeys - 1) / kChunkKeys - item.key_begin / kChunkKeys);
  if (item.cost <= fair || parts < 2) return items_.push_back(item);
  Item part = item;
  part.split = static_cast<std::int32_t>(splits_.size());
  splits_.push_back(Split{states_floats_, parts});
  states_floats_ += parts * state_floats(block_vectors(item.block), layout_.head_dim);
  for (part.cost = item.cost / parts; part.part < parts; ++part.part, part.key_begin = part.key_end) {
    part.key_end = std::min(item.key_end, (part.key_begin / kChunkKeys + 1) * kChunkKeys);
    items_.push_back(part);
  }
}

void AttentionPlan::append(const KvLayout& strides, void* k_cache, void* v_cache, const Rows& k, const Rows& v,
                           const Scales& scales) {
  const std::lock_guard lock(mutex_);
  const PageLists::Use use(*table_.lists);
  const std::int64_t rows = num_rows();
  const auto store = [&](std::int64_t item, int) {
    const std::int64_t begin = item * kAppendRows;
    const std::int64_t end = std::min(rows, begin + kAppendRows);
    append_kv(kernel_, strides, k_cache, v_cache, k, v, scales, table_.slots.data(), begin, end);
  };
  const std::int64_t items = (rows + kAppendRows - 1) / kAppendRows;
  pool_.for_each(items, store);
}

void AttentionPlan::run(const KvLayout& strides, const void* k_cache, const void* v_cache, const Rows& q, void* out,
                        const AttentionParams& params) {
  const std::lock_guard lock(mutex_);
  const PageLists::Use use(*table_.lists);
  const Batch batch{
      strides, view(), params, group_, k_cache, v_cache, q, out, carried_rows_.data(), carried_positions_.data()};
  const std::size_t state_bytes =
      static_cast<std::size_t>(state_floats(max_block_rows_, layout_.head_dim)) * sizeof(float);
  const std::size_t bytes = state_bytes + kernel_.scratch_bytes(max_block_rows_, layout_.head_dim);
  for (AlignedBuffer& scratch : scratch_) scratch.reserve(bytes);
  states_.reserve(static_cast<std::size_t>(states_floats_) * sizeof(float));
  for (std::size_t i = 0; i < splits_.size(); ++i) pending_[i].store(splits_[i].num_parts, std::memory_order_relaxed);
  if (num_carried() > 0) {
    auto* const memory =
        static_cast<float*>(carried_.reserve(3 * static_cast<std::size_t>(carried_floats()) * sizeof(float)));
    const std::int64_t vectors = num_carried() * num_qo_heads_;
    std::fill_n(state_at(memory, 1, vectors, layout_.head_dim).sum, vectors, 0.0f);
  }
  std::int64_t begin = 0;
  for (const std::int64_t end : phase_ends_) {
    const auto work = [&](std::int64_t i, int worker) {
      run_item(batch, items_[static_cast<std::size_t>(begin + i)], worker);
    };
    if (serial_) {
      for (std::int64_t i = 0; i < end - begin; ++i) work(i, 0);
    } else {
      pool_.for_each(end - begin, work);
    }
    begin = end;
  }
}

// The item's part of a state of all carried rows.
RowState AttentionPlan::carried(Carried which, const Item& item) {
  float* const memory = static_cast<float*>(carried_.reserve(0)) + static_cast<int>(which) * carried_floats();
  const RowState all = state_at(memory, layout_.num_kv_heads, num_carried() * group_, layout_.head_dim);
  const std::int64_t row = item.block.head_begin * num_carried() + item.carried;
  return state_from(all, row * group_, layout_.head_dim);
}

// Where a part of a split block gathers its state. What precedes a carried block's first part is merged into already.
RowState AttentionPlan::part_state(const Item& item, std::int32_t part) {
  if (part == 0 && item.carried >= 0) return carried(Carried::state, item);
  const std::int64_t heads = item.block.head_end - item.block.head_begin, vectors = block_vectors(item.block);
  float* const memory = static_cast<float*>(states_.reserve(0)) +
                        splits_[static_cast<std::size_t>(item.split)].state_offset +
                        part * state_floats(vectors, layout_.head_dim);
  return state_at(memory, heads, vectors / heads, layout_.head_dim);
}

void AttentionPlan::run_item(const Batch& batch, const Item& item, int worker) {
  const std::int64_t vectors = block_vectors(item.block);
  const std::int64_t heads = item.block.head_end - item.block.head_begin;
  auto* scratch = static_cast<float*>(scratch_[static_cast<std::size_t>(worker)].reserve(0));
  void* kernel_scratch = scratch + state_floats(max_block_rows_, layout_.head_dim);
  const bool carries = item.carried >= 0 && item.part == 0;
  const bool whole_here = item.split < 0 && item.carried < 0;
  const RowState state =
      whole_here ? state_at(scratch, heads, vectors / heads, layout_.head_dim) : part_state(item, item.part);
  if (!carries) std::fill_n(state.sum, vectors, 0.0f);
  Span span{item.key_begin, item.key_end, state, state};
  if (item.carried >= 0) {
    // Every depth reads one of the two and writes the other: the parts of a split may run at the same time.
    const bool odd = item.depth % 2 != 0;
    span.open_in = carried(odd ? Carried::open_odd : Carried::open_even, item);
    span.open_out = carried(odd ? Carried::open_even : Carried::open_odd, item);
  }
  kernel_.attend(batch, item.block, span, state, kernel_scratch);
  RowState whole = state;
  if (item.split >= 0) {
    const std::size_t split = static_cast<std::size_t>(item.split);
    if (pending_[split].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    whole = part_state(item, 0);
    for (std::int32_t part = 1; part < splits_[split].num_parts; ++part) {
      kernel_.merge(heads, vectors / heads, layout_.head_dim, part_state(item, part), whole);
    }
  }
  if (!item.block.shared) kernel_.finish(batch, item.block, whole);
}

}  // namespace radixkv::attention
