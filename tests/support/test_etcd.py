"""The helpers that start real etcds: what happens where there is none, and that members can be hurt and healed."""

import pytest

from tests.support.etcd import etcd_binary, etcd_server


def test_a_missing_etcd_skips_a_test_and_fails_it_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody needs an etcd to work here, and CI never passes for want of one."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no etcd"):
        etcd_binary("2.0")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no etcd"):
        etcd_binary("2.0")


@pytest.mark.etcd
def test_members_die_freeze_and_come_back_with_their_data() -> None:
    """Three members outlive the kill of the one that leads; it comes back on its port and catches up."""
    with etcd_server("3.5", members=3) as etcd:
        leader = etcd.leader()
        others = [member for member in etcd.members if member is not leader]
        others[0].call("/v3/kv/put", {"key": "YQ=="})
        leader.kill()
        others[0].wait_ready()
        assert others[0].call("/v3/kv/put", {"key": "YQ=="})["header"]["revision"] == "3"
        leader.start()
        assert leader.call("/v3/kv/range", {"key": "YQ=="})["kvs"][0]["version"] == "2"
        leader = etcd.leader()
        follower = next(member for member in etcd.members if member is not leader)
        follower.freeze()
        assert leader.call("/v3/kv/range", {"key": "YQ=="})["count"] == "1"
        follower.thaw()
