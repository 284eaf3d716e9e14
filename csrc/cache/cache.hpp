// The cache: leases and pins over the radix tree, transactions, the accounting identity.
//
// A request's pages, from its first token on:
//
//   |<------ num_shared: the tree's ------>|<-- tail -->|<--------------- private ------------------>|
//   root ............................ node   one open      one lease's own; only these are written to
//   locked through `node`                    page that a
//                                            commit published
//
// A lease may drop its first pages from its view, once no later row sees them (a sliding window): shared ones stay in
// the tree, locked as before; private ones are freed, and then nothing from there on can be published any more.
//
// Every operation checks first and changes afterwards, so what throws has changed nothing. One mutex guards a cache;
// a lease belongs to one thread at a time, the one that acquired or adopted it. While a step is open over it
// (PageTable) and while it is being released, a lease can be read, and whatever would change it throws.
#pragma once

#include <algorithm>
#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/fork_mutex.hpp"
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

  // These change it. Each throws LeaseError as those above do, and while the lease is busy.
  void extend(const Token* tokens, std::int64_t n);
  void advance(std::int64_t n);                // n < 0: all
  std::int64_t drop(std::int64_t num_tokens);  // returns the pages freed
  void commit();
  void release(bool commit);
  std::unique_ptr<Lease> fork();
  void adopt();

  // Runs `observe` on a lease that is about to be released: it may read the lease and not change it.
  template <typename F>
  void before_release(F&& observe) {
    change();
    const Busy busy(*this, State::releasing);
    observe();
  }

  bool released() const { return released_.load(std::memory_order_acquire); }

 private:
  friend class Cache;
  friend class PageTable;  // opens steps over leases: checks each once, reads it, and advances it in the end
  enum class State : std::int8_t { idle, in_step, releasing };
  struct Busy {
    Busy(Lease& lease, State state) : lease(lease) { lease.state_.store(state); }
    ~Busy() { lease.state_.store(State::idle); }
    Lease& lease;
  };
  const Lease* use() const;
  Lease* use() { return const_cast<Lease*>(static_cast<const Lease*>(this)->use()); }
  void change() const;  // use(), and nobody is busy with it
  void check_idle() const;
  const Token* tokens_of(PageId page) const;
  std::int64_t num_private() const {
    return static_cast<std::int64_t>(pages_.size()) - std::max(num_shared_, first_page_) - (tail_ != kNone ? 1 : 0);
  }

  std::shared_ptr<Cache> cache_;
  std::string name_;
  std::vector<PageId> pages_;   // by place in the sequence; kNone where a private page was dropped
  std::vector<Token> dropped_;  // the tokens before first_page_, whose own places may have new owners
  NodeId root_ = kNone;         // of its namespace, as it was at acquire
  NodeId node_ = kNone;         // locked; its end is the end of the shared pages
  NodeId tail_ = kNone;         // locked; the open page that a commit published, while the lease still has it
  NodeId source_ = kNone;       // held; the node to copy from
  PageCopy copy_{kNone, kNone, 0};
  std::int32_t num_shared_ = 0;
  std::int32_t first_page_ = 0;  // the pages before it were dropped
  std::int64_t num_tokens_ = 0, num_written_ = 0, num_cached_ = 0, num_prompt_ = 0;
  std::atomic<std::thread::id> thread_;
  std::atomic<bool> released_{true};
  std::atomic<State> state_{State::idle};
  Lease *older_ = nullptr, *newer_ = nullptr;  // the cache's list of live leases
};

// Keeps a cached prefix resident until unpin(). Dropping the object does not unpin.
class Pin {
 public:
  struct Entry {
    NodeId node;
  };
  Pin(std::shared_ptr<Cache> cache, std::int64_t num_tokens, std::list<Entry>::iterator entry)
      : cache_(std::move(cache)), num_tokens_(num_tokens), entry_(entry) {}
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;
  std::int64_t num_tokens() const { return num_tokens_; }
  bool pinned() const { return pinned_.load(); }
  void unpin();

 private:
  std::shared_ptr<Cache> cache_;
  const std::int64_t num_tokens_;
  std::list<Entry>::iterator entry_;
  std::atomic<bool> pinned_{true};
};

struct Stats {
  std::int64_t num_pages, page_size;
  std::int64_t free, private_, protected_, evictable;  // pages by state: they add up to num_pages
  std::int64_t num_nodes, num_leases, num_pins, pinned;
  std::int64_t requests, input_tokens, hit_tokens, evicted_pages, committed_tokens;
};

// One node of a snapshot, parents before children.
struct SnapshotNode {
  std::int32_t parent;  // index into the snapshot; -1: the root of a namespace
  std::string name;     // namespace of a root
  std::vector<Token> tokens;
  std::vector<PageId> pages;
  std::int32_t locks, pins;
};

class Cache : public std::enable_shared_from_this<Cache> {
 public:
  Cache(std::int64_t num_pages, std::int64_t page_size);

  std::unique_ptr<Lease> acquire(const Token* tokens, std::int64_t n, std::string_view name);
  std::int64_t match(const Token* tokens, std::int64_t n, std::string_view name);
  std::unique_ptr<Pin> pin(const Token* tokens, std::int64_t n, std::string_view name);
  std::int64_t evict(std::int64_t num_pages);
  std::int64_t clear();
  std::int64_t clear(std::string_view name);
  Stats stats();
  std::vector<SnapshotNode> snapshot();
  void check();  // recomputes everything; throws std::logic_error
  void close();

  std::int32_t num_pages() const { return tree_.pages.num_pages(); }
  std::int32_t page_size() const { return tree_.pages.page_size(); }
  // For tests: the n-th request for pages from now on is refused as if the pool were full (0: the next one).
  void refuse_pages(std::int64_t n) { refuse_in_ = n; }

 private:
  friend class Lease;
  friend class PageTable;
  friend class Pin;
  using Guard = std::lock_guard<ForkMutex>;

  std::int32_t pages_for(std::int64_t tokens) const {
    return static_cast<std::int32_t>((tokens + page_size() - 1) / page_size());
  }
  void check_open() const;
  void check_tokens(const Token* tokens, std::int64_t n, std::int64_t from) const;
  void check_length(std::int64_t num_tokens, std::int64_t freed) const;

  // All below with the mutex held.
  void require_pages(std::int64_t need, std::int64_t lost);
  bool take_pages(Lease& lease, std::int32_t need, PageId source);
  void write_tokens(Lease& lease, std::int64_t from, const Token* tokens, std::int64_t n);
  void copy_open_page(Lease& lease, NodeId source, PageId page, std::int32_t tokens, bool in_place);
  NodeId isolate(NodeId n) { return tree_.nodes[n].num_pages > 1 ? tree_.split(n, 1) : n; }
  void enlist(Lease& lease);
  void extend(Lease& lease, const Token* tokens, std::int64_t n);
  void advance(Lease& lease, std::int64_t n);
  std::int64_t drop(Lease& lease, std::int64_t num_tokens);
  void commit(Lease& lease, bool closing);
  void fold(Lease& lease, NodeId child, std::int32_t full);
  void publish(Lease& lease, std::int32_t full, NodeId shorter);
  void publish_open(Lease& lease, std::int32_t tokens, bool closing);
  void move_pins(NodeId from, NodeId to);
  void release(Lease& lease, bool commit);
  std::unique_ptr<Lease> fork(Lease& lease);

  ForkMutex mutex_;
  RadixTree tree_;
  Lease* newest_ = nullptr;
  std::list<Pin::Entry> pins_;
  bool closed_ = false;
  std::int64_t refuse_in_ = -1;
  std::int64_t num_leases_ = 0;
  std::int64_t requests_ = 0, input_tokens_ = 0, hit_tokens_ = 0, evicted_pages_ = 0, committed_tokens_ = 0;
};

}  // namespace radixkv
