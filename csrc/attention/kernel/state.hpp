// What becomes of the states of chunks: they are merged from left to right and written out. Part of
// block.hpp; see there.
#pragma once

#include "attention/kernel/math.hpp"
#include "attention/kernel/quantize.hpp"
#include "attention/kernel/tiles.hpp"

namespace radixkv::attention::RADIXKV_ISA {

static void merge_head(std::int64_t rows, std::int64_t v_dim, const RowState& later, const RowState& state) {
  const std::int64_t stride = padded_dim(v_dim);
  for (std::int64_t i = 0; i < rows; ++i) {
    if (later.sum[i] == 0.0f) continue;
    const float* from = later.acc + i * stride;
    float* to = state.acc + i * stride;
    if (state.sum[i] == 0.0f) {
      state.max[i] = later.max[i];
      state.sum[i] = later.sum[i];
      for (std::int64_t d = 0; d < stride; d += kLanes) store(to + d, load(from + d));
      continue;
    }
    const float top = state.max[i] > later.max[i] ? state.max[i] : later.max[i];
    const float keep = exp2_nonpositive(state.max[i] - top), gain = exp2_nonpositive(later.max[i] - top);
    state.max[i] = top;
    state.sum[i] = state.sum[i] * keep + later.sum[i] * gain;
    for (std::int64_t d = 0; d < stride; d += kLanes) {
      store(to + d, fma(load(from + d), set1(gain), mul(load(to + d), set1(keep))));
    }
  }
}

static void merge(std::int64_t heads, std::int64_t vectors, std::int64_t v_dim, const RowState& later,
                  const RowState& state) {
  for (std::int64_t h = 0; h < heads; ++h) {
    merge_head(vectors, v_dim, state_from(later, h * later.head_stride, v_dim),
               state_from(state, h * state.head_stride, v_dim));
  }
}

// Whether products are of pairs of bf16, which hold the query and all that is stored exactly.
RADIXKV_INLINE bool in_pairs(const Batch& batch) {
#if defined(RADIXKV_SIMD_PAIRS)
  const auto exact = [](const Cache& cache) {
    return !cache.rotated && (cache.dtype == DType::bf16 || cache.dtype == DType::f8);
  };
  return batch.dtype == DType::bf16 && exact(batch.layer.k) && exact(batch.layer.v);
#else
  static_cast<void>(batch);
  return false;
#endif
}

// Whether they are of codes of 8 bits.
RADIXKV_INLINE bool in_integers(const Batch& batch) {
  return has_row_scales(batch.layer.k.dtype) && has_row_scales(batch.layer.v.dtype);
}

// The sums of a query vector in the order of their dimensions.
template <class Op>
RADIXKV_INLINE void put_in_order(const float* acc, int dim, float* to) {
  int d = 0;
  for (; d + kLanes < dim; d += 2 * kLanes) {
    F a = load(acc + d), b = load(acc + d + kLanes);
    Op::in_order(a, b);
    store(to + d, a);
    store(to + d + kLanes, b);
  }
  if (d < dim) store(to + d, load(acc + d));
}

// What the sums of a state are multiplied with and divided by.
struct Denominator {
  float keep;
  float sum;
};

// The sink takes its share of the softmax once a row, when all keys have: so it is the same whatever was done apart.
static Denominator with_sink(float max, float sum, const float* sink) {
  if (sink == nullptr) return {1.0f, sum};
  const float logit = *sink * kLog2E, top = max > logit ? max : logit;
  const float keep = exp2_nonpositive(max - top);
  return {keep, sum * keep + exp2_nonpositive(logit - top)};
}

template <class Format, class Op>
static void finish_rows(const Batch& batch, const Block& block, const RowState& state) {
  const int v_dim = batch.layer.v.dim, group = batch.layer.group();
  const std::int64_t stride = padded_dim(v_dim);
  const std::int64_t out_heads = batch.layer.num_qo_heads;
  const std::int64_t first_row = batch.table.qo_indptr[block.request];
  const float* const sinks = batch.options.sinks;
  const float v_scale = batch.layer.v.product_scale();
  float values[padded_dim(kMaxHeadDim)];
  for (int kv_head = block.head_begin; kv_head < block.head_end; ++kv_head) {
    std::int64_t i = (kv_head - block.head_begin) * state.head_stride;
    for (int row = block.row_begin; row < block.row_end; ++row) {
      for (int g = 0; g < group; ++g, ++i) {
        const std::int64_t head = static_cast<std::int64_t>(kv_head) * group + g;
        char* to = static_cast<char*>(batch.out) + ((first_row + row) * out_heads + head) * v_dim * Format::kBytes;
        put_in_order<Op>(state.acc + i * stride, static_cast<int>(stride), values);
        if (batch.layer.v.rotated) rotate(values, v_dim);
        const Denominator by = with_sink(state.max[i], state.sum[i], sinks == nullptr ? nullptr : sinks + head);
        const F sum = set1(by.sum), scale = set1(v_scale * by.keep);
        for (int d = 0; d < v_dim; d += kLanes) {
          Format::store(to + d * Format::kBytes, mul(div(load(values + d), sum), scale), min_int(v_dim - d, kLanes));
        }
      }
    }
  }
}

template <class Format>
static void finish_as(const Batch& batch, const Block& block, const RowState& state) {
#if defined(RADIXKV_SIMD_PAIRS)
  if (in_pairs(batch)) return finish_rows<Format, DotPairs>(batch, block, state);
#endif
  if (in_integers(batch)) return finish_rows<Format, IntPairs>(batch, block, state);
  finish_rows<Format, Fma>(batch, block, state);
}

static void finish(const Batch& batch, const Block& block, const RowState& state) {
  if (batch.dtype == DType::f32) return finish_as<FormatF32>(batch, block, state);
  if (batch.dtype == DType::bf16) return finish_as<FormatBF16>(batch, block, state);
  finish_as<FormatF16>(batch, block, state);
}

}  // namespace radixkv::attention::RADIXKV_ISA
