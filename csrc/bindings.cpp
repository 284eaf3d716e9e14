// radixkv._core: the native core as Python sees it. Only the bindings*.cpp files include Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings_numpy.hpp"
#include "bindings_tokens.hpp"
#include "cache.hpp"
#include "huge_pages.hpp"
#include "page_table.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cascade(nb::module_& m);    // bindings_cascade.cpp
void bind_attention(nb::module_& m);  // bindings_attention.cpp

namespace {

constexpr const char* kAcquireDoc =
    R"(Match the longest cached prefix, lock it, and take pages for the rest of the tokens.

At least one token is always left to compute, so lease.num_cached < len(tokens). Reuse is exact to the token: where the
match ends inside a page, lease.copies says what to copy before writing.

Args:
    tokens: list of ints, or 1-D int32 or int64 array or tensor on the CPU; 0 <= token < 2**31; not empty. An int32
        array is read in place.
    namespace: prefixes are found again in the same namespace only (tenant, LoRA adapter, model revision).

Raises:
    PoolExhausted: free and evictable pages do not suffice; nothing has changed.
    InvalidTokens: empty, of a wrong type or out of range.

Cost: O(tokens) comparisons of memory, O(1) a page evicted.)";

constexpr const char* kMatchDoc =
    "Tokens of the longest cached prefix, up to len(tokens). Changes nothing, recency included. O(tokens matched).";

constexpr const char* kPinDoc =
    R"(Keep a cached prefix (a system prompt, few-shot examples) resident until unpin() is called on the result.

The pin is on the tokens: it stays although the object is dropped, and moves to the fuller page where one replaces the
prefix's last, partly filled page. Its pages count as protected.

Raises:
    NotCached: not all of the tokens are cached.
    PoolExhausted: pins would hold more than 7/8 of the pool.)";

constexpr const char* kDropDoc =
    R"(No later row sees the first num_tokens tokens (a sliding window): take the pages that lie wholly in them from its view.

Pages that are shared through the tree stay there, as long as the lease lives. Private ones are freed, and nothing from
there on can be published any more: commit() first what later requests shall find. Positions do not change, nor
lease.tokens. With an Engine use Engine.drop.

Returns:
    The number of pages freed.

Raises:
    InvalidArgument: more than the tokens written.)";

constexpr std::int64_t kLongWork = 4096;  // tokens; shorter calls are over before another thread could use the GIL

template <typename F>
auto work(std::int64_t tokens, F&& f) {
  std::optional<nb::gil_scoped_release> release;
  if (tokens >= kLongWork) release.emplace();
  return f();
}

// What Python's cache object holds; its leases share it.
struct Host {
  std::shared_ptr<Cache> cache;
  nb::object on_release = nb::none();
};

class PyCache {
 public:
  PyCache(std::int64_t num_pages, std::int64_t page_size) : host(std::make_shared<Host>()) {
    host->cache = std::make_shared<Cache>(num_pages, page_size);
  }
  std::shared_ptr<Host> host;
};

struct PyLease {
  std::unique_ptr<Lease> lease;
  std::shared_ptr<Host> host;
};

// The observer sees the lease while it can still be read; whatever it does, the lease is released.
void release(nb::handle self, PyLease& l, bool commit) {
  if (l.lease->released() || l.host->on_release.is_none()) return l.lease->release(commit);
  l.lease->num_tokens();  // throws from another thread
  try {
    l.host->on_release(self);
  } catch (...) {
    l.lease->release(commit);
    throw;
  }
  l.lease->release(commit);
}

nb::list copies(const PyLease& l) {
  nb::list out;
  if (PageCopy c; l.lease->copy(&c)) out.append(nb::make_tuple(c.source, c.target, c.tokens));
  return out;
}

nb::object lease_pages(const PyLease& l) {
  const std::vector<PageId>& pages = l.lease->pages();
  const std::size_t first = l.lease->first_page();
  return to_numpy(pages.data() + first, pages.size() - first);
}

nb::object lease_tokens(const PyLease& l) {
  std::vector<Token> out(l.lease->num_tokens());
  l.lease->read_tokens(0, l.lease->num_tokens(), out.data());
  return to_numpy(out);
}

// The leases lie anywhere in memory, and a step touches each of them: what it will read is fetched ahead.
std::vector<Lease*> batch(const nb::list& leases) {
  const nb::handle type = nb::type<PyLease>();
  std::vector<Lease*> out;
  const std::size_t count = nb::len(leases);
  out.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + 8 < count) prefetch(PyList_GetItem(leases.ptr(), static_cast<Py_ssize_t>(i + 8)), 64);
    const nb::handle item = PyList_GetItem(leases.ptr(), static_cast<Py_ssize_t>(i));
    if (!item.type().is(type) && !nb::isinstance<PyLease>(item)) {
      throw Error(ErrorKind::InvalidArgument,
                  std::string("a step takes leases; got ") + nb::type_name(item.type()).c_str());
    }
    Lease* const lease = nb::inst_ptr<PyLease>(item)->lease.get();
    prefetch(lease, sizeof(Lease));
    out.push_back(lease);
  }
  return out;
}

nb::list snapshot(const PyCache& c) {
  nb::list roots;
  std::vector<nb::dict> made;
  for (const SnapshotNode& node : c.host->cache->snapshot()) {
    nb::dict d;
    if (node.parent < 0) {
      d["namespace"] = node.name;
      roots.append(d);
    } else {
      d["tokens"] = to_numpy(node.tokens);
      d["pages"] = to_numpy(node.pages);
      nb::cast<nb::list>(made[node.parent]["children"]).append(d);
    }
    d["locks"] = node.locks;
    d["pins"] = node.pins;
    d["children"] = nb::list();
    made.push_back(d);
  }
  return roots;
}

nb::dict stats(const PyCache& c) {
  const Stats s = c.host->cache->stats();
  nb::dict d;
  d["num_pages"] = s.num_pages, d["page_size"] = s.page_size;
  d["free"] = s.free, d["private"] = s.private_, d["protected"] = s.protected_, d["evictable"] = s.evictable;
  d["num_nodes"] = s.num_nodes, d["num_leases"] = s.num_leases, d["num_pins"] = s.num_pins, d["pinned"] = s.pinned;
  d["requests"] = s.requests, d["input_tokens"] = s.input_tokens, d["hit_tokens"] = s.hit_tokens;
  d["evicted_pages"] = s.evicted_pages, d["committed_tokens"] = s.committed_tokens;
  return d;
}

void translate(const std::exception_ptr& p, void*) {
  const auto raise = [](const char* name, const char* what) {
    PyErr_SetString(nb::object(nb::module_::import_("radixkv.errors").attr(name)).ptr(), what);
  };
  static constexpr const char* names[] = {"PoolExhausted", "LeaseError", "InvalidTokens", "InvalidArgument",
                                          "NotCached"};
  try {
    std::rethrow_exception(p);
  } catch (const Error& e) {
    raise(names[static_cast<int>(e.kind)], e.what());
  } catch (const std::invalid_argument& e) {
    raise("InvalidArgument", e.what());
  } catch (const std::logic_error& e) {
    PyErr_SetString(PyExc_AssertionError, e.what());
  }
}

void bind_cache(nb::module_& m) {
  nb::class_<PyCache>(m, "Cache", "The native half of radixkv.PrefixCache.")
      .def(nb::init<std::int64_t, std::int64_t>(), "num_pages"_a, "page_size"_a)
      .def_prop_ro(
          "num_pages", [](const PyCache& c) { return c.host->cache->num_pages(); }, "Pages of the pool.")
      .def_prop_ro(
          "page_size", [](const PyCache& c) { return c.host->cache->page_size(); }, "Tokens a page holds.")
      .def_prop_rw(
          "on_release", [](const PyCache& c) { return c.host->on_release; },
          [](PyCache& c, nb::object f) { c.host->on_release = std::move(f); }, nb::arg("f").none(),
          "None, or a callable that is given each lease just before it is released.")
      .def(
          "acquire",
          [](PyCache& c, nb::handle tokens, std::string_view name) {
            const Tokens t(tokens);
            return PyLease{work(t.size(), [&] { return c.host->cache->acquire(t.data(), t.size(), name); }), c.host};
          },
          "tokens"_a.none(), "namespace"_a = "", kAcquireDoc)
      .def(
          "match",
          [](PyCache& c, nb::handle tokens, std::string_view name) {
            const Tokens t(tokens);
            return work(t.size(), [&] { return c.host->cache->match(t.data(), t.size(), name); });
          },
          "tokens"_a.none(), "namespace"_a = "", kMatchDoc)
      .def(
          "pin",
          [](PyCache& c, nb::handle tokens, std::string_view name) {
            const Tokens t(tokens);
            return c.host->cache->pin(t.data(), t.size(), name);
          },
          "tokens"_a.none(), "namespace"_a = "", kPinDoc)
      .def("_evict",
           [](PyCache& c, std::int64_t n) { return work(kLongWork, [&] { return c.host->cache->evict(n); }); })
      .def("_clear_all", [](PyCache& c) { return work(kLongWork, [&] { return c.host->cache->clear(); }); })
      .def("_clear",
           [](PyCache& c, std::string_view s) { return work(kLongWork, [&] { return c.host->cache->clear(s); }); })
      .def("_stats", &stats)
      .def("_refuse_pages", [](PyCache& c, std::int64_t n) { c.host->cache->refuse_pages(n); })
      .def("snapshot", &snapshot,
           "The tree, a copy: one dict a namespace, in alphabetical order, {namespace, locks, pins, children}; a child "
           "is {tokens, pages, locks, pins, children}. O(cached tokens).")
      .def(
          "check", [](PyCache& c) { work(kLongWork, [&] { c.host->cache->check(); }); },
          "Recompute every count, link and state from scratch; AssertionError if any is wrong. O(pages).")
      .def(
          "close", [](PyCache& c) { c.host->cache->close(); },
          "Take nothing new from now on; live leases can still be released.");

  nb::class_<Pin>(m, "Pin", "Keeps a cached prefix resident until unpin(); dropping the object does not unpin.")
      .def_prop_ro("num_tokens", &Pin::num_tokens, "Tokens of the pinned prefix.")
      .def("unpin", &Pin::unpin, "Let the prefix be evicted again. LeaseError if done already.")
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__", [](Pin& p, nb::args) { p.unpin(); });
}

void bind_lease(nb::module_& m) {
  nb::class_<PyLease>(m, "Lease",
                      "The claim of one request on its pages. A context manager: leaving normally commits what was "
                      "advanced and releases, an exception only releases. Belongs to the thread that acquired it.")
      .def_prop_ro(
          "num_tokens", [](const PyLease& l) { return l.lease->num_tokens(); }, "Tokens it has room for.")
      .def_prop_ro(
          "num_cached", [](const PyLease& l) { return l.lease->num_cached(); },
          "Tokens whose K and V lay in its pages at acquire; less than num_prompt.")
      .def_prop_ro(
          "num_written", [](const PyLease& l) { return l.lease->num_written(); }, "Tokens whose K and V are written.")
      .def_prop_ro(
          "num_prompt", [](const PyLease& l) { return l.lease->num_prompt(); }, "Tokens given to acquire().")
      .def_prop_ro("namespace", [](const PyLease& l) { return l.lease->name(); })
      .def_prop_ro("released", [](const PyLease& l) { return l.lease->released(); })
      .def_prop_ro(
          "num_dropped", [](const PyLease& l) { return l.lease->num_dropped(); },
          "Tokens, from the first on, whose pages it dropped; a multiple of page_size.")
      .def_prop_ro("pages", &lease_pages,
                   "int32 array (a copy): the page of each run of page_size tokens after those that were dropped, in "
                   "order. commit() may change it.")
      .def_prop_ro("tokens", &lease_tokens, "int32 array (a copy) of all its tokens. O(num_tokens).")
      .def_prop_ro("copies", &copies,
                   "[(source page, target page, tokens)]: copy the K and V of these leading tokens before writing; "
                   "pending, and the source kept, until the next advance().")
      .def(
          "extend",
          [](PyLease& l, nb::handle tokens) {
            const Tokens t(tokens);
            work(t.size(), [&] { l.lease->extend(t.data(), t.size()); });
          },
          "tokens"_a.none(), "Room for more tokens. PoolExhausted leaves the lease as it was. O(new tokens).")
      .def(
          "advance",
          [](PyLease& l, std::optional<std::int64_t> n) {
            if (n && *n < 0) throw Error(ErrorKind::InvalidArgument, "advance by " + std::to_string(*n) + ": n >= 0");
            l.lease->advance(n ? *n : -1);
          },
          "n"_a = nb::none(), "K and V of the next n tokens (all by default) are written, and pending copies made.")
      .def(
          "drop", [](PyLease& l, std::int64_t num_tokens) { return l.lease->drop(num_tokens); }, "num_tokens"_a,
          kDropDoc)
      .def(
          "commit", [](PyLease& l) { l.lease->commit(); },
          "Publish what is written, so that other requests match it. Duplicates of pages that another request "
          "published first are freed, so `pages` may change. O(tokens since the last commit).")
      .def(
          "release", [](nb::handle self, bool commit) { release(self, nb::cast<PyLease&>(self), commit); },
          "commit"_a = true, "Commit (unless told not to), then let go of all pages.")
      .def(
          "fork", [](PyLease& l) { return PyLease{l.lease->fork(), l.host}; },
          "A second lease on the same tokens. Commits this one: full pages are shared through the tree, the open page "
          "is copied on write. LeaseError while tokens are unwritten.")
      .def(
          "adopt", [](PyLease& l) { l.lease->adopt(); }, "From now on the lease belongs to the calling thread.")
      .def("__enter__", [](nb::object self) { return self; })
      .def(
          "__exit__",
          [](nb::handle self, nb::handle type, nb::handle, nb::handle) {
            PyLease& l = nb::cast<PyLease&>(self);
            if (!l.lease->released()) release(self, l, type.is_none());
          },
          "type"_a.none(), "value"_a.none(), "traceback"_a.none());
}

void bind_page_table(nb::module_& m) {
  nb::class_<PageTable>(m, "PageTable", "The arrays of one step over a batch of leases; each property is a copy.")
      .def(nb::init<>())
      .def(
          "assemble", [](PageTable& t, const nb::list& leases) { t.assemble(batch(leases)); }, "leases"_a)
      .def_ro("window_limit", &PageTable::window_limit)
      .def_prop_ro("qo_indptr", [](const PageTable& t) { return to_numpy(t.qo_indptr); })
      .def_prop_ro("kv_indptr", [](const PageTable& t) { return to_numpy(t.kv_indptr); })
      .def_prop_ro("kv_indices", [](const PageTable& t) { return to_numpy(t.kv_indices); })
      .def_prop_ro("kv_last_page_len", [](const PageTable& t) { return to_numpy(t.kv_last_page_len); })
      .def_prop_ro("slots", [](const PageTable& t) { return to_numpy(t.slots); })
      .def_prop_ro("copy_source", [](const PageTable& t) { return to_numpy(t.copy_source); })
      .def_prop_ro("copy_target", [](const PageTable& t) { return to_numpy(t.copy_target); })
      .def_prop_ro("input_ids", [](const PageTable& t) { return to_numpy(t.input_ids); })
      .def_prop_ro("positions", [](const PageTable& t) { return to_numpy(t.positions); })
      .def_prop_ro("last_rows", [](const PageTable& t) { return to_numpy(t.last_rows); });
  m.def(
      "advance_all",
      [](const nb::list& leases) {
        const std::vector<Lease*> b = batch(leases);
        if (!b.empty()) b[0]->cache().advance_all(b);
      },
      "leases"_a, "Advance each lease to all of its tokens; all of them or none.");
}

}  // namespace
}  // namespace radixkv

NB_MODULE(_core, m) {
#ifndef RADIXKV_SANITIZE
  nb::set_leak_warnings(false);  // a cache in a module global is alive at exit; that is no leak
#endif
  nb::register_exception_translator(radixkv::translate);
  radixkv::bind_cache(m);
  radixkv::bind_lease(m);
  radixkv::bind_page_table(m);
  radixkv::bind_cascade(m);
  radixkv::bind_attention(m);
  m.def("prefer_huge_pages", &radixkv::prefer_huge_pages, "address"_a, "nbytes"_a,
        "Ask that memory be backed by huge pages as it is first touched. A wish: never an error.");
}
