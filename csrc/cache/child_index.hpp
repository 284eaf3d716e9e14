// The children of each node, found by the tokens of their first page: one crit-bit tree (PATRICIA trie) per node.
//
// A branch names the first bit in which the keys below its two sides differ. Going down by the bits of a query and
// comparing once at the end finds the child that shares the most leading tokens with it, whole page or part of one;
// that is exactly what token-exact matching needs. The shape depends on the set of keys alone, not on history.
// Morrison 1968, "PATRICIA"; D. J. Bernstein, "Crit-bit trees".
//
// Keys are a namespace and then tokens, most significant bit first, and none is a prefix of another. A reference is a node
// (>= 0), kNone, or a branch (<= -2).
#pragma once

#include <vector>

#include "cache/node.hpp"
#include "cache/pages.hpp"

namespace radixkv {

class ChildIndex {
 public:
  ChildIndex(LazyArray<Node>& nodes, const Pages& pages);

  // Of the children of `parent` that are of this namespace, the one that shares the most leading tokens with the n at
  // `tokens`, and how many; {kNone, 0} if there are none. O(bits in which children differ along the way + page_size).
  struct Best {
    NodeId child;
    std::int32_t shared;
  };
  Best find(NodeId parent, SpaceId space, const Token* tokens, std::int64_t n) const;

  void insert(NodeId child);                      // under nodes[child].parent
  void remove(NodeId child);                      // O(1)
  void replace(NodeId child, NodeId by);          // `by` takes its place; their keys agree in every bit asked above it
  void clear(NodeId parent);                      // forgets the children, keeps the nodes. O(children)
  std::vector<NodeId> list(NodeId parent) const;  // by namespace, then in lexicographic order of their tokens

  bool branches(NodeId parent) const { return is_branch(nodes_[parent].children); }  // it has two children or more
  std::int32_t key_tokens(NodeId node) const;                                        // tokens of its first page
  void check(NodeId parent) const;                                                   // throws std::logic_error

 private:
  struct Branch {
    std::int32_t side[2];  // references
    std::int32_t up;       // the branch above, or kNone; links the free branches
    std::int32_t bit;      // of the tokens, most significant first; -32 to -1: of the namespace before them
  };
  static bool is_branch(std::int32_t ref) { return ref <= -2; }
  static std::int32_t branch_ref(std::int32_t branch) { return -2 - branch; }
  Branch& branch(std::int32_t ref) { return branches_[-2 - ref]; }
  const Branch& branch(std::int32_t ref) const { return branches_[-2 - ref]; }
  static int side_of(std::int32_t bit, SpaceId space, const Token* tokens, std::int64_t n) {
    if (bit < 0) return space >> (~bit & 31) & 1;
    const std::int32_t token = bit >> 5;
    return token < n ? tokens[token] >> (~bit & 31) & 1 : 0;
  }
  std::int32_t first_difference(NodeId a, NodeId b) const;
  NodeId nearest(NodeId parent, SpaceId space, const Token* tokens, std::int64_t n) const;

  void set_up(std::int32_t ref, std::int32_t up);
  void point(NodeId parent, std::int32_t up, std::int32_t from, std::int32_t to);

  LazyArray<Node>& nodes_;
  const Pages& pages_;
  LazyArray<Branch> branches_;
  std::int32_t fresh_ = 0, free_ = kNone;
};

}  // namespace radixkv
