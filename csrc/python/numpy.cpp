#include "python/numpy.hpp"

#include <atomic>

namespace nb = nanobind;

namespace radixkv {

namespace {

// What making an array needs from numpy.
struct Numpy {
  nb::object ndarray, int32, int64;
  explicit Numpy(nb::handle numpy)
      : ndarray(numpy.attr("ndarray")), int32(numpy.attr("dtype")("int32")), int64(numpy.attr("dtype")("int64")) {}
};

std::atomic<const Numpy*> kept{nullptr};  // never destroyed: the interpreter may be gone by then

// Two threads may be here at once, since an import lets go of the GIL; so nothing waits here for anybody. The second
// Numpy is given up.
const Numpy& keep(nb::handle module) {
  auto made = std::make_unique<const Numpy>(module);
  const Numpy* first = nullptr;
  if (kept.compare_exchange_strong(first, made.get())) return *made.release();
  return *first;
}

const Numpy& numpy() {
  if (const Numpy* known = kept.load()) return *known;
  return keep(nb::module_::import_("numpy"));
}

nb::object make(const nb::object& dtype, const void* data, std::size_t size, std::size_t item_bytes) {
  const auto bytes = nb::steal<nb::object>(
      PyByteArray_FromStringAndSize(static_cast<const char*>(data), static_cast<Py_ssize_t>(size * item_bytes)));
  if (!bytes.is_valid()) throw nb::python_error();
  return numpy().ndarray(size, dtype, bytes);
}

}  // namespace

nb::object to_numpy(const std::int32_t* data, std::size_t size) { return make(numpy().int32, data, size, 4); }
nb::object to_numpy(const std::int64_t* data, std::size_t size) { return make(numpy().int64, data, size, 8); }

Array is_array(nb::handle object) {
  const Numpy* known = kept.load();
  if (known == nullptr) {  // whoever has an array has imported numpy
    const nb::object name = nb::str("numpy");
    const nb::object module = nb::steal(PyImport_GetModule(name.ptr()));
    if (!module.is_valid()) PyErr_Clear();
    if (!module.is_valid() || !nb::hasattr(module, "ndarray") || !nb::hasattr(module, "dtype")) return Array::no;
    known = &keep(module);
  }
  if (object.type().is(known->ndarray)) return Array::yes;
  return PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(object.type().ptr()),
                          reinterpret_cast<PyTypeObject*>(known->ndarray.ptr()))
             ? Array::subclass
             : Array::no;
}

bool is_aligned_by_copy(nb::handle array) {
  const nb::object dtype = array.attr("dtype"), dimensions = array.attr("ndim");
  return dimensions.equal(nb::int_(1)) && (dtype.equal(numpy().int32) || dtype.equal(numpy().int64));
}

}  // namespace radixkv
