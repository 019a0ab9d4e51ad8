"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import memdesc

MODULES = [
    module.name
    for module in pkgutil.walk_packages(memdesc.__path__, "memdesc.", onerror=lambda name: None)
    if not module.name.endswith(("._native", "__main__"))
]


def module_or_skip(name: str) -> ModuleType:
    """Import a module of ours; skip where what it is for is not installed (PyTorch)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("memdesc"):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = module_or_skip(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES if ".interop." not in name]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 10
