// The attention kernel for AVX2 + FMA + F16C.
#define RADIXKV_ISA avx2
#define RADIXKV_SIMD_AVX2
#include "attention/kernel/block.hpp"

namespace radixkv::attention {

extern const Kernel kernel_avx2;
const Kernel kernel_avx2{"avx2", avx2::scratch_bytes, avx2::attend, avx2::merge, avx2::finish, avx2::store_row};

}  // namespace radixkv::attention
