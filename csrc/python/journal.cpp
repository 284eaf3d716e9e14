// radixkv._core's part for the journal: what radixkv/journal.py reads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_journal(nb::module_& m);

namespace {

std::int64_t at_least_0(nb::handle object, const char* name) {
  const std::int64_t n = int_from(object, name);
  if (n < 0) invalid(std::string(name) + " must be at least 0; got " + str(n));
  return n;
}

// (op, page, parent, root, request, tokens, names, cursor, lost)
nb::tuple columns(const JournalBatch& batch) {
  nb::dict names;
  for (const auto& [i, name] : batch.names) names[nb::int_(i)] = name;
  return nb::make_tuple(to_numpy(batch.op), to_numpy(batch.page), to_numpy(batch.parent), to_numpy(batch.root),
                        to_numpy(batch.request), to_numpy(batch.tokens), names, batch.cursor, batch.lost);
}

// Records that NumPy shall read are copied under the mutex and without the GIL.
nb::tuple read(PyCache& c, nb::handle cursor, nb::handle limit) {
  const std::int64_t from = at_least_0(cursor, "cursor"), most = at_least_0(limit, "limit");
  return columns(c.work(kLongWork, [&] { return c.cache->read_journal(from, most); }));
}

nb::tuple read_releases(PyCache& c, nb::handle cursor, nb::handle limit) {
  const std::int64_t from = at_least_0(cursor, "cursor"), most = at_least_0(limit, "limit");
  const ReleaseBatch batch = c.work(kLongWork, [&] { return c.cache->read_releases(from, most); });
  nb::list releases;
  for (const Release& r : batch.releases) {
    releases.append(nb::make_tuple(r.name, r.num_prompt, to_numpy(r.tokens), r.request, r.num_cached, r.at));
  }
  return nb::make_tuple(releases, batch.cursor, batch.lost);
}

nb::tuple ends(PyCache& c) {
  const auto [records, releases] = c.work(0, [&] { return c.cache->journal_ends(); });
  return nb::make_tuple(records, releases);
}

// The cache's journal, which records from the moment that the first of these is made.
class PyJournal {
 public:
  explicit PyJournal(CacheRef owner) : owner(std::move(owner)) {
    this->owner->work(kLongWork, [&] { this->owner->cache->start_journal(); });
  }
  CacheRef owner;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyJournal>(self)->owner.object().ptr());
  return 0;
}

PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {0, nullptr}};

}  // namespace

void bind_journal(nb::module_& m) {
  nb::class_<PyJournal>(m, "Journal", nb::type_slots(slots), "The native half of radixkv.journal.Journal.")
      .def(
          "__init__", [](PyJournal* self, PyCache& cache) { new (self) PyJournal(CacheRef(nb::find(cache))); },
          "cache"_a)
      .def(
          "_read", [](PyJournal& j, nb::handle cursor, nb::handle limit) { return read(*j.owner, cursor, limit); },
          "cursor"_a.none(), "limit"_a.none())
      .def(
          "_releases",
          [](PyJournal& j, nb::handle cursor, nb::handle limit) { return read_releases(*j.owner, cursor, limit); },
          "cursor"_a.none(), "limit"_a.none())
      .def("_dump",
           [](PyJournal& j) {
             return columns(j.owner->work(kLongWork, [&] { return j.owner->cache->dump_journal(); }));
           })
      .def_prop_ro(
          "page_size", [](const PyJournal& j) { return j.owner->cache->page_size(); }, "Tokens a page holds.")
      .def(
          "still",
          [](PyJournal& j, const std::vector<std::int64_t>& pages, const std::vector<std::int64_t>& numbers) {
            return j.owner->work(0, [&] { return j.owner->cache->still_stored(pages, numbers); });
          },
          "pages"_a, "numbers"_a,
          "For each page, whether it is still in the tree, and has been since the STORED record with that number. Who "
          "copied a page without a lock asks afterwards: if so, what was copied is what was published.")
      .def("_ends", [](PyJournal& j) { return ends(*j.owner); });
}

}  // namespace radixkv
