// LRU lists of unlocked nodes, coldest first, linked through the nodes themselves. Every operation is O(1).
//
//   0      what ended sessions left (`RadixTree::end_session`): goes before everything else
//   1 ...  everything else: one list, or with the "hazard" policy one for the leaves of each class
//   2 ...  with quotas instead: two such lists for each namespace that has one (`RadixTree::set_quota`)
//
// A path goes onto the hot end leaf first and root last, so a parent is always hotter than its children and the cold
// end is always a leaf. No clock, no heap, no set of leaves; only with several lists a parent waits for its last child to
// go before it is on one.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cache/hazard.hpp"
#include "cache/node.hpp"

namespace radixkv {

class LruLists {
 public:
  static constexpr std::uint16_t kEnded = 0, kLive = 1;
  static constexpr int kLists = kLive + Hazard::kClasses;

  explicit LruLists(LazyArray<Node>& nodes) : nodes_(nodes), ends_(kLists) {}
  // Of ended sessions; the other lists are those of live ones.
  static bool is_ended(int list) { return list == kEnded || (list >= kLists && (list - kLists) % 2 == 0); }
  int lists() const { return static_cast<int>(ends_.size()); }
  void make_lists(int count) { ends_.resize(std::max(count, lists())); }

  NodeId coldest(int list) const { return ends_[list].coldest; }
  NodeId hottest(int list) const { return ends_[list].hottest; }
  void push_hottest(NodeId n, std::uint16_t list) { insert(n, ends_[list].hottest, kNone, list); }
  void insert_hotter_than(NodeId colder, NodeId n) { insert(n, colder, nodes_[colder].hotter, nodes_[colder].list); }
  // hotter: kNone where it is to be the hottest.
  void insert_colder_than(NodeId hotter, NodeId n, std::uint16_t list) {
    insert(n, hotter == kNone ? ends_[list].hottest : nodes_[hotter].colder, hotter, list);
  }
  void remove(NodeId n) {
    Ends& ends = ends_[nodes_[n].list];
    const auto [colder, hotter] = std::pair{nodes_[n].colder, nodes_[n].hotter};
    (colder == kNone ? ends.coldest : nodes_[colder].hotter) = hotter;
    (hotter == kNone ? ends.hottest : nodes_[hotter].colder) = colder;
  }

 private:
  friend class Audit;  // recomputes all of it

  struct Ends {
    NodeId coldest = kNone, hottest = kNone;
  };

  void insert(NodeId n, NodeId colder, NodeId hotter, std::uint16_t list) {
    Ends& ends = ends_[list];
    nodes_[n].list = list;
    nodes_[n].colder = colder;
    nodes_[n].hotter = hotter;
    (colder == kNone ? ends.coldest : nodes_[colder].hotter) = n;
    (hotter == kNone ? ends.hottest : nodes_[hotter].colder) = n;
  }

  LazyArray<Node>& nodes_;
  std::vector<Ends> ends_;
};

}  // namespace radixkv
