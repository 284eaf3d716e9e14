#include "bindings_tokens.hpp"

#include <nanobind/stl/string.h>

#include <string>

namespace nb = nanobind;

namespace radixkv {

namespace {

[[noreturn]] void refuse(const std::string& got) {
  throw Error(ErrorKind::InvalidTokens,
              "tokens must be a list of ints or a 1-D int32 or int64 array on the CPU; got " + got);
}

[[noreturn]] void refuse_value(const std::string& value, std::int64_t at) {
  throw Error(ErrorKind::InvalidTokens,
              "token " + value + " at index " + std::to_string(at) + ": tokens are ids, 0 <= token < 2**31");
}

std::string text(nb::handle object) { return nb::cast<std::string>(nb::steal<nb::object>(PyObject_Str(object.ptr()))); }

std::string describe(nb::handle source) {
  std::string out = text(nb::type_name(source.type()));
  if (nb::hasattr(source, "dtype") && nb::hasattr(source, "shape")) {
    out += " of " + text(source.attr("dtype")) + ", shape " + text(nb::tuple(source.attr("shape")));
  }
  return out;
}

bool is_plain_sequence(nb::handle source) {
  PyObject* o = source.ptr();
  const bool text = PyBytes_Check(o) || PyUnicode_Check(o) || PyByteArray_Check(o);
  return !text && !nb::hasattr(source, "dtype") && PySequence_Check(o);
}

}  // namespace

Tokens::Tokens(nb::handle source) {
  nb::ndarray<const Token, nb::ndim<1>, nb::device::cpu> strided;
  nb::ndarray<const std::int64_t, nb::ndim<1>, nb::device::cpu> wide;
  if (PyList_Check(source.ptr()) || PyTuple_Check(source.ptr())) {
    from_sequence(source);
  } else if (nb::try_cast(source, borrowed_, false)) {
    data_ = borrowed_.data();
    size_ = static_cast<std::int64_t>(borrowed_.shape(0));
  } else if (nb::try_cast(source, strided, false)) {
    owned_.resize(strided.shape(0));
    for (std::size_t i = 0; i < owned_.size(); ++i)
      owned_[i] = strided.data()[strided.stride(0) * static_cast<std::int64_t>(i)];
    own();
  } else if (nb::try_cast(source, wide, false)) {
    from_int64(wide.data(), static_cast<std::int64_t>(wide.shape(0)), wide.stride(0));
  } else if (is_plain_sequence(source)) {
    from_sequence(nb::list(nb::borrow<nb::object>(source)));
  } else {
    refuse(describe(source));
  }
}

void Tokens::own() {
  data_ = owned_.data();
  size_ = static_cast<std::int64_t>(owned_.size());
}

void Tokens::from_int64(const std::int64_t* items, std::int64_t n, std::int64_t stride) {
  owned_.resize(n);
  std::int64_t out_of_range = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t item = items[i * stride];
    out_of_range |= item >> 31;
    owned_[i] = static_cast<Token>(item);
  }
  if (out_of_range != 0) {
    for (std::int64_t i = 0; i < n; ++i) {
      if (items[i * stride] >> 31) refuse_value(std::to_string(items[i * stride]), i);
    }
  }
  own();
}

void Tokens::from_sequence(nb::handle source) {
  const Py_ssize_t n = PySequence_Size(source.ptr());
  owned_.resize(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const nb::object item = source[i];
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      refuse(describe(source) + " with " + describe(item) + " at index " + std::to_string(i));
    }
    if (overflow || value >> 31) refuse_value(text(item), i);
    owned_[i] = static_cast<Token>(value);
  }
  own();
}

}  // namespace radixkv
