// Types that every part of the core uses: ids, errors, arrays that cost memory only where they are used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace radixkv {

using Token = std::int32_t;
using PageId = std::int32_t;
using NodeId = std::int32_t;
inline constexpr std::int32_t kNone = -1;

// Names the Python class (radixkv/errors.py) that an Error becomes.
enum class ErrorKind { PoolExhausted, LeaseError, InvalidTokens, InvalidArgument, NotCached };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  const ErrorKind kind;
};

// Begin to bring memory into the cache.
inline void prefetch(const void* address, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(address) + i);
}

// A zeroed array of fixed size. The operating system backs it page by page at first touch, so a large pool costs
// what is used of it, and no operation after construction can run out of memory on its account.
template <typename T>
class LazyArray {
 public:
  explicit LazyArray(std::size_t size) : data_(static_cast<T*>(std::calloc(size ? size : 1, sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~LazyArray() { std::free(data_); }
  LazyArray(const LazyArray&) = delete;
  LazyArray& operator=(const LazyArray&) = delete;

  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace radixkv
