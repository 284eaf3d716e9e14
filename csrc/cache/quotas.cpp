// RadixTree's part for quotas: what a namespace may have and evict, and LRU lists of its own for each that has one.
//
// A namespace with a quota has two lists, as the common ones: what ended sessions left, and the rest. Within each the order
// is that of the uses, as ever; across lists the stamps of their coldest nodes tell which was used longer ago. Whole
// paths are of one top namespace, so the coldest node of a list is a leaf.
#include <algorithm>

#include "cache/radix_tree.hpp"

namespace radixkv {

Room RadixTree::room(SpaceId space, std::int64_t lost) const {
  Room room{num_free(), evictable_ - lost};
  if (spaces_.quotas().empty()) return room;
  const SpaceId top = space == kNone ? kNone : spaces_[space].top;
  for (const SpaceId s : spaces_.quotas()) {
    if (s != top) room.evictable -= Spaces::shielded(spaces_[s]);
  }
  if (top == kNone || spaces_[top].ceiling == Space::kNoCeiling) return room;
  const std::int64_t left = spaces_[top].ceiling - spaces_[top].used;
  const std::int64_t all = std::clamp<std::int64_t>(left + spaces_[top].evictable - lost, 0, room.all());
  room.free = std::clamp<std::int64_t>(left, 0, std::min(room.free, all));
  room.evictable = all - room.free;
  return room;
}

bool RadixTree::may_evict(SpaceId space, From from, SpaceId quota) const {
  const bool own = space != kNone && quota == spaces_[space].top;
  if (from == From::itself) return own;
  return own || space == kNone || spaces_[quota].used > spaces_[quota].floor;
}

// Pages of a node that may be evicted that one may evict: down to the floor of another namespace.
std::int64_t RadixTree::most_from(const Node& n, SpaceId space) const {
  if (space == kNone || spaces_[n.space].top == spaces_[space].top) return n.num_pages;
  const Space& other = spaces_.top(n.space);
  return std::min<std::int64_t>(n.num_pages, other.used - other.floor);
}

NodeId RadixTree::coldest_allowed(SpaceId space, From from) const {
  for (const int kind : {LruLists::kEnded, LruLists::kLive}) {
    NodeId best = from == From::itself ? kNone : lru_.coldest(kind);
    for (const SpaceId quota : spaces_.quotas()) {
      const NodeId n = lru_.coldest(spaces_[quota].lists + kind);
      if (n == kNone || !may_evict(space, from, quota)) continue;
      if (best == kNone || (*stamps_)[n] < (*stamps_)[best]) best = n;
    }
    if (best != kNone) return best;
  }
  return kNone;
}

void RadixTree::set_quota(SpaceId top, std::int64_t floor, std::int64_t ceiling) {
  const bool wanted = floor > 0 || ceiling != Space::kNoCeiling;
  if (wanted && spaces_[top].lists == 0) {
    begin_stamps();
    int lists = LruLists::kLists;  // the first pair that nobody has
    const auto taken = [&](SpaceId s) { return spaces_[s].lists == lists; };
    while (std::any_of(spaces_.quotas().begin(), spaces_.quotas().end(), taken)) lists += 2;
    lru_.make_lists(lists + 2);
    spaces_.add_quota(top, lists);
    move_lists(top, 0, lists);
  }
  spaces_[top].floor = floor;
  spaces_[top].ceiling = ceiling;
  if (wanted) return;
  move_lists(top, spaces_[top].lists, 0);
  spaces_.remove_quota(top);
}

// Everything of this namespace that is on two lists goes onto two others, where its stamps belong.
void RadixTree::move_lists(SpaceId top, int from, int to) {
  for (const int kind : {LruLists::kEnded, LruLists::kLive}) {
    NodeId hotter = lru_.coldest(to + kind);
    for (NodeId n = lru_.coldest(from + kind), next; n != kNone; n = next) {
      next = nodes_[n].hotter;
      if (spaces_[nodes_[n].space].top != top) continue;
      lru_.remove(n);
      while (hotter != kNone && (*stamps_)[hotter] < (*stamps_)[n]) hotter = nodes_[hotter].hotter;
      lru_.insert_colder_than(hotter, n, static_cast<std::uint16_t>(to + kind));
    }
  }
}

// From the first quota on nodes are stamped when they come onto a list; those that are there are now, in their order.
void RadixTree::begin_stamps() {
  if (stamps_) return;
  stamps_ = std::make_unique<LazyArray<std::int64_t>>(2 * static_cast<std::size_t>(num_pages()) + 1);
  for (const int kind : {LruLists::kEnded, LruLists::kLive}) {
    for (NodeId n = lru_.coldest(kind); n != kNone; n = nodes_[n].hotter) (*stamps_)[n] = ++now_;
  }
}

}  // namespace radixkv
