#include "step/step_table.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>

#include "base/error.hpp"

namespace radixkv {

// Either this sees that the lists are closed, or close() sees this.
PageLists::Use::Use(PageLists& lists) : lists_(lists) {
  lists_.users_.fetch_add(1);
  if (lists_.open_.load()) return;
  lists_.users_.fetch_sub(1);
  fail(ErrorKind::LeaseError,
       "the step of this page table has ended, and its pages may be others' by now: plan a table of an open step");
}

void PageLists::close() noexcept {
  open_.store(false);
  while (users_.load() > 0) std::this_thread::yield();
}

std::vector<std::int32_t> StepTable::kv_indptr() const {
  std::vector<std::int32_t> indptr(page_counts.size() + 1, 0);
  std::partial_sum(page_counts.begin(), page_counts.end(), indptr.begin() + 1);
  return indptr;
}

std::vector<std::int32_t> StepTable::kv_indices() const {
  const PageLists::Use use(*lists);
  std::vector<std::int32_t> all;
  all.reserve(std::accumulate(page_counts.begin(), page_counts.end(), std::size_t{0}));
  for (std::size_t b = 0; b < pages.size(); ++b) all.insert(all.end(), pages[b], pages[b] + page_counts[b]);
  return all;
}

Staging::Staging(const StepTable& table, const StepInputs& inputs) : table_(table), inputs_(inputs) {
  const std::int64_t batch = table.batch_size(), rows = table.num_rows();
  lengths_[qo_indptr] = lengths_[kv_indptr] = batch + 1;
  lengths_[kv_last_page_len] = batch;
  lengths_[slots] = lengths_[request] = lengths_[position] = rows;
  lengths_[input_ids] = 2 * static_cast<std::int64_t>(inputs.input_ids.size());
  lengths_[positions] = 2 * static_cast<std::int64_t>(inputs.positions.size());
  lengths_[last_rows] = 2 * static_cast<std::int64_t>(inputs.last_rows.size());
  lengths_[kv_indices] = std::accumulate(table.page_counts.begin(), table.page_counts.end(), std::int64_t{0});
  begins_[0] = 0;
  for (int i = 0; i < kArrays; ++i) {
    // Where there are no inputs their room stays, so that the places of what follows are the same.
    const std::int64_t room = i == input_ids || i == positions ? 2 * rows : i == last_rows ? 2 * batch : lengths_[i];
    begins_[i + 1] = begins_[i] + (room + 3) / 4 * 4;
  }
}

void Staging::write(std::int32_t* to) const {
  const PageLists::Use use(*table_.lists);
  const auto put = [&](Array array, const void* from) {
    if (lengths_[array] > 0) std::memcpy(to + begins_[array], from, static_cast<std::size_t>(lengths_[array]) * 4);
  };
  put(qo_indptr, table_.qo_indptr.data());
  put(kv_indptr, table_.kv_indptr().data());
  put(kv_last_page_len, table_.kv_last_page_len.data());
  put(slots, table_.slots.data());
  write_places(to + begins_[request], to + begins_[position]);
  put(input_ids, inputs_.input_ids.data());
  put(positions, inputs_.positions.data());
  put(last_rows, inputs_.last_rows.data());
  std::int32_t* at = to + begins_[kv_indices];
  for (std::size_t b = 0; b < table_.pages.size(); ++b) {
    at = std::copy_n(table_.pages[b], table_.page_counts[b], at);
  }
}

void Staging::write_places(std::int32_t* requests, std::int32_t* positions) const {
  const PageTableView view = table_.view();
  for (std::int32_t b = 0; b < view.batch_size; ++b) {
    const std::int32_t rows = view.num_rows(b), first = static_cast<std::int32_t>(view.kv_len(b)) - rows;
    requests = std::fill_n(requests, rows, b);
    std::iota(positions, positions + rows, first);
    positions += rows;
  }
}

}  // namespace radixkv
