// The LRU list: unlocked nodes, coldest first, linked through the nodes themselves. Every operation is O(1).
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

  NodeId coldest() const { return coldest_; }
  void push_hottest(NodeId n) { insert(n, hottest_, kNone); }
  void insert_hotter_than(NodeId colder, NodeId n) { insert(n, colder, nodes_[colder].hotter); }
  void remove(NodeId n) {
    const auto [colder, hotter] = std::pair{nodes_[n].colder, nodes_[n].hotter};
    (colder == kNone ? coldest_ : nodes_[colder].hotter) = hotter;
    (hotter == kNone ? hottest_ : nodes_[hotter].colder) = colder;
  }

 private:
  void insert(NodeId n, NodeId colder, NodeId hotter) {
    nodes_[n].colder = colder;
    nodes_[n].hotter = hotter;
    (colder == kNone ? coldest_ : nodes_[colder].hotter) = n;
    (hotter == kNone ? hottest_ : nodes_[hotter].colder) = n;
  }

  LazyArray<Node>& nodes_;
  NodeId coldest_ = kNone, hottest_ = kNone;
};

}  // namespace radixkv
