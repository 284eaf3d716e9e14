// What a larger pool would have hit: the pages that were evicted, in their order, as far as eight pools would hold.
//
// LRU is a stack algorithm: a pool of C + x pages holds, besides what one of C pages does, the last x of the pages that
// this one evicted and has not stored again. So a page that is missed would have been hit by every pool that is larger by
// as many pages as were evicted after it and are still away, and itself. Counted with bits over a ring.
//
// Of large pools a sample of the pages is remembered, by their prefix, 2^10 at most; tests hold hit rates to two points of
// the exact ones. What one page of the sample stands for is counted, not taken for granted: popular pages may be in it or not.
#pragma once

#include <array>
#include <cstdint>

#include "base/ids.hpp"
#include "base/memory.hpp"

namespace radixkv {

class WhatIf {
 public:
  static constexpr std::array<double, 8> kFactors{1.1, 1.25, 1.5, 2, 3, 4, 6, 8};  // times the pool's pages

  WhatIf(std::int32_t num_pages, std::int32_t page_size);

  std::uint64_t prefix(PageId page) const { return prefixes_[page]; }
  void stored(PageId page, std::uint64_t prefix) {  // it is in the tree again
    prefixes_[page] = prefix;
    if (sampled(prefix)) came_back(prefix);
  }
  void evicted(PageId page) {
    ++num_evicted_;
    if (sampled(prefixes_[page])) left(prefixes_[page]);
  }
  void forget();  // all that was evicted

  // How far a request has been looked up: all pages before `page` were hit or had been evicted, so larger pools may hit
  // this one, too.
  struct Place {
    std::int64_t page = kNone;  // kNone: one was neither
    std::uint64_t prefix = 0;   // up to there
    double needed = 0;          // by the page before, where no token follows it yet
  };

  // How many times its pages the pool would have needed to hit this one. 0: it is not in the sample; kNone: none would
  // have, nor then what comes after it.
  double needed(std::uint64_t prefix) const { return sampled(prefix) ? times(prefix) : 0; }
  void missed(double needed);  // a request missed such a page
  void request(std::int64_t input, std::int64_t hit) { input_ += input, hit_ += hit; }

  std::int64_t input_tokens() const { return input_; }
  std::int64_t hit_tokens() const { return hit_; }
  // More tokens that a pool of kFactors[i] times the pages would have hit.
  std::int64_t more_tokens(int i) const { return static_cast<std::int64_t>(more_[i]); }

 private:
  bool sampled(std::uint64_t prefix) const { return (prefix >> 40 & (every_ - 1)) == 0; }
  void came_back(std::uint64_t prefix);
  void left(std::uint64_t prefix);
  double times(std::uint64_t prefix) const;
  double each() const;  // pages that one of the sample stands for; near every_
  std::uint64_t slot_of(std::uint64_t prefix) const;
  void remove(std::uint64_t slot);
  void count(std::int64_t place, std::int32_t by);
  std::int64_t up_to(std::int64_t place) const;  // how many there are at places 0 .. place

  const std::int64_t num_pages_, page_size_;
  std::uint64_t every_ = 1;  // one page of so many is remembered
  std::int64_t capacity_, there_ = 0, next_ = 0;
  std::uint64_t mask_;
  LazyArray<std::uint64_t> prefixes_;  // of each full page of the tree
  LazyArray<std::uint64_t> ring_;      // prefixes in the order of eviction, up to next_
  LazyArray<std::uint64_t> words_;     // a bit for each place of the ring: whether its prefix is still away
  LazyArray<std::int32_t> counts_;     // the bits of each word
  LazyArray<std::int32_t> slots_;      // hash table: place in the ring + 1; 0: empty
  std::array<double, kFactors.size()> more_{};
  std::int64_t num_evicted_ = 0, num_sampled_ = 0;  // pages since the start; what each one of the sample stands for
  std::int64_t input_ = 0, hit_ = 0;
};

}  // namespace radixkv
