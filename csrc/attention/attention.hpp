// Attention over paged K/V on the CPU: prefill, extend and decode rows mixed in one ragged batch.
//
// The contract: an output row depends on its query, its keys and values and the parameters, bit for bit, and on nothing
// else: not on which of the keys were cached, the page size, the page ids, the other rows of the batch or the number
// of threads. Every query row meets its keys in the same order with the same arithmetic:
//
//   position   0        64       128            512                      1024
//              |--tile--|--tile--| ... |--tile--|--tile--| ...  |--tile--|--- ...
//              |------------- chunk ------------|------------ chunk -----|--- ...
//
// Tiles and chunks lie at absolute positions. Within a chunk a row runs an online softmax tile by tile from a fresh
// state; the states of its chunks are merged from left to right. Keys that a row does not see contribute no operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/layer.hpp"
#include "step/table_view.hpp"

namespace radixkv::attention {

constexpr int kTileKeys = 64;
constexpr int kChunkKeys = 512;

// What a call may choose, beside its layer and tensors.
struct Options {
  float sm_scale;
  std::int32_t window_left = -1;  // keys seen before the query's own; -1: all
  float logits_soft_cap = 0.0f;   // 0: off; else cap * tanh(logit / cap)
  // 0: off; else positions are cut at multiples of this, and a query sees no key before the last cut.
  std::int32_t attention_chunk = 0;
  const float* sinks = nullptr;  // [num_qo_heads], or none: a logit in each head's denominator, with no value
};

// Rows of q, k or v: [rows, heads, dim], the last dimension contiguous, strides in elements.
struct Rows {
  const void* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

// Query rows with all query heads of the kv heads [head_begin, head_end): rows [row_begin, row_end) of one request,
// counted within the request; or, where `shared`, carried rows [row_begin, row_end) of several requests (see Batch)
// that all have the pages of `request` and see every key of the span, but for the window.
struct Block {
  std::int32_t request;
  std::int32_t head_begin;
  std::int32_t head_end;
  std::int32_t row_begin;
  std::int32_t row_end;
  bool shared = false;
};

// The running softmax of the heads * rows * group query vectors of a block, ordered (kv head, row, query head): a
// head's vectors lie together, head_stride vectors after those of the head before. A query vector that has met no key
// has sum 0. Between chunks this is all there is to carry: a caller may stop a block after any chunk and go on with the
// next one elsewhere. Between the tiles of a chunk there are two, the state of the chunks before it and its own.
struct RowState {
  float* max;  // [vectors], in units of log2
  float* sum;  // [vectors]
  float* acc;  // [vectors, padded_dim(v_dim)]
  std::int64_t head_stride;
};

// Keys [key_begin, key_end) at tile boundaries, cut where the rows end to see keys. A span that begins inside a chunk
// goes on with that chunk's state from open_in; one that ends inside a chunk leaves its state in open_out.
struct Span {
  std::int64_t key_begin;
  std::int64_t key_end;
  RowState open_in;
  RowState open_out;
};

constexpr std::int64_t padded_dim(std::int64_t dim) { return (dim + 15) / 16 * 16; }
constexpr std::int64_t state_floats(std::int64_t rows, std::int64_t v_dim) {
  return rows * padded_dim(v_dim) + (2 * rows + 15) / 16 * 16;
}
// The state of a block of `heads` heads with `vectors` query vectors each, end to end.
RowState state_at(float* memory, std::int64_t heads, std::int64_t vectors, std::int64_t v_dim);

// The same state from another vector on.
inline RowState state_from(const RowState& state, std::int64_t vector, std::int64_t v_dim) {
  return RowState{state.max + vector, state.sum + vector, state.acc + vector * padded_dim(v_dim), state.head_stride};
}

// Everything that the blocks of one call have in common.
struct Batch {
  const LayerKV& layer;
  DType dtype;  // of q and out
  PageTableView table;
  Options options;
  Rows q;
  void* out;  // [rows, num_qo_heads, v_dim], contiguous
  // Carried rows: those that shared blocks compute, the users of a segment next to each other.
  const std::int32_t* carried_rows = nullptr;       // for each its row in q
  const std::int64_t* carried_positions = nullptr;  // and its position in its sequence
};

// The kernel, compiled once per instruction set.
struct Kernel {
  const char* isa;
  // Bytes of scratch memory (64-byte aligned) that attend needs for blocks of up to `rows` query vectors.
  std::size_t (*scratch_bytes)(std::int64_t rows, std::int64_t k_dim, std::int64_t v_dim);
  // Carries the block's state over the keys of the span.
  void (*attend)(const Batch& batch, const Block& block, const Span& span, const RowState& state, void* scratch);
  // Merges the state of a later chunk into the state of the chunks before it: `heads` heads of `vectors` each.
  void (*merge)(std::int64_t heads, std::int64_t vectors, std::int64_t v_dim, const RowState& later,
                const RowState& state);
  // Writes acc / (sum + sink), rotated back and scaled, to the block's rows of batch.out.
  void (*finish)(const Batch& batch, const Block& block, const RowState& state);
  // Stores a row x of one head, of `dtype`, in the format of `to`, whose row and its scale begin at `row` and `scale`.
  // centre: the head's, or null. Measures the error if `sampled`.
  void (*store_row)(DType dtype, const void* x, const Cache& to, const float* centre, char* row, char* scale,
                    bool sampled, RowCounts& counts);
};

// Stores row r of `rows`, of `dtype`, into slot slots[r] = page * page_size + offset, for every r in [begin, end).
// before: rows of a head that were stored already; every kSampled-th is sampled.
RowCounts store_rows(const Kernel& kernel, DType dtype, std::int32_t num_heads, std::int32_t page_size,
                     const Cache& cache, const Rows& rows, const std::int32_t* slots, std::int64_t begin,
                     std::int64_t end, std::int64_t before);

// The best kernel that this machine runs, or the one named by the environment variable RADIXKV_ISA. `isa` null or
// empty: the environment's choice. Throws Error (InvalidArgument) for a name that is unknown or not supported here.
const Kernel& kernel(const char* isa = nullptr);

// The names of the kernels that this machine runs, best first.
std::vector<std::string> supported_isas();

}  // namespace radixkv::attention
