// RadixTree's part for those who follow it: what the journal records, and the prefixes that the what-if counts by.
#include "cache/prefix_hash.hpp"
#include "cache/radix_tree.hpp"

namespace radixkv {

// --- the journal -----------------------------------------------------------------------------------------------------

// A run of full pages under `parent`, after the page `before` (kNone under a root).
void RadixTree::record_run(NodeId parent, SpaceId space, PageId before, const PageId* run, std::int32_t count) {
  // Where nothing else is said a page is of its parent's namespace.
  const SpaceId first = nodes_[parent].root || nodes_[parent].space != space ? space : kNone;
  for (std::int32_t i = 0; i < count; ++i) {
    journal_->stored(run[i], i > 0 ? run[i - 1] : before, i > 0 ? kNone : first, tokens(run[i]));
  }
}

// All pages of a node, last first; an open page never was recorded.
void RadixTree::record_removed(const Node& n) {
  if (n.last_len < page_size()) return;
  PageId page = n.last;
  for (std::int32_t i = 0; i < n.num_pages; ++i, page = pages_.prev(page)) journal_->removed(page);
}

// Who follows what is evicted; open pages are not followed.
void RadixTree::note_evicted(NodeId n, std::int32_t count) {
  if (nodes_[n].last_len < page_size()) return;
  PageId page = nodes_[n].last;
  for (std::int32_t i = 0; i < count; ++i, page = pages_.prev(page)) {
    if (journal_) journal_->removed(page);
    if (hazard_) remember(n, page);
    if (what_if_) what_if_->evicted(page);
  }
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
  for (const auto& [name, space] : spaces_.names()) {
    if (spaces_[space].pages > 0 || spaces_[space].leases > 0) journal.name(space, name);
    if (spaces_[space].root != kNone) open.push_back(spaces_[space].root);
  }
  while (!open.empty()) {
    const NodeId n = open.back();
    open.pop_back();
    for (const NodeId child : index_.list(n)) open.push_back(child);
    const Node& node = nodes_[n];
    if (node.root || node.last_len < page_size()) continue;
    const Node& parent = nodes_[node.parent];
    const SpaceId first = parent.root || parent.space != node.space ? node.space : kNone;
    PageId before = parent.last, page = node.first;
    for (std::int32_t i = 0; i < node.num_pages; ++i, before = page, page = pages_.next(page)) {
      journal.stored(page, before, i == 0 ? first : kNone, tokens(page));
    }
  }
}

// --- what if ---------------------------------------------------------------------------------------------------------

std::uint64_t RadixTree::prefix_under(NodeId parent, SpaceId space, std::uint64_t before) const {
  if (nodes_[parent].root) return prefix_of(spaces_.name(space));
  return nodes_[parent].space == space ? before : mixed(before ^ prefix_of(spaces_.name(space)));
}

void RadixTree::remember_prefixes(NodeId parent, SpaceId space, PageId before, const PageId* run, std::int32_t count) {
  std::uint64_t prefix = prefix_under(parent, space, before == kNone ? 0 : what_if_->prefix(before));
  for (std::int32_t i = 0; i < count; ++i) {
    prefix = prefix_of(prefix, tokens(run[i]), page_size());
    what_if_->stored(run[i], prefix);
  }
}

WhatIf& RadixTree::start_what_if() {
  if (what_if_) return *what_if_;
  what_if_ = std::make_unique<WhatIf>(num_pages(), page_size());
  std::vector<NodeId> open;
  for (const auto& [name, space] : spaces_.names()) {
    if (spaces_[space].root != kNone) open.push_back(spaces_[space].root);
  }
  while (!open.empty()) {
    const NodeId n = open.back();
    open.pop_back();
    for (const NodeId child : index_.list(n)) open.push_back(child);
    if (nodes_[n].root || nodes_[n].last_len < page_size()) continue;
    PageId before = nodes_[nodes_[n].parent].last, page = nodes_[n].first;
    NodeId above = nodes_[n].parent;
    for (std::int32_t i = 0; i < nodes_[n].num_pages; ++i, above = n, before = page, page = pages_.next(page)) {
      remember_prefixes(above, nodes_[n].space, before, &page, 1);
    }
  }
  return *what_if_;
}

WhatIf::Place RadixTree::count_what_if(SpaceId space, const Match& m, const PageId* pages, const Token* tokens,
                                       std::int64_t n) {
  what_if_->request(n, m.tokens(page_size()));
  const std::uint64_t before = m.pages > 0 ? what_if_->prefix(pages[m.pages - 1]) : 0;
  WhatIf::Place at{m.pages, prefix_under(m.node, space, before)};
  count_missed(at, tokens + at.page * page_size(), n);
  return at;
}

// A prompt has n tokens, so far; given are those from the page on where it is. A page that ends it is not asked for.
void RadixTree::count_missed(WhatIf::Place& at, const Token* tokens, std::int64_t n) {
  what_if_->missed(at.needed);
  at.needed = 0;
  for (std::int64_t end; (end = (at.page + 1) * page_size()) <= n; ++at.page, tokens += page_size()) {
    at.prefix = prefix_of(at.prefix, tokens, page_size());
    const double needed = what_if_->needed(at.prefix);
    if (needed == kNone) {
      at.page = kNone;
      return;
    }
    if (end < n) {
      what_if_->missed(needed);
    } else {
      at.needed = needed;
    }
  }
}

}  // namespace radixkv
