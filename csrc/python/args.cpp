#include "python/args.hpp"

#include "base/error.hpp"

namespace nb = nanobind;

namespace radixkv {

namespace {

// An attribute, or an invalid object where there is none.
nb::object attribute(nb::handle object, const char* name) {
  nb::object value = nb::steal(PyObject_GetAttrString(object.ptr(), name));
  if (!value.is_valid()) forgive();
  return value;
}

}  // namespace

void forgive() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw nb::python_error();
  PyErr_Clear();
}

std::string text(nb::handle object, PyObject* (*form)(PyObject*)) {
  const nb::object str = nb::steal(form(object.ptr()));
  if (str.is_valid()) {
    Py_ssize_t size = 0;
    if (const char* utf8 = PyUnicode_AsUTF8AndSize(str.ptr(), &size)) return std::string(utf8, size);
  }
  forgive();
  return "<" + std::string(nb::type_name(object.type()).c_str()) + " that cannot be printed>";
}

std::string describe(nb::handle object) {
  std::string out = nb::type_name(object.type()).c_str();
  const nb::object dtype = attribute(object, "dtype"), shape = attribute(object, "shape");
  if (!dtype.is_valid() || !shape.is_valid()) return out;
  const nb::object as_tuple = nb::steal(PySequence_Tuple(shape.ptr()));
  if (!as_tuple.is_valid()) forgive();
  out += " of " + text(dtype) + ", shape " + text(as_tuple.is_valid() ? as_tuple : shape);
  if (const nb::object device = attribute(object, "device"); device.is_valid() && text(device) != "cpu") {
    out += ", on " + text(device);
  }
  return out;
}

std::int64_t int_from(nb::handle object, const char* name) {
  const nb::object index = nb::steal(PyBool_Check(object.ptr()) ? nullptr : PyNumber_Index(object.ptr()));
  if (!index.is_valid()) {
    if (PyErr_Occurred()) forgive();
    invalid(std::string(name) + " must be an int; got " + text(object, PyObject_Repr));
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) invalid(std::string(name) + " must be an int of 64 bits; got a larger one");
  if (value == -1 && PyErr_Occurred()) throw nb::python_error();
  return value;
}

std::string_view namespace_from(nb::handle object) {
  if (!PyUnicode_Check(object.ptr())) {
    invalid("a namespace is a str (\"\" by default); got " + describe(object));
  }
  Py_ssize_t size = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (utf8 == nullptr) {
    forgive();
    invalid("a namespace must have a UTF-8 form; got one with a lone surrogate, " + text(object, PyObject_Repr));
  }
  return {utf8, static_cast<std::size_t>(size)};
}

}  // namespace radixkv
