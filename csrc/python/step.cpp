// radixkv._core's part for steps: the page table, and a step that is open over some leases.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_step(nb::module_& m);

namespace {

constexpr const char* kStepDoc =
    R"(A step over the unwritten tokens of some leases, open inside its `with` block. The native half of radixkv.Step.

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

class PyStep {
 public:
  PyStep(nb::handle table, nb::handle leases, std::int64_t num_layers)
      : table_(nb::borrow(table)),
        page_table_(nb::inst_ptr<PyPageTable>(table)),
        leases_(list_of(leases)),
        attended_(num_layers, false) {}
  PyStep(const PyStep&) = delete;
  ~PyStep() {
    if (open_) page_table_->table.let_go();
  }

  void enter(nb::handle self) {
    if (open_) fail(ErrorKind::LeaseError, "the step is open already: enter it once");
    page_table_->table.begin(batch(leases_));
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
    page_table_->owner->work(0, [&] { page_table_->table.end(written); });
    open_ = false;
    if (written || !normally) return;
    fail(ErrorKind::LeaseError, "the step attended " + str(done) + " of " + str(layers) +
                                    " layers: a page is written only when every layer is, so no lease was "
                                    "advanced");
  }

  void attended(std::int64_t layer) { attended_.at(layer) = true; }
  bool open() const { return open_; }
  std::size_t num_leases() const { return nb::len(leases_); }
  nb::handle table() const { return table_; }
  nb::handle leases() const { return leases_; }

 private:
  void let_go() {
    page_table_->table.let_go();
    open_ = false;
  }

  nb::object table_;
  PyPageTable* page_table_;
  nb::list leases_;
  std::vector<bool> attended_;
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

template <auto Array>
nb::object array(const PyPageTable& t) {
  return to_numpy(t.table.*Array);
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<PyPageTable>(m, "PageTable", nb::type_slots(table_slots),
                          "The arrays of one step over a batch of leases of one cache; each property is a copy.")
      .def(
          "__init__", [](PyPageTable* self, PyCache& cache) { new (self) PyPageTable(CacheRef(nb::find(cache))); },
          "cache"_a)
      .def_prop_ro("window_limit", [](const PyPageTable& t) { return t.table.window_limit; })
      .def_prop_ro("qo_indptr", &array<&PageTable::qo_indptr>)
      .def_prop_ro("kv_indptr", &array<&PageTable::kv_indptr>)
      .def_prop_ro("kv_indices", &array<&PageTable::kv_indices>)
      .def_prop_ro("kv_last_page_len", &array<&PageTable::kv_last_page_len>)
      .def_prop_ro("slots", &array<&PageTable::slots>)
      .def_prop_ro("copy_source", &array<&PageTable::copy_source>)
      .def_prop_ro("copy_target", &array<&PageTable::copy_target>)
      .def_prop_ro("input_ids", &array<&PageTable::input_ids>)
      .def_prop_ro("positions", &array<&PageTable::positions>)
      .def_prop_ro("last_rows", &array<&PageTable::last_rows>);

  nb::class_<PyStep>(m, "Step", nb::type_slots(step_slots), kStepDoc)
      .def(
          "__init__",
          [](PyStep* self, PyPageTable& table, nb::handle leases, std::int64_t num_layers) {
            new (self) PyStep(nb::find(table), leases, num_layers);
          },
          "table"_a, "leases"_a.none(), "num_layers"_a)
      .def_prop_ro("is_open", &PyStep::open, "Whether it was entered and not left yet.")
      .def_prop_ro("num_leases", &PyStep::num_leases)
      .def(
          "_prepare", [](PyStep&) {}, "What a subclass does on entering, once the page table is assembled.")
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
