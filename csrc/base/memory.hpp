// Memory: brought into the cache ahead, zeroed lazily, aligned, in huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace radixkv {

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

// Aligned memory that grows and is zeroed when it does.
class AlignedBuffer {
 public:
  void* reserve(std::size_t bytes) {
    constexpr std::size_t kAlign = 64;
    if (bytes > bytes_) {
      const std::size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
      void* memory = std::aligned_alloc(kAlign, rounded);
      if (memory == nullptr) throw std::bad_alloc();
      std::memset(memory, 0, rounded);
      memory_.reset(memory);
      bytes_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

// Huge pages for large buffers: attention reads K and V from addresses all over the pool, and with 4 KiB pages of the
// operating system much of its time goes into looking addresses up.
// Asks that the memory be backed by huge pages as it is first touched. A wish: where it is not granted nothing changes.
inline void prefer_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace radixkv
