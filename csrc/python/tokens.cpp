#include "python/tokens.hpp"

#include <string>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"

namespace nb = nanobind;

namespace radixkv {

namespace {

[[noreturn]] void refuse(const std::string& got) {
  fail(ErrorKind::InvalidTokens, "tokens must be a list of ints or a 1-D int32 or int64 array on the CPU; got " + got);
}

[[noreturn]] void refuse_value(const std::string& value, std::int64_t at) {
  fail(ErrorKind::InvalidTokens, "token " + value + " at index " + str(at) + ": tokens are ids, 0 <= token < 2**31");
}

bool is_items(nb::handle source) { return PyList_Check(source.ptr()) || PyTuple_Check(source.ptr()); }

// Sequences that are no arrays, and neither text nor bytes.
bool is_plain_sequence(nb::handle source) {
  PyObject* o = source.ptr();
  const bool bytes = PyBytes_Check(o) || PyUnicode_Check(o) || PyByteArray_Check(o) || PyMemoryView_Check(o);
  return !bytes && !nb::hasattr(source, "dtype") && PySequence_Check(o);
}

// What other libraries hand over as a DLPack capsule. Called here, so that an interrupt in it passes through.
nb::object dlpack_of(nb::handle source) {
  const nb::object capsule = nb::steal(PyObject_CallMethod(source.ptr(), "__dlpack__", nullptr));
  if (!capsule.is_valid()) {
    forgive();
    refuse(describe(source));
  }
  return capsule;
}

}  // namespace

Tokens::Tokens(nb::handle source) {
  if (is_items(source)) {
    from_items(source);
    return;
  }
  const Array array = is_array(source);
  if (array != Array::yes && nb::hasattr(source, "mask")) {
    refuse(describe(source) + ", which may be masked: pass its filled()");
  }
  if (array != Array::no) {
    if (from_array(source)) return;
    if (is_aligned_by_copy(source) && from_array(nb::object(source.attr("copy")())))
      return;  // a field of a record, say
    refuse(describe(source));
  }
  if (from_array(nb::hasattr(source, "__dlpack__") ? dlpack_of(source) : nb::borrow(source))) return;
  if (!is_plain_sequence(source)) refuse(describe(source));
  from_items(nb::list(nb::borrow(source)));
}

bool Tokens::from_array(nb::handle source) {
  nb::ndarray<const Token, nb::ndim<1>, nb::device::cpu> strided;
  nb::ndarray<const std::int64_t, nb::ndim<1>, nb::device::cpu> wide;
  if (nb::try_cast(source, borrowed_, false)) {
    data_ = borrowed_.data();
    size_ = static_cast<std::int64_t>(borrowed_.shape(0));
  } else if (nb::try_cast(source, strided, false)) {
    owned_.resize(strided.shape(0));
    for (std::size_t i = 0; i < owned_.size(); ++i)
      owned_[i] = strided.data()[strided.stride(0) * static_cast<std::int64_t>(i)];
    own();
  } else if (nb::try_cast(source, wide, false)) {
    from_int64(wide.data(), static_cast<std::int64_t>(wide.shape(0)), wide.stride(0));
  } else {
    return false;
  }
  return true;
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
      if (items[i * stride] >> 31) refuse_value(str(items[i * stride]), i);
    }
  }
  own();
}

namespace {

// The value of an item that is no plain int: what its __index__ says.
nb::object index_of(nb::handle source, nb::handle item, std::int64_t at) {
  nb::object index = nb::steal(PyBool_Check(item.ptr()) ? nullptr : PyNumber_Index(item.ptr()));
  if (index.is_valid()) return index;
  if (PyErr_Occurred()) forgive();
  refuse(describe(source) + " with " + describe(item) + " at index " + str(at));
}

}  // namespace

// The list may change while an item's __index__ runs, so its length is asked for each time.
void Tokens::from_items(nb::handle source) {
  const bool list = PyList_Check(source.ptr());
  const auto size = [&] { return list ? PyList_Size(source.ptr()) : PyTuple_Size(source.ptr()); };
  owned_.reserve(size());
  for (Py_ssize_t i = 0; i < size(); ++i) {
    const nb::object item = nb::borrow(list ? PyList_GetItem(source.ptr(), i) : PyTuple_GetItem(source.ptr(), i));
    const nb::object index = PyLong_CheckExact(item.ptr()) ? item : index_of(source, item, i);
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) refuse_value("of more than 64 bits", i);
    if (value >> 31) refuse_value(str(value), i);
    owned_.push_back(static_cast<Token>(value));
  }
  own();
}

}  // namespace radixkv
