// The attention kernel for AVX-512 with bf16 dot products.
#define RADIXKV_ISA avx512bf16
#define RADIXKV_SIMD_AVX512
#define RADIXKV_SIMD_PAIRS
#include "attention/kernel/block.hpp"

namespace radixkv::attention {

extern const Kernel kernel_avx512bf16;
const Kernel kernel_avx512bf16{"avx512bf16",      avx512bf16::scratch_bytes, avx512bf16::attend,
                               avx512bf16::merge, avx512bf16::finish,        avx512bf16::store_row};

}  // namespace radixkv::attention
