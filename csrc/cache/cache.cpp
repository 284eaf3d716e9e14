#include "cache/cache.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace radixkv {

namespace {
// Pins may take all of the pool but an eighth (at least one page), so that requests can always be served.
std::int64_t most_pinned(std::int64_t num_pages) { return num_pages - std::max<std::int64_t>(1, num_pages / 8); }

constexpr std::int64_t kMaxPageSize = std::int64_t{1} << 26;  // ChildIndex counts a page's bits in 32 of them

RadixTree tree_of(std::int64_t num_pages, std::int64_t page_size, bool hazard, bool hierarchical) {
  if (num_pages < 1) invalid("num_pages must be at least 1; got " + str(num_pages));
  if (page_size < 1 || page_size > kMaxPageSize) {
    invalid("page_size must be 1 to " + str(kMaxPageSize) + "; got " + str(page_size));
  }
  if (num_pages > INT32_MAX / page_size) {
    invalid("num_pages * page_size must be below 2**31; got " + str(num_pages) + " * " + str(page_size) +
            ": use several caches");
  }
  return RadixTree(static_cast<std::int32_t>(num_pages), static_cast<std::int32_t>(page_size), hazard, hierarchical);
}
}  // namespace

Cache::Cache(std::int64_t num_pages, std::int64_t page_size, bool hazard, bool hierarchical)
    : tree_(tree_of(num_pages, page_size, hazard, hierarchical)) {}

// --- checks: everything that can fail, before anything changes -------------------------------------------------------

void Cache::check_open() const {
  if (closed_) fail(ErrorKind::LeaseError, "the cache is closed: make a new PrefixCache");
}

void Cache::check_tokens(const Token* tokens, std::int64_t n, std::int64_t from) {
  Token all = 0;
  for (std::int64_t i = from; i < n; ++i) all |= tokens[i];
  if (all >= 0) return;
  const auto at = std::find_if(tokens + from, tokens + n, [](Token t) { return t < 0; }) - tokens;
  fail(ErrorKind::InvalidTokens,
       "token " + str(tokens[at]) + " at index " + str(at) + ": tokens are ids, 0 <= token < 2**31");
}

void Cache::check_prompt(std::int64_t n) {
  if (n == 0) fail(ErrorKind::InvalidTokens, "a prompt needs at least one token; got 0");
}

// What dropped pages freed does not count: an answer behind a window may outgrow the pool.
void Cache::check_length(std::int64_t num_tokens, std::int64_t freed) const {
  const std::int64_t need = (num_tokens + page_size() - 1) / page_size() - freed;
  if (need > num_pages()) {
    throw Exhausted({need, tree_.num_free(), tree_.num_evictable(), 0},
                    "need " + str(need) + " pages for " + str(num_tokens) + " tokens" +
                        (freed > 0 ? ", " + str(freed) + " pages of which were dropped" : "") +
                        "; the whole pool has " + str(num_pages()) + " pages of " + str(page_size()) +
                        " tokens: shorten the request or raise num_pages");
  }
}

void Cache::require_pages(SpaceId space, std::int64_t need, std::int64_t lost, std::int64_t cached) {
  const Room room = tree_.room(space, lost);
  const bool refused = need > 0 && refuse_in_ >= 0 && refuse_in_-- == 0;
  if (need <= room.all() && !refused) return;
  const PageCounts counts{need, room.free, room.evictable, cached};
  throw Exhausted(counts, lack_of(space, counts));
}

std::string Cache::lack_of(SpaceId space, const PageCounts& counts) const {
  std::string out =
      "need " + str(counts.needed) + " pages; " + str(counts.free) + " free, " + str(counts.evictable) + " evictable, ";
  if (space != kNone && tree_.spaces().top(space).ceiling != Space::kNoCeiling) {
    const Space& own = tree_.spaces().top(space);
    if (own.ceiling - own.used < tree_.num_free()) {
      return out + "for namespace '" + own.name->first + "', which has " + str(own.used) + " of at most " +
             str(own.ceiling) + ": release a lease of it or raise its ceiling";
    }
  }
  std::int64_t shielded = 0;
  for (const SpaceId s : tree_.spaces().quotas()) {
    if (space == kNone || s != tree_.spaces()[space].top) shielded += Spaces::shielded(tree_.spaces()[s]);
  }
  out += str(num_pages() - counts.free - counts.evictable - shielded) + " leased or pinned";
  if (shielded > 0) out += ", " + str(shielded) + " kept by other namespaces' floors";
  return out + ": release a lease or raise num_pages";
}

// --- match, acquire, pin ---------------------------------------------------------------------------------------------

// The longest cached prefix of the n tokens, which are checked. Its node is kNone where there is no tree.
Match Cache::find(const Token* tokens, std::int64_t n, std::string_view name, PageId* out) {
  tree_.spaces().check_levels(name);
  return tree_.match(tree_.spaces().nearest(name), tokens, n, out);
}

std::int64_t Cache::match(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  const Match m = find(tokens, n, name, nullptr);
  check_tokens(tokens, n, static_cast<std::int64_t>(m.pages) * page_size());
  return m.tokens(page_size());
}

// The counts that acquire() would find. A closed cache has none to give.
PageCounts Cache::would_fit(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  check_prompt(n);
  const Match m = find(tokens, n - 1, name, nullptr);
  check_tokens(tokens, n, static_cast<std::int64_t>(m.pages) * page_size());
  const Room room = tree_.room(tree_.spaces().nearest(name), tree_.evictable_on_path(m));
  return {(n + page_size() - 1) / page_size() - m.pages, room.free, room.evictable, m.tokens(page_size())};
}

std::unique_ptr<Lease> Cache::acquire(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  check_prompt(n);
  check_length(n, 0);
  auto lease = std::make_unique<Lease>(shared_from_this(), name);
  lease->pages_.resize(lease->pages_for(n));
  tree_.spaces().check_levels(name);
  const SpaceId nearest = tree_.spaces().nearest(name);
  Match m = tree_.match(nearest, tokens, n - 1, lease->pages_.data());  // one token is left to compute
  check_tokens(tokens, n, static_cast<std::int64_t>(m.pages) * page_size());
  const auto need = static_cast<std::int32_t>(lease->pages_.size()) - m.pages;
  require_pages(nearest, need, tree_.evictable_on_path(m), m.tokens(page_size()));
  lease->number_ = requests_ + 1;
  tree_.serving(lease->number_);
  lease->space_ = tree_.make_space(name, nearest);

  // Nothing below fails. Should it do so all the same, for a fault of ours, no page that the lease has is used again.
  lease->cleared_ = tree_.spaces()[lease->space_].cleared;
  if (m.node == kNone) m.node = tree_.make_root(lease->space_);
  if (tree_.what_if() != nullptr) {
    lease->missed_ = tree_.count_what_if(lease->space_, m, lease->pages_.data(), tokens, n);
  }
  try {
    lease->start(m, tokens, n);
  } catch (...) {
    (void)lease.release();
    throw;
  }
  ++requests_;
  input_tokens_ += n;
  hit_tokens_ += lease->num_cached_;
  tree_.spaces().requested(lease->space_, n, lease->num_cached_);
  return lease;
}

void Cache::enlist(Lease& lease) {
  lease.older_ = newest_;
  if (newest_) newest_->newer_ = &lease;
  newest_ = &lease;
  ++num_leases_;
  tree_.spaces().lease_began(lease.space_);
  lease.released_.store(false, std::memory_order_release);
}

void Cache::delist(Lease& lease) {
  (lease.newer_ ? lease.newer_->older_ : newest_) = lease.older_;
  if (lease.older_) lease.older_->newer_ = lease.newer_;
  --num_leases_;
  tree_.spaces().lease_ended(lease.space_);
  lease.released_.store(true, std::memory_order_release);
}

std::unique_ptr<Pin> Cache::pin(const Token* tokens, std::int64_t n, std::string_view name) {
  Guard guard(mutex_);
  check_open();
  check_tokens(tokens, n, 0);
  if (n == 0) fail(ErrorKind::InvalidTokens, "a pin needs at least one token; got 0");
  const Match m = find(tokens, n, name, nullptr);
  const std::int64_t cached = m.tokens(page_size());
  if (cached < n) {
    fail(ErrorKind::NotCached, str(cached) + " of " + str(n) + " tokens are cached: run the prompt once, then pin it");
  }
  const std::int64_t pinned = tree_.num_pinned(), more = tree_.unpinned_on_path(m), most = most_pinned(num_pages());
  if (pinned + more > most) {
    throw Exhausted({more, tree_.num_free(), tree_.num_evictable(), n},
                    "pinning " + str(more) + " pages besides " + str(pinned) +
                        " pinned ones would starve the pool: at most " + str(most) + " of " + str(num_pages()) +
                        " may be pinned; unpin a prefix or raise num_pages");
  }
  std::list<NodeId> entry{kNone};  // what may run out of memory comes first
  auto pin = std::make_unique<Pin>(shared_from_this(), n, entry.begin());
  pins_.splice(pins_.end(), entry);
  NodeId& node = pins_.back();
  node = tree_.end_of(m);
  if (m.partial > 0) node = tree_.isolate(m.source);
  tree_.lock(node);
  tree_.pin(node);
  return pin;
}

void Pin::unpin() {
  Cache::Guard guard(cache_->mutex_);
  if (!pinned_.exchange(false)) fail(ErrorKind::LeaseError, "the pin was undone already");
  cache_->tree_.unpin(*node_);
  cache_->tree_.unlock(*node_);
  cache_->pins_.erase(node_);
}

void Cache::move_pins(NodeId from, NodeId to) {
  for (NodeId& node : pins_) {
    if (node != from) continue;
    node = to;
    tree_.lock(to);
    tree_.pin(to);
    tree_.unpin(from);
    tree_.unlock(from);
  }
}

// --- evict, clear, close ---------------------------------------------------------------------------------------------

std::int64_t Cache::evict(std::int64_t num_pages) {
  Guard guard(mutex_);
  check_open();
  tree_.serving(0);
  return tree_.evict(num_pages).pages;
}

std::int64_t Cache::clear() {
  Guard guard(mutex_);
  check_open();
  tree_.serving(0);
  std::vector<std::string> names;
  for (const auto& [name, space] : tree_.spaces().names()) names.push_back(name);
  std::int64_t freed = 0;
  for (const std::string& name : names) freed += clear_one(name);
  return freed;
}

std::int64_t Cache::clear(std::string_view name) {
  Guard guard(mutex_);
  check_open();
  tree_.spaces().check_levels(name);
  tree_.serving(0);
  return clear_one(name);
}

// What its leases write from now on is not published. Those above it need not be known.
std::int64_t Cache::clear_one(std::string_view name) {
  Spaces& spaces = tree_.spaces();
  const SpaceId space = spaces.find(name);
  if (space == kNone) return 0;
  for (const auto& [other, s] : spaces.names()) {
    if (spaces.within(s, space)) ++spaces[s].cleared;
  }
  return tree_.root(space) == kNone ? 0 : tree_.clear(space);
}

void Cache::set_quota(std::string_view name, std::int64_t floor, std::int64_t ceiling) {
  Guard guard(mutex_);
  check_open();
  Spaces& spaces = tree_.spaces();
  if (tree_.hazard()) invalid("quotas need the policy 'lru': this cache's is 'hazard'");
  if (!spaces.is_top(name)) {
    invalid("a quota is for a top namespace with all below it, not for '" + std::string(name) + "'");
  }
  const SpaceId known = spaces.find(name);
  std::int64_t floors = floor;
  for (const SpaceId s : spaces.quotas()) floors += s == known ? 0 : spaces[s].floor;
  if (floors > num_pages()) {
    invalid("floors of " + str(floors) + " pages together; the pool has " + str(num_pages()));
  }
  const bool had = known != kNone && spaces[known].lists > 0;
  if (!had && static_cast<int>(spaces.quotas().size()) >= kMostQuotas) {
    invalid("at most " + str(kMostQuotas) + " namespaces have quotas");
  }
  if (had || floor > 0 || ceiling != Space::kNoCeiling) tree_.set_quota(spaces.make(name), floor, ceiling);
}

std::int64_t Cache::most_pages(std::string_view name) {
  Guard guard(mutex_);
  const Spaces& spaces = tree_.spaces();
  const SpaceId known = spaces.nearest(name), top = known == kNone ? kNone : spaces[known].top;
  std::int64_t most = num_pages();
  for (const SpaceId s : spaces.quotas()) most -= s == top ? 0 : spaces[s].floor;
  return top == kNone ? most : std::min(most, spaces[top].ceiling);
}

void Cache::close() {
  Guard guard(mutex_);
  closed_ = true;
}

}  // namespace radixkv
