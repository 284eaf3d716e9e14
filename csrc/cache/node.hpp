// One node of the radix tree: an edge that holds a run of pages.
//
//   root ── [p0 p1 p2] ──┬── [p3 p4 p5]            page_size 4; every page but a leaf's open page is full
//                        ├── [p6] ── [p7 (3 tok.)]  an open page is always alone in its node and has no children
//                        └── [p8 p9]
//
// Siblings may share the first tokens of their first pages (the match ended inside a page and the page was copied),
// but none is a prefix of another of the same namespace.
//
// A node is identified by its id, and a split keeps the id on the lower part: whoever locked the node locked the path
// down to its end, and that end is where it was.
#pragma once

#include "base/ids.hpp"

namespace radixkv {

struct Node {
  NodeId parent;       // kNone in a root; links the free nodes
  SpaceId space;       // whose pages these are: its parent's namespace, or one below that
  PageId first, last;  // its run of pages, linked by Pages::next and prev; kNone in a root
  std::int32_t num_pages;
  std::int32_t last_len;  // tokens in its last page: page_size, or fewer in a node that is one open page
  std::int32_t children;  // ChildIndex reference to its children
  std::int32_t branch;    // above it in its parent's ChildIndex; kNone: it is the only child
  NodeId colder, hotter;  // neighbours on its LRU list; a node is on one while RadixTree::listed()
  std::int32_t locks;     // leases and pins that end here, plus children with locks
  std::int32_t pins;      // pins that end here, plus children with pins
  std::int32_t holds;     // leases that have yet to copy from its (only) page
  std::uint16_t list;     // the LRU list that it is on, or shall go onto
  bool root : 1;
  bool detached : 1;  // out of the tree, alive until the last lock and hold go
  bool branched : 1;  // it, or a node below it, had two children once: several sessions began with it
};

}  // namespace radixkv
