#include "cache/hazard.hpp"

#include <algorithm>
#include <bit>

namespace radixkv {

namespace {
constexpr int kBits = 2;  // of an age below its highest one that tell its bin: 4 bins an octave
constexpr int kPerOctave = 1 << kBits;
constexpr int kFinest = 6;             // the first octave ends at 2^-kFinest turnovers
constexpr double kDecay = 0.95;        // of all counts, at each estimate
constexpr std::int64_t kPeriod = 256;  // requests between two
constexpr double kPrior = 100;         // pages that weigh as much as what all classes tell
}  // namespace

Hazard::Hazard(std::int32_t num_pages) : num_pages_(num_pages) {}

std::uint8_t Hazard::class_of(std::int32_t uses, bool end, std::int64_t cached, std::int64_t total, bool inner) {
  const int often = uses >= 5 ? 3 : uses >= 3 ? 2 : uses - 1;
  const int known = 10 * cached < total ? 0 : 10 * cached < 6 * total ? 1 : 2;
  return static_cast<std::uint8_t>(((often * 2 + end) * 3 + known) * 2 + inner);
}

// Bin 0 is up to 2^-kFinest turnovers; then kPerOctave bins for each doubling.
int Hazard::bin(std::int64_t age) const {
  const auto scaled = static_cast<std::uint64_t>(std::max<std::int64_t>(0, age)) * (kPerOctave << kFinest) / num_pages_;
  if (scaled < kPerOctave) return 0;
  const int octave = std::bit_width(scaled) - 1 - kBits;
  const int part = static_cast<int>(scaled >> octave) % kPerOctave;
  return std::min(1 + octave * kPerOctave + part, kBins - 1);
}

double Hazard::width(int bin) const {
  constexpr double kUnit = 1.0 / (1 << kFinest);
  if (bin == 0) return kUnit;
  return kUnit * static_cast<double>(1LL << ((bin - 1) / kPerOctave)) / kPerOctave;
}

bool Hazard::request() { return ++requests_ % kPeriod == 0; }

void Hazard::estimate() {
  std::array<double, kBins> pooled{}, uses{}, risk{};
  for (int of = 0; of < kClasses; ++of) {
    double left = 0;
    for (int b = kBins; b-- > 0;) {
      left += uses_[of][b] + lost_[of][b] + waiting_[of][b];
      uses[b] += uses_[of][b];
      risk[b] += left;
    }
  }
  for (int b = 0; b < kBins; ++b) pooled[b] = risk[b] > 0 ? uses[b] / risk[b] : 0;
  for (int of = 0; of < kClasses; ++of) {
    std::array<double, kBins> hazard{};
    double left = 0;
    for (int b = kBins; b-- > 0;) {
      left += uses_[of][b] + lost_[of][b] + waiting_[of][b];
      hazard[b] = (uses_[of][b] + kPrior * pooled[b]) / (left + kPrior);
    }
    for (int from = 0; from < kBins; ++from) {
      double best = 0, hits = 0, time = 0, alive = 1;
      for (int b = from; b < kBins; ++b) {
        hits += alive * hazard[b];
        time += alive * (1 - hazard[b] / 2) * width(b);
        alive *= 1 - hazard[b];
        best = std::max(best, hits / time);
      }
      index_[of][from] = best;
    }
    for (int b = 0; b < kBins; ++b) uses_[of][b] *= kDecay, lost_[of][b] *= kDecay, waiting_[of][b] = 0;
  }
}

// --- ghosts ----------------------------------------------------------------------------------------------------------

Ghosts::Ghosts(std::int32_t num_pages)
    : capacity_(std::min<std::int64_t>(kPerPage * num_pages, INT32_MAX - 1)),
      mask_(std::bit_ceil(static_cast<std::uint64_t>(2 * capacity_)) - 1),
      ring_(capacity_),
      slots_(mask_ + 1) {}

std::uint64_t Ghosts::slot_of(std::uint64_t key) const {
  std::uint64_t slot = key & mask_;
  while (slots_[slot] != 0 && ring_[slots_[slot] - 1].key != key) slot = (slot + 1) & mask_;
  return slot;
}

Ghosts::Ghost Ghosts::add(std::uint64_t key, std::int64_t touched, std::int32_t uses, std::uint8_t of) {
  forget(key);
  const Ghost gone = ring_[next_];
  if (gone.there) forget(gone.key);
  ring_[next_] = Ghost{key, touched, uses, of, true};
  slots_[slot_of(key)] = static_cast<std::int32_t>(next_ + 1);
  next_ = (next_ + 1) % capacity_;
  return gone;
}

const Ghosts::Ghost* Ghosts::find(std::uint64_t key) const {
  const std::uint64_t slot = slot_of(key);
  return slots_[slot] == 0 ? nullptr : &ring_[slots_[slot] - 1];
}

// Linear probing: whatever was pushed past the slot moves back.
void Ghosts::forget(std::uint64_t key) {
  std::uint64_t hole = slot_of(key);
  if (slots_[hole] == 0) return;
  ring_[slots_[hole] - 1].there = false;
  slots_[hole] = 0;
  for (std::uint64_t slot = (hole + 1) & mask_; slots_[slot] != 0; slot = (slot + 1) & mask_) {
    const std::uint64_t home = ring_[slots_[slot] - 1].key & mask_;
    if (((slot - home) & mask_) < ((slot - hole) & mask_)) continue;
    slots_[hole] = slots_[slot];
    slots_[slot] = 0;
    hole = slot;
  }
}

}  // namespace radixkv
