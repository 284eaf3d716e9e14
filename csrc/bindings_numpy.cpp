#include "bindings_numpy.hpp"

namespace nb = nanobind;

namespace radixkv {

namespace {

// What making an array needs from numpy, which is imported when the first is made and kept for the process.
struct Numpy {
  nb::object ndarray, int32, int64;
  Numpy() {
    const nb::module_ numpy = nb::module_::import_("numpy");
    ndarray = numpy.attr("ndarray");
    int32 = numpy.attr("dtype")("int32");
    int64 = numpy.attr("dtype")("int64");
  }
};

const Numpy& numpy() {
  static const Numpy* const kept = new Numpy;  // never destroyed: the interpreter may be gone by then
  return *kept;
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

}  // namespace radixkv
