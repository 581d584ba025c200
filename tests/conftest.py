"""What holds for every test: which are left out when, and that a missing etcd is no excuse under CI."""

import os
import signal
from collections.abc import Generator

import hypothesis
import pytest

from tests.support import fuzz

# A busy machine is no failure, so examples have no deadline; what counts under CI is the same examples every time.
hypothesis.settings.register_profile(
    "shardlead",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("shardlead")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long, and long lists in full")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job and nohup have these ignored. Every process of a test would inherit that, and keep to it.
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    if config.getoption("--long"):
        fuzz.go_long()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out unless they were asked for."""
    if config.getoption("--long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the full lists are to be run (`python -m tests long`)."""
    return bool(request.config.getoption("--long"))


def is_ci() -> bool:
    """Whether this run is the one that counts, where an etcd must be there."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a skipped etcd test is a failed one."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and is_ci() and item.get_closest_marker("etcd"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI, where etcd must be there: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Under CI a module that skips itself whole is a failure too."""
    report = yield
    if report.outcome == "skipped" and is_ci():
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped itself under CI: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
