// radixkv._core's part for the cache: Cache and Pin.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"
#include "python/tokens.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_cache(nb::module_& m);

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
    InvalidArgument: the namespace is no str.

Cost: O(tokens) comparisons of memory, O(1) a page evicted.)";

constexpr const char* kMatchDoc =
    "Tokens of the longest cached prefix, up to len(tokens). Changes nothing, recency included. O(tokens matched).";

constexpr const char* kWouldFitDoc = "(needed, free, evictable, cached) of a prompt: see PrefixCache.would_fit.";

constexpr const char* kPinDoc =
    R"(Keep a cached prefix (a system prompt, few-shot examples) resident until unpin() is called on the result.

The pin is on the tokens: it stays although the object is dropped, and moves to the fuller page where one replaces the
prefix's last, partly filled page. Its pages count as protected.

Raises:
    NotCached: not all of the tokens are cached.
    PoolExhausted: pins would hold more than num_pages - max(1, num_pages // 8) pages.)";

constexpr const char* kQuotaDoc =
    R"(Say how many pages a namespace keeps whatever the others do, and how many it may have. Without both: no quota.

Its pages are those that it has published and those that its leases have taken; in a hierarchical cache those of all
namespaces below it as well, which have no quotas of their own.

Args:
    floor: while it has no more pages than this, no other namespace's request evicts any of them. Pages that it has not
        taken yet are not kept free. evict() is the host's and heeds no floor.
    ceiling: a request that would have more evicts its namespace's own coldest pages first. None: as many as there are.

Raises:
    InvalidArgument: floors of more pages than the pool has, a floor above the ceiling, a namespace below another, more
        than 1000 quotas, or the policy is "hazard".

What is evicted first is the least recently used of what may be, and within a namespace the least recently used, always.
Cost: O(pages of the tree) now; each node evicted later costs a look at each namespace that has a quota.)";

constexpr const char* kClearDoc =
    R"(Forget all prefixes, or those of one namespace and of those below it; returns the number of pages freed at once.

For weights that change under a running cache: nothing cached so far is found again. Leases and pins stay valid and keep
their pages until they let go; what such a lease writes later is not published.)";

nb::list snapshot(PyCache& c) {
  nb::list roots;
  std::vector<nb::dict> made;
  for (const SnapshotNode& node : c.work(kLongWork, [&] { return c.cache->snapshot(); })) {
    nb::dict d;
    if (node.parent < 0) {
      d["namespace"] = node.name;
      roots.append(d);
    } else {
      d["tokens"] = to_numpy(node.tokens);
      d["pages"] = to_numpy(node.pages);
      nb::cast<nb::list>(made[node.parent]["children"]).append(d);
    }
    if (node.parent >= 0 && node.first) d["namespace"] = node.name;
    d["locks"] = node.locks;
    d["pins"] = node.pins;
    d["children"] = nb::list();
    made.push_back(d);
  }
  return roots;
}

nb::dict stats(PyCache& c) {
  const Stats s = c.work(0, [&] { return c.cache->stats(); });
  nb::dict d;
  d["num_pages"] = s.num_pages, d["page_size"] = s.page_size;
  d["free"] = s.free, d["private"] = s.private_, d["protected"] = s.protected_, d["evictable"] = s.evictable;
  d["num_nodes"] = s.num_nodes, d["num_leases"] = s.num_leases, d["num_pins"] = s.num_pins, d["pinned"] = s.pinned;
  d["requests"] = s.requests, d["forks"] = s.forks, d["input_tokens"] = s.input_tokens, d["hit_tokens"] = s.hit_tokens;
  d["evicted_pages"] = s.evicted_pages, d["committed_tokens"] = s.committed_tokens;
  return d;
}

// (name or None for those that are forgotten, requests, input tokens, hit tokens, pages, leases, floor, ceiling or None)
nb::list namespaces(PyCache& c) {
  nb::list out;
  for (const NamespaceStats& s : c.work(kLongWork, [&] { return c.cache->namespaces(); })) {
    const nb::object name = s.forgotten ? nb::none() : nb::object(nb::str(s.name.data(), s.name.size()));
    const nb::object ceiling = s.ceiling == Space::kNoCeiling ? nb::none() : nb::object(nb::int_(s.ceiling));
    out.append(nb::make_tuple(name, s.counts.requests, s.counts.input_tokens, s.counts.hit_tokens, s.pages, s.leases,
                              s.floor, ceiling));
  }
  return out;
}

std::int64_t most_pages(PyCache& c, nb::handle name) {
  const std::string_view space = namespace_from(name);
  return c.work(0, [&] { return c.cache->most_pages(space); });
}

void set_quota(PyCache& c, nb::handle name, nb::handle floor, nb::handle ceiling) {
  const std::string_view space = namespace_from(name);
  const std::int64_t least = int_from(floor, "floor");
  const std::int64_t most = ceiling.is_none() ? Space::kNoCeiling : int_from(ceiling, "ceiling");
  if (least < 0) invalid("floor must be at least 0 pages; got " + str(least));
  if (most < 1) invalid("ceiling must be at least 1 page, or None for none; got " + str(most));
  if (least > most) invalid("floor " + str(least) + " is above ceiling " + str(most));
  c.work(kLongWork, [&] { c.cache->set_quota(space, least, most); });
}

nb::tuple what_if(PyCache& c) {
  const auto counts = c.work(kLongWork, [&] { return c.cache->what_if(); });
  nb::list factors, tokens;
  for (const double factor : WhatIf::kFactors) factors.append(factor);
  for (const std::int64_t count : counts) tokens.append(count);
  return nb::make_tuple(factors, tokens);
}

bool is_hazard(nb::handle policy) {
  const std::string name = nb::cast<std::string>(nb::str(policy));
  if (name != "lru" && name != "hazard") invalid("policy is '" + name + "': give 'lru' or 'hazard'");
  return name == "hazard";
}

std::int64_t evict(PyCache& c, nb::handle num_pages) {
  const std::int64_t n = int_from(num_pages, "num_pages");
  if (n < 0) invalid("num_pages must be at least 0; got " + str(n));
  return c.work(kLongWork, [&] { return c.cache->evict(n); });
}

std::int64_t clear(PyCache& c, nb::handle name) {
  if (name.is_none()) return c.work(kLongWork, [&] { return c.cache->clear(); });
  const std::string_view space = namespace_from(name);
  return c.work(kLongWork, [&] { return c.cache->clear(space); });
}

// Pin, and the cache's object that it waits with.
class PyPin {
 public:
  PyPin(CacheRef owner, std::unique_ptr<Pin> pin) : owner_(std::move(owner)), pin_(std::move(pin)) {}
  std::int64_t num_tokens() const { return pin_->num_tokens(); }
  bool pinned() const { return pin_->pinned(); }
  void unpin() {
    owner_->work(0, [&] { pin_->unpin(); });
  }
  void leave() {
    if (pin_->pinned()) unpin();
  }
  nb::handle owner() const { return owner_.object(); }

 private:
  CacheRef owner_;
  std::unique_ptr<Pin> pin_;
};

int traverse_pin(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyPin>(self)->owner().ptr());
  return 0;
}

PyType_Slot pin_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_pin)}, {0, nullptr}};

PyLease acquire(nb::handle self, nb::handle tokens, nb::handle name) {
  CacheRef cache(self);
  const Tokens t(tokens);
  const std::string_view space = namespace_from(name);
  auto lease = cache->work(t.size(), [&] { return cache->cache->acquire(t.data(), t.size(), space); });
  return PyLease(std::move(cache), std::move(lease));
}

std::int64_t match(PyCache& c, nb::handle tokens, nb::handle name) {
  const Tokens t(tokens);
  const std::string_view space = namespace_from(name);
  return c.work(t.size(), [&] { return c.cache->match(t.data(), t.size(), space); });
}

nb::tuple would_fit(PyCache& c, nb::handle tokens, nb::handle name) {
  const Tokens t(tokens);
  const std::string_view space = namespace_from(name);
  const PageCounts fit = c.work(t.size(), [&] { return c.cache->would_fit(t.data(), t.size(), space); });
  return nb::make_tuple(fit.needed, fit.free, fit.evictable, fit.cached);
}

PyPin pin(nb::handle self, nb::handle tokens, nb::handle name) {
  CacheRef cache(self);
  const Tokens t(tokens);
  const std::string_view space = namespace_from(name);
  auto pin = cache->work(t.size(), [&] { return cache->cache->pin(t.data(), t.size(), space); });
  return PyPin(std::move(cache), std::move(pin));
}

void bind_pin(nb::module_& m) {
  nb::class_<PyPin>(m, "Pin", nb::type_slots(pin_slots),
                    "Keeps a cached prefix resident until unpin(); dropping the object does not unpin.")
      .def_prop_ro("num_tokens", &PyPin::num_tokens, "Tokens of the pinned prefix.")
      .def("unpin", &PyPin::unpin, "Let the prefix be evicted again. LeaseError if done already.")
      .def("__repr__",
           [](const PyPin& p) { return "Pin(" + str(p.num_tokens()) + " tokens" + (p.pinned() ? ")" : ", undone)"); })
      .def("__reduce_ex__",
           [](nb::handle, nb::args) -> nb::object {
             throw nb::type_error(
                 "a Pin cannot be pickled or copied: it keeps pages of this process. pin() the tokens elsewhere");
           })
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__", [](PyPin& p, nb::args) { p.leave(); });
}

nb::object coldest_first(PyCache& c) {
  return to_numpy(c.work(kLongWork, [&] { return c.cache->coldest_first(); }));
}

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<PyCache>(m, "Cache", "The native half of radixkv.PrefixCache.")
      .def(
          "__init__",
          [](PyCache* self, nb::handle num_pages, nb::handle page_size, nb::handle policy, bool hierarchical) {
            const bool hazard = is_hazard(policy);
            new (self)
                PyCache(int_from(num_pages, "num_pages"), int_from(page_size, "page_size"), hazard, hierarchical);
          },
          "num_pages"_a.none(), "page_size"_a.none() = 16, "policy"_a.none() = "lru", nb::kw_only(),
          "hierarchical"_a = false)
      .def_prop_ro(
          "num_pages", [](const PyCache& c) { return c.cache->num_pages(); }, "Pages of the pool.")
      .def_prop_ro(
          "page_size", [](const PyCache& c) { return c.cache->page_size(); }, "Tokens a page holds.")
      .def_prop_ro(
          "hierarchical", [](const PyCache& c) { return c.cache->hierarchical(); },
          "Whether namespace \"a/b\" finds what \"a\" published as well.")
      .def(
          "acquire", [](PyCache& c, nb::handle tokens, nb::handle name) { return acquire(nb::find(c), tokens, name); },
          "tokens"_a.none(), "namespace"_a.none() = "", kAcquireDoc)
      .def("match", &match, "tokens"_a.none(), "namespace"_a.none() = "", kMatchDoc)
      .def("_would_fit", &would_fit, "tokens"_a.none(), "namespace"_a.none() = "", kWouldFitDoc)
      .def(
          "pin", [](PyCache& c, nb::handle tokens, nb::handle name) { return pin(nb::find(c), tokens, name); },
          "tokens"_a.none(), "namespace"_a.none() = "", kPinDoc)
      .def("evict", &evict, "num_pages"_a.none(),
           "Take back up to num_pages evictable pages now, coldest first; returns how many. O(1) a page.")
      .def("clear", &clear, "namespace"_a = nb::none(), kClearDoc)
      .def("set_quota", &set_quota, "namespace"_a.none(), nb::kw_only(), "floor"_a.none() = 0, "ceiling"_a = nb::none(),
           kQuotaDoc)
      .def("_most_pages", &most_pages, "namespace"_a.none())
      .def("_stats", &stats)
      .def("_namespaces", &namespaces)
      .def("_what_if", &what_if)
      .def("_refuse_pages", [](PyCache& c, std::int64_t n) { c.cache->refuse_pages(n); })
      .def("snapshot", &snapshot,
           "The tree, a copy: one dict a namespace, in alphabetical order, {namespace, locks, pins, children}; a child "
           "is {tokens, pages, locks, pins, children}. O(cached tokens).")
      .def("_coldest_first", &coldest_first,
           "The last page of each run of the tree that nobody has locked, in the order of their eviction.")
      .def(
          "check", [](PyCache& c) { c.work(kLongWork, [&] { c.cache->check(); }); },
          "Recompute every count, link and state from scratch; AssertionError if any is wrong. O(pages).")
      .def(
          "close", [](PyCache& c) { c.work(0, [&] { c.cache->close(); }); },
          "Take nothing new from now on; live leases can still be released.");
  bind_pin(m);
}

}  // namespace radixkv
