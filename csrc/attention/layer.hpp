// What a layer attends with, and where and how its K and V are stored.
#pragma once

#include <cstdint>

namespace radixkv::attention {

// f8: e4m3fn, no infinity, largest 448.
enum class DType : std::uint8_t { f32, bf16, f16, f8 };

constexpr std::int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f8 ? 1 : 2; }

constexpr int kMaxHeadDim = 576;  // that of a latent key of DeepSeek: 512 + 64

// A layer's keys or its values: rows of `dim` elements for every page, slot and kv head. Strides are in bytes; a page is
// one run of memory. What is stored times `scale` is the value; it is 1 but for 8 bits.
struct Cache {
  char* data;
  DType dtype;
  std::int32_t dim;
  float scale;
  std::int64_t page_stride;
  std::int64_t slot_stride;
  std::int64_t head_stride;
};

struct LayerKV {
  std::int32_t num_qo_heads;
  std::int32_t num_kv_heads;
  Cache k;
  Cache v;

  std::int32_t group() const { return num_qo_heads / num_kv_heads; }
};

}  // namespace radixkv::attention
