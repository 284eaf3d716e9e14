// Rows in 8 and 4 bits: rotated, rounded and stored, each from its own elements alone. Part of block.hpp; see simd.hpp.
//
// Only IEEE operations in a fixed order, so that every instruction set stores the same bytes. A Hadamard rotation makes
// the elements of a row alike in size, and products of two rotated rows are those of the rows times the block's size.
//
//   i8: a scale s = max|y| / 127 in bf16, rounded up; codes y / s, rounded to nearest even: -127 to 127.
//   i4: codes into kCodebook, which a Gaussian row fits best; the scale of the codes chosen is the one of least squares.
//       Element i of the row's first half is the low half of byte i, element i of its second half the high one.
//
// A row with a number that is not finite has the scale NaN, which reaches who sees it and no one else.
#pragma once

#include "attention/kernel/formats.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// The codebook's levels are those of a Gaussian of this deviation.
constexpr float kDeviation = 46.5f;

// One stage of a rotation: elements `h` apart, by scalars.
RADIXKV_INLINE void butterflies(float* x, int begin, int end, int h) {
  for (int i = begin; i < end; i += 2 * h) {
    for (int j = i; j < i + h; ++j) {
      const float a = x[j], b = x[j + h];
      x[j] = a + b;
      x[j + h] = a - b;
    }
  }
}

// Neighbours, and then neighbouring pairs, of two vectors. Lanes keep to their blocks of four.
RADIXKV_INLINE void rotate_fours(float* x) {
  F a = load(x), b = load(x + kLanes);
  const F mixed = low(a, b), rest = high(a, b);
  const F even = low(mixed, rest), odd = high(mixed, rest);
  a = low(add(even, odd), sub(even, odd)), b = high(add(even, odd), sub(even, odd));
  const F first = low_pairs(a, b), second = high_pairs(a, b);
  store(x, low_pairs(add(first, second), sub(first, second)));
  store(x + kLanes, high_pairs(add(first, second), sub(first, second)));
}

// x times the Hadamard matrix of each block, not normalised.
static void rotate(float* x, int dim) {
  const int size = rotation_size(dim);
  int i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) rotate_fours(x + i);
  butterflies(x, i, dim, 1);
  butterflies(x, i, dim, 2);
  int h = 4;
  for (; h < kLanes && h < size; h *= 2) butterflies(x, 0, dim, h);
  for (; h < size; h *= 2) {
    for (int from = 0; from < dim; from += 2 * h) {
      for (int j = from; j < from + h; j += kLanes) {
        const F a = load(x + j), b = load(x + j + h);
        store(x + j, add(a, b));
        store(x + j + h, sub(a, b));
      }
    }
  }
}

// x in e4m3: clamped to 448, rounded to nearest even; NaN stays NaN.
RADIXKV_INLINE std::uint8_t float_to_f8(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t sign = (bits >> 24) & 0x80u, size = bits & 0x7fffffffu;
  const std::uint32_t bounded = size < 0x43e00000u ? size : 0x43e00000u;  // 448
  // Below 2^-6 the last bit is 2^-9, which adding 2^14 aligns with fp32's last.
  const float aligned = __builtin_bit_cast(float, bounded) + 0x1p14f;
  const std::uint32_t subnormal = __builtin_bit_cast(std::uint32_t, aligned) - 0x46800000u;
  const std::uint32_t normal = (bounded + 0x7ffffu + ((bounded >> 20) & 1u) - (120u << 23)) >> 20;
  const std::uint32_t number = bounded < 0x3c800000u ? subnormal : normal;
  return static_cast<std::uint8_t>(sign | (size > 0x7f800000u ? 0x7fu : number));
}

// x to the nearest number of bf16, in its bits; or to the next above a positive x.
RADIXKV_INLINE std::uint16_t to_bf16(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
RADIXKV_INLINE std::uint16_t to_bf16_above(float x) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t above = (bits + 0xffffu) >> 16;
  return static_cast<std::uint16_t>(above == 0 ? 1 : above);
}

// The sum of dim numbers: the second half is added to the first, then again, an odd last one to the one before it.
static float tree_sum(float* x, int dim) {
  for (int n = dim; n > 1; n = (n + 1) / 2) {
    for (int i = 0; i < n / 2; ++i) x[i] += x[(n + 1) / 2 + i];
  }
  return x[0];
}

// The largest size of a number in x; NaN or infinite if one is.
static float largest(const float* x, int dim) {
  float most = 0.0f;
  for (int i = 0; i < dim; ++i) {
    const float size = __builtin_fabsf(x[i]);
    if (!(size <= most)) most = size;
    if (size != size) return size;
  }
  return most;
}

static std::uint16_t quantize_i8(const float* y, int dim, float most, signed char* codes) {
  const std::uint16_t scale = to_bf16_above(most / 127.0f);
  const float s = __builtin_bit_cast(float, static_cast<std::uint32_t>(scale) << 16);
  for (int i = 0; i < dim; ++i) codes[i] = static_cast<signed char>(__builtin_rintf(y[i] / s));
  return scale;
}

// y may be changed. most: the largest size in it, not 0.
static std::uint16_t quantize_i4(float* y, int dim, float most, char* row) {
  float products[kMaxHeadDim];
  for (int i = 0; i < dim; ++i) y[i] /= most;
  for (int i = 0; i < dim; ++i) products[i] = y[i] * y[i];
  const float deviation = __builtin_sqrtf(tree_sum(products, dim) / static_cast<float>(dim));
  int index[kMaxHeadDim], squares = 0;
  for (int i = 0; i < dim; ++i) {
    const float level = y[i] / deviation * kDeviation;
    index[i] = 0;
    for (int j = 0; j + 1 < kLevels; ++j)
      index[i] += level > 0.5f * static_cast<float>(kCodebook[j] + kCodebook[j + 1]);
    const int code = kCodebook[index[i]];
    products[i] = y[i] * static_cast<float>(code);
    squares += code * code;
  }
  for (int i = 0; i < dim / 2; ++i) row[i] = static_cast<char>(index[i] | index[dim / 2 + i] << 4);
  return to_bf16(most * (tree_sum(products, dim) / static_cast<float>(squares)));
}

// ||stored - y|| / ||y||; y: what was to be stored, codes: what is, in units of `scale`.
RADIXKV_INLINE double error_of(const float* y, const float* codes, double scale, int dim) {
  double error = 0.0, size = 0.0;
  for (int i = 0; i < dim; ++i) {
    const double difference = scale * static_cast<double>(codes[i]) - static_cast<double>(y[i]);
    error += difference * difference;
    size += static_cast<double>(y[i]) * static_cast<double>(y[i]);
  }
  return size > 0.0 ? __builtin_sqrt(error / size) : 0.0;
}

static void sample(const float* y, const Cache& cache, const char* row, const char* scale, RowCounts& counts) {
  float stored[kMaxHeadDim];
  const StoredRows rows{&row, 0, &scale, 0};
  widen_rows<FormatF32>(cache, rows, 1, stored, 0);
  const double error = error_of(y, stored, static_cast<double>(cache.stored_scale()), cache.dim);
  if (!(error < static_cast<double>(__builtin_inff()))) return;
  ++counts.sampled;
  counts.error_sum += error;
  counts.error_most = error > counts.error_most ? error : counts.error_most;
}

static void store_f8(const float* y, const Cache& to, char* row, RowCounts& counts) {
  const float scale = to.stored_scale();
  bool fits = true;
  for (int i = 0; i < to.dim; ++i) {
    const float x = y[i] / scale;
    fits &= __builtin_fabsf(x) <= 448.0f || x != x;
    reinterpret_cast<std::uint8_t*>(row)[i] = float_to_f8(x);
  }
  counts.unusual += !fits;
}

static void store_codes(float* y, const Cache& to, char* row, char* scale, RowCounts& counts) {
  const float most = largest(y, to.dim);
  std::uint16_t row_scale = 0;
  if (most > 0.0f && most < __builtin_inff()) {
    row_scale = to.dtype == DType::i8 ? quantize_i8(y, to.dim, most, reinterpret_cast<signed char*>(row))
                                      : quantize_i4(y, to.dim, most, row);
    counts.unusual += __builtin_bit_cast(float, static_cast<std::uint32_t>(row_scale) << 16) > to.usual_scale;
  } else {
    __builtin_memset(row, 0, static_cast<std::size_t>(to.row_bytes()));
    if (most != 0.0f) row_scale = 0x7fc0, ++counts.not_finite;  // NaN
  }
  __builtin_memcpy(scale, &row_scale, sizeof row_scale);
}

// A row in 8 or 4 bits.
static void store_row(DType dtype, const void* x, const Cache& to, const float* centre, char* row, char* scale,
                      bool sampled, RowCounts& counts) {
  float y[kMaxHeadDim], codes[kMaxHeadDim];
  widen(dtype, x, y, to.dim);
  for (int i = 0; centre != nullptr && i < to.dim; ++i) y[i] -= centre[i];
  if (to.rotated) rotate(y, to.dim);
  ++counts.rows;
  if (to.dtype == DType::f8) {
    store_f8(y, to, row, counts);
  } else {
    __builtin_memcpy(codes, y, static_cast<std::size_t>(to.dim) * sizeof(float));
    store_codes(codes, to, row, scale, counts);
  }
  if (sampled) sample(y, to, row, scale, counts);
}

}  // namespace radixkv::attention::RADIXKV_ISA
