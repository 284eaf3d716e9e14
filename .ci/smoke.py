"""Tries an installed radixkv that has no torch: run from outside the source tree."""

import importlib.metadata
import pathlib
import sys

import radixkv

assert "site-packages" in pathlib.Path(radixkv.__file__).parts, radixkv.__file__
assert importlib.metadata.version("radixkv") == radixkv.__version__
cache = radixkv.PrefixCache(num_pages=64, page_size=16)
with cache.acquire(range(100)) as lease:
    lease.advance()
assert cache.match([*range(70), 7]) == 70
cache.check()
assert "torch" not in sys.modules
try:
    from radixkv import Engine  # noqa: F401
except radixkv.BackendUnavailable as error:
    assert "pip install 'radixkv[engine]'" in str(error), error
else:
    raise AssertionError("Engine without torch did not say what is missing")
print("radixkv", radixkv.__version__, "works as installed")
