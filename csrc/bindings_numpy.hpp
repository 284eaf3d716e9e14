// Numpy arrays for Python, each a copy of its own.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

namespace radixkv {

// A one-dimensional array of `size` items. The memory is a bytearray's, made in half the time of a capsule's.
nanobind::object to_numpy(const std::int32_t* data, std::size_t size);
nanobind::object to_numpy(const std::int64_t* data, std::size_t size);

template <typename T>
nanobind::object to_numpy(const std::vector<T>& values) {
  return to_numpy(values.data(), values.size());
}

}  // namespace radixkv
