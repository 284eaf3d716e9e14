// The attention kernel for NEON.
#define RADIXKV_ISA neon
#define RADIXKV_SIMD_NEON
#include "attention/kernel/block.hpp"

namespace radixkv::attention {

extern const Kernel kernel_neon;
const Kernel kernel_neon{"neon", neon::scratch_bytes, neon::attend, neon::merge, neon::finish, neon::store_row};

}  // namespace radixkv::attention
