"""`python -m loadtest SCENARIO …`: the command line of a run."""

import asyncio
import logging
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import click

from loadtest.errors import CannotBegin
from loadtest.keys import KEYS_MAX, KeyChoice
from loadtest.live import Live, table
from loadtest.options import DURATION_MAX_S, DURATION_MIN_S, PAYLOAD_BYTES_MAX, Options, problems
from loadtest.result import write_json
from loadtest.run import Outcome, interruptible
from loadtest.scenarios import SCENARIOS

RATE_MAX: Final = 200_000
INTERRUPTED: Final = 130
WRONG: Final = 2
_WIDTH: Final = max(map(len, SCENARIOS))

EPILOG: Final = "\b\nScenarios, and what each promises:\n" + "\n".join(
    f"  {scenario.name:<{_WIDTH}}  {scenario.summary}\n"
    + "\n".join(f"  {'':<{_WIDTH}}    {promise.text}" for promise in scenario.promises(scenario.ttl_s))
    for scenario in SCENARIOS.values()
)  # fmt: skip


def _rates(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in value.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(1 <= rate <= RATE_MAX for rate in rates):
        raise click.BadParameter(f"{value!r}: must be numbers from 1 to {RATE_MAX:,} with commas between them")
    return rates


def _sizes(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() and int(part[:12]) <= PAYLOAD_BYTES_MAX for part in parts):
        raise click.BadParameter(f"{value!r}: must be sizes up to {PAYLOAD_BYTES_MAX:,} bytes with commas between them")
    return tuple(int(part) for part in parts)


def _keys(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    try:
        return str(KeyChoice.parse(value))
    except ValueError as exc:
        raise click.BadParameter(f"{value!r}: {exc}") from exc


def _store(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if value in ("embedded", "etcd") or value.startswith(("http://", "https://")):
        return value
    raise click.BadParameter(f"{value!r}: must be embedded, etcd, or the URL of a running etcd")


def _settings(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or "." not in name:
            raise click.BadParameter(f"{value!r}: must be SECTION.FIELD=VALUE")
        found.append((name, rest))
    return tuple(found)


_SHARE: Final = click.FloatRange(0, 1)
_FILE: Final = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(
    name="python -m loadtest",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True},
)
@click.argument("scenario", type=click.Choice(list(SCENARIOS)), metavar="SCENARIO")
@click.option(
    "--rate",
    "rates",
    metavar="RATE[,RATE…]",
    callback=_rates,
    default="1000",
    help="Requests per second; several are steps of equal length.",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(DURATION_MIN_S, DURATION_MAX_S),
    default=30.0,
    help="Seconds of load; what a scenario does may lengthen it.",
)
@click.option("--shards", type=click.IntRange(1, 65_535), default=64, help="Of a cluster that is started here.")
@click.option("--workers", type=click.IntRange(1, 64), default=3, help="The same.")
@click.option("--routers", type=click.IntRange(1, 16), default=1, help="The same; requests take turns.")
@click.option(
    "--ttl",
    "ttl_s",
    type=click.IntRange(2, 60),
    help="Lease time-out in seconds.  [default: 5; 10 for etcd-leader-change]",
    show_default=False,
)
@click.option(
    "--store",
    metavar="embedded|etcd|URL",
    callback=_store,
    default="embedded",
    help="The cluster's store: started here, or a running etcd.",
)
@click.option(
    "--url", default="", help="A running cluster's router; with --store URL and --cluster. Nothing is started."
)
@click.option("--cluster", default="default", help="That cluster's name.")
@click.option("--do", metavar="COMMAND", default="", help="With --url: the command that makes the scenario's fault.")
@click.option(
    "--app", default="memory", help="memory, sqlite (shardlead.demo), or MODULE:NAME; it answers JSON with its shard."
)
@click.option("--path", default="/counters/{key}", help="What is asked for.")
@click.option(
    "--set",
    "settings",
    metavar="SECTION.FIELD=VALUE",
    callback=_settings,
    multiple=True,
    help="A setting of every role that is started.",
)
@click.option(
    "--keys", metavar="uniform|zipf[:S]|hot[:SHARE]", callback=_keys, default="uniform", help="How keys are drawn."
)
@click.option("--key-count", type=click.IntRange(1, KEYS_MAX), default=10_000, help="How many different keys.")
@click.option(
    "--payload",
    "payload_bytes",
    metavar="BYTES[,BYTES…]",
    callback=_sizes,
    default="0",
    help="Sizes of POST bodies, drawn evenly.",
)
@click.option("--posts", type=_SHARE, default=0.5, help="Share of POSTs; the others are GETs.")
@click.option("--idempotent", type=_SHARE, default=0.0, help="Share of the POSTs with an Idempotency-Key.")
@click.option("--audit/--no-audit", default=True, help="Whether workers write audit logs, which are then verified.")
@click.option(
    "--through",
    type=click.Choice(["router", "client"]),
    default="router",
    help="The smart client goes to leaders directly.",
)
@click.option(
    "--generators",
    type=click.IntRange(1, 64),
    help="Processes that send.  [default: one for 2,000 requests/s, 700 through the client]",
    show_default=False,
)
@click.option(
    "--connections",
    "connections_max",
    type=click.IntRange(1, 20_000),
    default=2_000,
    help="Most connections of one generator.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 120),
    default=20.0,
    help="Seconds after which a request has failed.",
)
@click.option("--seed", type=int, default=1, help="Draws the same keys and methods again.")
@click.option("--report", type=_FILE, help="Write an HTML page that needs no network.")
@click.option("--json", type=_FILE, help="Write the result as JSON.")
def _command(**values: Any) -> None:
    """Put open-loop load on a cluster, do what SCENARIO says to it, and report what became of every request.

    The cluster is started for the run (real processes on free ports), or runs already (--url). Exit code 1 if one of
    the scenario's promises was broken, 2 if nothing could be measured.
    """
    names = {field.name for field in fields(Options)}
    given = {name: value for name, value in values.items() if name in names and value is not None}
    options = Options(**given)
    scenario = SCENARIOS[options.scenario]
    wrong = problems(options)
    if options.is_own and options.workers < scenario.workers_min:
        wrong.append(f"--workers {options.workers}: {scenario.name} needs at least {scenario.workers_min}")
    for path in (options.report, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            wrong.append(f"{path}: there is no folder {path.absolute().parent}")
    if wrong:
        raise click.UsageError("\n".join(wrong))
    raise click.exceptions.Exit(asyncio.run(_run(options)))


async def _run(options: Options) -> int:
    loop, stop, live = asyncio.get_running_loop(), asyncio.Event(), Live()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    line = shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])
    try:
        outcome = await interruptible(options, live, line, stop)
        if outcome is None:
            return INTERRUPTED
        _write(options, outcome, live)
    except (CannotBegin, OSError) as exc:
        live.finish()
        print(f"loadtest: {exc}", file=sys.stderr)
        return WRONG
    return 0 if outcome.result.is_kept else 1


def _write(options: Options, outcome: Outcome, live: Live) -> None:
    live.say("\n" + table(outcome.result))
    if options.json is not None:
        write_json(outcome.result, options.json)
        live.say(f"JSON: {options.json}")
    if options.report is not None:
        from loadtest.report import page

        options.report.write_text(page(outcome), encoding="utf-8")
        live.say(f"report: {options.report}")


def main(arguments: list[str]) -> int:
    """Run it. The exit code."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        code = _command.main(arguments, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.Abort:
        return INTERRUPTED
    return int(code or 0)
