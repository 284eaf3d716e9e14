// AVX2 + FMA + F16C: see simd.hpp for what each operation means. head_dim is a multiple of 8, so n is always kLanes.
#pragma once

#include <immintrin.h>

#include "attention/isa/x86.hpp"

namespace radixkv::attention::RADIXKV_ISA {

using F = __m256;
constexpr int kLanes = 8;
constexpr int kBlockRows = 4;

RADIXKV_INLINE F zero() { return _mm256_setzero_ps(); }
RADIXKV_INLINE F set1(float x) { return _mm256_set1_ps(x); }
RADIXKV_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
RADIXKV_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }

RADIXKV_INLINE __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

RADIXKV_INLINE F load_f32(const void* p, int) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
RADIXKV_INLINE F load_bf16(const void* p, int) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
RADIXKV_INLINE F load_f16(const void* p, int) { return _mm256_cvtph_ps(load_halves(p)); }

// As f16 a number in e4m3 has 2^-8 of its value, subnormals too. e4m3's NaN, all ones, would become a number.
RADIXKV_INLINE F load_f8(const void* p, int) {
  const __m128i bits = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  const __m128i sign = _mm_and_si128(bits, _mm_set1_epi16(static_cast<short>(0x8000)));
  const __m128i size = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x7f)), 7);
  const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x3f80));
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, size), _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

RADIXKV_INLINE F load_i8(const void* p, int) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

RADIXKV_INLINE void store_f32(void* p, F x, int) { _mm256_storeu_ps(static_cast<float*>(p), x); }

RADIXKV_INLINE void store_bf16(void* p, F x, int) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i halves = _mm256_srli_epi32(quiet, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
}

RADIXKV_INLINE void store_f16(void* p, F x, int) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

RADIXKV_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
RADIXKV_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
RADIXKV_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
RADIXKV_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
RADIXKV_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
RADIXKV_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
RADIXKV_INLINE F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

RADIXKV_INLINE F pow2(F x) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

RADIXKV_INLINE F select(F x, int lo, int hi, F other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(before, below)));
}

RADIXKV_INLINE F select_less(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

RADIXKV_INLINE F set4(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
RADIXKV_INLINE F low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
RADIXKV_INLINE F high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
RADIXKV_INLINE F low_pairs(F a, F b) { return _mm256_shuffle_ps(a, b, 0x44); }
RADIXKV_INLINE F high_pairs(F a, F b) { return _mm256_shuffle_ps(a, b, 0xee); }

template <int n>
RADIXKV_INLINE F swap_blocks(F x) {
  return _mm256_permute2f128_ps(x, x, 0x01);
}

// Eight pairs or, at the end of a row, four.
RADIXKV_INLINE F load_i8_pairs(const void* p, int n) {
  const auto* at = static_cast<const __m128i*>(p);
  return _mm256_castsi256_ps(_mm256_cvtepi8_epi16(n == kLanes ? _mm_loadu_si128(at) : _mm_loadl_epi64(at)));
}
RADIXKV_INLINE F add_i32(F a, F b) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
RADIXKV_INLINE F dot_i16(F a, F b, F c) {
  return add_i32(c, _mm256_castsi256_ps(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b))));
}
RADIXKV_INLINE F to_float(F x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
RADIXKV_INLINE void store_i16(float* p, F x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
RADIXKV_INLINE void interleave(F a, F b, F* pairs) {
  const __m256i x = _mm256_castps_si256(a), y = _mm256_castps_si256(b);
  pairs[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(x, y));
  pairs[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(x, y));
}
RADIXKV_INLINE F interleave_half(F a, F b) {
  const __m256i x = _mm256_castps_si256(a), y = _mm256_castps_si256(b);
  const __m256i first = _mm256_unpacklo_epi16(x, y), second = _mm256_unpackhi_epi16(x, y);
  return _mm256_castsi256_ps(_mm256_permute2x128_si256(first, second, 0x20));
}
RADIXKV_INLINE void in_order(F& a, F& b) {
  const F first = _mm256_permute2f128_ps(a, b, 0x20);
  b = _mm256_permute2f128_ps(a, b, 0x31);
  a = first;
}

RADIXKV_INLINE void transpose_blocks(F (&r)[2]) {
  const F first = _mm256_permute2f128_ps(r[0], r[1], 0x20);
  r[1] = _mm256_permute2f128_ps(r[0], r[1], 0x31);
  r[0] = first;
}

}  // namespace radixkv::attention::RADIXKV_ISA
