#include "step/page_table.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace radixkv {

namespace {
[[noreturn]] void refuse(std::size_t i, const std::string& why) { invalid("lease " + str(i) + " " + why); }
}  // namespace

PageTable::PageTable(std::shared_ptr<Cache> cache) : cache_(std::move(cache)) {
  table_.num_pages = cache_->num_pages();
  table_.page_size = cache_->page_size();
  table_.lists->close();  // no step is open
}

void PageTable::begin(const std::vector<Lease*>& leases, std::int64_t max_rows) {
  if (open_.exchange(true)) {
    fail(ErrorKind::LeaseError, "another step of this engine is open: leave it first");
  }
  thread_ = std::this_thread::get_id();
  try {
    take(leases);
    assemble(max_rows);
  } catch (...) {
    let_go();
    throw;
  }
}

// Every lease that can be in this step is marked as being in it.
void PageTable::take(const std::vector<Lease*>& leases) {
  if (leases.empty()) invalid("a step needs at least one lease; got 0");
  leases_.reserve(leases.size());
  for (std::size_t i = 0; i < leases.size(); ++i) {
    Lease& lease = *leases[i]->use();
    if (lease.cache_ != cache_) refuse(i, "is of another cache: a step takes leases that its own engine acquired");
    if (lease.in_step_.load() && std::find(leases_.begin(), leases_.end(), &lease) != leases_.end()) {
      refuse(i, "is listed twice in this step");
    }
    lease.check_free();
    if (lease.num_written_ == lease.num_tokens_) {
      refuse(i,
             "has nothing to compute: all of its " + str(lease.num_tokens_) + " tokens are written; extend() it first");
    }
    lease.in_step_.store(true);
    leases_.push_back(&lease);
  }
}

void PageTable::end(bool written) {
  if (!open_.load()) return;
  if (thread_ != std::this_thread::get_id()) {
    fail(ErrorKind::LeaseError, "the step belongs to another thread: leave it in the thread that entered it");
  }
  if (written) {
    const Cache::Guard guard(cache_->mutex_);
    for (std::size_t i = 0; i < leases_.size(); ++i)
      leases_[i]->note_written(table_.view().num_rows(static_cast<std::int32_t>(i)));
  }
  let_go();
}

void PageTable::let_go() noexcept {
  table_.lists->close();
  for (Lease* lease : leases_) lease->in_step_.store(false);
  leases_.clear();
  open_.store(false);
}

void PageTable::assemble(std::int64_t max_rows) {
  table_.lists = std::make_shared<PageLists>();
  table_.qo_indptr.assign(1, 0);
  for (auto* v : {&table_.page_counts, &table_.kv_last_page_len, &table_.slots, &copy_source_, &copy_target_}) {
    v->clear();
  }
  for (auto* v : {&inputs_.input_ids, &inputs_.positions, &inputs_.last_rows}) v->clear();
  table_.pages.clear();
  table_.list_ids.clear();
  window_limit_ = -1;
  // Page lists and tokens lie anywhere in memory: fetched some leases ahead, they are there when it is their turn.
  for (std::size_t i = 0; i < leases_.size(); ++i) {
    if (i + 8 < leases_.size()) prefetch(&leases_[i + 8]->pages_.back(), 4);
    if (i + 4 < leases_.size()) prefetch(leases_[i + 4]->tree_.tokens(leases_[i + 4]->pages_.back()), 64);
    add(*leases_[i], max_rows);
  }
}

void PageTable::add(const Lease& lease, std::int64_t max_rows) {
  const std::int32_t page_size = table_.page_size;
  const std::int64_t end = lease.num_written_ + std::min(lease.num_tokens_ - lease.num_written_, max_rows);
  const auto last = static_cast<std::int32_t>((end - 1) / page_size);  // its last page in this step
  table_.pages.push_back(lease.pages_.data() + lease.first_page_);
  table_.page_counts.push_back(last + 1 - lease.first_page_);
  table_.list_ids.push_back(PageListId{lease.id_, lease.version_});
  table_.kv_last_page_len.push_back(static_cast<std::int32_t>(end - static_cast<std::int64_t>(last) * page_size));
  add_rows(lease, end);
  table_.qo_indptr.push_back(static_cast<std::int32_t>(table_.slots.size()));
  inputs_.last_rows.push_back(table_.num_rows() - 1);
  if (lease.first_page_ > 0) {  // the lease's first row looks back the furthest
    const std::int64_t limit = lease.num_written_ - static_cast<std::int64_t>(lease.first_page_) * page_size;
    window_limit_ = window_limit_ < 0 ? limit : std::min(window_limit_, limit);
  }
  if (lease.source_ != kNone) {
    copy_source_.push_back(lease.copy_.source);
    copy_target_.push_back(lease.copy_.target);
  }
}

// Up to token `end`, page by page: a page's rows have neighbouring slots, and its tokens lie at the page's own place.
void PageTable::add_rows(const Lease& lease, std::int64_t end) {
  const std::int32_t page_size = table_.page_size;
  for (std::int64_t at = lease.num_written_; at < end;) {
    const PageId page = lease.pages_[at / page_size];
    const auto offset = static_cast<std::int32_t>(at % page_size);
    const auto last = static_cast<std::int32_t>(std::min<std::int64_t>(page_size, offset + end - at));
    const Token* const tokens = lease.tree_.tokens(page);
    for (std::int32_t i = offset; i < last; ++i, ++at) {
      inputs_.input_ids.push_back(tokens[i]);
      inputs_.positions.push_back(at);
      table_.slots.push_back(page * page_size + i);
    }
  }
}

}  // namespace radixkv
