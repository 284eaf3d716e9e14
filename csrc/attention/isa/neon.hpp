// NEON, as every AArch64 has it: see simd.hpp for what each operation means. head_dim is a multiple of 8, so n is always
// kLanes.
#pragma once

#include <arm_neon.h>

namespace radixkv::attention::RADIXKV_ISA {

using F = float32x4_t;
constexpr int kLanes = 4;
constexpr int kBlockRows = 8;  // 16 sums of the 32 registers

RADIXKV_INLINE F zero() { return vdupq_n_f32(0.0f); }
RADIXKV_INLINE F set1(float x) { return vdupq_n_f32(x); }
RADIXKV_INLINE F load(const float* p) { return vld1q_f32(p); }
RADIXKV_INLINE void store(float* p, F x) { vst1q_f32(p, x); }

// By way of bytes: rows of 16-bit numbers need not be aligned to more.
RADIXKV_INLINE uint16x4_t load_halves(const void* p) {
  return vreinterpret_u16_u8(vld1_u8(static_cast<const std::uint8_t*>(p)));
}
RADIXKV_INLINE void store_halves(void* p, uint16x4_t x) {
  vst1_u8(static_cast<std::uint8_t*>(p), vreinterpret_u8_u16(x));
}

RADIXKV_INLINE F load_f32(const void* p, int) { return load(static_cast<const float*>(p)); }
RADIXKV_INLINE F load_bf16(const void* p, int) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p), 16)); }
RADIXKV_INLINE F load_f16(const void* p, int) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p))); }

// As f16 a number in e4m3 has 2^-8 of its value, subnormals too. e4m3's NaN, all ones, would become a number.
RADIXKV_INLINE F load_f8(const void* p, int) {
  std::uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  const uint16x4_t bits = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
  const uint16x4_t sign = vshl_n_u16(vand_u16(bits, vdup_n_u16(0x80)), 8);
  const uint16x4_t size = vshl_n_u16(vand_u16(bits, vdup_n_u16(0x7f)), 7);
  const uint16x4_t nan = vand_u16(vceq_u16(size, vdup_n_u16(0x3f80)), vdup_n_u16(0x7e00));
  const float16x4_t half = vreinterpret_f16_u16(vorr_u16(vorr_u16(sign, size), nan));
  return vmulq_n_f32(vcvt_f32_f16(half), 256.0f);
}

RADIXKV_INLINE F load_i8(const void* p, int) {
  std::uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}

// The levels of kCodebook for the low and for the high halves of 8 bytes.
RADIXKV_INLINE void unpack_i4(const char* p, char* low, char* high) {
  const int8x16_t levels = vld1q_s8(kCodebook);
  const uint8x8_t bytes = vld1_u8(reinterpret_cast<const std::uint8_t*>(p));
  vst1_s8(reinterpret_cast<std::int8_t*>(low), vqtbl1_s8(levels, vand_u8(bytes, vdup_n_u8(15))));
  vst1_s8(reinterpret_cast<std::int8_t*>(high), vqtbl1_s8(levels, vshr_n_u8(bytes, 4)));
}

RADIXKV_INLINE void store_f32(void* p, F x, int) { store(static_cast<float*>(p), x); }

RADIXKV_INLINE void store_bf16(void* p, F x, int) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
  store_halves(p, vshrn_n_u32(quiet, 16));
}

RADIXKV_INLINE void store_f16(void* p, F x, int) { store_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

RADIXKV_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
RADIXKV_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
RADIXKV_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
RADIXKV_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
RADIXKV_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
RADIXKV_INLINE F select_less(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
RADIXKV_INLINE F max(F a, F b) { return select_less(b, a, a, b); }  // vmaxq_f32 gives NaN where either is one
RADIXKV_INLINE F round(F x) { return vrndnq_f32(x); }

RADIXKV_INLINE F pow2(F x) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}

RADIXKV_INLINE F select(F x, int lo, int hi, F other) {
  const int32x4_t lane = {0, 1, 2, 3};
  const uint32x4_t from = vcgeq_s32(lane, vdupq_n_s32(lo));
  return vbslq_f32(vandq_u32(from, vcltq_s32(lane, vdupq_n_s32(hi))), x, other);
}

RADIXKV_INLINE F set4(const float* p) { return load(p); }
RADIXKV_INLINE F low(F a, F b) { return vzip1q_f32(a, b); }
RADIXKV_INLINE F high(F a, F b) { return vzip2q_f32(a, b); }
RADIXKV_INLINE F low_pairs(F a, F b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); }
RADIXKV_INLINE F high_pairs(F a, F b) { return vcombine_f32(vget_high_f32(a), vget_high_f32(b)); }

template <int n>
RADIXKV_INLINE F swap_blocks(F x) {
  return x;
}

RADIXKV_INLINE void transpose_blocks(F (&)[1]) {}

RADIXKV_INLINE F load_i8_pairs(const void* p, int) {
  return vreinterpretq_f32_s16(vmovl_s8(vld1_s8(static_cast<const std::int8_t*>(p))));
}
RADIXKV_INLINE F add_i32(F a, F b) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}
RADIXKV_INLINE F dot_i16(F a, F b, F c) {
  const int16x8_t x = vreinterpretq_s16_f32(a), y = vreinterpretq_s16_f32(b);
  const int32x4_t first = vmull_s16(vget_low_s16(x), vget_low_s16(y)), second = vmull_high_s16(x, y);
  return add_i32(c, vreinterpretq_f32_s32(vpaddq_s32(first, second)));
}
RADIXKV_INLINE F to_float(F x) { return vcvtq_f32_s32(vreinterpretq_s32_f32(x)); }
RADIXKV_INLINE void store_i16(float* p, F x) {
  vst1_s16(reinterpret_cast<std::int16_t*>(p), vqmovn_s32(vcvtnq_s32_f32(x)));
}
RADIXKV_INLINE void interleave(F a, F b, F* pairs) {
  pairs[0] = vreinterpretq_f32_s16(vzip1q_s16(vreinterpretq_s16_f32(a), vreinterpretq_s16_f32(b)));
  pairs[1] = vreinterpretq_f32_s16(vzip2q_s16(vreinterpretq_s16_f32(a), vreinterpretq_s16_f32(b)));
}
RADIXKV_INLINE F interleave_half(F a, F b) {
  return vreinterpretq_f32_s16(vzip1q_s16(vreinterpretq_s16_f32(a), vreinterpretq_s16_f32(b)));
}
RADIXKV_INLINE void in_order(F&, F&) {}

}  // namespace radixkv::attention::RADIXKV_ISA
