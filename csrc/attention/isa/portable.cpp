// The attention kernel for Portable C++.
#define RADIXKV_ISA portable
#include "attention/kernel/block.hpp"

namespace radixkv::attention {

extern const Kernel kernel_portable;
const Kernel kernel_portable{"portable",      portable::scratch_bytes, portable::attend,
                             portable::merge, portable::finish,        portable::store_row};

}  // namespace radixkv::attention
