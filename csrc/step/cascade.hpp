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
#include <vector>

#include "step/table_view.hpp"

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
};

enum class Verdict : std::int32_t { used, few_users, too_short, does_not_pay, too_deep };

struct Segment {
  std::int32_t page_begin;  // where the pages of its users begin to be its own
  std::int32_t page_end;
  std::int32_t first_page;  // first page that it serves: the end of the nearest used segment above it
  std::int32_t user_begin;  // users: order[user_begin..user_end)
  std::int32_t user_end;
  std::int32_t parent;  // index of the segment that it continues, or -1; a parent comes before its children
  std::int32_t level;   // used segments above it
  Verdict verdict;
};

// The page table of one step, copied, and its shared segments.
class Cascade {
 public:
  // Takes a checked table. O(total pages + requests * log(requests) * depth of branching); where no two requests begin
  // with the same page, O(requests * log(requests)) beside the copy.
  void derive(const PageTableView& table, std::int32_t page_size, const CascadeCosts& costs);

  PageTableView view() const;
  std::int32_t batch_size() const { return static_cast<std::int32_t>(kv_last_page_len.size()); }
  // The tokens [first, second) that a segment serves, both multiples of the granularity.
  std::int64_t token_begin(const Segment& s) const { return token_at(s.first_page); }
  std::int64_t token_end(const Segment& s) const { return token_at(s.page_end); }
  std::int64_t token_at(std::int64_t page) const { return page * page_size / costs.granularity * costs.granularity; }

  std::vector<std::int32_t> qo_indptr{0}, kv_indptr{0}, kv_indices, kv_last_page_len;
  std::vector<std::int32_t> order;  // a permutation of the requests
  std::vector<Segment> segments;
  std::vector<std::int32_t> shared_pages;  // for each request: its first pages that used segments serve
  std::vector<std::int32_t> depths;        // and how many those segments are
  std::int32_t levels = 0;                 // used segments on the longest path; 0: nothing is shared
  std::int32_t page_size = 1;
  CascadeCosts costs;

 private:
  struct Range {
    std::int32_t begin, end;  // in order
    std::int32_t depth;       // pages that these requests are known to share
    std::int32_t parent;
  };

  std::int32_t page_at(std::int32_t request, std::int32_t depth) const;
  void group(const Range& range, std::vector<Range>& groups);
  void extend(const Range& range, std::vector<Range>& ranges);
  void judge();
  Verdict verdict(const Segment& segment) const;

  std::vector<std::int32_t> limits_;  // for each request: how many of its first pages may be shared
};

}  // namespace radixkv
