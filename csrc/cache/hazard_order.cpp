// RadixTree's part for the "hazard" policy: what it tells the estimate, and the choice of a leaf.
#include <algorithm>

#include "cache/prefix_hash.hpp"
#include "cache/radix_tree.hpp"

namespace radixkv {

// How many of the new pages, from the first on, were used equally often before they were evicted; and how often.
std::int32_t RadixTree::same_past(NodeId parent, SpaceId space, const PageId* run, std::int32_t count,
                                  std::int32_t* uses) {
  HazardState& state = *hazard_;
  std::uint64_t key = prefix_under(parent, space, nodes_[parent].root ? 0 : state.keys[nodes_[parent].last]);
  std::int32_t same = 0;
  for (; same < count; ++same) {
    key = prefix_of(key, tokens(run[same]), page_size());
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

void RadixTree::used(NodeId end, std::int64_t since, std::int64_t cached, std::int64_t total) {
  if (!hazard_ || nodes_[end].detached) return;
  Hazard& hazard = hazard_->hazard;
  // Only its last page is the end of a path.
  if (!nodes_[end].root && nodes_[end].num_pages > 1) upper(end, nodes_[end].num_pages - 1);
  for (NodeId n = end; !nodes_[n].root; n = nodes_[n].parent) {
    HazardState::Use& use = hazard_->uses[n];
    if (use.uses > 0) hazard.reused(use.of, use.touched + hazard.now() - since, nodes_[n].num_pages);
    use.uses += use.uses > 0 ? 1 : use.before + 1;
    use.of = Hazard::class_of(use.uses, n == end, cached, total, nodes_[n].children != kNone);
    use.touched = hazard.now();
  }
  if (hazard.request()) take_census();
}

void RadixTree::take_census() {
  Hazard& hazard = hazard_->hazard;
  for (NodeId n = 0; n < fresh_; ++n) {
    if (nodes_[n].num_pages == 0 || nodes_[n].locks > 0) continue;  // free, a root, or in use
    const HazardState::Use& use = hazard_->uses[n];
    hazard.waiting(use.of, use.touched, nodes_[n].num_pages);
  }
  hazard_->ghosts.for_each([&](const Ghosts::Ghost& ghost) { hazard.waiting(ghost.of, ghost.touched, 1); });
  hazard.estimate();
}

// A node that has lost its last child joins the leaves of its class where its age belongs, as far as that is found in a
// few steps from either end; what an ended session left goes on to be evicted.
void RadixTree::list_bared(NodeId n) {
  constexpr int kSteps = Hazard::kClasses;
  const std::uint16_t list = nodes_[n].list;
  NodeId cold = lru_.coldest(list), hot = lru_.hottest(list);
  if (list == LruLists::kEnded || cold == kNone) return lru_.insert_colder_than(cold, n, list);
  const auto younger = [&](NodeId other) { return hazard_->uses[other].touched >= hazard_->uses[n].touched; };
  for (int i = 0; i < kSteps && !younger(cold); ++i) {
    if (!younger(hot)) return lru_.insert_hotter_than(hot, n);
    cold = nodes_[cold].hotter;
    hot = nodes_[hot].colder;
  }
  lru_.insert_colder_than(cold, n, list);
}

// The class whose coldest leaf has the lowest index; of equals, the one that waits longest.
NodeId RadixTree::least_likely() const {
  NodeId best = kNone;
  double lowest = 0;
  for (int of = 0; of < Hazard::kClasses; ++of) {
    const NodeId n = lru_.coldest(LruLists::kLive + of);
    if (n == kNone) continue;
    const std::int64_t touched = hazard_->uses[n].touched;
    const double index = hazard_->hazard.index(of, touched);
    if (best != kNone && (index > lowest || (index == lowest && touched >= hazard_->uses[best].touched))) continue;
    best = n;
    lowest = index;
  }
  return best;
}

}  // namespace radixkv
