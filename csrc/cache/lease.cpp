#include "cache/lease.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "cache/cache.hpp"

namespace radixkv {

namespace {
std::uint64_t next_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}
}  // namespace

Lease::Lease(std::shared_ptr<Cache> cache, std::string_view name)
    : cache_(std::move(cache)),
      tree_(cache_->tree_),
      name_(name),
      id_(next_id()),
      thread_(std::this_thread::get_id()) {}

Lease::~Lease() {
  if (released()) return;
  Cache::Guard guard(cache_->mutex_);
  let_go(false, false);
}

// --- who may use it --------------------------------------------------------------------------------------------------

const Lease* Lease::use() const {
  if (released()) fail(ErrorKind::LeaseError, "the lease was released: acquire the tokens again");
  if (thread_.load(std::memory_order_relaxed) != std::this_thread::get_id()) {
    fail(ErrorKind::LeaseError,
         "the lease belongs to another thread: call lease.adopt() in the thread that takes it over");
  }
  return this;
}

void Lease::change() const {
  use();
  check_free();
}

void Lease::check_free() const {
  if (!in_step_.load()) return;
  fail(ErrorKind::LeaseError, "the lease is in an open step, whose rows go into its pages: leave the step first");
}

void Lease::adopt() {
  Cache::Guard guard(cache_->mutex_);
  if (released()) fail(ErrorKind::LeaseError, "the lease was released: acquire the tokens again");
  check_free();
  thread_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

// --- reading ---------------------------------------------------------------------------------------------------------

std::int32_t Lease::pages_for(std::int64_t tokens) const {
  return static_cast<std::int32_t>((tokens + tree_.page_size() - 1) / tree_.page_size());
}

std::int64_t Lease::num_dropped() const { return static_cast<std::int64_t>(use()->first_page_) * tree_.page_size(); }

bool Lease::copy(PageCopy* out) const {
  use();
  *out = copy_;
  return source_ != kNone;
}

void Lease::read_tokens(std::int64_t from, std::int64_t to, Token* out) const {
  use();
  copy_tokens(from, to, out);
}

void Lease::copy_tokens(std::int64_t from, std::int64_t to, Token* out) const {
  const std::int64_t page_size = tree_.page_size();
  if (const auto dropped = std::min<std::int64_t>(to, dropped_.size()); from < dropped) {
    out = std::copy(dropped_.begin() + from, dropped_.begin() + dropped, out);
    from = dropped;
  }
  while (from < to) {
    const std::int64_t offset = from % page_size, part = std::min(page_size - offset, to - from);
    const Token* tokens = tree_.tokens(pages_[from / page_size]) + offset;
    std::memcpy(out, tokens, part * sizeof(Token));
    out += part;
    from += part;
  }
}

// --- it begins -------------------------------------------------------------------------------------------------------

// Its pages_ have their final size, those of the match in front. Nothing here fails.
void Lease::start(const Match& match, const Token* tokens, std::int64_t n) {
  cache_->enlist(*this);
  started_ = tree_.pages_taken();
  const std::int64_t shared = static_cast<std::int64_t>(match.pages) * tree_.page_size();
  node_ = tree_.end_of(match);
  tree_.lock(node_);
  const NodeId source = match.partial > 0 ? tree_.isolate(match.source) : kNone;
  num_shared_ = match.pages;
  const bool in_place = take_pages(static_cast<std::int32_t>(pages_.size()) - match.pages, match.source_page);
  if (source != kNone) copy_open_page(source, match.source_page, match.partial, in_place);
  num_tokens_ = shared;
  write_tokens(tokens + shared, n - shared);
  num_prompt_ = n;
  num_cached_ = num_written_ = shared + match.partial;
}

// Fills the last `need` places of pages_. Where the copy source itself is among the evicted pages it becomes the copy:
// true, and nothing is left to copy.
bool Lease::take_pages(std::int32_t need, PageId source) {
  return tree_.take(space_, pages_.data() + pages_.size() - need, need, source);
}

// The first page of its own begins with `tokens` tokens of `page`, the page of node `source`.
void Lease::copy_open_page(NodeId source, PageId page, std::int32_t tokens, bool in_place) {
  if (in_place) return;
  const PageId target = pages_[num_shared_];
  std::memcpy(tree_.tokens(target), tree_.tokens(page), tokens * sizeof(Token));
  tree_.hold(source);
  source_ = source;
  copy_ = {page, target, tokens};
}

void Lease::write_tokens(const Token* tokens, std::int64_t n) {
  const std::int64_t page_size = tree_.page_size();
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t at = num_tokens_ + done, offset = at % page_size;
    const auto first = static_cast<std::size_t>(at / page_size);
    // Pages with ascending ids lie side by side.
    std::int64_t stretch = page_size - offset;
    for (std::size_t k = first + 1; stretch < n - done && pages_[k] == pages_[k - 1] + 1; ++k) stretch += page_size;
    const std::int64_t part = std::min(stretch, n - done);
    std::memcpy(tree_.tokens(pages_[first]) + offset, tokens + done, part * sizeof(Token));
    done += part;
  }
  num_tokens_ += n;
}

// --- it grows --------------------------------------------------------------------------------------------------------

void Lease::extend(const Token* tokens, std::int64_t n, bool prompt) {
  change();
  if (n == 0) return;
  Cache::Guard guard(cache_->mutex_);
  cache_->check_open();
  Cache::check_tokens(tokens, n, 0);
  cache_->check_length(num_tokens_ + n, std::max(0, first_page_ - num_shared_));
  const std::size_t total = pages_for(num_tokens_ + n);
  if (total > pages_.capacity()) pages_.reserve(std::max(total, 2 * pages_.size()));
  const auto more = static_cast<std::int32_t>(total - pages_.size());
  // An open page that a commit published never changes: go on in a copy of it. Where no page is left for the copy and
  // nobody else has use for the published one, it leaves the tree and is written to again.
  const NodeId tail = tail_;
  const bool back = tail != kNone && more == tree_.room(space_, 0).all() && tree_.only_lease(tail);
  const std::int32_t need = more + (tail != kNone && !back ? 1 : 0);
  cache_->require_pages(space_, need, 0);
  if (prompt) note_prompt(tokens, n);

  tree_.serving(number_);
  const PageId open = pages_.back();
  if (back) tree_.take_back(tail);
  pages_.resize(total);
  take_pages(need, kNone);
  if (tail != kNone && !back) {
    ++version_;
    copy_open_page(tail, open, static_cast<std::int32_t>(num_tokens_ % tree_.page_size()), false);
    tree_.unlock(tail);
  }
  tail_ = kNone;
  write_tokens(tokens, n);
}

// The next n tokens are input as those that acquire() was given.
void Lease::note_prompt(const Token* tokens, std::int64_t n) {
  if (tree_.what_if() != nullptr) note_missed(tokens, n);
  if (num_prompt_ == num_tokens_) num_prompt_ += n;
  cache_->input_tokens_ += n;
  tree_.spaces().given(space_, n);
}

// A pool that had hit all before them may have hit the pages that these tokens fill.
void Lease::note_missed(const Token* tokens, std::int64_t n) {
  if (num_prompt_ != num_tokens_) missed_.page = kNone;  // they follow an answer
  if (missed_.page != kNone) {
    const std::int64_t begin = missed_.page * tree_.page_size();
    std::vector<Token> all(num_tokens_ - begin + n);
    copy_tokens(begin, num_tokens_, all.data());
    std::copy(tokens, tokens + n, all.data() + (num_tokens_ - begin));
    tree_.count_missed(missed_, all.data(), num_tokens_ + n);
  }
  tree_.what_if()->request(n, 0);
}

void Lease::advance(std::int64_t n) {
  change();
  Cache::Guard guard(cache_->mutex_);
  note_written(n);
}

void Lease::note_written(std::int64_t n) {
  const std::int64_t unwritten = num_tokens_ - num_written_;
  if (n < 0) n = unwritten;
  if (n > unwritten) {
    invalid("advance by " + str(n) + ": only " + str(unwritten) + " of " + str(num_tokens_) +
            " tokens are unwritten; extend() first");
  }
  if (source_ != kNone) tree_.drop_hold(source_);
  source_ = kNone;
  num_written_ += n;
}

// Its private pages from here on.
void Lease::give_back_from(std::size_t first) {
  if (first == pages_.size()) return;
  tree_.give_back(space_, pages_.data() + first, static_cast<std::int32_t>(pages_.size() - first));
  pages_.resize(first);
}

// Shared pages leave the view only; private ones are freed.
std::int64_t Lease::drop(std::int64_t num_tokens) {
  change();
  Cache::Guard guard(cache_->mutex_);
  if (num_tokens < 0 || num_tokens > num_written_) {
    invalid("drop the first " + str(num_tokens) + " tokens: only the " + str(num_written_) +
            " written ones can be dropped");
  }
  const auto first = static_cast<std::int32_t>(num_tokens / tree_.page_size());
  if (first <= first_page_) return 0;
  const std::int64_t known = num_dropped(), to = static_cast<std::int64_t>(first) * tree_.page_size();
  std::vector<Token> tokens(to - known);
  read_tokens(known, to, tokens.data());
  dropped_.insert(dropped_.end(), tokens.begin(), tokens.end());

  // Nothing below fails.
  const std::int32_t own = std::max(num_shared_, first_page_);
  if (first > own) {
    tree_.give_back(space_, pages_.data() + own, first - own);
    std::fill(pages_.begin() + own, pages_.begin() + first, kNone);
  }
  first_page_ = first;
  ++version_;
  return std::max(0, first - own);
}

// What truncate() leaves in any case: what the tree has of it, found or published, and where a copy is still to go.
std::int64_t Lease::least_tokens() const {
  const std::int64_t page_size = tree_.page_size(), shared = num_shared_ * page_size;
  const std::int64_t published = tail_ != kNone ? num_tokens_ : shared;
  const std::int64_t copied = source_ != kNone ? shared + copy_.tokens : 0;
  return std::max({std::int64_t{1}, num_cached_, published, copied, first_page_ * page_size});
}

std::int64_t Lease::truncate(std::int64_t num_tokens) {
  change();
  Cache::Guard guard(cache_->mutex_);
  if (num_tokens > num_tokens_) {
    invalid("truncate to " + str(num_tokens) + " tokens: the lease has " + str(num_tokens_) +
            "; extend() makes it longer");
  }
  if (const std::int64_t least = least_tokens(); num_tokens < least) {
    invalid("truncate to " + str(num_tokens) + " tokens: the first " + str(least) +
            " were found in the cache, published by commit() or dropped, and stay: keep those, or release() this lease "
            "and acquire() the shorter prompt");
  }
  const std::int32_t keep = pages_for(num_tokens), freed = static_cast<std::int32_t>(pages_.size()) - keep;
  give_back_from(keep);
  num_tokens_ = num_tokens;
  num_written_ = std::min(num_written_, num_tokens);
  if (num_prompt_ > num_tokens) missed_.page = kNone;
  num_prompt_ = std::min(num_prompt_, num_tokens);
  return freed;
}

// --- it publishes: from its own place in the tree, O(new pages) -----------------------------------------------------

void Lease::commit() {
  change();
  Cache::Guard guard(cache_->mutex_);
  publish_written(false);
}

// What the tiers restored, where it was: as pages of the namespace that had published them.
void Lease::commit_as(std::string_view name) {
  change();
  Cache::Guard guard(cache_->mutex_);
  const Spaces& spaces = tree_.spaces();
  SpaceId above = spaces.find(name);
  if (above == kNone || !spaces.within(space_, above)) {
    invalid("commit as '" + std::string(name) + "': the lease is of '" + name_ + "', which does not see that");
  }
  tree_.serving(number_);
  if (!may_publish()) return;
  tree_.make_space(name, above);  // which the journal may not know yet
  if (const SpaceId here = tree_.space_of(node_); !spaces.within(above, here)) above = here;  // none goes on above it
  publish_full(above);
}

bool Lease::may_publish() const {
  if (cleared()) return false;         // its namespace was cleared: these tokens are not to be found again
  if (tail_ != kNone) return false;    // an earlier commit published the open page, and nothing came after
  if (source_ != kNone) return false;  // nobody has said that the open page's copy is made; the rest is shared
  return first_page_ <= num_shared_;   // else what comes next was dropped
}

// Closing, returns the page that another request published with the very tokens of the open page, if there is one.
NodeId Lease::publish_written(bool closing) {
  tree_.serving(number_);
  if (!may_publish()) return kNone;
  publish_full(space_);
  const auto rest = static_cast<std::int32_t>(num_written_ % tree_.page_size());
  // A page with unwritten tokens is still to be written to, so it waits; a published page never changes.
  return rest > 0 && (closing || num_written_ == num_tokens_) ? publish_open(rest, closing) : kNone;
}

// As pages of `space`: its own namespace, or one above.
void Lease::publish_full(SpaceId space) {
  const std::int32_t page_size = tree_.page_size();
  const auto full = static_cast<std::int32_t>(num_written_ / page_size);
  while (num_shared_ < full) {
    const RadixTree::Child seen = tree_.seen_child(node_, space, pages_[num_shared_], page_size);
    if (seen.shared == page_size) {
      fold(seen.node, full);
      continue;
    }
    const RadixTree::Child own = own_child(seen, space, page_size);
    publish(space, full, own.whole ? own.node : kNone);
  }
}

// The child of `space` that shares the most with its first unpublished page, where `seen` is that of all it sees.
RadixTree::Child Lease::own_child(const RadixTree::Child& seen, SpaceId space, std::int32_t count) const {
  if (tree_.space_of(node_) == space) return seen;  // no other has children here
  return tree_.own_child(node_, space, pages_[num_shared_], count);
}

// Another request published `child` first: use its pages and free the duplicates.
void Lease::fold(NodeId child, std::int32_t full) {
  ++version_;
  const std::int32_t k = tree_.replace_duplicates(child, space_, pages_.data() + num_shared_, full - num_shared_);
  const NodeId node = tree_.upper(child, k);
  tree_.lock(node);
  tree_.unlock(node_);
  node_ = node;
  num_shared_ += k;
}

// The rest of the full pages is new; `shorter` is an open page that is a prefix of the first of them, if there is one.
void Lease::publish(SpaceId space, std::int32_t full, NodeId shorter) {
  const PageId* run = pages_.data() + num_shared_;
  const std::int32_t count = full - num_shared_;
  const bool pinned = shorter != kNone && tree_.pinned(shorter);
  if (shorter != kNone) tree_.remove_open(shorter);
  tree_.spaces().moved(space_, space, count);
  if (!pinned && tree_.can_append(node_, space)) {
    tree_.append(node_, run, count);
  } else {
    const NodeId node = tree_.add(node_, space, run, count, tree_.page_size());
    tree_.lock(node);
    tree_.unlock(node_);
    node_ = node;
    if (pinned) cache_->move_pins(shorter, tree_.isolate(node));
  }
  num_shared_ = full;
  cache_->committed_tokens_ += static_cast<std::int64_t>(count) * tree_.page_size();
}

NodeId Lease::publish_open(std::int32_t tokens, bool closing) {
  const PageId page = pages_[num_shared_];
  const RadixTree::Child seen = tree_.seen_child(node_, space_, page, tokens);
  if (seen.shared == tokens) {  // a page of the tree begins with these tokens already
    if (!closing) return kNone;
    const NodeId node = tree_.isolate(seen.node);
    tree_.lock(node);
    tree_.unlock(node);  // used just now
    return seen.whole ? node : kNone;
  }
  const RadixTree::Child own = own_child(seen, space_, tokens);
  const NodeId shorter = own.whole ? own.node : kNone;
  const bool pinned = shorter != kNone && tree_.pinned(shorter);
  if (shorter != kNone) tree_.remove_open(shorter);
  tail_ = tree_.add(node_, space_, &page, 1, tokens);
  tree_.lock(tail_);
  if (pinned) cache_->move_pins(shorter, tail_);
  cache_->committed_tokens_ += tokens;
  return kNone;
}

// --- it ends, or goes on twice ---------------------------------------------------------------------------------------

void Lease::release(bool commit, bool cold) {
  change();
  Cache::Guard guard(cache_->mutex_);
  let_go(commit, cold);
}

void Lease::let_go(bool commit, bool cold) {
  const NodeId twin = commit ? publish_written(true) : kNone;
  const NodeId end = twin != kNone ? twin : tail_ != kNone ? tail_ : node_;
  const bool gone = tree_.detached(end);
  if (Journal* journal = tree_.journal()) record(*journal);
  if (source_ != kNone) tree_.drop_hold(source_);
  give_back_from(pages_.size() - num_private());
  tree_.used(tail_ != kNone ? tail_ : node_, started_, num_cached_, num_tokens_);
  if (tail_ != kNone) tree_.unlock(tail_);
  tree_.unlock(node_);
  if (cold && !gone) tree_.end_session(end, space_);
  cache_->delist(*this);
}

void Lease::record(Journal& journal) const noexcept {
  try {
    Release release{name_, num_prompt_, std::vector<Token>(num_tokens_), number_, num_cached_, journal.end()};
    copy_tokens(0, num_tokens_, release.tokens.data());
    journal.released(std::move(release));
  } catch (...) {
    journal.lost_release();
  }
}

std::unique_ptr<Lease> Lease::fork() {
  change();
  Cache::Guard guard(cache_->mutex_);
  cache_->check_open();
  check_fork();
  auto child = std::make_unique<Lease>(cache_, name_);
  child->pages_.reserve(pages_.size());
  child->dropped_ = dropped_;
  cache_->require_pages(space_, num_tokens_ % tree_.page_size() > 0 ? 1 : 0, 0);
  try {
    share_with(*child);
  } catch (...) {  // as in Cache::acquire
    (void)child.release();
    throw;
  }
  return child;
}

void Lease::check_fork() const {
  if (num_written_ != num_tokens_ || source_ != kNone) {
    fail(ErrorKind::LeaseError, "fork needs every token written and every copy made: " + str(num_written_) + " of " +
                                    str(num_tokens_) + " are written; run the step or advance() first");
  }
  if (cleared()) {
    fail(ErrorKind::LeaseError, "cannot fork: the namespace was cleared; acquire the tokens again");
  }
  if (first_page_ > num_shared_) {
    fail(ErrorKind::LeaseError, "cannot fork: the first " + str(num_dropped()) + " tokens were dropped, " +
                                    str(static_cast<std::int64_t>(num_shared_) * tree_.page_size()) +
                                    " of them committed; commit() before drop()");
  }
}

// Sharing goes through the tree. The child's memory is there, and so is a page for its copy of the open page.
void Lease::share_with(Lease& child) {
  publish_written(false);
  child.space_ = space_;
  child.cleared_ = cleared_;
  cache_->enlist(child);
  ++cache_->forks_;
  child.pages_ = pages_;
  child.node_ = node_;
  child.num_shared_ = num_shared_;
  child.first_page_ = first_page_;
  child.num_prompt_ = num_prompt_;
  child.started_ = tree_.pages_taken();
  child.number_ = number_;
  child.num_cached_ = child.num_written_ = child.num_tokens_ = num_tokens_;
  tree_.lock(child.node_);
  const auto rest = static_cast<std::int32_t>(num_tokens_ % tree_.page_size());
  if (rest > 0) {
    const NodeId found = tail_ != kNone ? tail_ : tree_.seen_child(node_, space_, pages_.back(), rest).node;
    const PageId page = tree_.first_page(found);
    const NodeId source = tree_.isolate(found);
    const bool in_place = child.take_pages(1, page);
    child.copy_open_page(source, page, rest, in_place);
  }
}

}  // namespace radixkv
