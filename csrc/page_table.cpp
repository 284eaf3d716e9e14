#include "page_table.hpp"

#include <algorithm>

namespace radixkv {

namespace {
void check_batch(const std::vector<Lease*>& leases) {
  if (leases.empty()) throw Error(ErrorKind::InvalidArgument, "a step needs at least one lease; got 0");
  const std::uint64_t mark = leases[0]->cache().new_step_mark();
  for (std::size_t i = 0; i < leases.size(); ++i) {
    Lease& lease = *leases[i];
    const std::string which = "lease " + std::to_string(i);
    if (lease.num_written() == lease.num_tokens()) {
      throw Error(ErrorKind::InvalidArgument, which + " has nothing to compute: all of its " +
                                                  std::to_string(lease.num_tokens()) +
                                                  " tokens are written; extend() it first");
    }
    if (&lease.cache() != &leases[0]->cache()) throw Error(ErrorKind::InvalidArgument, which + " is of another cache");
    if (lease.step_mark == mark) throw Error(ErrorKind::InvalidArgument, which + " is listed twice in this step");
    lease.step_mark = mark;
  }
}
}  // namespace

void PageTable::assemble(const std::vector<Lease*>& leases) {
  check_batch(leases);
  for (auto* v : {&kv_indices, &kv_last_page_len, &slots, &copy_source, &copy_target}) v->clear();
  for (auto* v : {&input_ids, &positions, &last_rows}) v->clear();
  qo_indptr.assign(1, 0);
  kv_indptr.assign(1, 0);
  window_limit = -1;
  const std::int32_t page_size = leases[0]->cache().page_size();
  for (const Lease* lease : leases) {
    const std::vector<PageId>& pages = lease->pages();
    kv_indices.insert(kv_indices.end(), pages.begin() + lease->first_page(), pages.end());
    kv_indptr.push_back(static_cast<std::int32_t>(kv_indices.size()));
    kv_last_page_len.push_back(static_cast<std::int32_t>((lease->num_tokens() - 1) % page_size + 1));
    add_rows(*lease);
    qo_indptr.push_back(static_cast<std::int32_t>(slots.size()));
    last_rows.push_back(static_cast<std::int64_t>(slots.size()) - 1);
    if (lease->first_page() > 0) {  // the lease's first row looks back the furthest
      const std::int64_t limit = lease->num_written() - lease->num_dropped();
      window_limit = window_limit < 0 ? limit : std::min(window_limit, limit);
    }
    if (PageCopy copy; lease->copy(&copy)) {
      copy_source.push_back(copy.source);
      copy_target.push_back(copy.target);
    }
  }
}

void PageTable::add_rows(const Lease& lease) {
  const std::int64_t from = lease.num_written(), to = lease.num_tokens();
  const std::int32_t page_size = lease.cache().page_size();
  row_tokens_.resize(to - from);
  lease.read_tokens(from, to, row_tokens_.data());
  input_ids.insert(input_ids.end(), row_tokens_.begin(), row_tokens_.end());
  const std::vector<PageId>& pages = lease.pages();
  for (std::int64_t at = from; at < to; ++at) {
    positions.push_back(at);
    slots.push_back(static_cast<std::int32_t>(pages[at / page_size] * page_size + at % page_size));
  }
}

}  // namespace radixkv
