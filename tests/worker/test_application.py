"""Applications: the four shapes, where they are found, and what is said when they are wrong."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from aiohttp import web

from shardlead.errors import ConfigError
from shardlead.worker.application import Application, Description, Factory, Hosted, describe, load


class Whole:
    """Everything an application can have."""

    fenced = False
    idempotent = True

    def __init__(self, lead: object) -> None:
        self.lead = lead
        self.said: list[str] = []

    async def open(self) -> None:
        self.said.append("open")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def run(self) -> None:
        self.said.append("run")

    async def close(self) -> None:
        self.said.append("close")

    def healthy(self) -> bool:
        return False


class Least:
    """The least an application can have."""

    def __init__(self, lead: object) -> None:
        self.lead = lead

    async def handle(self, request: web.Request) -> web.StreamResponse:
        return web.Response()


class Pool:
    """A context manager object; what it yields is a factory."""

    def __init__(self, yielded: object = Least) -> None:
        self.yielded = yielded
        self.said: list[str] = []

    async def __aenter__(self) -> Any:
        self.said.append("enter")
        return self.yielded

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.said.append("exit")


class Sharing(Least):
    """A class with `handle` that is a context manager besides."""

    async def __aenter__(self) -> Self:
        raise AssertionError("it is a class with handle, so it is not entered")

    async def __aexit__(self, *exc_info: object) -> None: ...


def function(lead: object) -> Whole:
    return Whole(lead)


@asynccontextmanager
async def shared() -> AsyncIterator[type[Whole]]:
    yield Whole


def pool() -> Pool:
    return Pool(function)


async def forgotten() -> AsyncIterator[type[Least]]:
    yield Least


def two(lead: object, more: object) -> Least:
    return Least(lead)


async def made(application: Application) -> tuple[Factory, Hosted]:
    async with application.factory() as make:
        return make, make("lead")


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        pytest.param(Whole, Whole, id="class"),
        pytest.param(Least, Least, id="class with handle alone"),
        pytest.param(Sharing, Sharing, id="class that can be entered, too"),
        pytest.param(function, Whole, id="factory"),
        pytest.param(shared, Whole, id="decorated generator that yields a class"),
        pytest.param(pool, Whole, id="function that returns a context manager"),
        pytest.param(Pool(), Least, id="context manager that yields a class"),
        pytest.param(Pool(function), Whole, id="context manager that yields a factory"),
        pytest.param(Pool, Least, id="context manager class"),
    ],
)
def test_all_shapes_are_used_alike(subject: object, kind: type) -> None:
    """A class, a factory, a context manager and a function that returns one all make the shard's object."""
    _, hosted = asyncio.run(made(Application(subject)))
    assert type(hosted.subject) is kind
    assert vars(hosted.subject)["lead"] == "lead"


def test_what_is_shared_is_entered_once_and_left() -> None:
    """All objects of a worker are made inside one entering."""

    async def main() -> list[str]:
        shared_pool = Pool()
        async with Application(shared_pool).factory() as make:
            make("one"), make("two")
            assert shared_pool.said == ["enter"]
        return shared_pool.said

    assert asyncio.run(main()) == ["enter", "exit"]


def test_left_out_methods_do_nothing() -> None:
    """open, run and close of an object that has none return at once; it is healthy."""

    async def main() -> None:
        _, hosted = await made(Application(Least))
        await hosted.open()
        await hosted.run()
        await hosted.close()
        assert hosted.healthy() is True
        assert (hosted.has_run, hosted.has_healthy) == (False, False)

    asyncio.run(main())


def test_methods_that_are_there_are_called() -> None:
    """Hosted is the object's own behaviour, and `subject` the object."""

    async def main() -> None:
        _, hosted = await made(Application(Whole))
        await hosted.open()
        await hosted.run()
        await hosted.close()
        assert hosted.healthy() is False
        assert (hosted.has_run, hosted.has_healthy) == (True, True)
        assert isinstance(hosted.subject, Whole)
        assert hosted.subject.said == ["open", "run", "close"]

    asyncio.run(main())


# --- what it says of itself ----------------------------------------------------------------------------------------


def test_flags_are_fenced_and_not_idempotent_by_default() -> None:
    """The safe answers where the class says nothing."""
    assert describe(Least) == Description(fenced=True, idempotent=False, has_run=False, has_healthy=False)
    assert describe(Whole) == Description(fenced=False, idempotent=True, has_run=True, has_healthy=True)


def test_flags_of_a_context_manager_are_its_own_else_of_what_it_yields() -> None:
    """NAME's word counts first, then the yielded class's."""

    class Firm(Pool):
        fenced = True

    make, _ = asyncio.run(made(Application(Firm(Whole))))
    assert make.description == Description(fenced=True, idempotent=True, has_run=True, has_healthy=True)
    make, _ = asyncio.run(made(Application(Pool(Whole))))
    assert (make.fenced, make.idempotent) == (False, True)


def test_a_flag_must_be_a_bool() -> None:
    """`fenced = "no"` would be true; it is refused by name."""

    class Vague(Least):
        fenced = "no"

    with pytest.raises(ConfigError, match=r"fenced = 'no': must be True or False"):
        Application(Vague)


# --- what is wrong is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        (object, "no method `handle`"),
        (42, "it cannot be called or entered"),
        (forgotten, "decorate it with contextlib.asynccontextmanager"),
        (made, "decorate it with contextlib.asynccontextmanager"),
        (two, "callable with no arguments"),
        (type("NoLead", (), {"handle": Least.handle}), "callable with one argument, the Leadership"),
    ],
)
def test_other_shapes_are_refused(subject: object, said: str) -> None:
    """With what was found, why it cannot be used, and what can."""
    with pytest.raises(ConfigError) as info:
        Application(subject, name="app:it")
    assert said in str(info.value)
    assert "app:it" in str(info.value)
    assert "async context manager" in str(info.value)


@pytest.mark.parametrize("yielded", [None, object, Pool()])
def test_a_context_manager_must_yield_a_maker(yielded: object) -> None:
    """Said on entering, with what it yielded."""
    with pytest.raises(ConfigError):
        asyncio.run(made(Application(Pool(yielded))))


def test_a_function_without_arguments_must_return_a_context_manager() -> None:
    """Said on entering."""
    with pytest.raises(ConfigError, match="no async context manager"):
        asyncio.run(made(Application(lambda: 7)))


def test_a_made_object_must_have_handle() -> None:
    """A factory's objects are seen only when they are made."""
    with pytest.raises(ConfigError, match="no method `handle`"):
        asyncio.run(made(Application(lambda _lead: object())))


def test_a_method_must_be_callable() -> None:
    """`run = True` is a mistake, not a switch."""

    class Odd(Least):
        run = True

    with pytest.raises(ConfigError, match="run must be a method"):
        asyncio.run(made(Application(Odd)))


# --- MODULE:NAME ---------------------------------------------------------------------------------------------------

APP = """
class Counter:
    def __init__(self, lead): ...
    async def handle(self, request): ...
class Outer:
    Inner = Counter
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory with modules that nobody else has."""
    (tmp_path / "shardlead_try_app.py").write_text(APP)
    (tmp_path / "shardlead_try_needs.py").write_text("import shardlead_no_such_module\n")
    (tmp_path / "shardlead_try_breaks.py").write_text("x = 1\nraise OSError('no pool')\n")
    (tmp_path / "shardlead_try_syntax.py").write_text("def (:\n")
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in [name for name in sys.modules if name.startswith("shardlead_try_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["Counter", "Outer.Inner"])
def test_the_current_directory_is_importable(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with other servers; NAME may be dotted."""
    monkeypatch.chdir(folder)
    application = load(f"shardlead_try_app:{name}")
    make, hosted = asyncio.run(made(application))
    assert (application.name, make.name) == (f"shardlead_try_app:{name}",) * 2
    assert type(hosted.subject).__name__ == "Counter"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("shardlead_try_app", "must be MODULE:NAME"),
        ("shardlead_try_app:", "must be MODULE:NAME"),
        ("./app.py:Counter", "must be MODULE:NAME"),
        ("shardlead_try_none:Counter", "there is no module 'shardlead_try_none' in "),
        ("shardlead_try_app.sub:Counter", "there is no module 'shardlead_try_app.sub' in "),
        ("shardlead_try_needs:Counter", "shardlead_try_needs.py:1: ModuleNotFoundError"),
        ("shardlead_try_breaks:Counter", "shardlead_try_breaks.py:2: OSError: no pool"),
        ("shardlead_try_syntax:Counter", "SyntaxError"),
        ("shardlead_try_app:Conter", "has no 'Conter': did you mean Counter?"),
        ("shardlead_try_app:Outer.Iner", "has no 'Iner': did you mean Inner?"),
        ("shardlead_try_app:Outer", "no method `handle`"),
    ],
)
def test_what_cannot_be_loaded_says_which_part(folder: Path, spec: str, said: str) -> None:
    """The form, the module, something it imports, the name or the shape: each with its own words."""
    with pytest.raises(ConfigError) as info:
        load(spec, directory=folder)
    assert said in str(info.value)
    assert spec in str(info.value)
