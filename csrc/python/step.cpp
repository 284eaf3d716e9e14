// radixkv._core's part for steps: page tables, and a step that is open over some leases.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <limits>
#include <span>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"
#include "step/table_check.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_step(nb::module_& m);

namespace {

constexpr const char* kStepDoc =
    R"(A step over the unwritten tokens of some leases, open inside its `with` block. The native half of radixkv.Step.

max_rows: of each lease at most so many, the first ones. None: all.

Entering and leaving are native, so no signal finds them half done. Entering assembles the page table and calls
_prepare(); if that raises, nothing is open. Leaving normally advances each lease by the rows that were planned for it,
provided that every layer was attended; an exception advances none. In either case, and where the step is dropped
without being left, its leases are free again.)";

// The leases lie anywhere in memory, and a step touches each of them: what it will read is fetched ahead.
std::vector<Lease*> batch(const nb::list& leases) {
  std::vector<Lease*> out;
  const std::size_t count = nb::len(leases);
  out.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + 8 < count) prefetch(PyList_GetItem(leases.ptr(), static_cast<Py_ssize_t>(i + 8)), 64);
    const nb::handle item = PyList_GetItem(leases.ptr(), static_cast<Py_ssize_t>(i));
    if (!nb::isinstance<PyLease>(item) || !nb::inst_ready(item)) {
      invalid("a step takes leases; got " + describe(item));
    }
    Lease* const lease = nb::inst_ptr<PyLease>(item)->lease.get();
    prefetch(lease, sizeof(Lease));
    out.push_back(lease);
  }
  return out;
}

nb::list list_of(nb::handle leases) {
  nb::object list = nb::steal(PySequence_List(leases.ptr()));
  if (list.is_valid()) return nb::list(list);
  forgive();
  invalid("a step takes a list of leases; got " + describe(leases));
}

std::int64_t most_rows(nb::handle max_rows) {
  if (max_rows.is_none()) return std::numeric_limits<std::int64_t>::max();
  const std::int64_t most = int_from(max_rows, "max_rows");
  if (most < 1) invalid("max_rows must be at least 1, or None for all; got " + str(most));
  return most;
}

class PyStep {
 public:
  PyStep(nb::handle table, nb::handle leases, std::int64_t num_layers, std::int64_t max_rows)
      : table_(nb::borrow(table)),
        page_table_(nb::inst_ptr<PyPageTable>(table)),
        leases_(list_of(leases)),
        attended_(num_layers, false),
        max_rows_(max_rows) {}
  PyStep(const PyStep&) = delete;
  ~PyStep() {
    if (open_) page_table_->steps.let_go();
  }

  void enter(nb::handle self) {
    if (open_) fail(ErrorKind::LeaseError, "the step is open already: enter it once");
    page_table_->steps.begin(batch(leases_), max_rows_);
    open_ = true;
    attended_.assign(attended_.size(), false);
    try {
      self.attr("_prepare")();
    } catch (...) {
      let_go();
      throw;
    }
  }

  void leave(bool normally) {
    if (!open_) return;
    std::int64_t done = 0;
    for (const bool attended : attended_) done += attended;
    const auto layers = static_cast<std::int64_t>(attended_.size());
    const bool written = normally && done == layers;
    page_table_->owner->work(0, [&] { page_table_->steps.end(written); });
    open_ = false;
    if (written || !normally) return;
    fail(ErrorKind::LeaseError, "the step attended " + str(done) + " of " + str(layers) +
                                    " layers: a page is written only when every layer is, so no lease was "
                                    "advanced");
  }

  void attended(std::int64_t layer) { attended_.at(layer) = true; }
  bool has_attended(std::int64_t layer) const { return attended_.at(layer); }
  bool open() const { return open_; }
  std::size_t num_leases() const { return nb::len(leases_); }
  nb::handle table() const { return table_; }
  nb::handle leases() const { return leases_; }

 private:
  void let_go() {
    page_table_->steps.let_go();
    open_ = false;
  }

  nb::object table_;
  PyPageTable* page_table_;
  nb::list leases_;
  std::vector<bool> attended_;
  const std::int64_t max_rows_;  // of each lease
  bool open_ = false;
};

int traverse_table(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyPageTable>(self)->owner.object().ptr());
  return 0;
}

int traverse_step(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  Py_VISIT(nb::inst_ptr<PyStep>(self)->table().ptr());
  Py_VISIT(nb::inst_ptr<PyStep>(self)->leases().ptr());
  return 0;
}

PyType_Slot table_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_table)}, {0, nullptr}};
PyType_Slot step_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_step)}, {0, nullptr}};

using Int32Array = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::int32_t> span_of(const Int32Array& array) { return {array.data(), array.shape(0)}; }

void make_array_table(PyArrayTable* self, const Int32Array& qo_indptr, const Int32Array& kv_indptr,
                      const Int32Array& kv_indices, const Int32Array& kv_last_page_len, const Int32Array& slots,
                      std::int32_t num_pages, std::int32_t page_size) {
  const TableArrays arrays{span_of(qo_indptr), span_of(kv_indptr), span_of(kv_indices), span_of(kv_last_page_len),
                           span_of(slots)};
  new (self) PyArrayTable(checked_table(arrays, num_pages, page_size));
}

template <auto Array>
nb::object array(const PyTable& t) {
  return to_numpy(t.table().*Array);
}

template <auto Array>
nb::object input(const PyTable& t) {
  return to_numpy(t.inputs().*Array);
}

// [begin, end) of each array, in the order of Staging::Array.
nb::list stage(const PyTable& t, std::uintptr_t address, std::int64_t entries) {
  const Staging staging(t.table(), t.inputs());
  if (staging.entries() > entries) {
    invalid("the arrays of this step take " + str(staging.entries()) + " entries: there is room for " + str(entries));
  }
  staging.write(reinterpret_cast<std::int32_t*>(address));
  nb::list spans;
  for (int i = 0; i < Staging::kArrays; ++i) spans.append(nb::make_tuple(staging.begin(i), staging.end(i)));
  return spans;
}

void bind_tables(nb::module_& m) {
  nb::class_<PyTable>(m, "Table", "The page table of one step; each array is a copy.")
      .def_prop_ro("num_pages", [](const PyTable& t) { return t.table().num_pages; })
      .def_prop_ro("page_size", [](const PyTable& t) { return t.table().page_size; })
      .def_prop_ro("num_requests", [](const PyTable& t) { return t.table().batch_size(); })
      .def_prop_ro("num_rows", [](const PyTable& t) { return t.table().num_rows(); })
      .def_prop_ro("qo_indptr", &array<&StepTable::qo_indptr>)
      .def_prop_ro("kv_indptr", [](const PyTable& t) { return to_numpy(t.table().kv_indptr()); })
      .def_prop_ro(
          "kv_indices", [](const PyTable& t) { return to_numpy(t.table().kv_indices()); },
          "O(pages); raises LeaseError once the step has ended.")
      .def_prop_ro("kv_last_page_len", &array<&StepTable::kv_last_page_len>)
      .def_prop_ro("slots", &array<&StepTable::slots>)
      .def_prop_ro("input_ids", &input<&StepInputs::input_ids>)
      .def_prop_ro("positions", &input<&StepInputs::positions>)
      .def_prop_ro("last_rows", &input<&StepInputs::last_rows>)
      .def_prop_ro(
          "staged_entries", [](const PyTable& t) { return Staging(t.table(), t.inputs()).entries(); },
          "Entries of 4 bytes that stage() writes.")
      .def("stage", &stage, "address"_a, "entries"_a,
           "Write all arrays end to end into this memory; returns where each begins and ends, in entries of 4 bytes.");

  nb::class_<PyArrayTable, PyTable>(m, "ArrayTable", "A table of arrays, checked and copied. It has no inputs.")
      .def("__init__", &make_array_table, "qo_indptr"_a, "kv_indptr"_a, "kv_indices"_a, "kv_last_page_len"_a, "slots"_a,
           "num_pages"_a, "page_size"_a);

  nb::class_<PyPageTable, PyTable>(m, "PageTable", nb::type_slots(table_slots),
                                   "Opens steps over leases of one cache; the table of the last one.")
      .def(
          "__init__", [](PyPageTable* self, PyCache& cache) { new (self) PyPageTable(CacheRef(nb::find(cache))); },
          "cache"_a)
      .def_prop_ro("window_limit", [](const PyPageTable& t) { return t.steps.window_limit(); })
      .def_prop_ro("copy_source", [](const PyPageTable& t) { return to_numpy(t.steps.copy_source()); })
      .def_prop_ro("copy_target", [](const PyPageTable& t) { return to_numpy(t.steps.copy_target()); });
}

}  // namespace

void bind_step(nb::module_& m) {
  bind_tables(m);

  nb::class_<PyStep>(m, "Step", nb::type_slots(step_slots), kStepDoc)
      .def(
          "__init__",
          [](PyStep* self, PyPageTable& table, nb::handle leases, std::int64_t num_layers, nb::handle max_rows) {
            new (self) PyStep(nb::find(table), leases, num_layers, most_rows(max_rows));
          },
          "table"_a, "leases"_a.none(), "num_layers"_a, "max_rows"_a = nb::none())
      .def_prop_ro("is_open", &PyStep::open, "Whether it was entered and not left yet.")
      .def_prop_ro("num_leases", &PyStep::num_leases)
      .def(
          "_prepare", [](PyStep&) {}, "What a subclass does on entering, once the page table is assembled.")
      .def("_has_attended", &PyStep::has_attended, "layer"_a)
      .def("_attended", &PyStep::attended, "layer"_a, "Note that this layer's K and V are written.")
      .def("__enter__",
           [](PyStep& s) {
             const nb::object self = nb::find(s);
             s.enter(self);
             return self;
           })
      .def(
          "__exit__", [](PyStep& s, nb::handle type, nb::handle, nb::handle) { s.leave(type.is_none()); },
          "type"_a.none(), "value"_a.none(), "traceback"_a.none());
}

}  // namespace radixkv
