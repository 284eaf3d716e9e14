// The arrays of one step over a batch of leases, in FlashInfer's layout and names, written into reused buffers.
//
//   qo_indptr [B+1]         first row of each request; its rows are its tokens that are not yet written
//   kv_indptr [B+1]         first entry of each request in kv_indices
//   kv_indices              page ids
//   kv_last_page_len [B]    tokens in its last page: length = (pages - 1) * page_size + kv_last_page_len
//   slots [rows]            page * page_size + offset: where each row's K and V go
//   input_ids, positions [rows], last_rows [B]   what a model's forward pass takes (int64, as torch indexes)
//   copy_source, copy_target                     pages to copy before anything is written
//
// A step is open from begin() to end(). Its leases cannot change in between: they have as many unwritten tokens in the
// end as rows were planned for them, and nobody else gets their pages.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "cache/cache.hpp"
#include "step/table_view.hpp"

namespace radixkv {

class PageTable {
 public:
  explicit PageTable(std::shared_ptr<Cache> cache) : cache_(std::move(cache)) {}
  ~PageTable() { let_go(); }
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  // Opens a step over the unwritten tokens of these leases, which must live until it ends. O(pages + rows).
  // Throws LeaseError (released, another thread's, in a step; or a step of this table is open) or InvalidArgument
  // (empty batch, a lease twice, from another cache, or with nothing to compute); then no step is open.
  void begin(const std::vector<Lease*>& leases);
  // Ends it: with `written`, every planned row is, and each lease advances by its own; otherwise none does. Throws
  // LeaseError, and leaves it open, in another thread than the one that opened it.
  void end(bool written);
  // Ends it from any thread, advancing nothing; nothing if none is open. For a step that nobody left.
  void let_go() noexcept;

  std::int32_t num_pages() const { return cache_->num_pages(); }
  std::int32_t page_size() const { return cache_->page_size(); }
  PageTableView view() const {
    return PageTableView{static_cast<std::int32_t>(kv_last_page_len.size()), qo_indptr.data(), kv_indptr.data(),
                         kv_indices.data(), kv_last_page_len.data()};
  }

  // How far back every row may look without missing a dropped page, in keys before its own; -1: as far as it likes.
  std::int64_t window_limit = -1;

  std::vector<std::int32_t> qo_indptr{0}, kv_indptr{0}, kv_indices, kv_last_page_len, slots;
  std::vector<std::int32_t> copy_source, copy_target;
  std::vector<std::int64_t> input_ids, positions, last_rows;

 private:
  void take(const std::vector<Lease*>& leases);
  void assemble();
  void add(const Lease& lease, std::int32_t page_size);
  void add_rows(const Lease& lease, std::int32_t page_size);

  std::shared_ptr<Cache> cache_;
  std::atomic<bool> open_{false};
  std::thread::id thread_;      // that opened the step
  std::vector<Lease*> leases_;  // of the open step
};

}  // namespace radixkv
