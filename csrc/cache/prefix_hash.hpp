// A number for a prefix, page by page: what is remembered of pages that are no longer there. Two prefixes may have the same
// number, so nothing but statistics is built on it.
#pragma once

#include <cstdint>
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

// The prefix `before` and then a page. A multilinear hash: the sum of the tokens, each times a number of its own.
inline std::uint64_t prefix_of(std::uint64_t before, const Token* tokens, std::int32_t n) {
  std::uint64_t sum = before * 0x9e3779b97f4a7c15u, factor = 0xd6e8feb86659fd93u;
  for (std::int32_t i = 0; i < n; ++i, factor += 0xa0761d6478bd642eu) {
    sum += (static_cast<std::uint64_t>(tokens[i]) + 1) * factor;
  }
  return mixed(sum);
}

}  // namespace radixkv
