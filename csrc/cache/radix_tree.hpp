// The radix tree over pages: match, lock, split, grow, evict. It knows nothing of leases.
//
// States of a page, and where each is counted:
//   free       Pages::num_free
//   private    held by one lease, not in the tree (counted by Cache)
//   protected  in a node with a lock or a hold
//   evictable  in any other node
//
// A hierarchical cache has one tree for a top namespace and all below it. A node is of one namespace, and so is each path
// from the root on: pages of "a", then of "a/b", then of "a/b/c". A request sees the nodes of its own namespace and of
// those above; what it publishes is its own.
//
//   root ── [a: p0 p1] ──┬── [a: p2]
//                        ├── [a/b: p3 p4] ── [a/b: p5]     "a/c" finds p0 p1 p2, "a/b" all but p6
//                        └── [a/c: p6]
//
// Memory is taken at construction only: a node other than a root holds at least one page, and a root that is kept has
// a child or a lease (which has a private page), so 2 * num_pages + 1 nodes always suffice.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cache/child_index.hpp"
#include "cache/journal.hpp"
#include "cache/lru.hpp"
#include "cache/node.hpp"
#include "cache/pages.hpp"
#include "cache/spaces.hpp"
#include "cache/what_if.hpp"

namespace radixkv {

// One node of a snapshot.
struct SnapshotNode {
  std::int32_t parent;  // index into the snapshot; -1: the root of a namespace
  std::string name;     // of its namespace
  bool first;           // its parent is of another namespace
  std::vector<Token> tokens;
  std::vector<PageId> pages;
  std::int32_t locks, pins;
};

// Where the longest cached prefix ends.
struct Match {
  NodeId node;              // the last node entered (the root if none; kNone: there is no tree)
  std::int32_t node_pages;  // its leading pages that match
  std::int32_t pages;       // full pages matched, from the root
  NodeId source = kNone;    // the node whose page `source_page` holds the next `partial` tokens, if any
  PageId source_page = kNone;
  std::int32_t partial = 0;

  std::int64_t tokens(std::int32_t page_size) const { return static_cast<std::int64_t>(pages) * page_size + partial; }
};

// Pages that a namespace can get.
struct Room {
  std::int64_t free, evictable;
  std::int64_t all() const { return free + evictable; }
};

class RadixTree {
 public:
  RadixTree(std::int32_t num_pages, std::int32_t page_size, bool hazard, bool hierarchical);
  RadixTree(const RadixTree&) = delete;

  // --- pages --------------------------------------------------------------------------------------------------------
  std::int32_t num_pages() const { return pages_.num_pages(); }
  std::int32_t page_size() const { return pages_.page_size(); }
  std::int32_t num_free() const { return pages_.num_free(); }
  Token* tokens(PageId page) { return pages_.tokens(page); }
  const Token* tokens(PageId page) const { return pages_.tokens(page); }
  // Takes `need` pages into `out` for a namespace, evicting what is missing; it must have room() for as many. True where
  // the page `watch` was evicted on the way: it is out[0] then.
  bool take(SpaceId space, PageId* out, std::int32_t need, PageId watch);
  // Frees private pages, last first, so that they are handed out again in this order.
  void give_back(SpaceId space, const PageId* pages, std::int32_t count);

  // --- namespaces, and a root for each top one ----------------------------------------------------------------------
  const Spaces& spaces() const { return spaces_; }
  Spaces& spaces() { return spaces_; }
  // Makes a namespace for a request unless `nearest`, the one of Spaces::nearest(), is it; and its tree's root.
  SpaceId make_space(std::string_view name, SpaceId nearest);
  NodeId make_root(SpaceId space);
  NodeId root(SpaceId space) const { return space == kNone ? kNone : spaces_.top(space).root; }
  std::int64_t num_roots() const { return num_roots_; }

  // --- quotas: quotas.cpp -------------------------------------------------------------------------------------------
  // For a top namespace with all below it: the pages that no other may evict, and the most that it may have.
  void set_quota(SpaceId top, std::int64_t floor, std::int64_t ceiling);  // (0, kNoCeiling): none
  Room room(SpaceId space, std::int64_t lost) const;  // without `lost` evictable pages of its own. O(quotas)

  // --- matching: pure; changes neither recency nor nodes ------------------------------------------------------------
  // Longest cached prefix of the n tokens that this namespace sees. Page ids of the full pages go to `out` unless it is
  // null. O(tokens matched), in each namespace that has them.
  Match match(SpaceId space, const Token* tokens, std::int64_t n, PageId* out) const;
  // Evictable pages that locking this match would protect. O(nodes on the path that are not locked).
  std::int64_t evictable_on_path(const Match& m) const;
  // Pages that pinning this match, its partly matched page included, would pin in addition.
  std::int64_t unpinned_on_path(const Match& m) const;
  // Of the children of `n` that this namespace sees, the one that shares the most leading tokens with the first `count`
  // ones of `page`; and the one of its own that does. Of equal ones that of the upper namespace.
  struct Child {
    NodeId node;          // kNone: it has none
    std::int32_t shared;  // tokens
    bool whole;           // they are all that the child's first page holds
  };
  Child seen_child(NodeId n, SpaceId space, PageId page, std::int32_t count) const;
  Child own_child(NodeId n, SpaceId space, PageId page, std::int32_t count) const;
  SpaceId space_of(NodeId n) const { return nodes_[n].space; }
  PageId first_page(NodeId n) const { return nodes_[n].first; }
  bool detached(NodeId n) const { return nodes_[n].detached; }
  bool pinned(NodeId n) const { return nodes_[n].pins > 0; }

  // --- shape --------------------------------------------------------------------------------------------------------
  NodeId end_of(const Match& m);           // the node that ends where the match's full pages do; splits. O(pages)
  NodeId upper(NodeId n, std::int32_t k);  // the node of its first k pages; splits. O(k)
  NodeId isolate(NodeId n) { return upper(n, 1); }
  // Of a run of private pages of this namespace, frees the leading ones that hold the same tokens as n's, and puts n's in their place.
  std::int32_t replace_duplicates(NodeId n, SpaceId space, PageId* run, std::int32_t count);
  // A new child, not yet locked.
  NodeId add(NodeId parent, SpaceId space, const PageId* run, std::int32_t n, std::int32_t last_len);
  bool can_append(NodeId n, SpaceId space) const;  // nobody but one lease would notice if n grew at its end
  void append(NodeId n, const PageId* run, std::int32_t count);
  void remove_open(NodeId open);       // an open page that a fuller page replaces; a holder keeps it alive
  bool only_lease(NodeId open) const;  // whether one lease's lock is all that there is on it: no pin, no hold
  void take_back(NodeId open);         // such a page becomes its lease's own, and leaves the tree if it was there

  // --- locks, pins and holds ----------------------------------------------------------------------------------------
  // A lock protects the path from the root to the end of the node. O(nodes whose state changes).
  void lock(NodeId n);
  void unlock(NodeId n);  // what becomes unlocked goes to the hot end, leaf first
  void pin(NodeId n);
  void unpin(NodeId n);
  // A hold keeps the page of a one-page node until it has been copied. Unlike a lock it neither protects the path nor
  // changes recency: eviction passes over the page by taking it out of the tree.
  void hold(NodeId n);
  void drop_hold(NodeId n);
  // The session whose last request ends here is over: what nobody else began with is the first to be evicted, the end
  // of the path before the rest. What is of a namespace above stays. O(nodes of that part).
  void end_session(NodeId end, SpaceId space);
  // A request ended that found `cached` of its `total` tokens; `end` is the last node of its path, which is still
  // locked. With the "hazard" policy O(nodes of the path), else nothing.
  void used(NodeId end, std::int64_t since, std::int64_t cached, std::int64_t total);
  bool hazard() const { return hazard_ != nullptr; }
  std::int64_t pages_taken() const { return hazard_ ? hazard_->hazard.now() : 0; }

  // --- eviction -----------------------------------------------------------------------------------------------------
  // Frees up to `count` pages from the cold end, trimming leaves page by page; `watch` is a page whose eviction the
  // caller wants to know of. O(1) a page, O(quotas) a node. For a namespace nothing that a floor shields from it is
  // evicted; kNone: for the host, who may evict anything.
  struct Evicted {
    std::int32_t pages;
    bool watched;
  };
  enum class From { everybody, itself };
  Evicted evict(std::int64_t count, SpaceId space = kNone, From from = From::everybody, PageId watch = kNone);
  // Takes everything of this namespace, and of those below it, out of the tree. Locked and held nodes live on, detached,
  // until their holders let go. Returns the number of pages freed.
  std::int32_t clear(SpaceId space);

  std::int64_t num_protected() const { return protected_; }
  std::int64_t num_evictable() const { return evictable_; }
  std::int64_t num_pinned() const { return pinned_; }
  std::int64_t num_nodes() const { return num_nodes_; }      // roots included
  std::int64_t num_evicted() const { return num_evicted_; }  // pages, since it was made
  // The tree, parents before children. O(cached tokens).
  std::vector<SnapshotNode> snapshot() const;
  std::vector<PageId> coldest_first() const;  // the last page of each unlocked node
  // From now on every change is recorded, after one record for each namespace and each full page that is there.
  Journal& start_journal();
  void serving(std::int64_t request) {
    if (journal_) journal_->serving(request);
  }
  Journal* journal() { return journal_.get(); }  // null: nobody has asked for one
  const Journal* journal() const { return journal_.get(); }
  // From now on it is counted what larger pools would have hit.
  WhatIf& start_what_if();
  WhatIf* what_if() { return what_if_.get(); }  // null: nobody has asked for it
  // A request acquired n tokens in this namespace, and found those of the match, on these pages.
  WhatIf::Place count_what_if(SpaceId space, const Match& m, const PageId* pages, const Token* tokens, std::int64_t n);
  void count_missed(WhatIf::Place& at, const Token* tokens, std::int64_t n);
  // What is there now, as the records that would make it. O(cached tokens).
  JournalBatch dump() const;

 private:
  friend class Audit;  // recomputes all of it

  NodeId new_node(NodeId parent, SpaceId space);
  NodeId add_one(NodeId parent, SpaceId space, const PageId* run, std::int32_t n, std::int32_t last_len,
                 std::int32_t uses);
  void free_node(NodeId n);
  void drop_root_if_bare(NodeId root);
  NodeId split(NodeId n, std::int32_t k);  // its first k pages become a new parent of the rest; returns that. O(k)
  std::int32_t free_pages(NodeId n);
  // The spaces that a request of this one sees, from the top down.
  using Chain = std::array<SpaceId, Spaces::kMostLevels>;
  int chain_of(SpaceId space, Chain& chain) const;
  struct Turn {  // a place on the path where nodes of a lower namespace begin
    Match at;
    int level;
  };
  Match walk(Match m, const Chain& chain, int level, int levels, const Token* tokens, std::int64_t n, PageId* out,
             std::vector<Turn>* turns) const;
  void list_path(const Match& m, PageId* out) const;
  std::vector<NodeId> cleared_by(SpaceId space);
  void count_evictable(const Node& n, std::int64_t pages) {
    evictable_ += pages;
    spaces_.exposed(n.space, pages);
  }
  void protect(const Node& n);
  void expose(const Node& n);
  void note_branch(NodeId parent);
  // Whether it is on an LRU list: it can be evicted, now or after what lies below it.
  bool listed(const Node& n) const {
    return n.locks == 0 && !n.root && !n.detached && (!hazard_ || n.children == kNone);
  }
  void expose_to_eviction(NodeId n);  // onto the hot end of its list
  void push_hottest(NodeId n, std::uint16_t list);
  NodeId victim(SpaceId space, From from) const;  // the leaf to be evicted next; kNone: there is none
  void leave_to_holders(NodeId n);                // out of the tree; its page lives on
  bool free_end(NodeId n, std::int32_t count, PageId watch);
  void count_evicted(SpaceId space, std::int32_t pages);

  // Who follows it, the journal and the what-if: followers.cpp.
  void record_all(Journal& journal) const;
  void record_run(NodeId parent, SpaceId space, PageId before, const PageId* run, std::int32_t count);
  void record_removed(const Node& n);
  void note_evicted(NodeId n, std::int32_t count);
  // The number of what comes before a page of this namespace; `before` is that of the page before, if there is one.
  std::uint64_t prefix_under(NodeId parent, SpaceId space, std::uint64_t before) const;
  void remember_prefixes(NodeId parent, SpaceId space, PageId before, const PageId* run, std::int32_t count);

  // Quotas: quotas.cpp.
  bool may_evict(SpaceId space, From from, SpaceId quota) const;
  std::int64_t most_from(const Node& n, SpaceId space) const;
  NodeId coldest_allowed(SpaceId space, From from) const;
  void move_lists(SpaceId top, int from, int to);
  void begin_stamps();

  // The "hazard" policy: hazard_order.cpp.
  NodeId least_likely() const;
  void list_bared(NodeId n);
  std::int32_t same_past(NodeId parent, SpaceId space, const PageId* run, std::int32_t count, std::int32_t* uses);
  void remember(NodeId n, PageId page);
  void take_census();

  Pages pages_;
  Spaces spaces_;
  LazyArray<Node> nodes_;
  ChildIndex index_;
  LruLists lru_{nodes_};
  std::unique_ptr<HazardState> hazard_;  // null: plain LRU
  std::unique_ptr<LazyArray<std::int64_t>>
      stamps_;  // when a node came onto its list, to compare lists; null: no quotas
  std::int64_t now_ = 0;
  std::unique_ptr<Journal> journal_;
  std::unique_ptr<WhatIf> what_if_;
  NodeId fresh_ = 0, free_ = kNone;
  std::int64_t protected_ = 0, evictable_ = 0, pinned_ = 0, num_nodes_ = 0, num_roots_ = 0, num_evicted_ = 0;
};

}  // namespace radixkv
