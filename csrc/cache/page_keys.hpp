// What a page is called below the pool: a keyed hash of its tokens and of all before them.
//
//   key_0 = H(tag + tokens_0)        key_i = H(key_{i-1} + tokens_i)        H: BLAKE2b, 16 bytes, with a secret
//
// The tag stands for the namespace. Nobody without the secret can tell which tokens a key stands for, nor find two
// prefixes with one key.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/blake2b.hpp"
#include "base/ids.hpp"

namespace radixkv {

using PageKey = std::array<std::uint8_t, 16>;

// The keys of the full pages of `n` tokens; `parent` is the tag, or the key of the page before the first of them.
std::vector<PageKey> page_keys(const Token* tokens, std::int64_t n, std::int64_t page_size, const std::uint8_t* secret,
                               std::size_t secret_size, const PageKey& parent);

}  // namespace radixkv
