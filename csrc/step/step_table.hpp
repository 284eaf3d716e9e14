// The page table of one step: the arrays behind a PageTableView, and what keeps its pages where they are.
//
// A request of 128k tokens has thousands of pages, and from one step to the next all but the last of them stay. So a
// table points to each request's list of pages where its lease keeps it, and whoever copies a table copies pointers:
//
//   lease 0   pages  [ 4 7 2 9 1 5 ]  <──┐
//   lease 1   pages  [ 4 7 2 3 8 ]    <─┐└── pages[0], page_counts[0] = 6
//                                       └─── pages[1], page_counts[1] = 5
//
// Leases do not change in an open step. When it ends, nobody may follow the pointers any more: PageLists tells.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "step/table_view.hpp"

namespace radixkv {

// Whether the lists of pages of one step are still in place. One of them for each step.
class PageLists {
 public:
  PageLists() = default;
  explicit PageLists(std::vector<std::int32_t> own) : own_(std::move(own)) {}

  // While it lives the lists stay. Throws LeaseError if they are gone. Its holder does not wait for the GIL.
  class Use {
   public:
    explicit Use(PageLists& lists);
    ~Use() { lists_.users_.fetch_sub(1); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    PageLists& lists_;
  };

  // The lists are about to go: returns when the last who uses them is done.
  void close() noexcept;

  const std::int32_t* own() const { return own_.data(); }  // of a table that is no cache's: end to end

 private:
  std::vector<std::int32_t> own_;
  std::atomic<bool> open_{true};
  std::atomic<int> users_{0};
};

// Of two lists of pages with the same id and version, the longer one begins with the shorter.
struct PageListId {
  std::uint64_t id;
  std::uint64_t version;
  bool operator==(const PageListId&) const = default;
};

// A copy shares the lists of pages and has the rest for itself.
struct StepTable {
  std::int32_t num_pages = 0, page_size = 1;  // of the pool
  std::vector<std::int32_t> qo_indptr{0}, page_counts, kv_last_page_len, slots;
  std::vector<const std::int32_t*> pages;
  std::vector<PageListId> list_ids;  // of each request's list; none in a table that is no cache's
  std::shared_ptr<PageLists> lists = std::make_shared<PageLists>();

  std::int32_t batch_size() const { return static_cast<std::int32_t>(page_counts.size()); }
  std::int64_t num_rows() const { return static_cast<std::int64_t>(slots.size()); }
  PageTableView view() const {
    return PageTableView{batch_size(), page_size,          qo_indptr.data(),
                         pages.data(), page_counts.data(), kv_last_page_len.data(),
                         slots.data()};
  }

  // In one piece, as FlashInfer and tests want them. O(pages). kv_indices throws LeaseError once the step has ended.
  std::vector<std::int32_t> kv_indptr() const;
  std::vector<std::int32_t> kv_indices() const;
};

// What a model's forward pass takes, int64 as torch indexes. A table that is no cache's has none.
struct StepInputs {
  std::vector<std::int64_t> input_ids, positions;  // of each row
  std::vector<std::int64_t> last_rows;             // of each request
};

// Writes a step's arrays end to end, so that one copy brings all of them to a device. Each begins at a multiple of 16
// bytes; entries are of 4 bytes. kv_indices is the last: where each row is a request's, the places of the others depend
// on the number of requests alone.
class Staging {
 public:
  // clang-format off
  enum Array {
    qo_indptr, kv_indptr, kv_last_page_len, slots,
    request, position,                // of each row: whose it is, and its place in the request's keys
    input_ids, positions, last_rows,  // int64: two entries each
    kv_indices,
    kArrays
  };
  // clang-format on

  Staging(const StepTable& table, const StepInputs& inputs);
  std::int64_t begin(int array) const { return begins_[array]; }
  std::int64_t end(int array) const { return begins_[array] + lengths_[array]; }
  std::int64_t entries() const { return begins_[kArrays]; }
  void write(std::int32_t* to) const;  // throws LeaseError once the step has ended

 private:
  void write_places(std::int32_t* requests, std::int32_t* positions) const;

  const StepTable& table_;
  const StepInputs& inputs_;
  std::int64_t lengths_[kArrays], begins_[kArrays + 1];
};

}  // namespace radixkv
