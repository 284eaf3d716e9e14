// The arrays of one step over a batch of leases, in FlashInfer's layout and names, written into reused buffers.
//
//   qo_indptr [B+1]         first row of each request; its rows are its tokens that are not yet written
//   kv_indptr [B+1]         first entry of each request in kv_indices
//   kv_indices              page ids
//   kv_last_page_len [B]    tokens in its last page: length = (pages - 1) * page_size + kv_last_page_len
//   slots [rows]            page * page_size + offset: where each row's K and V go
//   input_ids, positions [rows], last_rows [B]   what a model's forward pass takes (int64, as torch indexes)
//   copy_source, copy_target                     pages to copy before anything is written
#pragma once

#include <vector>

#include "cache.hpp"

namespace radixkv {

class PageTable {
 public:
  // Throws LeaseError (released, another thread's) or InvalidArgument (empty batch, a lease twice, from another cache,
  // or with nothing to compute) and is then unchanged in what it means: call assemble again. O(pages + rows).
  void assemble(const std::vector<Lease*>& leases);

  // How far back every row may look without missing a dropped page, in keys before its own; -1: as far as it likes.
  std::int64_t window_limit = -1;

  std::vector<std::int32_t> qo_indptr, kv_indptr, kv_indices, kv_last_page_len, slots;
  std::vector<std::int32_t> copy_source, copy_target;
  std::vector<std::int64_t> input_ids, positions, last_rows;

 private:
  static void check(const std::vector<Lease*>& leases);
  void add(const Lease& lease, std::int32_t page_size);
  void add_rows(const Lease& lease, std::int32_t page_size);
};

}  // namespace radixkv
