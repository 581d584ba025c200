"""`status`, `shards`, `workers`: what a cluster is doing, read once, for people and (--json) for programs."""

from typing import Any

import click

from shardlead.cli.options import look_options

json_option = click.option("--json", "is_json", is_flag=True, help="Print JSON.")


@click.command()
@look_options
@json_option
def status(is_json: bool, **target: Any) -> None:
    """Show the cluster as a whole.

    Leaders, workers, controller, operators' wishes.
    """
    from shardlead.cli import pages, snapshot

    look = snapshot.look(**target)
    if is_json:
        pages.print_json(pages.status_page(look))
    else:
        click.echo("\n".join(pages.status_lines(look)))


@click.command()
@look_options
@json_option
@click.option("--worker", metavar="WORKER", help="Only the shards that this worker leads or is to lead.")
def shards(is_json: bool, worker: str | None, **target: Any) -> None:
    """List shards and their leaders.

    Who leads each under which epoch, who is assigned, who would follow.
    """
    from shardlead.cli import pages, snapshot

    look = snapshot.look(**target)
    if worker is not None and worker not in pages.known_workers(look):
        snapshot.require_worker(look, worker)
    rows = pages.shard_rows(look)
    if worker is not None:
        rows = [row for row in rows if worker in (row["leader"], row["assigned"])]
    if is_json:
        pages.print_json(rows)
    else:
        click.echo("\n".join(pages.shard_lines(rows)))


@click.command()
@look_options
@json_option
def workers(is_json: bool, **target: Any) -> None:
    """List the living workers.

    Session, process, address, state, how many shards they lead.
    """
    from shardlead.cli import pages, snapshot

    look = snapshot.look(**target)
    rows = pages.worker_rows(look)
    if is_json:
        pages.print_json(rows)
    else:
        click.echo("\n".join(pages.worker_lines(look, rows)))


COMMANDS = (status, shards, workers)
