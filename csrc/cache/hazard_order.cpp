// RadixTree's part for the "hazard" policy: what it tells the estimate, and the choice of a leaf.
#include <algorithm>

#include "cache/radix_tree.hpp"

namespace radixkv {

namespace {
std::uint64_t mixed(std::uint64_t key) {
  key = (key ^ (key >> 32)) * 0xd6e8feb86659fd93u;
  return key ^ (key >> 29);
}
}  // namespace

std::uint64_t RadixTree::key_of(NodeId parent) const {
  if (!nodes_[parent].root) return hazard_->keys[nodes_[parent].last];
  std::uint64_t key = 1;
  for (const char c : root_names_.at(parent)->first) key = mixed(key + static_cast<unsigned char>(c) + 1);
  return key;
}

// How many of the new pages, from the first on, were used equally often before they were evicted; and how often.
std::int32_t RadixTree::same_past(NodeId parent, const PageId* run, std::int32_t count, std::int32_t* uses) {
  HazardState& state = *hazard_;
  std::uint64_t key = key_of(parent);
  std::int32_t same = 0;
  for (; same < count; ++same) {
    for (const Token* t = tokens(run[same]); t < tokens(run[same]) + page_size(); ++t) key = mixed(key + *t);
    const Ghosts::Ghost* ghost = state.ghosts.find(key);
    const std::int32_t before = ghost ? ghost->uses : 0;
    if (same > 0 && before != *uses) break;
    *uses = before;
    state.keys[run[same]] = key;
    if (ghost) {
      state.hazard.reused(ghost->of, ghost->touched, 1);
      state.ghosts.forget(key);
    }
  }
  return same;
}

void RadixTree::remember(NodeId n, PageId page) {
  const HazardState::Use& use = hazard_->uses[n];
  const Ghosts::Ghost gone = hazard_->ghosts.add(hazard_->keys[page], use.touched, std::max(1, use.uses), use.of);
  if (gone.there) hazard_->hazard.forgotten(gone.of, gone.touched, 1);
}

void RadixTree::used(NodeId end, std::int64_t cached, std::int64_t total) {
  if (!hazard_) return;
  Hazard& hazard = hazard_->hazard;
  for (NodeId n = end; !nodes_[n].root; n = nodes_[n].parent) {
    HazardState::Use& use = hazard_->uses[n];
    if (use.uses > 0) hazard.reused(use.of, use.touched, nodes_[n].num_pages);
    use.uses += use.uses > 0 ? 1 : use.before + 1;
    use.of = Hazard::class_of(use.uses, n == end, cached, total, nodes_[n].children != kNone);
    use.touched = hazard.now();
  }
  if (hazard.request()) take_census();
}

void RadixTree::take_census() {
  Hazard& hazard = hazard_->hazard;
  for (int list = 0; list < LruLists::kLists; ++list) {
    for (NodeId n = lru_.coldest(list); n != kNone; n = nodes_[n].hotter) {
      const HazardState::Use& use = hazard_->uses[n];
      hazard.waiting(use.of, use.touched, nodes_[n].num_pages);
    }
  }
  hazard_->ghosts.for_each([&](const Ghosts::Ghost& ghost) { hazard.waiting(ghost.of, ghost.touched, 1); });
  hazard.estimate();
}

// The class whose coldest node has the lowest index; of equals, the node that waits longest. Whoever uses what lies below
// a node uses the node, so nothing below it is likelier to be used: a leaf there goes.
NodeId RadixTree::least_likely() const {
  NodeId best = kNone;
  double lowest = 0;
  for (int of = 0; of < Hazard::kClasses; ++of) {
    const NodeId n = lru_.coldest(LruLists::kLive + of);
    if (n == kNone) continue;
    const std::int64_t touched = hazard_->uses[n].touched;
    const double index = hazard_->hazard.index(of, touched);
    if (best == kNone || index < lowest || (index == lowest && touched < hazard_->uses[best].touched)) {
      best = n;
      lowest = index;
    }
  }
  while (best != kNone && nodes_[best].children != kNone) best = index_.any(best);
  return best;
}

}  // namespace radixkv
