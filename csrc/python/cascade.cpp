// radixkv._core's part for cascades: what radixkv/attention/cascade.py is made of.
#include "step/cascade.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "python/arrays.hpp"
#include "python/numpy.hpp"
#include "step/table_check.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cascade(nb::module_& m);

namespace {

constexpr std::size_t kSegmentFields = 8;
static_assert(sizeof(Segment) == kSegmentFields * sizeof(std::int32_t));

void expect_length(const char* name, std::size_t have, std::size_t want) {
  if (have == want) return;
  invalid(std::string(name) + " has " + std::to_string(have) + " entries: it must have " + std::to_string(want));
}

// One row of kSegmentFields numbers for each segment, end to end.
nb::object segment_fields(const Cascade& cascade) {
  std::vector<std::int32_t> fields(cascade.segments.size() * kSegmentFields);
  if (!fields.empty()) std::memcpy(fields.data(), cascade.segments.data(), fields.size() * sizeof(std::int32_t));
  return to_numpy(fields);
}

std::shared_ptr<Cascade> derive(const Int32Array& qo_indptr, const Int32Array& kv_indptr, const Int32Array& kv_indices,
                                const Int32Array& kv_last_page_len, std::int32_t page_size, const CascadeCosts& costs) {
  if (page_size < 1) invalid("page_size must be at least 1; got " + str(page_size));
  const PageTableView table = table_view(qo_indptr, kv_indptr, kv_indices, kv_last_page_len);
  auto cascade = std::make_shared<Cascade>();
  const nb::gil_scoped_release release;
  check_table(table, page_size, INT32_MAX);
  cascade->derive(table, page_size, costs);
  return cascade;
}

}  // namespace

PageTableView table_view(const Int32Array& qo_indptr, const Int32Array& kv_indptr, const Int32Array& kv_indices,
                         const Int32Array& kv_last_page_len) {
  const std::size_t batch_size = kv_last_page_len.shape(0);
  expect_length("qo_indptr", qo_indptr.shape(0), batch_size + 1);
  expect_length("kv_indptr", kv_indptr.shape(0), batch_size + 1);
  const std::int64_t num_pages = kv_indptr.data()[batch_size];
  expect_length("kv_indices", kv_indices.shape(0), static_cast<std::size_t>(num_pages < 0 ? 0 : num_pages));
  return PageTableView{static_cast<std::int32_t>(batch_size), qo_indptr.data(), kv_indptr.data(), kv_indices.data(),
                       kv_last_page_len.data()};
}

void bind_cascade(nb::module_& m) {
  nb::class_<CascadeCosts>(m, "CascadeCosts")
      .def(
          "__init__",
          [](CascadeCosts* costs, std::int32_t min_users, std::int32_t min_tokens, double launch_tokens,
             double merge_tokens, std::int32_t max_levels, std::int32_t max_rows, std::int32_t granularity) {
            if (granularity < 1) invalid("granularity must be at least 1");
            new (costs)
                CascadeCosts{min_users, min_tokens, launch_tokens, merge_tokens, max_levels, max_rows, granularity};
          },
          "min_users"_a, "min_tokens"_a, "launch_tokens"_a, "merge_tokens"_a, "max_levels"_a, "max_rows"_a,
          "granularity"_a);

  nb::class_<Cascade>(m, "Cascade", "A step's page table and the segments that its requests share.")
      .def_prop_ro("qo_indptr", [](const Cascade& c) { return to_numpy(c.qo_indptr); })
      .def_prop_ro("kv_indptr", [](const Cascade& c) { return to_numpy(c.kv_indptr); })
      .def_prop_ro("kv_indices", [](const Cascade& c) { return to_numpy(c.kv_indices); })
      .def_prop_ro("kv_last_page_len", [](const Cascade& c) { return to_numpy(c.kv_last_page_len); })
      .def_prop_ro("order", [](const Cascade& c) { return to_numpy(c.order); })
      .def_prop_ro("segments", &segment_fields)
      .def_prop_ro("shared_pages", [](const Cascade& c) { return to_numpy(c.shared_pages); })
      .def_ro("levels", &Cascade::levels)
      .def_ro("page_size", &Cascade::page_size);
  m.def("derive_cascade", &derive, "qo_indptr"_a, "kv_indptr"_a, "kv_indices"_a, "kv_last_page_len"_a, "page_size"_a,
        "costs"_a);
}

}  // namespace radixkv
