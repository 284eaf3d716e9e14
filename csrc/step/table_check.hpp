// What a page table that no cache made must satisfy before anything is made of it.
#pragma once

#include <cstdint>
#include <span>

#include "step/step_table.hpp"

namespace radixkv {

// The arrays of a step of B requests in FlashInfer's layout and names, lengths unchecked.
struct TableArrays {
  std::span<const std::int32_t> qo_indptr, kv_indptr, kv_indices, kv_last_page_len, slots;
};

// A copy of these arrays. Throws Error (InvalidArgument) unless they describe a step over a pool of these pages: indptr
// monotone from 0, a row in every request, pages == ceil(kv_len / page_size) >= what the new rows need, 1 <= last page
// length <= page_size, page ids below num_pages, and each row's slot that of its position in its request's pages. The
// last ties slots to pages and lengths: a surplus page or a length that is off by one is in every range.
StepTable checked_table(const TableArrays& arrays, std::int32_t num_pages, std::int32_t page_size);

}  // namespace radixkv
