"""The options that commands share, and the settings that they make.

Law: a value from the command line goes through the same check as one from a file or the environment, so that a wrong
`--port` is named like a wrong `port =`. Of all flags --set is the strongest.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from shardlead.errors import CommandError, ConfigError, Problem

F = TypeVar("F", bound=Callable[..., Any])

FIELD_OF: Mapping[str, str] = {
    "--store": "store.endpoints",
    "--cluster": "cluster.name",
    "--admin-port": "admin.port",
    "--shards": "cluster.shards",
}


def settings_options(function: F) -> F:
    """--config, --set, --store, --cluster."""
    for option in reversed(
        (
            click.option(
                "--config",
                "config",
                multiple=True,
                metavar="FILE",
                type=click.Path(path_type=Path),
                help="TOML file with settings; may be repeated, later ones are stronger.",
            ),
            click.option(
                "--set",
                "set_",
                multiple=True,
                metavar="SECTION.FIELD=VALUE",
                help="One setting; may be repeated. Stronger than all else.",
            ),
            click.option("--store", metavar="URL[,URL]", help="etcd's client URLs (store.endpoints)."),
            click.option("--cluster", metavar="NAME", help="The cluster's name in that store (cluster.name)."),
        )
    ):
        function = option(function)
    return function


def look_options(function: F) -> F:
    """What every command has that talks to a running cluster."""
    return click.option(
        "--dev",
        metavar="PORT",
        type=int,
        help="The `shardlead dev` whose router has this port; without it the newest, if no store is named.",
    )(settings_options(function))


def load_settings(
    config: tuple[Path, ...],
    set_: tuple[str, ...],
    store: str | None,
    cluster: str | None,
    **named: tuple[str, object] | None,
) -> Any:
    """The settings (`loading.Loaded`) that files, environment and these flags make. `named` holds (field, value) for
    further flags, by the flag's name without dashes. Raises ConfigError with all problems."""
    from shardlead.loading import Flag, load, parse_assignment

    flags = [
        Flag(flag, FIELD_OF[flag], value)
        for flag, value in (("--store", store), ("--cluster", cluster))
        if value is not None
    ]
    flags += [
        Flag(f"--{name.replace('_', '-')}", *pair)
        for name, pair in named.items()
        if pair is not None and pair[1] is not None
    ]
    problems: list[Problem] = []
    for text in set_:
        try:
            flags.append(parse_assignment(text))
        except ConfigError as exc:
            problems += exc.problems
    try:
        loaded = load(config, os.environ, flags)
    except ConfigError as exc:
        raise ConfigError([*exc.problems, *problems]) from None
    if problems:
        raise ConfigError(problems)
    return loaded


def find_cluster(
    dev: int | None, config: tuple[Path, ...], set_: tuple[str, ...], store: str | None, cluster: str | None
) -> Any:
    """The settings by which a command reaches its cluster: a store that was named anywhere, else the `shardlead dev`
    that runs on this machine, else the default store. Raises ConfigError, CommandError."""
    from shardlead import devfile

    loaded = load_settings(config, set_, store, cluster)
    if dev is None and "store.endpoints" in loaded.explicit:
        return loaded
    running = devfile.alive()
    if dev is not None:
        chosen = next((each for each in running if each.port == dev), None)
        if chosen is None:
            ports = ", ".join(str(each.port) for each in running)
            raise CommandError(
                f"no `shardlead dev` with its router on port {dev} is running"
                + (f"; there is one on {ports}" if running else "")
            )
    elif not running:
        return loaded
    else:
        chosen = running[0]
        if len(running) > 1:
            others = ", ".join(str(each.port) for each in running[1:])
            click.echo(
                f"several `shardlead dev` are running: taking the newest, on port {chosen.port} "
                f"(--dev PORT picks another: {others})",
                err=True,
            )
    return load_settings(config, set_, chosen.store, cluster or chosen.cluster)
