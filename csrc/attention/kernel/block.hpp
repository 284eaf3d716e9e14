// The attention kernel. Included by one translation unit per instruction set, which defines RADIXKV_ISA; it uses
// nothing of the standard library that could be emitted as an inline function for one machine and run on another.
//
// One block = some consecutive rows of one request, or some rows that share a prefix, with the query heads of some
// consecutive kv heads. For every tile of keys and every kv head: scores = Q K^T for all query vectors, kLanes keys at
// a time; softmax; acc += P V. Products are of fp32, of pairs of bf16, or of codes of 8 bits with integers of 16; rows
// that are stored otherwise are widened in scratch memory first. Few query vectors read rows as they lie; for many, keys
// become columns and values one array.
#pragma once

#include "attention/attention.hpp"
#include "attention/kernel/scratch.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// Up to so many query vectors read keys that were widened as rows: making columns of them costs more.
constexpr int kRowsOfWidened = 4 * kBlockRows;

// One block over its tiles.
template <class Format>
struct BlockKernel {
  using Op = typename Format::Op;
  static constexpr int kStep = Op::kStep;
  static constexpr bool kIntegers = Format::kStored == DType::i8;
  static constexpr bool kPairs = Format::kStored == DType::bf16;  // of bf16

  const Batch& batch;
  const Block& block;
  Scratch s;
  int k_dim, v_dim, group, rows, vectors;  // rows: query rows; vectors: of one row of V
  int heads;                               // kv heads
  int head = 0;                            // the one at hand, counted from the block's first
  std::int64_t first_position;             // of the block's first row
  const std::int64_t* positions;           // of every row, if the block is shared
  Tiles tiles;
  bool values_in_place = false;
  ValueRows<Format> values{};       // if so
  const char* widened[kLanes];      // the rows of s.rows
  const char* unpacked[kTileKeys];  // those of s.codes

  BlockKernel(const Batch& batch, const Block& block, void* scratch) : batch(batch), block(block), tiles(batch, block) {
    k_dim = batch.layer.k.dim;
    v_dim = batch.layer.v.dim;
    group = batch.layer.group();
    rows = block.row_end - block.row_begin;
    vectors = static_cast<int>(padded_dim(v_dim)) / kLanes;
    heads = block.head_end - block.head_begin;
    s = scratch_at(scratch, heads, static_cast<std::int64_t>(rows) * group, k_dim, v_dim);
    for (int i = 0; i < kMaxHeadDim; ++i) s.zeros[i] = 0.0f;
    for (int i = 0; i < kLanes; ++i) widened[i] = reinterpret_cast<const char*>(s.rows + i * row_stride());
    for (int key = 0; key < kTileKeys; ++key) {  // what stands behind a value that widen_rows leaves there
      for (int d = v_dim; d < vectors * kLanes; ++d) s.values[key * vectors * kLanes + d] = 0.0f;
      unpacked[key] = reinterpret_cast<const char*>(s.codes + key * padded_dim(v_dim) / 4);
    }
    const std::int64_t kv_len = batch.table.kv_len(block.request);
    first_position = kv_len - batch.table.num_rows(block.request) + block.row_begin;
    positions = block.shared ? batch.carried_positions + block.row_begin : nullptr;
  }

  std::int64_t position(int row) const { return positions == nullptr ? first_position + row : positions[row]; }
  std::int64_t first_key(int row) const {
    const std::int64_t window = batch.options.window_left, chunk = batch.options.attention_chunk, own = position(row);
    const std::int64_t first = window < 0 || own < window ? 0 : own - window;
    return chunk == 0 ? first : max_int64(first, own / chunk * chunk);
  }

  // The query vectors of the head at hand start here among all of the block's, ordered (kv head, row, query head).
  std::int64_t base() const { return static_cast<std::int64_t>(head) * rows * group; }

  void pack_queries() {
    const auto* data = static_cast<const char*>(batch.q.data);
    const std::int64_t bytes = row_bytes(batch.dtype, 1);
    const std::int64_t first_row = batch.table.qo_indptr[block.request] + block.row_begin;
    const int vectors_of_q = rows * group, fours = k_dim / kStep / 4;
    float vector[kMaxHeadDim];
    for (int h = 0; h < heads; ++h) {
      const std::int64_t first_head = static_cast<std::int64_t>(block.head_begin + h) * group;
      for (int i = 0; i < vectors_of_q; ++i) {
        const std::int64_t row = block.shared ? batch.carried_rows[block.row_begin + i / group] : first_row + i / group;
        const std::int64_t query_head = first_head + i % group;
        const char* from = data + (row * batch.q.row_stride + query_head * batch.q.head_stride) * bytes;
        if constexpr (kPairs) {
          __builtin_memcpy(vector, from, static_cast<std::size_t>(k_dim) * 2);
        } else {
          widen(batch.dtype, from, vector, k_dim);
          if (offsets_show()) s.q_offsets[h * vectors_of_q + i] = offset_of(vector, block.head_begin + h);
          if (batch.layer.k.rotated) rotate(vector, k_dim);
          if constexpr (kIntegers) s.q_scales[h * vectors_of_q + i] = round_query(vector, k_dim);
        }
        float* to = s.q + (static_cast<std::int64_t>(h) * fours * vectors_of_q + i) * 4;
        for (int d = 0; d < fours; ++d, to += 4 * vectors_of_q) __builtin_memcpy(to, vector + 4 * d, 16);
      }
    }
  }

  // A centre adds the same to all scores of a vector, which softmax does not see unless logits are capped.
  bool offsets_show() const { return batch.layer.k.centre != nullptr && batch.options.logits_soft_cap > 0.0f; }
  float offset_of(const float* vector, std::int64_t kv_head) const {
    const float* const centre = batch.layer.k.centre + kv_head * k_dim;
    float sum = 0.0f;
    for (int d = 0; d < k_dim; ++d) sum += vector[d] * centre[d];
    return sum / batch.layer.k.product_scale();
  }

  // Bytes from the block's first head to the one at hand.
  std::int64_t key_offset() const { return head * batch.layer.k.head_stride; }
  std::int64_t value_offset() const { return head * batch.layer.v.head_stride; }

  static bool is_product(const Cache& cache) { return cache.dtype == Format::kStored; }
  std::int64_t row_stride() const { return max_int(k_dim, v_dim); }

  // kLanes keys from `first` on, as products take them: where they lie, or widened.
  KeyRows<Format> key_rows(int first) {
    if (is_product(batch.layer.k)) return {tiles.here().keys + first, key_offset()};
    widen_rows<Format>(batch.layer.k, stored_keys(first), kLanes, s.rows, row_stride());
    return {widened, 0};
  }
  StoredRows stored_keys(int first) const {
    const Addresses& here = tiles.here();
    return {here.keys + first, key_offset(), here.key_scales + first, head * kScaleBytes};
  }

  // The same as columns, for score_block. What a load widens need not become a row first.
  KeyColumns pack_keys(int first) {
    if constexpr (Format::kStored == DType::f32) {
      const char* const* const keys = tiles.here().keys + first;
      switch (batch.layer.k.dtype) {
        case DType::bf16:
          return pack_rows(KeyRows<FormatBF16>{keys, key_offset()});
        case DType::f16:
          return pack_rows(KeyRows<FormatF16>{keys, key_offset()});
        case DType::f8:
          return pack_rows(KeyRows<FormatF8>{keys, key_offset()});
        default:
          break;
      }
    }
    return pack_rows(key_rows(first));
  }
  template <class Stored>
  KeyColumns pack_rows(const KeyRows<Stored>& from) {
    const int depth = k_dim / kStep;
    const auto pack = [&](int half, int d, int n) __attribute__((always_inline)) {
      F column[2][kLanes / 4];
      KeyRows<Stored>::load_into(column, from, half, d, n);
      for (int j = 0; j < 2; ++j) {
        for (int b = 0; b < kLanes / 4; ++b) {
          if (4 * b < n) store(KeyColumns::at(s.keys, half, j, d + 4 * b), column[j][b]);
        }
      }
    };
    for (int half = 0; half < 2; ++half) {
      int d = 0;
      for (; d + kLanes <= depth; d += kLanes) pack(half, d, kLanes);
      if (d < depth) pack(half, d, depth - d);
    }
    return KeyColumns{s.keys};
  }

  // The tile's values as one array.
  void pack_values() {
    const std::int64_t stride = vectors * kLanes;
    const int count = tiles.here().count;
    for (int key = 0; key < count; key += 16) {
      const int end = min_int(key + 16, count);
      if constexpr (kStep == 2) {
        for (int i = key; i < end; i += kStep) {
          pack_value(value_row(i, 0), i + 1 == end ? zeros() : value_row(i + 1, 1), s.values + i / kStep * stride);
        }
      } else {
        widen_rows<Format>(batch.layer.v, stored_values(key), end - key, s.values + key * stride, stride);
      }
      tiles.tick();
    }
  }
  StoredRows stored_values(int key) const {
    const Addresses& here = tiles.here();
    return {here.values + key, value_offset(), here.value_scales + key, head * kScaleBytes};
  }
  // A value as products take it: where it lies, or widened in place `i`.
  const char* value_row(int key, int i) {
    if (is_product(batch.layer.v)) return tiles.here().values[key] + value_offset();
    widen_rows<Format>(batch.layer.v, stored_values(key), 1, s.rows + i * row_stride(), 0);
    return widened[i];
  }
  // The tile's values, where they lie or unpacked to bytes.
  ValueRows<Format> value_rows() {
    if (is_product(batch.layer.v)) return {tiles.here().values, value_offset()};
    widen_rows<Format>(batch.layer.v, stored_values(0), tiles.here().count, s.codes, padded_dim(v_dim) / 4);
    return {unpacked, 0};
  }
  const char* zeros() const { return reinterpret_cast<const char*>(s.zeros); }

  // One step of values: of one key, or of a pair.
  void pack_value(const char* first, const char* second, float* to) const {
    const char* const rows_[2] = {first, second};
    const auto pack = [&](int v, auto width_) __attribute__((always_inline)) {
      constexpr int kWidth = width_.value, kUnits = kWidth * kLanes / kStep;
      F column[kWidth];
      const ValueRows<Format> values{rows_, v * kLanes * Format::kBytes};
      ValueRows<Format>::load_into(column, values, 0, min_int(v_dim / kStep - v * kLanes / kStep, kUnits));
      for (int i = 0; i < kWidth; ++i) store(to + (v + i) * kLanes, column[i]);
    };
    int v = 0;
    for (; v + 2 <= vectors; v += 2) pack(v, Int<2>());
    if (v < vectors) pack(v, Int<1>());
  }

  // Scores of query vectors [begin, end) and kLanes keys from `first` on.
  template <class Keys>
  void score(const Keys& keys, int begin, int end, int first) {
    const int depth = k_dim / kStep;
    for (int i = begin; i < end;) {
      const int n = balanced(end - i, kBlockRows);
      const float* const q = s.q + base() * depth + 4 * i;
      float* const to = s.scores + i * kTileKeys + first;
      with_constant<kBlockRows>(n, [&](auto rows_) __attribute__((always_inline)) {
        score_block<Op, rows_.value>(q, 4 * rows * group, keys, depth, to, kTileKeys, ticking());
      });
      i += n;
    }
  }

  auto ticking() {
    return [this]() __attribute__((always_inline)) { tiles.tick(); };
  }

  // The size of the next group of query vectors, so that `left` of them fall into groups of even size.
  static int balanced(int left, int most) {
    const int groups = (left + most - 1) / most;
    return (left + groups - 1) / groups;
  }

  // Scores of kRows query vectors and keys [lo, hi) of the tile to probabilities, in place. Maxima and sums over lanes
  // cost as much for four vectors as for one.
  template <int kRows>
  void softmax(int i, const int* lo, const int* hi) {
    const F negative = set1(kNegativeInfinity);
    F x[kRows][kTileVectors], each[4];
    float lanes[kLanes];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      scale_logits(i + r, x[r]);
      tiles.tick();
      if (lo[r] > 0 || hi[r] < kTileKeys) {
        for (int v = 0; v < kTileVectors; ++v) {
          x[r][v] = select(x[r][v], lo[r] - v * kLanes, hi[r] - v * kLanes, negative);
        }
      }
      each[r] = x[r][0];
#pragma GCC unroll 16
      for (int v = 1; v < kTileVectors; ++v) each[r] = max(each[r], x[r][v]);
    }
    for (int r = kRows; r < 4; ++r) each[r] = each[0];
    store(lanes, reduce<Max>(each));
    float* const row_max = s.chunk.max + base() + i;
    for (int r = 0; r < kRows; ++r) {
      if (lanes[r] > row_max[r]) raise_max(base() + i + r, lanes[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      each[r] = to_probabilities(x[r], set1(row_max[r]), s.scores + (i + r) * kTileKeys);
      tiles.tick();
    }
    for (int r = kRows; r < 4; ++r) each[r] = each[0];
    store(lanes, reduce<Add>(each));
    for (int r = 0; r < kRows; ++r) s.chunk.sum[base() + i + r] += lanes[r];
  }

  // Stores 2^(x - shift), in pairs where P V takes them, and returns what is to be added up.
  RADIXKV_INLINE F to_probabilities(const F (&x)[kTileVectors], F shift, float* to) {
    F total = zero();
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      F p = exp2_nonpositive<kPairs>(sub(x[v], shift));
      if constexpr (kPairs) {
#if defined(RADIXKV_SIMD_PAIRS)
        p = store_rounded(to + v * (kLanes / 2), p);
#endif
      } else {
        store(to + v * kLanes, p);
      }
      total = add(total, p);
    }
    return total;
  }

  // The score of kLanes keys from vector v on, of query vector i of the head.
  RADIXKV_INLINE F raw_score(const BlockKernel& kernel, int i, int v) {
    const F score = load(kernel.s.scores + i * kTileKeys + v * kLanes);
    if constexpr (kIntegers) {
      const F scale = mul(load(kernel.s.scales.keys + v * kLanes), set1(kernel.s.q_scales[kernel.base() + i]));
      return mul(to_float(score), scale);
    }
    return score;
  }

  __attribute__((always_inline)) void scale_logits(int i, F (&x)[kTileVectors]) const {
    const float cap = batch.options.logits_soft_cap;
    if (cap > 0.0f) {
      const F inner = set1(batch.options.sm_scale / cap), outer = set1(cap * kLog2E);
      const F offset = offsets_show() ? set1(s.q_offsets[base() + i]) : zero();
      for (int v = 0; v < kTileVectors; ++v) {
        x[v] = mul(tanh(mul(add(raw_score(*this, i, v), offset), inner)), outer);
      }
    } else {
      const F scale = set1(batch.options.sm_scale * kLog2E);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; ++v) x[v] = mul(raw_score(*this, i, v), scale);
    }
  }

  void raise_max(std::int64_t i, float new_max) {
    const float factor = exp2_nonpositive(s.chunk.max[i] - new_max);
    float* acc = s.chunk.acc + i * vectors * kLanes;
    for (int v = 0; v < vectors; ++v) store(acc + v * kLanes, mul(load(acc + v * kLanes), set1(factor)));
    s.chunk.sum[i] *= factor;
    s.chunk.max[i] = new_max;
  }

  // acc[i .. i + n) += P V over keys [lo, hi), touching no other key: its value may be anything, and 0 * NaN is NaN.
  void accumulate(int i, int n, int lo, int hi) {
    if (lo >= hi) return;
    if constexpr (kPairs) {
      if (lo % 2 != 0) accumulate_half(i, n, lo++, true);
      accumulate_steps(i, n, lo / 2, hi / 2);
      if (lo < hi && hi % 2 != 0) accumulate_half(i, n, hi - 1, false);
    } else {
      accumulate_steps(i, n, lo, hi);
    }
  }

  void accumulate_steps(int i, int n, int begin, int end) {
    if (begin >= end) return;
    const std::int64_t stride = vectors * kLanes;
    if (values_in_place) {
      weigh(i, n, ValueRows<Format>{values.rows + begin * kStep, values.offset}, begin, end - begin);
    } else {
      weigh(i, n, ValueColumns{s.values + begin * stride, stride}, begin, end - begin);
    }
  }

  // Of a pair of keys only one.
  void accumulate_half(int i, int n, int key, bool second) {
    const char* const row = value_row(key, 0);
    pack_value(second ? zeros() : row, second ? row : zeros(), s.single);
    weigh(i, n, ValueColumns{s.single, 0}, key / 2, 1);
  }

  static ValueRows<Format> advanced(const ValueRows<Format>& values, int units) {
    return {values.rows, values.offset + units * kStep * Format::kBytes};
  }
  static ValueColumns advanced(const ValueColumns& values, int units) {
    return {values.units + units * kStep, values.stride};
  }

  // Vectors of V in the widest block of P V with n query vectors: sums are to fill the registers.
  static constexpr int vectors_at_once(int n) { return 2 * n <= kBlockRows ? 4 : 2; }

  // acc[i .. i + n) += P V over `depth` steps of values, of which the first is the tile's `step`.
  template <class Values>
  void weigh(int i, int n, const Values& values, int step, int depth) {
    const std::int64_t stride = vectors * kLanes;
    const float* const p = s.scores + i * kTileKeys + step;
    float* const acc = s.chunk.acc + (base() + i) * stride;
    with_constant<kBlockRows>(n, [&](auto rows_) __attribute__((always_inline)) {
      constexpr int kWide = vectors_at_once(rows_.value);
      const auto block = [&](int v, auto width_) __attribute__((always_inline)) {
        const int unit = v * kLanes / kStep;
        weigh_block<Op, rows_.value, width_.value>(p, kTileKeys, advanced(values, unit), v_dim / kStep - unit,
                                                   acc + v * kLanes, stride, depth, s.units + i, ticking());
      };
      int v = 0;
      for (; v + kWide <= vectors; v += kWide) block(v, Int<kWide>());
      if (kWide > 2 && v + 2 <= vectors) block(v, Int<2>()), v += 2;
      if (v < vectors) block(v, Int<1>());
    });
  }

  // Softmax and P V of query vectors [begin, end) for the tile of keys at `tile`.
  void consume(int begin, int end, std::int64_t tile) {
    for (int i = begin; i < end;) {
      const int n = balanced(end - i, kBlockRows);
      int lo[kBlockRows], hi[kBlockRows];
      int lo_max = 0, hi_min = kTileKeys;
      for (int j = 0, row = i / group, g = i % group; j < n; ++j) {
        lo[j] = static_cast<int>(max_int64(first_key(row) - tile, 0));
        hi[j] = static_cast<int>(min_int64(position(row) + 1 - tile, kTileKeys));
        lo_max = max_int(lo_max, lo[j]);
        hi_min = min_int(hi_min, hi[j]);
        if (++g == group) g = 0, ++row;
      }
      for (int j = 0; j < n; j += 4) {
        with_constant<4>(min_int(n - j, 4), [&](auto rows_) __attribute__((always_inline)) {
          softmax<rows_.value>(i + j, lo + j, hi + j);
          if constexpr (kIntegers) {
            round_weights<rows_.value>(s.scores + (i + j) * kTileKeys, s.scales, lo + j, hi + j, s.units + i + j,
                                       ticking());
          }
        });
      }
      if constexpr (kIntegers) {
        accumulate_steps(i, n, 0, (tiles.here().count + 1) / 2);  // weights of unseen keys are 0
        i += n;
        continue;
      }
      // What all of them see is done together, what only some see row by row, in the order of the keys.
      const int from = (lo_max + kStep - 1) / kStep * kStep, to = hi_min / kStep * kStep;
      if (from < to) {
        for (int j = 0; j < n; ++j) accumulate(i + j, 1, lo[j], from);
        accumulate(i, n, from, to);
        for (int j = 0; j < n; ++j) accumulate(i + j, 1, to, hi[j]);
      } else {
        for (int j = 0; j < n; ++j) accumulate(i + j, 1, lo[j], hi[j]);
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
    const int count = tiles.here().count;
    const int num_vectors = (end - begin) * group;
    const bool keys_in_rows = num_vectors <= (is_product(batch.layer.k) ? kBlockRows : kRowsOfWidened);
    values_in_place = (is_product(batch.layer.v) || kIntegers) && num_vectors <= kBlockRows;
    expect_ticks(num_vectors, count);
    const auto each_range = [&](auto call) __attribute__((always_inline)) {
      if (!block.shared) return call(begin * group, end * group);
      for (int from = begin; from < end;) {
        const int to = next_row(from, end, tile, false);
        call(from * group, to * group);
        from = next_row(to, end, tile, true);
      }
    };
    for (head = 0; head < heads; ++head) {
      for (int first = 0; first < count; first += kLanes) {
        if (keys_in_rows) {
          const KeyRows<Format> keys = key_rows(first);
          each_range([&](int from, int to) { score(keys, from, to, first); });
        } else {
          const KeyColumns columns = pack_keys(first);
          each_range([&](int from, int to) { score(columns, from, to, first); });
        }
      }
      if constexpr (kIntegers) s.scales.gather(stored_keys(0), stored_values(0), count);
      if (values_in_place) {
        values = value_rows();
      } else {
        pack_values();
      }
      each_range([&](int from, int to) { consume(from, to, tile); });
    }
  }

  // About how often a tile of `count` keys ticks for n query vectors a head: see score_block, softmax and weigh_block.
  void expect_ticks(int n, int count) {
    const int blocks = (n + kBlockRows - 1) / kBlockRows, wide = vectors_at_once(balanced(n, kBlockRows));
    const int score_ticks = 2 * ((count + kLanes - 1) / kLanes) * ((k_dim / kStep + kLanes - 1) / kLanes);
    const int weigh_ticks = (vectors + wide - 1) / wide * (count / (kStep * kTickSteps));
    tiles.expect_ticks(heads * (blocks * (score_ticks + weigh_ticks) + 2 * n));
  }

  bool left_behind(int row, std::int64_t tile) const { return first_key(row) >= tile + kTileKeys; }

  // The first row from `from` on that sees the tile, or that does not; `end` if there is none.
  int next_row(int from, int end, std::int64_t tile, bool sees) const {
    if (batch.options.window_left < 0 && batch.options.attention_chunk == 0) return sees ? from : end;
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
  std::int64_t end_of_keys() const { return block.shared ? batch.table.kv_len(block.request) : position(rows - 1) + 1; }
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
  tiles.start(first, last);
  pack_queries();
  for (std::int64_t begin = first; begin < last;) {
    const std::int64_t chunk = begin / kChunkKeys * kChunkKeys, end = min_int64(chunk + kChunkKeys, last);
    if (chunk < span.key_begin) {
      copy_state(span.open_in, s.chunk);
    } else {
      reset_chunk();
    }
    for (; begin < end; begin += kTileKeys) {
      tiles.advance(begin + kTileKeys, last);
      visit(begin);
    }
    if (leaves_open && end == span.key_end) {
      copy_state(s.chunk, span.open_out);
    } else {
      merge(heads, static_cast<std::int64_t>(rows) * group, v_dim, s.chunk, state);
    }
  }
}

static void attend(const Batch& batch, const Block& block, const Span& span, const RowState& state, void* scratch) {
#if defined(RADIXKV_SIMD_PAIRS)
  if (in_pairs(batch)) return BlockKernel<FormatPairs>(batch, block, scratch).attend(span, state);
#endif
  if (in_integers(batch)) return BlockKernel<FormatI8>(batch, block, scratch).attend(span, state);
  BlockKernel<FormatF32>(batch, block, scratch).attend(span, state);
}

}  // namespace radixkv::attention::RADIXKV_ISA
