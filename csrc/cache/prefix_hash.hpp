// A number for a prefix, page by page: what is remembered of pages that are no longer there. Two prefixes may have the same
// number, so nothing but statistics is built on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#include "base/ids.hpp"

namespace radixkv {

inline std::uint64_t mixed(std::uint64_t key) {
  key = (key ^ (key >> 32)) * 0xd6e8feb86659fd93u;
  return key ^ (key >> 29);
}

inline std::uint64_t prefix_of(std::string_view name) {
  std::uint64_t key = 1;
  for (const char c : name) key = mixed(key + static_cast<unsigned char>(c) + 1);
  return key;
}

// The prefix `before` and then a page: four tokens are two words, each with a key, and their product of 128 bits is
// folded, as in wyhash.
inline std::uint64_t prefix_of(std::uint64_t before, const Token* tokens, std::int32_t n) {
  __extension__ using Wide = unsigned __int128;
  constexpr std::uint64_t kStep = 0xa0761d6478bd642eu;
  std::uint64_t low = 0, high = 0, key = 0xd6e8feb86659fd93u;
  std::int32_t i = 0;
  for (; i + 4 <= n; i += 4, key += kStep) {
    std::uint64_t a, b;
    std::memcpy(&a, tokens + i, sizeof a);
    std::memcpy(&b, tokens + i + 2, sizeof b);
    const Wide product = static_cast<Wide>(a ^ key) * (b ^ (key >> 1));
    low += static_cast<std::uint64_t>(product);
    high ^= static_cast<std::uint64_t>(product >> 64);
  }
  for (; i < n; ++i) low = (low ^ (static_cast<std::uint64_t>(tokens[i]) + 1)) * 0xd6e8feb86659fd93u;
  return mixed((low ^ high) + before * 0x9e3779b97f4a7c15u);  // last, so that pages are read ahead of the one before
}

}  // namespace radixkv
