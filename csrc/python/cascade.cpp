// radixkv._core's part for cascades: what radixkv/attention/cascade.py is made of.
#include "step/cascade.hpp"

#include <nanobind/nanobind.h>

#include "base/error.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cascade(nb::module_& m);

namespace {

void make_costs(CascadeCosts* costs, std::int32_t min_users, std::int32_t min_tokens, double launch_tokens,
                double merge_tokens, std::int32_t max_levels, std::int32_t max_rows, std::int32_t granularity) {
  if (granularity < 1) invalid("granularity must be at least 1");
  new (costs) CascadeCosts{min_users, min_tokens, launch_tokens, merge_tokens, max_levels, max_rows, granularity};
}

nb::list segments(const PyCascade& c) {
  nb::list all;
  for (const Segment& s : c.cascade->segments) {
    all.append(nb::make_tuple(s.user_begin, s.user_end, s.page_begin, s.page_end, s.first_page, s.token_begin,
                              s.token_end, s.parent, s.level, static_cast<std::int32_t>(s.verdict), s.saved, s.spent));
  }
  return all;
}

std::int64_t tokens_read(const PyCascade& c) {
  const PageTableView view = c.table.view();
  std::int64_t tokens = 0;
  for (std::int32_t b = 0; b < view.batch_size; ++b) tokens += view.kv_len(b);
  return tokens;
}

}  // namespace

void bind_cascade(nb::module_& m) {
  nb::class_<CascadeCosts>(m, "CascadeCosts")
      .def("__init__", &make_costs, "min_users"_a, "min_tokens"_a, "launch_tokens"_a, "merge_tokens"_a, "max_levels"_a,
           "max_rows"_a, "granularity"_a);

  nb::class_<PyCascade>(m, "Cascade", "What the requests of a step share, and its page table.")
      .def_prop_ro("qo_indptr", [](const PyCascade& c) { return to_numpy(c.table.qo_indptr); })
      .def_prop_ro("kv_indptr", [](const PyCascade& c) { return to_numpy(c.table.kv_indptr()); })
      .def_prop_ro(
          "kv_indices", [](PyCascade& c) { return to_numpy(c.kv_indices()); },
          "Asked for the first time once the step has ended, it raises LeaseError.")
      .def_prop_ro("kv_last_page_len", [](const PyCascade& c) { return to_numpy(c.table.kv_last_page_len); })
      .def_prop_ro("order", [](const PyCascade& c) { return to_numpy(c.cascade->order); })
      .def_prop_ro("segments", &segments,
                   "Of each: user_begin, user_end, page_begin, page_end, first_page, token_begin, token_end, parent, "
                   "level, verdict, saved, spent.")
      .def_prop_ro("shared_pages", [](const PyCascade& c) { return to_numpy(c.cascade->shared_pages); })
      .def_prop_ro("levels", [](const PyCascade& c) { return c.cascade->levels; })
      .def_prop_ro("tokens_saved", [](const PyCascade& c) { return c.cascade->saved; })
      .def_prop_ro("tokens_read", &tokens_read)
      .def_prop_ro("page_size", [](const PyCascade& c) { return c.table.page_size; });

  nb::class_<CascadeFinder>(m, "CascadeFinder", "Finds the cascade of one step after another.")
      .def(nb::init<const CascadeCosts&>(), "costs"_a)
      .def(
          "find", [](CascadeFinder& f, const PyTable& t) { return new PyCascade(t.table(), f.find(t.table())); },
          "table"_a, "Derived again only where the batch is another one than last time.");
}

}  // namespace radixkv
