"""Settings: the four layers, everything wrong with them listed at once, and files that show every field."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import shardlead.config
from shardlead import loading
from shardlead.config import SECTIONS, LeaseSettings, Settings, StoreSettings, check, split_address
from shardlead.errors import ConfigError, Problem
from shardlead.loading import HINTS, Flag, load, parse_assignment

ROOT = Path(__file__).parents[1]
FILES = ("dev.toml", "production.toml")


def problems_of(
    *, text: str = "", tmp_path: Path | None = None, env: dict[str, str] | None = None, **flags: str
) -> list[Problem]:
    """What is wrong with these layers; [] if nothing is."""
    files = []
    if tmp_path is not None:
        files = [tmp_path / "a.toml"]
        files[0].write_text(text)
    try:
        load(files, env or {}, [Flag(f"--{name}", name.replace("__", "."), value) for name, value in flags.items()])
    except ConfigError as exc:
        return list(exc.problems)
    return []


def test_the_defaults_are_good() -> None:
    """With nothing said the settings are the dataclasses' own, and no relation is broken."""
    loaded = load()
    assert loaded.settings == Settings()
    assert loaded.explicit == frozenset()


def test_each_layer_is_stronger_than_the_last(tmp_path: Path) -> None:
    """default < first file < second file < environment < flag, field by field; sources tell which it was."""
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("[worker]\nparked_max = 1\nport = 1\nname = 'one'\nzone = 'one'\n")
    second.write_text("[worker]\nport = 2\nname = 'two'\nzone = 'two'\n")
    loaded = load(
        [first, second],
        {"SHARDLEAD_WORKER_NAME": "three", "SHARDLEAD_WORKER_ZONE": "three", "PATH": "/bin"},
        [parse_assignment("worker.zone = four")],
    )
    worker = loaded.settings.worker
    assert (worker.parked_max, worker.port, worker.name, worker.zone) == (1, 2, "three", "four")
    assert worker.capacity == Settings().worker.capacity
    assert loaded.sources == {
        "worker.parked_max": str(first),
        "worker.port": str(second),
        "worker.name": "SHARDLEAD_WORKER_NAME",
        "worker.zone": "--set",
    }
    assert loaded.explicit == set(loaded.sources)


def test_a_default_that_is_said_counts_as_explicit() -> None:
    """For the comparison with the cluster's meta it matters who said it, not what."""
    assert load(flags=[Flag("--set", "cluster.shards", "256")]).explicit == {"cluster.shards"}


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("worker.port", "80", 80),
        ("worker.capacity", "2", 2.0),
        ("worker.controller", "no", False),
        ("worker.controller", "TRUE", True),
        ("worker.name", "7", "7"),
        ("store.endpoints", "http://a:1, http://b:2", ("http://a:1", "http://b:2")),
        ("router.key_rules", "path:/orders/{key}/*,header:X-K", ("path:/orders/{key}/*", "header:X-K")),
        ("log.level", "debug", "debug"),
    ],
)
def test_text_is_converted_by_the_fields_type(field: str, text: str, value: object) -> None:
    """The environment and flags know only text; it becomes what the field is."""
    section, _, item = field.partition(".")
    variable = f"SHARDLEAD_{section}_{item}".upper()
    for loaded in (load(environment={variable: text}), load(flags=[parse_assignment(f"{field}={text}")])):
        assert getattr(getattr(loaded.settings, section), item) == value


@pytest.mark.parametrize(
    ("line", "value", "allowed"),
    [
        ("lease.ttl_s = 1", 1, "a whole number, at least 2"),
        ("lease.ttl_s = 10.5", 10.5, "a whole number"),
        ("lease.ttl_s = true", True, "a whole number"),
        ("lease.ttl_s = '10'", "10", "a whole number"),
        ("lease.margin_s = nan", float("nan"), "a number, at least 0"),
        ("store.try_timeout_s = 0", 0, "a number, more than 0"),
        ("store.try_timeout_s = inf", float("inf"), "at most 86400"),
        ("worker.port = 65536", 65536, "at most 65535"),
        ("worker.controller = 1", 1, "true or false"),
        ("worker.name = 'a b'", "a b", "empty, or 1 to 128 of A-Z"),
        ("worker.advertise = 'host'", "host", '"host:port"'),
        ("worker.advertise = 'host:0'", "host:0", "from 1 to 65535"),
        ("worker.host = ''", "", "an IP address or a host name"),
        ("cluster.name = 'Prod/1'", "Prod/1", "1 to 63 of a-z 0-9"),
        ("cluster.shards = 0", 0, "at least 1"),
        ("cluster.shards = 32769", 32769, "at most 32768"),
        ("store.endpoints = []", [], 'one or more different "http://host:port"'),
        ("store.endpoints = ['ftp://a:1']", ["ftp://a:1"], "http://host:port"),
        ("store.endpoints = ['http://a:1/v3']", ["http://a:1/v3"], "without path"),
        ("store.endpoints = ['http://u:p@a:1']", ["http://u:p@a:1"], "user or query"),
        ("store.endpoints = ['http://a:99999']", ["http://a:99999"], "http://host:port"),
        ("store.endpoints = ['http://a:1', 'https://b:1']", ["http://a:1", "https://b:1"], "all"),
        ("store.endpoints = ['http://a:1', 'http://a:1']", ["http://a:1", "http://a:1"], "different"),
        ("store.endpoints = 'http://a:1'", "http://a:1", "one or more"),
        ("store.ca_file = '/no/such/file'", "/no/such/file", "a file that can be read"),
        ("router.keyless = 'guess'", "guess", '"refuse" or "any"'),
        ("router.key_rules = ['cookie:x']", ["cookie:x"], "path:/template/{key}/*"),
        ("router.key_rules = ['path:/a/{id}']", ["path:/a/{id}"], "with one {key}"),
        ("log.level = 'loud'", "loud", '"debug" or "info"'),
        ("lease.tll_s = 10", 10, "did you mean lease.ttl_s?"),
        ("laese.ttl_s = 10", 10, "did you mean lease.ttl_s?"),
        ("colour = 'red'", "red", "there are cluster, store, lease"),
        ("lease = 10", 10, "a table, [lease]"),
        ("ttl_s = 10", 10, "belongs into a section: lease.ttl_s"),
    ],
)
def test_what_is_wrong_is_named_with_all_four(tmp_path: Path, line: str, value: object, allowed: str) -> None:
    """Each kind of mistake names the file, the field, the value and what is allowed."""
    (problem,) = problems_of(text=line, tmp_path=tmp_path)
    assert problem.source == str(tmp_path / "a.toml")
    assert problem.field == line.partition(" = ")[0]
    assert repr(problem.value) == repr(value)
    assert allowed in problem.allowed


@pytest.mark.parametrize(
    ("lines", "field", "numbers"),
    [
        ("lease.ttl_s = 5", "lease.ttl_s", "5 * 0.99 - 0.5 - 2.8 = 1.65 < 2"),
        ("lease.ttl_s = 2", "lease.ttl_s", "2 * 0.99 - 0.5 - 2.8 = -1.32 < 2"),  # and nothing else that follows
        ("lease.renew_interval_s = 8", "lease.renew_interval_s", "10 * 0.99 - 0.5 - 8 = 1.4 < 2"),
        ("lease.margin_s = 0\nstore.try_timeout_s = 5", "lease.margin_s", "10 * 0.99 - 0.5 - 2.8 = 6.6 < 10"),
        ("worker.handle_need_s = 7", "worker.handle_need_s", "6.6 s"),
        ("store.call_timeout_s = 0.5", "store.call_timeout_s", "store.try_timeout_s (1)"),
        ("store.watch_silence_s = 4", "store.watch_silence_s", "4 s"),
        ("router.hold_timeout_s = 10", "router.hold_timeout_s", "must exceed lease.ttl_s (10)"),
        ("router.upstream_idle_timeout_s = 75", "router.upstream_idle_timeout_s", "75 s"),
        ("router.held_max = 10", "router.held_max", "(1000) is at most router.held_max (10)"),
        ("router.connections_max = 10", "router.connections_max", "(20000) is at most router.connections_max (10)"),
        ("worker.body_bytes_max = 10", "worker.body_bytes_max", "(1073741824)"),
        ("worker.drain_timeout_s = 30", "worker.drain_timeout_s", "30 + 5 + 5 = 40"),
        ("controller.moves_in_flight_max = 2", "controller.moves_in_flight_max", "(4)"),
        ("store.username = 'u'", "store.username", "both or neither"),
    ],
)  # fmt: skip
def test_a_broken_relation_is_named_with_its_numbers(tmp_path: Path, lines: str, field: str, numbers: str) -> None:
    """It is laid to the field that was said, not to one that has its default."""
    (problem,) = problems_of(text=lines, tmp_path=tmp_path)
    assert (problem.source, problem.field) == (str(tmp_path / "a.toml"), field)
    assert numbers in problem.allowed


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    """Files, environment and flags are all read before anything is said, and each problem stands on its line."""
    (tmp_path / "a.toml").write_text("[lease]\nttl_s = 0\nfoo = 1\n[router]\nport = -1\n")
    with pytest.raises(ConfigError) as caught:
        load(
            [tmp_path / "a.toml", tmp_path / "missing.toml"],
            {"SHARDLEAD_STORE_TRY_TIMEOUT_S": "soon", "SHARDLEAD_LEASE_TTL": "5"},
            [Flag("--port", "worker.port", "http"), Flag("--set", "nope.nope", "1")],
        )
    said = [(problem.source.rpartition("/")[2], problem.field) for problem in caught.value.problems]
    assert said == [
        ("a.toml", "lease.ttl_s"),
        ("a.toml", "lease.foo"),
        ("a.toml", "router.port"),
        ("--config", "file"),
        ("SHARDLEAD_LEASE_TTL", "SHARDLEAD_LEASE_TTL"),
        ("SHARDLEAD_STORE_TRY_TIMEOUT_S", "store.try_timeout_s"),
        ("--port", "worker.port"),
        ("--set", "nope.nope"),
    ]
    assert len(str(caught.value).splitlines()) == len(said)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    """With the place of the mistake in it."""
    (problem,) = problems_of(text="[lease\n", tmp_path=tmp_path)
    assert problem.value == str(tmp_path / "a.toml")
    assert "line 1" in problem.allowed


def test_a_secret_is_never_repeated(tmp_path: Path) -> None:
    """Neither where it is right nor where its name is misspelt."""
    for text in ("store.password = 'hunter2'", "store.pasword = 'hunter2'", "store.password = 4711471147"):
        problems = problems_of(text=text, tmp_path=tmp_path)
        assert problems
        assert not any("hunter2" in str(problem) or "4711" in str(problem) for problem in problems)
    (problem,) = problems_of(env={"SHARDLEAD_STORE_PASWORD": "hunter2"})
    assert "hunter2" not in str(problem)
    assert "SHARDLEAD_STORE_PASSWORD" in str(problem)


def test_other_variables_of_ours_and_of_kubernetes_are_no_settings() -> None:
    """A service called shardlead-router makes Kubernetes set SHARDLEAD_ROUTER_PORT=tcp://...; that is not for us."""
    environment = {
        "SHARDLEAD_DEMO_DB": "x",
        "SHARDLEAD_PARENT_FD": "3",
        "SHARDLEAD_ROUTER_PORT": "tcp://10.0.0.1:80",
        "SHARDLEAD_ROUTER_SERVICE_HOST": "10.0.0.1",
        "SHARDLEAD_ROUTER_SERVICE_PORT_HTTP": "80",
        "SHARDLEAD_ROUTER_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load(environment=environment).explicit == frozenset()


def test_set_without_a_value_says_its_form() -> None:
    """`--set lease.ttl_s` names what is missing."""
    with pytest.raises(ConfigError, match=r"section\.field=value"):
        parse_assignment("lease.ttl_s")


def test_the_margin_is_at_least_a_twentieth_of_the_ttl() -> None:
    """delta = max(margin, 5 % of the TTL)."""
    lease = LeaseSettings(ttl_s=100, margin_s=0.5)
    assert shardlead.config.delta_s(lease) == 5.0
    assert (
        check(Settings(lease=lease, store=StoreSettings(), router=Settings().router))[0].field
        == "router.hold_timeout_s"
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a:1", ("a", 1)),
        ("[::1]:80", ("::1", 80)),
        ("::1:80", None),
        ("a", None),
        (":1", None),
        ("a:", None),
        ("a:x", None),
        ("a b:1", None),
        ("[a]:1", None),
    ],
)
def test_addresses(text: str, address: tuple[str, int] | None) -> None:
    """host:port, and [v6]:port; nothing else."""
    assert split_address(text) == address


# --- the files that ship ---------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """Each field's docstring, from the source."""
    tree = ast.parse(Path(shardlead.config.__file__).read_text(encoding="utf-8"))
    section_of = {kind.__name__: section for section, kind in SECTIONS.items()}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in section_of:
            for item, doc in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(doc, ast.Expr):
                    assert isinstance(doc.value, ast.Constant)
                    found[f"{section_of[node.name]}.{item.target.id}"] = " ".join(str(doc.value.value).split())
    return found


def test_every_field_has_a_docstring_and_sections_are_complete() -> None:
    """One docstring a field; every section of Settings is known to the loader."""
    assert set(documented()) == set(HINTS)
    assert [item.name for item in dataclasses.fields(Settings)] == list(SECTIONS)
    assert all(documented().values())


@pytest.mark.parametrize("name", FILES)
def test_the_files_show_every_field_with_its_words(name: str) -> None:
    """Each field stands once, under its docstring; where it is commented out, with the code's default."""
    shown: dict[str, str] = {}
    comment: list[str] = []
    section = ""
    for line in (ROOT / "config" / name).read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section, comment = header[1], []
        elif line.startswith("# "):
            comment.append(line[2:])
        elif item := re.fullmatch(r"(#?)(\w+) = (.+)", line):
            field = f"{section}.{item[2]}"
            assert field not in shown
            shown[field] = " ".join(comment)
            comment = []
            if item[1]:
                value = tomllib.loads(f"value = {item[3]}")["value"]
                default = loading.default_of(field)
                assert (tuple(value) if isinstance(value, list) else value) == default, field
    assert shown == documented()


@pytest.mark.parametrize("name", FILES)
def test_the_files_can_be_used_as_they_are(name: str) -> None:
    """They load without a problem, and what they set differs from nothing that a relation needs."""
    assert load([ROOT / "config" / name]).explicit


def test_the_readme_names_settings_that_exist_with_their_defaults() -> None:
    """`section.field` in code marks is a field; with `= value` inside or (value) behind it, that is its default; and
    each SHARDLEAD_SECTION_FIELD is one, too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = re.compile(rf"`({'|'.join(SECTIONS)})\.([a-z_]+)(?: = ([^`]+))?`(?: \((\d[^)]*)\))?")
    for section, item, inside, behind in pattern.findall(text):
        field, value = f"{section}.{item}", inside or behind
        assert field in HINTS, field
        if value:
            default = loading.default_of(field)
            stated = tomllib.loads(f"value = {value}")["value"]
            assert (tuple(stated) if isinstance(stated, list) else stated) == default, field
    for variable in re.findall(rf"SHARDLEAD_(?:{'|'.join(name.upper() for name in SECTIONS)})_[A-Z_]+", text):
        assert any(variable == f"SHARDLEAD_{name.replace('.', '_').upper()}" for name in HINTS), variable
