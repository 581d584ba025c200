"""What the reading commands print: rows for JSON, aligned columns for people. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import orjson

from shardlead.cli.snapshot import Look


def print_json(value: object) -> None:
    """To stdout, indented."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Aligned columns; numbers to the right. None shows as -."""
    cells = [["-" if cell is None or cell == "" else str(cell) for cell in row] for row in rows]
    columns = [[row[at] for row in cells] for at in range(len(heads))]
    is_number = [
        any(map(str.isdigit, each)) and all(cell.isdigit() or cell == "-" for cell in each) for each in columns
    ]
    widths = [max([len(head), *(len(row[at]) for row in cells)]) for at, head in enumerate(heads)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line([head.upper() for head in heads]), *map(line, cells)]


# --- shards ------------------------------------------------------------------------------------------------------


def shard_rows(look: Look) -> list[dict[str, Any]]:
    """One row a shard: {shard, leader, epoch, address, assigned, successors}; null where there is none."""
    rows = []
    for shard in range(look.shards):
        leader = look.map.leader(shard)
        order = look.orders.get(shard, ())
        rows.append(
            {
                "shard": shard,
                "leader": None if leader is None else leader.worker,
                "epoch": None if leader is None else leader.epoch,
                "address": None if leader is None else leader.address or None,
                "assigned": order[0] if order else None,
                "successors": list(order[1:]),
            }
        )
    return rows


def shard_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people; an assignment that is not yet fact is marked."""
    heads = ("shard", "leader", "epoch", "address", "assigned", "successors")
    return table(
        heads,
        (
            (
                row["shard"],
                row["leader"],
                row["epoch"],
                row["address"],
                row["assigned"] if row["assigned"] in (row["leader"], None) else f"{row['assigned']} (to come)",
                " ".join(row["successors"]),
            )
            for row in rows
        ),
    )


# --- workers -----------------------------------------------------------------------------------------------------


def worker_rows(look: Look) -> list[dict[str, Any]]:
    """One row a living worker, by name: {name, sid, pid, address, state, shards}; `shards` counts what it leads."""
    return [
        {
            "name": name,
            "sid": member.record.sid,
            "pid": member.record.pid,
            "address": member.record.address,
            "state": member.record.state,
            "shards": look.map.led.get(name, 0),
        }
        for name, member in sorted(look.map.workers.items())
    ]


def worker_lines(look: Look, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people, with operators' wishes and who is the controller."""

    def notes(name: str) -> str:
        said = (
            ("controller", look.fleet.seat_worker == name),
            ("cordoned", name in look.fleet.cordoned),
            ("to be drained", name in look.fleet.drained),
        )
        return ", ".join(word for word, is_so in said if is_so)

    heads = ("name", "state", "shards", "address", "pid", "session", "notes")
    return table(
        heads,
        (
            (row["name"], row["state"], row["shards"], row["address"], row["pid"], row["sid"], notes(row["name"]))
            for row in rows
        ),
    )


def known_workers(look: Look) -> set[str]:
    """Living workers and those that are still assigned to something."""
    return {*look.map.workers, *look.map.led, *(name for order in look.orders.values() for name in order)}


# --- status ------------------------------------------------------------------------------------------------------


def status_page(look: Look) -> dict[str, Any]:
    """The cluster as a whole."""
    assert look.map.meta is not None, "read_look refuses a cluster without meta"
    counts = [look.map.led.get(name, 0) for name in look.map.workers]
    led = sum(look.map.led.values())
    return {
        "cluster": look.cluster,
        "store": list(look.endpoints),
        "revision": look.map.revision,
        "generation": look.map.meta.generation,
        "shards": look.shards,
        "led": led,
        "leaderless": look.shards - led,
        "moving": sum(1 for row in shard_rows(look) if row["assigned"] not in (row["leader"], None)),
        "workers": len(look.map.workers),
        "draining": sorted(name for name, item in look.map.workers.items() if item.record.state == "draining"),
        "spread": max(counts) - min(counts) if counts else 0,
        "controller": look.fleet.seat_worker or None,
        "is_frozen": look.fleet.is_frozen,
        "frozen_why": look.fleet.frozen_why or None,
        "cordoned": sorted(look.fleet.cordoned),
        "drained": sorted(look.fleet.drained),
        "pins": {str(shard): worker for shard, worker in sorted(look.fleet.pins.items())},
        "unreadable": look.unreadable,
        "fault": look.map.fault or None,
    }


def status_lines(look: Look) -> list[str]:
    """The same for people; only what is to be told."""
    page = status_page(look)
    counts = sorted(look.map.led.get(name, 0) for name in look.map.workers)
    each = (
        ""
        if not counts
        else f", {counts[0]} each"
        if counts[0] == counts[-1]
        else f", {counts[0]} to {counts[-1]} each"
    )
    why = f"{page['frozen_why']}: " if page["frozen_why"] else ""
    pins = ", ".join(f"{shard} to {worker}" for shard, worker in page["pins"].items())
    lines = [
        ("cluster", f"{look.cluster} at {', '.join(look.endpoints)}, revision {page['revision']}"),
        (
            "shards",
            f"{look.shards}: {page['led']} led"
            + _told(page["leaderless"], "without a leader")
            + _told(page["moving"], "about to move"),
        ),
        ("workers", f"{page['workers']} alive{each}"),
        ("controller", page["controller"] or "none"),
        ("generation", page["generation"] or ""),
        ("stopping", ", ".join(page["draining"])),
        ("frozen", f"{why}no moves for evenness (`shardlead unfreeze`)" if page["is_frozen"] else ""),
        ("cordoned", ", ".join(page["cordoned"])),
        ("drained", ", ".join(page["drained"])),
        ("pinned", pins),
        ("unreadable", f"{look.unreadable} records under the prefix are not ours" if look.unreadable else ""),
        ("fault", page["fault"] or ""),
    ]
    return [f"{name:<11} {text}" for name, text in lines if text]


def _told(number: int, what: str) -> str:
    return f", {number} {what}" if number else ""
