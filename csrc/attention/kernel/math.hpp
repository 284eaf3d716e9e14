// exp2, tanh, sums over lanes and the two matrix products that the attention kernel is made of. Part of
// block.hpp; see simd.hpp.
#pragma once

#include "attention/kernel/formats.hpp"

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

struct Max {
  RADIXKV_INLINE F of(F a, F b) { return max(a, b); }
};
struct Add {
  RADIXKV_INLINE F of(F a, F b) { return add(a, b); }
};

// Lane j of block i: Op over block i of the j-th vector, as (0 1) (2 3) -> (0 2) (1 3). All in a fixed order, which
// does not depend on what stands in the other three vectors.
template <class Op>
RADIXKV_INLINE F reduce_blocks(F x0, F x1, F x2, F x3) {
  const F x01 = Op::of(low(x0, x1), high(x0, x1)), x23 = Op::of(low(x2, x3), high(x2, x3));
  return Op::of(low_pairs(x01, x23), high_pairs(x01, x23));
}

// Lane j of every block: Op over all lanes of the j-th vector.
template <class Op>
RADIXKV_INLINE F reduce(const F (&x)[4]) {
  F y = reduce_blocks<Op>(x[0], x[1], x[2], x[3]);
  if constexpr (kLanes >= 16) y = Op::of(y, swap_blocks<2>(y));
  if constexpr (kLanes >= 8) y = Op::of(y, swap_blocks<1>(y));
  return y;
}

template <int n>
struct Int {
  static constexpr int value = n;
};

// call(Int<n>()), for 1 <= n <= most.
template <int most, class Call>
RADIXKV_INLINE void with_constant(int n, const Call& call) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, call);
  }
  call(Int<most>());
}

// kLanes keys, or the values of a tile, for the products below: rows where they lie, in a format that products take as
// it is, or packed. A unit is what a product takes of a row in one lane: a number in fp32 or a pair of them in bf16.
// Keys come as two of four vectors at a time: block b of vector j is four units of key 4 b + j.
template <class Format>
struct KeyRows {
  const char* const* rows;
  std::int64_t offset;  // bytes to add to each

  // n <= kLanes units from d on.
  RADIXKV_INLINE void load_into(F (&column)[2][kLanes / 4], const KeyRows& keys, int half, int d, int n) {
    const std::int64_t at = keys.offset + static_cast<std::int64_t>(d) * Format::Op::kStep * Format::kBytes;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 4
      for (int b = 0; b < kLanes / 4; ++b) column[j][b] = Format::load(keys.rows[4 * b + 2 * half + j] + at, n);
      transpose_blocks(column[j]);
    }
  }
};
struct KeyColumns {
  const float* units;  // [depth / 4, 4, kLanes]

  RADIXKV_INLINE float* at(float* units, int half, int j, int d) { return units + (d + 2 * half + j) * kLanes; }
  RADIXKV_INLINE void load_into(F (&column)[2][kLanes / 4], const KeyColumns& keys, int half, int d, int n) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 4
      for (int b = 0; b < kLanes / 4; ++b) {
        if (4 * b < n) column[j][b] = load(keys.units + (d + 4 * b + 2 * half + j) * kLanes);
      }
    }
  }
};

// kVectors vectors of V, `left` units of a row before their end, one key or pair of keys a step.
template <class Format>
struct ValueRows {
  const char* const* rows;
  std::int64_t offset;

  template <int kVectors>
  RADIXKV_INLINE void load_into(F (&column)[kVectors], const ValueRows& values, int step, int left) {
    constexpr int kStep = Format::Op::kStep;
    const char* const* const row = values.rows + step * kStep;
    if constexpr (kStep == 2) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v += 2) {
        const std::int64_t at = values.offset + v * (kLanes / 2) * kStep * Format::kBytes;
        const int n = min_int(left - v * (kLanes / 2), kLanes);  // at least one: there are no empty vectors
        const F a = Format::load(row[0] + at, n), b = Format::load(row[1] + at, n);
        if (v + 1 < kVectors) {
          interleave(a, b, column + v);
        } else {
          column[v] = interleave_half(a, b);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int n = left - v * kLanes;
        const char* const at = row[0] + values.offset + v * kLanes * Format::kBytes;
        column[v] = n <= 0 ? zero() : Format::load(at, n < kLanes ? n : kLanes);
      }
    }
  }
};
struct ValueColumns {
  const float* units;
  std::int64_t stride;

  template <int kVectors>
  RADIXKV_INLINE void load_into(F (&column)[kVectors], const ValueColumns& values, int step, int) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(values.units + step * values.stride + v * kLanes);
  }
};

template <class Op, int kRows, class Keys>
RADIXKV_INLINE void score_step(const float* q, std::ptrdiff_t q_stride, const Keys& keys, int half, int d, int n,
                               F (&sum)[kRows][2]) {
  F column[2][kLanes / 4];
  Keys::load_into(column, keys, half, d, n);
#pragma GCC unroll 4
  for (int m = 0; m < kLanes / 4; ++m) {
    if (4 * m >= n) break;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F four = set4(q + (d / 4 + m) * q_stride + 4 * r);
      sum[r][0] = Op::step(four, column[0][m], sum[r][0]);
      sum[r][1] = Op::step(four, column[1][m], sum[r][1]);
    }
  }
}

// Scores of kRows query vectors and kLanes keys. q: four units of each vector, then, q_stride later, the next four.
// Every score is made of four sums, each a chain over head_dim, which are added up at the end. That takes as many
// multiplications as one chain, and only half the shuffles that it takes to turn keys into columns of single units.
template <class Op, int kRows, class Keys, class Tick>
static void score_block(const float* q, std::ptrdiff_t q_stride, const Keys& keys, int depth, float* scores,
                        std::ptrdiff_t scores_stride, const Tick& tick) {
  F first[kRows];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    F sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = zero();
    int d = 0;
    for (; d + kLanes <= depth; d += kLanes) {
      score_step<Op>(q, q_stride, keys, half, d, kLanes, sum);
      tick();
    }
    if (d < depth) {
      score_step<Op>(q, q_stride, keys, half, d, depth - d, sum);
      tick();
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F two = Op::sum(low(sum[r][0], sum[r][1]), high(sum[r][0], sum[r][1]));
      if (half == 0) {
        first[r] = two;
      } else {
        store(scores + r * scores_stride, Op::sum(low_pairs(first[r], two), high_pairs(first[r], two)));
      }
    }
  }
}

// Steps of P V between two ticks.
constexpr int kTickSteps = 4;

// acc[kRows][kVectors] += p[kRows][depth] V[depth][kVectors], every element by one chain of steps from 0 to depth - 1,
// so that it does not depend on how rows and columns are grouped. left: units of V's rows before their end; units: what
// a product of integers stands for, of each row.
template <class Op, int kRows, int kVectors, class Values, class Tick>
static void weigh_block(const float* p, std::ptrdiff_t p_stride, const Values& values, int left, float* acc,
                        std::ptrdiff_t acc_stride, int depth, const float* units, const Tick& tick) {
  F sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Op::begin(acc + r * acc_stride + v * kLanes);
  }
  const auto step = [&](int i, int n) __attribute__((always_inline)) {
    F column[kVectors];
    Values::load_into(column, values, i, n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F factor = set1(p[r * p_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Op::step(factor, column[v], sum[r][v]);
    }
  };
  const auto steps = [&](int n) __attribute__((always_inline)) {
    int i = 0;
    for (; i + kTickSteps <= depth; i += kTickSteps) {
#pragma GCC unroll 4
      for (int j = 0; j < kTickSteps; ++j) step(i + j, n);
      tick();
    }
    for (; i < depth; ++i) step(i, n);
  };
  constexpr int kUnits = kVectors * kLanes / Op::kStep;
  if (left >= kUnits) {
    steps(kUnits);
  } else {
    steps(left);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Op::end(acc + r * acc_stride + v * kLanes, sum[r][v], units + r);
  }
}

}  // namespace radixkv::attention::RADIXKV_ISA
