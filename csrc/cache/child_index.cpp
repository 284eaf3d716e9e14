#include "cache/child_index.hpp"

#include <algorithm>
#include <bit>

namespace radixkv {

ChildIndex::ChildIndex(LazyArray<Node>& nodes, const Pages& pages)
    : nodes_(nodes), pages_(pages), branches_(pages.num_pages()) {}

std::int32_t ChildIndex::key_tokens(NodeId node) const {
  const Node& n = nodes_[node];
  return n.num_pages == 1 ? n.last_len : pages_.page_size();
}

// The child whose key shares the most leading bits with this one; there must be children.
NodeId ChildIndex::nearest(NodeId parent, SpaceId space, const Token* tokens, std::int64_t n) const {
  std::int32_t ref = nodes_[parent].children;
  while (is_branch(ref)) {
    const Branch& b = branch(ref);
    ref = b.side[side_of(b.bit, space, tokens, n)];
  }
  return ref;
}

ChildIndex::Best ChildIndex::find(NodeId parent, SpaceId space, const Token* tokens, std::int64_t n) const {
  if (nodes_[parent].children == kNone) return {kNone, 0};
  const NodeId child = nearest(parent, space, tokens, n);
  if (nodes_[child].space != space) return {kNone, 0};
  const auto most = static_cast<std::int32_t>(std::min<std::int64_t>(n, key_tokens(child)));
  return {child, pages_.common_prefix(nodes_[child].first, tokens, most)};
}

// The first bit in which the keys of two siblings differ.
std::int32_t ChildIndex::first_difference(NodeId a, NodeId b) const {
  const auto differ = static_cast<std::uint32_t>(nodes_[a].space ^ nodes_[b].space);
  if (differ != 0) return std::countl_zero(differ) - 32;
  const Token *key = pages_.tokens(nodes_[a].first), *other = pages_.tokens(nodes_[b].first);
  const std::int32_t least = std::min(key_tokens(a), key_tokens(b));
  const std::int32_t shared = pages_.common_prefix(nodes_[b].first, key, least);
  if (shared == least) throw std::logic_error("one sibling is a prefix of another");
  return shared * 32 + std::countl_zero(static_cast<std::uint32_t>(key[shared] ^ other[shared]));
}

void ChildIndex::insert(NodeId child) {
  const NodeId parent = nodes_[child].parent;
  nodes_[child].branch = kNone;
  if (nodes_[parent].children == kNone) {
    nodes_[parent].children = child;
    return;
  }
  const Token* key = pages_.tokens(nodes_[child].first);
  const std::int32_t n = key_tokens(child);
  const SpaceId space = nodes_[child].space;
  const std::int32_t bit = first_difference(child, nearest(parent, space, key, n));

  std::int32_t up = kNone, ref = nodes_[parent].children;
  while (is_branch(ref) && branch(ref).bit < bit) {
    up = ref;
    ref = branch(ref).side[side_of(branch(ref).bit, space, key, n)];
  }
  const std::int32_t slot = free_ != kNone ? free_ : fresh_++;
  if (slot == free_) free_ = branches_[slot].up;
  const std::int32_t made = branch_ref(slot);
  const int side = side_of(bit, space, key, n);
  branch(made).bit = bit;
  branch(made).side[side] = child;
  branch(made).side[1 - side] = ref;
  point(parent, up, ref, made);
  set_up(made, up);
  set_up(child, made);
  set_up(ref, made);
}

void ChildIndex::remove(NodeId child) {
  const NodeId parent = nodes_[child].parent;
  const std::int32_t above = nodes_[child].branch;
  nodes_[child].branch = kNone;
  if (above == kNone) {
    nodes_[parent].children = kNone;
    return;
  }
  Branch& b = branch(above);
  const std::int32_t sibling = b.side[b.side[0] == child ? 1 : 0];
  point(parent, b.up, above, sibling);
  set_up(sibling, b.up);
  b.up = free_;
  free_ = -2 - above;
}

void ChildIndex::replace(NodeId child, NodeId by) {
  const std::int32_t above = nodes_[child].branch;
  point(nodes_[child].parent, above, child, by);
  nodes_[by].branch = above;
  nodes_[child].branch = kNone;
}

void ChildIndex::clear(NodeId parent) {
  std::vector<std::int32_t> open{nodes_[parent].children};
  nodes_[parent].children = kNone;
  while (!open.empty()) {
    const std::int32_t ref = open.back();
    open.pop_back();
    if (!is_branch(ref)) continue;
    open.push_back(branch(ref).side[0]);
    open.push_back(branch(ref).side[1]);
    branch(ref).up = free_;
    free_ = -2 - ref;
  }
}

std::vector<NodeId> ChildIndex::list(NodeId parent) const {
  std::vector<NodeId> out;
  std::vector<std::int32_t> open{nodes_[parent].children};
  while (!open.empty()) {
    const std::int32_t ref = open.back();
    open.pop_back();
    if (is_branch(ref)) {
      open.push_back(branch(ref).side[1]);
      open.push_back(branch(ref).side[0]);
    } else if (ref != kNone) {
      out.push_back(ref);
    }
  }
  return out;
}

void ChildIndex::check(NodeId parent) const {
  const std::vector<NodeId> children = list(parent);
  for (std::size_t i = 0; i < children.size(); ++i) {
    const Token* key = pages_.tokens(nodes_[children[i]].first);
    const std::int32_t n = key_tokens(children[i]);
    if (nodes_[children[i]].parent != parent) throw std::logic_error("a child names another parent");
    const SpaceId space = nodes_[children[i]].space;
    if (find(parent, space, key, n).child != children[i]) throw std::logic_error("a child is not found by its tokens");
    if (i == 0) continue;
    const std::int32_t bit = first_difference(children[i - 1], children[i]);
    if (side_of(bit, space, key, n) == 0) throw std::logic_error("siblings disordered");
  }
}

void ChildIndex::set_up(std::int32_t ref, std::int32_t up) {
  (is_branch(ref) ? branch(ref).up : nodes_[ref].branch) = up;
}

void ChildIndex::point(NodeId parent, std::int32_t up, std::int32_t from, std::int32_t to) {
  if (up == kNone) {
    nodes_[parent].children = to;
  } else {
    Branch& b = branch(up);
    b.side[b.side[0] == from ? 0 : 1] = to;
  }
}

}  // namespace radixkv
