// What the core counts in.
#pragma once

#include <cstdint>

namespace radixkv {

using Token = std::int32_t;
using PageId = std::int32_t;
using NodeId = std::int32_t;
using SpaceId = std::int32_t;  // of a namespace
inline constexpr std::int32_t kNone = -1;

}  // namespace radixkv
