#include "step/cascade.hpp"

#include <algorithm>
#include <numeric>

namespace radixkv {

PageTableView Cascade::view() const {
  return PageTableView{batch_size(), qo_indptr.data(), kv_indptr.data(), kv_indices.data(), kv_last_page_len.data()};
}

// The request's page at this depth, or -1 where it has none to share.
std::int32_t Cascade::page_at(std::int32_t request, std::int32_t depth) const {
  return depth < limits_[request] ? kv_indices[kv_indptr[request] + depth] : -1;
}

void Cascade::derive(const PageTableView& table, std::int32_t size_of_page, const CascadeCosts& with) {
  const std::int32_t batch = table.batch_size;
  page_size = size_of_page;
  costs = with;
  qo_indptr.assign(table.qo_indptr, table.qo_indptr + batch + 1);
  kv_indptr.assign(table.kv_indptr, table.kv_indptr + batch + 1);
  kv_indices.assign(table.kv_indices, table.kv_indices + table.kv_indptr[batch]);
  kv_last_page_len.assign(table.kv_last_page_len, table.kv_last_page_len + batch);
  order.resize(static_cast<std::size_t>(batch));
  std::iota(order.begin(), order.end(), 0);
  segments.clear();
  shared_pages.assign(static_cast<std::size_t>(batch), 0);
  depths.assign(static_cast<std::size_t>(batch), 0);
  levels = 0;
  limits_.resize(static_cast<std::size_t>(batch));
  for (std::int32_t b = 0; b < batch; ++b) {
    const std::int32_t rows = table.num_rows(b);
    const bool may_share = costs.max_rows == 0 || rows <= costs.max_rows;
    limits_[b] = may_share ? static_cast<std::int32_t>((table.kv_len(b, page_size) - rows) / page_size) : 0;
  }
  std::vector<Range> ranges;
  group(Range{0, batch, 0, -1}, ranges);
  if (ranges.empty()) {
    std::iota(order.begin(), order.end(), 0);
    return;
  }
  while (!ranges.empty()) {
    const Range range = ranges.back();
    ranges.pop_back();
    extend(range, ranges);
  }
  judge();
}

// Sorts a range of requests by their page at its depth; every page of two or more of them makes a group.
void Cascade::group(const Range& range, std::vector<Range>& groups) {
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const std::int32_t page_a = page_at(a, range.depth), page_b = page_at(b, range.depth);
    return page_a != page_b ? page_a < page_b : a < b;
  };
  std::sort(order.begin() + range.begin, order.begin() + range.end, before);
  for (std::int32_t i = range.begin; i < range.end;) {
    const std::int32_t page = page_at(order[i], range.depth);
    std::int32_t end = i + 1;
    while (end < range.end && page_at(order[end], range.depth) == page) ++end;
    if (page >= 0 && end - i >= 2) groups.push_back(Range{i, end, range.depth, range.parent});
    i = end;
  }
}

// Makes a segment of as many pages as the whole range shares from its depth on, and groups what follows.
void Cascade::extend(const Range& range, std::vector<Range>& ranges) {
  const std::int32_t* const first = kv_indices.data() + kv_indptr[order[range.begin]];
  std::int32_t common = limits_[order[range.begin]];
  for (std::int32_t i = range.begin + 1; i < range.end; ++i) {
    const std::int32_t* const pages = kv_indices.data() + kv_indptr[order[i]];
    const std::int32_t limit = std::min(common, limits_[order[i]]);
    common =
        static_cast<std::int32_t>(std::mismatch(first + range.depth, first + limit, pages + range.depth).first - first);
  }
  const auto index = static_cast<std::int32_t>(segments.size());
  segments.push_back(Segment{range.depth, common, 0, range.begin, range.end, range.parent, 0, Verdict::used});
  group(Range{range.begin, range.end, common, index}, ranges);
}

// Root to leaf: what a segment that is not used would have served falls to those below it.
void Cascade::judge() {
  for (Segment& segment : segments) {
    if (segment.parent >= 0) {
      const Segment& above = segments[segment.parent];
      const bool used = above.verdict == Verdict::used;
      segment.first_page = used ? above.page_end : above.first_page;
      segment.level = above.level + (used ? 1 : 0);
    }
    segment.verdict = verdict(segment);
    if (segment.verdict != Verdict::used) continue;
    levels = std::max(levels, segment.level + 1);
    for (std::int32_t i = segment.user_begin; i < segment.user_end; ++i) {
      shared_pages[order[i]] = segment.page_end;
      depths[order[i]] = segment.level + 1;
    }
  }
}

Verdict Cascade::verdict(const Segment& segment) const {
  const std::int32_t users = segment.user_end - segment.user_begin;
  const std::int64_t tokens = token_end(segment) - token_begin(segment);
  if (users < costs.min_users) return Verdict::few_users;
  if (tokens < std::max(costs.min_tokens, 1)) return Verdict::too_short;
  if (costs.max_levels > 0 && segment.level >= costs.max_levels) return Verdict::too_deep;
  std::int64_t rows = 0;
  for (std::int32_t i = segment.user_begin; i < segment.user_end; ++i) {
    rows += qo_indptr[order[i] + 1] - qo_indptr[order[i]];
  }
  const double saved = static_cast<double>(users - 1) * static_cast<double>(tokens);
  const double spent = costs.launch_tokens + costs.merge_tokens * static_cast<double>(rows);
  return saved > spent ? Verdict::used : Verdict::does_not_pay;
}

}  // namespace radixkv
