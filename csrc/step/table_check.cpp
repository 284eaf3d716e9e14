#include "step/table_check.hpp"

#include <algorithm>
#include <string>

#include "base/error.hpp"

namespace radixkv {
namespace {

void check_indptr(const char* name, const std::int32_t* indptr, std::int32_t batch_size) {
  if (indptr[0] != 0) invalid(std::string(name) + "[0] is " + str(indptr[0]) + ": it must be 0");
  for (std::int32_t b = 0; b < batch_size; ++b) {
    if (indptr[b + 1] < indptr[b]) {
      invalid(std::string(name) + "[" + str(b + 1) + "] is " + str(indptr[b + 1]) + " after " + str(indptr[b]) +
              ": it must not decrease");
    }
  }
}

void check_request(const PageTableView& table, std::int32_t b, std::int32_t page_size) {
  const std::int64_t rows = table.num_rows(b);
  const std::int64_t pages = table.kv_indptr[b + 1] - table.kv_indptr[b];
  const std::int32_t last = table.kv_last_page_len[b];
  const auto who = [&] { return "request " + str(b); };
  if (rows == 0) invalid(who() + " has no new row: leave it out of the step");
  if (pages == 0) invalid(who() + " has " + str(rows) + " rows and no page: give it ceil(length / page_size) pages");
  if (last < 1 || last > page_size) {
    invalid(who() + ": kv_last_page_len is " + str(last) + ": it must be 1 to page_size = " + str(page_size));
  }
  const std::int64_t kv_len = table.kv_len(b, page_size);
  if (kv_len < rows) {
    invalid(who() + " has " + str(rows) + " new rows but a length of " + str(kv_len) +
            ": its length includes the new rows");
  }
}

}  // namespace

void check_range(const char* name, const std::int32_t* ids, std::int64_t count, std::int64_t limit) {
  const auto largest = static_cast<std::int32_t>(std::min<std::int64_t>(limit - 1, INT32_MAX));
  std::int32_t out_of_range = 0;  // negative as soon as an id, or what it leaves to the largest, is
  for (std::int64_t i = 0; i < count; ++i)
    out_of_range |= ids[i] | static_cast<std::int32_t>(static_cast<std::uint32_t>(largest) - ids[i]);
  if (out_of_range >= 0) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      invalid(std::string(name) + "[" + str(i) + "] is " + str(ids[i]) + ": it must be 0 to " + str(limit - 1));
    }
  }
}

void check_table(const PageTableView& table, std::int32_t page_size, std::int64_t num_pages) {
  check_indptr("qo_indptr", table.qo_indptr, table.batch_size);
  check_indptr("kv_indptr", table.kv_indptr, table.batch_size);
  for (std::int32_t b = 0; b < table.batch_size; ++b) check_request(table, b, page_size);
  check_range("kv_indices", table.kv_indices, table.kv_indptr[table.batch_size], num_pages);
}

}  // namespace radixkv
