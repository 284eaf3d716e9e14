// The attention kernel for AVX-512.
#define RADIXKV_ISA avx512
#define RADIXKV_SIMD_AVX512
#include "attention/kernel/block.hpp"

namespace radixkv::attention {

extern const Kernel kernel_avx512;
const Kernel kernel_avx512{"avx512",      avx512::scratch_bytes, avx512::attend,
                           avx512::merge, avx512::finish,        avx512::store_row};

}  // namespace radixkv::attention
