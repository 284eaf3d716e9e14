// RadixTree's part for the "hazard" policy: what it tells the estimate, and the choice of a leaf.
#include <algorithm>
#include <cstdlib>

#include "cache/radix_tree.hpp"

namespace radixkv {

namespace {
std::uint64_t mixed(std::uint64_t key) {
  key = (key ^ (key >> 32)) * 0xd6e8feb86659fd93u;
  return key ^ (key >> 29);
}

// A multilinear hash: the sum of the tokens, each times a number of its own.
std::uint64_t next_key(std::uint64_t key, const Token* tokens, std::int32_t n) {
  std::uint64_t sum = key * 0x9e3779b97f4a7c15u, factor = 0xd6e8feb86659fd93u;
  for (std::int32_t i = 0; i < n; ++i, factor += 0xa0761d6478bd642eu) {
    sum += (static_cast<std::uint64_t>(tokens[i]) + 1) * factor;
  }
  return mixed(sum);
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
    key = next_key(key, tokens(run[same]), page_size());
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
  if (!hazard_) return;
  Hazard& hazard = hazard_->hazard;
  static const int spl = getenv("HZ_SPLIT") ? atoi(getenv("HZ_SPLIT")) : 0;
  if (spl && !nodes_[end].root && !nodes_[end].detached && nodes_[end].num_pages > spl) upper(end, nodes_[end].num_pages - spl);
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
  for (int list = 0; list < LruLists::kLists; ++list) {
    for (NodeId n = lru_.coldest(list); n != kNone; n = nodes_[n].hotter) {
      const HazardState::Use& use = hazard_->uses[n];
      hazard.waiting(use.of, use.touched, nodes_[n].num_pages);
    }
  }
  hazard_->ghosts.for_each([&](const Ghosts::Ghost& ghost) { hazard.waiting(ghost.of, ghost.touched, 1); });
  hazard.estimate();
}

// Of the leaves below the coldest node of each class the one with the lowest index; of equals, the one that waits
// longest.
NodeId RadixTree::least_likely() const {
  static const int mode = getenv("HZ_MODE") ? atoi(getenv("HZ_MODE")) : 0;
  NodeId best = kNone;
  double lowest = 0;
  std::int64_t oldest = 0;
  for (int of = 0; of < Hazard::kClasses; ++of) {
    NodeId n = lru_.coldest(LruLists::kLive + of);
    if (n == kNone) continue;
    if (mode == 1) while (nodes_[n].children != kNone) n = index_.any(n);
    if (mode == 2) { NodeId m = n; while (m != kNone && nodes_[m].children != kNone) m = nodes_[m].hotter; if (m == kNone) while (nodes_[n].children != kNone) n = index_.any(n); else n = m; }
    const HazardState::Use& use = hazard_->uses[n];
    const double index = hazard_->hazard.index(use.of, use.touched);
    if (best == kNone || index < lowest || (index == lowest && use.touched < oldest)) {
      best = n;
      lowest = index;
      oldest = use.touched;
    }
  }
  while (best != kNone && nodes_[best].children != kNone) best = index_.any(best);
  return best;
}

}  // namespace radixkv
