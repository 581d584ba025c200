"""What etcd has been seen to do and should not: switches of the simulated store, each at a rate of its own.

Found in etcd's issues and changelogs: acknowledgements by a deposed leader (#15247), renewals after the end (#14758,
#20590), stale reads (#20418), progress before events (#15220), lost deletions (#18089, #19179), revisions that go back
(#17780). Leaders must survive them as far as a fence reaches; see `tests/simulation/README.md` for what may break.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """Chances: of each occasion to misbehave so; 0 is never."""

    stale_ack: float = 0.0  # after a change of leader the old one goes on acknowledging renewals that count for nothing
    early_revoke: float = 0.0  # at each tick of 500 ms: a living lease ends before its time
    key_gone_lease_alive: float = 0.0  # at each tick: a lease's keys are deleted, and it is renewed for a while yet
    renew_after_revoke: float = 0.0  # of each lease that ends: it is acknowledged for a while yet
    stale_read: float = 0.0  # of each read: it is answered from the past (transactions never are)
    progress_overtakes: float = 0.0  # of each message of a watch: its revision is announced before its events come
    lost_delete_at_compaction: float = 0.0  # of each watch at each compaction: its next deletion is not told
    silent_watch: float = 0.0  # of each message of a watch: from it on, the watch tells nothing more
    revision_regress: float = 0.0  # of each restart: the last revisions have never been

    def __str__(self) -> str:
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return ", ".join(on) or "none"
