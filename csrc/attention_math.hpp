// exp2, tanh, the matrix product and the storage formats that the attention kernel is made of. Part of
// attention_kernel.hpp; see simd.hpp.
#pragma once

#include "attention.hpp"
#include "simd.hpp"

namespace radixkv::attention::RADIXKV_ISA {

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;

// 2^x for x <= 0; 0 below 2^-126. Relative error about 1e-7, or 4e-6 with `coarse` (bf16 resolves 4e-3).
template <bool coarse>
RADIXKV_INLINE F exp2_nonpositive(F x) {
  const F clamped = max(set1(-127.0f), x);  // NaN passes
  const F n = round(clamped);
  const F f = sub(clamped, n);
  F p;
  if constexpr (coarse) {
    p = set1(0x1.409104p-7f);
    p = fma(p, f, set1(0x1.ca9008p-5f));
    p = fma(p, f, set1(0x1.ebf1b4p-3f));
    p = fma(p, f, set1(0x1.62dfcap-1f));
  } else {
    p = set1(0x1.470b4ap-13f);
    p = fma(p, f, set1(0x1.5f7276p-10f));
    p = fma(p, f, set1(0x1.3b270ep-7f));
    p = fma(p, f, set1(0x1.c6ae72p-5f));
    p = fma(p, f, set1(0x1.ebfbe2p-3f));
    p = fma(p, f, set1(0x1.62e432p-1f));
  }
  return mul(fma(p, f, set1(1.0f)), pow2(n));
}

RADIXKV_INLINE float exp2_nonpositive(float x) {
  float lanes[kLanes];
  store(lanes, exp2_nonpositive<false>(set1(x)));
  return lanes[0];
}

// tanh: an odd polynomial near zero, 1 - 2 / (e^2|y| + 1) elsewhere.
RADIXKV_INLINE F tanh(F y) {
  const F negated = sub(zero(), y);
  const F size = max(y, negated);
  const F z = mul(y, y);
  F p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F small = fma(mul(p, z), y, y);
  // with e = e^(-2|y|) <= 1: (1 - e) / (1 + e)
  const F e = exp2_nonpositive<false>(mul(size, set1(-2.0f * kLog2E)));
  const F large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const F signed_large = select_less(y, zero(), sub(zero(), large), large);
  return select_less(size, set1(0.625f), small, signed_large);
}

struct Fma {
  RADIXKV_INLINE F step(F a, F b, F c) { return fma(a, b, c); }
};

#if defined(RADIXKV_SIMD_PAIRS)
struct DotPairs {
  RADIXKV_INLINE F step(F a, F b, F c) { return dot_pairs(a, b, c); }
};
#endif

// c[rows][vectors] (+)= a[rows][depth] b[depth][vectors], every element by one chain of steps from 0 to depth - 1, so
// that it does not depend on how rows and columns are grouped.
template <class Op, int kRows, int kVectors>
static void multiply_block(const float* a, std::ptrdiff_t a_stride, const float* b, std::ptrdiff_t b_stride, float* c,
                           std::ptrdiff_t c_stride, int depth, bool accumulate) {
  F sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = accumulate ? load(c + r * c_stride + v * kLanes) : zero();
  }
  for (int i = 0; i < depth; ++i) {
    F column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + i * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F factor = set1(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Op::step(factor, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <class Op, int kRows>
RADIXKV_INLINE void multiply_rows(int vectors, const float* a, std::ptrdiff_t a_stride, const float* b,
                                  std::ptrdiff_t b_stride, float* c, std::ptrdiff_t c_stride, int depth,
                                  bool accumulate) {
  switch (vectors) {
    case 1:
      return multiply_block<Op, kRows, 1>(a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
    case 2:
      return multiply_block<Op, kRows, 2>(a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
    case 3:
      if constexpr (kBlockVectors >= 3) {
        return multiply_block<Op, kRows, 3>(a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
      }
      break;
    default:
      if constexpr (kBlockVectors >= 4) {
        return multiply_block<Op, kRows, 4>(a, a_stride, b, b_stride, c, c_stride, depth, accumulate);
      }
  }
}

// As multiply_block, for rows <= kBlockRows and any number of vectors.
template <class Op>
static void multiply(int rows, int vectors, const float* a, std::ptrdiff_t a_stride, const float* b,
                     std::ptrdiff_t b_stride, float* c, std::ptrdiff_t c_stride, int depth, bool accumulate) {
  for (int v = 0; v < vectors; v += kBlockVectors) {
    const int n = vectors - v < kBlockVectors ? vectors - v : kBlockVectors;
    const float* bv = b + v * kLanes;
    float* cv = c + v * kLanes;
    switch (rows) {
      case 1:
        multiply_rows<Op, 1>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        break;
      case 2:
        multiply_rows<Op, 2>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        break;
      case 3:
        multiply_rows<Op, 3>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        break;
      case 4:
        multiply_rows<Op, 4>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        break;
      case 5:
        if constexpr (kBlockRows >= 5) {
          multiply_rows<Op, 5>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        }
        break;
      default:
        if constexpr (kBlockRows >= 6) {
          multiply_rows<Op, 6>(n, a, a_stride, bv, b_stride, cv, c_stride, depth, accumulate);
        }
    }
  }
}

// Storage formats. kStep: keys (in P V) or dimensions (in Q K^T) per step of a product.
struct FormatF32 {
  using Op = Fma;
  static constexpr int kBytes = 4, kStep = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f32(p, x, n); }
};
struct FormatBF16 {
  using Op = Fma;
  static constexpr int kBytes = 2, kStep = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_bf16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_bf16(p, x, n); }
};
struct FormatF16 {
  using Op = Fma;
  static constexpr int kBytes = 2, kStep = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f16(p, n); }
  RADIXKV_INLINE void store(void* p, F x, int n) { store_f16(p, x, n); }
};
struct FormatF8 {
  using Op = Fma;
  static constexpr int kBytes = 1, kStep = 1;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f8(p, n); }
};
#if defined(RADIXKV_SIMD_PAIRS)
// bf16 kept as pairs: products of bf16 accumulated in fp32, probabilities rounded to bf16. load: of n pairs.
struct FormatPairs {
  using Op = DotPairs;
  static constexpr int kBytes = 2, kStep = 2;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f32(p, n); }
};
struct FormatF8Pairs {
  using Op = DotPairs;
  static constexpr int kBytes = 1, kStep = 2;
  RADIXKV_INLINE F load(const void* p, int n) { return load_f8_pairs(p, n); }
};
#endif

template <class Format>
RADIXKV_INLINE void widen_from(const void* from, float* to, int n) {
  for (int d = 0; d < n; d += kLanes) {
    const int lanes = n - d < kLanes ? n - d : kLanes;
    store_f32(to + d, Format::load(static_cast<const char*>(from) + d * Format::kBytes, lanes), lanes);
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

static void quantize(DType dtype, const void* from, void* to, int n, float scale) {
  float values[kMaxHeadDim];
  widen(dtype, from, values, n);
  for (int i = 0; i < n; ++i) static_cast<std::uint8_t*>(to)[i] = float_to_f8(values[i] / scale);
}

}  // namespace radixkv::attention::RADIXKV_ISA
