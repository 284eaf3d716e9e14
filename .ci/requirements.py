"""Prints, a line each, what some of pyproject.toml's extras require ("core": the dependencies themselves)."""

import pathlib
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries a copy
    from pip._vendor import tomli as tomllib

data = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
project = data["project"]
wanted = [
    requirement
    for extra in sys.argv[1:]
    for requirement in (project["dependencies"] if extra == "core" else project["optional-dependencies"][extra])
]
print("\n".join(dict.fromkeys(wanted)))
