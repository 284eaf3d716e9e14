#include "cache/what_if.hpp"

#include <algorithm>
#include <bit>

namespace radixkv {

namespace {
constexpr std::int64_t kMost = 1 << 10;  // pages remembered

std::uint64_t sample_of(std::int64_t pages) {
  return std::bit_ceil(static_cast<std::uint64_t>((pages + kMost - 1) / kMost));
}

// All that eight pools hold beside the first.
std::int64_t beyond(std::int64_t num_pages) {
  return static_cast<std::int64_t>(WhatIf::kFactors.back() - 1) * num_pages;
}
}  // namespace

WhatIf::WhatIf(std::int32_t num_pages, std::int32_t page_size)
    : num_pages_(num_pages),
      page_size_(page_size),
      every_(sample_of(beyond(num_pages))),
      capacity_(2 * std::max<std::int64_t>(1, beyond(num_pages) / static_cast<std::int64_t>(every_))),
      mask_(std::bit_ceil(static_cast<std::uint64_t>(2 * capacity_)) - 1),
      prefixes_(num_pages),
      ring_(capacity_),
      words_(capacity_ / 64 + 1),
      counts_(capacity_ / 64 + 1),
      slots_(mask_ + 1) {}

void WhatIf::count(std::int64_t place, std::int32_t by) {
  there_ += by;
  words_[place / 64] ^= std::uint64_t{1} << (place % 64);
  counts_[place / 64] += by;
}

std::int64_t WhatIf::up_to(std::int64_t place) const {
  std::int64_t sum = std::popcount(words_[place / 64] << (63 - place % 64));
  for (std::int64_t word = 0; word < place / 64; ++word) sum += counts_[word];
  return sum;
}

std::uint64_t WhatIf::slot_of(std::uint64_t prefix) const {
  std::uint64_t slot = prefix & mask_;
  while (slots_[slot] != 0 && ring_[slots_[slot] - 1] != prefix) slot = (slot + 1) & mask_;
  return slot;
}

// Linear probing: whatever was pushed past the slot moves back.
void WhatIf::remove(std::uint64_t hole) {
  count(slots_[hole] - 1, -1);
  slots_[hole] = 0;
  for (std::uint64_t slot = (hole + 1) & mask_; slots_[slot] != 0; slot = (slot + 1) & mask_) {
    const std::uint64_t home = ring_[slots_[slot] - 1] & mask_;
    if (((slot - home) & mask_) < ((slot - hole) & mask_)) continue;
    slots_[hole] = slots_[slot];
    slots_[slot] = 0;
    hole = slot;
  }
}

void WhatIf::came_back(std::uint64_t prefix) {
  if (const std::uint64_t slot = slot_of(prefix); slots_[slot] != 0) remove(slot);
}

void WhatIf::left(std::uint64_t prefix) {
  ++num_sampled_;
  if (const std::uint64_t slot = slot_of(prefix); slots_[slot] != 0) remove(slot);
  if (next_ == capacity_) {  // those still away move to the front, but for the oldest that eight pools would not hold
    std::int64_t surplus = there_ - capacity_ / 2;
    const std::int64_t end = next_;
    next_ = 0;
    for (std::int64_t place = 0; place < end; ++place) {
      const std::uint64_t away = ring_[place], slot = slot_of(away);
      if (slots_[slot] != place + 1) continue;
      remove(slot);
      if (surplus-- > 0) continue;
      ring_[next_] = away;
      slots_[slot_of(away)] = static_cast<std::int32_t>(next_ + 1);
      count(next_++, 1);
    }
  }
  ring_[next_] = prefix;
  slots_[slot_of(prefix)] = static_cast<std::int32_t>(next_ + 1);
  count(next_++, 1);
}

void WhatIf::forget() {
  for (std::uint64_t slot = 0; slot <= mask_; ++slot) {
    while (slots_[slot] != 0) remove(slot);
  }
}

double WhatIf::each() const { return static_cast<double>(num_evicted_) / static_cast<double>(num_sampled_); }

double WhatIf::times(std::uint64_t prefix) const {
  const std::uint64_t slot = slot_of(prefix);
  if (slots_[slot] == 0) return kNone;
  const std::int64_t after = there_ - up_to(slots_[slot] - 1);  // evicted after it, and still away
  return 1 + static_cast<double>(after + 1) * each() / static_cast<double>(num_pages_);
}

void WhatIf::missed(double needed) {
  if (needed <= 0) return;
  const double tokens = static_cast<double>(page_size_) * each();
  for (std::size_t i = 0; i < kFactors.size(); ++i) {
    if (needed <= kFactors[i]) more_[i] += tokens;
  }
}

}  // namespace radixkv
