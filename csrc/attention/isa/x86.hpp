// What AVX2 and AVX-512 do with the same instructions: see simd.hpp for what each operation means.
#pragma once

#include <immintrin.h>

#include "attention/layer.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// The levels of kCodebook for the low and for the high halves of 8 bytes.
RADIXKV_INLINE void unpack_i4(const char* p, char* low, char* high) {
  const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(kCodebook));
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i first = _mm_shuffle_epi8(levels, _mm_and_si128(bytes, mask));
  const __m128i second = _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(low), first);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(high), second);
}

}  // namespace radixkv::attention::RADIXKV_ISA
