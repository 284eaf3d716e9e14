#include "attention/schedule.hpp"

#include <algorithm>
#include <numeric>

namespace radixkv::attention {
namespace {

constexpr std::int64_t kBlockVectorsTarget = 96;  // query vectors per block: enough to pay for packing a tile
constexpr std::int32_t kFewRows = 4;              // new rows of a request up to which it is bound by memory
constexpr std::int32_t kFewVectorsLimit = 256;    // query vectors of a head in their block, which is to stay in L2
constexpr double kSerialCost = 2.0e6;             // multiply-adds: below this, waking a thread costs more than it gives
constexpr double kKeyCost = 4.0;                  // loading and packing a key, in query vectors' worth of work
constexpr std::int32_t kSharedVectorsTarget = 256;  // query vectors per block of a shared segment, over all heads
constexpr std::int32_t kSharedVectorsLimit = 256;   // and of one head: beyond it K and V are read again

}  // namespace

void CarriedRows::find(const PageTableView& table, const Cascade& cascade) {
  rows.clear();
  positions.clear();
  of_request.assign(static_cast<std::size_t>(table.batch_size), -1);
  for (const std::int32_t b : cascade.order) {
    if (cascade.shared_pages[b] == 0) continue;
    of_request[b] = static_cast<std::int32_t>(rows.size());
    const std::int32_t count = table.num_rows(b);
    for (std::int32_t r = 0; r < count; ++r) {
      rows.push_back(table.qo_indptr[b] + r);
      positions.push_back(table.kv_len(b) - count + r);
    }
  }
}

std::int64_t Schedule::block_vectors(const Block& block) const {
  return static_cast<std::int64_t>(block.head_end - block.head_begin) * (block.row_end - block.row_begin) *
         shape.group();
}

// In multiply-adds, K and V together counted once.
double Schedule::cost(const Block& block, std::int64_t keys) const {
  const double per_key = static_cast<double>(block_vectors(block)) + kKeyCost * (block.head_end - block.head_begin);
  return per_key * static_cast<double>(keys * (shape.k_dim + shape.v_dim)) / 2.0;
}

// The rows of all users against the keys of their segment.
void Schedule::add_segment(const Step& step, const Segment& segment, std::vector<Item>& blocks) const {
  const std::int32_t first_user = step.cascade.order[segment.user_begin];
  const std::int32_t last_user = step.cascade.order[segment.user_end - 1];
  const std::int32_t begin = step.carried.of_request[first_user];
  const std::int32_t end = step.carried.of_request[last_user] + step.table.num_rows(last_user);
  const std::int32_t heads = shape.num_kv_heads;
  const std::int32_t width = std::clamp(kSharedVectorsTarget / (shape.group() * (end - begin)), 1, heads);
  const std::int32_t rows_per_block = std::max(1, kSharedVectorsLimit / shape.group());
  for (std::int32_t row = begin; row < end; row += rows_per_block) {
    for (std::int32_t head = 0; head < heads; head += width) {
      const Block block{first_user, head, std::min(heads, head + width), row, std::min(end, row + rows_per_block),
                        true};
      blocks.push_back(Item{block, segment.token_begin, segment.token_end, segment.level, segment.level, row,
                            cost(block, segment.token_end - segment.token_begin)});
    }
  }
}

// Blocks of about kBlockVectorsTarget query vectors. Where a request has few rows, reading K and V is what costs, and a
// block takes all kv heads so that memory is read in the order of addresses; unless that leaves threads without work.
void Schedule::add_requests(const Step& step, std::vector<Item>& blocks) const {
  const PageTableView& table = step.table;
  const std::int32_t heads = shape.num_kv_heads, threads = step.num_threads;
  const auto target = static_cast<std::int32_t>(std::max<std::int64_t>(1, kBlockVectorsTarget / shape.group()));
  const auto served = [&](std::int32_t b) { return step.cascade.token_at(step.cascade.shared_pages[b]); };
  std::int64_t chunks = 0;
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    chunks += table.num_rows(b) * ((table.kv_len(b) - served(b) + kChunkKeys - 1) / kChunkKeys);
  }
  const std::int32_t widest = chunks >= threads ? heads : std::max(1, heads / threads);
  for (std::int32_t b = 0; b < table.batch_size; ++b) {
    const std::int32_t rows = table.num_rows(b);
    const std::int64_t key_begin = served(b);
    const bool few = rows <= kFewRows;
    const std::int32_t width = few ? widest : 1;
    const std::int32_t rows_per_block = few ? std::min(rows, std::max(1, kFewVectorsLimit / shape.group())) : target;
    for (std::int32_t begin = 0; begin < rows; begin += rows_per_block) {
      const std::int32_t end = std::min(rows, begin + rows_per_block);
      const std::int64_t keys = table.kv_len(b) - rows + end;
      const std::int64_t key_end = (keys + kChunkKeys - 1) / kChunkKeys * kChunkKeys;
      const std::int32_t carried = step.carried.of_request[b] < 0 ? -1 : step.carried.of_request[b] + begin;
      for (std::int32_t head = 0; head < heads; head += width) {
        const Block block{b, head, std::min(heads, head + width), begin, end};
        blocks.push_back(Item{block, key_begin, key_end, step.cascade.levels, step.cascade.depths[b], carried,
                              cost(block, keys - key_begin)});
      }
    }
  }
}

void Schedule::make(const PageTableView& table, const Cascade& cascade, const CarriedRows& carried, int num_threads) {
  const Step step{table, cascade, carried, num_threads};
  std::vector<Item> blocks;
  for (const Segment& segment : cascade.segments) {
    if (segment.verdict == Verdict::used) add_segment(step, segment, blocks);
  }
  add_requests(step, blocks);
  std::vector<double> totals(static_cast<std::size_t>(cascade.levels) + 1, 0.0);
  max_block_vectors = 0;
  for (const Item& item : blocks) {
    totals[item.phase] += item.cost;
    max_block_vectors = std::max(max_block_vectors, block_vectors(item.block));
  }
  serial = num_threads == 1 || std::accumulate(totals.begin(), totals.end(), 0.0) < kSerialCost;
  items.clear();
  splits.clear();
  states_floats = 0;
  for (const Item& item : blocks) {
    serial ? items.push_back(item) : add_item(item, totals[item.phase] / (4.0 * num_threads));
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.phase != b.phase ? a.phase < b.phase : a.cost > b.cost;
  });
  phase_ends.assign(totals.size(), 0);
  for (const Item& item : items) ++phase_ends[item.phase];
  std::partial_sum(phase_ends.begin(), phase_ends.end(), phase_ends.begin());
}

// A block that would keep one thread busy while the others idle is split into its chunks.
void Schedule::add_item(const Item& item, double fair) {
  const auto parts =
      static_cast<std::int32_t>((item.key_end + kChunkKeys - 1) / kChunkKeys - item.key_begin / kChunkKeys);
  if (item.cost <= fair || parts < 2) return items.push_back(item);
  Item part = item;
  part.split = static_cast<std::int32_t>(splits.size());
  splits.push_back(Split{states_floats, parts});
  states_floats += parts * state_floats(block_vectors(item.block), shape.v_dim);
  for (part.cost = item.cost / parts; part.part < parts; ++part.part, part.key_begin = part.key_end) {
    part.key_end = std::min(item.key_end, (part.key_begin / kChunkKeys + 1) * kChunkKeys);
    items.push_back(part);
  }
}

}  // namespace radixkv::attention
