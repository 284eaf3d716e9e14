// A lease: one request's claim on pages, and its transactions.
//
// A request's pages, from its first token on:
//
//   |<------ num_shared: the tree's ------>|<-- tail -->|<--------------- private ------------------>|
//   root ............................ node   one open      one lease's own; only these are written to
//   locked through `node`                    page that a
//                                            commit published
//
// Tokens that no page of the tree holds can be taken back (truncate): a guess that was wrong.
// A lease may drop its first pages from its view, once no later row sees them (a sliding window): shared ones stay in
// the tree, locked as before; private ones are freed, and then nothing from there on can be published any more.
//
// It belongs to one thread at a time, the one that acquired or adopted it. While a step is open over it (PageTable) it
// can be read, and whatever would change it throws. Every transaction runs under its cache's mutex, checks first and
// changes afterwards: what throws has changed nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cache/radix_tree.hpp"

namespace radixkv {

class Cache;

// Copy the first `tokens` tokens' K and V of page `source` into page `target`.
struct PageCopy {
  PageId source, target;
  std::int32_t tokens;
};

class Lease {
 public:
  Lease(std::shared_ptr<Cache> cache, std::string_view name);
  ~Lease();  // a lease that was dropped is released without a commit
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // These belong to the lease's thread. Each throws LeaseError after release or from another thread.
  std::int64_t num_tokens() const { return use()->num_tokens_; }
  std::int64_t num_written() const { return use()->num_written_; }
  std::int64_t num_cached() const { return use()->num_cached_; }
  std::int64_t num_prompt() const { return use()->num_prompt_; }
  const std::vector<PageId>& pages() const { return use()->pages_; }
  const std::string& name() const { return use()->name_; }
  std::int64_t num_dropped() const;  // leading tokens whose pages left the view; a multiple of the page size
  std::int32_t first_page() const { return use()->first_page_; }  // of the view, as an index into pages()
  bool copy(PageCopy* out) const;                                 // the pending copy, if there is one
  void read_tokens(std::int64_t from, std::int64_t to, Token* out) const;

  // These change it. Each throws LeaseError as those above do, and while a step is open over it.
  void extend(const Token* tokens, std::int64_t n, bool prompt);  // prompt: a further piece of it
  void advance(std::int64_t n);                                   // n < 0: all
  std::int64_t drop(std::int64_t num_tokens);                     // returns the pages freed
  std::int64_t truncate(std::int64_t num_tokens);                 // keeps the first ones; returns the pages freed
  void commit();
  void commit_as(std::string_view name);  // full pages, of a namespace above its own: where tiers found them
  void release(bool commit, bool cold);   // cold: the session ends with it
  std::unique_ptr<Lease> fork();
  void adopt();

  bool released() const { return released_.load(std::memory_order_acquire); }

 private:
  friend class Audit;      // recomputes all of it
  friend class Cache;      // acquires leases and keeps the list of those that live
  friend class PageTable;  // opens steps over leases: checks each once, reads it, and advances it in the end
  const Lease* use() const;
  Lease* use() { return const_cast<Lease*>(static_cast<const Lease*>(this)->use()); }
  void change() const;  // use(), and it is in no step
  void check_free() const;

  std::int32_t pages_for(std::int64_t tokens) const;
  std::int64_t least_tokens() const;
  std::int64_t num_private() const {
    return static_cast<std::int64_t>(pages_.size()) - std::max(num_shared_, first_page_) - (tail_ != kNone ? 1 : 0);
  }

  // All below with the mutex held.
  bool cleared() const { return tree_.spaces()[space_].cleared != cleared_; }
  void start(const Match& match, const Token* tokens, std::int64_t n);
  bool take_pages(std::int32_t need, PageId source);
  void give_back_from(std::size_t first);
  void write_tokens(const Token* tokens, std::int64_t n);
  void note_prompt(const Token* tokens, std::int64_t n);
  void note_missed(const Token* tokens, std::int64_t n);
  void copy_open_page(NodeId source, PageId page, std::int32_t tokens, bool in_place);
  void note_written(std::int64_t n);
  bool may_publish() const;
  NodeId publish_written(bool closing);
  void publish_full(SpaceId space);
  RadixTree::Child own_child(const RadixTree::Child& seen, SpaceId space, std::int32_t count) const;
  void fold(NodeId child, std::int32_t full);
  void publish(SpaceId space, std::int32_t full, NodeId shorter);
  NodeId publish_open(std::int32_t tokens, bool closing);
  void let_go(bool commit, bool cold);
  void record(Journal& journal) const noexcept;
  void copy_tokens(std::int64_t from, std::int64_t to, Token* out) const;
  void check_fork() const;
  void share_with(Lease& child);

  std::shared_ptr<Cache> cache_;
  RadixTree& tree_;
  std::string name_;
  std::vector<PageId> pages_;   // by place in the sequence; kNone where a private page was dropped
  const std::uint64_t id_;      // no other lease's, of any cache, ever
  std::uint64_t version_ = 0;   // of pages_: how often entries were replaced or left its front; its end does not count
  std::vector<Token> dropped_;  // the tokens before first_page_, whose own places may have new owners
  SpaceId space_ = kNone;       // its namespace
  std::int64_t cleared_ = 0;    // how often that had been cleared at acquire
  NodeId node_ = kNone;         // locked; its end is the end of the shared pages
  NodeId tail_ = kNone;         // locked; the open page that a commit published, while the lease still has it
  NodeId source_ = kNone;       // held; the node to copy from
  PageCopy copy_{kNone, kNone, 0};
  std::int32_t num_shared_ = 0;
  std::int64_t number_ = 0;      // of its request, from 1 in the order of acquire(); a fork has its parent's
  WhatIf::Place missed_;         // by its prompt so far
  std::int64_t started_ = 0;     // RadixTree::pages_taken() when it began
  std::int32_t first_page_ = 0;  // the pages before it were dropped
  std::int64_t num_tokens_ = 0, num_written_ = 0, num_cached_ = 0, num_prompt_ = 0;
  std::atomic<std::thread::id> thread_;
  std::atomic<bool> released_{true};
  std::atomic<bool> in_step_{false};
  Lease *older_ = nullptr, *newer_ = nullptr;  // the cache's list of live leases
};

}  // namespace radixkv
