#include "cache/radix_tree.hpp"

#include <algorithm>

namespace radixkv {

RadixTree::RadixTree(std::int32_t num_pages, std::int32_t page_size)
    : pages(num_pages, page_size), nodes(2 * static_cast<std::size_t>(num_pages) + 1), index(nodes, pages) {}

// --- roots -----------------------------------------------------------------------------------------------------------

NodeId RadixTree::find_root(std::string_view name) const {
  const auto it = roots_.find(name);
  return it == roots_.end() ? kNone : it->second;
}

NodeId RadixTree::make_root(std::string_view name) {
  if (const NodeId root = find_root(name); root != kNone) return root;
  const auto it = roots_.emplace(std::string(name), kNone).first;
  const NodeId root = free_ != kNone ? free_ : fresh_;
  try {
    root_names_.emplace(root, it);
  } catch (...) {
    roots_.erase(it);
    throw;
  }
  it->second = new_node(kNone);
  nodes[root].root = true;
  return root;
}

void RadixTree::drop_root_if_bare(NodeId root) {
  const Node& n = nodes[root];
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
  const std::int32_t page_size = pages.page_size();
  Match m{root, 0, 0};
  while (true) {
    const std::int64_t at = static_cast<std::int64_t>(m.pages) * page_size;
    const auto [child, shared] = index.find(m.node, tokens + at, n - at);
    if (child == kNone || shared < page_size) {
      if (shared > 0) m.source = child, m.source_page = nodes[child].first, m.partial = shared;
      return m;
    }
    const auto limit = static_cast<std::int32_t>(std::min<std::int64_t>(nodes[child].num_pages, (n - at) / page_size));
    const std::int32_t equal = pages.count_equal(nodes[child].first, limit, tokens + at, out ? out + m.pages : nullptr);
    m.node = child;
    m.node_pages = equal;
    m.pages += equal;
    if (equal == nodes[child].num_pages) continue;
    // The match ends inside this node's run: only its next page can hold more.
    const std::int64_t end = static_cast<std::int64_t>(m.pages) * page_size;
    PageId next = nodes[child].first;
    for (std::int32_t i = 0; i < equal; ++i) next = pages.next(next);
    const auto most = static_cast<std::int32_t>(std::min<std::int64_t>(page_size, n - end));
    m.partial = pages.common_prefix(next, tokens + end, most);
    if (m.partial > 0) m.source = child, m.source_page = next;
    return m;
  }
}

std::int64_t RadixTree::evictable_on_path(const Match& m) const {
  std::int64_t count = 0;
  for (NodeId n = m.node; !nodes[n].root && nodes[n].locks == 0; n = nodes[n].parent) {
    if (nodes[n].holds == 0) count += n == m.node ? m.node_pages : nodes[n].num_pages;
  }
  return count;
}

std::int64_t RadixTree::unpinned_on_path(const Match& m) const {
  std::int64_t count = m.partial > 0 && nodes[m.source].pins == 0;
  for (NodeId n = m.node; !nodes[n].root && nodes[n].pins == 0; n = nodes[n].parent) {
    count += n == m.node ? m.node_pages : nodes[n].num_pages;
  }
  return count;
}

// --- shape -----------------------------------------------------------------------------------------------------------

NodeId RadixTree::new_node(NodeId parent) {
  const NodeId n = free_ != kNone ? free_ : fresh_++;
  if (n == free_) free_ = nodes[n].parent;
  nodes[n] = Node{parent, kNone, kNone, 0, pages.page_size(), kNone, kNone, kNone, kNone, 0, 0, 0, false, false};
  ++num_nodes_;
  return n;
}

void RadixTree::free_node(NodeId n) {
  nodes[n].parent = free_;
  free_ = n;
  --num_nodes_;
}

NodeId RadixTree::split(NodeId n, std::int32_t k) {
  const NodeId upper = new_node(nodes[n].parent);
  Node &u = nodes[upper], &l = nodes[n];
  PageId cut = l.first;
  for (std::int32_t i = 1; i < k; ++i) cut = pages.next(cut);
  u.first = l.first;
  u.last = cut;
  u.num_pages = k;
  index.replace(n, upper);
  l.first = pages.next(cut);
  l.num_pages -= k;
  l.parent = upper;
  u.locks = l.locks > 0;
  u.pins = l.pins > 0;
  index.insert(n);
  if (u.locks == 0) lru_.insert_hotter_than(n, upper);
  return upper;
}

NodeId RadixTree::add(NodeId parent, const PageId* run, std::int32_t count, std::int32_t last_len) {
  const NodeId n = new_node(parent);
  Node& node = nodes[n];
  node.first = run[0];
  node.last = run[count - 1];
  node.num_pages = count;
  node.last_len = last_len;
  for (std::int32_t i = 1; i < count; ++i) pages.link(run[i - 1], run[i]);
  index.insert(n);
  lru_.push_hottest(n);
  evictable_ += count;
  return n;
}

bool RadixTree::can_append(NodeId n) const {
  const Node& node = nodes[n];
  return !node.root && node.locks == 1 && node.pins == 0 && node.holds == 0 && node.children == kNone;
}

void RadixTree::append(NodeId n, const PageId* run, std::int32_t count) {
  Node& node = nodes[n];
  for (std::int32_t i = 0; i < count; ++i) {
    pages.link(node.last, run[i]);
    node.last = run[i];
  }
  node.num_pages += count;
  protected_ += count;
}

void RadixTree::remove_open(NodeId open) {
  index.remove(open);
  Node& n = nodes[open];
  if (n.locks == 0) lru_.remove(open);
  if (n.locks > 0 || n.holds > 0) {
    n.detached = true;
    return;
  }
  evictable_ -= free_pages(open);
  free_node(open);
}

bool RadixTree::only_lease(NodeId open) const {
  const Node& n = nodes[open];
  return n.locks == 1 && n.pins == 0 && n.holds == 0;
}

std::int32_t RadixTree::take_back(NodeId open) {
  const Node& n = nodes[open];
  const NodeId parent = n.parent;
  const bool attached = !n.detached;
  if (attached) index.remove(open);
  protected_ -= n.num_pages;
  free_node(open);
  unlock(parent);
  return attached ? 1 : 0;
}

std::int32_t RadixTree::free_pages(NodeId n) {
  // Tail first, so that the run is handed out again in ascending order.
  PageId page = nodes[n].last;
  for (std::int32_t i = 0; i < nodes[n].num_pages; ++i) {
    const PageId prev = pages.prev(page);
    pages.give_back(page);
    page = prev;
  }
  return nodes[n].num_pages;
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
  for (; n != kNone; n = nodes[n].parent) {
    if (nodes[n].locks++ > 0) return;
    if (nodes[n].root) return;
    lru_.remove(n);
    if (nodes[n].holds == 0) protect(nodes[n]);
  }
}

void RadixTree::unlock(NodeId n) {
  while (n != kNone) {
    if (--nodes[n].locks > 0) return;
    const Node& node = nodes[n];
    const NodeId parent = node.parent;
    if (node.root) {
      drop_root_if_bare(n);
    } else if (!node.detached) {
      lru_.push_hottest(n);
      if (node.holds == 0) expose(node);
    } else if (node.holds == 0) {
      protected_ -= free_pages(n);
      free_node(n);
    }
    n = parent;
  }
}

void RadixTree::pin(NodeId n) {
  for (; n != kNone && nodes[n].pins++ == 0; n = nodes[n].parent) pinned_ += nodes[n].num_pages;
}

void RadixTree::unpin(NodeId n) {
  for (; n != kNone && --nodes[n].pins == 0; n = nodes[n].parent) pinned_ -= nodes[n].num_pages;
}

void RadixTree::hold(NodeId n) {
  if (nodes[n].holds++ == 0 && nodes[n].locks == 0) protect(nodes[n]);
}

void RadixTree::drop_hold(NodeId n) {
  const Node& node = nodes[n];
  if (--nodes[n].holds > 0 || node.locks > 0) return;
  if (!node.detached) return expose(node);
  protected_ -= free_pages(n);
  free_node(n);
}

// --- eviction --------------------------------------------------------------------------------------------------------

RadixTree::Evicted RadixTree::evict(std::int64_t count, PageId watch) {
  Evicted out{0, false};
  while (out.pages < count && lru_.coldest() != kNone) {
    const NodeId victim = lru_.coldest();
    Node& node = nodes[victim];
    const NodeId parent = node.parent;
    if (node.holds > 0) {
      index.remove(victim);
      lru_.remove(victim);
      node.detached = true;
    } else {
      const auto trim = static_cast<std::int32_t>(std::min<std::int64_t>(node.num_pages, count - out.pages));
      for (std::int32_t i = 0; i < trim; ++i) {
        const PageId page = node.last;
        node.last = pages.prev(page);
        out.watched |= page == watch;
        pages.give_back(page);
      }
      evictable_ -= trim;
      out.pages += trim;
      if (trim < node.num_pages) {
        node.num_pages -= trim;
        return out;
      }
      index.remove(victim);
      lru_.remove(victim);
      free_node(victim);
    }
    if (nodes[parent].root) drop_root_if_bare(parent);
  }
  return out;
}

std::int32_t RadixTree::clear(NodeId root) {
  std::vector<NodeId> all{root};
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (const NodeId child : index.list(all[i])) all.push_back(child);
  }
  std::int32_t freed = 0;
  for (const NodeId n : all) {
    index.clear(n);
    Node& node = nodes[n];
    if (node.root) continue;
    if (node.locks == 0) lru_.remove(n);
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
  nodes[root].detached = true;
  drop_root_if_bare(root);
  return freed;
}

}  // namespace radixkv
