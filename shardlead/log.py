"""How log records are written: one line each, the facts after the message.

Law: modules log a short phrase and put facts in `extra`; this module alone decides how they look. `text` is for people
(`12:00:01.250 info  shardlead.worker  leadership begun  shard=7 epoch=1182`), `json` is for machines. Lines go to
stderr: stdout belongs to what a command answers. Nothing here is called at import.
"""

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

_OWN: Final = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
"""What every LogRecord has; the rest of a record's attributes came in `extra`."""

_QUOTED: Final = frozenset(' "=\n\r\t')


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """The `extra` of a record, in the order given."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


class TextFormatter(logging.Formatter):
    """One line for people. A value with spaces is quoted; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        facts = "".join(f" {name}={_plain(value)}" for name, value in facts_of(record).items())
        line = f"{at} {record.levelname.lower():<7} {record.name}  {record.getMessage()}"
        return _with_traceback(self, record, f"{line} {facts}" if facts else line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. The constant facts of the process (role, name) stand in each."""

    def __init__(self, **constants: str) -> None:
        super().__init__()
        self._constants = constants

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "t": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._constants,
            **facts_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configure(level: str, style: str, *, role: str = "", name: str = "", stream: TextIO | None = None) -> None:
    """Send all log records from `level` on to `stream` (stderr), as `style` ("text" or "json") says.

    Replaces what was configured before. aiohttp's access log stays off: a line a request is the router's metrics' job.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    constants = {key: value for key, value in (("role", role), ("name", name)) if value}
    handler.setFormatter(JsonFormatter(**constants) if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(max(root.level, logging.INFO))


def _plain(value: object) -> str:
    text = str(value)
    return repr(text) if not text or _QUOTED.intersection(text) else text


def _with_traceback(formatter: logging.Formatter, record: logging.LogRecord, line: str) -> str:
    if record.exc_info:
        line = f"{line}\n{formatter.formatException(record.exc_info)}"
    return line
