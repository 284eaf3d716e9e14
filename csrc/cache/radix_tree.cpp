#include "cache/radix_tree.hpp"

#include <algorithm>
#include <cstring>

#include "cache/prefix_hash.hpp"

namespace radixkv {

RadixTree::RadixTree(std::int32_t num_pages, std::int32_t page_size, bool hazard)
    : pages_(num_pages, page_size), nodes_(2 * static_cast<std::size_t>(num_pages) + 1), index_(nodes_, pages_) {
  if (hazard) hazard_ = std::make_unique<HazardState>(num_pages);
}

// --- pages -----------------------------------------------------------------------------------------------------------

bool RadixTree::take(PageId* out, std::int32_t need, PageId watch) {
  bool watched = false;
  if (const std::int32_t missing = need - num_free(); missing > 0) watched = evict(missing, watch).watched;
  std::int32_t taken = 0;
  if (watched) {
    pages_.take_this(watch, need);
    out[taken++] = watch;
  }
  for (; taken < need; ++taken) out[taken] = pages_.take();
  if (hazard_) hazard_->hazard.took(need);
  return watched;
}

// --- roots -----------------------------------------------------------------------------------------------------------

NodeId RadixTree::find_root(std::string_view name) const {
  const auto it = roots_.find(name);
  return it == roots_.end() ? kNone : it->second;
}

NodeId RadixTree::make_root(std::string_view name) {
  if (const NodeId root = find_root(name); root != kNone) return root;
  if (journal_) journal_->name(free_ != kNone ? free_ : fresh_, name);
  const auto it = roots_.emplace(std::string(name), kNone).first;
  const NodeId root = free_ != kNone ? free_ : fresh_;
  try {
    root_names_.emplace(root, it);
  } catch (...) {
    roots_.erase(it);
    throw;
  }
  it->second = new_node(kNone);
  nodes_[root].root = true;
  return root;
}

void RadixTree::drop_root_if_bare(NodeId root) {
  const Node& n = nodes_[root];
  if (n.locks > 0 || n.children != kNone) return;
  if (!n.detached) {
    const auto it = root_names_.find(root);
    roots_.erase(it->second);
    root_names_.erase(it);
  }
  free_node(root);
}

// --- matching --------------------------------------------------------------------------------------------------------

Match RadixTree::match(NodeId root, const Token* tokens, std::int64_t n, PageId* out) const {
  const std::int32_t page_size = pages_.page_size();
  Match m{root, 0, 0};
  while (true) {
    const std::int64_t at = static_cast<std::int64_t>(m.pages) * page_size;
    const auto [child, shared] = index_.find(m.node, tokens + at, n - at);
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

std::int64_t RadixTree::evictable_on_path(const Match& m) const {
  std::int64_t count = 0;
  for (NodeId n = m.node; !nodes_[n].root && nodes_[n].locks == 0; n = nodes_[n].parent) {
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

RadixTree::Child RadixTree::child(NodeId n, PageId page, std::int32_t count) const {
  const auto [node, shared] = index_.find(n, tokens(page), count);
  return Child{node, shared, node != kNone && shared == index_.key_tokens(node)};
}

// --- shape -----------------------------------------------------------------------------------------------------------

NodeId RadixTree::new_node(NodeId parent) {
  const NodeId n = free_ != kNone ? free_ : fresh_++;
  if (n == free_) free_ = nodes_[n].parent;
  nodes_[n] = Node{parent, kNone, kNone, 0,    pages_.page_size(), kNone, kNone, kNone, kNone, 0, 0, 0,
                   false,  false, false, false};
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
  const NodeId upper = new_node(nodes_[n].parent);
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
  return upper;
}

NodeId RadixTree::upper(NodeId n, std::int32_t k) { return k < nodes_[n].num_pages ? split(n, k) : n; }

NodeId RadixTree::end_of(const Match& m) { return m.node_pages > 0 ? upper(m.node, m.node_pages) : m.node; }

std::int32_t RadixTree::replace_duplicates(NodeId n, PageId* run, std::int32_t count) {
  const std::int32_t most = std::min(nodes_[n].num_pages, count);
  const std::size_t bytes = page_size() * sizeof(Token);
  std::int32_t k = 0;
  for (PageId page = nodes_[n].first; k < most; ++k, page = pages_.next(page)) {
    if (std::memcmp(tokens(page), tokens(run[k]), bytes) != 0) break;
    pages_.give_back(run[k]);
    run[k] = page;
  }
  return k;
}

NodeId RadixTree::add(NodeId parent, const PageId* run, std::int32_t count, std::int32_t last_len) {
  std::int32_t uses = 0;
  if (hazard_ && last_len == page_size()) {
    // Pages with different pasts become different nodes, one below the other.
    const std::int32_t same = same_past(parent, run, count, &uses);
    if (same < count) return add(add_one(parent, run, same, last_len, uses), run + same, count - same, last_len);
  }
  return add_one(parent, run, count, last_len, uses);
}

NodeId RadixTree::add_one(NodeId parent, const PageId* run, std::int32_t count, std::int32_t last_len,
                          std::int32_t uses) {
  const NodeId n = new_node(parent);
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
  evictable_ += count;
  if (journal_ && last_len == page_size()) record_run(parent, nodes_[parent].last, run, count);
  if (what_if_ && last_len == page_size()) remember_prefixes(parent, nodes_[parent].last, run, count);
  return n;
}

bool RadixTree::can_append(NodeId n) const {
  const Node& node = nodes_[n];
  return !hazard_ && !node.root && node.locks == 1 && node.pins == 0 && node.holds == 0 && node.children == kNone &&
         !node.branched;
}

void RadixTree::append(NodeId n, const PageId* run, std::int32_t count) {
  Node& node = nodes_[n];
  if (journal_) record_run(n, node.last, run, count);
  if (what_if_) remember_prefixes(n, node.last, run, count);
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
  evictable_ -= free_pages(open);
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
  return nodes_[n].num_pages;
}

// --- locks, pins and holds -------------------------------------------------------------------------------------------

void RadixTree::protect(const Node& n) {
  evictable_ -= n.num_pages;
  protected_ += n.num_pages;
}

void RadixTree::expose(const Node& n) {
  protected_ -= n.num_pages;
  evictable_ += n.num_pages;
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

void RadixTree::end_session(NodeId end) {
  NodeId below = kNone;
  for (NodeId n = end; !nodes_[n].root && nodes_[n].locks == 0 && !nodes_[n].branched; n = nodes_[n].parent) {
    if (nodes_[n].children != kNone && below == kNone) return;  // somebody went on from here
    const bool on = listed(nodes_[n]);
    if (on) lru_.remove(n);
    nodes_[n].list = LruLists::kEnded;
    if (on) lru_.push_hottest(n, LruLists::kEnded);
    below = n;
  }
}

void RadixTree::expose_to_eviction(NodeId n) {
  nodes_[n].list = LruLists::kLive;
  if (hazard_) {
    HazardState::Use& use = hazard_->uses[n];
    use.touched = hazard_->hazard.now();
    nodes_[n].list += use.of;
  }
  if (listed(nodes_[n])) lru_.push_hottest(n, nodes_[n].list);
}

// --- eviction --------------------------------------------------------------------------------------------------------

NodeId RadixTree::victim() const {
  if (const NodeId ended = lru_.coldest(LruLists::kEnded); ended != kNone) return ended;
  return hazard_ ? least_likely() : lru_.coldest(LruLists::kLive);
}

RadixTree::Evicted RadixTree::evict(std::int64_t count, PageId watch) {
  Evicted out{0, false};
  for (NodeId victim; out.pages < count && (victim = this->victim()) != kNone;) {
    Node& node = nodes_[victim];
    const NodeId parent = node.parent;
    if (node.holds > 0) {
      if (journal_) record_removed(node);
      if (what_if_ && node.last_len == page_size()) what_if_->evicted(node.last);
      index_.remove(victim);
      lru_.remove(victim);
      node.detached = true;
    } else {
      const auto trim = static_cast<std::int32_t>(std::min<std::int64_t>(node.num_pages, count - out.pages));
      const bool whole = node.last_len == page_size(), recorded = journal_ && whole;
      for (std::int32_t i = 0; i < trim; ++i) {
        const PageId page = node.last;
        node.last = pages_.prev(page);
        out.watched |= page == watch;
        if (recorded) journal_->removed(page);
        if (hazard_ && whole) remember(victim, page);
        if (what_if_ && whole) what_if_->evicted(page);
        pages_.give_back(page);
      }
      evictable_ -= trim;
      num_evicted_ += trim;
      out.pages += trim;
      if (trim < node.num_pages) {
        node.num_pages -= trim;
        return out;
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
  return out;
}

std::int32_t RadixTree::clear(NodeId root) {
  std::vector<NodeId> all{root};
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (const NodeId child : index_.list(all[i])) all.push_back(child);
  }
  if (journal_) {
    for (auto n = all.rbegin(); n != all.rend(); ++n) record_removed(nodes_[*n]);  // children first
  }
  if (what_if_) what_if_->forget();  // no pool would have kept it
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
    evictable_ -= node.num_pages;
    freed += free_pages(n);
    free_node(n);
  }
  const auto it = root_names_.find(root);
  roots_.erase(it->second);
  root_names_.erase(it);
  nodes_[root].detached = true;
  drop_root_if_bare(root);
  return freed;
}

// --- the journal -----------------------------------------------------------------------------------------------------

// A run of full pages under `parent`, after the page `before` (kNone under a root).
void RadixTree::record_run(NodeId parent, PageId before, const PageId* run, std::int32_t count) {
  const NodeId root = nodes_[parent].root ? parent : kNone;  // below, a page is of its parent's namespace
  for (std::int32_t i = 0; i < count; ++i) {
    journal_->stored(run[i], i > 0 ? run[i - 1] : before, i > 0 ? kNone : root, tokens(run[i]));
  }
}

// All pages of a node, last first; an open page never was recorded.
void RadixTree::record_removed(const Node& n) {
  if (n.last_len < page_size()) return;
  PageId page = n.last;
  for (std::int32_t i = 0; i < n.num_pages; ++i, page = pages_.prev(page)) journal_->removed(page);
}

Journal& RadixTree::start_journal() {
  if (!journal_) {
    auto journal = std::make_unique<Journal>(num_pages(), page_size());
    record_all(*journal);
    journal_ = std::move(journal);
  }
  return *journal_;
}

JournalBatch RadixTree::dump() const {
  Journal all(num_pages(), page_size());
  record_all(all);
  return all.read(0, all.end());
}

void RadixTree::record_all(Journal& journal) const {
  std::vector<NodeId> open;
  for (const auto& [name, root] : roots_) {
    journal.name(root, name);
    open.push_back(root);
  }
  while (!open.empty()) {
    const NodeId n = open.back();
    open.pop_back();
    for (const NodeId child : index_.list(n)) open.push_back(child);
    const Node& node = nodes_[n];
    if (node.root || node.last_len < page_size()) continue;
    const NodeId root = nodes_[node.parent].root ? node.parent : kNone;
    PageId before = nodes_[node.parent].last, page = node.first;
    for (std::int32_t i = 0; i < node.num_pages; ++i, before = page, page = pages_.next(page)) {
      journal.stored(page, before, before == kNone ? root : kNone, tokens(page));
    }
  }
}

// --- what if ---------------------------------------------------------------------------------------------------------

void RadixTree::remember_prefixes(NodeId parent, PageId before, const PageId* run, std::int32_t count) {
  std::uint64_t prefix = nodes_[parent].root ? prefix_of(root_names_.at(parent)->first) : what_if_->prefix(before);
  for (std::int32_t i = 0; i < count; ++i) {
    prefix = prefix_of(prefix, tokens(run[i]), page_size());
    what_if_->stored(run[i], prefix);
  }
}

WhatIf& RadixTree::start_what_if() {
  if (what_if_) return *what_if_;
  what_if_ = std::make_unique<WhatIf>(num_pages(), page_size());
  std::vector<NodeId> open;
  for (const auto& [name, root] : roots_) open.push_back(root);
  while (!open.empty()) {
    const NodeId n = open.back();
    open.pop_back();
    for (const NodeId child : index_.list(n)) open.push_back(child);
    if (nodes_[n].root || nodes_[n].last_len < page_size()) continue;
    PageId before = nodes_[nodes_[n].parent].last, page = nodes_[n].first;
    NodeId above = nodes_[n].parent;
    for (std::int32_t i = 0; i < nodes_[n].num_pages; ++i, above = n, before = page, page = pages_.next(page)) {
      remember_prefixes(above, before, &page, 1);
    }
  }
  return *what_if_;
}

void RadixTree::count_what_if(std::string_view name, const PageId* pages, std::int32_t matched, const Token* tokens,
                              std::int64_t n, std::int64_t hit) {
  what_if_->request(n, hit);
  std::uint64_t prefix = matched > 0 ? what_if_->prefix(pages[matched - 1]) : prefix_of(name);
  for (std::int64_t i = matched; i < (n - 1) / page_size(); ++i) {
    prefix = prefix_of(prefix, tokens + i * page_size(), page_size());
    if (!what_if_->missed(prefix)) return;
  }
}

}  // namespace radixkv
