"""The application: what a user's class must and may have, how `MODULE:NAME` is found, how its objects are made.

Law: design.md, Worker. An application comes in one of four shapes, all used alike as `async with application.factory()
as make`, then `make(lead)` for each led shard:

    class Counter: ...                      a class with `handle`; called with the Leadership
    def counter(lead): ...                  a function of one argument that returns such an object
    Shared()                                an async context manager object that yields one of the two above
    @asynccontextmanager
    async def counters(): ...               a function of no argument that returns one

(`hosting.hosted` makes one of the third shape out of an aiohttp.web.Application.)

What can be wrong is said before a session is opened, with the name, what was found and what is allowed. This module
never opens an object, never runs a request and never decides about leadership.
"""

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from aiohttp import web

from shardlead.errors import ConfigError, Problem

FIELD: Final = "application"
"""How the setting is called in errors; on the command line it is the argument MODULE:NAME."""

ALLOWED: Final = (
    "a class with `async def handle(self, request)`, a function (Leadership) -> such an object, "
    "an async context manager that yields one of these, or a function without arguments that returns one"
)


class Handles(Protocol):
    """The least an application's object has. What it may have besides:

    - `async def open(self)`: barrier write, then load; before any request. Failing gives the shard up.
    - `async def run(self)`: background work while leading; cancelled at the end. Failing gives the shard up.
    - `async def close(self)`: exactly once, whatever the reason; the leadership may be invalid by then.
    - `def healthy(self) -> bool`: asked once a second; three times False gives the shard up, so that others can lead.

    and on its class: `fenced` (True: storage refuses old epochs) and `idempotent` (False; True: it deduplicates by
    Idempotency-Key, so that unanswered requests may be sent again).
    """

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of a key of this shard. Raises web.HTTPException for an answer of another status."""
        ...


@runtime_checkable
class _Enterable(Protocol):
    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *exc_info: object) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Description:
    """What an application says of itself. Of a factory function's objects only `Hosted` knows the methods."""

    fenced: bool = True
    idempotent: bool = False
    has_run: bool = False
    has_healthy: bool = False


def describe(subject: object, *, name: str = "", yielded: Description | None = None) -> Description:
    """What `subject` (a class, a factory or a context manager) says of itself.

    Where it says nothing, what it `yielded` counts; its methods are looked for there alone. Raises ConfigError for a
    flag that is not a bool.
    """
    name = name or _label(subject)
    if yielded is None:
        has_run, has_healthy = (callable(getattr(subject, method, None)) for method in ("run", "healthy"))
        yielded = Description(has_run=has_run, has_healthy=has_healthy)
    return replace(
        yielded,
        fenced=_flag(subject, "fenced", yielded.fenced, name),
        idempotent=_flag(subject, "idempotent", yielded.idempotent, name),
    )


class Hosted:
    """One object of the application, with every method there: what it left out does nothing, and is healthy.

    `subject` is the application's own object. `has_run` and `has_healthy` say what it really has.
    """

    __slots__ = ("_close", "_healthy", "_open", "_run", "handle", "has_healthy", "has_run", "subject")

    def __init__(self, subject: object, *, name: str) -> None:
        for method in ("open", "run", "close", "healthy"):
            if not callable(getattr(subject, method, _nothing)):
                raise _wrong(name, f"{_label(type(subject))}.{method}", f"{method} must be a method")
        handle = getattr(subject, "handle", None)
        if not callable(handle):
            raise _wrong(name, _label(type(subject)), "it has no method `handle`")
        self.subject = subject
        self.handle: Callable[[web.Request], Awaitable[web.StreamResponse]] = handle
        self.has_run = hasattr(subject, "run")
        self.has_healthy = hasattr(subject, "healthy")
        self._open = getattr(subject, "open", _nothing)
        self._run = getattr(subject, "run", _nothing)
        self._close = getattr(subject, "close", _nothing)
        self._healthy = getattr(subject, "healthy", None)

    def __repr__(self) -> str:
        return f"<Hosted {self.subject!r}>"

    async def open(self) -> None:
        """The application's open(), or nothing."""
        await _completed(self._open())

    async def run(self) -> None:
        """The application's run(), or nothing: then it returns at once."""
        await _completed(self._run())

    async def close(self) -> None:
        """The application's close(), or nothing."""
        await _completed(self._close())

    def healthy(self) -> bool:
        """The application's healthy(), or True."""
        return True if self._healthy is None else bool(self._healthy())


class Factory:
    """Makes the object of a led shard. The flags in `description` are final: NAME's own, else of what it yielded."""

    __slots__ = ("_make", "description", "name")

    def __init__(self, make: Callable[[Any], object], name: str, description: Description) -> None:
        self._make = make
        self.name = name
        self.description = description

    def __repr__(self) -> str:
        return f"<Factory {self.name} {self.description}>"

    @property
    def fenced(self) -> bool:
        return self.description.fenced

    @property
    def idempotent(self) -> bool:
        return self.description.idempotent

    def __call__(self, lead: Any) -> Hosted:
        """The object for this leadership, not yet opened. What its constructor raises passes through.

        Raises ConfigError if it has no `handle`.
        """
        return Hosted(self._make(lead), name=self.name)


class Application:
    """A user's application in any of the four shapes. Making one checks the shape; nothing is called yet."""

    __slots__ = ("_enter", "_make", "_subject", "name")

    def __init__(self, subject: object, *, name: str = "") -> None:
        self.name = name or _label(subject)
        self._subject = subject
        self._make: Callable[[Any], object] | None = None
        self._enter: Callable[[], object] | None = None
        describe(subject, name=self.name)
        match _shape(subject, self.name):
            case _Makes(make=make):
                self._make = make
            case _Enters(enter=enter):
                self._enter = enter

    def __repr__(self) -> str:
        return f"<Application {self.name}>"

    @asynccontextmanager
    async def factory(self) -> AsyncIterator[Factory]:
        """What makes the shards' objects, inside whatever the application shares between them.

        Raises ConfigError if a context manager yields something that makes no such objects; what the application's
        own code raises on entering passes through.
        """
        own = describe(self._subject, name=self.name)
        if self._make is not None:
            yield Factory(self._make, self.name, own)
            return
        assert self._enter is not None
        async with _entered(self._enter(), self.name) as yielded:
            shape = _shape(yielded, self.name)
            if not isinstance(shape, _Makes):
                raise _wrong(self.name, f"the yielded {_label(yielded)}", "it must yield a class or factory")
            said = describe(yielded, name=self.name)
            yield Factory(shape.make, self.name, describe(self._subject, name=self.name, yielded=said))


def load(spec: str, *, directory: Path | None = None, source: str = "argument MODULE:NAME") -> Application:
    """The application that "MODULE:NAME" names; `directory` (the current one) is importable, as with other servers.

    NAME may be dotted. Raises ConfigError that says which part is wrong: the form, the module, something the module
    imports, the name, or its shape.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not all(map(str.isidentifier, [*module_name.split("."), *name.split(".")])):
        raise ConfigError([Problem(source, FIELD, spec, "must be MODULE:NAME, as in shardlead.demo:Counter")])
    folder = str(directory or Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module_name == exc.name or module_name.startswith(f"{exc.name}.")):
            allowed = f"there is no module {exc.name!r} in {folder} or on Python's path"
            raise ConfigError([Problem(source, FIELD, spec, allowed)]) from exc
        raise ConfigError([Problem(source, FIELD, spec, _import_failure(module_name, exc))]) from exc
    except Exception as exc:  # the application's module runs here, and may raise anything
        raise ConfigError([Problem(source, FIELD, spec, _import_failure(module_name, exc))]) from exc
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [each for each in dir(found) if not each.startswith("_")], n=3)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError([Problem(source, FIELD, spec, f"{_label(found)} has no {part!r}{hint}")])
        found = getattr(found, part)
    return Application(found, name=spec)


# --- shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Makes:
    make: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class _Enters:
    enter: Callable[[], object]


def _shape(subject: object, name: str) -> _Makes | _Enters:
    """Which of the four shapes `subject` has. A class with `handle` is one, whatever else it has."""
    if isinstance(subject, type):
        if callable(getattr(subject, "handle", None)):
            _check_arguments(subject, 1, name)
            return _Makes(subject)
        if issubclass(subject, _Enterable):
            _check_arguments(subject, 0, name)
            return _Enters(subject)
        raise _wrong(name, f"class {_label(subject)}", "it has no method `handle`")
    if isinstance(subject, web.Application):
        raise _wrong(name, "an aiohttp.web.Application", "wrap it, as in shardlead.hosted(app, open=…)")
    if isinstance(subject, _Enterable):
        return _Enters(lambda: subject)
    if not callable(subject):
        raise _wrong(name, f"a {type(subject).__name__}", "it cannot be called or entered")
    if inspect.iscoroutinefunction(subject) or inspect.isasyncgenfunction(subject):
        raise _wrong(name, f"async function {_label(subject)}", "decorate it with contextlib.asynccontextmanager")
    if _takes(subject, 1):
        return _Makes(subject)
    _check_arguments(subject, 0, name)
    return _Enters(subject)


def _takes(subject: Callable[..., object], count: int) -> bool:
    """Whether `subject` needs exactly `count` positional arguments, or may be called with so many if that is one."""
    try:
        inspect.signature(subject).bind(*(None,) * count)
    except TypeError:
        return False
    except ValueError:  # no signature to be had (some C callables): the call itself will tell
        return True
    return True


def _check_arguments(subject: Callable[..., object], count: int, name: str) -> None:
    if not _takes(subject, count):
        wanted = "one argument, the Leadership" if count else "no arguments"
        raise _wrong(name, _label(subject), f"it must be callable with {wanted}")


@asynccontextmanager
async def _entered(manager: object, name: str) -> AsyncIterator[object]:
    if not isinstance(manager, AbstractAsyncContextManager | _Enterable):
        raise _wrong(name, f"the returned {_label(manager)}", "it is no async context manager")
    async with manager as yielded:
        yield yielded


def _flag(subject: object, flag: str, default: bool, name: str) -> bool:
    value = getattr(subject, flag, default)
    if not isinstance(value, bool):
        raise ConfigError([Problem(name, flag, value, "must be True or False")])
    return value


def _wrong(name: str, found: str, why: str) -> ConfigError:
    return ConfigError([Problem(name, FIELD, found, f"{why}; allowed is {ALLOWED}")])


def _label(subject: object) -> str:
    if inspect.ismodule(subject):
        return f"module {subject.__name__}"
    module, name = getattr(subject, "__module__", None), getattr(subject, "__qualname__", None)
    return f"{module}.{name}" if module and name else type(subject).__qualname__


def _import_failure(module_name: str, exc: Exception) -> str:
    """Where in the user's code the import failed; the traceback stays chained to the ConfigError."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"importing {module_name} failed{where}: {type(exc).__name__}: {exc}"


def _nothing() -> None:
    return None


async def _completed(result: object) -> None:
    """Wait for what a method returned. A method without anything to wait for may be a plain one."""
    if inspect.isawaitable(result):
        await result
