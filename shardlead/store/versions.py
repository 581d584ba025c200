"""What is known of the faults of etcd's versions, so that an operator reads it at the start and not in a night.

Law: protocol.md A.9. Pure. An unknown version gets no trust and no warning.
"""

import re
from typing import Final

_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")

Version = tuple[int, int, int]

_END_OF_LIFE: Final = (3, 5, 0)

# fixed in 3.4.x, 3.5.x, 3.6.x (0: never had it), and what goes wrong before
_FAULTS: Final[tuple[tuple[int, int, int, str], ...]] = (
    (20, 5, 0, "over TLS a member with 250 watches answers nothing else, renewals included (#14077)"),
    (25, 8, 0, "watch progress can overtake events (#15220) and watches travel back in time (#15271)"),
    (31, 13, 0, "a deposed leader acknowledges renewals and revokes living leases (#15247)"),
    (32, 14, 0, "revisions can go back after a crash (#17780)"),
    (34, 16, 0, "a deletion can be lost at a compaction's revision (#18089)"),
    (36, 18, 0, "a watch opened at a compaction's revision can miss a deletion (#19179)"),
    (38, 23, 5, "renewing a revoked lease can succeed (#20590)"),
    (42, 28, 9, "linearizable reads can be stale after a member was paused (#20418)"),
)


def parse_version(text: str) -> Version | None:
    """(major, minor, patch), or None if `text` does not begin with them."""
    found = _VERSION.match(text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def is_progress_trusted(text: str) -> bool:
    """Whether a progress message of this version tells the truth (3.4.25, 3.5.8 and later)."""
    version = parse_version(text)
    if version is None:
        return False
    match version:
        case (3, 4, patch):
            return patch >= 25
        case (3, 5, patch):
            return patch >= 8
        case _:
            return version >= (3, 6, 0)


def warnings_for(text: str) -> tuple[str, ...]:
    """One line for each known fault of this version that touches leases, epochs or watches."""
    version = parse_version(text)
    if version is None:
        return ()
    major, minor, patch = version
    if (major, minor) < (3, 4):
        return (f"etcd {text} is older than anything shardlead was tested with: use 3.5.28 or 3.6.9 at least",)
    lines = []
    if version < _END_OF_LIFE:
        lines.append(f"etcd {text}: 3.4 gets no fixes any more: use 3.5.28 or 3.6.9 at least")
    for in_3_4, in_3_5, in_3_6, fault in _FAULTS:
        fixed = {(3, 4): in_3_4, (3, 5): in_3_5, (3, 6): in_3_6}.get((major, minor), 0)
        if patch < fixed:
            lines.append(f"etcd {text}: {fault}; fixed in {major}.{minor}.{fixed}")
    return tuple(lines)
