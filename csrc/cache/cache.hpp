// The cache: leases and pins over one radix tree, and the accounting identity.
//
// One mutex guards a cache. Every operation checks first and changes afterwards, so what throws has changed nothing.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "base/fork_mutex.hpp"
#include "cache/lease.hpp"
#include "cache/radix_tree.hpp"

namespace radixkv {

// Keeps a cached prefix resident until unpin(). Dropping the object does not unpin.
class Pin {
 public:
  Pin(std::shared_ptr<Cache> cache, std::int64_t num_tokens, std::list<NodeId>::iterator node)
      : cache_(std::move(cache)), num_tokens_(num_tokens), node_(node) {}
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;
  std::int64_t num_tokens() const { return num_tokens_; }
  bool pinned() const { return pinned_.load(); }
  void unpin();

 private:
  std::shared_ptr<Cache> cache_;
  const std::int64_t num_tokens_;
  std::list<NodeId>::iterator node_;
  std::atomic<bool> pinned_{true};
};

struct Stats {
  std::int64_t num_pages, page_size;
  std::int64_t free, private_, protected_, evictable;  // pages by state: they add up to num_pages
  std::int64_t num_nodes, num_leases, num_pins, pinned;
  std::int64_t requests, forks, input_tokens, hit_tokens, evicted_pages, committed_tokens;
};

// What a namespace has and did. The nameless one that comes last is all that are forgotten.
struct NamespaceStats {
  std::string name;
  bool forgotten;
  SpaceCounts counts;
  std::int64_t pages, leases;   // of its own
  std::int64_t floor, ceiling;  // of a top one with all below it; kNoCeiling: none
};

class Cache : public std::enable_shared_from_this<Cache> {
 public:
  Cache(std::int64_t num_pages, std::int64_t page_size, bool hazard, bool hierarchical);

  std::unique_ptr<Lease> acquire(const Token* tokens, std::int64_t n, std::string_view name);
  std::int64_t match(const Token* tokens, std::int64_t n, std::string_view name);
  PageCounts would_fit(const Token* tokens, std::int64_t n, std::string_view name);
  std::unique_ptr<Pin> pin(const Token* tokens, std::int64_t n, std::string_view name);
  std::int64_t evict(std::int64_t num_pages);
  std::int64_t clear();
  std::int64_t clear(std::string_view name);
  // Pages of this namespace with all below it that no other evicts, and the most that it may have. (0, kNoCeiling): none.
  void set_quota(std::string_view name, std::int64_t floor, std::int64_t ceiling);
  std::int64_t most_pages(std::string_view name);  // that it could have at once, by its own quota and others' floors
  Stats stats();
  std::vector<NamespaceStats> namespaces();  // in alphabetical order
  std::vector<SnapshotNode> snapshot();
  std::vector<PageId> coldest_first();  // the last page of each node that can be evicted, in the order of eviction
  void check();                         // recomputes everything; throws std::logic_error
  void close();

  // The journal: recorded from the first of these calls on.
  void start_journal();
  JournalBatch read_journal(std::int64_t cursor, std::int64_t limit);
  ReleaseBatch read_releases(std::int64_t cursor, std::int64_t limit);
  JournalBatch dump_journal();  // the tree as records; its cursor is where to go on reading
  // For each page, whether it is in the tree since the record with that number.
  std::vector<bool> still_stored(const std::vector<std::int64_t>& pages, const std::vector<std::int64_t>& numbers);
  std::pair<std::int64_t, std::int64_t> journal_ends();  // the numbers that the next record and release get

  // [0]: input tokens since the first call, [1]: of them hit, [2 + i]: hit by a pool of WhatIf::kFactors[i] times the pages.
  std::vector<std::int64_t> what_if();

  std::int32_t num_pages() const { return tree_.num_pages(); }
  std::int32_t page_size() const { return tree_.page_size(); }
  bool hierarchical() const { return tree_.spaces().hierarchical(); }
  // For tests: the n-th request for pages from now on is refused as if the pool were full (0: the next one).
  void refuse_pages(std::int64_t n) { refuse_in_ = n; }

 private:
  friend class Lease;      // its transactions run under the mutex, on the tree, and count here
  friend class PageTable;  // advances the leases of a step together
  friend class Pin;
  using Guard = std::lock_guard<ForkMutex>;
  static constexpr int kMostQuotas = 1000;  // an eviction looks at each

  void check_open() const;
  static void check_tokens(const Token* tokens, std::int64_t n, std::int64_t from);
  static void check_prompt(std::int64_t n);
  void check_length(std::int64_t num_tokens, std::int64_t freed) const;

  // All below with the mutex held.
  Match find(const Token* tokens, std::int64_t n, std::string_view name, PageId* out);
  void require_pages(SpaceId space, std::int64_t need, std::int64_t lost, std::int64_t cached = 0);
  std::string lack_of(SpaceId space, const PageCounts& counts) const;
  std::int64_t clear_one(std::string_view name);
  void enlist(Lease& lease);
  void delist(Lease& lease);
  void move_pins(NodeId from, NodeId to);

  ForkMutex mutex_;
  RadixTree tree_;
  Lease* newest_ = nullptr;
  std::list<NodeId> pins_;  // locked and pinned
  bool closed_ = false;
  std::int64_t refuse_in_ = -1;
  std::int64_t num_leases_ = 0;
  std::int64_t requests_ = 0, forks_ = 0, input_tokens_ = 0, hit_tokens_ = 0, committed_tokens_ = 0;
};

}  // namespace radixkv
