// XXH3-64 with a seed, of messages of more than 240 bytes (shorter ones have an algorithm of their own there).
// Not a cryptographic hash: it finds what a disk or a network damaged.
#pragma once

#include <cstddef>
#include <cstdint>

namespace radixkv {

inline constexpr std::size_t kLeastHashed = 241;

std::uint64_t xxh3_64(const void* data, std::size_t size, std::uint64_t seed);  // size >= kLeastHashed

}  // namespace radixkv
