"""Settings, state files, last wills and admin pages bent out of shape: understood, or refused with place and reason."""

import os
import tomllib
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead import devfile, parent
from shardlead.config import split_address
from shardlead.devfile import DevCluster
from shardlead.errors import ConfigError
from shardlead.loading import FILES, HINTS, Flag, load, parse_assignment
from shardlead.narrator import Narrator
from shardlead.processes.look import parse_event, parse_map
from tests.support.fuzz import SCALARS, TEXTS, bent_bytes, bent_json, deep, examples, json_values, written

# --- settings ----------------------------------------------------------------------------------------------------

PRODUCTION: Final = (Path(__file__).parent.parent / "config" / "production.toml").read_bytes()
PIECES: Final = (
    b"[",
    b"]",
    b"=",
    b'"',
    b"\n",
    b"#",
    b"nan",
    b"inf",
    b"-1",
    b"1e999",
    b"[[",
    b"{}",
    b"\xff",
    b"1979-05-27",
)
NAMES: Final = st.one_of(st.sampled_from(tuple(HINTS)), st.sampled_from(("lease.tll_s", "x", "store", "", "a.b.c")))
VALUES: Final = st.one_of(
    SCALARS,
    TEXTS,
    st.lists(TEXTS, max_size=2),
    st.sampled_from(("nan", "inf", "a" * 5_000, "/root/none/x", "http://[", "\0")),
)

SECRET: Final = "correct horse battery staple"


def _loaded(**layers: Any) -> str:
    """What a ConfigError says; empty if the layers are settings."""
    try:
        found = load(**layers)
    except ConfigError as exc:
        for problem in exc.problems:
            assert problem.source
            assert problem.allowed
        return str(exc)
    assert found.explicit == set(found.sources)
    return ""


@examples(60)
@given(bent_bytes(PRODUCTION, PIECES))
def test_a_bent_file_is_settings_or_every_problem_of_it(content: bytes) -> None:
    """ConfigError with a place for each; what is understood stands in the settings as it was written."""
    path = Path(os.environ["PYTEST_TMP"]) / "bent.toml"
    path.write_bytes(content)
    said = _loaded(files=[path])
    if said:
        assert str(path) in said or "default" in said
    else:
        tomllib.loads(content.decode())


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("bent")))
        yield


@examples(200)
@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=4),
    st.dictionaries(NAMES, TEXTS, max_size=3),
    st.sampled_from((SECRET, [SECRET], {SECRET: SECRET})),
)
def test_any_flags_and_variables_are_settings_or_problems(
    flags: list[tuple[str, object]], variables: dict[str, str], secret: object
) -> None:
    """Nothing else is raised, and a secret is never repeated."""
    environment = {f"SHARDLEAD_{name.replace('.', '_').upper()}": text for name, text in variables.items()}
    given_flags = [Flag("--set", name, value) for name, value in flags]
    said = _loaded(environment=environment, flags=[*given_flags, Flag("--set", "store.password", secret)])
    assert SECRET not in said


@examples(100)
@given(TEXTS)
def test_an_assignment_has_a_name_or_is_refused(text: str) -> None:
    """`--set` takes its form only."""
    try:
        flag = parse_assignment(text)
    except ConfigError:
        assert "=" not in text
    else:
        assert text.partition("=")[0].strip() == flag.field


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("path", ["a" * 5_000, "/proc/1/root/etc/x", "/dev/null/x", "\udcff", "ü" * 200])
def test_a_file_that_cannot_be_looked_for_is_a_problem_not_a_traceback(name: str, path: str) -> None:
    """A name too long, a folder that may not be entered."""
    assert name in _loaded(flags=[Flag("--set", name, path)])


@pytest.mark.parametrize(
    "content", [b"[store]\nusername=" + b"[" * 2_000 + b"]" * 2_000, b"a" * 10 + b"=" + b"9" * 5_000]
)
def test_a_file_too_deep_or_too_long_to_read_is_named(content: bytes, tmp_path: Path) -> None:
    """tomllib's own limits are the file's fault."""
    path = tmp_path / "deep.toml"
    path.write_bytes(content)
    assert str(path) in _loaded(files=[path])
    assert _loaded(files=[Path("a\0b")])


@examples(200)
@given(st.one_of(TEXTS, bent_bytes(b"[::1]:8080").map(lambda raw: raw.decode("latin-1"))))
def test_an_address_is_host_and_port_or_none(text: str) -> None:
    """Whatever is told apart is told apart for good."""
    for each in (text, f"h:{text}", f"{text}:80", f"[{text}]:80"):
        found = split_address(each)
        if found is not None:
            host, port = found
            assert each == (
                f"[{host}]:{each.rpartition(':')[2]}" if ":" in host else f"{host}:{each.rpartition(':')[2]}"
            )
            assert 0 < port < 65_536


# --- state files -------------------------------------------------------------------------------------------------

STATE: Final = {
    "pid": 1,
    "port": 8080,
    "store": "http://127.0.0.1:2379",
    "cluster": "dev",
    "admin": "127.0.0.1:9090",
    "started": 100.0,
    "data": "",
    "birth": 0,
}


@st.composite
def _bent(draw: st.DrawFn, good: Any, names: tuple[str, ...]) -> bytes:
    if draw(st.booleans()):
        return draw(bent_bytes(written(good), (b"{", b"}", b'"', b",", b"null", b"1e999", b"\xff")))
    return written(draw(bent_json(good, names)))


@examples(120)
@given(_bent(STATE, tuple(STATE)))
def test_a_bent_state_file_is_a_cluster_or_passed_over(content: bytes) -> None:
    """Never a signal to a process group, never an exception."""
    home = Path(os.environ["PYTEST_TMP"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        folder = home / "run" / "shardlead"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dev-1.json").write_bytes(content)
        for info in devfile.alive():
            assert isinstance(info, DevCluster)
            assert info.pid > 0


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**40, 2**63])
def test_a_pid_that_none_can_have_is_nobodys(pid: int) -> None:
    """kill(-1, 0) would ask everybody, and 2**40 fits no pid."""
    test_a_bent_state_file_is_a_cluster_or_passed_over.hypothesis.inner_test(orjson.dumps({**STATE, "pid": pid}))  # type: ignore[attr-defined]


# --- last wills --------------------------------------------------------------------------------------------------

WILL: Final = {"lease": "7", "fenced": True, "endpoints": [], "username": "", "password": "", "ca_file": ""}


@examples(120)
@given(st.one_of(_bent(WILL, tuple(WILL)), st.binary(max_size=30)))
def test_a_bent_will_is_carried_out_or_left(line: bytes) -> None:
    """The parent outlives it: its exit code is the worker's. (Without endpoints, so that nobody is asked.)"""
    try:
        will = orjson.loads(line)
    except orjson.JSONDecodeError:
        will = None
    if isinstance(will, dict) and will.get("endpoints"):
        return
    parent.execute(line, 1, "signal 9")


@pytest.mark.parametrize("lease", [b"1e999", b"-1e999", b"NaN", b'"%b"' % (b"9" * 5_000), b"[" * 5_000 + b"]" * 5_000])
def test_a_lease_that_is_no_number_is_one_clear_line(lease: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Not a traceback in the parent's place."""
    parent.execute(b'{"lease":%b,"fenced":true,"endpoints":["http://127.0.0.1:1"]}' % lease, 1, "signal 9")
    assert capfd.readouterr().err.count("\n") == 1


# --- admin pages -------------------------------------------------------------------------------------------------

MAP: Final = {
    "revision": 9,
    "shards": 4,
    "workers": [{"name": "w1", "address": "h:1", "state": "up", "pid": 7, "admin": "h:2"}],
    "leaders": [{"shard": 0, "worker": "w1", "epoch": 9, "address": "h:1"}],
}
EVENTS: Final = (
    {"t": 1.5, "event": "leader", "shard": 3, "worker": "w1", "epoch": 9, "revision": 9},
    {"t": 2.5, "event": "leader", "shard": 3, "worker": None, "epoch": None, "revision": 10},
    {"t": 1.5, "event": "worker", "worker": "w1", "state": "draining", "revision": 11},
)
PAGE_NAMES: Final = tuple({*MAP, *MAP["workers"][0], *MAP["leaders"][0], *EVENTS[0], "state"})  # type: ignore[index]


@examples(150)
@given(bent_json(MAP, PAGE_NAMES))
def test_a_bent_map_is_a_map_or_a_value_error(raw: Any) -> None:
    """And what is a map can be counted."""
    try:
        seen = parse_map(raw)
    except ValueError:
        return
    assert isinstance(seen.spread, int)
    assert isinstance(seen.is_led, bool)


@examples(150)
@given(st.lists(st.sampled_from(EVENTS).flatmap(lambda event: _bent(event, PAGE_NAMES)), max_size=6))
def test_bent_events_are_told_or_passed_over(lines: list[bytes]) -> None:
    """A line that is no event is a ClientError; one of a shape that is not known stops no story."""
    narrator = Narrator()
    narrator.begin({3: "w2"}, {"w1": "up"}, 1)
    for line in lines:
        try:
            narrator.observe(parse_event(line))
        except aiohttp.ClientError:
            continue
    assert all(isinstance(line, str) for line in narrator.tell())
    narrator.counts()
    assert not narrator.has_news


@examples(100)
@given(json_values(PAGE_NAMES))
def test_any_json_is_no_map(raw: Any) -> None:
    """But for the right one."""
    with pytest.raises(ValueError, match=r"."):
        parse_map(raw)
    with pytest.raises(ValueError, match=r"."):
        parse_map(deep(900))  # type: ignore[arg-type]  # what comes may be anything
