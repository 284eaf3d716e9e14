// The few vector operations that the attention kernel is written in, one header per instruction set.
//
// The kernel's source is compiled once per instruction set. Each of these translation units defines
//   RADIXKV_ISA       its namespace, so that no inline function of one leaks into another, and
//   RADIXKV_SIMD_...  which of the headers it uses.
//
// Every header provides, in namespace radixkv::attention::RADIXKV_ISA:
//   F, kLanes                      a vector of fp32 and its width
//   kBlockRows                     query vectors in the largest register block of a product, which is 2 vectors wide
//   load, store, zero, set1        of fp32
//   set4(p)                        the four numbers at p in every block; a block is four lanes, 16 bytes
//   load_f32/bf16/f16/f8/i8(p, n)  n <= kLanes elements at p, widened to fp32; the other lanes are zero
//   load_i8_pairs(p, n)            n <= kLanes pairs of 8-bit integers at p, each as two of 16 bits; the others are zero
//   unpack_i4(p, low, high)        the levels of the low, and of the high halves of 8 bytes at p
//   store_f32/bf16/f16(p, x, n)    the first n lanes, rounded to nearest even
//   add, sub, mul, div, max, fma   lane by lane; max returns its second operand where one is NaN
//   round, pow2                    to the nearest integer; 2^x of an integer -127 <= x <= 127 (2^-127 is 0)
//   select(x, lo, hi, other)       x in the lanes lo <= i < hi, other elsewhere
//   select_less(a, b, x, y)        x in the lanes where a < b, else y
//   low(a, b), high(a, b)          within each block a0 b0 a1 b1, or a2 b2 a3 b3
//   low_pairs, high_pairs          within each block a0 a1 b0 b1, or a2 a3 b2 b3
//   swap_blocks<n>(x)              block i ^ n in the place of block i
//   transpose_blocks(r)            kLanes / 4 vectors as a square of blocks, in place
// and of vectors whose lanes are integers of 32 bits, or pairs of numbers of 16:
//   dot_i16(a, b, c)               c + a.first * b.first + a.second * b.second
//   add_i32, to_float              of integers of 32 bits
//   store_i16(p, x)                fp32 lanes to the nearest integers of 16 bits, which they fit
//   interleave(a, b, pairs)        pairs (a[i], b[i]) of the 2 kLanes numbers of each, in the order that costs least
//   interleave_half(a, b)          the first kLanes of them, in order
//   in_order(a, b)                 two vectors with lanes as interleave leaves them, in order
// fma is one rounding, but in portable.hpp, where it is a multiplication and an addition; within one instruction set it
// is always the same.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/layer.hpp"

#define RADIXKV_INLINE static inline __attribute__((always_inline))

#if defined(RADIXKV_SIMD_AVX512)
#include "attention/isa/avx512.hpp"
#elif defined(RADIXKV_SIMD_AVX2)
#include "attention/isa/avx2.hpp"
#elif defined(RADIXKV_SIMD_NEON)
#include "attention/isa/neon.hpp"
#else
#include "attention/isa/portable.hpp"
#endif

namespace radixkv::attention::RADIXKV_ISA {

RADIXKV_INLINE int min_int(int a, int b) { return a < b ? a : b; }
RADIXKV_INLINE int max_int(int a, int b) { return a > b ? a : b; }
RADIXKV_INLINE std::int64_t min_int64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
RADIXKV_INLINE std::int64_t max_int64(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace radixkv::attention::RADIXKV_ISA
