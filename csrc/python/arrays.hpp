// The arrays of a page table as Python passes them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "step/table_view.hpp"

namespace radixkv {

using Int32Array = nanobind::ndarray<const std::int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// A view of the arrays. Throws Error (InvalidArgument) where their lengths do not fit each other.
PageTableView table_view(const Int32Array& qo_indptr, const Int32Array& kv_indptr, const Int32Array& kv_indices,
                         const Int32Array& kv_last_page_len);

}  // namespace radixkv
