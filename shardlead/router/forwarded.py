"""X-Forwarded-For, -Proto, -Host and Forwarded (RFC 7239): whom a request came from, by the stated policy.

Law: "append" is for a router behind a proxy that is trusted, "replace" for one that faces clients, "off" leaves all
as it is.
"""

from typing import Literal

from shardlead.router.heads import FORWARDED, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO

ForwardedPolicy = Literal["append", "replace", "off"]


class Forwarder:
    """Writes X-Forwarded-For, -Proto, -Host and Forwarded for one client connection, by the stated policy.

    "append": the peer is added to what came, Proto and Host stay if they came. "replace": what came is thrown away.
    "off": what came passes, nothing is added.
    """

    __slots__ = ("_peer", "_peer_node", "_policy", "_proto")

    def __init__(self, policy: ForwardedPolicy, peer: str, *, is_tls: bool = False) -> None:
        self._proto = b"https" if is_tls else b"http"
        self._policy = policy
        self._peer = peer.encode()
        self._peer_node = b'"[%s]"' % self._peer if b":" in self._peer else self._peer

    def write(self, host: bytes, came: dict[int, list[bytes]] | None) -> bytes:
        if came is None or self._policy == "replace":
            if self._policy == "off":
                return b""
            node = self._peer_node
            peer = self._peer
            return (
                b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
                b'Forwarded: for=%b;host="%b";proto=%b\r\n' % (peer, self._proto, host, node, host, self._proto)
            )
        lines = []
        for kind, name, own in (
            (FORWARDED_FOR, b"X-Forwarded-For", self._peer),
            (FORWARDED_PROTO, b"X-Forwarded-Proto", self._proto),
            (FORWARDED_HOST, b"X-Forwarded-Host", host),
            (FORWARDED, b"Forwarded", b'for=%b;host="%b";proto=%b' % (self._peer_node, host, self._proto)),
        ):
            values = came.get(kind, [])
            if self._policy == "append" and (not values or kind in (FORWARDED_FOR, FORWARDED)):
                values = [*values, own]
            if values:
                lines.append(b"%b: %b\r\n" % (name, b", ".join(values)))
        return b"".join(lines)
