// The schedule of one step: which blocks there are, which are split into chunks, and how they run on the threads.
#include "attention_plan.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "table_check.hpp"

namespace radixkv::attention {
namespace {

constexpr std::int64_t kBlockVectorsTarget = 96;  // query vectors per block: enough to pay for packing a tile
constexpr std::int32_t kFewRows = 4;              // new rows of a request up to which it is bound by memory
constexpr double kSerialCost = 2.0e6;             // multiply-adds: below this, waking a thread costs more than it gives
constexpr double kKeyCost = 4.0;                  // loading and packing a key, in query vectors' worth of work
constexpr std::int64_t kAppendRows = 256;         // rows per item of a parallel append

std::string text(std::int64_t n) { return std::to_string(n); }

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

void* AlignedBuffer::reserve(std::size_t bytes) {
  constexpr std::size_t kAlign = 64;
  if (bytes > bytes_) {
    const std::size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    void* memory = std::aligned_alloc(kAlign, rounded);
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, rounded);
    memory_.reset(memory);
    bytes_ = rounded;
  }
  return memory_.get();
}

void AlignedBuffer::Free::operator()(void* memory) const { std::free(memory); }

AttentionPlan::AttentionPlan(std::int32_t num_qo_heads, const KvLayout& layout, int num_threads, const char* isa)
    : num_qo_heads_(num_qo_heads), group_(0), layout_(layout), kernel_(kernel(isa)), pool_(num_threads) {
  if (layout.head_dim < 8 || layout.head_dim > kMaxHeadDim || layout.head_dim % 8 != 0) {
    fail("head_dim is " + text(layout.head_dim) + ": it must be a multiple of 8 from 8 to " + text(kMaxHeadDim));
  }
  if (layout.num_kv_heads < 1 || num_qo_heads < 1 || num_qo_heads % layout.num_kv_heads != 0) {
    fail("num_qo_heads is " + text(num_qo_heads) + " and num_kv_heads is " + text(layout.num_kv_heads) +
         ": both must be positive and the first a multiple of the second");
  }
  if (layout.page_size < 1) fail("page_size is " + text(layout.page_size) + ": it must be at least 1");
  if (layout.num_pages < 1) fail("num_pages is " + text(layout.num_pages) + ": it must be at least 1");
  if (static_cast<std::int64_t>(layout.num_pages) * layout.page_size > INT32_MAX) {
    fail("num_pages * page_size is " + text(static_cast<std::int64_t>(layout.num_pages) * layout.page_size) +
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

void AttentionPlan::plan(const PageTableView& table, const std::int32_t* slots, std::int64_t num_slots) {
  const std::int32_t batch_size = table.batch_size;
  check_table(table, layout_.page_size, layout_.num_pages);
  check_range("slots", slots, num_slots, static_cast<std::int64_t>(layout_.num_pages) * layout_.page_size);
  if (table.qo_indptr[batch_size] != num_slots) {
    fail("slots has " + text(num_slots) + " entries for " + text(table.qo_indptr[batch_size]) +
         " rows: give one slot for each row");
  }
  const std::lock_guard lock(mutex_);
  qo_indptr_.assign(table.qo_indptr, table.qo_indptr + batch_size + 1);
  kv_indptr_.assign(table.kv_indptr, table.kv_indptr + batch_size + 1);
  kv_indices_.assign(table.kv_indices, table.kv_indices + table.kv_indptr[batch_size]);
  kv_last_page_len_.assign(table.kv_last_page_len, table.kv_last_page_len + batch_size);
  slots_.assign(slots, slots + num_slots);
  schedule();
}

PageTableView AttentionPlan::view() const {
  return PageTableView{static_cast<std::int32_t>(kv_last_page_len_.size()), qo_indptr_.data(), kv_indptr_.data(),
                       kv_indices_.data(), kv_last_page_len_.data()};
}

std::int64_t AttentionPlan::block_vectors(const Block& block) const {
  return static_cast<std::int64_t>(block.head_end - block.head_begin) * (block.row_end - block.row_begin) * group_;
}

// Blocks of about kBlockVectorsTarget query vectors. Where a request has few rows, reading K and V is what costs, and a
// block takes all kv heads so that memory is read in the order of addresses; unless that leaves threads without work.
std::vector<AttentionPlan::Item> AttentionPlan::make_blocks() const {
  const PageTableView table = view();
  const std::int32_t heads = layout_.num_kv_heads;
  const auto target = static_cast<std::int32_t>(std::max<std::int64_t>(1, kBlockVectorsTarget / group_));
  std::int64_t chunks = 0;
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    chunks += table.num_rows(b) * ((table.kv_len(b, layout_.page_size) + kChunkKeys - 1) / kChunkKeys);
  }
  const std::int32_t threads = pool_.num_threads();
  const std::int32_t widest = chunks >= threads ? heads : std::max(1, heads / threads);
  std::vector<Item> blocks;
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    const std::int32_t rows = table.num_rows(b);
    const std::int64_t kv_len = table.kv_len(b, layout_.page_size);
    const bool few = rows <= kFewRows;
    const std::int32_t step = few ? widest : 1;
    const std::int32_t rows_per_block = few ? rows : target;
    for (std::int32_t begin = 0; begin < rows; begin += rows_per_block) {
      const std::int32_t end = std::min(rows, begin + rows_per_block);
      const std::int64_t keys = kv_len - rows + end;
      const auto chunks_of_block = static_cast<std::int32_t>((keys + kChunkKeys - 1) / kChunkKeys);
      for (std::int32_t head = 0; head < heads; head += step) {
        const Block block{b, head, std::min(heads, head + step), begin, end};
        const double per_key = static_cast<double>(block_vectors(block)) + kKeyCost * (block.head_end - head);
        const double cost = per_key * static_cast<double>(keys * layout_.head_dim);
        blocks.push_back(Item{block, 0, chunks_of_block, -1, cost});
      }
    }
  }
  return blocks;
}

// One item per block, the costly ones first. A block that would keep one thread busy while the others idle is split
// into its chunks. Neither changes a bit of the result.
void AttentionPlan::schedule() {
  const std::vector<Item> blocks = make_blocks();
  double total = 0.0;
  max_block_rows_ = 0;
  for (const Item& item : blocks) {
    total += item.cost;
    max_block_rows_ = std::max(max_block_rows_, block_vectors(item.block));
  }
  serial_ = pool_.num_threads() == 1 || total < kSerialCost;
  const double fair = total / (4.0 * pool_.num_threads());
  items_.clear();
  splits_.clear();
  states_floats_ = 0;
  for (const Item& item : blocks) {
    if (serial_ || item.cost <= fair || item.chunk_end < 2) {
      items_.push_back(item);
      continue;
    }
    const auto split = static_cast<std::int32_t>(splits_.size());
    splits_.push_back(Split{states_floats_, item.chunk_end});
    states_floats_ += item.chunk_end * state_floats(block_vectors(item.block), layout_.head_dim);
    for (std::int32_t c = 0; c < item.chunk_end; ++c) {
      items_.push_back(Item{item.block, c, c + 1, split, item.cost / item.chunk_end});
    }
  }
  std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  pending_ = std::make_unique<std::atomic<std::int32_t>[]>(splits_.size());
}

void AttentionPlan::append(const KvLayout& strides, void* k_cache, void* v_cache, const Rows& k, const Rows& v) {
  const std::lock_guard lock(mutex_);
  const std::int64_t rows = num_rows();
  const auto copy = [&](std::int64_t item, int) {
    const std::int64_t begin = item * kAppendRows;
    append_kv(strides, k_cache, v_cache, k, v, slots_.data(), begin, std::min(rows, begin + kAppendRows));
  };
  const std::int64_t items = (rows + kAppendRows - 1) / kAppendRows;
  pool_.for_each(items, copy);
}

void AttentionPlan::run(const KvLayout& strides, const void* k_cache, const void* v_cache, const Rows& q, void* out,
                        const AttentionParams& params) {
  const std::lock_guard lock(mutex_);
  const Batch batch{strides, view(), params, group_, k_cache, v_cache, q, out};
  const std::size_t state_bytes =
      static_cast<std::size_t>(state_floats(max_block_rows_, layout_.head_dim)) * sizeof(float);
  const std::size_t bytes = state_bytes + kernel_.scratch_bytes(max_block_rows_, layout_.head_dim);
  for (AlignedBuffer& scratch : scratch_) scratch.reserve(bytes);
  states_.reserve(static_cast<std::size_t>(states_floats_) * sizeof(float));
  for (std::size_t i = 0; i < splits_.size(); ++i) pending_[i].store(splits_[i].num_chunks, std::memory_order_relaxed);
  const auto work = [&](std::int64_t i, int worker) { run_item(batch, items_[static_cast<std::size_t>(i)], worker); };
  const auto count = static_cast<std::int64_t>(items_.size());
  if (serial_) {
    for (std::int64_t i = 0; i < count; ++i) work(i, 0);
  } else {
    pool_.for_each(count, work);
  }
}

void AttentionPlan::run_item(const Batch& batch, const Item& item, int worker) {
  const std::int64_t rows = block_vectors(item.block);
  const std::int64_t floats = state_floats(rows, layout_.head_dim);
  auto* scratch = static_cast<float*>(scratch_[static_cast<std::size_t>(worker)].reserve(0));
  void* kernel_scratch = scratch + state_floats(max_block_rows_, layout_.head_dim);
  float* memory = scratch;
  if (item.split >= 0) {
    memory = static_cast<float*>(states_.reserve(0)) + splits_[static_cast<std::size_t>(item.split)].state_offset +
             item.chunk_begin * floats;
  }
  const RowState state = state_at(memory, rows, layout_.head_dim);
  std::fill_n(state.sum, rows, 0.0f);
  kernel_.attend(batch, item.block, item.chunk_begin, item.chunk_end, state, kernel_scratch);
  if (item.split < 0) return kernel_.finish(batch, item.block, state);

  const Split& split = splits_[static_cast<std::size_t>(item.split)];
  if (pending_[static_cast<std::size_t>(item.split)].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  float* const first = static_cast<float*>(states_.reserve(0)) + split.state_offset;
  const RowState whole = state_at(first, rows, layout_.head_dim);
  for (std::int32_t c = 1; c < split.num_chunks; ++c) {
    kernel_.merge(rows, layout_.head_dim, state_at(first + c * floats, rows, layout_.head_dim), whole);
  }
  kernel_.finish(batch, item.block, whole);
}

}  // namespace radixkv::attention
