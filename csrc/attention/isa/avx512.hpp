// AVX-512 (F, BW, DQ, VL): see simd.hpp for what each operation means.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers start some results from undefined registers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "attention/isa/x86.hpp"

namespace radixkv::attention::RADIXKV_ISA {

using F = __m512;
constexpr int kLanes = 16;
constexpr int kBlockRows = 8;

RADIXKV_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

RADIXKV_INLINE F zero() { return _mm512_setzero_ps(); }
RADIXKV_INLINE F set1(float x) { return _mm512_set1_ps(x); }
RADIXKV_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
RADIXKV_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }

RADIXKV_INLINE F load_f32(const void* p, int n) {
  return n == kLanes ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(n), p);
}

RADIXKV_INLINE __m256i load_halves(const void* p, int n) {
  return n == kLanes ? _mm256_loadu_si256(static_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(first_lanes(n), p);
}

RADIXKV_INLINE void store_halves(void* p, __m256i x, int n) {
  if (n == kLanes) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), x);
  }
}

RADIXKV_INLINE F load_bf16(const void* p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p, n)), 16));
}

RADIXKV_INLINE F load_f16(const void* p, int n) { return _mm512_cvtph_ps(load_halves(p, n)); }

// As f16 a number in e4m3 has 2^-8 of its value, subnormals too. e4m3's NaN, all ones, would become a number.
RADIXKV_INLINE F load_f8(const void* p, int n) {
  const __m256i bits = _mm256_cvtepi8_epi16(_mm_maskz_loadu_epi8(first_lanes(n), p));
  const __m256i half = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi16(static_cast<short>(0x8000))),
                                       _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(half & _mm256_set1_epi16(0x7fff), _mm256_set1_epi16(0x3f80));
  const __m256i number = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(number), _mm512_set1_ps(256.0f));
}

RADIXKV_INLINE F load_i8(const void* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}

RADIXKV_INLINE void store_f32(void* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

RADIXKV_INLINE void store_bf16(void* p, F x, int n) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  store_halves(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)), n);
}

RADIXKV_INLINE void store_f16(void* p, F x, int n) {
  store_halves(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

RADIXKV_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
RADIXKV_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
RADIXKV_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
RADIXKV_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
RADIXKV_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
RADIXKV_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
RADIXKV_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

RADIXKV_INLINE F pow2(F x) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

RADIXKV_INLINE F select(F x, int lo, int hi, F other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 from = _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(lo), _MM_CMPINT_NLT);
  const __mmask16 inside = _mm512_mask_cmp_epi32_mask(from, lane, _mm512_set1_epi32(hi), _MM_CMPINT_LT);
  return _mm512_mask_mov_ps(other, inside, x);
}

RADIXKV_INLINE F select_less(F a, F b, F x, F y) {
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}

RADIXKV_INLINE F set4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
RADIXKV_INLINE F low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
RADIXKV_INLINE F high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
RADIXKV_INLINE F low_pairs(F a, F b) { return _mm512_shuffle_ps(a, b, 0x44); }
RADIXKV_INLINE F high_pairs(F a, F b) { return _mm512_shuffle_ps(a, b, 0xee); }

template <int n>
RADIXKV_INLINE F swap_blocks(F x) {
  return _mm512_shuffle_f32x4(x, x, n == 1 ? 0xb1 : 0x4e);
}

RADIXKV_INLINE void transpose_blocks(F (&r)[4]) {
  const F even_low = _mm512_shuffle_f32x4(r[0], r[1], 0x88), odd_low = _mm512_shuffle_f32x4(r[0], r[1], 0xdd);
  const F even_high = _mm512_shuffle_f32x4(r[2], r[3], 0x88), odd_high = _mm512_shuffle_f32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
  r[1] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
  r[2] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
  r[3] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
}

RADIXKV_INLINE F load_i8_pairs(const void* p, int n) {
  const __mmask32 mask = static_cast<__mmask32>((std::uint64_t{1} << (2 * n)) - 1u);
  return _mm512_castsi512_ps(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p)));
}
RADIXKV_INLINE F add_i32(F a, F b) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
RADIXKV_INLINE F dot_i16(F a, F b, F c) {
#if defined(__AVX512VNNI__)
  return _mm512_castsi512_ps(
      _mm512_dpwssd_epi32(_mm512_castps_si512(c), _mm512_castps_si512(a), _mm512_castps_si512(b)));
#else
  return add_i32(c, _mm512_castsi512_ps(_mm512_madd_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b))));
#endif
}
RADIXKV_INLINE F to_float(F x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
RADIXKV_INLINE void store_i16(float* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

// Pairs (a[i], b[i]) of the 32 elements of two vectors, in the order of lanes that costs least: see in_order.
RADIXKV_INLINE void interleave(F a, F b, F* pairs) {
  const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
  pairs[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
  pairs[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
// The first 16 of them, in order.
RADIXKV_INLINE F interleave_half(F a, F b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Lane i of the result takes a[i] as its low half and b[i], element 32 + i of the pair (a, b), as its high half.
  const __m512i from =
      _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00010001)), _mm512_set1_epi32(32 << 16));
  return _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(a), from, _mm512_castps_si512(b)));
}
// Two vectors with lanes as interleave leaves them, in order.
RADIXKV_INLINE void in_order(F& a, F& b) {
  const F first = _mm512_shuffle_f32x4(a, b, 0x44), second = _mm512_shuffle_f32x4(a, b, 0xee);  // a0 a1 b0 b1
  a = _mm512_shuffle_f32x4(first, first, 0xd8);                                                 // a0 b0 a1 b1
  b = _mm512_shuffle_f32x4(second, second, 0xd8);
}

#if defined(RADIXKV_SIMD_PAIRS)
// bf16 pairs: each fp32 lane holds the bits of two bf16 numbers, the first in its low half.

// c + a.first * b.first + a.second * b.second, with the instruction's own fixed rounding.
RADIXKV_INLINE F dot_pairs(F a, F b, F c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// Rounds x to bf16, stores the 16 results at p and returns their values.
RADIXKV_INLINE F store_rounded(float* p, F x) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// n <= 16 pairs of e4m3 numbers at p as pairs of bf16, which holds each exactly.
RADIXKV_INLINE F load_f8_pairs(const void* p, int n) {
  const __mmask32 mask = static_cast<__mmask32>((std::uint64_t{1} << (2 * n)) - 1u);
  const __m512i bits = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p));
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f));
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16((127 - 7) << 7));
  // The first 8 are zero and the subnormals, 1 to 7 times 2^-9; the last is NaN.
  const __m512i subnormals =
      _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __mmask32 tiny = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
  const __m512i some = _mm512_mask_permutexvar_epi16(normal, tiny, size, subnormals);
  const __m512i all = _mm512_mask_mov_epi16(some, nan, _mm512_set1_epi16(0x7fc0));
  const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_castsi512_ps(_mm512_or_si512(all, sign));
}

#endif

}  // namespace radixkv::attention::RADIXKV_ISA
