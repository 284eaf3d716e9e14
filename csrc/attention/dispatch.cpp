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
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (bf16) kernels.push_back(&kernel_avx512bf16);
  if (avx512) kernels.push_back(&kernel_avx512);
  if (avx2) kernels.push_back(&kernel_avx2);
#elif defined(__aarch64__)
  kernels.push_back(&kernel_neon);  // every one of them has it
#endif
  kernels.push_back(&kernel_portable);
  return kernels;
}

}  // namespace

RowCounts store_rows(const Kernel& kernel, DType dtype, std::int32_t num_heads, std::int32_t page_size,
                     const Cache& cache, const Rows& rows, const std::int32_t* slots, std::int64_t begin,
                     std::int64_t end, std::int64_t before) {
  RowCounts counts;
  const std::int64_t bytes = row_bytes(dtype, 1);
  const auto* data = static_cast<const char*>(rows.data);
  for (std::int64_t r = begin; r < end; ++r) {
    char* const page = cache.data + slots[r] / page_size * cache.page_stride;
    const std::int64_t slot = slots[r] % page_size;
    char* to = page + slot * cache.slot_stride;
    char* scale = page + cache.scales + slot * cache.scales_slot_stride;
    const char* from = data + r * rows.row_stride * bytes;
    for (std::int32_t h = 0; h < num_heads; ++h) {
      if (cache.dtype == dtype) {
        std::memcpy(to, from, static_cast<std::size_t>(cache.row_bytes()));
      } else {
        const float* const centre = cache.centre == nullptr ? nullptr : cache.centre + h * cache.dim;
        const bool sampled = (before + r * num_heads + h) % kSampled == 0;
        kernel.store_row(dtype, from, cache, centre, to, scale, sampled, counts);
      }
      to += cache.head_stride;
      scale += kScaleBytes;
      from += rows.head_stride * bytes;
    }
  }
  return counts;
}

RowState state_at(float* memory, std::int64_t heads, std::int64_t vectors, std::int64_t v_dim) {
  float* const after_acc = memory + heads * vectors * padded_dim(v_dim);
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
