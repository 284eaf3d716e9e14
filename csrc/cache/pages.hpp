// The pages of the pool as the core sees them: which are free, which tokens each holds, which page follows which.
//
// A page's tokens are kept at the page's own place, page * page_size, exactly as its K and V are in the pool. So
// publishing a page to the tree, splitting a run of pages or evicting one moves no token.
//
//   tokens   [ page 0: t t t t | page 1: t t t t | page 2: ... ]
//   next/prev  link the pages of one node of the tree into a run; `next` also links the free pages
#pragma once

#include "base/ids.hpp"
#include "base/memory.hpp"

namespace radixkv {

class Pages {
 public:
  Pages(std::int32_t num_pages, std::int32_t page_size);

  std::int32_t num_pages() const { return num_pages_; }
  std::int32_t page_size() const { return page_size_; }
  std::int32_t num_free() const { return num_free_; }

  Token* tokens(PageId page) { return tokens_.data() + static_cast<std::size_t>(page) * page_size_; }
  const Token* tokens(PageId page) const { return tokens_.data() + static_cast<std::size_t>(page) * page_size_; }
  PageId next(PageId page) const { return next_[page]; }
  PageId prev(PageId page) const { return prev_[page]; }
  void link(PageId a, PageId b) {
    next_[a] = b;
    prev_[b] = a;
  }

  // Takes a free page; there must be one. The page freed last is taken first (its run is likely to be contiguous),
  // then pages that were never used, in ascending order.
  PageId take() {
    --num_free_;
    if (free_ == kNone) return fresh_++;
    const PageId page = free_;
    free_ = next_[page];
    return page;
  }
  // Takes this very page, which must be among the `within` pages freed last. O(within).
  void take_this(PageId page, std::int32_t within);
  void give_back(PageId page) {
    next_[page] = free_;
    free_ = page;
    ++num_free_;
  }

  // How many pages of the run that starts at `first` (at most `limit` of them) hold exactly the tokens at `tokens`.
  // Their ids go to `out` unless it is null. O(tokens compared).
  std::int32_t count_equal(PageId first, std::int32_t limit, const Token* tokens, PageId* out) const;
  // How many leading tokens of `page` equal those at `tokens`, looking at `n` at most.
  std::int32_t common_prefix(PageId page, const Token* tokens, std::int32_t n) const;

  // Visits every free page (for check()).
  template <typename F>
  void for_each_free(F&& visit) const {
    PageId page = free_;
    for (std::int32_t i = num_free_ - (num_pages_ - fresh_); i > 0; --i, page = next_[page]) visit(page);
    for (PageId p = fresh_; p < num_pages_; ++p) visit(p);
  }

 private:
  std::int32_t contiguous(PageId first, std::int32_t most) const;

  const std::int32_t num_pages_, page_size_;
  std::int32_t num_free_;
  PageId fresh_ = 0;     // pages from here on were never used
  PageId free_ = kNone;  // the page freed last, head of the free list
  LazyArray<Token> tokens_;
  LazyArray<PageId> next_, prev_;
};

}  // namespace radixkv
