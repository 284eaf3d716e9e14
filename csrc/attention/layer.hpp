// What a layer attends with, and where and how its K and V are stored.
#pragma once

#include <cmath>
#include <cstdint>

namespace radixkv::attention {

// f8: e4m3fn, no infinity, largest 448. i8 and i4: rows of codes, each row with a scale of its own (see quantize.hpp).
enum class DType : std::uint8_t { f32, bf16, f16, f8, i8, i4 };

constexpr std::int64_t row_bytes(DType dtype, std::int64_t dim) {
  if (dtype == DType::i4) return dim / 2;
  return dim * (dtype == DType::f32 ? 4 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 1);
}
constexpr std::int64_t kScaleBytes = 2;  // of a row's scale: bf16
constexpr bool has_row_scales(DType dtype) { return dtype == DType::i8 || dtype == DType::i4; }

constexpr int kMaxCodesDim = 512;  // sums of products of integers fit 32 bits: 32767 * 127 * 512
constexpr int kMaxHeadDim = 576;   // that of a latent key of DeepSeek: 512 + 64

// Elements that a Hadamard rotation mixes: rows are rotated block by block.
constexpr std::int32_t rotation_size(std::int32_t dim) { return dim & -dim; }

// What the 16 codes of i4 stand for: a Lloyd-Max quantizer's levels for a Gaussian, rounded to integers.
constexpr int kLevels = 16;
alignas(16) constexpr signed char kCodebook[kLevels] = {-127, -96, -75, -58, -44, -31, -18, -6,
                                                        6,    18,  31,  44,  58,  75,  96,  127};

// A layer's keys or its values: rows of `dim` elements for every page, slot and kv head. Strides are in bytes; a page is
// one run of memory. What is stored times `scale`, and times the row's own where rows have one, is the value, or its
// normalised rotation, less the centre where there is one.
struct Cache {
  char* data;
  DType dtype;
  std::int32_t dim;
  float scale;
  bool rotated;
  std::int64_t page_stride;
  std::int64_t slot_stride;
  std::int64_t head_stride;
  std::int64_t scales;              // from a page's first byte to its rows' scales: bf16, by slot and head
  std::int64_t scales_slot_stride;  // to those of the next slot
  const float* centre;              // [kv heads, dim], or null
  float usual_scale;                // rows with a larger one of their own are counted; infinite: none are

  std::int64_t row_bytes() const { return attention::row_bytes(dtype, dim); }
  // Times this, what is stored is the value or its rotation with a matrix of 1 and -1. Rows with a scale of their own
  // include in it what such a rotation adds.
  float stored_scale() const { return rotated && dtype == DType::f8 ? scale * root_of_rotation() : scale; }
  // Times this, a product with what is stored is one with the value, where the other factor is rotated as well.
  float product_scale() const { return rotated ? stored_scale() / static_cast<float>(rotation_size(dim)) : scale; }

 private:
  float root_of_rotation() const { return std::sqrt(static_cast<float>(rotation_size(dim))); }
};

// What was stored of the keys, or of the values, of a layer in 8 or 4 bits.
struct RowCounts {
  std::int64_t rows = 0;        // of one head
  std::int64_t not_finite = 0;  // of 8 or 4 bits with a scale: stored as NaN
  std::int64_t unusual = 0;     // with a scale above the usual, or with numbers that are too large for f8
  std::int64_t sampled = 0;     // one of kSampled, of which the errors are
  double error_sum = 0.0;       // ||stored - x|| / ||x||
  double error_most = 0.0;

  void add(const RowCounts& other) {
    rows += other.rows;
    not_finite += other.not_finite;
    unusual += other.unusual;
    sampled += other.sampled;
    error_sum += other.error_sum;
    error_most = other.error_most > error_most ? other.error_most : error_most;
  }
};
constexpr std::int64_t kSampled = 1024;

struct LayerKV {
  std::int32_t num_qo_heads;
  std::int32_t num_kv_heads;
  Cache k;
  Cache v;

  std::int32_t group() const { return num_qo_heads / num_kv_heads; }
  // Whether values are the beginnings of keys, and stored with them.
  bool latent() const { return v.data == k.data; }
};

// A layer of latent attention: one head of keys, the first v_dim elements of which are the value.
inline LayerKV latent_layer(std::int32_t num_qo_heads, const Cache& k, std::int32_t v_dim) {
  LayerKV layer{num_qo_heads, 1, k, k};
  layer.v.dim = v_dim;
  return layer;
}

}  // namespace radixkv::attention
