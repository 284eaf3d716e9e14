// The order of eviction: two LRU lists of unlocked nodes, coldest first, linked through the nodes themselves. What ended
// sessions left (`RadixTree::end_session`) goes before everything else. Every operation is O(1).
//
// A path goes onto the hot end leaf first and root last, so a parent is always hotter than its children and the cold
// end is always a leaf. No clock, no heap, no set of leaves.
#pragma once

#include <utility>

#include "cache/node.hpp"

namespace radixkv {

class LruList {
 public:
  explicit LruList(LazyArray<Node>& nodes) : nodes_(nodes) {}

  NodeId coldest() const { return ended_.coldest != kNone ? ended_.coldest : live_.coldest; }
  // The next one to be evicted after n.
  NodeId after(NodeId n) const {
    return nodes_[n].hotter == kNone && nodes_[n].ended ? live_.coldest : nodes_[n].hotter;
  }
  void push_hottest(NodeId n) { insert(n, live_.hottest, kNone, false); }
  void push_ended(NodeId n) { insert(n, ended_.hottest, kNone, true); }
  void insert_hotter_than(NodeId colder, NodeId n) { insert(n, colder, nodes_[colder].hotter, nodes_[colder].ended); }
  void remove(NodeId n) {
    Ends& ends = nodes_[n].ended ? ended_ : live_;
    const auto [colder, hotter] = std::pair{nodes_[n].colder, nodes_[n].hotter};
    (colder == kNone ? ends.coldest : nodes_[colder].hotter) = hotter;
    (hotter == kNone ? ends.hottest : nodes_[hotter].colder) = colder;
  }

 private:
  friend class Audit;  // recomputes all of it

  struct Ends {
    NodeId coldest = kNone, hottest = kNone;
  };

  void insert(NodeId n, NodeId colder, NodeId hotter, bool ended) {
    Ends& ends = ended ? ended_ : live_;
    nodes_[n].ended = ended;
    nodes_[n].colder = colder;
    nodes_[n].hotter = hotter;
    (colder == kNone ? ends.coldest : nodes_[colder].hotter) = n;
    (hotter == kNone ? ends.hottest : nodes_[hotter].colder) = n;
  }

  LazyArray<Node>& nodes_;
  Ends ended_, live_;
};

}  // namespace radixkv
