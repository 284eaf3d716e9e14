// radixkv._core: the native core as Python sees it. Only this folder includes Python.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "base/common.hpp"
#include "base/huge_pages.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cache(nb::module_& m);      // python/cache.cpp
void bind_lease(nb::module_& m);      // python/lease.cpp
void bind_step(nb::module_& m);       // python/step.cpp
void bind_cascade(nb::module_& m);    // python/cascade.cpp
void bind_attention(nb::module_& m);  // python/attention.cpp

namespace {

void translate(const std::exception_ptr& p, void*) {
  const auto raise = [](const char* name, const char* what) {
    PyErr_SetString(nb::object(nb::module_::import_("radixkv.errors").attr(name)).ptr(), what);
  };
  static constexpr const char* names[] = {"PoolExhausted", "LeaseError", "InvalidTokens", "InvalidArgument",
                                          "NotCached"};
  try {
    std::rethrow_exception(p);
  } catch (const Error& e) {
    raise(names[static_cast<int>(e.kind)], e.what());
  } catch (const std::invalid_argument& e) {
    raise("InvalidArgument", e.what());
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
  radixkv::bind_lease(m);
  radixkv::bind_step(m);
  radixkv::bind_cascade(m);
  radixkv::bind_attention(m);
  m.def("prefer_huge_pages", &radixkv::prefer_huge_pages, "address"_a, "nbytes"_a,
        "Ask that memory be backed by huge pages as it is first touched. A wish: never an error.");
}
