// Arguments from Python, checked: what does not fit raises one of radixkv's errors, and what Python code that is called
// on the way raises (a KeyboardInterrupt, say) passes through.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace radixkv {

// An int or what has __index__, bool excepted, below 2**63 in size; else InvalidArgument.
std::int64_t int_from(nanobind::handle object, const char* name);

// The UTF-8 of a str, which lives as long as the str does; else InvalidArgument.
std::string_view namespace_from(nanobind::handle object);

// str(object), or repr(object); the name of its type where that raises.
std::string text(nanobind::handle object, PyObject* (*form)(PyObject*) = PyObject_Str);

// What an object is, for "got ...": its type, and dtype, shape and device where it is an array.
std::string describe(nanobind::handle object);

// Goes on after a Python call that raised TypeError, OverflowError or the like; throws whatever is no Exception.
void forgive();

}  // namespace radixkv
