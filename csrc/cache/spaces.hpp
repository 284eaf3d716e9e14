// The namespaces that a cache knows: where the tree of each begins, what it has and did, and its quota.
//
// In a hierarchical cache the parent of "a/b" is "a", which stands before the last "/"; any other name is a top one. A
// top namespace has a tree, which holds the pages of those below it as well (RadixTree), and only it can have a quota.
//
// A namespace is known while it has a lease, a page, a quota or one below it. Of the others the last kMostIdle that were
// used are remembered, for their counts; of those before them the counts are added up and the names forgotten.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.hpp"

namespace radixkv {

struct SpaceCounts {
  std::int64_t requests = 0, input_tokens = 0, hit_tokens = 0;
};

struct Space {
  static constexpr std::int64_t kNoCeiling = std::numeric_limits<std::int64_t>::max();

  std::map<std::string, SpaceId, std::less<>>::const_iterator name;
  SpaceId parent = kNone, top = kNone;  // top: itself, where it has no parent
  std::int64_t pages = 0, leases = 0, below = 0;
  std::int64_t cleared = 0;  // how often it was, or one above it
  SpaceCounts counts;
  // Of a top one; pages with those of all below it:
  NodeId root = kNone;  // of its tree, while there is one
  std::int64_t used = 0, evictable = 0;
  std::int64_t floor = 0, ceiling = kNoCeiling;
  int lists = 0;  // where its LRU lists begin; 0: it has no quota and shares the common ones

  bool known = false, is_idle = false;
  SpaceId colder = kNone, hotter = kNone;  // neighbours among the idle ones; `hotter` links the free entries
};

class Spaces {
 public:
  static constexpr int kMostIdle = 1024;
  static constexpr int kMostLevels = 16;

  using Names = std::map<std::string, SpaceId, std::less<>>;

  explicit Spaces(bool hierarchical) : hierarchical_(hierarchical) {}
  Spaces(const Spaces&) = delete;

  Space& operator[](SpaceId s) { return spaces_[s]; }
  const Space& operator[](SpaceId s) const { return spaces_[s]; }
  const Space& top(SpaceId s) const { return spaces_[spaces_[s].top]; }
  const std::string& name(SpaceId s) const { return spaces_[s].name->first; }
  const Names& names() const { return names_; }  // in alphabetical order
  bool hierarchical() const { return hierarchical_; }
  bool is_top(std::string_view name) const { return parent_of(name).data() == nullptr; }

  SpaceId find(std::string_view name) const;     // kNone: not known
  SpaceId nearest(std::string_view name) const;  // this one, or the next one above it that is known
  SpaceId make(std::string_view name);           // finds or makes it, and those above it
  bool within(SpaceId s, SpaceId above) const;   // it is `above`, or below it
  void check_levels(std::string_view name) const;

  // What changes counts. A namespace that nothing keeps becomes idle.
  void took(SpaceId s, std::int64_t pages) { spaces_[s].pages += pages, top_of(s).used += pages; }
  void gave_back(SpaceId s, std::int64_t pages) {
    top_of(s).used -= pages;
    if ((spaces_[s].pages -= pages) == 0) settle(s);
  }
  // Pages of one of them are another's on the same path now.
  void moved(SpaceId from, SpaceId to, std::int64_t pages) {
    if (from != to) spaces_[from].pages -= pages, spaces_[to].pages += pages;
  }
  void exposed(SpaceId s, std::int64_t pages) { top_of(s).evictable += pages; }
  void lease_began(SpaceId s) {
    wake(s);
    ++spaces_[s].leases;
  }
  void lease_ended(SpaceId s) {
    if (--spaces_[s].leases == 0) settle(s);
  }
  void set_root(SpaceId s, NodeId root);
  void requested(SpaceId s, std::int64_t input, std::int64_t hit);
  void given(SpaceId s, std::int64_t input) { spaces_[s].counts.input_tokens += input; }  // later, to a request
  SpaceCounts forgotten() const { return forgotten_; }  // of those whose names are not known any more

  // Quotas, of top namespaces.
  const std::vector<SpaceId>& quotas() const { return quotas_; }
  void add_quota(SpaceId s, int lists);
  void remove_quota(SpaceId s);
  // Evictable pages that nobody else may evict.
  static std::int64_t shielded(const Space& s) {
    return std::max<std::int64_t>(0, s.evictable - std::max<std::int64_t>(0, s.used - s.floor));
  }

 private:
  friend class Audit;  // recomputes all of it

  std::string_view parent_of(std::string_view name) const;  // data() is null where it is a top one
  Space& top_of(SpaceId s) { return spaces_[spaces_[s].top]; }
  void settle(SpaceId s);
  void wake(SpaceId s) {
    if (spaces_[s].is_idle) leave_idle(s);
  }
  void leave_idle(SpaceId s);
  void forget(SpaceId s);

  const bool hierarchical_;
  Names names_;
  std::vector<Space> spaces_;
  std::vector<SpaceId> quotas_;
  SpaceId free_ = kNone, coldest_ = kNone, hottest_ = kNone;
  int num_idle_ = 0;
  SpaceCounts forgotten_;
};

}  // namespace radixkv
