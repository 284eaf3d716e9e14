#include "page_table.hpp"

#include <algorithm>

namespace radixkv {

namespace {
[[noreturn]] void refuse(std::size_t i, const std::string& why) {
  throw Error(ErrorKind::InvalidArgument, "lease " + std::to_string(i) + " " + why);
}
}  // namespace

void PageTable::check(const std::vector<Lease*>& leases) {
  if (leases.empty()) throw Error(ErrorKind::InvalidArgument, "a step needs at least one lease; got 0");
  Cache* const cache = leases[0]->cache_.get();
  const std::uint64_t mark = cache->new_step_mark();
  for (std::size_t i = 0; i < leases.size(); ++i) {
    Lease& lease = *leases[i]->use();
    if (lease.num_written_ == lease.num_tokens_) {
      refuse(i, "has nothing to compute: all of its " + std::to_string(lease.num_tokens_) +
                    " tokens are written; extend() it first");
    }
    if (lease.cache_.get() != cache) refuse(i, "is of another cache");
    if (lease.step_mark == mark) refuse(i, "is listed twice in this step");
    lease.step_mark = mark;
  }
}

void PageTable::assemble(const std::vector<Lease*>& leases) {
  check(leases);
  for (auto* v : {&kv_indices, &kv_last_page_len, &slots, &copy_source, &copy_target}) v->clear();
  for (auto* v : {&input_ids, &positions, &last_rows}) v->clear();
  qo_indptr.assign(1, 0);
  kv_indptr.assign(1, 0);
  window_limit = -1;
  const std::int32_t page_size = leases[0]->cache_->page_size();
  // Page lists and tokens lie anywhere in memory: fetched some leases ahead, they are there when it is their turn.
  for (std::size_t i = 0; i < leases.size(); ++i) {
    if (i + 8 < leases.size()) prefetch(&leases[i + 8]->pages_.back(), 4);
    if (i + 4 < leases.size()) {
      const Lease& next = *leases[i + 4];
      prefetch(next.tokens_of(next.pages_.back()), 64);
      prefetch(next.pages_.data() + next.first_page_, (next.pages_.size() - next.first_page_) * sizeof(PageId));
    }
    add(*leases[i], page_size);
  }
}

void PageTable::add(const Lease& lease, std::int32_t page_size) {
  kv_indices.insert(kv_indices.end(), lease.pages_.begin() + lease.first_page_, lease.pages_.end());
  kv_indptr.push_back(static_cast<std::int32_t>(kv_indices.size()));
  kv_last_page_len.push_back(static_cast<std::int32_t>((lease.num_tokens_ - 1) % page_size + 1));
  add_rows(lease, page_size);
  qo_indptr.push_back(static_cast<std::int32_t>(slots.size()));
  last_rows.push_back(static_cast<std::int64_t>(slots.size()) - 1);
  if (lease.first_page_ > 0) {  // the lease's first row looks back the furthest
    const std::int64_t limit = lease.num_written_ - static_cast<std::int64_t>(lease.first_page_) * page_size;
    window_limit = window_limit < 0 ? limit : std::min(window_limit, limit);
  }
  if (lease.source_ != kNone) {
    copy_source.push_back(lease.copy_.source);
    copy_target.push_back(lease.copy_.target);
  }
}

// Page by page: a page's rows have neighbouring slots, and its tokens lie at the page's own place.
void PageTable::add_rows(const Lease& lease, std::int32_t page_size) {
  for (std::int64_t at = lease.num_written_; at < lease.num_tokens_;) {
    const PageId page = lease.pages_[at / page_size];
    const auto offset = static_cast<std::int32_t>(at % page_size);
    const auto end = static_cast<std::int32_t>(std::min<std::int64_t>(page_size, offset + lease.num_tokens_ - at));
    const Token* const tokens = lease.tokens_of(page);
    for (std::int32_t i = offset; i < end; ++i, ++at) {
      input_ids.push_back(tokens[i]);
      positions.push_back(at);
      slots.push_back(page * page_size + i);
    }
  }
}

}  // namespace radixkv
