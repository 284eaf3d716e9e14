// A step's page table, as everything below it reads it.
#pragma once

#include <cstdint>

namespace radixkv {

// Request b has the rows qo_indptr[b]..qo_indptr[b + 1] and the page_counts[b] pages at pages[b], the last of which
// holds kv_last_page_len[b] keys, new rows included. The pages lie where their owner keeps them: see StepTable.
struct PageTableView {
  std::int32_t batch_size;
  std::int32_t page_size;
  const std::int32_t* qo_indptr;         // [batch_size + 1]
  const std::int32_t* const* pages;      // [batch_size]
  const std::int32_t* page_counts;       // [batch_size]
  const std::int32_t* kv_last_page_len;  // [batch_size]
  const std::int32_t* slots;             // [qo_indptr[batch_size]]: page * page_size + offset of each row's K and V

  std::int32_t num_rows(std::int32_t b) const { return qo_indptr[b + 1] - qo_indptr[b]; }
  std::int64_t kv_len(std::int32_t b) const {
    const std::int64_t count = page_counts[b];
    return count == 0 ? 0 : (count - 1) * page_size + kv_last_page_len[b];
  }
};

}  // namespace radixkv
