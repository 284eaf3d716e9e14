// How numbers are stored: reading and writing every format, and K and V in 8 bits. Part of block.hpp; see
// simd.hpp.
#pragma once

#include "attention/attention.hpp"
#include "attention/isa/simd.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// kStep: keys (in P V) or dimensions (in Q K^T) per step of a product. in_order: two neighbouring vectors of P V, whose
// lanes may be in an order of the product's own.
struct Fma {
  static constexpr int kStep = 1;
  RADIXKV_INLINE void in_order(F&, F&) {}
  RADIXKV_INLINE F step(F a, F b, F c) { return fma(a, b, c); }
};

#if defined(RADIXKV_SIMD_PAIRS)
struct DotPairs {
  static constexpr int kStep = 2;
  RADIXKV_INLINE void in_order(F& a, F& b) { RADIXKV_ISA::in_order(a, b); }
  RADIXKV_INLINE F step(F a, F b, F c) { return dot_pairs(a, b, c); }
};
#endif

// Storage formats. load: n <= kLanes units for products with Op, of kStep elements each. kNative: products take rows as
// they are stored, so that loading them again costs nothing.
struct FormatF32 {
  using Op = Fma;
  static constexpr int kBytes = 4;
  static constexpr bool kNative = true;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f32(p, x, n); }
};
struct FormatBF16 {
  using Op = Fma;
  static constexpr int kBytes = 2;
  static constexpr bool kNative = false;
  RADIXKV_INLINE F load(const void* p, int n) { return load_bf16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_bf16(p, x, n); }
};
struct FormatF16 {
  using Op = Fma;
  static constexpr int kBytes = 2;
  static constexpr bool kNative = false;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f16(p, x, n); }
};
struct FormatF8 {
  using Op = Fma;
  static constexpr int kBytes = 1;
  static constexpr bool kNative = false;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f8(p, n); }
};
#if defined(RADIXKV_SIMD_PAIRS)
// Products of bf16 accumulated in fp32, probabilities rounded to bf16. load: of n pairs.
struct FormatPairs {
  using Op = DotPairs;
  static constexpr int kBytes = 2;
  static constexpr bool kNative = true;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
};
struct FormatF8Pairs {
  using Op = DotPairs;
  static constexpr int kBytes = 1;
  static constexpr bool kNative = false;
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

// A row in 8 bits: x / scale.
static void store_row(DType dtype, const void* x, const Cache& to, char* row) {
  float values[kMaxHeadDim];
  widen(dtype, x, values, to.dim);
  for (int i = 0; i < to.dim; ++i) reinterpret_cast<std::uint8_t*>(row)[i] = float_to_f8(values[i] / to.scale);
}

}  // namespace radixkv::attention::RADIXKV_ISA
