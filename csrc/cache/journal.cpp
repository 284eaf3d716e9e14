#include "cache/journal.hpp"

#include <algorithm>
#include <cstring>

namespace radixkv {

namespace {
constexpr std::int64_t kRecordsPerPage = 4;
constexpr std::int64_t kLeastReleaseTokens = 1 << 20;  // so that small pools are not read every few requests
}  // namespace

Journal::Journal(std::int32_t num_pages, std::int32_t page_size)
    : capacity_(kRecordsPerPage * num_pages),
      page_size_(page_size),
      records_(capacity_),
      tokens_(static_cast<std::size_t>(capacity_) * page_size),
      names_(capacity_),
      stored_at_(num_pages),
      most_tokens_(std::max(capacity_ * page_size, kLeastReleaseTokens)) {}

void Journal::name(SpaceId root, std::string_view name) {
  names_[end_ % capacity_] = name;  // the only thing here that may run out of memory
  records_[place()] = Record{Op::name_space, kNone, kNone, root, request_};
}

void Journal::stored(PageId page, PageId parent, SpaceId root, const Token* tokens) {
  const std::int64_t at = place();
  records_[at] = Record{Op::stored, page, parent, root, request_};
  std::memcpy(tokens_.data() + at * page_size_, tokens, page_size_ * sizeof(Token));
  stored_at_[page] = end_;
}

void Journal::removed(PageId page) {
  records_[place()] = Record{Op::removed, page, kNone, kNone, request_};
  stored_at_[page] = 0;
}

void Journal::lost_release() noexcept {
  first_release_ = releases_end() + 1;
  releases_.clear();
  release_tokens_ = 0;
}

void Journal::released(Release&& release) {
  releases_.push_back(std::move(release));
  release_tokens_ += static_cast<std::int64_t>(releases_.back().tokens.size());
  for (; release_tokens_ > most_tokens_ && releases_.size() > 1; ++first_release_) {
    release_tokens_ -= static_cast<std::int64_t>(releases_.front().tokens.size());
    releases_.pop_front();
  }
}

JournalBatch Journal::read(std::int64_t cursor, std::int64_t limit) const {
  JournalBatch out;
  const std::int64_t first = std::max<std::int64_t>(0, end_ - capacity_);
  out.lost = cursor < first;
  const std::int64_t begin = std::clamp(cursor, first, end_), count = std::min(limit, end_ - begin);
  for (auto* column : {&out.op, &out.page, &out.parent, &out.root}) column->reserve(count);
  out.request.reserve(count);
  out.tokens.resize(count * page_size_);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = (begin + i) % capacity_;
    const Record& record = records_[at];
    out.op.push_back(static_cast<std::int32_t>(record.op));
    out.page.push_back(record.page);
    out.parent.push_back(record.parent);
    out.root.push_back(record.root);
    out.request.push_back(record.request);
    if (record.op == Op::name_space) out.names.emplace_back(i, names_[at]);
    if (record.op != Op::stored) continue;
    std::memcpy(out.tokens.data() + i * page_size_, tokens_.data() + at * page_size_, page_size_ * sizeof(Token));
  }
  out.cursor = begin + count;
  return out;
}

ReleaseBatch Journal::read_releases(std::int64_t cursor, std::int64_t limit) const {
  ReleaseBatch out;
  out.lost = std::max<std::int64_t>(0, first_release_ - cursor);
  const std::int64_t begin = std::clamp(cursor, first_release_, releases_end());
  const auto first = releases_.begin() + (begin - first_release_);
  out.releases.assign(first, first + std::min(limit, releases_end() - begin));
  out.cursor = begin + static_cast<std::int64_t>(out.releases.size());
  return out;
}

}  // namespace radixkv
