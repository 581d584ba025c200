"""The report's style sheet: light and dark by what the reader's system prefers, print included."""

from typing import Final

WORKER_COLOURS: Final = (
    ("#2f6fd0", "#6ea3f5"),
    ("#d97a0b", "#f0a045"),
    ("#16917f", "#3fc3ae"),
    ("#b83280", "#e879b4"),
    ("#6d4fc4", "#a48cf0"),
    ("#5f8f1f", "#99c653"),
    ("#b4472f", "#e8836b"),
    ("#4c6f91", "#8fb1d1"),
)
"""(light, dark) of each worker in turn; they come round again after eight."""

_HEAT_LIGHT: Final = ("#e3eefa", "#c6dcf3", "#a3c6ea", "#7cabde", "#568fd0", "#3a73bb", "#26599f", "#153f7c")
_HEAT_DARK: Final = ("#16283f", "#1b3a5f", "#214d81", "#2a63a4", "#397cc6", "#5a99de", "#8bbaee", "#c4defa")


def _variables(at: int, heat: tuple[str, ...]) -> str:
    workers = "".join(f"--w{number}:{pair[at]};" for number, pair in enumerate(WORKER_COLOURS))
    return workers + "".join(f"--h{number}:{colour};" for number, colour in enumerate(heat))


_LIGHT: Final = (
    "--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5a6878;--line:#dfe4ea;--grid:#edf0f3;"
    "--good:#14804a;--good-bg:#e3f5ea;--bad:#c0262d;--bad-bg:#fdeaea;--warn:#8a5a00;--warn-bg:#fdf3dc;"
    "--p50:#2f6fd0;--p99:#d97a0b;--max:#c0262d;--none:#c0262d;" + _variables(0, _HEAT_LIGHT)
)
_DARK: Final = (
    "--bg:#0e131a;--card:#161d27;--ink:#e6ebf2;--soft:#93a1b3;--line:#2a3442;--grid:#212a36;"
    "--good:#4fd08b;--good-bg:#12301f;--bad:#ff7b7b;--bad-bg:#3a1719;--warn:#f0c35c;--warn-bg:#33280f;"
    "--p50:#6ea3f5;--p99:#f0a045;--max:#ff7b7b;--none:#ff7b7b;" + _variables(1, _HEAT_DARK)
)

CSS: Final = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;flex-wrap:wrap;gap:6px 16px;align-items:baseline;margin-bottom:4px}
h1{font-size:30px;margin:0;letter-spacing:-.02em}
h2{font-size:19px;margin:0 0 2px;letter-spacing:-.01em}
h3{font-size:14px;margin:18px 0 2px;color:var(--soft);font-weight:600}
p{margin:4px 0 10px}
.soft,.note{color:var(--soft)}
.note{font-size:13.5px;max-width:86ch}
.badge{font-weight:650;font-size:14px;padding:3px 11px;border-radius:99px}
.good{color:var(--good);background:var(--good-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}
.warn{color:var(--warn);background:var(--warn-bg);padding:8px 14px;border-radius:8px;margin:8px 0}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px 14px;margin:16px 0}
.tiles{display:flex;flex-wrap:wrap;padding:0;overflow:hidden}
.tile{flex:1 1 150px;padding:13px 16px;box-shadow:0 0 0 .5px var(--line)}
.tile b{display:block;font-size:24px;font-weight:650;letter-spacing:-.02em;line-height:1.25}
.tile span{color:var(--soft);font-size:13px}
.tile.is-bad b{color:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:600;font-size:13px}
td.n,th.n{text-align:right}
.promises td:first-child{width:86px}
.scroll{max-height:420px;overflow:auto}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--bg);padding:10px 12px;border-radius:8px;margin:6px 0}
summary{cursor:pointer;color:var(--soft);padding:6px 0}
svg{width:100%;height:auto;display:block;margin:6px 0 2px}
svg text{font-size:12px;fill:var(--ink)}
svg .tick{fill:var(--soft)} svg .unit{font-size:11px}
.grid{stroke:var(--grid);fill:none} .axis{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.p50{stroke:var(--p50)} .p99{stroke:var(--p99)} .max{stroke:var(--max);stroke-width:1.2}
svg .label{font-weight:600;stroke:none} svg .label.p50{fill:var(--p50)} svg .label.p99{fill:var(--p99)}
svg .label.max{fill:var(--max)}
.limit{stroke:var(--bad);stroke-dasharray:6 4;fill:none} svg .limit-text{fill:var(--bad)}
.median{stroke:var(--soft);stroke-dasharray:3 3;fill:none} svg .median-text{fill:var(--soft)}
.area{fill:var(--p50);opacity:.16;stroke:none}
.failed{fill:var(--bad)}
.fault path{stroke:var(--bad);stroke-width:1.2;stroke-dasharray:4 3;fill:none}
.fault circle{fill:var(--bad)} svg .fault text{fill:var(--card);font-size:10px;font-weight:700}
.event path{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3;fill:none} .event circle{fill:var(--soft)}
svg .event text{fill:var(--card);font-size:10px;font-weight:700}
.handoff{fill:var(--p50);fill-opacity:.75;background:var(--p50)}
.claim{fill:var(--p99);fill-opacity:.85;background:var(--p99)}
.nobody{fill:var(--none);background:var(--none)}
.legend{display:flex;flex-wrap:wrap;gap:3px 18px;font-size:13px;color:var(--soft);margin:2px 0 6px;padding:0;
list-style:none}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.legend .k{display:inline-block;min-width:17px;height:17px;line-height:17px;border-radius:9px;background:var(--bad);
color:var(--card);text-align:center;font-size:10px;font-weight:700;margin-right:6px;padding:0 4px}
.legend .is-event{background:var(--soft)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:0 28px}
footer{color:var(--soft);font-size:13px;margin-top:18px}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
    + "".join(
        f".w{number}{{fill:var(--w{number});background:var(--w{number})}}" for number in range(len(WORKER_COLOURS))
    )
    + "".join(
        f".heat{number}{{fill:var(--h{number});background:var(--h{number})}}" for number in range(len(_HEAT_LIGHT))
    )
).replace("\n", "")
