// Plain C++ with GCC's and Clang's vector types, 128 bits wide: see simd.hpp for what each operation means.
// head_dim is a multiple of 8, so n is always kLanes.
#pragma once

#include <cstring>

namespace radixkv::attention::RADIXKV_ISA {

using F = float __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kBlockRows = 4;

RADIXKV_INLINE F set1(float x) { return F{x, x, x, x}; }
RADIXKV_INLINE F zero() { return set1(0.0f); }
RADIXKV_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RADIXKV_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

RADIXKV_INLINE float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
RADIXKV_INLINE std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
RADIXKV_INLINE std::uint16_t half_at(const void* p, int i) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(p) + 2 * i, sizeof bits);
  return bits;
}

RADIXKV_INLINE float f16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Shifted into place the exponent is off by 127 - 15; scaling by 2^112 repairs it, for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

RADIXKV_INLINE std::uint16_t float_to_f16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (rest < 0x38800000u) {  // below the smallest normal: adding 0.5 aligns the last bit with 2^-24
    const std::uint32_t aligned = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return static_cast<std::uint16_t>(sign | aligned);
  }
  const std::uint32_t rounded = rest + 0x0fffu + ((rest >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

RADIXKV_INLINE std::uint16_t float_to_bf16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

RADIXKV_INLINE float f8_to_float(std::uint8_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80u) << 24;
  const std::uint32_t rest = bits & 0x7fu;
  if (rest == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  // As f16_to_float: the exponent is off by 127 - 7.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 20) * 0x1p120f));
}

RADIXKV_INLINE F load_f32(const void* p, int) { return load(static_cast<const float*>(p)); }
RADIXKV_INLINE F load_bf16(const void* p, int) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = bits_to_float(static_cast<std::uint32_t>(half_at(p, i)) << 16);
  return load(x);
}
RADIXKV_INLINE F load_f16(const void* p, int) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = f16_to_float(half_at(p, i));
  return load(x);
}
RADIXKV_INLINE F load_f8(const void* p, int) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = f8_to_float(static_cast<const std::uint8_t*>(p)[i]);
  return load(x);
}
RADIXKV_INLINE F load_i8(const void* p, int) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<const signed char*>(p)[i];
  return load(x);
}
RADIXKV_INLINE void unpack_i4(const char* p, char* low, char* high) {
  for (int i = 0; i < 8; ++i) {
    const unsigned byte = static_cast<unsigned char>(p[i]);
    low[i] = static_cast<char>(kCodebook[byte & 15u]);
    high[i] = static_cast<char>(kCodebook[byte >> 4]);
  }
}
RADIXKV_INLINE void store_f32(void* p, F x, int) { store(static_cast<float*>(p), x); }
RADIXKV_INLINE void store_bf16(void* p, F x, int) {
  std::uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = float_to_bf16(x[i]);
  std::memcpy(p, halves, sizeof halves);
}
RADIXKV_INLINE void store_f16(void* p, F x, int) {
  std::uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = float_to_f16(x[i]);
  std::memcpy(p, halves, sizeof halves);
}

RADIXKV_INLINE F add(F a, F b) { return a + b; }
RADIXKV_INLINE F sub(F a, F b) { return a - b; }
RADIXKV_INLINE F mul(F a, F b) { return a * b; }
RADIXKV_INLINE F div(F a, F b) { return a / b; }
RADIXKV_INLINE F select_less(F a, F b, F x, F y) {
  F result;
  for (int i = 0; i < kLanes; ++i) result[i] = a[i] < b[i] ? x[i] : y[i];
  return result;
}
RADIXKV_INLINE F max(F a, F b) { return select_less(b, a, a, b); }
RADIXKV_INLINE F fma(F a, F b, F c) { return a * b + c; }
RADIXKV_INLINE F round(F x) {  // |x| < 2^22: adding 1.5 * 2^23 leaves no bit for the fraction
  const F magic = set1(12582912.0f);
  return (x + magic) - magic;
}
RADIXKV_INLINE F pow2(F x) {
  F result;
  for (int i = 0; i < kLanes; ++i) {
    // A NaN has no exponent to build; the polynomial beside it carries it on.
    const float bounded = x[i] >= -127.0f ? x[i] : -127.0f;
    result[i] = bits_to_float(static_cast<std::uint32_t>(static_cast<std::int32_t>(bounded) + 127) << 23);
  }
  return result;
}
RADIXKV_INLINE F select(F x, int lo, int hi, F other) {
  F result;
  for (int i = 0; i < kLanes; ++i) result[i] = i >= lo && i < hi ? x[i] : other[i];
  return result;
}
RADIXKV_INLINE F set4(const float* p) { return load(p); }
RADIXKV_INLINE F low(F a, F b) { return F{a[0], b[0], a[1], b[1]}; }
RADIXKV_INLINE F high(F a, F b) { return F{a[2], b[2], a[3], b[3]}; }
RADIXKV_INLINE F low_pairs(F a, F b) { return F{a[0], a[1], b[0], b[1]}; }
RADIXKV_INLINE F high_pairs(F a, F b) { return F{a[2], a[3], b[2], b[3]}; }
template <int n>
RADIXKV_INLINE F swap_blocks(F x) {
  return x;
}
RADIXKV_INLINE void transpose_blocks(F (&)[1]) {}

using Int32s = std::int32_t __attribute__((vector_size(16)));
using Int16s = std::int16_t __attribute__((vector_size(16)));

RADIXKV_INLINE F load_i8_pairs(const void* p, int) {
  Int16s x;
  for (int i = 0; i < 2 * kLanes; ++i) x[i] = static_cast<const signed char*>(p)[i];
  return (F)x;
}
RADIXKV_INLINE F add_i32(F a, F b) { return (F)((Int32s)a + (Int32s)b); }
RADIXKV_INLINE F dot_i16(F a, F b, F c) {
  const auto x = (Int16s)a, y = (Int16s)b;
  auto sum = (Int32s)c;
  for (int i = 0; i < kLanes; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return (F)sum;
}
RADIXKV_INLINE F to_float(F x) { return __builtin_convertvector((Int32s)x, F); }
RADIXKV_INLINE void store_i16(float* p, F x) {
  const F whole = round(x);
  std::int16_t codes[kLanes];
  for (int i = 0; i < kLanes; ++i) codes[i] = whole[i] == whole[i] ? static_cast<std::int16_t>(whole[i]) : 0;
  std::memcpy(p, codes, sizeof codes);
}
RADIXKV_INLINE void interleave(F a, F b, F* pairs) {
  const auto x = (Int16s)a, y = (Int16s)b;
  pairs[0] = (F)Int16s{x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]};
  pairs[1] = (F)Int16s{x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]};
}
RADIXKV_INLINE F interleave_half(F a, F b) {
  const auto x = (Int16s)a, y = (Int16s)b;
  return (F)Int16s{x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]};
}
RADIXKV_INLINE void in_order(F&, F&) {}

}  // namespace radixkv::attention::RADIXKV_ISA
