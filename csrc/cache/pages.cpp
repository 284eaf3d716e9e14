#include "cache/pages.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace radixkv {

Pages::Pages(std::int32_t num_pages, std::int32_t page_size)
    : num_pages_(num_pages),
      page_size_(page_size),
      num_free_(num_pages),
      tokens_(static_cast<std::size_t>(num_pages) * page_size),
      next_(num_pages),
      prev_(num_pages) {}

void Pages::take_this(PageId page, std::int32_t within) {
  PageId* link = &free_;
  for (; within > 0 && *link != page; --within) link = &next_[*link];
  if (*link != page) throw std::logic_error("take_this: page is not among those freed last");
  *link = next_[page];
  --num_free_;
}

// How many pages of the run that starts at `first`, at most `most`, have ascending ids.
std::int32_t Pages::contiguous(PageId first, std::int32_t most) const {
  constexpr std::int32_t kBlock = 16;  // links looked at together, once a run has shown itself to be long
  std::int32_t n = 1;
  const auto step_to = [&](std::int32_t end) {
    while (n < end && next_[first + n - 1] == first + n) ++n;
  };
  step_to(std::min(most, kBlock));
  if (n < kBlock) return n;
  while (n + kBlock <= most && first + n + kBlock <= num_pages_) {
    const PageId* next = next_.data() + first + n - 1;
    std::int32_t differ = 0;
    for (std::int32_t i = 0; i < kBlock; ++i) differ |= next[i] ^ (first + n + i);
    if (differ != 0) break;
    n += kBlock;
  }
  step_to(most);
  return n;
}

std::int32_t Pages::count_equal(PageId first, std::int32_t limit, const Token* tokens, PageId* out) const {
  // Pages with ascending ids lie side by side, so their tokens are compared in one sweep.
  std::int32_t count = 0;
  PageId page = first;
  while (count < limit) {
    const std::int32_t stretch = contiguous(page, limit - count);
    const Token* have = this->tokens(page);
    const Token* want = tokens + static_cast<std::size_t>(count) * page_size_;
    const std::size_t n = static_cast<std::size_t>(stretch) * page_size_;
    std::int32_t equal = stretch;
    if (std::memcmp(have, want, n * sizeof(Token)) != 0) {
      equal = static_cast<std::int32_t>(std::mismatch(have, have + n, want).first - have) / page_size_;
    }
    if (out) {
      for (std::int32_t i = 0; i < equal; ++i) out[count + i] = page + i;
    }
    count += equal;
    if (equal < stretch || count == limit) break;
    page = next_[page + stretch - 1];
  }
  return count;
}

std::int32_t Pages::common_prefix(PageId page, const Token* tokens, std::int32_t n) const {
  const Token* have = this->tokens(page);
  return static_cast<std::int32_t>(std::mismatch(have, have + n, tokens).first - have);
}

}  // namespace radixkv
