// How numbers are stored: reading rows of every format. Part of block.hpp; see simd.hpp.
#pragma once

#include "attention/attention.hpp"
#include "attention/isa/simd.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// kStep: keys (in P V) or dimensions (in Q K^T) per step of a product. sum: of what steps give. begin, end: the
// accumulator at p as steps go on with it, and what they gave put back; unit: what an integer stands for. in_order: two
// neighbouring vectors of P V, whose lanes may be in an order of the product's own.
struct Fma {
  static constexpr int kStep = 1;
  RADIXKV_INLINE void in_order(F&, F&) {}
  RADIXKV_INLINE F step(F a, F b, F c) { return fma(a, b, c); }
  RADIXKV_INLINE F sum(F a, F b) { return add(a, b); }
  RADIXKV_INLINE F begin(const float* p) { return load(p); }
  RADIXKV_INLINE void end(float* p, F x, const float*) { store(p, x); }
};

// Pairs of 16-bit integers, added up in 32 bits: exact in any order.
struct IntPairs {
  static constexpr int kStep = 2;
  RADIXKV_INLINE void in_order(F& a, F& b) { RADIXKV_ISA::in_order(a, b); }
  RADIXKV_INLINE F step(F a, F b, F c) { return dot_i16(a, b, c); }
  RADIXKV_INLINE F sum(F a, F b) { return add_i32(a, b); }
  RADIXKV_INLINE F begin(const float*) { return zero(); }
  RADIXKV_INLINE void end(float* p, F x, const float* unit) { store(p, fma(set1(*unit), to_float(x), load(p))); }
};

#if defined(RADIXKV_SIMD_PAIRS)
struct DotPairs {
  static constexpr int kStep = 2;
  RADIXKV_INLINE void in_order(F& a, F& b) { RADIXKV_ISA::in_order(a, b); }
  RADIXKV_INLINE F step(F a, F b, F c) { return dot_pairs(a, b, c); }
  RADIXKV_INLINE F sum(F a, F b) { return add(a, b); }
  RADIXKV_INLINE F begin(const float* p) { return load(p); }
  RADIXKV_INLINE void end(float* p, F x, const float*) { store(p, x); }
};
#endif

// Numbers that products and outputs are made of. load: n <= kLanes units for products with Op, of kStep elements each.
struct FormatF32 {
  using Op = Fma;
  static constexpr DType kStored = DType::f32;
  static constexpr int kBytes = 4;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f32(p, x, n); }
};
struct FormatBF16 {
  using Op = Fma;
  static constexpr int kBytes = 2;
  RADIXKV_INLINE F load(const void* p, int n) { return load_bf16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_bf16(p, x, n); }
};
struct FormatF16 {
  using Op = Fma;
  static constexpr int kBytes = 2;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f16(p, x, n); }
};
struct FormatF8 {
  using Op = Fma;
  static constexpr int kBytes = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f8(p, n); }
};
// Codes of 8 bits, for products of integers. load: of n pairs.
struct FormatI8 {
  using Op = IntPairs;
  static constexpr DType kStored = DType::i8;
  static constexpr int kBytes = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_i8_pairs(p, n); }
};
#if defined(RADIXKV_SIMD_PAIRS)
// Products of bf16 accumulated in fp32, probabilities rounded to bf16. load: of n pairs.
struct FormatPairs {
  using Op = DotPairs;
  static constexpr DType kStored = DType::bf16;
  static constexpr int kBytes = 2;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
};
struct FormatF8Pairs {
  using Op = DotPairs;
  static constexpr int kBytes = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f8_pairs(p, n); }
};
#endif

// n elements at `from`, as the products take them.
template <class Format>
RADIXKV_INLINE void widen_from(const void* from, float* to, int n) {
  constexpr int kStep = Format::Op::kStep;
  for (int i = 0; i < n / kStep; i += kLanes) {
    const int lanes = n / kStep - i < kLanes ? n / kStep - i : kLanes;
    store_f32(to + i, Format::load(static_cast<const char*>(from) + i * kStep * Format::kBytes, lanes), lanes);
  }
}

// n elements of a query, key or value row as fp32.
static void widen(DType dtype, const void* from, float* to, int n) {
  if (dtype == DType::f32) return widen_from<FormatF32>(from, to, n);
  if (dtype == DType::bf16) return widen_from<FormatBF16>(from, to, n);
  widen_from<FormatF16>(from, to, n);
}

// Some rows of a cache: where each lies and where its scale does, each so many bytes further on.
struct StoredRows {
  const char* const* rows;
  std::int64_t offset;
  const char* const* scales;
  std::int64_t scale_offset;

  const char* row(int i) const { return rows[i] + offset; }
  float scale(int i) const {
    std::uint16_t half;
    __builtin_memcpy(&half, scales[i] + scale_offset, sizeof half);
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(half) << 16);
  }
};

template <class Stored>
RADIXKV_INLINE void widen_floats(const StoredRows& from, int dim, int count, float* to, std::int64_t stride) {
  for (int i = 0; i < count; ++i) widen_from<Stored>(from.row(i), to + i * stride, dim);
}

// Codes times the row's scale, which fp32 holds exactly.
RADIXKV_INLINE void widen_codes(const void* codes, float row_scale, int dim, float* to) {
  const F scale = set1(row_scale);
  for (int d = 0; d < dim; d += kLanes) {
    const int n = min_int(dim - d, kLanes);
    store_f32(to + d, mul(load_i8(static_cast<const char*>(codes) + d, n), scale), n);
  }
}

RADIXKV_INLINE void unpack_row(const char* row, int dim, char* codes) {
  for (int d = 0; d < dim / 2; d += 8) unpack_i4(row + d, codes + d, codes + dim / 2 + d);
}

// `count` rows as products take them, `stride` floats apart.
template <class Product>
static void widen_rows(const Cache& cache, const StoredRows& from, int count, float* to, std::int64_t stride) {
  if constexpr (Product::kStored == DType::i8) {
    for (int i = 0; i < count; ++i) unpack_row(from.row(i), cache.dim, reinterpret_cast<char*>(to + i * stride));
    return;
  }
#if defined(RADIXKV_SIMD_PAIRS)
  if constexpr (Product::kStored == DType::bf16) {
    if (cache.dtype == DType::f8) return widen_floats<FormatF8Pairs>(from, cache.dim, count, to, stride);
    return widen_floats<FormatPairs>(from, cache.dim, count, to, stride);
  }
#endif
  switch (cache.dtype) {
    case DType::f32:
      return widen_floats<FormatF32>(from, cache.dim, count, to, stride);
    case DType::bf16:
      return widen_floats<FormatBF16>(from, cache.dim, count, to, stride);
    case DType::f16:
      return widen_floats<FormatF16>(from, cache.dim, count, to, stride);
    case DType::f8:
      return widen_floats<FormatF8>(from, cache.dim, count, to, stride);
    case DType::i8:
      for (int i = 0; i < count; ++i) widen_codes(from.row(i), from.scale(i), cache.dim, to + i * stride);
      return;
    case DType::i4:
      for (int i = 0; i < count; ++i) {
        char codes[kMaxHeadDim];
        unpack_row(from.row(i), cache.dim, codes);
        widen_codes(codes, from.scale(i), cache.dim, to + i * stride);
      }
      return;
  }
}

}  // namespace radixkv::attention::RADIXKV_ISA
