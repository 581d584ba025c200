"""`verify`: what the workers' audit logs prove."""

from typing import Any

import click

from shardlead.cli.looking import json_option

EXIT_VIOLATED, EXIT_UNUSABLE = 1, 2


@click.command()
@click.argument("logs", metavar="LOG...", nargs=-1, required=True)
@json_option
def verify(logs: tuple[str, ...], is_json: bool) -> int:
    """Check that no shard had two leaders.

    LOG is an audit log that a worker wrote (`shardlead dev --audit DIR`, `worker.audit_dir`), or a folder of them; all
    of one cluster. Exit code 0: nothing contradicts it; 1: the lines that do are printed; 2: there is no such log, or
    it is damaged elsewhere than at its end.
    """
    from shardlead import audit
    from shardlead.cli import pages
    from shardlead.errors import AuditError

    try:
        report = audit.verify(*logs)
    except AuditError as exc:
        click.echo(f"error: {exc}", err=True)
        return EXIT_UNUSABLE
    if is_json:
        pages.print_json(_page(report))
    else:
        click.echo(str(report))
        if report.torn:
            click.echo(f"last lines torn by a crash, passed over: {report.torn}", err=True)
    return 0 if report.is_good else EXIT_VIOLATED


def _page(report: Any) -> dict[str, object]:
    return {
        "leaderships": report.leaderships,
        "requests": report.requests,
        "refused": report.refused,
        "violation_count": report.violation_count,
        "violations": [
            {
                "kind": violation.kind,
                "text": violation.text,
                "lines": [{"file": line.file, "line": line.line, "text": line.text} for line in violation.lines],
            }
            for violation in report.violations
        ],
        "files": report.files,
        "lines": report.lines,
        "torn": report.torn,
    }


COMMANDS = (verify,)
