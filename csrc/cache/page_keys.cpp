#include "cache/page_keys.hpp"

namespace radixkv {

std::vector<PageKey> page_keys(const Token* tokens, std::int64_t n, std::int64_t page_size, const std::uint8_t* secret,
                               std::size_t secret_size, const PageKey& parent) {
  const Blake2b keyed(secret, secret_size, sizeof(PageKey));
  std::vector<PageKey> keys(n / page_size);
  const PageKey* before = &parent;
  for (PageKey& key : keys) {
    Blake2b hash = keyed;
    hash.update(before->data(), before->size());
    hash.update(tokens, page_size * sizeof(Token));
    hash.digest(key.data());
    before = &key;
    tokens += page_size;
  }
  return keys;
}

}  // namespace radixkv
