// What a cache tells of itself: counts, and a copy of its tree.
#include "base/error.hpp"
#include "cache/cache.hpp"

namespace radixkv {

Stats Cache::stats() {
  Guard guard(mutex_);
  std::int64_t own = 0;
  for (const Lease* l = newest_; l; l = l->older_) own += l->num_private();
  return Stats{num_pages(),
               page_size(),
               tree_.num_free(),
               own,
               tree_.num_protected(),
               tree_.num_evictable(),
               tree_.num_nodes() - tree_.num_roots(),
               num_leases_,
               static_cast<std::int64_t>(pins_.size()),
               tree_.num_pinned(),
               requests_,
               forks_,
               input_tokens_,
               hit_tokens_,
               tree_.num_evicted(),
               committed_tokens_};
}

std::vector<NamespaceStats> Cache::namespaces() {
  Guard guard(mutex_);
  const Spaces& spaces = tree_.spaces();
  std::vector<NamespaceStats> out;
  for (const auto& [name, s] : spaces.names()) {
    const Space& space = spaces[s];
    out.push_back({name, false, space.counts, space.pages, space.leases, space.floor, space.ceiling});
  }
  out.push_back({{}, true, spaces.forgotten(), 0, 0, 0, Space::kNoCeiling});
  return out;
}

std::vector<SnapshotNode> Cache::snapshot() {
  Guard guard(mutex_);
  return tree_.snapshot();
}

std::vector<PageId> Cache::coldest_first() {
  Guard guard(mutex_);
  return tree_.coldest_first();
}

std::vector<PageId> RadixTree::coldest_first() const {
  std::vector<PageId> out;
  for (int list = 0; list < lru_.lists(); ++list) {
    for (NodeId n = lru_.coldest(list); n != kNone; n = nodes_[n].hotter) out.push_back(nodes_[n].last);
  }
  return out;
}

std::vector<SnapshotNode> RadixTree::snapshot() const {
  std::vector<SnapshotNode> out;
  std::vector<NodeId> ids;
  for (const auto& [name, space] : spaces_.names()) {
    const NodeId root = spaces_[space].root;
    if (root == kNone) continue;
    ids.push_back(root);
    out.push_back({-1, name, true, {}, {}, nodes_[root].locks, nodes_[root].pins});
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    for (const NodeId child : index_.list(ids[i])) {
      const Node& node = nodes_[child];
      const bool first = node.space != nodes_[ids[i]].space;
      SnapshotNode s{static_cast<std::int32_t>(i), spaces_.name(node.space), first, {}, {}, node.locks, node.pins};
      PageId page = node.first;
      for (std::int32_t k = 0; k < node.num_pages; ++k, page = pages_.next(page)) {
        const std::int32_t n = k + 1 < node.num_pages ? page_size() : node.last_len;
        s.pages.push_back(page);
        s.tokens.insert(s.tokens.end(), tokens(page), tokens(page) + n);
      }
      ids.push_back(child);
      out.push_back(std::move(s));
    }
  }
  return out;
}

// --- the journal -----------------------------------------------------------------------------------------------------

void Cache::start_journal() {
  Guard guard(mutex_);
  check_open();
  tree_.start_journal();
}

JournalBatch Cache::read_journal(std::int64_t cursor, std::int64_t limit) {
  Guard guard(mutex_);
  return tree_.journal()->read(cursor, limit);
}

ReleaseBatch Cache::read_releases(std::int64_t cursor, std::int64_t limit) {
  Guard guard(mutex_);
  return tree_.journal()->read_releases(cursor, limit);
}

JournalBatch Cache::dump_journal() {
  Guard guard(mutex_);
  JournalBatch out = tree_.dump();
  out.cursor = tree_.journal()->end();
  return out;
}

std::vector<bool> Cache::still_stored(const std::vector<std::int64_t>& pages,
                                      const std::vector<std::int64_t>& numbers) {
  if (pages.size() != numbers.size()) {
    invalid("as many numbers as pages; got " + str(numbers.size()) + " and " + str(pages.size()));
  }
  Guard guard(mutex_);
  std::vector<bool> still(pages.size());
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (pages[i] < 0 || pages[i] >= num_pages()) {
      invalid("page " + str(pages[i]) + ": pages are 0 to " + str(num_pages() - 1));
    }
    const std::int64_t number = tree_.journal()->stored_at(static_cast<PageId>(pages[i]));
    still[i] = number >= 0 && number == numbers[i];
  }
  return still;
}

std::pair<std::int64_t, std::int64_t> Cache::journal_ends() {
  Guard guard(mutex_);
  return {tree_.journal()->end(), tree_.journal()->releases_end()};
}

std::vector<std::int64_t> Cache::what_if() {
  Guard guard(mutex_);
  const WhatIf& w = tree_.start_what_if();
  std::vector<std::int64_t> out{w.input_tokens(), w.hit_tokens()};
  for (std::size_t i = 0; i < WhatIf::kFactors.size(); ++i) {
    out.push_back(w.hit_tokens() + w.more_tokens(static_cast<int>(i)));
  }
  return out;
}

}  // namespace radixkv
