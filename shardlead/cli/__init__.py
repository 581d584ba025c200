"""The command line: parse, load the settings, wire the parts together, run.

Law: nothing heavy is imported before a command needs it (`shardlead --help` answers at once). What the user can have
done wrong is said in one line on stderr and never as a traceback: exit code 2 for usage and settings, 1 for what
failed, 130 after Ctrl-C. stdout carries only what a command answers.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from shardlead.cli import looking, operating, roles, verifying
from shardlead.errors import ConfigError, ShardleadError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _InOrder(click.Group):
    """Lists the commands as a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def shardlead() -> None:
    """One leader per shard, chosen by lease; requests go to it by key; storage refuses leaders of old.

    Try it: `shardlead dev`. Settings come from --config files, then SHARDLEAD_<SECTION>_<FIELD> in the environment,
    then flags, each stronger than the one before.
    """


@click.command()
def version() -> None:
    """Print the version."""
    from shardlead.cli.version import version_of

    click.echo(f"shardlead {version_of()}")


for _command in (*roles.COMMANDS, *looking.COMMANDS, *operating.COMMANDS, *verifying.COMMANDS, version):
    shardlead.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        code = shardlead.main(args=words, prog_name="shardlead", standalone_mode=False, obj=words)
        sys.stdout.flush()
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `shardlead shards | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as exc:
        return _failed(exc)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Say what failed, in as few words as it takes; the exit code."""
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, ShardleadError)]
    if os.environ.get("SHARDLEAD_DEBUG"):
        traceback.print_exception(error)
    for leaf in ours:
        if isinstance(leaf, ConfigError):
            click.echo("error: these settings cannot be used:", err=True)
            for problem in leaf.problems:
                click.echo(f"  {problem}", err=True)
            return EXIT_USAGE
    if ours:
        click.echo("\n".join(f"error: {leaf}" for leaf in ours), err=True)
    for other in [] if ours else leaves:
        text = " ".join(str(other).split()) or "no more is known"
        click.echo(f"error: {type(other).__name__}: {text} (SHARDLEAD_DEBUG=1 shows where)", err=True)
    return EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside groups, each text once."""
    if isinstance(error, BaseExceptionGroup):
        seen: set[str] = set()
        for inner in error.exceptions:
            for leaf in _leaves(inner):
                if str(leaf) not in seen:
                    seen.add(str(leaf))
                    yield leaf
    else:
        yield error
