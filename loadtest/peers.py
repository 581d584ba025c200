"""The programs that the router is held against, each set up for the same job: three upstreams behind a consistent hash
of the header X-Shard-Key, keep-alive on both sides, no access log.

Law: nothing here is tuned against a peer; where a setting makes it faster and does not change the job, it is set.
"""

import grp
import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtest.processes import LOOPBACK, tool

KEY_HEADER: Final = "X-Shard-Key"
SIZES: Final = (0, 1_024, 65_536, 1_048_576)
IDLE_CONNECTIONS: Final = 600  # to the upstreams: more than the load has


def write_bodies(folder: Path) -> None:
    """The files that the upstream serves: folder/bodies/<size>."""
    bodies = folder / "bodies"
    bodies.mkdir(exist_ok=True)
    for size in SIZES:
        (bodies / str(size)).write_bytes(b"x" * size)


def upstream_command(folder: Path, ports: Sequence[int]) -> list[str]:
    """nginx as the upstream of them all: files from memory, on each of these ports."""
    listen = "\n".join(f"    listen {LOOPBACK}:{port} backlog=4096;" for port in ports)
    config = f"""{_user()}
worker_processes 1;
daemon off;
pid {folder}/upstream.pid;
error_log {folder}/upstream.err warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  open_file_cache max=100 inactive=600s;
  open_file_cache_valid 600s;
  default_type application/octet-stream;
  {_scratch(folder, "upstream")}
  server {{
{listen}
    root {folder}/bodies;
  }}
}}
"""
    path = folder / "upstream.conf"
    path.write_text(config, encoding="utf-8")
    return [tool("nginx"), "-p", str(folder), "-c", str(path)]


def nginx_command(folder: Path, port: int, upstreams: Sequence[int]) -> list[str]:
    """nginx as a proxy."""
    servers = "\n".join(f"    server {LOOPBACK}:{each};" for each in upstreams)
    config = f"""
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.err warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  {_scratch(folder, "nginx")}
  upstream workers {{
    hash $http_x_shard_key consistent;
{servers}
    keepalive {IDLE_CONNECTIONS};
    keepalive_requests 100000000;
  }}
  server {{
    listen {LOOPBACK}:{port} backlog=4096;
    location / {{
      proxy_pass http://workers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }}
  }}
}}
"""
    path = folder / "nginx.conf"
    path.write_text(config, encoding="utf-8")
    return [tool("nginx"), "-p", str(folder), "-c", str(path)]


def haproxy_command(folder: Path, port: int, upstreams: Sequence[int]) -> list[str]:
    """HAProxy as a proxy, one thread."""
    servers = "\n".join(f"  server w{at} {LOOPBACK}:{each}" for at, each in enumerate(upstreams, 1))
    config = f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
  http-reuse always
  option forwardfor
frontend clients
  bind {LOOPBACK}:{port} backlog 4096
  default_backend workers
backend workers
  balance hdr({KEY_HEADER})
  hash-type consistent
{servers}
"""
    path = folder / "haproxy.cfg"
    path.write_text(config, encoding="utf-8")
    return [tool("haproxy"), "-db", "-f", str(path)]


def aiohttp_command(port: int, upstreams: Sequence[int]) -> list[str]:
    """A plain aiohttp reverse proxy on uvloop."""
    return [sys.executable, "-m", "loadtest.plain_proxy", str(port), *map(str, upstreams)]


def _user() -> str:
    """nginx started by root would serve as somebody else, who may not read the folder; the others may not choose."""
    if os.geteuid():
        return ""
    return f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};"


def _scratch(folder: Path, name: str) -> str:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "\n  ".join(f"{kind}_temp_path {folder}/{name}-{kind};" for kind in kinds)
