// Cache::check(): recomputes every count, link and state from scratch and compares. O(pages + nodes + leases).
#include <set>
#include <stdexcept>
#include <unordered_map>

#include "cache/cache.hpp"

namespace radixkv {

namespace {
void expect(bool ok, const char* what) {
  if (!ok) throw std::logic_error(what);
}
}  // namespace

// Walks what is reachable and counts it; compares at the end.
class Audit {
 public:
  explicit Audit(const RadixTree& tree) : tree_(tree), owned_(tree.num_pages(), 0) {}

  void own(PageId page) {
    expect(page >= 0 && page < tree_.pages_.num_pages(), "a page id is out of range");
    expect(owned_[page]++ == 0, "a page has two owners");
  }

  void free_pages() {
    std::int64_t count = 0;
    tree_.pages_.for_each_free([&](PageId page) { own(page), ++count; });
    expect(count == tree_.pages_.num_free(), "the free list and num_free disagree");
  }

  void lru() {
    for (int list = 0; list < tree_.lru_.lists(); ++list) {
      NodeId before = kNone;
      for (NodeId n = tree_.lru_.coldest(list); n != kNone; before = n, n = tree_.nodes_[n].hotter) {
        expect(tree_.nodes_[n].colder == before, "an LRU list is broken");
        expect(tree_.nodes_[n].list == list, "a node is on the wrong LRU list");
        rank_[n] = static_cast<std::int64_t>(rank_.size());
      }
      expect(tree_.lru_.ends_[list].hottest == before, "an LRU list does not end where it says");
    }
  }

  void roots() {
    std::int64_t count = 0;
    for (const auto& [name, space] : tree_.spaces_.names()) {
      const NodeId root = tree_.spaces_[space].root;
      if (root == kNone) continue;
      expect(tree_.nodes_[root].root && !tree_.nodes_[root].detached, "a namespace names a node that is no live root");
      expect(tree_.nodes_[root].space == space, "a root is another namespace's");
      subtree(root);
      ++count;
    }
    expect(count == tree_.num_roots_, "the count of roots is wrong");
  }

  void subtree(NodeId root) {
    std::vector<NodeId> open{root};
    while (!open.empty()) {
      const NodeId n = open.back();
      open.pop_back();
      visit(n);
      tree_.index_.check(n);
      for (const NodeId child : tree_.index_.list(n)) {
        expect(tree_.nodes_[child].parent == n, "a child names another parent");
        expect(!tree_.nodes_[child].detached, "a detached node is in the tree");
        expect(tree_.spaces_.within(tree_.nodes_[child].space, tree_.nodes_[n].space), "a child is another's");
        open.push_back(child);
      }
    }
  }

  // A node that a lease or pin names, which may be out of the tree with the path above it.
  void holder(NodeId n) {
    for (; n != kNone && tree_.nodes_[n].detached && !seen_.count(n); n = tree_.nodes_[n].parent) {
      visit(n);
      if (tree_.nodes_[n].locks == 0) break;  // held only: its parent may be gone
    }
    expect(n == kNone || seen_.count(n), "a holder names a node that is not reachable");
  }

  // What a lease holds, and that its pages are the tree's as far as it shares them.
  void lease(const Lease& l) {
    lock(l.node_);
    if (l.tail_ != kNone) lock(l.tail_);
    if (l.source_ != kNone) holder(l.source_), ++holds_[l.source_];
    expect(l.num_written_ <= l.num_tokens_ && l.num_cached_ <= l.num_written_, "a lease's lengths are disordered");
    expect(static_cast<std::int64_t>(l.pages_.size()) == l.pages_for(l.num_tokens_), "a lease has too many pages");
    const std::int64_t dropped = static_cast<std::int64_t>(l.first_page_) * tree_.page_size();
    expect(dropped == static_cast<std::int64_t>(l.dropped_.size()), "a lease lost the tokens of pages it dropped");
    expect(dropped <= l.num_written_, "a lease dropped what is not written");
    std::int32_t depth = 0;
    for (NodeId n = l.node_; n != kNone; n = tree_.nodes_[n].parent) depth += tree_.nodes_[n].num_pages;
    expect(depth == l.num_shared_, "a lease's place in the tree and its shared pages disagree");
    for (NodeId n = l.node_; n != kNone; n = tree_.nodes_[n].parent) {
      PageId page = tree_.nodes_[n].last;
      for (std::int32_t k = tree_.nodes_[n].num_pages; k > 0; --k, page = tree_.pages_.prev(page)) {
        expect(l.pages_[--depth] == page, "a lease lists another page than the tree");
      }
    }
    private_ += l.num_private();
    pages_[l.space_] += l.num_private();
    ++leases_[l.space_];
    for (std::size_t k = l.pages_.size() - l.num_private(); k < l.pages_.size(); ++k) own(l.pages_[k]);
  }

  // The journal has the full pages of the tree, and no others.
  void journal(const Journal& journal) {
    std::vector<bool> expected(tree_.num_pages(), false);
    for (const NodeId n : seen_) {
      const Node& node = tree_.nodes_[n];
      if (node.root || node.detached || node.last_len < tree_.page_size()) continue;
      PageId page = node.first;
      for (std::int32_t i = 0; i < node.num_pages; ++i, page = tree_.pages_.next(page)) expected[page] = true;
    }
    for (PageId page = 0; page < tree_.num_pages(); ++page) {
      expect(expected[page] == (journal.stored_at(page) >= 0), "the journal and the tree disagree on a page");
    }
  }

  void pin(NodeId n) { lock(n), ++pins_[n]; }

  void finish() {
    std::int64_t guarded = 0, evictable = 0, pinned = 0;
    for (const NodeId n : seen_) {
      const Node& node = tree_.nodes_[n];
      if (node.parent != kNone && node.locks > 0) ++locks_[node.parent];
      if (node.parent != kNone && node.pins > 0) ++pins_[node.parent];
    }
    for (const NodeId n : seen_) {
      const Node& node = tree_.nodes_[n];
      expect(node.locks == locks_[n], "a lock count is wrong");
      expect(node.pins == pins_[n], "a pin count is wrong");
      expect(node.holds == holds_[n], "a hold count is wrong");
      const bool listed = tree_.listed(node);
      expect(listed == (rank_.count(n) > 0), "a node is on the LRU list and should not be, or the reverse");
      if (listed && tree_.listed(tree_.nodes_[node.parent])) {
        const std::uint16_t above = tree_.nodes_[node.parent].list;
        expect(!LruLists::is_ended(above) || LruLists::is_ended(node.list), "a path goes on below its end");
        if (above == node.list) expect(rank_[node.parent] > rank_[n], "a parent is colder than its child");
      }
      (node.locks > 0 || node.holds > 0 ? guarded : evictable) += node.num_pages;
      pages_[node.space] += node.num_pages;
      if (node.locks == 0 && node.holds == 0) evictable_[tree_.spaces_[node.space].top] += node.num_pages;
      if (node.pins > 0) pinned += node.num_pages;
      if (node.root && !node.detached) expect(node.locks > 0 || node.children != kNone, "a bare namespace was kept");
    }
    expect(rank_.size() <= seen_.size(), "the LRU list has nodes that are not in the tree");
    expect(guarded == tree_.num_protected(), "the count of protected pages is wrong");
    expect(evictable == tree_.num_evictable(), "the count of evictable pages is wrong");
    expect(pinned == tree_.num_pinned(), "the count of pinned pages is wrong");
    expect(static_cast<std::int64_t>(seen_.size()) == tree_.num_nodes(), "a node was lost");
    for (const auto owners : owned_) expect(owners == 1, "a page was lost");
    if (tree_.journal() != nullptr) journal(*tree_.journal());
    spaces();
    expect(tree_.num_free() + private_ + guarded + evictable == tree_.num_pages(),
           "free + private + protected + evictable != num_pages");
  }

 private:
  void visit(NodeId n) {
    expect(seen_.insert(n).second, "a node is reached twice");
    const Node& node = tree_.nodes_[n];
    branches(n);
    if (node.root) return expect(node.num_pages == 0, "a root holds pages");
    const std::int32_t page_size = tree_.pages_.page_size();
    expect(node.num_pages > 0, "a node holds no page");
    expect(node.last_len > 0 && node.last_len <= page_size, "an open page has a wrong length");
    expect(node.last_len == page_size || (node.num_pages == 1 && node.children == kNone),
           "an open page is not alone in its node, or has children");
    PageId page = node.first;
    for (std::int32_t i = 0; i < node.num_pages; ++i) {
      own(page);
      if (i + 1 == node.num_pages) break;
      expect(tree_.pages_.prev(tree_.pages_.next(page)) == page, "a run of pages is broken");
      page = tree_.pages_.next(page);
    }
    expect(page == node.last, "a run of pages does not end where its node says");
  }

  // A node with two children, and all above a node that had them, is marked.
  void branches(NodeId n) {
    const Node& node = tree_.nodes_[n];
    expect(node.branched || tree_.index_.list(n).size() < 2, "a branch was not noticed");
    if (node.branched && node.parent != kNone && !node.detached) {
      expect(tree_.nodes_[node.parent].branched, "a node above a branch does not know of it");
    }
  }

  // What each namespace has, and what keeps it.
  void spaces() {
    const Spaces& spaces = tree_.spaces_;
    std::unordered_map<SpaceId, std::int64_t> used, below;
    int idle = 0;
    for (const auto& [name, s] : spaces.names()) {
      used[spaces[s].top] += pages_[s];
      if (spaces[s].parent != kNone) ++below[spaces[s].parent];
    }
    for (const auto& [name, s] : spaces.names()) {
      const Space& space = spaces[s];
      expect(space.known && space.name->first == name, "a namespace has another name");
      expect(space.pages == pages_[s], "a namespace's count of pages is wrong");
      expect(space.leases == leases_[s], "a namespace's count of leases is wrong");
      expect(space.below == below[s], "a namespace's count of those below it is wrong");
      if (space.top == s) expect(space.used == used[s], "a top namespace's count of pages is wrong");
      if (space.top == s) expect(space.evictable == evictable_[s], "a count of evictable pages is wrong");
      const bool kept = space.pages + space.leases + space.below + space.lists > 0 || space.root != kNone;
      expect(kept != space.is_idle, "a namespace is kept for nothing, or idle in use");
      idle += space.is_idle;
    }
    expect(idle == spaces.num_idle_ && idle <= Spaces::kMostIdle, "the count of idle namespaces is wrong");
  }

  void lock(NodeId n) { holder(n), ++locks_[n]; }

  const RadixTree& tree_;
  std::int64_t private_ = 0;
  std::vector<std::int8_t> owned_;
  std::set<NodeId> seen_;
  std::unordered_map<NodeId, std::int64_t> rank_;
  std::unordered_map<SpaceId, std::int64_t> pages_, leases_, evictable_;
  std::unordered_map<NodeId, std::int32_t> locks_, pins_, holds_;
};

void Cache::check() {
  Guard guard(mutex_);
  Audit audit(tree_);
  audit.free_pages();
  audit.lru();
  audit.roots();
  std::int64_t leases = 0;
  for (const Lease* l = newest_; l; l = l->older_, ++leases) audit.lease(*l);
  expect(leases == num_leases_, "the number of leases is wrong");
  for (const NodeId node : pins_) audit.pin(node);
  audit.finish();
}

}  // namespace radixkv
