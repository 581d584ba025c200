"""wrk, the load generator: run it against a URL with many keys and read what it found.

Law: closed loop: it shows what a proxy costs, not how long a client of a busy system waits (the scenarios do).
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.peers import KEY_HEADER
from loadtest.processes import tool
from shardlead.errors import CommandError

KEYS: Final = 1_000
_SLACK_S: Final = 30.0

_SCRIPT: Final = """
local requests, at, sent, is_traced = {}, 0, 0, %(is_traced)s
init = function(arguments)
  for number = 1, %(keys)d do
    requests[number] = wrk.format("GET", nil, {["%(header)s"] = "customer-" .. number})
  end
end
request = function()
  at = at %% %(keys)d + 1
  if not is_traced then return requests[at] end
  sent = sent + 1
  local trace = string.format("traceparent: 00-0af7651916cd43dd84480000%%08x-b7ad6b7169203331-01", sent)
  return requests[at]:sub(1, -3) .. trace .. "\\r\\n\\r\\n"
end
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\n@{"requests":%%d,"duration_us":%%d,"bad":%%d,"p50_us":%%d,"p99_us":%%d,"max_us":%%d}\\n',
    summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(99), latency.max))
end
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What one run of wrk has seen. `bad`: requests that failed or had another status than 2xx or 3xx."""

    requests: int
    duration_us: int
    bad: int
    p50_us: int
    p99_us: int
    max_us: int


def run(url: str, *, connections: int, duration_s: float, core: int, folder: Path, is_traced: bool = False) -> Found:
    """GET `url` with keys that take turns, over so many connections; with `is_traced` each request has a trace id of
    its own. Raises CommandError."""
    script = folder / "keys.lua"
    blanks = {"keys": KEYS, "header": KEY_HEADER, "is_traced": str(is_traced).lower()}
    script.write_text(_SCRIPT % blanks, encoding="ascii")
    words = ["taskset", "-c", str(core), tool("wrk"), "-t1", f"-c{connections}", f"-d{max(1, round(duration_s))}s"]
    words += ["--timeout", "10s", "-s", str(script), url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=duration_s + _SLACK_S, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("@{")), "")
    if done.returncode != 0 or not line:
        raise CommandError(f"wrk failed against {url}: {(done.stderr or done.stdout).strip()[-500:]}")
    return Found(**json.loads(line[1:]))
