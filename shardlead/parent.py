"""The parent of a worker: starts it, outlives it, revokes its lease. Run by file path, standard library only.

    python -I -S .../shardlead/parent.py -- COMMAND ARG...

The worker writes its last will to a socket whose file descriptor SHARDLEAD_PARENT_FD names: JSON lines, each in place
of the one before.

    {"lease": "7587...", "fenced": true, "endpoints": ["http://10.0.0.1:2379"], "username": "", "password": "",
     "ca_file": "", "cert_file": "", "key_file": ""}
    {"lease": null}                                                                       nothing is left to revoke

Once the worker's process is dead, however it died, its lease is revoked, so that others lead its shards within
milliseconds and the lease's time-out is left for lost machines and networks.

Law: the worker's death is what waitpid says. The end of the stream is not: children that the worker had forked may
hold the socket, and may live on. A lease whose work is not fenced is never revoked: bytes of a dead process may still
be delivered (protocol.md A.4). Credentials are never in an argument or environment. Everything after the death is
bounded by REVOKE_TIMEOUT_S; then the exit code is the worker's, 128 + n for signal n.

It imports nothing of ours and, until a lease has to be revoked, little of Python's: it stays under 15 MiB. So it reads
the clock itself, and a will is parsed only when it is opened.
"""

import os
import select
import signal
import socket
import sys
import time

FD_VARIABLE = "SHARDLEAD_PARENT_FD"
WILL_BYTES_MAX = 65_536
TRY_TIMEOUT_S = 1.0
REVOKE_TIMEOUT_S = 5.0
STAGGER_S = 0.1  # a living etcd answers in a few milliseconds; a lease with 5,000 keys takes about 70
ROUND_PAUSE_S = 0.2
ENDPOINTS_MAX = 16
ANSWER_BYTES_MAX = 65_536
EXIT_USAGE, EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND = 2, 126, 127
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_FAILED_PRECONDITION, _NOT_FOUND = 9, 5  # gRPC status codes


def command_line(command: list[str]) -> list[str]:
    """What starts `command` under a parent. -I -S: a venv's start-up files would cost memory and run foreign code."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), "--", *command]  # noqa: PTH100  # pathlib is big


def main(arguments: list[str]) -> int:
    """Run the command to its end and carry out its last will; the exit code."""
    if arguments[:1] != ["--"] or len(arguments) < 2:
        say("usage: parent.py -- COMMAND ARG...")
        return EXIT_USAGE
    wake = listen_to_signals()
    ours, theirs = socket.socketpair()
    try:
        worker = start(arguments[1:], theirs)
    except OSError as error:
        say(f"cannot start {arguments[1]}: {error.strerror}")
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_CANNOT_EXECUTE
    theirs.close()
    status, will = attend(worker, ours, wake)
    code = os.waitstatus_to_exitcode(status)
    if will:
        execute(will, worker, f"exit code {code}" if code >= 0 else f"signal {-code}")
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
    """One line on stderr, if anybody still holds its other end."""
    try:  # noqa: SIM105  # contextlib is memory that this process does without
        os.write(2, f"shardlead parent: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


# --- while it lives --------------------------------------------------------------------------------------------


def listen_to_signals() -> int:
    """From here on every signal that concerns us is a byte to read from the descriptor returned.

    A signal that our starter has us ignore (nohup, a background job) stays ignored, for the worker too.
    """
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *FORWARDED):
        if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD, *FORWARDED))
    return readable


def start(command: list[str], theirs: socket.socket) -> int:
    """Start the worker in a process group of its own (Ctrl-C then reaches it once: by us); its pid."""
    theirs.set_inheritable(True)
    environment = {**os.environ, FD_VARIABLE: str(theirs.fileno())}
    defaults = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores these; a new program should not inherit that
    return os.posix_spawnp(command[0], command, environment, setpgroup=0, setsigmask=(), setsigdef=defaults)


def attend(worker: int, ours: socket.socket, wake: int) -> tuple[int, bytes]:
    """Forward signals and take down the will until the worker is dead; its wait status and its last whole will."""
    reader = WillReader(ours)
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(ours, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():  # no time-out: a worker may live for years, and its death wakes us
            if descriptor == wake:
                for number in os.read(wake, 4_096):
                    if number in FORWARDED:
                        os.kill(worker, number)  # it is not reaped yet, so the pid is its own
            elif not reader.read():
                poll.unregister(ours)
        status = reap(worker)
        if status is not None:
            reader.read()
            return status, reader.last


def reap(worker: int) -> int | None:
    """Collect every child that has died; the worker's status if it is among them. As PID 1 of a container we are
    given orphans that we never started."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == worker:
            found = status
        elif pid == 0:
            return found


class WillReader:
    """The worker's end of the conversation: whole lines, of which the last one counts."""

    def __init__(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        self._ours = ours
        self._rest = b""
        self.last = b""

    def read(self) -> bool:
        """Take what has arrived; False once nothing more can come."""
        while True:
            try:
                data = self._ours.recv(WILL_BYTES_MAX)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                self.last = lines[-1]
            if len(self._rest) > WILL_BYTES_MAX:
                say(f"the worker's last will is longer than {WILL_BYTES_MAX} bytes and is not read on")
                return False


# --- once it is dead -------------------------------------------------------------------------------------------


class CannotRevoke(Exception):
    """Why an endpoint did not revoke the lease."""


def execute(line: bytes, worker: int, how: str) -> None:
    """Revoke the lease that the will names, within REVOKE_TIMEOUT_S, and say what came of it."""
    import json

    try:
        will = json.loads(line)
        lease = None if will["lease"] is None else int(will["lease"])
        is_fenced, endpoints = will.get("fenced") is True, [str(url) for url in will.get("endpoints", ())]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        say(f"worker (pid {worker}) ended by {how}; its last will is not readable, its lease ends by time-out")
        return
    if lease is None:
        return
    subject = f"worker (pid {worker}) ended by {how}; lease {lease:x}"
    if not is_fenced:
        say(f"{subject} ends by time-out, for its work is not fenced")
        return
    began = time.monotonic()
    reason = revoke(lease, endpoints, will)
    if reason:
        say(f"{subject} could not be revoked and ends by time-out: {reason}")
    else:
        say(f"{subject} revoked in {(time.monotonic() - began) * 1_000:.0f} ms")


def revoke(lease: int, endpoints: list[str], will: dict[str, str]) -> str:
    """Ask each endpoint in turn, the next one as soon as one fails or keeps silent for STAGGER_S; "" once the lease is
    gone, else the last reason. Revoking twice is harmless.

    In threads, because looking up a name can take longer than any time-out says.
    """
    import threading

    deadline = time.monotonic() + REVOKE_TIMEOUT_S
    is_revoked, next_turn = threading.Event(), threading.Event()
    reasons = ["no endpoint has answered"]

    def ask(endpoint: str) -> None:
        while not is_revoked.is_set() and time.monotonic() < deadline:
            try:
                revoke_at(endpoint, lease, will)
                is_revoked.set()
            except Exception as error:  # a parent ends with its worker's exit code, whatever an endpoint does
                reasons.append(f"{endpoint}: {str(error) or type(error).__name__}")
            next_turn.set()
            is_revoked.wait(ROUND_PAUSE_S)

    for endpoint in endpoints[:ENDPOINTS_MAX]:
        next_turn.clear()
        threading.Thread(target=ask, args=(endpoint,), daemon=True).start()
        next_turn.wait(STAGGER_S)
        if is_revoked.is_set():
            break
    if endpoints:
        is_revoked.wait(max(0.0, deadline - time.monotonic()))
    return "" if is_revoked.is_set() else reasons[-1]


def revoke_at(endpoint: str, lease: int, will: dict[str, str]) -> None:
    """Return once this endpoint says that the lease is gone. Raises CannotRevoke, OSError and what http raises."""
    token = ""
    if will.get("username"):
        status, answer = post(
            endpoint, "/v3/auth/authenticate", {"name": will["username"], "password": will["password"]}, "", will
        )
        if status != 200 and answer.get("code") != _FAILED_PRECONDITION:  # that: authentication is not switched on
            raise CannotRevoke(f"authentication failed: {answer.get('error', status)}")
        token = str(answer.get("token", ""))
    status, answer = post(endpoint, "/v3/lease/revoke", {"ID": str(lease)}, token, will)
    if status != 200 and answer.get("code") != _NOT_FOUND:
        raise CannotRevoke(str(answer.get("error", f"HTTP status {status}")))


def post(
    endpoint: str, path: str, body: dict[str, str], token: str, will: dict[str, str]
) -> tuple[int, dict[str, object]]:
    """One request to etcd's JSON gateway: the status and the answer."""
    import http.client
    import json
    from urllib.parse import urlsplit

    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        import ssl

        context = ssl.create_default_context(cafile=will.get("ca_file") or None)
        if will.get("cert_file"):
            context.load_cert_chain(will["cert_file"], will.get("key_file") or None)
        connection = http.client.HTTPSConnection(host, port, timeout=TRY_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TRY_TIMEOUT_S)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if token:
        headers["Authorization"] = token
    try:
        connection.request("POST", parts.path.rstrip("/") + path, json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read(ANSWER_BYTES_MAX)
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    return response.status, answer if isinstance(answer, dict) else {}


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: threads may still wait for an endpoint, and nothing is buffered
