// The work of one step for layers of one shape: which blocks there are, in which order, and which are split into chunks.
// Nothing of this changes a bit of the result.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.hpp"
#include "step/cascade.hpp"

namespace radixkv::attention {

// What a schedule needs to know of a layer.
struct LayerShape {
  std::int32_t num_qo_heads;
  std::int32_t num_kv_heads;
  std::int32_t k_dim;
  std::int32_t v_dim;

  explicit LayerShape(const LayerKV& layer)
      : num_qo_heads(layer.num_qo_heads), num_kv_heads(layer.num_kv_heads), k_dim(layer.k.dim), v_dim(layer.v.dim) {}
  std::int32_t group() const { return num_qo_heads / num_kv_heads; }
  bool operator==(const LayerShape&) const = default;
};

// The rows of requests that have a used segment, in the order in which the users of a segment are neighbours: their
// state goes from segment to segment.
struct CarriedRows {
  std::vector<std::int32_t> rows;
  std::vector<std::int64_t> positions;
  std::vector<std::int32_t> of_request;  // first carried row of each request, or -1

  void find(const PageTableView& table, const Cascade& cascade);
  std::int64_t count() const { return static_cast<std::int64_t>(rows.size()); }
};

// A block over some keys. Phases run one after the other: first the segments that begin at the root, then those that
// continue them, and so on; last what is each request's own.
struct Item {
  Block block;
  std::int64_t key_begin;
  std::int64_t key_end;
  std::int32_t phase;
  std::int32_t depth;    // used segments before it on its rows' path
  std::int32_t carried;  // the block's first carried row, or -1
  double cost;
  std::int32_t split = -1;  // or it is a part of this one
  std::int32_t part = 0;
};

// A block whose chunks are computed independently and merged by whoever finishes last.
struct Split {
  std::int64_t state_offset;  // floats into the plan's states, one state per part
  std::int32_t num_parts;
};

class Schedule {
 public:
  explicit Schedule(const LayerShape& shape) : shape(shape) {}
  void make(const PageTableView& table, const Cascade& cascade, const CarriedRows& carried, int num_threads);
  std::int64_t block_vectors(const Block& block) const;

  const LayerShape shape;
  std::vector<Item> items;  // by phase, the costly ones first
  std::vector<std::int64_t> phase_ends;
  std::vector<Split> splits;
  std::int64_t states_floats = 0;
  std::int64_t max_block_vectors = 0;
  bool serial = true;  // too little work to wake a thread for

 private:
  struct Step {
    const PageTableView& table;
    const Cascade& cascade;
    const CarriedRows& carried;
    int num_threads;
  };
  void add_segment(const Step& step, const Segment& segment, std::vector<Item>& blocks) const;
  void add_requests(const Step& step, std::vector<Item>& blocks) const;
  void add_item(const Item& item, double fair);
  double cost(const Block& block, std::int64_t keys) const;
};

}  // namespace radixkv::attention
