"""Settings from four layers: defaults, TOML files in the order given, environment, flags; each stronger than the last.

Law: everything that is wrong is found in one pass and raised as one ConfigError, each problem with its place, its
field, its value and what is allowed. A misspelt name is never passed over; a secret is never repeated in a message.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from shardlead.config import SECTIONS, Rule, Settings, check
from shardlead.errors import ConfigError, Problem

ENVIRONMENT_PREFIX: Final = "SHARDLEAD_"
OTHER_VARIABLES: Final = ("PARENT_", "DEMO_", "DEV_", "TEST_", "DEBUG")
"""Variables with our prefix that are not settings: the parent's pipe, the demo's database, ..."""

SECRETS: Final = frozenset({"store.password"})
FILES: Final = (
    *("store.ca_file", "store.cert_file", "store.key_file"),
    *("router.tls_cert_file", "router.tls_key_file"),
    *("tls.ca_file", "tls.cert_file", "tls.key_file"),
)

_SERVICE_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP)(_\w+)?$")
"""Kubernetes sets such variables for a service that is called shardlead or shardlead-router: no settings of ours."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, which of their fields somebody set (dotted names), and where each of those was said last."""

    settings: Settings
    explicit: frozenset[str]
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Flag:
    """A value from the command line: `name` is the flag as typed ("--port"), `field` dotted. Text is converted as
    in the environment; anything else is taken as it is."""

    name: str
    field: str
    value: object


def load(
    files: Iterable[Path] = (), environment: Mapping[str, str] | None = None, flags: Iterable[Flag] = ()
) -> Loaded:
    """The settings that the layers make. Raises ConfigError with every problem of all layers."""
    layers = _Layers()
    for path in files:
        layers.add_file(path)
    for name, text in sorted((environment or {}).items()):
        layers.add_variable(name, text)
    for flag in flags:
        layers.add(flag.name, flag.field, flag.value, is_text=isinstance(flag.value, str))
    return layers.finish()


def parse_assignment(text: str) -> Flag:
    """The flag that `--set section.field=value` gives. Raises ConfigError if there is no such form in it."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError([Problem("--set", name.strip(), text, "must have the form section.field=value")])
    return Flag("--set", name.strip(), value.strip())


def describe(name: str) -> str:
    """What may stand in the field `name` ("lease.ttl_s"), in words."""
    return _describe(HINTS[name])


def default_of(name: str) -> object:
    """The default of the field `name`."""
    section, _, item = name.partition(".")
    return getattr(getattr(Settings(), section), item)


def _hints() -> dict[str, Any]:
    return {
        f"{section}.{item.name}": hints[item.name]
        for section, kind in SECTIONS.items()
        for hints in [get_type_hints(kind, include_extras=True)]
        for item in dataclasses.fields(kind)
    }


HINTS: Final[Mapping[str, Any]] = _hints()
"""Every field by its dotted name, with its type and bounds."""

_SECTIONS: Final = ", ".join(SECTIONS)
_VARIABLES: Final = {ENVIRONMENT_PREFIX + name.replace(".", "_").upper(): name for name in HINTS}


class _Layers:
    """What was said so far, weakest first, and what was wrong with it."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}
        self._sources: dict[str, str] = {}
        self._problems: list[Problem] = []

    def add_file(self, path: Path) -> None:
        source = str(path)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            self._problems.append(Problem("--config", "file", source, f"a file that can be read ({exc.strerror})"))
            return
        except (ValueError, RecursionError) as exc:  # no TOML, no UTF-8, no path, or nested too deep
            self._problems.append(Problem("--config", "file", source, f"a TOML file ({exc})"))
            return
        for section, table in tables.items():
            if section in SECTIONS and not isinstance(table, dict):
                self._problems.append(Problem(source, section, table, f"a table, [{section}]"))
            elif isinstance(table, dict) and table:
                for name, value in table.items():
                    self.add(source, f"{section}.{name}", value, is_text=False)
            elif section not in SECTIONS:
                homes = [name for name in HINTS if name.endswith(f".{section}")]
                hint = (
                    f"belongs into a section: {' or '.join(homes)}"
                    if homes
                    else f"not a section; there are {_SECTIONS}"
                )
                self._problems.append(Problem(source, section, table, hint))

    def add_variable(self, variable: str, text: str) -> None:
        rest = variable.removeprefix(ENVIRONMENT_PREFIX)
        if rest == variable or rest.startswith(OTHER_VARIABLES):
            return
        if _SERVICE_LINK.search(variable) or (variable.endswith("_PORT") and "://" in text):
            return
        if variable in _VARIABLES:
            self.add(variable, _VARIABLES[variable], text, is_text=True)
        else:
            self._unknown(variable, variable, text, _VARIABLES, "a setting of any section")

    def add(self, source: str, name: str, value: object, *, is_text: bool) -> None:
        if name not in HINTS:
            section = name.partition(".")[0]
            near = [known for known in HINTS if known.startswith(f"{section}.")]
            if near:
                self._unknown(source, name, value, near, "a setting", among=HINTS)
            else:
                self._unknown(source, name, value, HINTS, "a setting")
            return
        try:
            converted = _convert(HINTS[name], value, is_text=is_text)
        except ValueError:
            shown = "********" if name in SECRETS else value
            self._problems.append(Problem(source, name, shown, f"must be {describe(name)}"))
        else:
            self._values[name] = converted
            self._sources[name] = source

    def finish(self) -> Loaded:
        for name in FILES:
            path = self._values.get(name)
            if isinstance(path, str) and path and (reason := _why_no_file(path)):
                self._problems.append(
                    Problem(self._sources[name], name, path, f"must be a file that can be read; {reason}")
                )
        settings = Settings(
            **{
                section: kind(
                    **{
                        item.name: self._values[f"{section}.{item.name}"]
                        for item in dataclasses.fields(kind)
                        if f"{section}.{item.name}" in self._values
                    }
                )
                for section, kind in SECTIONS.items()
            }
        )
        wrong = {problem.field for problem in self._problems}
        problems = [*self._problems, *(item for item in check(settings, self._sources) if item.field not in wrong)]
        if problems:
            raise ConfigError([_without_secret(problem) for problem in problems])
        return Loaded(settings, frozenset(self._values), dict(self._sources))

    def _unknown(
        self,
        source: str,
        name: str,
        value: object,
        known: Iterable[str],
        what: str,
        *,
        among: Iterable[str] = (),
    ) -> None:
        names = {each.removeprefix(ENVIRONMENT_PREFIX): each for each in known}
        others = {each: each for each in among}
        said = name.removeprefix(ENVIRONMENT_PREFIX)
        near = get_close_matches(said, names, n=1, cutoff=0.55)
        close = names[near[0]] if near else next(iter(get_close_matches(said, others, n=1, cutoff=0.7)), "")
        if re.search("pas|pwd|secret", name.lower()):
            value = "********"
        if close:
            hint = f"there is no such setting; did you mean {close}?"
        else:
            hint = f"not {what}; there are {_SECTIONS if len(names) > 25 else ', '.join(names.values())}"
        self._problems.append(Problem(source, name, value, hint))


def _why_no_file(path: str) -> str:
    try:
        return "" if Path(path).is_file() else "there is none"
    except OSError as exc:  # its folder may not be looked into, or its name is too long
        return exc.strerror or str(exc)


def _convert(hint: Any, value: object, *, is_text: bool) -> object:
    """`value` as the field's type. Raises ValueError if it is not one or breaks a bound."""
    if is_text and isinstance(value, str):
        if _is_tuple(hint):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif _base(hint) is bool:
            value = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower(), value.lower())
    converted: object = msgspec.convert(value, hint, strict=not is_text)
    for rule in _metadata(hint):
        if isinstance(rule, Rule) and not rule.holds(converted):
            raise ValueError(rule.allowed)
    return converted


def _describe(hint: Any) -> str:
    for rule in _metadata(hint):
        if isinstance(rule, Rule):
            return rule.allowed
    base = _base(hint)
    if get_origin(base) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(base))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    bounds = "".join(
        f", {phrase} {limit:g}" if abs(limit) < 1e6 else f", {phrase} {limit}"
        for meta in _metadata(hint)
        if isinstance(meta, msgspec.Meta)
        for phrase, limit in (("more than", meta.gt), ("at least", meta.ge), ("at most", meta.le))
        if limit is not None
    )
    return words[base] + bounds


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _base(hint: Any) -> Any:
    return get_args(hint)[0] if _metadata(hint) else hint


def _is_tuple(hint: Any) -> bool:
    return get_origin(_base(hint)) is tuple


def _without_secret(problem: Problem) -> Problem:
    return dataclasses.replace(problem, value="********") if problem.field in SECRETS and problem.value else problem
