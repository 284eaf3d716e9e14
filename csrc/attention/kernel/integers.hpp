// What products of integers need beside those of floats: queries and weights in 16 bits, and the scales of rows. Part of
// block.hpp; see simd.hpp.
//
// A query vector is rounded to 16 bits with a scale of its own, and so are the weights of a tile, p times each value's
// scale, in units of the largest of them / 32767. Sums are exact; what depends on the tile is the unit, and tiles lie at
// absolute positions.
#pragma once

#include "attention/kernel/math.hpp"
#include "attention/kernel/quantize.hpp"

namespace radixkv::attention::RADIXKV_ISA {

constexpr int kTileVectors = kTileKeys / kLanes;

// A query vector to 16 bits, in place; returns its scale.
static float round_query(float* vector, int dim) {
  const float most = largest(vector, dim);
  const bool usable = most > 1e-30f && most < __builtin_inff();
  const float scale = usable ? most / 32767.0f : most <= 1e-30f ? 0.0f : __builtin_nanf("");
  for (int d = 0; d < dim; d += kLanes) {
    const F x = load_f32(vector + d, min_int(dim - d, kLanes));
    store_i16(vector + d / 2, usable ? div(x, set1(scale)) : zero());
  }
  return scale;
}

// The scales of a tile's keys and values in the head at hand.
struct TileScales {
  float* keys;            // [kTileKeys]
  float* values;          // [kTileKeys]
  bool poisoned = false;  // one of the values' is NaN

  void gather(const StoredRows& of_keys, const StoredRows& of_values, int count) {
    poisoned = false;
    for (int i = 0; i < count; ++i) {
      keys[i] = of_keys.scale(i);
      values[i] = of_values.scale(i);
      poisoned |= values[i] != values[i];
    }
  }
  bool is_poisoned(int lo, int hi) const {
    for (int key = lo; key < hi; ++key) {
      if (values[key] != values[key]) return true;
    }
    return false;
  }
};

// Weights p times the values' scales to 16 bits, in units of each row's largest: of kRows query vectors and keys
// [lo, hi) of the tile, in place. A weight below 1e-30 is none.
template <int kRows, class Tick>
static void round_weights(float* p, const TileScales& scales, const int* lo, const int* hi, float* units,
                          const Tick& tick) {
  F w[kRows][kTileVectors], each[4];
  float most[kLanes];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      w[r][v] = mul(load(p + r * kTileKeys + v * kLanes), load(scales.values + v * kLanes));
      if (lo[r] > 0 || hi[r] < kTileKeys) w[r][v] = select(w[r][v], lo[r] - v * kLanes, hi[r] - v * kLanes, zero());
    }
    each[r] = w[r][0];
    for (int v = 1; v < kTileVectors; ++v) each[r] = max(each[r], w[r][v]);
  }
  for (int r = kRows; r < 4; ++r) each[r] = each[0];
  store(most, reduce<Max>(each));
  for (int r = 0; r < kRows; ++r) {
    const float top = most[r] > 1e-30f ? most[r] : 1e-30f;
    units[r] = scales.poisoned && scales.is_poisoned(lo[r], hi[r]) ? __builtin_nanf("") : top / 32767.0f;
    const F scale = set1(32767.0f / top);
    float* const codes = p + r * kTileKeys;
    for (int v = 0; v < kTileVectors; ++v) store_i16(codes + v * kLanes / 2, mul(w[r][v], scale));
    tick();
  }
}

}  // namespace radixkv::attention::RADIXKV_ISA
