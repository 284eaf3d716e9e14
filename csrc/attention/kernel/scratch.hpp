// The memory that a thread computes a block in. Part of block.hpp; see there.
#pragma once

#include "attention/kernel/integers.hpp"
#include "attention/kernel/state.hpp"

namespace radixkv::attention::RADIXKV_ISA {

// Scratch memory of one thread, in floats and all 64-byte aligned.
struct Scratch {
  float* q;          // [heads, k_dim / kStep / 4, R / heads, 4]
  float* scores;     // [R, kTileKeys]; then the probabilities, kTileKeys / kStep of them
  float* keys;       // of kLanes keys: see KeyColumns
  float* values;     // [kTileKeys / kStep, padded_dim]
  float* single;     // [padded_dim]: of one step
  float* rows;       // [kLanes, max(k_dim, v_dim)]: rows of K, or of V, as products take them
  float* zeros;      // [kMaxHeadDim]
  float* q_offsets;  // [R]: of every score of a vector, where keys have a centre that shows
  // Of products of integers:
  float* codes;     // [kTileKeys, padded_dim / 4]: values unpacked to bytes
  float* q_scales;  // [R]
  float* units;     // [R]: of the tile's weights
  TileScales scales;
  RowState chunk;
};

constexpr std::int64_t aligned_floats(std::int64_t n) { return (n + 15) / 16 * 16; }

static std::size_t scratch_bytes(std::int64_t rows, std::int64_t k_dim, std::int64_t v_dim) {
  const std::int64_t floats = aligned_floats(rows * k_dim) + rows * kTileKeys + k_dim * kLanes +
                              (kTileKeys + 1) * padded_dim(v_dim) + aligned_floats(kLanes * max_int64(k_dim, v_dim)) +
                              kMaxHeadDim + kTileKeys * padded_dim(v_dim) / 4 + 3 * aligned_floats(rows) +
                              2 * kTileKeys + state_floats(rows, v_dim);
  return static_cast<std::size_t>(floats) * sizeof(float);
}

RADIXKV_INLINE Scratch scratch_at(void* memory, std::int64_t heads, std::int64_t vectors, std::int64_t k_dim,
                                  std::int64_t v_dim) {
  Scratch s;
  const std::int64_t rows = heads * vectors;
  float* at = static_cast<float*>(memory);
  s.q = at, at += aligned_floats(rows * k_dim);
  s.scores = at, at += rows * kTileKeys;
  s.keys = at, at += k_dim * kLanes;
  s.values = at, at += kTileKeys * padded_dim(v_dim);
  s.single = at, at += padded_dim(v_dim);
  s.rows = at, at += aligned_floats(kLanes * max_int64(k_dim, v_dim));
  s.zeros = at, at += kMaxHeadDim;
  s.codes = at, at += kTileKeys * padded_dim(v_dim) / 4;
  s.q_scales = at, at += aligned_floats(rows);
  s.q_offsets = at, at += aligned_floats(rows);
  s.units = at, at += aligned_floats(rows);
  s.scales.keys = at, at += kTileKeys;
  s.scales.values = at, at += kTileKeys;
  const std::int64_t padded = padded_dim(v_dim);
  s.chunk = RowState{at + rows * padded, at + rows * padded + rows, at, vectors};
  return s;
}

}  // namespace radixkv::attention::RADIXKV_ISA
