// Numpy arrays for Python, each a copy of its own.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace radixkv {

// A one-dimensional array of `size` items. The memory is a bytearray's, made in half the time of a capsule's.
nanobind::object to_numpy(const std::int32_t* data, std::size_t size);
nanobind::object to_numpy(const std::int64_t* data, std::size_t size);

template <typename T>
nanobind::object to_numpy(const std::vector<T>& values) {
  return to_numpy(values.data(), values.size());
}

// Whether an object is a numpy array, or of a subclass, which may mean something else (a mask).
enum class Array { no, yes, subclass };
Array is_array(nanobind::handle object);
// Whether a numpy array is one-dimensional of int32 or int64, and so needs but a copy to be read with an even stride.
bool is_aligned_by_copy(nanobind::handle array);

}  // namespace radixkv
