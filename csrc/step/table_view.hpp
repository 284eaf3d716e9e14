// The CSR view of a step's page table that everything below it takes.
#pragma once

#include <cstdint>

namespace radixkv {

// The CSR arrays of one step: request b has the rows qo_indptr[b]..qo_indptr[b + 1] and the pages
// kv_indices[kv_indptr[b]..kv_indptr[b + 1]], the last of which holds kv_last_page_len[b] keys, new rows included.
struct PageTableView {
  std::int32_t batch_size;
  const std::int32_t* qo_indptr;         // [batch_size + 1]
  const std::int32_t* kv_indptr;         // [batch_size + 1]
  const std::int32_t* kv_indices;        // [kv_indptr[batch_size]]
  const std::int32_t* kv_last_page_len;  // [batch_size]

  std::int32_t num_rows(std::int32_t b) const { return qo_indptr[b + 1] - qo_indptr[b]; }
  std::int64_t kv_len(std::int32_t b, std::int32_t page_size) const {
    const std::int64_t pages = kv_indptr[b + 1] - kv_indptr[b];
    return pages == 0 ? 0 : (pages - 1) * page_size + kv_last_page_len[b];
  }
};

}  // namespace radixkv
