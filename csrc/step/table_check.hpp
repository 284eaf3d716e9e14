// What a step's page table must satisfy before anything is made of it.
#pragma once

#include <cstdint>

#include "step/table_view.hpp"

namespace radixkv {

// Throws Error (InvalidArgument) unless: indptr monotone from 0, a row in every request, pages == ceil(kv_len / page_size)
// >= what the new rows need, 1 <= last page length <= page_size, page ids below num_pages.
void check_table(const PageTableView& table, std::int32_t page_size, std::int64_t num_pages);

// Throws Error (InvalidArgument) unless every id is in [0, limit).
void check_range(const char* name, const std::int32_t* ids, std::int64_t count, std::int64_t limit);

}  // namespace radixkv
