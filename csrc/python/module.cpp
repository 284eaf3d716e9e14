// radixkv._core: the native core as Python sees it. Only this folder includes Python.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "base/error.hpp"
#include "base/memory.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cache(nb::module_& m);      // python/cache.cpp
void bind_journal(nb::module_& m);    // python/journal.cpp
void bind_lease(nb::module_& m);      // python/lease.cpp
void bind_step(nb::module_& m);       // python/step.cpp
void bind_cascade(nb::module_& m);    // python/cascade.cpp
void bind_attention(nb::module_& m);  // python/attention.cpp
void bind_tiers(nb::module_& m);      // python/tiers.cpp

namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::PoolExhausted:
      return "PoolExhausted";
    case ErrorKind::LeaseError:
      return "LeaseError";
    case ErrorKind::InvalidTokens:
      return "InvalidTokens";
    case ErrorKind::InvalidArgument:
      return "InvalidArgument";
    case ErrorKind::NotCached:
      return "NotCached";
  }
  return "RadixKVError";
}

void raise_exhausted(const Exhausted& e) {
  const nb::object type = nb::module_::import_("radixkv.errors").attr("PoolExhausted");
  const nb::object error = type(e.what(), "needed"_a = e.counts.needed, "free"_a = e.counts.free,
                                "evictable"_a = e.counts.evictable, "cached"_a = e.counts.cached);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const Exhausted& e) {
    raise_exhausted(e);
  } catch (const Error& e) {
    const nb::object type = nb::module_::import_("radixkv.errors").attr(class_of(e.kind));
    PyErr_SetString(type.ptr(), e.what());
  } catch (const std::logic_error& e) {
    PyErr_SetString(PyExc_AssertionError, e.what());
  }
}

}  // namespace
}  // namespace radixkv

NB_MODULE(_core, m) {
#ifndef RADIXKV_SANITIZE
  nb::set_leak_warnings(false);  // a cache in a module global is alive at exit; that is no leak
#endif
  nb::register_exception_translator(radixkv::translate);
  radixkv::bind_cache(m);
  radixkv::bind_journal(m);
  radixkv::bind_lease(m);
  radixkv::bind_step(m);
  radixkv::bind_cascade(m);
  radixkv::bind_attention(m);
  radixkv::bind_tiers(m);
  m.def("prefer_huge_pages", &radixkv::prefer_huge_pages, "address"_a, "nbytes"_a,
        "Ask that memory be backed by huge pages as it is first touched. A wish: never an error.");
}
