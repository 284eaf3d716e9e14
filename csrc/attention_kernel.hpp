// The attention kernel. Included by one translation unit per instruction set, which defines RADIXKV_ISA; it uses
// nothing of the standard library that could be emitted as an inline function for one machine and run on another.
//
// One block = some consecutive rows of one request, or some rows that share a prefix, with the query heads of some
// consecutive kv heads. For every tile
// of keys and every kv head: pack K transposed and V into scratch memory, scores = Q K^T for all query vectors at once,
// softmax row by row, acc += P V.
#pragma once

#include "attention.hpp"
#include "attention_state.hpp"

namespace radixkv::attention::RADIXKV_ISA {

constexpr int kTileVectors = kTileKeys / kLanes;

// Scratch memory of one thread, in floats and all 64-byte aligned.
struct Scratch {
  float* q;       // [R, head_dim / kStep]
  float* scores;  // [R, kTileKeys]; then the probabilities, kTileKeys / kStep of them
  float* keys;    // [head_dim / kStep, kTileKeys]
  float* values;  // [kTileKeys / kStep, padded_dim]
  float* single;  // [padded_dim]: one half-masked pair of values
  float* zeros;   // [kMaxHeadDim]
  RowState chunk;
};

constexpr std::int64_t aligned_floats(std::int64_t n) { return (n + 15) / 16 * 16; }

static std::size_t scratch_bytes(std::int64_t rows, std::int64_t head_dim) {
  const std::int64_t floats = aligned_floats(rows * head_dim) + rows * kTileKeys + head_dim * kTileKeys +
                              (kTileKeys + 1) * padded_dim(head_dim) + kMaxHeadDim + state_floats(rows, head_dim);
  return static_cast<std::size_t>(floats) * sizeof(float);
}

RADIXKV_INLINE Scratch scratch_at(void* memory, std::int64_t heads, std::int64_t vectors, std::int64_t head_dim) {
  Scratch s;
  const std::int64_t rows = heads * vectors;
  float* at = static_cast<float*>(memory);
  s.q = at, at += aligned_floats(rows * head_dim);
  s.scores = at, at += rows * kTileKeys;
  s.keys = at, at += head_dim * kTileKeys;
  s.values = at, at += kTileKeys * padded_dim(head_dim);
  s.single = at, at += padded_dim(head_dim);
  s.zeros = at, at += kMaxHeadDim;
  const std::int64_t padded = padded_dim(head_dim);
  s.chunk = RowState{at + rows * padded, at + rows * padded + rows, at, vectors};
  return s;
}

// Where the keys of a tile and their values lie.
struct Addresses {
  int count;
  const char* keys[kTileKeys];
  const char* values[kTileKeys];
};

// One block over its tiles.
template <class Format>
struct BlockKernel {
  using Op = typename Format::Op;
  static constexpr int kStep = Format::kStep;
  static constexpr bool kPairs = kStep == 2;

  const Batch& batch;
  const Block& block;
  Scratch s;
  int head_dim, group, rows, vectors;  // rows: query rows; vectors: of one row of V
  int heads;                           // kv heads
  int head = 0;                        // the one at hand, counted from the block's first
  std::int64_t first_position;         // of the block's first row
  const std::int64_t* positions;       // of every row, if the block is shared
  Addresses tiles[2];
  Addresses *here = tiles, *next = tiles + 1;    // of the tile at hand and the one after it
  int turn = 0, share = 0;                       // the rows of the next tile that the head at hand prefetches
  std::int64_t num_runs, run_bytes, run_stride;  // one key of all heads: so many runs of consecutive bytes

  BlockKernel(const Batch& batch, const Block& block, void* scratch) : batch(batch), block(block) {
    head_dim = batch.layout.head_dim;
    group = batch.group;
    rows = block.row_end - block.row_begin;
    vectors = static_cast<int>(padded_dim(head_dim)) / kLanes;
    heads = block.head_end - block.head_begin;
    s = scratch_at(scratch, heads, static_cast<std::int64_t>(rows) * group, head_dim);
    for (int i = 0; i < kMaxHeadDim; ++i) s.zeros[i] = 0.0f;
    const std::int64_t kv_len = batch.table.kv_len(block.request, batch.layout.page_size);
    const bool together = batch.layout.head_stride == head_dim;
    num_runs = together ? 1 : heads;
    run_bytes = (together ? heads : 1) * static_cast<std::int64_t>(head_dim) * Format::kBytes;
    run_stride = together ? run_bytes : batch.layout.head_stride * Format::kBytes;
    first_position = kv_len - batch.table.num_rows(block.request) + block.row_begin;
    positions = block.shared ? batch.carried_positions + block.row_begin : nullptr;
  }

  std::int64_t position(int row) const { return positions == nullptr ? first_position + row : positions[row]; }
  std::int64_t first_key(int row) const {
    const std::int64_t window = batch.params.window_left;
    return window < 0 || position(row) < window ? 0 : position(row) - window;
  }

  // The query vectors of the head at hand start here among all of the block's, ordered (kv head, row, query head).
  std::int64_t base() const { return static_cast<std::int64_t>(head) * rows * group; }

  void pack_queries() {
    const auto* data = static_cast<const char*>(batch.q.data);
    const std::int64_t bytes = element_size(batch.layout.dtype);
    const std::int64_t first_row = batch.table.qo_indptr[block.request] + block.row_begin;
    float* to = s.q;
    for (int h = 0; h < heads; ++h) {
      const std::int64_t first_head = static_cast<std::int64_t>(block.head_begin + h) * group;
      for (int i = 0; i < rows * group; ++i, to += head_dim / kStep) {
        const std::int64_t row = block.shared ? batch.carried_rows[block.row_begin + i / group] : first_row + i / group;
        const std::int64_t query_head = first_head + i % group;
        const char* from = data + (row * batch.q.row_stride + query_head * batch.q.head_stride) * bytes;
        if constexpr (kPairs) {
          __builtin_memcpy(to, from, static_cast<std::size_t>(head_dim) * 2);
        } else {
          widen(batch.layout.dtype, from, to, head_dim);
        }
      }
    }
  }

  // The addresses of keys [begin, end), at most a tile of them, in the block's first head.
  void resolve(std::int64_t begin, std::int64_t end, Addresses& to) const {
    const KvLayout& layout = batch.layout;
    const std::int32_t* pages = batch.table.kv_indices + batch.table.kv_indptr[block.request];
    const std::int64_t first_head = block.head_begin * layout.head_stride;
    std::int64_t page = begin / layout.page_size;
    std::int64_t slot = begin % layout.page_size;
    to.count = static_cast<int>(max_int64(0, min_int64(end - begin, kTileKeys)));
    for (int i = 0; i < to.count;) {
      const int run = min_int(to.count - i, static_cast<int>(layout.page_size - slot));
      std::int64_t at = pages[page] * layout.page_stride + slot * layout.slot_stride + first_head;
      for (const int stop = i + run; i < stop; ++i, at += layout.slot_stride) {
        to.keys[i] = static_cast<const char*>(batch.k_cache) + at * Format::kBytes;
        to.values[i] = static_cast<const char*>(batch.v_cache) + at * Format::kBytes;
      }
      ++page;
      slot = 0;
    }
  }

  // Bytes from the block's first head to the one at hand.
  std::int64_t head_offset() const { return head * batch.layout.head_stride * Format::kBytes; }

  // Starts loading one key or value into the L2 cache, of all heads of the block: neighbours in memory, as a rule.
  // L2 takes many more misses at a time than L1. Inlined by force: GCC deletes calls of functions that only prefetch.
  __attribute__((always_inline)) void prefetch(const char* row) const {
    const char* const end = row + run_stride * num_runs;
    for (const char* run = row; run != end; run += run_stride) {
      for (std::int64_t byte = 0; byte < run_bytes; byte += 64) __builtin_prefetch(run + byte, 0, 2);
    }
  }

  // Of the next tile's keys, or values, those whose turn it is while keys [done, done + step) of this tile are packed
  // for the head at hand: all heads together prefetch the tile once, evenly.
  __attribute__((always_inline)) void prefetch_some(const char* const* row_addresses, int done, int step) const {
    const int from = turn + share * done / kTileKeys, to = turn + share * (done + step) / kTileKeys;
    for (int i = from; i < min_int(to, next->count); ++i) prefetch(row_addresses[i]);
  }

  // K of the tile, transposed; the next tile's keys are prefetched on the way.
  void pack_keys() {
    const int depth = head_dim / kStep;
    for (int first = 0; first < here->count; first += kLanes) {
      const char* from[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        from[i] =
            first + i < here->count ? here->keys[first + i] + head_offset() : reinterpret_cast<const char*>(s.zeros);
      }
      prefetch_some(next->keys, first, kLanes);
      int d = 0;
      for (; d + kLanes <= depth; d += kLanes) pack_key_block(from, d, kLanes, first);
      if (d < depth) pack_key_block(from, d, depth - d, first);
    }
  }

  __attribute__((always_inline)) void pack_key_block(const char* const (&from)[kLanes], int d, int n, int first) {
    F r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = Format::load(from[i] + d * (Format::kBytes * kStep), n);
    transpose(r);
    float* to = s.keys + d * kTileKeys + first;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < n) store(to + i * kTileKeys, r[i]);
    }
  }

  // V of the tile, widened or paired; the next tile's values are prefetched on the way.
  void pack_values() {
    const std::int64_t stride = vectors * kLanes, offset = head_offset();
    const int count = here->count;
    for (int key = 0; key < count; key += kStep) {
      prefetch_some(next->values, key, kStep);
      pack_value(here->values[key] + offset, key + 1 < count ? here->values[key + 1] + offset : nullptr,
                 s.values + key / kStep * stride, head_dim);
    }
  }

  // One row of packed values: of one key, or of a pair of which the second may be missing.
  __attribute__((always_inline)) void pack_value(const char* first, [[maybe_unused]] const char* second, float* to,
                                                 int dims) const {
    int d = 0;
    if constexpr (kPairs) {
#if defined(RADIXKV_SIMD_PAIRS)
      if (second == nullptr) second = reinterpret_cast<const char*>(s.zeros);
      const auto pack = [&](int n) __attribute__((always_inline)) {
        const int at = d * Format::kBytes;
        interleave(Format::load(first + at, n / 2), Format::load(second + at, n / 2), n, to + d);
      };
      for (; d + 32 <= dims; d += 32) pack(32);
      if (d < dims) pack(dims - d);
#endif
    } else {
      for (; d + kLanes <= dims; d += kLanes) store(to + d, Format::load(first + d * Format::kBytes, kLanes));
      if (d < dims) store(to + d, Format::load(first + d * Format::kBytes, dims - d));
    }
  }

  void multiply_scores(int begin, int end, int key_vectors) {
    const int depth = head_dim / kStep;
    for (int i = begin; i < end;) {
      const int n = balanced(end - i);
      multiply<Op>(n, key_vectors, s.q + (base() + i) * depth, depth, s.keys, kTileKeys, s.scores + i * kTileKeys,
                   kTileKeys, depth, false);
      i += n;
    }
  }

  // The size of the next group of query vectors, so that `left` of them fall into groups of even size.
  static int balanced(int left) {
    const int groups = (left + kBlockRows - 1) / kBlockRows;
    return (left + groups - 1) / groups;
  }

  // Scores of keys [lo, hi) of the tile to probabilities, in place.
  void softmax(int i, int lo, int hi) {
    float* scores = s.scores + i * kTileKeys;
    const F negative = set1(kNegativeInfinity);
    F x[kTileVectors];
    scale_logits(scores, x);
    F top = negative;
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      if (lo > 0 || hi < kTileKeys) x[v] = select(x[v], lo - v * kLanes, hi - v * kLanes, negative);
      top = max(top, x[v]);
    }
    float& row_max = s.chunk.max[base() + i];
    const float tile_max = reduce_max(top);
    if (tile_max > row_max) raise_max(base() + i, tile_max);
    const F shift = set1(row_max);
    F total = zero();
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      F p = exp2_nonpositive<kPairs>(sub(x[v], shift));
      if constexpr (kPairs) {
#if defined(RADIXKV_SIMD_PAIRS)
        p = store_rounded(scores + v * (kLanes / 2), p);
#endif
      } else {
        store(scores + v * kLanes, p);
      }
      total = add(total, p);
    }
    s.chunk.sum[base() + i] += reduce_add(total);
  }

  void scale_logits(const float* scores, F (&x)[kTileVectors]) const {
    const float cap = batch.params.logits_soft_cap;
    if (cap > 0.0f) {
      const F inner = set1(batch.params.sm_scale / cap), outer = set1(cap * kLog2E);
      for (int v = 0; v < kTileVectors; ++v) x[v] = mul(tanh(mul(load(scores + v * kLanes), inner)), outer);
    } else {
      const F scale = set1(batch.params.sm_scale * kLog2E);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; ++v) x[v] = mul(load(scores + v * kLanes), scale);
    }
  }

  void raise_max(std::int64_t i, float new_max) {
    const float factor = exp2_nonpositive(s.chunk.max[i] - new_max);
    float* acc = s.chunk.acc + i * vectors * kLanes;
    for (int v = 0; v < vectors; ++v) store(acc + v * kLanes, mul(load(acc + v * kLanes), set1(factor)));
    s.chunk.sum[i] *= factor;
    s.chunk.max[i] = new_max;
  }

  // acc[i .. i + n) += P V over steps [begin, end) of the tile.
  void accumulate(int i, int n, int begin, int end) {
    if (begin >= end) return;
    const std::int64_t stride = vectors * kLanes;
    multiply<Op>(n, vectors, s.scores + i * kTileKeys + begin, kTileKeys, s.values + begin * stride, stride,
                 s.chunk.acc + (base() + i) * stride, stride, end - begin, true);
  }

  // acc[i] += P V over keys [lo, hi), touching no other key: its value may be anything, and 0 * NaN is NaN.
  void accumulate_row(int i, int lo, int hi) {
    if (lo >= hi) return;
    if constexpr (kPairs) {
      if (lo % 2 != 0) accumulate_half(i, lo / 2, true);
      accumulate(i, 1, (lo + 1) / 2, hi / 2);
      if (hi % 2 != 0) accumulate_half(i, hi / 2, false);
    } else {
      accumulate(i, 1, lo, hi);
    }
  }

  void accumulate_half(int i, int pair, bool second) {
#if defined(RADIXKV_SIMD_PAIRS)
    const std::int64_t stride = vectors * kLanes;
    for (int v = 0; v < vectors; ++v) {
      store(s.single + v * kLanes, keep_half(load(s.values + pair * stride + v * kLanes), second));
    }
    multiply<Op>(1, vectors, s.scores + i * kTileKeys + pair, kTileKeys, s.single, stride,
                 s.chunk.acc + (base() + i) * stride, stride, 1, true);
#endif
  }

  // Softmax and P V of query vectors [begin, end) for the tile of keys at `tile`.
  void consume(int begin, int end, std::int64_t tile) {
    for (int i = begin; i < end;) {
      const int n = balanced(end - i);
      int lo[kBlockRows], hi[kBlockRows];
      int lo_max = 0, hi_min = kTileKeys;
      for (int j = 0; j < n; ++j) {
        const int row = (i + j) / group;
        lo[j] = static_cast<int>(max_int64(first_key(row) - tile, 0));
        hi[j] = static_cast<int>(min_int64(position(row) + 1 - tile, kTileKeys));
        softmax(i + j, lo[j], hi[j]);
        lo_max = max_int(lo_max, lo[j]);
        hi_min = min_int(hi_min, hi[j]);
      }
      // What all of them see is done together, what only some see row by row, in the order of the keys.
      const int from = (lo_max + kStep - 1) / kStep, to = hi_min / kStep;
      if (from < to) {
        for (int j = 0; j < n; ++j) accumulate_row(i + j, lo[j], from * kStep);
        accumulate(i, n, from, to);
        for (int j = 0; j < n; ++j) accumulate_row(i + j, to * kStep, hi[j]);
      } else {
        for (int j = 0; j < n; ++j) accumulate_row(i + j, lo[j], hi[j]);
      }
      i += n;
    }
  }

  // The tile of keys at `tile`, for the rows that see some of it.
  void visit(std::int64_t tile) {
    int begin = block.shared ? 0 : static_cast<int>(max_int64(0, tile - first_position));
    int end = rows;
    while (end > begin && left_behind(end - 1, tile)) --end;
    // Rows of a request that left the tile behind are at the end: first_key never falls from row to row.
    if (block.shared) begin = next_row(begin, end, tile, true);
    if (begin >= end) return;
    for (head = 0; head < heads; ++head) {
      turn = head * kTileKeys / heads;
      share = (head + 1) * kTileKeys / heads - turn;
      pack_keys();
      pack_values();
      for (int from = begin; from < end;) {
        const int to = block.shared ? next_row(from, end, tile, false) : end;
        multiply_scores(from * group, to * group, (here->count + kLanes - 1) / kLanes);
        consume(from * group, to * group, tile);
        from = block.shared ? next_row(to, end, tile, true) : to;
      }
    }
  }

  bool left_behind(int row, std::int64_t tile) const { return first_key(row) >= tile + kTileKeys; }

  // The first row from `from` on that sees the tile, or that does not; `end` if there is none.
  int next_row(int from, int end, std::int64_t tile, bool sees) const {
    if (batch.params.window_left < 0) return sees ? from : end;
    while (from < end && left_behind(from, tile) == sees) ++from;
    return from;
  }

  void reset_chunk() {
    const int n = heads * rows * group;
    for (int i = 0; i < n; ++i) {
      s.chunk.max[i] = kNegativeInfinity;
      s.chunk.sum[i] = 0.0f;
    }
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(n) * vectors; ++i) store(s.chunk.acc + i * kLanes, zero());
  }

  // Copies the block's states, head by head.
  void copy_state(const RowState& from, const RowState& to) const {
    const std::int64_t n = static_cast<std::int64_t>(rows) * group, width = static_cast<std::int64_t>(vectors) * kLanes;
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t a = h * from.head_stride, b = h * to.head_stride;
      __builtin_memcpy(to.max + b, from.max + a, static_cast<std::size_t>(n) * sizeof(float));
      __builtin_memcpy(to.sum + b, from.sum + a, static_cast<std::size_t>(n) * sizeof(float));
      __builtin_memcpy(to.acc + b * width, from.acc + a * width, static_cast<std::size_t>(n * width) * sizeof(float));
    }
  }

  // The end of the keys that the rows see, and the tile of the first.
  std::int64_t end_of_keys() const {
    return block.shared ? batch.table.kv_len(block.request, batch.layout.page_size) : position(rows - 1) + 1;
  }
  std::int64_t first_tile() const {
    std::int64_t first = first_key(0);
    for (int row = 1; block.shared && row < rows; ++row) first = min_int64(first, first_key(row));
    return first / kTileKeys * kTileKeys;
  }

  void attend(const Span& span, const RowState& state);
};

template <class Format>
void BlockKernel<Format>::attend(const Span& span, const RowState& state) {
  const bool leaves_open = span.key_end % kChunkKeys != 0;
  const std::int64_t last = min_int64(end_of_keys(), span.key_end);
  const std::int64_t first = max_int64(span.key_begin, first_tile());
  if (first >= last && leaves_open) {  // no row has seen a key of the open chunk
    reset_chunk();
    copy_state(s.chunk, span.open_out);
  }
  resolve(first, last, *next);
  for (int i = 0; i < next->count; ++i) prefetch(next->keys[i]);
  for (int i = 0; i < next->count; ++i) prefetch(next->values[i]);
  pack_queries();
  for (std::int64_t begin = first; begin < last;) {
    const std::int64_t chunk = begin / kChunkKeys * kChunkKeys, end = min_int64(chunk + kChunkKeys, last);
    if (chunk < span.key_begin) {
      copy_state(span.open_in, s.chunk);
    } else {
      reset_chunk();
    }
    for (; begin < end; begin += kTileKeys) {
      Addresses* const done = here;
      here = next;
      next = done;
      resolve(begin + kTileKeys, last, *next);
      visit(begin);
    }
    if (leaves_open && end == span.key_end) {
      copy_state(s.chunk, span.open_out);
    } else {
      merge(heads, static_cast<std::int64_t>(rows) * group, head_dim, s.chunk, state);
    }
  }
}

static void attend(const Batch& batch, const Block& block, const Span& span, const RowState& state, void* scratch) {
#if defined(RADIXKV_SIMD_PAIRS)
  using BF16 = FormatPairs;
  if (batch.layout.dtype == DType::bf16 && batch.layout.kv_dtype == DType::f8) {
    return BlockKernel<FormatF8Pairs>(batch, block, scratch).attend(span, state);
  }
#else
  using BF16 = FormatBF16;
#endif
  switch (batch.layout.kv_dtype) {
    case DType::f32:
      return BlockKernel<FormatF32>(batch, block, scratch).attend(span, state);
    case DType::bf16:
      return BlockKernel<BF16>(batch, block, scratch).attend(span, state);
    case DType::f16:
      return BlockKernel<FormatF16>(batch, block, scratch).attend(span, state);
    case DType::f8:
      return BlockKernel<FormatF8>(batch, block, scratch).attend(span, state);
  }
}

static void finish(const Batch& batch, const Block& block, const RowState& state) {
  switch (batch.layout.dtype) {
    case DType::f32:
      return finish_rows<FormatF32>(batch, block, state);
    case DType::bf16:
      return finish_rows<FormatBF16>(batch, block, state);
    default:
      return finish_rows<FormatF16>(batch, block, state);
  }
}

}  // namespace radixkv::attention::RADIXKV_ISA
