"""A second reader of HTTP/1.1, written apart from the router's: strict, small, and with nothing in common with it.

Law: RFC 9112 by the letter, and of what it leaves open only the one reading that nobody disputes. Bytes in, messages
out; whatever is not exactly a message raises `NotHttp`. It looks at one byte stream from its begin, as the next hop
does, so that two messages in what the router wrote as one, or one in two, come to light.
"""

from dataclasses import dataclass, field
from typing import Final

TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
HEX: Final = frozenset(b"0123456789abcdefABCDEF")
BODILESS: Final = frozenset({204, 304})
NEVER_TRAILERS: Final = frozenset({b"content-length", b"transfer-encoding", b"host", b"connection", b"expect", b"te"})
ONCE: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade"})


class NotHttp(ValueError):
    """The bytes are no HTTP/1.1 that can be read in one way only."""


@dataclass
class Message:
    """One request or answer. `start` is the three parts of its first line."""

    start: tuple[bytes, bytes, bytes]
    fields: list[tuple[bytes, bytes]]  # names in lower case
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_chunked: bool = False
    ends_with_connection: bool = False

    def values(self, name: bytes) -> list[bytes]:
        return [value for each, value in self.fields if each == name]


def read_requests(data: bytes) -> list[Message]:
    """All requests in what a connection brought, which must end with the last of them."""
    found = []
    while data:
        message, data = _read_head(data, is_request=True)
        data = _read_body(message, data)
        found.append(message)
    return found


def read_answers(data: bytes, *, methods: tuple[bytes, ...]) -> list[Message]:
    """All answers, interim ones included, to requests with these methods, in order."""
    found: list[Message] = []
    waiting = list(methods)
    while data:
        message, data = _read_head(data, is_request=False)
        status = int(message.start[1])
        found.append(message)
        if 100 <= status < 200:
            if message.values(b"content-length") or message.values(b"transfer-encoding"):
                raise NotHttp("an interim answer with a framing")
            continue
        if not waiting:
            raise NotHttp("an answer that nobody asked for")
        method = waiting.pop(0)
        if method == b"HEAD" or status in BODILESS:
            if status == 204 and (message.values(b"content-length") or message.values(b"transfer-encoding")):
                raise NotHttp("204 with a framing")
            continue
        if not message.values(b"content-length") and not message.values(b"transfer-encoding"):
            if message.values(b"connection") != [b"close"]:
                raise NotHttp("an answer without an end that does not say close")
            message.ends_with_connection = True
            message.body, data = data, b""
            continue
        data = _read_body(message, data)
    return found


def _line(data: bytes) -> tuple[bytes, bytes]:
    at = data.find(b"\r\n")
    if at < 0:
        raise NotHttp(f"a line without its end: {data[:80]!r}")
    line = data[:at]
    for byte in line:
        if byte in (0x00, 0x0A, 0x0D):
            raise NotHttp(f"CR, LF or NUL within a line: {line!r}")
    return line, data[at + 2 :]


def _read_head(data: bytes, *, is_request: bool) -> tuple[Message, bytes]:
    line, data = _line(data)
    parts = line.split(b" ", 2)
    if len(parts) != 3:
        raise NotHttp(f"not a first line: {line!r}")
    one, two, three = parts
    if is_request:
        if three != b"HTTP/1.1" or not one or set(one) - TOKEN:
            raise NotHttp(f"not a request line: {line!r}")
        if not (two.startswith(b"/") or (two == b"*" and one == b"OPTIONS")):
            raise NotHttp(f"not in origin form: {line!r}")
        if any(not 0x21 <= byte <= 0x7E for byte in two) or b"#" in two:
            raise NotHttp(f"not a target: {two!r}")
    elif one != b"HTTP/1.1" or len(two) != 3 or not two.isdigit() or two < b"100":
        raise NotHttp(f"not a status line: {line!r}")
    elif any((byte < 0x20 and byte != 9) or byte == 0x7F for byte in three):
        raise NotHttp(f"a control character in a reason: {line!r}")
    fields, data = _read_fields(data)
    message = Message((one, two, three), fields)
    for name in ONCE:
        if len(message.values(name)) > 1:
            raise NotHttp(f"{name!r} twice")
    if is_request and len(message.values(b"host")) != 1:
        raise NotHttp("not exactly one Host")
    return message, data


def _read_fields(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    fields: list[tuple[bytes, bytes]] = []
    while True:
        line, data = _line(data)
        if not line:
            return fields, data
        name, colon, value = line.partition(b":")
        if not colon or not name or set(name) - TOKEN:
            raise NotHttp(f"not a field: {line!r}")
        if any((byte < 0x20 and byte != 9) or byte == 0x7F for byte in value):
            raise NotHttp(f"a control character in a value: {line!r}")
        fields.append((name.lower(), value.strip(b" \t")))


def _read_body(message: Message, data: bytes) -> bytes:
    """Take its body off; what is left."""
    lengths, codings = message.values(b"content-length"), message.values(b"transfer-encoding")
    if lengths and codings:
        raise NotHttp("two framings")
    if codings:
        if codings != [b"chunked"]:
            raise NotHttp(f"a transfer coding {codings!r}")
        message.is_chunked = True
        return _read_chunks(message, data)
    if lengths:
        if not lengths[0].isdigit() or not lengths[0].isascii() or len(lengths[0]) > 19:
            raise NotHttp(f"a length of {lengths[0]!r}")
        size = int(lengths[0])
        if len(data) < size:
            raise NotHttp(f"a body of {len(data)} bytes that should have {size}")
        message.body = data[:size]
        return data[size:]
    return data


def _read_chunks(message: Message, data: bytes) -> bytes:
    while True:
        line, data = _line(data)
        if not line or set(line) - HEX or len(line) > 16:
            raise NotHttp(f"not a chunk size: {line!r}")
        size = int(line, 16)
        if not size:
            message.trailers, data = _read_fields(data)
            for name, _ in message.trailers:
                if name in NEVER_TRAILERS or name.startswith(b"shardlead-"):
                    raise NotHttp(f"{name!r} as a trailer")
            return data
        if len(data) < size + 2 or data[size : size + 2] != b"\r\n":
            raise NotHttp("a chunk that does not end where it should")
        message.body += data[:size]
        data = data[size + 2 :]
