#include "cache/spaces.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace radixkv {

std::string_view Spaces::parent_of(std::string_view name) const {
  const std::size_t cut = hierarchical_ ? name.rfind('/') : std::string_view::npos;
  return cut == std::string_view::npos ? std::string_view() : name.substr(0, cut);
}

SpaceId Spaces::find(std::string_view name) const {
  const auto it = names_.find(name);
  return it == names_.end() ? kNone : it->second;
}

SpaceId Spaces::nearest(std::string_view name) const {
  for (; name.data() != nullptr; name = parent_of(name)) {
    if (const SpaceId s = find(name); s != kNone) return s;
  }
  return kNone;
}

void Spaces::check_levels(std::string_view name) const {
  if (!hierarchical_) return;
  const auto levels = std::count(name.begin(), name.end(), '/') + 1;
  if (levels <= kMostLevels) return;
  invalid("namespace with " + str(levels) + " levels: a hierarchical cache takes names of at most " + str(kMostLevels) +
          ", parted by '/'");
}

SpaceId Spaces::make(std::string_view name) {
  if (const SpaceId s = find(name); s != kNone) return s;
  const std::string_view above = parent_of(name);
  const SpaceId parent = above.data() == nullptr ? kNone : make(above);
  const auto entry = names_.emplace(std::string(name), kNone).first;
  SpaceId s = free_;
  try {
    if (s == kNone) s = static_cast<SpaceId>(spaces_.size()), spaces_.emplace_back();
  } catch (...) {
    names_.erase(entry);
    throw;
  }
  if (s == free_) free_ = spaces_[s].hotter;
  entry->second = s;
  Space& made = spaces_[s];
  made = Space{};
  made.name = entry;
  made.known = true;
  made.parent = parent;
  made.top = parent == kNone ? s : spaces_[parent].top;
  if (parent != kNone) {
    wake(parent);
    ++spaces_[parent].below;
  }
  return s;
}

bool Spaces::within(SpaceId s, SpaceId above) const {
  while (s != above && s != kNone) s = spaces_[s].parent;
  return s == above;
}

// --- what keeps a namespace, and what is forgotten -------------------------------------------------------------------

void Spaces::set_root(SpaceId s, NodeId root) {
  if (root != kNone) wake(s);
  spaces_[s].root = root;
  settle(s);
}

void Spaces::requested(SpaceId s, std::int64_t input, std::int64_t hit) {
  SpaceCounts& counts = spaces_[s].counts;
  ++counts.requests;
  counts.input_tokens += input;
  counts.hit_tokens += hit;
}

void Spaces::leave_idle(SpaceId s) {
  Space& space = spaces_[s];
  space.is_idle = false;
  --num_idle_;
  (space.colder == kNone ? coldest_ : spaces_[space.colder].hotter) = space.hotter;
  (space.hotter == kNone ? hottest_ : spaces_[space.hotter].colder) = space.colder;
}

void Spaces::settle(SpaceId s) {
  Space& space = spaces_[s];
  const bool kept = space.pages > 0 || space.leases > 0 || space.below > 0 || space.root != kNone || space.lists > 0;
  if (kept || space.is_idle) return;
  space.is_idle = true;
  space.colder = hottest_;
  space.hotter = kNone;
  (hottest_ == kNone ? coldest_ : spaces_[hottest_].hotter) = s;
  hottest_ = s;
  if (++num_idle_ > kMostIdle) forget(coldest_);
}

void Spaces::forget(SpaceId s) {
  wake(s);
  Space& space = spaces_[s];
  forgotten_.requests += space.counts.requests;
  forgotten_.input_tokens += space.counts.input_tokens;
  forgotten_.hit_tokens += space.counts.hit_tokens;
  names_.erase(space.name);
  space.known = false;
  space.hotter = free_;
  free_ = s;
  if (space.parent == kNone) return;
  if (--spaces_[space.parent].below == 0) settle(space.parent);
}

// --- quotas ----------------------------------------------------------------------------------------------------------

void Spaces::add_quota(SpaceId s, int lists) {
  quotas_.push_back(s);
  wake(s);
  spaces_[s].lists = lists;
}

void Spaces::remove_quota(SpaceId s) {
  quotas_.erase(std::find(quotas_.begin(), quotas_.end(), s));
  Space& space = spaces_[s];
  space.lists = 0;
  space.floor = 0;
  space.ceiling = Space::kNoCeiling;
  settle(s);
}

}  // namespace radixkv
