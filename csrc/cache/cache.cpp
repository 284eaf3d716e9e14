#include "cache/cache.hpp"

#include <algorithm>
#include <cstring>

namespace radixkv {

namespace {
// Pins may take all of the pool but an eighth (at least one page), so that requests can always be served.
std::int64_t most_pinned(std::int64_t num_pages) { return num_pages - std::max<std::int64_t>(1, num_pages / 8); }

std::string str(std::int64_t n) { return std::to_string(n); }

constexpr std::int64_t kMaxPageSize = std::int64_t{1} << 26;  // ChildIndex counts a page's bits in 32 of them

RadixTree tree_of(std::int64_t num_pages, std::int64_t page_size) {
  const auto refuse = [](const std::string& what) { throw Error(ErrorKind::InvalidArgument, what); };
  if (num_pages < 1) refuse("num_pages must be at least 1; got " + str(num_pages));
  if (page_size < 1 || page_size > kMaxPageSize) {
    refuse("page_size must be 1 to " + str(kMaxPageSize) + "; got " + str(page_size));
  }
  if (num_pages > INT32_MAX / page_size) {
    refuse("num_pages * page_size must be below 2**31; got " + str(num_pages) + " * " + str(page_size) +
           ": use several caches");
  }
  return RadixTree(static_cast<std::int32_t>(num_pages), static_cast<std::int32_t>(page_size));
}
}  // namespace

Cache::Cache(std::int64_t num_pages, std::int64_t page_size) : tree_(tree_of(num_pages, page_size)) {}

// --- checks: everything that can fail, before anything changes -------------------------------------------------------

void Cache::check_open() const {
  if (closed_) throw Error(ErrorKind::LeaseError, "the cache is closed: make a new PrefixCache");
}

void Cache::check_tokens(const Token* tokens, std::int64_t n, std::int64_t from) const {
  Token all = 0;
  for (std::int64_t i = from; i < n; ++i) all |= tokens[i];
  if (all >= 0) return;
  const auto at = std::find_if(tokens + from, tokens + n, [](Token t) { return t < 0; }) - tokens;
  throw Error(ErrorKind::InvalidTokens,
              "token " + str(tokens[at]) + " at index " + str(at) + ": tokens are ids, 0 <= token < 2**31");
}

// What dropped pages freed does not count: an answer behind a window may outgrow the pool.
void Cache::check_length(std::int64_t num_tokens, std::int64_t freed) const {
  const std::int64_t need = (num_tokens + page_size() - 1) / page_size() - freed;
  if (need > num_pages()) {
    throw Error(ErrorKind::PoolExhausted, "need " + str(need) + " pages for " + str(num_tokens) + " tokens" +
                                              (freed > 0 ? ", " + str(freed) + " pages of which were dropped" : "") +
                                              "; the whole pool has " + str(num_pages()) + " pages of " +
                                              str(page_size()) + " tokens: shorten the request or raise num_pages");
  }
}

void Cache::require_pages(std::int64_t need, std::int64_t lost) {
  const std::int64_t free = tree_.pages.num_free(), evictable = tree_.num_evictable() - lost;
  const bool refused = need > 0 && refuse_in_ >= 0 && refuse_in_-- == 0;
  if (need <= free + evictable && !refused) return;
  throw Error(ErrorKind::PoolExhausted, "need " + str(need) + " pages; " + str(free) + " free, " + str(evictable) +
                                            " evictable, " + str(num_pages() - free - evictable) +
                                            " leased or pinned: release a lease or raise num_pages");
}

// --- acquire ---------------------------------------------------------------------------------------------------------

std::unique_ptr<Lease> Cache::acquire(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  if (n == 0) throw Error(ErrorKind::InvalidTokens, "a prompt needs at least one token; got 0");
  check_length(n, 0);
  auto lease = std::make_unique<Lease>(shared_from_this(), name);
  lease->pages_.resize(pages_for(n));
  const NodeId known = tree_.find_root(name);
  Match m{kNone, 0, 0};
  if (known != kNone) m = tree_.match(known, tokens, n - 1, lease->pages_.data());  // one token is left to compute
  const std::int64_t shared = static_cast<std::int64_t>(m.pages) * page_size();
  check_tokens(tokens, n, shared);
  const auto need = static_cast<std::int32_t>(lease->pages_.size()) - m.pages;
  require_pages(need, known != kNone ? tree_.evictable_on_path(m) : 0);
  lease->root_ = tree_.make_root(name);

  // Nothing below fails.
  const bool inside = m.node_pages > 0 && m.node_pages < tree_.nodes[m.node].num_pages;
  lease->node_ = known == kNone ? lease->root_ : inside ? tree_.split(m.node, m.node_pages) : m.node;
  tree_.lock(lease->node_);
  const NodeId source = m.partial > 0 ? isolate(m.source) : kNone;
  lease->num_shared_ = m.pages;
  const bool in_place = take_pages(*lease, need, m.source_page);
  if (source != kNone) copy_open_page(*lease, source, m.source_page, m.partial, in_place);
  lease->num_tokens_ = shared;
  write_tokens(*lease, shared, tokens + shared, n - shared);
  lease->num_prompt_ = n;
  lease->num_cached_ = lease->num_written_ = shared + m.partial;
  enlist(*lease);
  ++requests_;
  input_tokens_ += n;
  hit_tokens_ += lease->num_cached_;
  return lease;
}

// Fills the last `need` places of lease.pages_, which has its new size already. Where the copy source itself is among
// the evicted pages it becomes the copy: true, and nothing is left to copy.
bool Cache::take_pages(Lease& lease, std::int32_t need, PageId source) {
  bool in_place = false;
  if (const std::int32_t missing = need - tree_.pages.num_free(); missing > 0) {
    const auto evicted = tree_.evict(missing, source);
    evicted_pages_ += evicted.pages;
    in_place = evicted.watched;
  }
  auto page = lease.pages_.end() - need;
  if (in_place) {
    tree_.pages.take_this(source, need);
    *page++ = source;
  }
  for (; page != lease.pages_.end(); ++page) *page = tree_.pages.take();
  return in_place;
}

// The lease's first page of its own begins with `tokens` tokens of `page`, the page of node `source`.
void Cache::copy_open_page(Lease& lease, NodeId source, PageId page, std::int32_t tokens, bool in_place) {
  if (in_place) return;
  const PageId target = lease.pages_[lease.num_shared_];
  std::memcpy(tree_.pages.tokens(target), tree_.pages.tokens(page), tokens * sizeof(Token));
  tree_.hold(source);
  lease.source_ = source;
  lease.copy_ = {page, target, tokens};
}

void Cache::write_tokens(Lease& lease, std::int64_t from, const Token* tokens, std::int64_t n) {
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t at = from + done;
    const std::int64_t offset = at % page_size();
    const std::int64_t part = std::min<std::int64_t>(page_size() - offset, n - done);
    std::memcpy(tree_.pages.tokens(lease.pages_[at / page_size()]) + offset, tokens + done, part * sizeof(Token));
    done += part;
  }
  lease.num_tokens_ += n;
}

void Cache::enlist(Lease& lease) {
  lease.older_ = newest_;
  if (newest_) newest_->newer_ = &lease;
  newest_ = &lease;
  ++num_leases_;
  lease.released_.store(false, std::memory_order_release);
}

// --- a lease grows ---------------------------------------------------------------------------------------------------

void Cache::extend(Lease& lease, const Token* tokens, std::int64_t n) {
  if (n == 0) return;
  check_open();
  check_tokens(tokens, n, 0);
  check_length(lease.num_tokens_ + n, std::max(0, lease.first_page_ - lease.num_shared_));
  const std::size_t total = pages_for(lease.num_tokens_ + n);
  if (total > lease.pages_.capacity()) lease.pages_.reserve(std::max(total, 2 * lease.pages_.size()));
  const auto more = static_cast<std::int32_t>(total - lease.pages_.size());
  // An open page that a commit published never changes: go on in a copy of it. Where no page is left for the copy and
  // nobody else has use for the published one, it leaves the tree and is written to again.
  const NodeId tail = lease.tail_;
  const bool back = tail != kNone && more == tree_.pages.num_free() + tree_.num_evictable() && tree_.only_lease(tail);
  const std::int32_t need = more + (tail != kNone && !back ? 1 : 0);
  require_pages(need, 0);

  const PageId open = lease.pages_.back();
  if (back) evicted_pages_ += tree_.take_back(tail);
  lease.pages_.resize(total);
  take_pages(lease, need, kNone);
  if (tail != kNone && !back) {
    copy_open_page(lease, tail, open, static_cast<std::int32_t>(lease.num_tokens_ % page_size()), false);
    tree_.unlock(tail);
  }
  lease.tail_ = kNone;
  write_tokens(lease, lease.num_tokens_, tokens, n);
}

void Cache::advance(Lease& lease, std::int64_t n) {
  const std::int64_t unwritten = lease.num_tokens_ - lease.num_written_;
  if (n < 0) n = unwritten;
  if (n > unwritten) {
    throw Error(ErrorKind::InvalidArgument, "advance by " + str(n) + ": only " + str(unwritten) + " of " +
                                                str(lease.num_tokens_) + " tokens are unwritten; extend() first");
  }
  if (lease.source_ != kNone) tree_.drop_hold(lease.source_);
  lease.source_ = kNone;
  lease.num_written_ += n;
}

// Shared pages leave the view only. Private ones are freed, last first, so that their ids come back in ascending order.
std::int64_t Cache::drop(Lease& lease, std::int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens > lease.num_written_) {
    throw Error(ErrorKind::InvalidArgument, "drop the first " + str(num_tokens) + " tokens: only the " +
                                                str(lease.num_written_) + " written ones can be dropped");
  }
  const auto first = static_cast<std::int32_t>(num_tokens / page_size());
  if (first <= lease.first_page_) return 0;
  const std::int64_t known = lease.num_dropped(), to = static_cast<std::int64_t>(first) * page_size();
  std::vector<Token> tokens(to - known);
  lease.read_tokens(known, to, tokens.data());
  lease.dropped_.insert(lease.dropped_.end(), tokens.begin(), tokens.end());

  // Nothing below fails.
  const std::int32_t own = std::max(lease.num_shared_, lease.first_page_);
  for (std::int32_t i = first; i-- > own;) {
    tree_.pages.give_back(lease.pages_[i]);
    lease.pages_[i] = kNone;
  }
  lease.first_page_ = first;
  return std::max(0, first - own);
}

// --- commit: from the lease's own place in the tree, O(new pages) ----------------------------------------------------

void Cache::commit(Lease& lease, bool closing) {
  if (tree_.nodes[lease.root_].detached) return;  // its namespace was cleared: these tokens are not to be found again
  if (lease.tail_ != kNone) return;               // an earlier commit published the open page, and nothing came after
  if (lease.source_ != kNone) return;  // nobody has said that the open page's copy is made; the rest is shared
  if (lease.first_page_ > lease.num_shared_) return;  // what comes next was dropped
  const auto full = static_cast<std::int32_t>(lease.num_written_ / page_size());
  const auto rest = static_cast<std::int32_t>(lease.num_written_ % page_size());
  while (lease.num_shared_ < full) {
    const Token* key = tree_.pages.tokens(lease.pages_[lease.num_shared_]);
    const auto [child, shared] = tree_.index.find(lease.node_, key, page_size());
    if (child != kNone && shared == page_size()) {
      fold(lease, child, full);
    } else {
      publish(lease, full, child != kNone && shared == tree_.index.key_tokens(child) ? child : kNone);
    }
  }
  // A page with unwritten tokens is still to be written to, so it waits; a published page never changes.
  if (rest > 0 && (closing || lease.num_written_ == lease.num_tokens_)) publish_open(lease, rest, closing);
}

// Another request published `child` first: use its pages and free the duplicates.
void Cache::fold(Lease& lease, NodeId child, std::int32_t full) {
  PageId* own = lease.pages_.data() + lease.num_shared_;
  const std::int32_t most = std::min(tree_.nodes[child].num_pages, full - lease.num_shared_);
  std::int32_t k = 0;
  for (PageId page = tree_.nodes[child].first; k < most; ++k, page = tree_.pages.next(page)) {
    if (std::memcmp(tree_.pages.tokens(page), tree_.pages.tokens(own[k]), page_size() * sizeof(Token)) != 0) break;
    tree_.pages.give_back(own[k]);
    own[k] = page;
  }
  const NodeId node = k < tree_.nodes[child].num_pages ? tree_.split(child, k) : child;
  tree_.lock(node);
  tree_.unlock(lease.node_);
  lease.node_ = node;
  lease.num_shared_ += k;
}

// The rest of the full pages is new; `shorter` is an open page that is a prefix of the first of them, if there is one.
void Cache::publish(Lease& lease, std::int32_t full, NodeId shorter) {
  const PageId* run = lease.pages_.data() + lease.num_shared_;
  const std::int32_t count = full - lease.num_shared_;
  const bool pinned = shorter != kNone && tree_.nodes[shorter].pins > 0;
  if (shorter != kNone) tree_.remove_open(shorter);
  if (!pinned && tree_.can_append(lease.node_)) {
    tree_.append(lease.node_, run, count);
  } else {
    const NodeId node = tree_.add(lease.node_, run, count, page_size());
    tree_.lock(node);
    tree_.unlock(lease.node_);
    lease.node_ = node;
    if (pinned) move_pins(shorter, isolate(node));
  }
  lease.num_shared_ = full;
  committed_tokens_ += static_cast<std::int64_t>(count) * page_size();
}

void Cache::publish_open(Lease& lease, std::int32_t tokens, bool closing) {
  const PageId page = lease.pages_[lease.num_shared_];
  const auto [child, shared] = tree_.index.find(lease.node_, tree_.pages.tokens(page), tokens);
  if (child != kNone && shared == tokens) {  // a page of the tree begins with these tokens already
    if (closing) {
      const NodeId node = isolate(child);
      tree_.lock(node);
      tree_.unlock(node);  // used just now
    }
    return;
  }
  const NodeId shorter = child != kNone && shared == tree_.index.key_tokens(child) ? child : kNone;
  const bool pinned = shorter != kNone && tree_.nodes[shorter].pins > 0;
  if (shorter != kNone) tree_.remove_open(shorter);
  lease.tail_ = tree_.add(lease.node_, &page, 1, tokens);
  tree_.lock(lease.tail_);
  if (pinned) move_pins(shorter, lease.tail_);
  committed_tokens_ += tokens;
}

void Cache::move_pins(NodeId from, NodeId to) {
  for (Pin::Entry& entry : pins_) {
    if (entry.node != from) continue;
    entry.node = to;
    tree_.lock(to);
    tree_.pin(to);
    tree_.unpin(from);
    tree_.unlock(from);
  }
}

// --- release and fork ------------------------------------------------------------------------------------------------

void Cache::release(Lease& lease, bool commit) {
  if (commit) this->commit(lease, true);
  if (lease.source_ != kNone) tree_.drop_hold(lease.source_);
  for (std::int64_t i = lease.num_private(); i > 0; --i) {
    tree_.pages.give_back(lease.pages_.back());
    lease.pages_.pop_back();
  }
  if (lease.tail_ != kNone) tree_.unlock(lease.tail_);
  tree_.unlock(lease.node_);
  (lease.newer_ ? lease.newer_->older_ : newest_) = lease.older_;
  if (lease.older_) lease.older_->newer_ = lease.newer_;
  --num_leases_;
  lease.released_.store(true, std::memory_order_release);
}

std::unique_ptr<Lease> Cache::fork(Lease& lease) {
  check_open();
  if (lease.num_written_ != lease.num_tokens_ || lease.source_ != kNone) {
    throw Error(ErrorKind::LeaseError,
                "fork needs every token written and every copy made: " + str(lease.num_written_) + " of " +
                    str(lease.num_tokens_) + " are written; run the step or advance() first");
  }
  if (tree_.nodes[lease.root_].detached) {
    throw Error(ErrorKind::LeaseError, "cannot fork: the namespace was cleared; acquire the tokens again");
  }
  if (lease.first_page_ > lease.num_shared_) {
    throw Error(ErrorKind::LeaseError, "cannot fork: the first " + str(lease.num_dropped()) + " tokens were dropped, " +
                                           str(static_cast<std::int64_t>(lease.num_shared_) * page_size()) +
                                           " of them committed; commit() before drop()");
  }
  const auto rest = static_cast<std::int32_t>(lease.num_tokens_ % page_size());
  auto child = std::make_unique<Lease>(shared_from_this(), lease.name_);
  child->pages_.reserve(lease.pages_.size());
  child->dropped_ = lease.dropped_;
  require_pages(rest > 0, 0);

  commit(lease, false);  // sharing goes through the tree
  child->pages_ = lease.pages_;
  child->root_ = lease.root_;
  child->node_ = lease.node_;
  child->num_shared_ = lease.num_shared_;
  child->first_page_ = lease.first_page_;
  child->num_prompt_ = lease.num_prompt_;
  child->num_cached_ = child->num_written_ = child->num_tokens_ = lease.num_tokens_;
  tree_.lock(child->node_);
  if (rest > 0) {
    const PageId open = lease.pages_.back();
    const NodeId found =
        lease.tail_ != kNone ? lease.tail_ : tree_.index.find(lease.node_, tree_.pages.tokens(open), rest).child;
    const PageId page = tree_.nodes[found].first;
    const NodeId source = isolate(found);
    const bool in_place = take_pages(*child, 1, page);
    copy_open_page(*child, source, page, rest, in_place);
  }
  enlist(*child);
  return child;
}

// --- match, pin, evict, clear ----------------------------------------------------------------------------------------

std::int64_t Cache::match(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  const NodeId root = tree_.find_root(name);
  std::int64_t shared = 0, partial = 0;
  if (root != kNone) {
    const Match m = tree_.match(root, tokens, n, nullptr);
    shared = static_cast<std::int64_t>(m.pages) * page_size();
    partial = m.partial;
  }
  check_tokens(tokens, n, shared);
  return shared + partial;
}

std::unique_ptr<Pin> Cache::pin(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  check_tokens(tokens, n, 0);
  if (n == 0) throw Error(ErrorKind::InvalidTokens, "a pin needs at least one token; got 0");
  const NodeId root = tree_.find_root(name);
  Match m{root, 0, 0};
  if (root != kNone) m = tree_.match(root, tokens, n, nullptr);
  const std::int64_t cached = static_cast<std::int64_t>(m.pages) * page_size() + m.partial;
  if (cached < n) {
    throw Error(ErrorKind::NotCached,
                str(cached) + " of " + str(n) + " tokens are cached: run the prompt once, then pin it");
  }
  const std::int64_t pinned = tree_.num_pinned(), more = tree_.unpinned_on_path(m), most = most_pinned(num_pages());
  if (pinned + more > most) {
    throw Error(ErrorKind::PoolExhausted, "pinning " + str(more) + " pages besides " + str(pinned) +
                                              " pinned ones would starve the pool: at most " + str(most) + " of " +
                                              str(num_pages()) + " may be pinned; unpin a prefix or raise num_pages");
  }
  const auto entry = pins_.insert(pins_.end(), Pin::Entry{kNone});
  std::unique_ptr<Pin> pin;
  try {
    pin = std::make_unique<Pin>(shared_from_this(), n, entry);
  } catch (...) {
    pins_.erase(entry);
    throw;
  }
  const bool inside = m.node_pages > 0 && m.node_pages < tree_.nodes[m.node].num_pages;
  NodeId node = inside ? tree_.split(m.node, m.node_pages) : m.node;
  if (m.partial > 0) node = isolate(m.source);
  entry->node = node;
  tree_.lock(node);
  tree_.pin(node);
  return pin;
}

void Pin::unpin() {
  Cache::Guard guard(cache_->mutex_);
  if (!pinned_) throw Error(ErrorKind::LeaseError, "the pin was undone already");
  pinned_ = false;
  cache_->tree_.unpin(entry_->node);
  cache_->tree_.unlock(entry_->node);
  cache_->pins_.erase(entry_);
}

std::int64_t Cache::evict(std::int64_t num_pages) {
  Guard guard(mutex_);
  check_open();
  const std::int32_t evicted = tree_.evict(num_pages).pages;
  evicted_pages_ += evicted;
  return evicted;
}

std::int64_t Cache::clear() {
  Guard guard(mutex_);
  check_open();
  std::int64_t freed = 0;
  while (!tree_.roots().empty()) freed += tree_.clear(tree_.roots().begin()->second);
  return freed;
}

std::int64_t Cache::clear(std::string_view name) {
  Guard guard(mutex_);
  check_open();
  const NodeId root = tree_.find_root(name);
  return root == kNone ? 0 : tree_.clear(root);
}

void Cache::close() {
  Guard guard(mutex_);
  closed_ = true;
}

}  // namespace radixkv
