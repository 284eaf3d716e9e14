#include "step/cascade.hpp"

#include <algorithm>
#include <numeric>

namespace radixkv {
namespace {

class Derivation {
 public:
  Derivation(const PageTableView& table, Cascade& out) : table_(table), out_(out) {}
  void run();

 private:
  struct Range {
    std::int32_t begin, end;  // in order
    std::int32_t depth;       // pages that these requests are known to share
    std::int32_t parent;
  };
  // Neighbours of the order that have the same page next.
  struct Group {
    std::int32_t begin, end;  // in sorted_
    std::int32_t first;       // the least of its requests
  };
  struct Next {
    std::int32_t page, request;
    auto operator<=>(const Next&) const = default;
  };

  void group(const Range& range);
  void place(const Range& range);
  void extend(const Range& range);
  void judge(Segment& segment);
  Verdict verdict(const Segment& segment) const;
  // The request's page at this depth, or -1 where it has none to share.
  std::int32_t page_at(std::int32_t request, std::int32_t depth) const {
    return depth < limits_[request] ? table_.pages[request][depth] : -1;
  }

  const PageTableView& table_;
  Cascade& out_;
  std::vector<std::int32_t> limits_;  // for each request: how many of its first pages may be shared
  std::vector<Range> ranges_;         // still to be looked at
  std::vector<Next> sorted_;
  std::vector<Group> groups_;
};

void Derivation::run() {
  const auto batch = static_cast<std::size_t>(table_.batch_size);
  out_.order.resize(batch);
  std::iota(out_.order.begin(), out_.order.end(), 0);
  out_.shared_pages.assign(batch, 0);
  out_.depths.assign(batch, 0);
  limits_.resize(batch);
  for (std::int32_t b = 0; b < table_.batch_size; ++b) {
    const std::int32_t rows = table_.num_rows(b), most = out_.costs.max_rows;
    const bool may_share = most == 0 || rows <= most;
    limits_[b] = may_share ? static_cast<std::int32_t>((table_.kv_len(b) - rows) / table_.page_size) : 0;
  }
  group(Range{0, table_.batch_size, 0, -1});
  while (!ranges_.empty()) {
    const Range range = ranges_.back();
    ranges_.pop_back();
    extend(range);
  }
  for (Segment& segment : out_.segments) judge(segment);  // root to leaf
}

// Every page that two or more requests of a range have at its depth makes a range of its own.
void Derivation::group(const Range& range) {
  sorted_.clear();
  for (std::int32_t i = range.begin; i < range.end; ++i) {
    sorted_.push_back(Next{page_at(out_.order[i], range.depth), out_.order[i]});
  }
  std::sort(sorted_.begin(), sorted_.end());
  groups_.clear();
  const auto count = static_cast<std::int32_t>(sorted_.size());
  bool any = false;
  for (std::int32_t i = 0, end; i < count; i = end) {
    const Next& first = sorted_[i];
    for (end = i + 1; end < count && first.page >= 0 && sorted_[end].page == first.page;) ++end;
    groups_.push_back(Group{i, end, first.request});
    any = any || end - i >= 2;
  }
  if (any) place(range);
}

// Groups stand in the order of their first requests: requests that stand right stay, and nothing depends on the ids of
// pages that nobody shares.
void Derivation::place(const Range& range) {
  std::sort(groups_.begin(), groups_.end(), [](const Group& a, const Group& b) { return a.first < b.first; });
  std::int32_t at = range.begin;
  for (const Group& g : groups_) {
    if (g.end - g.begin >= 2) ranges_.push_back(Range{at, at + g.end - g.begin, range.depth, range.parent});
    for (std::int32_t i = g.begin; i < g.end; ++i) out_.order[at++] = sorted_[i].request;
  }
}

// Makes a segment of as many pages as the whole range shares from its depth on, and groups what follows.
void Derivation::extend(const Range& range) {
  const std::int32_t* const first = table_.pages[out_.order[range.begin]];
  std::int32_t common = limits_[out_.order[range.begin]];
  for (std::int32_t i = range.begin + 1; i < range.end; ++i) {
    const std::int32_t* const pages = table_.pages[out_.order[i]];
    const std::int32_t limit = std::min(common, limits_[out_.order[i]]);
    common =
        static_cast<std::int32_t>(std::mismatch(first + range.depth, first + limit, pages + range.depth).first - first);
  }
  const auto index = static_cast<std::int32_t>(out_.segments.size());
  out_.segments.push_back(Segment{range.depth, common, range.begin, range.end, range.parent});
  group(Range{range.begin, range.end, common, index});
}

// What a segment that is not used would have served falls to those below it.
void Derivation::judge(Segment& segment) {
  if (segment.parent >= 0) {
    const Segment& above = out_.segments[segment.parent];
    const bool used = above.verdict == Verdict::used;
    segment.first_page = used ? above.page_end : above.first_page;
    segment.level = above.level + (used ? 1 : 0);
  }
  segment.token_begin = out_.token_at(segment.first_page);
  segment.token_end = out_.token_at(segment.page_end);
  segment.saved = (segment.user_end - segment.user_begin - 1) * (segment.token_end - segment.token_begin);
  std::int64_t rows = 0;
  for (std::int32_t i = segment.user_begin; i < segment.user_end; ++i) rows += table_.num_rows(out_.order[i]);
  segment.spent = out_.costs.launch_tokens + out_.costs.merge_tokens * static_cast<double>(rows);
  segment.verdict = verdict(segment);
  if (segment.verdict != Verdict::used) return;
  out_.levels = std::max(out_.levels, segment.level + 1);
  out_.saved += segment.saved;
  for (std::int32_t i = segment.user_begin; i < segment.user_end; ++i) {
    out_.shared_pages[out_.order[i]] = segment.page_end;
    out_.depths[out_.order[i]] = segment.level + 1;
  }
}

Verdict Derivation::verdict(const Segment& segment) const {
  const CascadeCosts& costs = out_.costs;
  if (segment.user_end - segment.user_begin < costs.min_users) return Verdict::few_users;
  if (segment.token_end - segment.token_begin < std::max(costs.min_tokens, 1)) return Verdict::too_short;
  if (costs.max_levels > 0 && segment.level >= costs.max_levels) return Verdict::too_deep;
  return static_cast<double>(segment.saved) > segment.spent ? Verdict::used : Verdict::does_not_pay;
}

}  // namespace

Cascade derive_cascade(const PageTableView& table, const CascadeCosts& costs) {
  Cascade cascade;
  cascade.costs = costs;
  cascade.page_size = table.page_size;
  Derivation(table, cascade).run();
  return cascade;
}

const std::shared_ptr<const Cascade>& CascadeFinder::find(const StepTable& table) {
  const PageLists::Use use(*table.lists);
  if (is_last(table)) return found_;
  list_ids_.clear();  // should the next line throw, nothing is known
  found_ = std::make_shared<const Cascade>(derive_cascade(table.view(), costs));
  qo_indptr_ = table.qo_indptr;
  list_ids_ = table.list_ids;
  return found_;
}

bool CascadeFinder::is_last(const StepTable& table) const {
  return !list_ids_.empty() && table.list_ids == list_ids_ && table.qo_indptr == qo_indptr_ &&
         table.page_size == found_->page_size && costs == found_->costs;
}

}  // namespace radixkv
