// radixkv._core's part for leases.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "base/error.hpp"
#include "python/args.hpp"
#include "python/numpy.hpp"
#include "python/objects.hpp"
#include "python/tokens.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_lease(nb::module_& m);

namespace {

constexpr const char* kLeaseDoc =
    R"(The claim of one request on its pages. A context manager: leaving normally commits what was advanced and releases,
an exception only releases. One that is dropped is released without a commit.

It belongs to the thread that acquired it, until another calls adopt(). While a step is open over it, it can be read;
what would change it raises LeaseError.)";

constexpr const char* kDropDoc =
    R"(No later row sees the first num_tokens tokens (a sliding window): take the pages that lie wholly in them from its view.

Pages that are shared through the tree stay there, as long as the lease lives. Private ones are freed, and nothing from
there on can be published any more: commit() first what later requests shall find. Positions do not change, nor
lease.tokens. With an Engine use Engine.drop.

Returns:
    The number of pages freed.

Raises:
    InvalidArgument: more than the tokens written.)";

constexpr const char* kTruncateDoc =
    R"(Keep the first num_tokens tokens and take the others back, written or not: drafts that were wrong, a branch given up.

Pages that hold none of the kept tokens are freed, and extend() goes on from there. What later requests may have found
stays: tokens that came from the cache, were published by commit(), or were dropped.

Returns:
    The number of pages freed.

Raises:
    InvalidArgument: more than the lease has, or fewer than must stay; it gives both numbers.)";

constexpr const char* kExtendDoc =
    R"(Room for more tokens. O(new tokens).

An open page that commit() published never changes: the lease goes on in a copy of it (`copies`), or, where no page is
left for a copy and nobody else uses that one, in the page itself, which leaves the tree.

Args:
    prompt: a further piece of a prompt that is computed in pieces, not of an answer: it counts as input in the
        statistics of the cache, and to `num_prompt`.

Raises:
    PoolExhausted: free and evictable pages do not suffice, or the pages it would hold are more than the pool's; the
        lease is as it was. Pages that drop() freed do not count.)";

constexpr const char* kReleaseDoc =
    R"(Commit (unless told not to), then let go of all pages.

cold: no request of this session will follow. The pages that no other request ever branched off (the session's own, from
its last page back to the first that it shares) are then evicted before anything else. A hint: they are found as
long as they are there, and whoever uses them again makes them like any others. Where it is not known whether a session
has ended, leave it out: wrong hints cost more than right ones gain.)";

constexpr const char* kForkDoc =
    R"(A second lease on the same tokens. Commits this one: full pages are shared through the tree, the open page is copied
on write.

Raises:
    LeaseError: tokens are unwritten, copies are not made (advance() says they are), what was dropped was not committed,
        or the namespace was cleared. PoolExhausted: no page is left for the copy.)";

void release(PyLease& l, bool commit, bool cold) {
  l.owner->work(l.lease->num_tokens(), [&] { l.lease->release(commit, cold); });
}

void commit_as(PyLease& l, nb::handle name) {
  const std::string_view space = namespace_from(name);
  l.owner->work(0, [&] { l.lease->commit_as(space); });
}

void leave(PyLease& l, nb::handle type, nb::handle, nb::handle) {
  if (!l.lease->released()) release(l, type.is_none(), false);
}

nb::list copies(const PyLease& l) {
  nb::list out;
  if (PageCopy c; l.lease->copy(&c)) out.append(nb::make_tuple(c.source, c.target, c.tokens));
  return out;
}

nb::object pages(const PyLease& l) {
  const std::vector<PageId>& pages = l.lease->pages();
  const std::size_t first = l.lease->first_page();
  return to_numpy(pages.data() + first, pages.size() - first);
}

nb::object tokens(const PyLease& l) {
  std::vector<Token> out(l.lease->num_tokens());
  l.lease->read_tokens(0, l.lease->num_tokens(), out.data());
  return to_numpy(out);
}

void extend(PyLease& l, nb::handle tokens, bool prompt) {
  const Tokens t(tokens);
  l.owner->work(t.size(), [&] { l.lease->extend(t.data(), t.size(), prompt); });
}

void advance(PyLease& l, nb::handle count) {
  const std::int64_t n = count.is_none() ? -1 : int_from(count, "n");
  if (n < 0 && !count.is_none()) {
    invalid("advance by " + str(n) + ": n >= 0");
  }
  l.owner->work(0, [&] { l.lease->advance(n); });
}

std::int64_t drop(PyLease& l, nb::handle num_tokens) {
  const std::int64_t n = int_from(num_tokens, "num_tokens");
  return l.owner->work(0, [&] { return l.lease->drop(n); });
}

std::int64_t truncate(PyLease& l, nb::handle num_tokens) {
  const std::int64_t n = int_from(num_tokens, "num_tokens");
  return l.owner->work(0, [&] { return l.lease->truncate(n); });
}

PyLease fork(PyLease& l) {
  auto forked = l.owner->work(0, [&] { return l.lease->fork(); });
  return PyLease(l.owner, std::move(forked));
}

std::string repr(const PyLease& l) {
  if (l.lease->released()) return "Lease(released)";
  try {
    const std::string& name = l.lease->name();
    return "Lease(" + str(l.lease->num_tokens()) + " tokens, " + str(l.lease->num_cached()) + " cached, " +
           str(l.lease->num_written()) + " written, " + str(static_cast<std::int64_t>(l.lease->pages().size())) +
           " pages" + (name.empty() ? "" : ", namespace " + text(nb::str(name.c_str(), name.size()), PyObject_Repr)) +
           ")";
  } catch (const Error&) {
    return "Lease(of another thread)";
  }
}

nb::object no_copy(nb::handle, nb::args) {
  throw nb::type_error(
      "a Lease cannot be pickled or copied: it is one claim on pages of this process. Use fork() for a second one, or "
      "acquire() its tokens elsewhere");
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyLease>(self)->owner.object().ptr());
  return 0;
}

PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {0, nullptr}};

}  // namespace

void bind_lease(nb::module_& m) {
  nb::class_<PyLease>(m, "Lease", nb::type_slots(slots), kLeaseDoc)
      .def_prop_ro(
          "num_tokens", [](const PyLease& l) { return l.lease->num_tokens(); }, "Tokens it has room for.")
      .def_prop_ro(
          "num_cached", [](const PyLease& l) { return l.lease->num_cached(); },
          "Tokens whose K and V lay in its pages at acquire; less than num_prompt.")
      .def_prop_ro(
          "num_written", [](const PyLease& l) { return l.lease->num_written(); }, "Tokens whose K and V are written.")
      .def_prop_ro(
          "num_prompt", [](const PyLease& l) { return l.lease->num_prompt(); },
          "Tokens given to acquire(), and to extend() as more of the prompt.")
      .def_prop_ro(
          "namespace", [](const PyLease& l) { return l.lease->name(); }, "The namespace that it was acquired in.")
      .def_prop_ro(
          "released", [](const PyLease& l) { return l.lease->released(); }, "Whether it has ended.")
      .def_prop_ro(
          "num_dropped", [](const PyLease& l) { return l.lease->num_dropped(); },
          "Tokens, from the first on, whose pages it dropped; a multiple of page_size.")
      .def_prop_ro("pages", &pages,
                   "int32 array (a copy): the page of each run of page_size tokens after those that were dropped, in "
                   "order. commit() may change it.")
      .def_prop_ro("tokens", &tokens, "int32 array (a copy) of all its tokens. O(num_tokens).")
      .def_prop_ro("copies", &copies,
                   "[(source page, target page, tokens)]: copy the K and V of these leading tokens before writing; "
                   "pending, and the source kept, until the next advance().")
      .def("extend", &extend, "tokens"_a.none(), nb::kw_only(), "prompt"_a = false, kExtendDoc)
      .def("advance", &advance, "n"_a = nb::none(),
           "K and V of the next n tokens (all by default) are written, and pending copies made.")
      .def("drop", &drop, "num_tokens"_a.none(), kDropDoc)
      .def("truncate", &truncate, "num_tokens"_a.none(), kTruncateDoc)
      .def(
          "commit", [](PyLease& l) { l.owner->work(0, [&] { l.lease->commit(); }); },
          "Publish what is written, so that other requests match it. Duplicates of pages that another request "
          "published first are freed, so `pages` may change. O(tokens since the last commit).")
      .def("_commit_as", &commit_as, "namespace"_a.none(),
           "Publish the full pages that are written as those of a namespace above its own: what had published them.")
      .def("release", &release, "commit"_a = true, "cold"_a = false, kReleaseDoc)
      .def("fork", &fork, kForkDoc)
      .def(
          "adopt", [](PyLease& l) { l.owner->work(0, [&] { l.lease->adopt(); }); },
          "From now on the lease belongs to the calling thread.")
      .def(
          "_of", [](const PyLease& l, const PyCache& cache) { return &*l.owner == &cache; }, "cache"_a,
          "Whether this cache acquired it.")
      .def("__repr__", &repr)
      .def("__reduce_ex__", &no_copy)
      .def("__enter__", [](nb::object self) { return self; })
      .def("__exit__", &leave, "type"_a.none(), "value"_a.none(), "traceback"_a.none());
}

}  // namespace radixkv
