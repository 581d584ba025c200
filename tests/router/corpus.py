"""Messages that could be read in two ways, and what must come of each: refused and closed, or one reading.

Law: a table and nothing else. Every request is for the shard of key "a"; a request before it and one behind it on the
same connection are added by whoever plays it, and the one behind must never be seen if the message was refused.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Refused:
    """One answer with one of these statuses, `Connection: close`, and the end."""

    statuses: tuple[int, ...] = (400,)


@dataclass(frozen=True)
class Declined:
    """One answer with this status; the framing was good, so the connection stays."""

    status: int = 400


@dataclass(frozen=True)
class Read:
    """The worker gets exactly this. `is_last`: no request behind it is read."""

    method: bytes = b"POST"
    target: bytes = b"/p"
    host: bytes = b"a"
    body: bytes = b"abc"
    trailers: tuple[tuple[bytes, bytes], ...] = ()
    has: tuple[tuple[bytes, bytes], ...] = ()
    lacks: tuple[bytes, ...] = ()
    is_last: bool = False


@dataclass(frozen=True)
class Unfinished:
    """The client has gone before its request was whole: no answer, and nothing whole for the worker."""


@dataclass(frozen=True)
class Either:
    """It depends on how the packets fall."""

    one: Refused
    other: Read


Verdict = Refused | Declined | Read | Unfinished | Either

NO: Final = Refused()
ODD: Final = Refused((501,))
H: Final = b"Host: a\r\nX-Shard-Key: a\r\n"


def post(fields: bytes, body: bytes = b"abc", line: bytes = b"POST /p HTTP/1.1") -> bytes:
    return line + b"\r\n" + H + fields + b"\r\n" + body


def get(line: bytes = b"GET /p HTTP/1.1", fields: bytes = b"") -> bytes:
    return line + b"\r\n" + H + fields + b"\r\n"


def length(value: bytes) -> bytes:
    return post(b"Content-Length:" + value + b"\r\n")


def coding(value: bytes) -> bytes:
    return post(b"Transfer-Encoding:" + value + b"\r\n", b"3\r\nabc\r\n0\r\n\r\n")


def chunks(text: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", text)


def trailer(line: bytes) -> bytes:
    return chunks(b"3\r\nabc\r\n0\r\n" + line + b"\r\n\r\n")


CL: Final = b"Content-Length: 3\r\n"
TE: Final = b"Transfer-Encoding: chunked\r\n"
CHUNKS: Final = b"3\r\nabc\r\n0\r\n\r\n"
GET: Final = Read(b"GET", body=b"")
ABC: Final = Read()

LENGTHS: Final[dict[str, tuple[bytes, Verdict]]] = {
    "length": (length(b" 3"), ABC),
    "length without space": (length(b"3"), ABC),
    "length behind tab": (length(b"\t3"), ABC),
    "length before spaces": (length(b" 3  "), ABC),
    "length with zeros": (length(b" 0003"), ABC),
    "length with very many zeros": (length(b" " + b"0" * 40 + b"3"), NO),
    "length twice, same": (post(CL + CL), NO),
    "length twice, other": (post(CL + b"Content-Length: 4\r\n"), NO),
    "length twice, other spelling": (post(CL + b"content-length: 3\r\n"), NO),
    "length thrice": (post(CL * 3), NO),
    "length list": (length(b" 3, 3"), NO),
    "length list, other": (length(b" 3,4"), NO),
    "length two numbers": (length(b" 3 3"), NO),
    "length plus": (length(b" +3"), NO),
    "length minus": (length(b" -3"), NO),
    "length empty": (length(b""), NO),
    "length spaces": (length(b"   "), NO),
    "length hex": (length(b" 0x3"), NO),
    "length decimal": (length(b" 3.0"), NO),
    "length exponent": (length(b" 1e1"), NO),
    "length quoted": (length(b' "3"'), NO),
    "length with parameter": (length(b" 3;a"), NO),
    "length underscored": (length(b" 3_0"), NO),
    "length behind VT": (length(b" \x0b3"), NO),
    "length before FF": (length(b" 3\x0c"), NO),
    "length before NUL": (length(b" 3\0"), NO),
    "length in Arabic digits": (length(b" \xd9\xa3"), NO),
    "length in superscript": (length(b" \xb3"), NO),
    "length of 2**64": (length(b" 18446744073709551616"), NO),
    "length of 2**64 + 3": (length(b" 18446744073709551619"), NO),
    "length of 2**63": (length(b" 9223372036854775808"), Refused((413,))),
    "length huge": (length(b" " + b"9" * 5_000), NO),
    "length name before space": (post(b"Content-Length : 3\r\n"), NO),
    "length name before tab": (post(b"Content-Length\t: 3\r\n"), NO),
    "length name behind space": (post(b" Content-Length: 3\r\n"), NO),
    "length name with NUL": (post(b"Content-Length\0: 3\r\n"), NO),
    "length without colon": (post(b"Content-Length 3\r\n"), NO),
    "length folded": (post(b"Content-Length:\r\n 3\r\n"), NO),
    "length with underscore": (post(b"Content_Length: 9\r\n", b""), Read(body=b"", lacks=(b"content_length",))),
    "length and its underscored twin": (post(CL + b"Content_Length: 9\r\n"), Read(lacks=(b"content_length",))),
    "length of another name": (post(CL + b"X-Content-Length: 9\r\n"), Read(has=((b"x-content-length", b"9"),))),
    "length zero": (post(b"Content-Length: 0\r\n", b""), Read(body=b"")),
    "length named by Connection": (post(CL + b"Connection: Content-Length\r\n"), ABC),
    "length of a GET": (b"GET /p HTTP/1.1\r\n" + H + CL + b"\r\nabc", Read(b"GET")),
    "length of a HEAD": (b"HEAD /p HTTP/1.1\r\n" + H + CL + b"\r\nabc", Read(b"HEAD")),
    "length of a TRACE": (b"TRACE /p HTTP/1.1\r\n" + H + CL + b"\r\nabc", Read(b"TRACE")),
    "no length": (post(b"", b""), Read(body=b"")),
    "length in HTTP/1.0": (post(CL, line=b"POST /p HTTP/1.0"), Read(is_last=True)),
}

CODINGS: Final[dict[str, tuple[bytes, Verdict]]] = {
    "coding": (coding(b" chunked"), ABC),
    "coding without space": (coding(b"chunked"), ABC),
    "coding upper": (coding(b" CHUNKED"), ABC),
    "coding mixed": (coding(b" cHuNkEd"), ABC),
    "coding before spaces": (coding(b" chunked  "), ABC),
    "coding between tabs": (coding(b"\tchunked\t"), NO),  # good, but the parser is stricter
    "coding twice in one": (coding(b" chunked, chunked"), Refused((400, 501))),
    "coding twice, no space": (coding(b" chunked,chunked"), Refused((400, 501))),
    "coding behind a comma": (coding(b" ,chunked"), Refused((400, 501))),
    "coding before a comma": (coding(b" chunked,"), Refused((400, 501))),
    "coding x": (coding(b" xchunked"), Refused((400, 501))),
    "coding x behind": (coding(b" chunkedx"), Refused((400, 501))),
    "coding behind VT": (coding(b" \x0bchunked"), NO),
    "coding behind FF": (coding(b" \x0cchunked"), NO),
    "coding before VT": (coding(b" chunked\x0b"), NO),
    "coding before NUL": (coding(b" chunked\0"), NO),
    "coding behind NBSP": (coding(b" \xa0chunked"), Refused((400, 501))),
    "coding before NBSP": (coding(b" chunked\xa0"), Refused((400, 501))),
    "coding identity": (coding(b" identity"), Refused((400, 501))),
    "coding identity, chunked": (coding(b" identity, chunked"), Refused((400, 501))),
    "coding chunked, identity": (coding(b" chunked, identity"), Refused((400, 501))),
    "coding gzip, chunked": (coding(b" gzip, chunked"), ODD),
    "coding chunked, gzip": (coding(b" chunked, gzip"), Refused((400, 501))),
    "coding deflate": (coding(b" deflate"), Refused((400, 501))),
    "coding with parameter": (coding(b" chunked;q=1"), Refused((400, 501))),
    "coding quoted": (coding(b' "chunked"'), Refused((400, 501))),
    "coding single quoted": (coding(b" 'chunked'"), Refused((400, 501))),
    "coding empty": (coding(b""), Refused((400, 501))),
    "coding folded": (coding(b" chunked\r\n "), NO),
    "coding folded before": (coding(b"\r\n chunked"), NO),
    "coding folded, tab": (coding(b"\r\n\tchunked"), NO),
    "codings chunked and chunked": (post(TE + TE, CHUNKS), Refused((400, 501))),
    "codings chunked and identity": (post(TE + b"Transfer-Encoding: identity\r\n", CHUNKS), Refused((400, 501))),
    "codings gzip and chunked": (post(b"Transfer-Encoding: gzip\r\n" + TE, CHUNKS), Refused((400, 501))),
    "codings empty and chunked": (post(b"Transfer-Encoding:\r\n" + TE, CHUNKS), Refused((400, 501))),
    "coding and length": (post(TE + CL, CHUNKS), NO),
    "length and coding": (post(CL + TE, CHUNKS), NO),
    "coding and length zero": (post(TE + b"Content-Length: 0\r\n", CHUNKS), NO),
    "coding and its true length": (post(TE + b"Content-Length: 13\r\n", CHUNKS), NO),
    "coding in HTTP/1.0": (post(TE, CHUNKS, b"POST /p HTTP/1.0"), NO),
    "coding and length in HTTP/1.0": (post(TE + CL, CHUNKS, b"POST /p HTTP/1.0"), NO),
    "coding name before space": (post(b"Transfer-Encoding : chunked\r\n", CHUNKS), NO),
    "coding name before tab": (post(b"Transfer-Encoding\t: chunked\r\n", CHUNKS), NO),
    "coding name with space": (post(b"Transfer Encoding: chunked\r\n", CHUNKS), NO),
    "coding name with semicolon": (post(b"Transfer-Encoding;: chunked\r\n", CHUNKS), NO),
    "coding name behind VT": (post(b"\x0bTransfer-Encoding: chunked\r\n", CHUNKS), NO),
    "coding with underscore": (
        post(b"Transfer_Encoding: chunked\r\n" + CL),
        Read(lacks=(b"transfer_encoding",)),
    ),
    "coding behind a bare CR": (post(b"X: a\rTransfer-Encoding: chunked\r\n" + CL), NO),
    "coding behind a bare LF": (post(b"X: a\nTransfer-Encoding: chunked\r\n" + CL), NO),
    "coding named by Connection": (post(TE + b"Connection: Transfer-Encoding\r\n", CHUNKS), ABC),
    "coding of a GET": (b"GET /p HTTP/1.1\r\n" + H + TE + b"\r\n" + CHUNKS, Read(b"GET")),
    "coding of a HEAD": (b"HEAD /p HTTP/1.1\r\n" + H + TE + b"\r\n" + CHUNKS, Read(b"HEAD")),
}

CHUNKED: Final[dict[str, tuple[bytes, Verdict]]] = {
    "chunks": (chunks(b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"), ABC),
    "chunk size with zero": (chunks(b"03\r\nabc\r\n0\r\n\r\n"), ABC),
    "chunk size upper": (chunks(b"A\r\n0123456789\r\n0\r\n\r\n"), Read(body=b"0123456789")),
    "chunk size lower": (chunks(b"a\r\n0123456789\r\n0\r\n\r\n"), Read(body=b"0123456789")),
    "chunks none": (chunks(b"0\r\n\r\n"), Read(body=b"")),
    "last chunk of zeros": (chunks(b"3\r\nabc\r\n000\r\n\r\n"), ABC),
    "chunk size not hex": (chunks(b"x\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size g": (chunks(b"3g\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size 0x": (chunks(b"0x3\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size plus": (chunks(b"+3\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size minus": (chunks(b"-3\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size underscored": (chunks(b"0_3\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size comma": (chunks(b"3,\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size behind space": (chunks(b" 3\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size before space": (chunks(b"3 \r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size before tab": (chunks(b"3\t\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size before NUL": (chunks(b"3\0\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size before VT": (chunks(b"3\x0b\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size empty": (chunks(b"\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size of 2**64": (chunks(b"10000000000000000\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size of 2**64 + 3": (chunks(b"10000000000000003\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk size of 2**64 - 1": (chunks(b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n"), Unfinished()),
    "chunk size overflow": (chunks(b"ffffffffffffffff1\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk line bare LF": (chunks(b"3\nabc\r\n0\r\n\r\n"), NO),
    "chunk line bare CR": (chunks(b"3\rabc\r\n0\r\n\r\n"), NO),
    "chunk line CR CR LF": (chunks(b"3\r\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk data before LF": (chunks(b"3\r\nabc\n0\r\n\r\n"), NO),
    "chunk data before CR": (chunks(b"3\r\nabc\r0\r\n\r\n"), NO),
    "chunk data unended": (chunks(b"3\r\nabc0\r\n\r\n"), NO),
    "chunk data too long": (chunks(b"3\r\nabcd\r\n0\r\n\r\n"), NO),
    "chunk data too short": (chunks(b"4\r\nabc\r\n0\r\n\r\n"), NO),
    "last chunk unended": (chunks(b"3\r\nabc\r\n0\r\n"), NO),
    "last chunk bare LF": (chunks(b"3\r\nabc\r\n0\n\n"), NO),
    "last chunk CR LF LF": (chunks(b"3\r\nabc\r\n0\r\n\n"), NO),
    "chunk extension": (chunks(b"3;a=b\r\nabc\r\n0\r\n\r\n"), ABC),
    "chunk extension without value": (chunks(b"3;a\r\nabc\r\n0;z\r\n\r\n"), ABC),
    "chunk extension quoted": (chunks(b'3;a="b c"\r\nabc\r\n0\r\n\r\n'), ABC),
    "chunk extension with a chunk in quotes": (chunks(b'3;a="\r\nabc\r\n0\r\n\r\n"\r\nabc\r\n0\r\n\r\n'), NO),
    "chunk extension with LF": (chunks(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk extension with CR": (chunks(b"3;a\rb\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk extension with control": (chunks(b"3;\x01\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk extension with NUL": (chunks(b"3;a=\0\r\nabc\r\n0\r\n\r\n"), NO),
    "chunk extension huge": (chunks(b"3;" + b"a" * 70_000 + b"\r\nabc\r\n0\r\n\r\n"), Either(Refused((431,)), ABC)),
    "trailer": (trailer(b"X: y"), Read(trailers=((b"x", b"y"),))),
    "trailer empty": (trailer(b"X:"), Read(trailers=((b"x", b""),))),
    "trailers, some ours": (
        trailer(b"X: y\r\nShardlead-Epoch: 9\r\nshardlead_shard: 9\r\nX-Shard-Key: b\r\nHost: b\r\nZ: 1"),
        Read(trailers=((b"x", b"y"), (b"z", b"1"))),
    ),
    "trailer Authorization": (trailer(b"Authorization: b"), ABC),
    "trailer X-Forwarded-For": (trailer(b"X-Forwarded-For: b"), ABC),
    "trailer Expect": (trailer(b"Expect: 100-continue"), ABC),
    "trailer Content_Length": (trailer(b"Content_Length: 9"), ABC),
    "trailer Content-Length": (trailer(b"Content-Length: 9"), NO),
    "trailer Transfer-Encoding": (trailer(b"Transfer-Encoding: chunked"), NO),
    "trailer Upgrade": (trailer(b"Connection: upgrade\r\nUpgrade: websocket"), ABC),
    "trailer folded": (trailer(b"X: y\r\n z"), NO),
    "trailer before LF": (trailer(b"X: y\nZ: 1"), NO),
    "trailer with CR": (trailer(b"X: y\rZ: 1"), NO),
    "trailer name before space": (trailer(b"X : y"), NO),
    "trailer without colon": (trailer(b"X"), NO),
    "trailer with NUL": (trailer(b"X: \0"), NO),
    "trailer a request": (trailer(b"GET /k/smuggled HTTP/1.1"), NO),
    "trailers too many": (trailer(b"\r\n".join([b"X: y"] * 200)), Refused((431,))),
    "trailers too large": (trailer(b"X: " + b"y" * 70_000), Refused((431,))),
}

LINES: Final[dict[str, tuple[bytes, Verdict]]] = {
    "line": (get(), GET),
    "line behind CRLF": (b"\r\n" + get(), GET),
    "line behind CRLFs": (b"\r\n\r\n\r\n" + get(), GET),
    "line behind LF": (b"\n" + get(), GET),
    "line behind CR": (b"\r" + get(), GET),
    "line behind space": (b" " + get(), NO),
    "line behind NUL": (b"\0" + get(), NO),
    "line with two spaces": (get(b"GET  /p HTTP/1.1"), GET),
    "line with two spaces before the version": (get(b"GET /p  HTTP/1.1"), GET),
    "line with a tab": (get(b"GET\t/p HTTP/1.1"), NO),
    "line with a tab before the version": (get(b"GET /p\tHTTP/1.1"), NO),
    "line before space": (get(b"GET /p HTTP/1.1 "), NO),
    "line before LF": (b"GET /p HTTP/1.1\n" + H + b"\r\n", NO),
    "line before CR": (b"GET /p HTTP/1.1\r" + H + b"\r\n", NO),
    "line before CR CR LF": (b"GET /p HTTP/1.1\r\r\n" + H + b"\r\n", NO),
    "version 1.2": (get(b"GET /p HTTP/1.2"), Refused((400, 505))),
    "version 1.10": (get(b"GET /p HTTP/1.10"), Refused((400, 505))),
    "version 01.1": (get(b"GET /p HTTP/01.1"), Refused((400, 505))),
    "version 2.0": (get(b"GET /p HTTP/2.0"), Refused((400, 505))),
    "version 3.0": (get(b"GET /p HTTP/3.0"), Refused((400, 505))),
    "version 0.9": (get(b"GET /p HTTP/0.9"), Refused((400, 505))),
    "version 1": (get(b"GET /p HTTP/1"), Refused((400, 505))),
    "version in lower case": (get(b"GET /p http/1.1"), NO),
    "version of another": (get(b"GET /p HTTPS/1.1"), NO),
    # The parser takes these two for HTTP/1.0 and tells nobody; the worker gets one request, and the connection closes.
    "version RTSP": (get(b"GET /p RTSP/1.0"), Read(b"GET", body=b"", is_last=True)),
    "version RTSP, its method": (get(b"DESCRIBE /p RTSP/1.0"), Read(b"DESCRIBE", body=b"", is_last=True)),
    "version ICE": (get(b"SOURCE /p ICE/1.0"), Read(b"SOURCE", body=b"", is_last=True)),
    "version missing": (b"GET /p\r\n" + H + b"\r\n", Refused((400, 505))),
    "HTTP/0.9": (b"GET /p\r\n\r\n", Refused((400, 505))),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Refused((400, 505))),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", NO),
    "method in lower case": (get(b"get /p HTTP/1.1"), NO),
    "method mixed": (get(b"Get /p HTTP/1.1"), NO),
    "method unknown": (get(b"FOO /p HTTP/1.1"), NO),
    "method longer": (get(b"GETX /p HTTP/1.1"), NO),
    "method before a comma": (get(b"GET, /p HTTP/1.1"), NO),
    "method with NUL": (get(b"G\0ET /p HTTP/1.1"), NO),
    "method missing": (get(b"/p HTTP/1.1"), NO),
    "method quoted": (get(b'"GET" /p HTTP/1.1'), NO),
    "method rare": (get(b"PROPFIND /p HTTP/1.1"), Read(b"PROPFIND", body=b"")),
    "method with hyphen": (get(b"M-SEARCH /p HTTP/1.1"), Read(b"M-SEARCH", body=b"")),
    "target with space": (get(b"GET /a b HTTP/1.1"), NO),
    "target with fragment": (get(b"GET /p#f HTTP/1.1"), NO),
    "target with control": (get(b"GET /p\x01 HTTP/1.1"), NO),
    "target with DEL": (get(b"GET /p\x7f HTTP/1.1"), NO),
    "target with NUL": (get(b"GET /p\0 HTTP/1.1"), NO),
    "target raw UTF-8": (get(b"GET /\xc3\xa9 HTTP/1.1"), NO),
    "target with VT": (get(b"GET /p\x0bq HTTP/1.1"), NO),
    "target with quotes and brackets": (get(b'GET /p"<>\\^`{|} HTTP/1.1'), Read(b"GET", b'/p"<>\\^`{|}', body=b"")),
    "target with two slashes": (get(b"GET //evil.example/p HTTP/1.1"), Read(b"GET", b"//evil.example/p", body=b"")),
    "target with dots": (get(b"GET /a/../p HTTP/1.1"), Read(b"GET", b"/a/../p", body=b"")),
    "target with encoded dots": (get(b"GET /%2e%2e/p HTTP/1.1"), Read(b"GET", b"/%2e%2e/p", body=b"")),
    "target with an encoded break": (get(b"GET /p%0d%0aX:%20y HTTP/1.1"), Read(b"GET", b"/p%0d%0aX:%20y", body=b"")),
    "target with encoded NUL": (get(b"GET /p%00 HTTP/1.1"), Read(b"GET", b"/p%00", body=b"")),
    "target with a question": (get(b"GET /p?? HTTP/1.1"), Read(b"GET", b"/p??", body=b"")),
    "target empty": (get(b"GET  HTTP/1.1"), NO),
    "target without slash": (get(b"GET p HTTP/1.1"), NO),
    "target a query": (get(b"GET ?q HTTP/1.1"), NO),
    "absolute": (get(b"GET http://a/p HTTP/1.1"), GET),
    "absolute, other Host": (get(b"GET http://b/p HTTP/1.1"), Read(b"GET", host=b"b", body=b"")),
    "absolute with port": (get(b"GET http://b:81/p?q HTTP/1.1"), Read(b"GET", b"/p?q", b"b:81", b"")),
    "absolute in capitals": (get(b"GET HTTP://B/p HTTP/1.1"), Read(b"GET", host=b"B", body=b"")),
    "absolute without path": (get(b"GET http://b HTTP/1.1"), Read(b"GET", b"/", b"b", b"")),
    "absolute without path, with query": (get(b"GET http://b?q HTTP/1.1"), NO),
    "absolute without host": (get(b"GET http:///p HTTP/1.1"), NO),
    "absolute with user": (get(b"GET http://u@b/p HTTP/1.1"), NO),
    "absolute with fragment": (get(b"GET http://b/p#f HTTP/1.1"), NO),
    "absolute with backslash": (get(b"GET http://b\\p/ HTTP/1.1"), NO),
    "absolute with space": (get(b"GET http://b /p HTTP/1.1"), NO),
    "absolute https": (get(b"GET https://b/p HTTP/1.1"), NO),
    "absolute ftp": (get(b"GET ftp://b/p HTTP/1.1"), NO),
    "absolute shortened": (get(b"GET http:/p HTTP/1.1"), NO),
    "asterisk": (get(b"OPTIONS * HTTP/1.1"), Read(b"OPTIONS", b"*", body=b"")),
    "asterisk of a GET": (get(b"GET * HTTP/1.1"), NO),
    "asterisk and more": (get(b"OPTIONS *x HTTP/1.1"), NO),
    "authority": (get(b"GET a:80 HTTP/1.1"), NO),
    "CONNECT": (get(b"CONNECT a:80 HTTP/1.1"), ODD),
    "CONNECT to a path": (get(b"CONNECT /p HTTP/1.1"), Refused((400, 501))),
    "CONNECT to a URL": (get(b"CONNECT http://a/p HTTP/1.1"), Refused((400, 501))),
    "CONNECT with a body": (get(b"CONNECT a:80 HTTP/1.1", CL) + b"abc", ODD),
    "HTTP/1.0": (get(b"GET /p HTTP/1.0"), Read(b"GET", body=b"", is_last=True)),
    "HTTP/1.0, keep-alive": (get(b"GET /p HTTP/1.0", b"Connection: keep-alive\r\n"), GET),
}

FIELDS: Final[dict[str, tuple[bytes, Verdict]]] = {
    "name empty": (get(fields=b": y\r\n"), NO),
    "name of spaces": (get(fields=b"  : y\r\n"), NO),
    "name with space": (get(fields=b"X Y: z\r\n"), NO),
    "name before space": (get(fields=b"X : y\r\n"), NO),
    "name before tab": (get(fields=b"X\t: y\r\n"), NO),
    "name with parenthesis": (get(fields=b"X(Y): z\r\n"), NO),
    "name with at": (get(fields=b"X@Y: z\r\n"), NO),
    "name with comma": (get(fields=b"X,Y: z\r\n"), NO),
    "name with slash": (get(fields=b"X/Y: z\r\n"), NO),
    "name with quotes": (get(fields=b'"X": z\r\n'), NO),
    "name with NUL": (get(fields=b"X\0Y: z\r\n"), NO),
    "name with control": (get(fields=b"X\x01: z\r\n"), NO),
    "name with DEL": (get(fields=b"X\x7f: z\r\n"), NO),
    "name with high bytes": (get(fields=b"X\xc3\xa9: z\r\n"), NO),
    "name with CR": (get(fields=b"X\r: z\r\n"), NO),
    "name of all token characters": (
        get(fields=b"!#$%&'*+-.^_`|~9: z\r\n"),
        Read(b"GET", body=b"", has=((b"!#$%&'*+-.^_`|~9", b"z"),)),
    ),
    "no colon": (get(fields=b"XY\r\n"), NO),
    "value empty": (get(fields=b"X:\r\n"), Read(b"GET", body=b"", has=((b"x", b""),))),
    "value with colons": (get(fields=b"X: :y:\r\n"), Read(b"GET", body=b"", has=((b"x", b":y:"),))),
    "value with high bytes": (
        get(fields=b"X: \xc3\xa9\xff\r\n"),
        Read(b"GET", body=b"", has=((b"x", b"\xc3\xa9\xff"),)),
    ),
    "value with tab": (get(fields=b"X: y\tz\r\n"), Read(b"GET", body=b"", has=((b"x", b"y\tz"),))),
    "value with NUL": (get(fields=b"X: y\0z\r\n"), NO),
    "value with control": (get(fields=b"X: y\x01z\r\n"), NO),
    "value with VT": (get(fields=b"X: y\x0bz\r\n"), NO),
    "value with ESC": (get(fields=b"X: \x1b[2J\r\n"), NO),
    "value with DEL": (get(fields=b"X: y\x7fz\r\n"), NO),
    "value with CR": (get(fields=b"X: y\rZ: 1\r\n"), NO),
    "value with LF": (get(fields=b"X: y\nZ: 1\r\n"), NO),
    "value before CR CR LF": (get(fields=b"X: y\r\r\n"), NO),
    "value before LF CR": (get(fields=b"X: y\n\r\n"), NO),
    "fields before LF LF": (b"GET /p HTTP/1.1\r\nHost: a\r\nX-Shard-Key: a\n\n", NO),
    "fields before CR LF LF": (b"GET /p HTTP/1.1\r\n" + H + b"\n", NO),
    "fields before CR CR": (b"GET /p HTTP/1.1\r\n" + H + b"\r\r", NO),
    "folded": (get(fields=b"X: y\r\n z\r\n"), NO),
    "folded with tab": (get(fields=b"X: y\r\n\tz\r\n"), NO),
    "folded empty": (get(fields=b"X: y\r\n \r\n"), NO),
    "folded first": (b"GET /p HTTP/1.1\r\n Host: a\r\nX-Shard-Key: a\r\n\r\n", NO),
    "folded smuggling": (get(fields=b"X: y\r\n Content-Length: 50\r\n"), NO),
    "Host twice, same": (get(fields=b"Host: a\r\n"), NO),
    "Host twice, other": (get(fields=b"Host: b\r\n"), NO),
    "Host twice, other spelling": (get(fields=b"hOST: a\r\n"), NO),
    "Host missing": (b"GET /p HTTP/1.1\r\nX-Shard-Key: a\r\n\r\n", NO),
    "Host missing in HTTP/1.0": (
        b"GET /p HTTP/1.0\r\nX-Shard-Key: a\r\n\r\n",
        Read(b"GET", host=b"", body=b"", is_last=True),
    ),
    "Host missing, absolute": (
        b"GET http://b/p HTTP/1.1\r\nX-Shard-Key: a\r\n\r\n",
        Read(b"GET", host=b"b", body=b""),
    ),
    "Host before space": (b"GET /p HTTP/1.1\r\nHost : a\r\nX-Shard-Key: a\r\n\r\n", NO),
    **{
        f"Host {value!r}": (b"GET /p HTTP/1.1\r\nHost: %b\r\nX-Shard-Key: a\r\n\r\n" % value, NO)
        for value in (
            *(b"a/b", b"a b", b"a\tb", b"a,b", b"u@a", b"a?b", b"a#b", b'"a"', b"<a>", b"a\\b", b"a\xc3\xa9", b"a\x7f"),
            *(b"a|b", b"{a}", b"a^b", b"a`b"),
        )
    },
    "Host empty": (b"GET /p HTTP/1.1\r\nHost:\r\nX-Shard-Key: a\r\n\r\n", Read(b"GET", host=b"", body=b"")),
    "Host of IPv6": (
        b"GET /p HTTP/1.1\r\nHost: [::1]:80\r\nX-Shard-Key: a\r\n\r\n",
        Read(b"GET", host=b"[::1]:80", body=b""),
    ),
    "Connection names Host": (get(fields=b"Connection: Host\r\n"), GET),
    "Connection names the key": (
        get(fields=b"Connection: X-Shard-Key\r\n"),
        Read(b"GET", body=b"", has=((b"x-shard-key", b"a"),)),
    ),
    "Connection names our words": (get(fields=b"Connection: Shardlead-Shard, Shardlead-Epoch, Shardlead-Key\r\n"), GET),
    "Connection names X-Forwarded-For": (
        get(fields=b"Connection: X-Forwarded-For\r\n"),
        Read(b"GET", body=b"", has=((b"x-forwarded-for", b"127.0.0.1"),)),
    ),
    "Connection names a field": (
        get(fields=b"Connection: close, X-Mine\r\nX-Mine: y\r\n"),
        Read(b"GET", body=b"", lacks=(b"x-mine",), is_last=True),
    ),
    "Connection twice": (
        get(fields=b"Connection: X-Mine\r\nConnection: close\r\nX-Mine: y\r\n"),
        Read(b"GET", body=b"", lacks=(b"x-mine",), is_last=True),
    ),
    "our words": (get(fields=b"Shardlead-Shard: 9\r\nShardlead-Epoch: 99\r\nSHARDLEAD-KEY: q\r\n"), GET),
    "our words with underscores": (
        get(fields=b"Shardlead_Shard: 9\r\nshardlead_epoch: 99\r\nShardlead_Key: q\r\nShardlead_New: q\r\n"),
        Read(b"GET", body=b"", lacks=(b"shardlead_shard", b"shardlead_epoch", b"shardlead_key", b"shardlead_new")),
    ),
    "our words that do not exist": (
        get(fields=b"Shardlead-New: 9\r\nShardlead-: 9\r\n"),
        Read(b"GET", body=b"", lacks=(b"shardlead-new", b"shardlead-")),
    ),
    "X_Forwarded_For": (get(fields=b"X_Forwarded_For: 9\r\n"), Read(b"GET", body=b"", lacks=(b"x_forwarded_for",))),
    "Proxy-Connection": (
        get(fields=b"Proxy-Connection: keep-alive\r\nKeep-Alive: 5\r\n"),
        Read(b"GET", body=b"", lacks=(b"proxy-connection", b"keep-alive")),
    ),
    "Upgrade h2c": (
        get(fields=b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
        Read(b"GET", body=b"", lacks=(b"upgrade", b"http2-settings", b"connection")),
    ),
    "Upgrade with a body": (
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + CL),
        Read(lacks=(b"upgrade", b"connection")),
    ),
    "Upgrade with chunks": (
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + TE, CHUNKS),
        Read(lacks=(b"upgrade", b"connection")),
    ),
    "Upgrade without Connection": (get(fields=b"Upgrade: websocket\r\n"), Read(b"GET", body=b"", lacks=(b"upgrade",))),
    "Upgrade twice": (get(fields=b"Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n"), NO),
    "Upgrade empty": (get(fields=b"Connection: upgrade\r\nUpgrade:\r\n"), NO),
    "Expect": (post(CL + b"Expect: 100-continue\r\n"), Read(lacks=(b"expect",))),
    "Expect in capitals": (post(CL + b"Expect: 100-CONTINUE\r\n"), Read(lacks=(b"expect",))),
    "Expect without a body": (get(fields=b"Expect: 100-continue\r\n"), Read(b"GET", body=b"", lacks=(b"expect",))),
    "Expect twice": (post(CL + b"Expect: 100-continue\r\n" * 2), Read(lacks=(b"expect",))),
    "Expect in HTTP/1.0": (
        post(CL + b"Expect: 100-continue\r\n", line=b"POST /p HTTP/1.0"),
        Read(lacks=(b"expect",), is_last=True),
    ),
    "Expect another": (post(CL + b"Expect: 200-ok\r\n"), Refused((417,))),
    "Expect and another": (post(CL + b"Expect: 100-continue, x\r\n"), Refused((417,))),
    "Expect empty": (post(CL + b"Expect:\r\n"), Refused((417,))),
    "fields too many": (get(fields=b"X: y\r\n" * 200), Refused((431,))),
    "fields too large": (get(fields=b"X: " + b"y" * 70_000 + b"\r\n"), Refused((431,))),
    "key twice, same": (get(fields=b"X-Shard-Key: a\r\n"), GET),
    "key twice, other": (get(fields=b"X-Shard-Key: b\r\n"), Declined()),
    "key list": (b"GET /p HTTP/1.1\r\nHost: a\r\nX-Shard-Key: a, b\r\n\r\n", GET),
    "key with underscores": (b"GET /p HTTP/1.1\r\nHost: a\r\nX_Shard_Key: a\r\n\r\n", Declined()),
    "key empty": (b"GET /p HTTP/1.1\r\nHost: a\r\nX-Shard-Key:\r\n\r\n", Declined()),
    "key encoded badly": (b"GET /k/%zz HTTP/1.1\r\nHost: a\r\n\r\n", Declined()),
    "key encoded by half": (b"GET /k/%4 HTTP/1.1\r\nHost: a\r\n\r\n", Declined()),
    "key in path and header, other": (get(b"GET /k/b HTTP/1.1"), Declined()),
    "key in path and header, one encoded": (get(b"GET /k/%61 HTTP/1.1"), Read(b"GET", b"/k/%61", body=b"")),
    "key in path and header, encoded twice": (get(b"GET /k/%2561 HTTP/1.1"), Declined()),
    "key NUL": (
        b"GET /k/%00 HTTP/1.1\r\nHost: a\r\n\r\n",
        Read(b"GET", b"/k/%00", body=b"", has=((b"shardlead-key", b"%00"),)),
    ),
    "key slash": (
        b"GET /k/a%2Fb HTTP/1.1\r\nHost: a\r\n\r\n",
        Read(b"GET", b"/k/a%2Fb", body=b"", has=((b"shardlead-key", b"a%2Fb"),)),
    ),
    "key slash, lower": (
        b"GET /k/a%2fb HTTP/1.1\r\nHost: a\r\n\r\n",
        Read(b"GET", b"/k/a%2fb", body=b"", has=((b"shardlead-key", b"a%2Fb"),)),
    ),
    "key encoded twice": (
        b"GET /k/a%252Fb HTTP/1.1\r\nHost: a\r\n\r\n",
        Read(b"GET", b"/k/a%252Fb", body=b"", has=((b"shardlead-key", b"a%252Fb"),)),
    ),
    "key with a break": (
        b"GET /k/a%0D%0AX:%20y HTTP/1.1\r\nHost: a\r\n\r\n",
        Read(b"GET", b"/k/a%0D%0AX:%20y", body=b"", has=((b"shardlead-key", b"a%0D%0AX%3A%20y"),)),
    ),
}

REQUESTS: Final[dict[str, tuple[bytes, Verdict]]] = {**LENGTHS, **CODINGS, **CHUNKED, **LINES, **FIELDS}


# --- what workers answer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failed:
    """The client gets a 502 of the router's own."""


@dataclass(frozen=True)
class Cut:
    """The client's connection is reset, or ends before its answer does: no reading is whole."""


@dataclass(frozen=True)
class Passed:
    """The client gets exactly this."""

    status: int = 200
    body: bytes = b"ok"
    trailers: tuple[tuple[bytes, bytes], ...] = ()
    has: tuple[tuple[bytes, bytes], ...] = ()
    lacks: tuple[bytes, ...] = ()


Outcome = Failed | Cut | Passed

OK: Final = b"HTTP/1.1 200 OK\r\n"


def said(fields: bytes, body: bytes = b"ok", line: bytes = OK) -> bytes:
    return line + fields + b"\r\n" + body


TWO: Final = b"Content-Length: 2\r\n"
TWO_CHUNKS: Final = b"2\r\nok\r\n0\r\n\r\n"
FAILED: Final = Failed()

ANSWERS: Final[dict[str, tuple[bytes, Outcome]]] = {
    "length": (said(TWO), Passed()),
    "chunks": (said(TE, TWO_CHUNKS), Passed()),
    "chunks with extensions": (said(TE, b"1;a\r\no\r\n1;b=c\r\nk\r\n0;d\r\n\r\n"), Passed()),
    "chunks and trailers": (
        said(TE, b"2\r\nok\r\n0\r\nX: y\r\nShardlead-Epoch: 9\r\nSet-Cookie: q\r\n\r\n"),
        Passed(trailers=((b"x", b"y"),)),
    ),
    "until the end": (said(b""), Passed()),
    "HTTP/1.0": (said(b"", line=b"HTTP/1.0 200 OK\r\n"), Passed()),
    "no reason": (said(TWO, line=b"HTTP/1.1 200\r\n"), Passed()),
    "lengths, same": (said(TWO + TWO), FAILED),
    "lengths, other": (said(TWO + b"Content-Length: 3\r\n"), FAILED),
    "length list": (said(b"Content-Length: 2, 2\r\n"), FAILED),
    "length plus": (said(b"Content-Length: +2\r\n"), FAILED),
    "length empty": (said(b"Content-Length:\r\n"), FAILED),
    "length of 2**64 + 2": (said(b"Content-Length: 18446744073709551618\r\n"), FAILED),
    "length and chunks": (said(TWO + TE, TWO_CHUNKS), FAILED),
    "chunks and length": (said(TE + TWO, TWO_CHUNKS), FAILED),
    "coding twice": (said(TE + TE, TWO_CHUNKS), FAILED),
    "coding gzip": (said(b"Transfer-Encoding: gzip\r\n"), FAILED),
    "coding gzip, chunked": (said(b"Transfer-Encoding: gzip, chunked\r\n", TWO_CHUNKS), FAILED),
    "coding chunked, gzip": (said(b"Transfer-Encoding: chunked, gzip\r\n", TWO_CHUNKS), FAILED),
    "coding x": (said(b"Transfer-Encoding: xchunked\r\n", TWO_CHUNKS), FAILED),
    "coding behind VT": (said(b"Transfer-Encoding: \x0bchunked\r\n", TWO_CHUNKS), FAILED),
    "coding before space": (said(b"Transfer-Encoding : chunked\r\n", TWO_CHUNKS), FAILED),
    "chunk size not hex": (said(TE, b"x\r\nok\r\n0\r\n\r\n"), FAILED),
    "chunk size 0x": (said(TE, b"0x2\r\nok\r\n0\r\n\r\n"), FAILED),
    "chunk size overflow": (said(TE, b"ffffffffffffffff2\r\nok\r\n0\r\n\r\n"), FAILED),
    "chunk line bare LF": (said(TE, b"2\nok\r\n0\r\n\r\n"), FAILED),
    "chunk size not hex behind a good one": (said(TE, b"2\r\nok\r\nx\r\nno\r\n0\r\n\r\n"), Cut()),
    "chunk unended": (said(TE, b"2\r\nok0\r\n\r\n"), Cut()),
    "chunks without end": (said(TE, b"2\r\nok\r\n"), Cut()),
    "length not reached": (said(b"Content-Length: 3\r\n"), Cut()),
    "trailer with CR": (said(TE, b"2\r\nok\r\n0\r\nX: y\rZ: 1\r\n\r\n"), Cut()),
    "trailer folded": (said(TE, b"2\r\nok\r\n0\r\nX: y\r\n z\r\n\r\n"), Cut()),
    "line bare LF": (said(TWO, line=b"HTTP/1.1 200 OK\n"), FAILED),
    "line with CR": (said(TWO, line=b"HTTP/1.1 200 O\rK\r\n"), FAILED),
    "line with NUL": (said(TWO, line=b"HTTP/1.1 200 O\0K\r\n"), FAILED),
    "line with ESC": (said(TWO, line=b"HTTP/1.1 200 \x1b[2J\r\n"), FAILED),
    "field bare LF": (said(b"X: y\nZ: 1\r\n" + TWO), FAILED),
    "field bare CR": (said(b"X: y\rZ: 1\r\n" + TWO), FAILED),
    "field with NUL": (said(b"X: \0\r\n" + TWO), FAILED),
    "field with DEL": (said(b"X: \x7f\r\n" + TWO), FAILED),
    "field folded": (said(b"X: y\r\n z\r\n" + TWO), FAILED),
    "field before space": (said(b"X : y\r\n" + TWO), FAILED),
    "field without name": (said(b": y\r\n" + TWO), FAILED),
    "field without colon": (said(b"X\r\n" + TWO), FAILED),
    "field with high bytes": (said(b"X: \xff\r\n" + TWO), Passed(has=((b"x", b"\xff"),))),
    "status 000": (said(TWO, line=b"HTTP/1.1 000 No\r\n"), FAILED),
    "status 99": (said(TWO, line=b"HTTP/1.1 99 No\r\n"), FAILED),
    "status 2000": (said(TWO, line=b"HTTP/1.1 2000 No\r\n"), FAILED),
    "status in words": (said(TWO, line=b"HTTP/1.1 OK\r\n"), FAILED),
    "status 101": (said(b"Connection: upgrade\r\nUpgrade: x\r\n", line=b"HTTP/1.1 101 No\r\n"), FAILED),
    "version 2.0": (said(TWO, line=b"HTTP/2.0 200 OK\r\n"), Passed()),
    "version unknown": (said(TWO, line=b"HTTP/1.9 200 OK\r\n"), FAILED),
    "a request": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", FAILED),
    "nonsense": (b"nonsense\r\n\r\n", FAILED),
    "nothing": (b"", FAILED),
    "204 with a length": (said(TWO, line=b"HTTP/1.1 204 No\r\n"), Passed(204, b"")),
    "204 with chunks": (said(TE, b"", line=b"HTTP/1.1 204 No\r\n"), Passed(204, b"")),
    "304 with a length": (said(TWO, b"", line=b"HTTP/1.1 304 No\r\n"), Passed(304, b"")),
    "103, then 200": (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + said(TWO), Passed()),
    "103 with a length": (b"HTTP/1.1 103 Early\r\n" + TWO + b"\r\n" + said(TWO), Passed()),
    "199 with a body": (b"HTTP/1.1 199 No\r\n" + TWO + b"\r\nok" + said(TWO), FAILED),
    "199 with chunks": (b"HTTP/1.1 199 No\r\n" + TE + b"\r\n" + TWO_CHUNKS + said(TWO), FAILED),
    "two answers": (said(TWO) + said(TWO, b"no"), Passed()),
    "an answer and more": (said(TWO) + b"more", Passed()),
    "Connection names the length": (said(TWO + b"Connection: Content-Length\r\n"), Passed()),
    "Connection names a field": (said(TWO + b"Connection: X\r\nX: y\r\n"), Passed(lacks=(b"x", b"connection"))),
    "our words": (
        said(TWO + b"Shardlead-Epoch: 9\r\nShardlead-New: 9\r\nShardlead_Refused: stale\r\n"),
        Passed(lacks=(b"shardlead-epoch", b"shardlead-new", b"shardlead_refused")),
    ),
    "Keep-Alive": (said(TWO + b"Keep-Alive: timeout=5\r\n"), Passed(lacks=(b"keep-alive",))),
}
