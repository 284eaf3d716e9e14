"""Runs tests against a sanitizer build: python .ci/sanitized.py BUILD_FOLDER TEST...

The environment's PRELOAD names the sanitizer runtimes, which must be in the process before Python starts.
"""

import os
import pathlib
import shutil
import subprocess
import sys

root = pathlib.Path(__file__).parents[1]
build, tests = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2:]
site = build / "site"
shutil.rmtree(site, ignore_errors=True)
shutil.copytree(root / "radixkv", site / "radixkv", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
shutil.copytree(root / "tests", site / "tests", ignore=shutil.ignore_patterns("__pycache__"))
shutil.copy(root / "pyproject.toml", site)
for module in (build / "out").glob("_core*.so"):
    shutil.copy(module, site / "radixkv")

libraries = [
    subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    for name in os.environ.pop("PRELOAD").split(":")
]
environment = os.environ | {
    "LD_PRELOAD": ":".join(libraries),
    "PYTHONPATH": str(site),
    "PYTHONMALLOC": "malloc",
    "RADIXKV_EXAMPLES": os.environ.get("RADIXKV_EXAMPLES", "60"),
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={root / '.ci' / 'tsan.supp'}",
}
# A child with a clean environment lacks the preloaded runtime; a forked one lacks the threads that TSan watches.
excluded = "not isa_from_the_environment and not forked"
command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", excluded, *tests]
sys.exit(subprocess.run(command, cwd=site, env=environment).returncode)
