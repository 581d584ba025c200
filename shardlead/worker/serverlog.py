"""What aiohttp's server logs of its own accord: its failures in full, a peer's bytes that are no HTTP in one line.

Law: a traceback tells of a fault of ours or of the application's; whoever connects and talks nonsense cannot write one
into the log.
"""

import logging
from typing import Any

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError


class ServerLog(logging.LoggerAdapter[logging.Logger]):
    """The logger for `web.Server(logger=...)`."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        """As a logger's, but for what the peer did wrong."""
        if isinstance(exc_info, HttpProcessingError | RequestPayloadError):  # its head; what was left of its body
            text = exc_info.message if isinstance(exc_info, HttpProcessingError) else str(exc_info)
            reason = " ".join(text.split())[:200]
            self.logger.info("a request could not be read", extra={"peer": args[0] if args else "", "reason": reason})
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)
