// What the requests of one step share: runs of pages that several of them begin with, found by the identity of pages.
//
//   request 0   [ 4 7 2 | 9 1 | 5 . ]        segment A: pages 4 7 2, users 0 1 2 (parent: none)
//   request 1   [ 4 7 2 | 9 1 | 8 . ]        segment B: pages 9 1,   users 0 1   (parent: A)
//   request 2   [ 4 7 2 | 3 . ]              the rest of each request is its own
//
// A page is shared only where it is full and lies before every user's first new row, so nothing writes to it in this
// step. Segments form a forest; the requests are ordered so that the users of every segment are neighbours.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "step/step_table.hpp"

namespace radixkv {

// When does a segment pay? It saves (users - 1) * tokens reads of a token's K and V and costs launch_tokens plus
// merge_tokens for each row of its users, all in tokens' worth of reading. The defaults use all there is; each
// backend's own costs are in radixkv/attention/cascade.py.
struct CascadeCosts {
  std::int32_t min_users = 2;
  std::int32_t min_tokens = 1;
  double launch_tokens = 0.0;
  double merge_tokens = 0.0;
  std::int32_t max_levels = 0;    // used segments on one path; 0: any number
  std::int32_t max_rows = 0;      // requests with more new rows share nothing; 0: no limit
  std::int32_t granularity = 64;  // tokens that a backend skips or shares at once
  bool operator==(const CascadeCosts&) const = default;
};

enum class Verdict : std::int32_t { used, few_users, too_short, does_not_pay, too_deep };

struct Segment {
  std::int32_t page_begin;  // where the pages of its users begin to be its own
  std::int32_t page_end;
  std::int32_t user_begin;  // users: order[user_begin..user_end)
  std::int32_t user_end;
  std::int32_t parent;          // index of the segment that it continues, or -1; a parent comes before its children
  std::int32_t first_page = 0;  // first page that it serves: the end of the nearest used segment above it
  std::int32_t level = 0;       // used segments above it
  Verdict verdict = Verdict::used;
  std::int64_t token_begin = 0;  // what it serves, multiples of the granularity
  std::int64_t token_end = 0;
  std::int64_t saved = 0;  // tokens that need not be read again, if it is used
  double spent = 0.0;      // and what that costs
};

// The shared segments of one step.
struct Cascade {
  CascadeCosts costs;
  std::int32_t page_size = 1;
  std::vector<std::int32_t> order;  // a permutation of the requests
  std::vector<Segment> segments;
  std::vector<std::int32_t> shared_pages;  // for each request: its first pages that used segments serve
  std::vector<std::int32_t> depths;        // and how many those segments are
  std::int32_t levels = 0;                 // used segments on the longest path; 0: nothing is shared
  std::int64_t saved = 0;                  // tokens, by all used segments

  // A page's first token, rounded down to the granularity.
  std::int64_t token_at(std::int64_t page) const { return page * page_size / costs.granularity * costs.granularity; }
};

// Takes a checked table. O(requests * log(requests) * depth of branching + pages that are shared).
Cascade derive_cascade(const PageTableView& table, const CascadeCosts& costs);

// Finds the cascade of one step after another. It is derived again only where the batch is another one: pages that a
// lease takes are its own, so as long as nobody comes, goes, computes another number of rows or has one of its pages
// replaced by another, nobody shares more than before, nor less. Then finding it is O(requests).
class CascadeFinder {
 public:
  explicit CascadeFinder(const CascadeCosts& costs = {}) : costs(costs) {}

  // Throws LeaseError if the table's step has ended.
  const std::shared_ptr<const Cascade>& find(const StepTable& table);
  const std::shared_ptr<const Cascade>& found() const { return found_; }

  CascadeCosts costs;

 private:
  bool is_last(const StepTable& table) const;

  std::shared_ptr<const Cascade> found_ = std::make_shared<Cascade>();
  std::vector<PageListId> list_ids_;     // of the step that it was found for
  std::vector<std::int32_t> qo_indptr_;  // and its rows
};

}  // namespace radixkv
