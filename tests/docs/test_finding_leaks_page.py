"""docs/finding-leaks.md: its table of log events is what the package logs, each way round."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/finding-leaks.md"
ROW = re.compile(r"^\| `([a-z_]+\.[a-z_]+)` \| `(memdesc[.a-z]+)` \| ([A-Z, ]+) \| (.*?) \|", re.M)
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def logged(path: Path) -> Iterator[tuple[str, str, str, frozenset[str]]]:
    """Every call of a logger in a file: its event, logger, level and fields."""
    tree = ast.parse(path.read_text())
    logger = _logger_of(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        either = node.func
        for function in [either.body, either.orelse] if isinstance(either, ast.IfExp) else [either]:
            if not isinstance(function, ast.Attribute) or function.attr not in LEVELS:
                continue
            if not isinstance(function.value, ast.Name) or "log" not in function.value.id:
                continue
            message = ast.literal_eval(node.args[0])
            level = "ERROR" if function.attr == "exception" else function.attr.upper()
            extra = [word.value for word in node.keywords if word.arg == "extra"]
            fields = frozenset(ast.literal_eval(key) for one in extra for key in one.keys)
            assert logger, path
            yield message.partition(" ")[0], logger, level, fields


def _logger_of(tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "memdesc.services.logs":
            return "memdesc.services"
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("logging.getLogger"):
            return str(ast.literal_eval(node.value.args[0]))
    return ""


def all_logged() -> dict[str, tuple[set[str], set[str], set[str]]]:
    found: dict[str, tuple[set[str], set[str], set[str]]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for event, logger, level, fields in logged(path):
            loggers, levels, all_fields = found.setdefault(event, (set(), set(), set()))
            loggers.add(logger)
            levels.add(level)
            all_fields |= fields
    return found


def test_the_table_lists_every_event_with_its_logger_level_and_fields() -> None:
    told = {
        event: ({logger}, set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for event, logger, levels, fields in ROW.findall(PAGE.read_text())
    }
    assert told == all_logged()
    assert len(told) > 15


def test_the_package_logs_in_no_other_way() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        for line in path.read_text().splitlines():
            assert "logging.warning(" not in line, path
            assert "logging.error(" not in line, path
            assert "logging.info(" not in line, path


def test_a_name_that_is_not_in_the_table_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "new.py"
    module.write_text(
        "import logging\nlog = logging.getLogger('memdesc.new')\n"
        "log.info('new.event %s', 1, extra={'field': 1})\n"
    )
    (seen,) = logged(module)
    assert seen == ("new.event", "memdesc.new", "INFO", frozenset({"field"}))
    assert seen[0] not in all_logged()


@pytest.mark.parametrize("event", sorted(all_logged()))
def test_an_events_name_is_of_two_words(event: str) -> None:
    assert re.fullmatch(r"[a-z]+\.[a-z_]+", event)
