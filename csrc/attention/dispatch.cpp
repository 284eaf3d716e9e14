#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention/attention.hpp"
#include "base/error.hpp"

namespace radixkv::attention {

extern const Kernel kernel_portable;
#if defined(__x86_64__)
extern const Kernel kernel_avx2, kernel_avx512, kernel_avx512bf16;
#elif defined(__aarch64__)
extern const Kernel kernel_neon;
#endif

namespace {

// Best first. The environment may only choose among these.
std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) kernels.push_back(&kernel_avx512bf16);
  if (avx512) kernels.push_back(&kernel_avx512);
  if (avx2) kernels.push_back(&kernel_avx2);
#elif defined(__aarch64__)
  kernels.push_back(&kernel_neon);  // every one of them has it
#endif
  kernels.push_back(&kernel_portable);
  return kernels;
}

void store_rows(const Kernel& kernel, const KvLayout& layout, char* cache, const Rows& rows, float scale,
                const std::int32_t* slots, std::int64_t begin, std::int64_t end) {
  const std::int64_t bytes = element_size(layout.dtype), kv_bytes = element_size(layout.kv_dtype);
  const auto* data = static_cast<const char*>(rows.data);
  const auto row_bytes = static_cast<std::size_t>(layout.head_dim * bytes);
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t page = slots[r] / layout.page_size, offset = slots[r] % layout.page_size;
    char* to = cache + (page * layout.page_stride + offset * layout.slot_stride) * kv_bytes;
    const char* from = data + r * rows.row_stride * bytes;
    for (std::int32_t h = 0; h < layout.num_kv_heads; ++h) {
      if (layout.kv_dtype == layout.dtype) {
        std::memcpy(to, from, row_bytes);
      } else {
        kernel.quantize(layout.dtype, from, to, layout.head_dim, scale);
      }
      to += layout.head_stride * kv_bytes;
      from += rows.head_stride * bytes;
    }
  }
}

}  // namespace

void append_kv(const Kernel& kernel, const KvLayout& layout, void* k_cache, void* v_cache, const Rows& k, const Rows& v,
               const Scales& scales, const std::int32_t* slots, std::int64_t begin, std::int64_t end) {
  store_rows(kernel, layout, static_cast<char*>(k_cache), k, scales.k, slots, begin, end);
  store_rows(kernel, layout, static_cast<char*>(v_cache), v, scales.v, slots, begin, end);
}

RowState state_at(float* memory, std::int64_t heads, std::int64_t vectors, std::int64_t head_dim) {
  float* const after_acc = memory + heads * vectors * padded_dim(head_dim);
  return RowState{after_acc, after_acc + heads * vectors, memory, vectors};
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernel* kernel : supported_kernels()) names.emplace_back(kernel->isa);
  return names;
}

const Kernel& kernel(const char* isa) {
  const bool from_environment = isa == nullptr || *isa == '\0';
  const char* wanted = from_environment ? std::getenv("RADIXKV_ISA") : isa;
  const std::vector<const Kernel*> kernels = supported_kernels();
  if (wanted == nullptr || *wanted == '\0') return *kernels.front();
  std::string names;
  for (const Kernel* candidate : kernels) {
    if (std::strcmp(candidate->isa, wanted) == 0) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->isa);
  }
  invalid((from_environment ? "RADIXKV_ISA is '" : "isa is '") + std::string(wanted) + "': this machine supports " +
          names);
}

}  // namespace radixkv::attention
