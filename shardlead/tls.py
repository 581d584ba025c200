"""Certificates into contexts: towards clients, and both ends of the inner hop, router or smart client to worker.

What it never does: open a connection, or read a setting of its own.

Law: on the inner hop both sides show a certificate of one authority, the fleet's own, and refuse any other; whoever
holds one is trusted, so that authority must sign for nobody else. TLS 1.2 at least. Files are read once, at the start.
"""

import ssl
from dataclasses import dataclass

from shardlead.config import RouterSettings, TlsSettings
from shardlead.errors import CommandError


@dataclass(frozen=True, slots=True)
class WorkerTls:
    """How to connect to workers. `name`: what their certificates must say; "": any of the authority's is good."""

    context: ssl.SSLContext
    name: str


def towards_clients(settings: RouterSettings) -> ssl.SSLContext | None:
    """What a router's port speaks; None: plain HTTP. Raises CommandError."""
    if not settings.tls_cert_file:
        return None
    return _serving(settings.tls_cert_file, settings.tls_key_file, "router.tls_cert_file, router.tls_key_file")


def towards_workers(settings: TlsSettings) -> WorkerTls | None:
    """How routers and smart clients connect to workers; None: plain HTTP. Raises CommandError."""
    if not settings.cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = bool(settings.worker_name)
    _load(context, settings.cert_file, settings.key_file, "tls.cert_file, tls.key_file")
    _trust(context, settings.ca_file)
    return WorkerTls(context, settings.worker_name)


def of_worker(settings: TlsSettings) -> ssl.SSLContext | None:
    """What a worker's port speaks, to holders of a certificate only; None: plain HTTP. Raises CommandError."""
    if not settings.cert_file:
        return None
    context = _serving(settings.cert_file, settings.key_file, "tls.cert_file, tls.key_file")
    context.verify_mode = ssl.CERT_REQUIRED
    _trust(context, settings.ca_file)
    return context


def _serving(cert_file: str, key_file: str, fields: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, cert_file, key_file, fields)
    return context


def _load(context: ssl.SSLContext, cert_file: str, key_file: str, fields: str) -> None:
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: "")  # else OpenSSL would ask the terminal
    except OSError as exc:  # SSLError is one
        raise CommandError(f"no certificate and key in PEM that fit together ({exc}): see {fields}") from exc


def _trust(context: ssl.SSLContext, ca_file: str) -> None:
    try:
        context.load_verify_locations(ca_file)
    except OSError as exc:
        raise CommandError(f"{ca_file} holds no certificates in PEM ({exc}): see tls.ca_file") from exc
