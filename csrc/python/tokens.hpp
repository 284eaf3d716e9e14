// Tokens from Python: int32 buffers without a copy, int64 buffers and sequences of ints converted and checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "base/ids.hpp"

namespace radixkv {

class Tokens {
 public:
  explicit Tokens(nanobind::handle source);
  const Token* data() const { return data_; }
  std::int64_t size() const { return size_; }

 private:
  bool from_array(nanobind::handle source);  // false: it is no array that fits
  void from_items(nanobind::handle source);  // a list or tuple
  void from_int64(const std::int64_t* items, std::int64_t n, std::int64_t stride);
  void own();

  using Int32 = nanobind::ndarray<const Token, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
  Int32 borrowed_;
  std::vector<Token> owned_;
  const Token* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace radixkv
