"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import memdesc

MODULES = [
    module.name
    for module in pkgutil.walk_packages(memdesc.__path__, "memdesc.", onerror=lambda name: None)
    if not module.name.endswith(("._native", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 10
