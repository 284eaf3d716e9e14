#include "cache/radix_tree.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace radixkv {

RadixTree::RadixTree(std::int32_t num_pages, std::int32_t page_size, bool hazard, bool hierarchical)
    : pages_(num_pages, page_size),
      spaces_(hierarchical),
      nodes_(2 * static_cast<std::size_t>(num_pages) + 1),
      index_(nodes_, pages_) {
  if (hazard) hazard_ = std::make_unique<HazardState>(num_pages);
}

// --- pages -----------------------------------------------------------------------------------------------------------

bool RadixTree::take(SpaceId space, PageId* out, std::int32_t need, PageId watch) {
  Evicted evicted{0, false};
  const auto evict_more = [&](std::int64_t count, From from) {
    const Evicted more = evict(count, space, from, watch);
    evicted = {evicted.pages + more.pages, evicted.watched || more.watched};
  };
  if (const Space& own = spaces_.top(space); own.used > own.ceiling - need) {  // its own go first
    evict_more(own.used + need - own.ceiling, From::itself);
  }
  if (const std::int32_t missing = need - num_free(); missing > 0) evict_more(missing, From::everybody);
  std::int32_t taken = 0;
  if (evicted.watched) {
    pages_.take_this(watch, evicted.pages);
    out[taken++] = watch;
  }
  for (; taken < need; ++taken) out[taken] = pages_.take();
  spaces_.took(space, need);
  if (hazard_) hazard_->hazard.took(need);
  return evicted.watched;
}

void RadixTree::give_back(SpaceId space, const PageId* pages, std::int32_t count) {
  for (std::int32_t i = count; i-- > 0;) pages_.give_back(pages[i]);
  spaces_.gave_back(space, count);
}

// --- roots -----------------------------------------------------------------------------------------------------------

SpaceId RadixTree::make_space(std::string_view name, SpaceId nearest) {
  const SpaceId s = nearest != kNone && spaces_.name(nearest) == name ? nearest : spaces_.make(name);
  if (journal_ && spaces_[s].pages == 0 && spaces_[s].leases == 0) journal_->name(s, name);
  return s;
}

NodeId RadixTree::make_root(SpaceId space) {
  const SpaceId top = spaces_[space].top;
  if (const NodeId root = spaces_[top].root; root != kNone) return root;
  const NodeId root = new_node(kNone, top);
  nodes_[root].root = true;
  spaces_.set_root(top, root);
  ++num_roots_;
  return root;
}

void RadixTree::drop_root_if_bare(NodeId root) {
  const Node& n = nodes_[root];
  if (n.locks > 0 || n.children != kNone) return;
  if (!n.detached) {
    spaces_.set_root(n.space, kNone);
    --num_roots_;
  }
  free_node(root);
}

// --- matching --------------------------------------------------------------------------------------------------------

int RadixTree::chain_of(SpaceId space, Chain& chain) const {
  int levels = 0;
  for (SpaceId s = space; s != kNone; s = spaces_[s].parent) ++levels;
  for (int i = levels; space != kNone; space = spaces_[space].parent) chain[--i] = space;
  return levels;
}

Match RadixTree::match(SpaceId space, const Token* tokens, std::int64_t n, PageId* out) const {
  const Match start{root(space), 0, 0};
  if (start.node == kNone) return start;
  Chain chain{space};
  if (spaces_[space].parent == kNone) return walk(start, chain, 0, 1, tokens, n, out, nullptr);
  const int levels = chain_of(space, chain);
  // Every path that it sees, those that stay longest in the upper namespaces first: of equally long ones they are shared
  // by more.
  std::vector<Turn> turns{{start, 0}};
  Match best = start;
  while (!turns.empty()) {
    const Turn turn = turns.back();
    turns.pop_back();
    const Match m = walk(turn.at, chain, turn.level, levels, tokens, n, nullptr, &turns);
    if (m.tokens(page_size()) > best.tokens(page_size())) best = m;
  }
  if (out) list_path(best, out);
  return best;
}

// Goes on from the end of node m.node, in the namespace chain[level]; notes where nodes of a lower one go on.
Match RadixTree::walk(Match m, const Chain& chain, int level, int levels, const Token* tokens, std::int64_t n,
                      PageId* out, std::vector<Turn>* turns) const {
  const std::int32_t page_size = pages_.page_size();
  while (true) {
    const std::int64_t at = static_cast<std::int64_t>(m.pages) * page_size;
    for (int lower = levels; turns && --lower > level;) {
      if (index_.find(m.node, chain[lower], tokens + at, n - at).shared > 0) turns->push_back({m, lower});
    }
    const auto [child, shared] = index_.find(m.node, chain[level], tokens + at, n - at);
    if (child == kNone || shared < page_size) {
      if (shared > 0) m.source = child, m.source_page = nodes_[child].first, m.partial = shared;
      return m;
    }
    const auto limit = static_cast<std::int32_t>(std::min<std::int64_t>(nodes_[child].num_pages, (n - at) / page_size));
    const std::int32_t equal =
        pages_.count_equal(nodes_[child].first, limit, tokens + at, out ? out + m.pages : nullptr);
    m.node = child;
    m.node_pages = equal;
    m.pages += equal;
    if (equal == nodes_[child].num_pages) continue;
    // The match ends inside this node's run: only its next page can hold more.
    const std::int64_t end = static_cast<std::int64_t>(m.pages) * page_size;
    PageId next = nodes_[child].first;
    for (std::int32_t i = 0; i < equal; ++i) next = pages_.next(next);
    const auto most = static_cast<std::int32_t>(std::min<std::int64_t>(page_size, n - end));
    m.partial = pages_.common_prefix(next, tokens + end, most);
    if (m.partial > 0) m.source = child, m.source_page = next;
    return m;
  }
}

// The full pages of a match, from the first on.
void RadixTree::list_path(const Match& m, PageId* out) const {
  PageId* end = out + m.pages;
  for (NodeId n = m.node; !nodes_[n].root; n = nodes_[n].parent) {
    const std::int32_t count = n == m.node ? m.node_pages : nodes_[n].num_pages;
    end -= count;
    PageId page = nodes_[n].first;
    for (std::int32_t i = 0; i < count; ++i, page = pages_.next(page)) end[i] = page;
  }
}

std::int64_t RadixTree::evictable_on_path(const Match& m) const {
  std::int64_t count = 0;
  for (NodeId n = m.node; n != kNone && !nodes_[n].root && nodes_[n].locks == 0; n = nodes_[n].parent) {
    if (nodes_[n].holds == 0) count += n == m.node ? m.node_pages : nodes_[n].num_pages;
  }
  return count;
}

std::int64_t RadixTree::unpinned_on_path(const Match& m) const {
  std::int64_t count = m.partial > 0 && nodes_[m.source].pins == 0;
  for (NodeId n = m.node; !nodes_[n].root && nodes_[n].pins == 0; n = nodes_[n].parent) {
    count += n == m.node ? m.node_pages : nodes_[n].num_pages;
  }
  return count;
}

RadixTree::Child RadixTree::own_child(NodeId n, SpaceId space, PageId page, std::int32_t count) const {
  const auto [node, shared] = index_.find(n, space, tokens(page), count);
  return Child{node, shared, node != kNone && shared == index_.key_tokens(node)};
}

RadixTree::Child RadixTree::seen_child(NodeId n, SpaceId space, PageId page, std::int32_t count) const {
  Child best = own_child(n, space, page, count);
  while (space != nodes_[n].space) {  // those above that have children here
    space = spaces_[space].parent;
    if (const Child child = own_child(n, space, page, count); child.shared >= best.shared) best = child;
  }
  return best;
}

// --- shape -----------------------------------------------------------------------------------------------------------

NodeId RadixTree::new_node(NodeId parent, SpaceId space) {
  const NodeId n = free_ != kNone ? free_ : fresh_++;
  if (n == free_) free_ = nodes_[n].parent;
  nodes_[n] = Node{parent, space, kNone, kNone, 0, pages_.page_size(), kNone, kNone, kNone, kNone};
  ++num_nodes_;
  return n;
}

void RadixTree::free_node(NodeId n) {
  nodes_[n].parent = free_;
  nodes_[n].num_pages = 0;
  free_ = n;
  --num_nodes_;
}

NodeId RadixTree::split(NodeId n, std::int32_t k) {
  const NodeId upper = new_node(nodes_[n].parent, nodes_[n].space);
  Node &u = nodes_[upper], &l = nodes_[n];
  PageId cut = l.first;
  for (std::int32_t i = 1; i < k; ++i) cut = pages_.next(cut);
  u.first = l.first;
  u.last = cut;
  u.num_pages = k;
  index_.replace(n, upper);
  l.first = pages_.next(cut);
  l.num_pages -= k;
  l.parent = upper;
  u.locks = l.locks > 0;
  u.pins = l.pins > 0;
  u.branched = l.branched;
  if (hazard_) hazard_->uses[upper] = hazard_->uses[n];
  index_.insert(n);
  u.list = l.list;
  if (listed(u)) lru_.insert_hotter_than(n, upper);
  if (stamps_) (*stamps_)[upper] = (*stamps_)[n];
  return upper;
}

NodeId RadixTree::upper(NodeId n, std::int32_t k) { return k < nodes_[n].num_pages ? split(n, k) : n; }

NodeId RadixTree::end_of(const Match& m) { return m.node_pages > 0 ? upper(m.node, m.node_pages) : m.node; }

std::int32_t RadixTree::replace_duplicates(NodeId n, SpaceId space, PageId* run, std::int32_t count) {
  const std::int32_t most = std::min(nodes_[n].num_pages, count);
  const std::size_t bytes = page_size() * sizeof(Token);
  std::int32_t k = 0;
  for (PageId page = nodes_[n].first; k < most; ++k, page = pages_.next(page)) {
    if (std::memcmp(tokens(page), tokens(run[k]), bytes) != 0) break;
    give_back(space, &run[k], 1);
    run[k] = page;
  }
  return k;
}

NodeId RadixTree::add(NodeId parent, SpaceId space, const PageId* run, std::int32_t count, std::int32_t last_len) {
  std::int32_t uses = 0;
  if (hazard_ && last_len == page_size()) {
    // Pages with different pasts become different nodes, one below the other.
    const std::int32_t same = same_past(parent, space, run, count, &uses);
    if (same < count) {
      const NodeId first = add_one(parent, space, run, same, last_len, uses);
      return add(first, space, run + same, count - same, last_len);
    }
  }
  return add_one(parent, space, run, count, last_len, uses);
}

NodeId RadixTree::add_one(NodeId parent, SpaceId space, const PageId* run, std::int32_t count, std::int32_t last_len,
                          std::int32_t uses) {
  const NodeId n = new_node(parent, space);
  Node& node = nodes_[n];
  node.first = run[0];
  node.last = run[count - 1];
  node.num_pages = count;
  node.last_len = last_len;
  for (std::int32_t i = 1; i < count; ++i) pages_.link(run[i - 1], run[i]);
  if (hazard_ && listed(nodes_[parent])) lru_.remove(parent);
  index_.insert(n);
  note_branch(parent);
  if (hazard_) hazard_->uses[n] = {hazard_->hazard.now(), 0, uses, 0};
  expose_to_eviction(n);
  count_evictable(node, count);
  if (journal_ && last_len == page_size()) record_run(parent, space, nodes_[parent].last, run, count);
  if (what_if_ && last_len == page_size()) remember_prefixes(parent, space, nodes_[parent].last, run, count);
  return n;
}

bool RadixTree::can_append(NodeId n, SpaceId space) const {
  const Node& node = nodes_[n];
  return !hazard_ && !node.root && node.space == space && node.locks == 1 && node.pins == 0 && node.holds == 0 &&
         node.children == kNone && !node.branched;
}

void RadixTree::append(NodeId n, const PageId* run, std::int32_t count) {
  Node& node = nodes_[n];
  if (journal_) record_run(n, node.space, node.last, run, count);
  if (what_if_) remember_prefixes(n, node.space, node.last, run, count);
  pages_.link(node.last, run[0]);
  for (std::int32_t i = 1; i < count; ++i) pages_.link(run[i - 1], run[i]);
  node.last = run[count - 1];
  node.num_pages += count;
  protected_ += count;
}

void RadixTree::remove_open(NodeId open) {
  Node& n = nodes_[open];
  if (listed(n)) lru_.remove(open);
  index_.remove(open);
  if (n.locks > 0 || n.holds > 0) {
    n.detached = true;
    return;
  }
  count_evictable(n, -n.num_pages);
  free_pages(open);
  free_node(open);
}

bool RadixTree::only_lease(NodeId open) const {
  const Node& n = nodes_[open];
  return n.locks == 1 && n.pins == 0 && n.holds == 0;
}

void RadixTree::take_back(NodeId open) {
  const Node& n = nodes_[open];
  const NodeId parent = n.parent;
  if (!n.detached) {
    index_.remove(open);
    ++num_evicted_;
  }
  protected_ -= n.num_pages;
  free_node(open);
  unlock(parent);
}

std::int32_t RadixTree::free_pages(NodeId n) {
  // Tail first, so that the run is handed out again in ascending order.
  PageId page = nodes_[n].last;
  for (std::int32_t i = 0; i < nodes_[n].num_pages; ++i) {
    const PageId prev = pages_.prev(page);
    pages_.give_back(page);
    page = prev;
  }
  spaces_.gave_back(nodes_[n].space, nodes_[n].num_pages);
  return nodes_[n].num_pages;
}

// --- locks, pins and holds -------------------------------------------------------------------------------------------

void RadixTree::protect(const Node& n) {
  count_evictable(n, -n.num_pages);
  protected_ += n.num_pages;
}

void RadixTree::expose(const Node& n) {
  protected_ -= n.num_pages;
  count_evictable(n, n.num_pages);
}

void RadixTree::lock(NodeId n) {
  for (; n != kNone; n = nodes_[n].parent) {
    if (listed(nodes_[n])) lru_.remove(n);
    if (nodes_[n].locks++ > 0) return;
    if (nodes_[n].root) return;
    if (nodes_[n].holds == 0) protect(nodes_[n]);
  }
}

void RadixTree::unlock(NodeId n) {
  while (n != kNone) {
    if (--nodes_[n].locks > 0) return;
    const Node& node = nodes_[n];
    const NodeId parent = node.parent;
    if (node.root) {
      drop_root_if_bare(n);
    } else if (!node.detached) {
      expose_to_eviction(n);
      if (node.holds == 0) expose(node);
    } else if (node.holds == 0) {
      protected_ -= free_pages(n);
      free_node(n);
    }
    n = parent;
  }
}

void RadixTree::pin(NodeId n) {
  for (; n != kNone && nodes_[n].pins++ == 0; n = nodes_[n].parent) pinned_ += nodes_[n].num_pages;
}

void RadixTree::unpin(NodeId n) {
  for (; n != kNone && --nodes_[n].pins == 0; n = nodes_[n].parent) pinned_ -= nodes_[n].num_pages;
}

void RadixTree::hold(NodeId n) {
  if (nodes_[n].holds++ == 0 && nodes_[n].locks == 0) protect(nodes_[n]);
}

void RadixTree::drop_hold(NodeId n) {
  const Node& node = nodes_[n];
  if (--nodes_[n].holds > 0 || node.locks > 0) return;
  if (!node.detached) return expose(node);
  protected_ -= free_pages(n);
  free_node(n);
}

// A node that got its second child is no session's own, and neither is what lies above it. Each node is marked once.
void RadixTree::note_branch(NodeId parent) {
  if (!index_.branches(parent)) return;
  for (NodeId n = parent; n != kNone && !nodes_[n].branched; n = nodes_[n].parent) nodes_[n].branched = true;
}

void RadixTree::end_session(NodeId end, SpaceId space) {
  NodeId below = kNone;
  const auto is_its_own = [&](const Node& n) { return !n.root && n.space == space && n.locks == 0 && !n.branched; };
  const auto ended = static_cast<std::uint16_t>(spaces_.top(space).lists + LruLists::kEnded);
  for (NodeId n = end; is_its_own(nodes_[n]); n = nodes_[n].parent) {
    if (nodes_[n].children != kNone && below == kNone) return;  // somebody went on from here
    const bool on = listed(nodes_[n]);
    if (on) lru_.remove(n);
    nodes_[n].list = ended;
    if (on) push_hottest(n, ended);
    below = n;
  }
}

void RadixTree::expose_to_eviction(NodeId n) {
  nodes_[n].list = static_cast<std::uint16_t>(spaces_.top(nodes_[n].space).lists + LruLists::kLive);
  if (hazard_) {
    HazardState::Use& use = hazard_->uses[n];
    use.touched = hazard_->hazard.now();
    nodes_[n].list += use.of;
  }
  if (listed(nodes_[n])) push_hottest(n, nodes_[n].list);
}

void RadixTree::push_hottest(NodeId n, std::uint16_t list) {
  lru_.push_hottest(n, list);
  if (stamps_) (*stamps_)[n] = ++now_;
}

// --- eviction --------------------------------------------------------------------------------------------------------

NodeId RadixTree::victim(SpaceId space, From from) const {
  if (!spaces_.quotas().empty()) return coldest_allowed(space, from);
  if (const NodeId ended = lru_.coldest(LruLists::kEnded); ended != kNone) return ended;
  return hazard_ ? least_likely() : lru_.coldest(LruLists::kLive);
}

RadixTree::Evicted RadixTree::evict(std::int64_t count, SpaceId space, From from, PageId watch) {
  Evicted out{0, false};
  const bool quotas = !spaces_.quotas().empty();
  // What was evicted is counted once for each run of victims of a namespace; with quotas at once, for the next choice.
  SpaceId counted = kNone;
  std::int32_t uncounted = 0;
  for (NodeId victim; out.pages < count && (victim = this->victim(space, from)) != kNone;) {
    Node& node = nodes_[victim];
    const NodeId parent = node.parent;
    if (node.holds > 0) {
      leave_to_holders(victim);
    } else {
      const std::int64_t most = quotas ? most_from(node, space) : node.num_pages;
      const auto trim = static_cast<std::int32_t>(std::min(most, count - out.pages));
      out.watched |= free_end(victim, trim, watch);
      out.pages += trim;
      if (node.space != counted) {
        count_evicted(counted, uncounted);
        counted = node.space;
        uncounted = 0;
      }
      uncounted += trim;
      if (quotas) count_evicted(counted, std::exchange(uncounted, 0));
      if (trim < node.num_pages) {
        node.num_pages -= trim;
        continue;
      }
      index_.remove(victim);
      lru_.remove(victim);
      free_node(victim);
    }
    if (nodes_[parent].root) {
      drop_root_if_bare(parent);
    } else if (hazard_ && listed(nodes_[parent])) {
      list_bared(parent);
    }
  }
  count_evicted(counted, uncounted);
  return out;
}

void RadixTree::leave_to_holders(NodeId n) {
  Node& node = nodes_[n];
  if (journal_) record_removed(node);
  if (what_if_ && node.last_len == page_size()) what_if_->evicted(node.last);
  index_.remove(n);
  lru_.remove(n);
  node.detached = true;
}

// Frees the last pages of a node, which still counts them. True where `watch` is among them.
bool RadixTree::free_end(NodeId n, std::int32_t count, PageId watch) {
  if (journal_ || hazard_ || what_if_) note_evicted(n, count);
  PageId page = nodes_[n].last;
  bool watched = false;
  for (std::int32_t i = 0; i < count; ++i) {
    const PageId before = pages_.prev(page);
    watched |= page == watch;
    pages_.give_back(page);
    page = before;
  }
  nodes_[n].last = page;
  return watched;
}

void RadixTree::count_evicted(SpaceId space, std::int32_t pages) {
  if (pages == 0) return;
  num_evicted_ += pages;
  evictable_ -= pages;
  spaces_.exposed(space, -pages);
  spaces_.gave_back(space, pages);
}

// The nodes of a namespace and of those below it, parents before children; of a top one with its root, which comes first.
std::vector<NodeId> RadixTree::cleared_by(SpaceId space) {
  std::vector<NodeId> all, open{root(space)};
  while (!open.empty()) {
    const NodeId n = open.back();
    open.pop_back();
    for (const NodeId child : index_.list(n)) open.push_back(child);
    if (spaces_.within(nodes_[n].space, space)) all.push_back(n);
  }
  return all;
}

std::int32_t RadixTree::clear(SpaceId space) {
  const NodeId root = this->root(space);
  const std::vector<NodeId> all = cleared_by(space);
  if (journal_) {
    for (auto n = all.rbegin(); n != all.rend(); ++n) record_removed(nodes_[*n]);  // children first
  }
  if (what_if_) what_if_->forget();  // no pool would have kept it
  for (const NodeId n : all) {
    const NodeId parent = nodes_[n].parent;
    if (parent == kNone || spaces_.within(nodes_[parent].space, space)) continue;
    index_.remove(n);
    if (hazard_ && listed(nodes_[parent])) list_bared(parent);
  }
  std::int32_t freed = 0;
  for (const NodeId n : all) {
    Node& node = nodes_[n];
    if (listed(node)) lru_.remove(n);
    index_.clear(n);
    if (node.root) continue;
    if (node.locks > 0 || node.holds > 0) {
      node.detached = true;
      continue;
    }
    count_evictable(node, -node.num_pages);
    freed += free_pages(n);
    free_node(n);
  }
  if (nodes_[root].space == space) {
    nodes_[root].detached = true;
    spaces_.set_root(space, kNone);
    --num_roots_;
  }
  drop_root_if_bare(root);
  return freed;
}

}  // namespace radixkv
