"""The house has one staircase: every import goes down. And who may look at a clock, draw a number, or await.

Law: reads source only, imports nothing of it. `offences(root)` names each offence as "module -> what: why".
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FLOORS: Final = (
    {"__main__"},
    {"cli"},
    {"testing", "dev", "demo"},
    {"processes", "narrator"},
    {"worker", "router", "controller", "admin", "client"},
    {"cluster", "fencing"},
    {"store"},
    {"loading", "audit", "tls"},
    {"config"},
    {"core", "metrics", "log", "devfile", "virtual"},
    {"errors", "clock"},
    {"parent", "watchdog"},
)
"""Top floor first. A room (a module or package right under shardlead/) may import from itself and from floors below,
never from a neighbour on its own floor, minus what NEVER says."""

INSIDES: Final = {"worker", "router", "controller", "admin", "client", "cluster", "fencing", "store"}
NEVER: Final = {
    "store": {"core"},  # it knows bytes, not shards
    "dev": INSIDES,  # it starts processes; it does not reach into them
    "processes": INSIDES,
    "narrator": INSIDES,
    "admin": {"cluster", "fencing", "store"},  # is handed plain callables
    "metrics": {"errors", "clock"},
    "log": {"errors", "clock"},
}
ALONE: Final = {"parent", "watchdog"}  # run by file path, imported for that path alone: standard library, small
FRONT_DOOR: Final = "__init__"  # may look into any room

CORE_MODULES: Final = {
    *("bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools", "json", "math"),
    *("operator", "random", "re", "struct", "types", "typing", "urllib", "zlib", "array", "string"),
    *("msgspec", "orjson", "uhashring"),
}
CLOCK_MODULES: Final = {
    "time": {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "clock_gettime",
             "clock_gettime_ns", "process_time", "sleep"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}  # fmt: skip
CLOCK_ALLOWED: Final = {
    "clock": "it is the clock",
    "parent": "imports nothing of ours, so it has no clock to receive",
    "watchdog": "the same",
}
RANDOM_ALLOWED: Final = {"Random", "SystemRandom"}  # the injected kind


def offences(root: Path) -> list[str]:
    """What is wrong under `root` (the package's folder), one line each."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += [f"{'.'.join(parts)} -> {what}" for what in _of_module(parts, tree)]
    return found


def rooms(root: Path) -> set[str]:
    """Every module and package right under `root`, the front door excepted."""
    return {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {
        FRONT_DOOR
    }


def below(room: str) -> set[str]:
    """The rooms that `room` may import from, itself excepted."""
    at = next(index for index, floor in enumerate(FLOORS) if room in floor)
    return set().union(*FLOORS[at + 1 :]) - NEVER.get(room, set())


def _of_module(parts: tuple[str, ...], tree: ast.Module) -> Iterator[str]:
    room = parts[0]
    if room == FRONT_DOOR:
        return
    if not any(room in floor for floor in FLOORS):
        yield f"{room}: has no floor; give it one in tests/support/staircase.py"
        return
    allowed = below(room) | {room}
    for name, line in _imported(tree):
        top, _, rest = name.partition(".")
        if top == "shardlead":
            target = rest.partition(".")[0]
            if target not in allowed:
                yield f"{name}, line {line}: not below {room}"
        elif room == "core" and top not in CORE_MODULES:
            yield f"{name}, line {line}: core is pure"
        elif top in {"tests", "loadtest"}:
            yield f"{name}, line {line}: the package does not know its tests"
        elif room in ALONE and top not in sys.stdlib_module_names:
            yield f"{name}, line {line}: {room} has the standard library only"
    if room not in CLOCK_ALLOWED:
        yield from _clocks(tree)
    if room == "core":
        for node in ast.walk(tree):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
                yield f"line {node.lineno}: core never awaits"


def _imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield alias.name, node.lineno
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    yield (f"{module}.{alias.name}" if module == "shardlead" else module), node.lineno
            case ast.ImportFrom():
                yield "shardlead.?", node.lineno
            case _:
                pass


def _clocks(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in CLOCK_MODULES.get(module, ()):
                yield f"{module}.{name}, line {node.lineno}: reads a clock; receive a Clock"
            case ast.Attribute(value=ast.Name(id="random"), attr=name) if name not in RANDOM_ALLOWED:
                yield f"random.{name}, line {node.lineno}: draws a number; receive a random.Random"
            case ast.ImportFrom(module="time", names=names):
                for alias in names:
                    if alias.name in CLOCK_MODULES["time"]:
                        yield f"time.{alias.name}, line {node.lineno}: reads a clock; receive a Clock"
            case ast.ImportFrom(module="random", names=names):
                for alias in names:
                    if alias.name not in RANDOM_ALLOWED:
                        yield f"random.{alias.name}, line {node.lineno}: draws a number; receive a random.Random"
            case _:
                pass
