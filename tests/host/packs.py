"""Other people's packs beside ours: found in $PROFUSION_PACKS or in the host's custom_nodes, and loaded from there.

None comes with this repository. A test that needs one that is not there is skipped by the pack's name.
"""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tools.hosts import find_host

PLACES = [Path(place).expanduser() for place in os.environ.get("PROFUSION_PACKS", "").split(os.pathsep) if place]


def find(name):
    """The folder of a pack, by the name of its repository; None where it is not here."""
    host = find_host()
    places = [*PLACES, *([host / "custom_nodes"] if host else [])]
    return next((place / name for place in places if (place / name / "__init__.py").is_file()), None)


def load(name):
    """A pack's module, or the test is skipped. What the pack has put into the host stays: see `host_as_it_was`."""
    key = "other_pack_" + name.replace("-", "_")
    if key not in sys.modules:
        folder = find(name)
        if folder is None:
            pytest.skip(f"{name} is neither in $PROFUSION_PACKS nor in the host's custom_nodes")
        sys.modules[key] = _loaded(key, folder)
    return sys.modules[key]


def _loaded(key, folder, missing=20):
    spec = importlib.util.spec_from_file_location(key, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        for name in [name for name in sys.modules if name == key or name.startswith(key + ".")]:
            del sys.modules[name]
        if not missing or not _stood_in_for(error):
            raise
        return _loaded(key, folder, missing - 1)


def _stood_in_for(error):
    """Put an empty class where a pack imports what this host has not: it is for other architectures."""
    if not (error.name or "").startswith("comfy."):
        return False
    name = getattr(error, "name_from", None)
    if isinstance(error, ModuleNotFoundError):
        parts = error.name.split(".")
        for count in range(2, len(parts) + 1):
            full = ".".join(parts[:count])
            if full not in sys.modules:
                sys.modules[full] = ModuleType(full)
        return True
    name = name or str(error).split("'")[1]
    setattr(sys.modules[error.name], name, type(name, (), {}))
    return True


@contextmanager
def host_as_it_was():
    """Take back what packs put into the host's modules and classes meanwhile."""
    before = _contents()
    try:
        yield
    finally:
        for owner, contents in before:
            for name, value in contents.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
            for name in vars(owner).keys() - contents.keys():
                delattr(owner, name)


def _contents():
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "comfy" and module]
    kinds = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.partition(".")[0] == "comfy"
    }
    return [(owner, dict(vars(owner))) for owner in (*modules, *kinds.values())]


def node(kind, **inputs):
    """What a node gives for these inputs: the first output."""
    if hasattr(kind, "FUNCTION") and not hasattr(kind, "define_schema"):
        return getattr(kind(), kind.FUNCTION)(**inputs)[0]
    found = kind.execute(**inputs)
    return getattr(found, "args", found)[0]
