"""`init`, `move`, `drain`, `cordon`, `freeze`, `pin`, `generation raise`: what operators ask for.

Each only parses and prints; `wishes` writes.
"""

from typing import Any

import click

from shardlead.cli.options import look_options, settings_options

wait_option = click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    help="How long to watch it happen; 0: do not wait.",
)


@click.command()
@settings_options
@click.option("--shards", metavar="N", help="How many shards the cluster gets (cluster.shards).")
def init(config: Any, set_: Any, store: Any, cluster: Any, shards: str | None) -> None:
    """Create the cluster in the store.

    If it exists, say so; if it exists with another shape than named here, refuse. The first worker does it, too.
    """
    from shardlead.cli import wishes
    from shardlead.cli.options import load_settings

    loaded = load_settings(config, set_, store, cluster, shards=("cluster.shards", shards))
    click.echo(wishes.init(loaded))


@click.command()
@look_options
@click.argument("shard", type=int)
@click.argument("worker")
@wait_option
def move(shard: int, worker: str, wait_s: float, **target: Any) -> None:
    """Let WORKER lead SHARD, for now.

    It is passed by a handoff, without a failed request. The order ends by itself after ten minutes; afterwards
    evenness decides again. For good: `shardlead pin`.
    """
    from shardlead.cli import wishes

    click.echo(wishes.move(target, shard, worker, wait_s))


@click.command()
@look_options
@click.argument("shard", type=int)
@click.argument("worker")
@wait_option
def pin(shard: int, worker: str, wait_s: float, **target: Any) -> None:
    """Let WORKER lead SHARD for good.

    Whenever it is alive, until `unpin`.
    """
    from shardlead.cli import wishes

    click.echo(wishes.move(target, shard, worker, wait_s, is_for_good=True))


@click.command()
@look_options
@click.argument("shard", type=int)
def unpin(shard: int, **target: Any) -> None:
    """Take back a `pin` or `move` of SHARD."""
    from shardlead.cli import wishes

    click.echo(wishes.unpin(target, shard))


@click.command()
@look_options
@click.argument("worker")
@click.option("--undo", is_flag=True, help="Take the wish back: WORKER may lead again.")
@wait_option
def drain(worker: str, undo: bool, wait_s: float, **target: Any) -> None:
    """Empty WORKER, and keep it empty.

    Its shards are handed to others and it gets no new ones, until `drain --undo`. The wish stands by the worker's
    name, also when it is restarted.
    """
    from shardlead.cli import wishes

    click.echo(wishes.drain(target, worker, wait_s, is_undone=undo))


@click.command()
@look_options
@click.argument("worker")
def cordon(worker: str, **target: Any) -> None:
    """Give WORKER no new shards.

    What it leads stays with it, until `uncordon`.
    """
    from shardlead.cli import wishes

    click.echo(wishes.cordon(target, worker))


@click.command()
@look_options
@click.argument("worker")
def uncordon(worker: str, **target: Any) -> None:
    """Take back `cordon`."""
    from shardlead.cli import wishes

    click.echo(wishes.cordon(target, worker, is_undone=True))


@click.command()
@look_options
@click.option("--reason", default="", metavar="TEXT", help="What for; `status` shows it.")
def freeze(reason: str, **target: Any) -> None:
    """No moves for evenness for now.

    Until `unfreeze`. Failover, stops, drains and pins go on.
    """
    from shardlead.cli import wishes

    click.echo(wishes.freeze(target, reason))


@click.command()
@look_options
def unfreeze(**target: Any) -> None:
    """Take back `freeze`."""
    from shardlead.cli import wishes

    click.echo(wishes.freeze(target, "", is_undone=True))


@click.group()
def generation() -> None:
    """The operator's number inside every epoch."""


@generation.command("raise")
@look_options
def raise_(**target: Any) -> None:
    """Lift every epoch above all that was registered.

    A step of restoring the store from a backup, with all workers stopped.
    """
    from shardlead.cli import wishes

    click.echo(wishes.raise_generation(target))


COMMANDS = (init, move, pin, unpin, drain, cordon, uncordon, freeze, unfreeze, generation)
