"""What holds for requests through the router holds for the smart client's: the same scenes, without the hop."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.client.support import client_stage
from tests.router import test_hold_and_resend as router

SCENES: list[Callable[[], None]] = [
    router.test_requests_wait_for_a_leader_first_in_first_out,
    router.test_other_shards_do_not_wait,
    router.test_a_hold_ends_with_a_503_that_names_the_shard,
    router.test_while_a_shard_drains_its_other_requests_wait_without_asking,
    router.test_a_refusal_names_the_new_leader_before_the_view_does,
    router.test_a_suspended_leader_is_asked_again_under_the_same_epoch,
    router.test_a_leader_suspended_for_longer_than_the_hold_is_named_so,
    router.test_a_leader_that_was_only_slow_to_open_is_asked_again,
    router.test_an_unanswered_post_is_not_sent_again,
    router.test_a_request_that_kills_its_worker_does_not_walk_the_fleet,
    router.test_a_leader_that_cannot_be_reached_is_tried_until_there_is_another,
    router.test_a_leader_whose_record_has_not_come_is_waited_for,
    router.test_a_planned_move_lets_answers_pass,
    router.test_an_answer_that_was_on_its_way_when_the_session_ended_passes,
    router.test_a_silent_leader_is_a_504,
    router.test_epochs_never_go_back_under_constant_change,
    router.test_no_cluster_yet_is_said,
    router.test_a_leader_that_swallows_connections_does_not_swallow_requests,
]


@pytest.fixture(autouse=True)
def _by_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "stage", client_stage)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__.removeprefix("test_"))
def test_as_by_the_router(scene: Callable[[], None]) -> None:
    """The scene's own truth."""
    scene()


@pytest.mark.parametrize("reason", ["stale", "draining", "unknown"])
def test_a_refused_post_goes_to_the_next_leader_bit_for_bit(reason: str) -> None:
    """As by the router."""
    router.test_a_refused_post_goes_to_the_next_leader_bit_for_bit(reason)


CASES: Any = next(
    mark.args[1]
    for mark in vars(router.test_what_is_harmless_twice_is_sent_again)["pytestmark"]
    if mark.name == "parametrize"
)


@pytest.mark.parametrize(("method", "headers", "is_idempotent", "expected"), CASES)
def test_what_is_harmless_twice_is_sent_again(
    method: str, headers: dict[str, str], is_idempotent: bool, expected: int
) -> None:
    """As by the router."""
    router.test_what_is_harmless_twice_is_sent_again(method, headers, is_idempotent, expected)
