// radixkv._core's part for the tiers below the pool: what pages are called there.
#include <nanobind/nanobind.h>

#include <algorithm>

#include "base/error.hpp"
#include "cache/page_keys.hpp"
#include "python/args.hpp"
#include "python/objects.hpp"
#include "python/tokens.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace radixkv {

void bind_tiers(nb::module_& m);

namespace {

nb::list keys_of(nb::handle tokens, nb::handle page_size, nb::bytes secret, nb::bytes parent) {
  const std::int64_t size = int_from(page_size, "page_size");
  if (size < 1) invalid("page_size must be at least 1; got " + str(size));
  if (secret.size() < 1 || secret.size() > Blake2b::kMostKey) invalid("a secret has 1 to 64 bytes");
  PageKey before;
  if (parent.size() != before.size()) {
    invalid("a tag or key has 16 bytes; got " + str(static_cast<std::int64_t>(parent.size())));
  }
  std::copy_n(reinterpret_cast<const std::uint8_t*>(parent.c_str()), before.size(), before.begin());
  const Tokens t(tokens);
  const auto hash = [&] {
    return page_keys(t.data(), t.size(), size, reinterpret_cast<const std::uint8_t*>(secret.c_str()), secret.size(),
                     before);
  };
  nb::list out;
  const auto make = [&](const std::vector<PageKey>& keys) {
    for (const PageKey& key : keys) out.append(nb::bytes(reinterpret_cast<const char*>(key.data()), key.size()));
  };
  if (t.size() < kLongWork) {
    make(hash());
    return out;
  }
  std::vector<PageKey> keys;
  {
    const nb::gil_scoped_release release;
    keys = hash();
  }
  make(keys);
  return out;
}

}  // namespace

void bind_tiers(nb::module_& m) {
  m.def(
      "page_keys", &keys_of, "tokens"_a.none(), "page_size"_a.none(), "secret"_a, "parent"_a,
      "The keys of the full pages of these tokens: a chain of keyed BLAKE2b-128 that begins with a namespace's tag, or "
      "with the key of the page before.");
}

}  // namespace radixkv
