// Which runs of pages are the least likely to be used soon, for the "hazard" policy: an estimate for each class of nodes.
//
// A node is of a class, by what its last use was like: how often it was used, whether a request ended in it, how much of
// that request was cached, whether others had gone on from it. For each class it is counted at which ages nodes were
// used again and at which ages they were not, evicted ones included (Ghosts). From that comes the hazard of a class at
// an age, the share of those that get so old that are used just then (Kaplan and Meier 1958), pulled towards that of
// all classes where there is little to count; and from that the index of Gittins: over the best of all horizons, the
// uses expected in it for the time that the page must be kept. The lowest goes first.
//
// Ages are in turnovers of the cache: pages taken since, over pages of the pool. No clock, no randomness.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/ids.hpp"
#include "base/memory.hpp"

namespace radixkv {

class Hazard {
 public:
  static constexpr int kClasses = 48;

  explicit Hazard(std::int32_t num_pages);

  // The class of a node after its uses-th use, by a request that found `cached` of its `total` tokens.
  static std::uint8_t class_of(std::int32_t uses, bool end, std::int64_t cached, std::int64_t total, bool inner);

  std::int64_t now() const { return taken_; }
  void took(std::int32_t pages) { taken_ += pages; }
  // The index of a class whose node was used when the clock stood at `touched`.
  double index(int of, std::int64_t touched) const { return index_[of][bin(taken_ - touched)]; }

  void reused(int of, std::int64_t touched, std::int32_t pages) { uses_[of][bin(taken_ - touched)] += pages; }
  void forgotten(int of, std::int64_t touched, std::int32_t pages) { lost_[of][bin(taken_ - touched)] += pages; }
  bool request();  // one has ended; whether it is time for a census
  void waiting(int of, std::int64_t touched, std::int32_t pages) { waiting_[of][bin(taken_ - touched)] += pages; }
  void estimate();  // after a census of all that are waiting

 private:
  static constexpr int kBins = 48;
  using Counts = std::array<std::array<double, kBins>, kClasses>;

  int bin(std::int64_t age) const;
  double width(int bin) const;

  const std::int64_t num_pages_;
  std::int64_t taken_ = 0, requests_ = 0;
  Counts uses_{}, lost_{}, waiting_{}, index_{};
};

// What is remembered of pages that were evicted: the last kPerPage * num_pages of them, by a hash of their prefix.
class Ghosts {
 public:
  struct Ghost {
    std::uint64_t key;
    std::int64_t touched;
    std::int32_t uses;
    std::uint8_t of;  // class
    bool there;       // false: none
  };

  explicit Ghosts(std::int32_t num_pages);

  // Where one has to go for it, that one is returned.
  Ghost add(std::uint64_t key, std::int64_t touched, std::int32_t uses, std::uint8_t of);
  // Valid until the next change.
  const Ghost* find(std::uint64_t key) const;  // null: none
  void forget(std::uint64_t key);              // if there is one
  template <typename F>
  void for_each(F&& visit) const {
    for (std::int64_t i = 0; i < capacity_; ++i) {
      if (ring_[i].there) visit(ring_[i]);
    }
  }

 private:
  static constexpr std::int64_t kPerPage = 8;
  std::uint64_t slot_of(std::uint64_t key) const;  // its slot, or the empty one where it would be

  const std::int64_t capacity_;
  std::uint64_t mask_;
  std::int64_t next_ = 0;
  LazyArray<Ghost> ring_;
  LazyArray<std::int32_t> slots_;  // place in the ring + 1; 0: empty
};

// What the policy keeps beside the tree.
struct HazardState {
  struct Use {
    std::int64_t touched;  // when it went onto its list, by Hazard::now()
    std::int32_t uses;     // 0: by nobody yet, whose lease has ended
    std::int32_t before;   // uses of its pages before they were evicted
    std::uint8_t of;       // class
  };
  explicit HazardState(std::int32_t num_pages)
      : hazard(num_pages), ghosts(num_pages), uses(2 * static_cast<std::size_t>(num_pages) + 1), keys(num_pages) {}

  Hazard hazard;
  Ghosts ghosts;
  LazyArray<Use> uses;            // of each node
  LazyArray<std::uint64_t> keys;  // of each full page of the tree: a hash of all tokens up to its end
};

}  // namespace radixkv
