// The native halves of Python's objects: what each keeps alive, and how it waits.
//
//   Step ──► PageTable ──► Cache ◄── Journal, Pin
//     └────► Lease ──────────┘
//
// Every arrow is a reference that Python's garbage collector is told of.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cache/cache.hpp"
#include "step/cascade.hpp"
#include "step/page_table.hpp"

namespace radixkv {

// In tokens: shorter calls are over before another thread could use the GIL.
inline constexpr std::int64_t kLongWork = 4096;

class PyCache {
 public:
  PyCache(std::int64_t num_pages, std::int64_t page_size, bool hazard, bool hierarchical)
      : cache(std::make_shared<Cache>(num_pages, page_size, hazard, hierarchical)) {}

  // Runs native work over `tokens` tokens. A long call gives up the GIL; and so does every call while one that did is
  // under way, as it may have to wait for the mutex. With none under way the mutex is free: only its holders give up
  // the GIL while they want it. No native work asks for the GIL while it holds the mutex.
  template <typename F>
  auto work(std::int64_t tokens, F&& f) {
    if (tokens < kLongWork && without_gil_ == 0) return f();
    const Count count(without_gil_);
    const nanobind::gil_scoped_release release;
    return f();
  }

  const std::shared_ptr<Cache> cache;

 private:
  struct Count {
    explicit Count(int& n) : n(n) { ++n; }
    ~Count() { --n; }
    int& n;
  };
  int without_gil_ = 0;  // calls under way; guarded by the GIL
};

// The owner of a Cache, a Lease or a PageTable as Python holds it: a reference to the cache's object.
class CacheRef {
 public:
  explicit CacheRef(nanobind::handle object)
      : object_(nanobind::borrow(object)), cache_(nanobind::inst_ptr<PyCache>(object)) {}
  PyCache& operator*() const { return *cache_; }
  PyCache* operator->() const { return cache_; }
  nanobind::handle object() const { return object_; }

 private:
  nanobind::object object_;
  PyCache* cache_;
};

class PyLease {
 public:
  PyLease(CacheRef owner, std::unique_ptr<Lease> lease) : owner(std::move(owner)), lease(std::move(lease)) {}
  PyLease(PyLease&&) = default;
  ~PyLease() {  // a lease that is dropped waits like any other call
    if (lease) owner->work(0, [&] { lease.reset(); });
  }

  CacheRef owner;
  std::unique_ptr<Lease> lease;
};

// What attention is planned from: a table of leases, or one of arrays.
class PyTable {
 public:
  PyTable() = default;
  PyTable(const PyTable&) = delete;
  PyTable& operator=(const PyTable&) = delete;
  virtual ~PyTable() = default;
  virtual const StepTable& table() const = 0;
  virtual const StepInputs& inputs() const = 0;
};

class PyPageTable final : public PyTable {
 public:
  explicit PyPageTable(CacheRef owner) : owner(std::move(owner)), steps(this->owner->cache) {}
  const StepTable& table() const override { return steps.table(); }
  const StepInputs& inputs() const override { return steps.inputs(); }

  CacheRef owner;
  PageTable steps;
};

class PyArrayTable final : public PyTable {
 public:
  explicit PyArrayTable(StepTable table) : table_(std::move(table)) {}
  const StepTable& table() const override { return table_; }
  const StepInputs& inputs() const override { return none_; }

 private:
  StepTable table_;
  StepInputs none_;
};

// What a step's requests share, and their pages: copied when somebody first asks, which the step must be open for.
class PyCascade {
 public:
  PyCascade(StepTable table, std::shared_ptr<const Cascade> cascade)
      : table(std::move(table)), cascade(std::move(cascade)) {}
  const std::vector<std::int32_t>& kv_indices() {
    if (!kv_indices_) kv_indices_ = table.kv_indices();
    return *kv_indices_;
  }

  const StepTable table;
  const std::shared_ptr<const Cascade> cascade;

 private:
  std::optional<std::vector<std::int32_t>> kv_indices_;
};

}  // namespace radixkv
