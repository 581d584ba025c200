"""Every message of the corpus over real sockets: what leaves the router, either way, can be read in one way only."""

import asyncio
import contextlib
from typing import Final, assert_never

import pytest

from tests.router import corpus
from tests.router.corpus import Cut, Declined, Either, Failed, Passed, Read, Refused, Unfinished
from tests.router.strict import Message, NotHttp, read_answers, read_requests
from tests.router.support import Stage, Worker, run, stage

BEFORE: Final = b"GET /k/before HTTP/1.1\r\nHost: before\r\n\r\n"
BEHIND: Final = b"GET /k/behind HTTP/1.1\r\nHost: behind\r\n\r\n"
SAID: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


class Recorder(Worker):
    """Keeps every byte of each connection, and answers each whole request; `script` stays unused."""

    def __init__(self, name: str, says: bytes = SAID + b"ok", *, closes: bool = False) -> None:
        super().__init__(name)
        self.wires: list[bytearray] = []
        self.says = says
        self.closes = closes

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = bytearray()
        self.wires.append(wire)
        self.open.add(writer)
        told = 0
        answered = 0
        try:
            while data := await reader.read(65_536):
                wire += data
                head = bytes(wire).rpartition(b"Expect: 100-continue\r\n")
                if head[1] and b"\r\n\r\n" in head[2] and len(head[0]) > told:
                    told = len(head[0])
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                with contextlib.suppress(NotHttp):
                    requests = read_requests(bytes(wire))
                    for request in requests[answered:]:
                        is_own = not request.start[1].startswith((b"/k/before", b"/k/behind"))
                        says = self.says if is_own else SAID + b"ok"
                        writer.write(says[: len(SAID)] if request.start[0] == b"HEAD" else says)
                        if is_own and self.closes:
                            writer.close()
                            return
                    answered = len(requests)
        except ConnectionError:
            pass
        finally:
            self.open.discard(writer)
            writer.close()

    def requests_read(self) -> list[Message]:
        """All whole requests, by the strict reader; one that was only announced (no 100 let its body through, or the
        client's body broke off) is left out, for the worker never acts on it."""
        found = []
        for wire in self.wires:
            try:
                found += read_requests(bytes(wire))
            except NotHttp:
                whole, announced, rest = bytes(wire).rpartition(b"Expect: 100-continue\r\n")
                assert announced, bytes(wire)
                assert not rest.endswith(b"0\r\n\r\n"), bytes(wire)
                start = whole.rfind(b" HTTP/1.1\r\n")
                start = whole.rfind(b"\r\n\r\n", 0, start)
                begin = 0 if start < 0 else start + 4
                found += read_requests(whole[:begin])
        return found


async def play(here: Stage, data: bytes, *, in_pieces: bool = False) -> bytes:
    """Send this, shut down the sending side, and take all that comes."""
    client = await here.client()
    with contextlib.suppress(ConnectionError, RuntimeError):
        if in_pieces:
            for at in range(0, len(data), 1 if len(data) < 2_000 else 997):
                client.writer.write(data[at : at + (1 if len(data) < 2_000 else 997)])
                if at % 8 == 0:
                    await asyncio.sleep(0)
        else:
            client.writer.write(data)
    return await client.rest()


async def _recorder(here: Stage, recorder: Recorder) -> Recorder:
    await recorder.start()
    here.workers[recorder.name] = recorder
    from shardlead.core.keyspace import encode
    from shardlead.store.base import Put

    await here.write(Put(here.keyspace.worker(recorder.name), encode(here.record(recorder))))
    await here.lead(recorder)
    return recorder


def _check_request(name: str, raw: bytes, verdict: corpus.Verdict, got: bytes, requests: list[Message]) -> None:
    method = raw.lstrip().partition(b" ")[0]
    has_head = method == b"HEAD"
    methods = (b"GET", b"HEAD" if has_head else b"POST", b"GET")
    answers = [each for each in read_answers(got, methods=methods) if int(each.start[1]) >= 200]
    statuses = [int(answer.start[1]) for answer in answers]
    targets = [request.start[1] for request in requests]
    assert targets[:1] == [b"/k/before"]
    if isinstance(verdict, Either):
        verdict = verdict.one if len(statuses) == 2 else verdict.other
    match verdict:
        case Unfinished():
            assert statuses == [200]
            assert targets == [b"/k/before"]
        case Refused(allowed):
            assert len(statuses) == 2
            assert statuses[0] == 200
            assert statuses[1] in allowed
            assert answers[1].values(b"connection") == [b"close"]
            assert answers[1].values(b"content-type") == [b"application/problem+json"]
            assert targets == [b"/k/before"], "it reached the worker"
        case Declined(status):
            assert statuses == [200, status, 200]
            assert targets == [b"/k/before", b"/k/behind"]
        case Read():
            assert statuses == [200, 200] if verdict.is_last else [200, 200, 200]
            assert targets[2:] == ([] if verdict.is_last else [b"/k/behind"])
            request = requests[1]
            assert (request.start[0], request.start[1]) == (verdict.method, verdict.target)
            assert request.values(b"host") == [verdict.host]
            assert request.body == verdict.body
            assert tuple(request.trailers) == verdict.trailers
            assert len(request.values(b"shardlead-epoch")) == len(request.values(b"shardlead-shard")) == 1
            for field, value in verdict.has:
                assert request.values(field) == [value]
            for field in verdict.lacks:
                if field != b"expect" or len(verdict.body) < 10:
                    assert not request.values(field) or (field == b"expect" and request.is_chunked)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize("part", ["LENGTHS", "CODINGS", "CHUNKED", "LINES", "FIELDS"])
def test_a_request_is_refused_or_read_in_one_way(part: str, in_pieces: bool) -> None:
    """What the worker gets parses strictly, byte for byte; a refusal is the last that a connection says."""
    cases: dict[str, tuple[bytes, corpus.Verdict]] = getattr(corpus, part)
    wrong = []

    async def main() -> None:
        async with stage() as here:
            recorder = await _recorder(here, Recorder("w1"))
            for name, (raw, verdict) in cases.items():
                recorder.wires.clear()
                for writer in tuple(recorder.open):
                    writer.close()
                await here.true(lambda: not any(pool.idle for pool in here.router.desk.pools.values()))
                got = await play(here, BEFORE + raw + BEHIND, in_pieces=in_pieces)
                await here.true(lambda: here.router.counts.client_connections == 0)
                try:
                    _check_request(name, raw, verdict, got, recorder.requests_read())
                except (AssertionError, NotHttp, IndexError) as exc:
                    text = str(exc).splitlines()[0] if str(exc) else repr(exc)
                    wrong.append(f"{name}: {text}\n    answered {got!r:.700}\n    sent on {recorder.wires!r:.900}")
            desk = here.router.desk
            await here.true(lambda: not desk.gates and here.router.counts.kept_bytes == 0)
            await here.true(lambda: not any(pool.busy or pool.waiting for pool in desk.pools.values()))

    run(main)
    assert not wrong, "\n".join(wrong)


def _check_answer(outcome: corpus.Outcome, got: bytes) -> None:
    match outcome:
        case Cut():
            assert got.startswith(b"HTTP/1.1 200 "), "it had begun"
            try:
                read_answers(got, methods=(b"POST", b"GET"))
            except NotHttp:
                return
            raise AssertionError("it was read as whole")
        case Failed():
            own, behind = (each for each in read_answers(got, methods=(b"POST", b"GET")))
            assert int(own.start[1]) == 502
            assert own.values(b"content-type") == [b"application/problem+json"]
        case Passed():
            answers = read_answers(got, methods=(b"POST", b"GET"))
            own, behind = (each for each in answers if int(each.start[1]) >= 200)
            assert (int(own.start[1]), own.body) == (outcome.status, outcome.body)
            assert tuple(own.trailers) == outcome.trailers
            assert len(own.values(b"date")) == 1
            for field, value in outcome.has:
                assert own.values(field) == [value]
            for field in outcome.lacks:
                assert not own.values(field)
        case _:
            assert_never(outcome)
    assert (behind.start[1], behind.body) == (b"200", b"ok"), "the next request gets its own answer"


def test_an_answer_is_passed_on_in_one_way_or_not_at_all() -> None:
    """What the client gets parses strictly; an answer that began and cannot be made whole is cut; never does a byte of
    it become part of another request's answer."""
    wrong = []

    async def main() -> None:
        async with stage() as here:
            for number, (name, (raw, outcome)) in enumerate(corpus.ANSWERS.items()):
                recorder = await _recorder(here, Recorder(f"w{number}", raw, closes=True))
                got = await play(here, b"POST /k/a HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n" + BEHIND)
                try:
                    _check_answer(outcome, got)
                except (AssertionError, NotHttp, ValueError) as exc:
                    text = str(exc).splitlines()[0] if str(exc) else repr(exc)
                    wrong.append(f"{name}: {text}\n    answered {got!r:.700}")
                await recorder.stop()

    run(main)
    assert not wrong, "\n".join(wrong)


def test_the_corpus_is_large() -> None:
    """As large as was promised."""
    assert len(corpus.REQUESTS) >= 150
    assert len(corpus.ANSWERS) >= 30
