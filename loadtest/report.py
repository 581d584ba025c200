"""The report: one HTML page that opens without network. No script, no font and no image from anywhere.

Law: whatever comes from outside (names of workers, reasons, commands) is escaped; every figure on the page stands in
the JSON as well, but for the heat map's cells and the lanes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from loadtest import drawings
from loadtest.charts import number
from loadtest.drawings import Colours, Numbered
from loadtest.leadership import AFTER_S, BEFORE_S
from loadtest.reckon import Heat, heat, percentile_curve
from loadtest.result import Result, ShardLoad
from loadtest.run import Outcome
from loadtest.scenarios import FAILOVER_MS, PAUSE_MS
from loadtest.style import CSS

MOVES_MAX: Final = 500
SHARDS_MAX: Final = 300
EXTREMES: Final = 25
EXAMPLES_MAX: Final = 20


def page(outcome: Outcome) -> str:
    """The whole page."""
    result, story = outcome.result, outcome.story
    colours = Colours(drawings.workers_of(result, story))
    marks = drawings.numbered(result.marks)
    counts = Counter(row.leader for row in result.per_shard if row.leader)
    map_of = heat(outcome.samples, outcome.shards, result.duration_s)
    lanes, note = drawings.lanes(result, story, outcome.shards, colours, marks)
    parts = [
        _head(result),
        _tiles(result),
        "".join(f'<p class="warn">{escape(text)}</p>' for text in result.warnings),
        _promises(result),
        _throughput(result, map_of, colours, counts, marks),
        _latency(result, outcome, marks),
        _card(
            "Leadership",
            "Who led how many shards, and each shard's own lane.",
            drawings.counts_over_time(result, story, outcome.shards, colours, marks),
            drawings.legend(colours, counts),
            lanes,
            f'<p class="note">{escape(note)}</p>' if note else "",
            _mark_list(marks),
        ),
        _moves(result, marks),
        _failovers(result),
        _verify(result),
        _failures(result),
        _surroundings(result),
    ]
    title = escape(f"{result.scenario}: shardlead load test")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{CSS}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(result: Result) -> str:
    kept = ("good", "all promises kept") if result.is_kept else ("bad", "a promise was broken")
    rates = ", ".join(f"{rate:g}" for rate in result.rates_rps)
    settings = result.settings
    cluster = f"{settings['workers']} workers, " if "workers" in settings else ""
    return (
        f'<header><h1>{escape(result.scenario)}</h1><span class="badge {kept[0]}">{kept[1]}</span></header>'
        f'<p class="soft">{rates} requests/s for {result.duration_s:.1f} s, open loop, through the '
        f"{escape(str(settings.get('through', 'router')))}; {cluster}{settings.get('shards', '?')} shards, store: "
        f"{escape(str(settings.get('store', '?')))}. Began {escape(result.started)}.</p>"
    )


def _tiles(result: Result) -> str:
    latency, pause, failover = result.latency_ms, result.pause_ms, result.failover
    tiles = [
        _tile(f"{result.ok:,}", "good answers"),
        _tile(f"{result.failed:,}", "failed", is_bad=result.failed > 0),
        _tile(f"{result.throughput_rps:,.0f}/s", "throughput"),
        _tile(_ms(latency.p50), "latency p50"),
        _tile(_ms(latency.p99), "latency p99"),
        _tile(_ms(latency.p999), "latency p99.9"),
    ]
    if result.moves:
        tiles += [_tile(f"{len(result.moves):,}", "moves"), _tile(_ms(pause.p99), "pause per move, p99")]
    if result.failover_ms:
        tiles.append(_tile(_ms(failover.p99), "failover p99"))
    violations = len(result.seen.violations) + (result.verify.violations if result.verify else 0)
    tiles.append(_tile(str(violations), "violations", is_bad=violations > 0))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _tile(value: str, name: str, *, is_bad: bool = False) -> str:
    css = " is-bad" if is_bad else ""
    return f'<div class="tile{css}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _promises(result: Result) -> str:
    rows = "".join(
        f'<tr><td><span class="badge {"good" if verdict.is_kept else "bad"}">'
        f"{'kept' if verdict.is_kept else 'broken'}</span></td>"
        f'<td>{escape(verdict.promise)}<br><span class="soft">{escape(verdict.found)}</span></td></tr>'
        for verdict in result.promises
    )
    return _card("Promises", "", f'<table class="promises">{rows}</table>')


def _throughput(result: Result, map_of: Heat, colours: Colours, counts: Counter[str], marks: Numbered) -> str:
    values = sorted(row.throughput_rps for row in result.per_shard)
    middle = values[(len(values) - 1) // 2] if values else 0.0
    spread = f"{number(values[0])} to {number(values[-1])} per second, median {number(middle)}" if values else "none"
    grouped = f" Each row is {map_of.per_row} neighbouring shards, on average." if map_of.per_row > 1 else ""
    return _card(
        "Throughput per shard",
        f"Good answers of {len(values):,} shards over the whole load: {spread}.",
        drawings.shard_bars(result, colours),
        drawings.legend(colours, counts),
        "<h3>Each shard over time</h3>",
        drawings.heat_map(result, map_of, marks),
        f'<p class="note">Good answers per second, by when they were due, in steps of {map_of.column_s:.3g} s. '
        f"A gap is a time without a good answer.{grouped}</p>",
        "<h3>All shards together</h3>",
        drawings.rate_over_time(result, marks),
        _mark_list(marks),
        _shard_table(result),
    )


def _shard_table(result: Result) -> str:
    rows: Sequence[ShardLoad] = result.per_shard
    name = "All shards in figures"
    if len(rows) > SHARDS_MAX:
        ranked = sorted(rows, key=lambda row: -row.throughput_rps)
        rows = [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
        name = f"The {EXTREMES} busiest and the {EXTREMES} quietest shards; the JSON has all"
    body = (
        (
            str(row.shard),
            row.leader or "nobody",
            f"{row.requests:,}",
            f"{row.throughput_rps:.1f}",
            f"{row.p99_ms:.1f}",
            str(row.failed),
        )
        for row in rows
    )
    return _details(
        name, _table(("shard", "leader", "requests", "per second", "p99 ms", "failed"), body, numbers=(2, 3, 4, 5))
    )


def _latency(result: Result, outcome: Outcome, marks: Numbered) -> str:
    latency = result.latency_ms
    row = (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)
    return _card(
        "Latency",
        "From the moment a request was due, whether it could leave then or not. Failed ones count until they failed.",
        _table(("p50", "p90", "p99", "p99.9", "max"), [tuple(_ms(value) for value in row)]),
        "<h3>Over time, each second</h3>",
        drawings.latency_over_time(result, marks),
        _mark_list(marks),
        "<h3>By percentile</h3>",
        drawings.percentiles(percentile_curve(outcome.samples)),
    )


def _moves(result: Result, marks: Numbered) -> str:
    if not result.moves:
        return _card("Moves", "No shard passed from one worker to another.")
    pause = result.pause_ms
    handoffs = sum(move.is_handoff for move in result.moves)
    is_planned = any("pause" in verdict.promise for verdict in result.promises)
    body = (
        (
            f"{move.at_s:.2f}",
            str(move.shard),
            move.source,
            move.target,
            "handoff" if move.is_handoff else "claim",
            f"{move.pause_ms:.1f}",
            f"{move.leaderless_ms:.1f}",
            str(move.requests),
        )
        for move in result.moves[:MOVES_MAX]
    )
    head = ("at s", "shard", "from", "to", "how", "pause ms", "leaderless ms", "requests")
    return _card(
        "Pause per move",
        f"{len(result.moves)} moves, {handoffs} of them handoffs; {pause.count} were met by a request: p50 "
        f"{_ms(pause.p50)}, p99 {_ms(pause.p99)}, max {_ms(pause.max)}.",
        drawings.pauses(result, marks, PAUSE_MS if is_planned else None),
        '<ul class="legend"><li><i class="handoff"></i>handoff: one transaction, never without a leader</li>'
        '<li><i class="claim"></i>claim: after it was without a leader</li></ul>',
        '<p class="note">A pause is what a user felt: the longest latency of all requests of that shard that were '
        f"under way from {BEFORE_S * 1000:.0f} ms before the change until {AFTER_S * 1000:.0f} ms after the new leader "
        "was seen, or the time without a leader if that is longer. The request's ordinary latency is in it.</p>",
        _details(
            f"The first {MOVES_MAX} moves in figures" if len(result.moves) > MOVES_MAX else "All moves in figures",
            _table(head, body, numbers=(0, 1, 5, 6, 7)),
        ),
    )


def _failovers(result: Result) -> str:
    if not result.failover_ms:
        return ""
    found = result.failover
    is_quick = any(f"{FAILOVER_MS:g} ms" in verdict.promise for verdict in result.promises)
    return _card(
        "Failover",
        f"{found.count} shards lost their worker: served again after p50 {_ms(found.p50)}, p99 {_ms(found.p99)}, "
        f"max {_ms(found.max)}.",
        drawings.failovers(result, FAILOVER_MS if is_quick else None),
        '<p class="note">From the fault to the moment another worker leads the shard as the router sees it, or the '
        "longest wait of a request of that shard around that time, whichever is longer.</p>",
    )


def _verify(result: Result) -> str:
    if result.verify is None:
        logs = f"<p>Audit logs of the workers: {escape(result.verify_note)}.</p>"
    else:
        verify = result.verify
        css = "bad" if verify.violations else "good"
        logs = (
            f'<p><span class="badge {css}">{verify.violations} violations</span> by <code>shardlead verify</code> over '
            f"the workers' audit logs: {verify.leaderships:,} leaderships, {verify.requests:,} requests.</p>"
            + (f"<pre>{escape(verify.text)}</pre>" if verify.text else "")
        )
    seen = result.seen
    css = "bad" if seen.violations else "good"
    found = "".join(f"<pre>{escape(text)}</pre>" for text in seen.violations)
    return _card(
        "Never two leaders",
        "",
        logs,
        f'<p><span class="badge {css}">{len(seen.violations)} violations</span> in the answers themselves: '
        f"{seen.leaderships:,} leaderships answered. Two workers under one epoch, or an epoch that answers a request "
        f"which was sent after a newer one had answered, would be a violation.</p>{found}",
    )


def _failures(result: Result) -> str:
    if not result.failed:
        return ""
    rows = [(f"{count:,}", reason) for reason, count in result.failures.items()]
    examples = "\n".join(result.failure_examples[:EXAMPLES_MAX])
    return _card(
        "Failures",
        f"{result.failed:,} of {result.sent:,} requests.",
        _table(("count", "reason"), rows, numbers=(0,)),
        _details("Examples", f"<pre>{escape(examples)}</pre>"),
    )


def _surroundings(result: Result) -> str:
    generators = result.generators
    late = (
        f"{generators.processes} processes; a request left p50 {generators.lag_p50_ms:.2f} ms, p99 "
        f"{generators.lag_p99_ms:.2f} ms, at most {generators.lag_max_ms:.1f} ms after it was due, and cost "
        f"{generators.cpu_s / max(result.sent, 1) * 1e6:.0f} µs of CPU to send and judge"
    )
    settings = [(name, _words(value)) for name, value in result.settings.items()]
    machine = [(name, _words(value)) for name, value in result.machine.items()]
    return _card(
        "Machine, versions, settings",
        f"Load, routers, workers and store shared this machine. Generators: {late}.",
        f'<div class="two">{_table(("setting", ""), settings)}{_table(("machine", ""), machine)}</div>',
        f"<pre>{escape(result.command)}</pre>" if result.command else "",
    )


def _mark_list(marks: Numbered) -> str:
    items = "".join(
        f'<li><span class="k{"" if mark.is_fault else " is-event"}">{mark.number}</span>'
        f"{mark.at_s:.1f} s {escape(mark.text)}</li>"
        for mark in marks
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _card(name: str, lead: str, *parts: str) -> str:
    words = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(name)}</h2>{words}{''.join(parts)}</section>"


def _details(name: str, body: str) -> str:
    return f'<details><summary>{escape(name)}</summary><div class="scroll">{body}</div></details>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    css = [' class="n"' if index in numbers else "" for index in range(len(head))]
    top = "".join(f"<th{css[index]}>{escape(name)}</th>" for index, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td{css[index]}>{escape(value)}</td>' for index, value in enumerate(row))}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
