#include "step/table_check.hpp"

#include <algorithm>
#include <string>

#include "base/error.hpp"

namespace radixkv {
namespace {

using Ids = std::span<const std::int32_t>;

void check_entries(const char* name, Ids array, std::size_t want) {
  if (array.size() == want) return;
  invalid(std::string(name) + " has " + std::to_string(array.size()) + " entries: it must have " +
          std::to_string(want));
}

void check_indptr(const char* name, Ids indptr) {
  if (indptr[0] != 0) invalid(std::string(name) + "[0] is " + str(indptr[0]) + ": it must be 0");
  for (std::size_t b = 0; b + 1 < indptr.size(); ++b) {
    if (indptr[b + 1] < indptr[b]) {
      invalid(std::string(name) + "[" + std::to_string(b + 1) + "] is " + str(indptr[b + 1]) + " after " +
              str(indptr[b]) + ": it must not decrease");
    }
  }
}

void check_range(const char* name, Ids ids, std::int64_t limit) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      invalid(std::string(name) + "[" + std::to_string(i) + "] is " + str(ids[i]) + ": it must be 0 to " +
              str(limit - 1));
    }
  }
}

void check_request(const PageTableView& table, std::int32_t b) {
  const std::int64_t rows = table.num_rows(b);
  const std::int32_t last = table.kv_last_page_len[b];
  const auto who = [&] { return "request " + str(b); };
  if (rows == 0) invalid(who() + " has no new row: leave it out of the step");
  if (table.page_counts[b] == 0) {
    invalid(who() + " has " + str(rows) + " rows and no page: give it ceil(length / page_size) pages");
  }
  if (last < 1 || last > table.page_size) {
    invalid(who() + ": kv_last_page_len is " + str(last) + ": it must be 1 to page_size = " + str(table.page_size));
  }
  if (table.kv_len(b) < rows) {
    invalid(who() + " has " + str(rows) + " new rows but a length of " + str(table.kv_len(b)) +
            ": its length includes the new rows");
  }
}

void check_slots(const PageTableView& table, std::int32_t b) {
  const std::int64_t before = table.kv_len(b) - table.qo_indptr[b + 1];
  for (std::int32_t row = table.qo_indptr[b]; row < table.qo_indptr[b + 1]; ++row) {
    const std::int64_t position = before + row, page_size = table.page_size;
    const std::int64_t slot = table.pages[b][position / page_size] * page_size + position % page_size;
    if (table.slots[row] == slot) continue;
    invalid("slots[" + str(row) + "] is " + str(table.slots[row]) + ": request " + str(b) + " has " +
            str(table.page_counts[b]) + " pages and kv_last_page_len " + str(table.kv_last_page_len[b]) +
            ", so its row at position " + str(position) + " belongs into slot " + str(slot) +
            ": give ceil(length / page_size) pages and the length with the new rows");
  }
}

std::vector<std::int32_t> copy(Ids array) { return {array.begin(), array.end()}; }

}  // namespace

StepTable checked_table(const TableArrays& arrays, std::int32_t num_pages, std::int32_t page_size) {
  if (page_size < 1) invalid("page_size is " + str(page_size) + ": it must be at least 1");
  const std::size_t batch = arrays.kv_last_page_len.size();
  check_entries("qo_indptr", arrays.qo_indptr, batch + 1);
  check_entries("kv_indptr", arrays.kv_indptr, batch + 1);
  check_entries("kv_indices", arrays.kv_indices, std::max(0, arrays.kv_indptr[batch]));
  check_indptr("qo_indptr", arrays.qo_indptr);
  check_indptr("kv_indptr", arrays.kv_indptr);

  StepTable table;
  table.num_pages = num_pages;
  table.page_size = page_size;
  table.lists = std::make_shared<PageLists>(copy(arrays.kv_indices));
  for (std::size_t b = 0; b < batch; ++b) {
    table.pages.push_back(table.lists->own() + arrays.kv_indptr[b]);
    table.page_counts.push_back(arrays.kv_indptr[b + 1] - arrays.kv_indptr[b]);
  }
  table.qo_indptr = copy(arrays.qo_indptr);
  table.kv_last_page_len = copy(arrays.kv_last_page_len);
  table.slots = copy(arrays.slots);

  const PageTableView view = table.view();
  for (std::int32_t b = 0; b < view.batch_size; ++b) check_request(view, b);
  check_range("kv_indices", arrays.kv_indices, num_pages);
  check_range("slots", arrays.slots, static_cast<std::int64_t>(num_pages) * page_size);
  if (table.num_rows() != table.qo_indptr.back()) {
    invalid("slots has " + str(table.num_rows()) + " entries for " + str(table.qo_indptr.back()) +
            " rows: give one slot for each row");
  }
  for (std::int32_t b = 0; b < view.batch_size; ++b) check_slots(view, b);
  return table;
}

}  // namespace radixkv
