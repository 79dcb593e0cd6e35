"""The style sheet of the page: light and dark by the reader's system, and one column on a phone."""

# Eight colours that stay apart on white and on black, also for most who do not see red and green
# apart: blue, orange, green, purple, red, cyan, brown, grey.
_LIGHT = ("#1f6fb2", "#d9730d", "#2b8a57", "#8250c4", "#c93a4b", "#0e8fa3", "#8a5a3c", "#6a7280")
_DARK = ("#6cb2f2", "#f5a555", "#63c78f", "#b99af0", "#f07f8d", "#56c7d9", "#c99a7c", "#a3acb8")


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{value};" for number, value in enumerate(values))


def _classes() -> str:
    """Return what a class c0 to c7 colours in a picture, and b0 to b7 in a legend."""
    rules = []
    for number in range(len(_LIGHT)):
        rules.append(f"polyline.c{number}{{stroke:var(--c{number})}}")
        rules.append(f"circle.c{number}{{fill:var(--c{number})}}")
        rules.append(f".b{number}{{background:var(--c{number})}}")
    return "".join(rules)


_LIGHT_PAPER = (
    "--paper:#fbfbfa;--card:#fff;--ink:#1c2024;--faint:#646c75;--line:#dfe2e6;--grid:#eceef1;"
    "--link:#1b5fa8;--warn:#a83a10;--warn-paper:#fdf0e8;"
)
_DARK_PAPER = (
    "--paper:#14171a;--card:#1b1f24;--ink:#e4e7eb;--faint:#9aa4af;--line:#333a42;--grid:#272d34;"
    "--link:#7ab8f5;--warn:#ffb27d;--warn-paper:#33241a;"
)

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT_PAPER}{_colours(_LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_DARK_PAPER}{_colours(_DARK)}}}}}"
    + _classes()
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 20px 60px}
h1{font-size:24px;margin:8px 0 2px;overflow-wrap:anywhere}
h2{font-size:18px;margin:34px 0 10px}
h3{font-size:15px;margin:18px 0 6px;overflow-wrap:anywhere}
a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 0}
p{margin:6px 0}
.note{color:var(--faint);font-size:13px}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
figure{margin:0;padding:10px 12px 8px;background:var(--card);border:1px solid var(--line);
  border-radius:8px;min-width:0}
figcaption{font-weight:600;font-size:14px}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:12.5px;color:var(--faint);min-height:20px}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{overflow-wrap:anywhere}
i.bar,i.dot{display:inline-block;margin-right:5px;vertical-align:middle}
i.bar{width:14px;height:3px;border-radius:2px}
i.dot{width:8px;height:8px;border-radius:50%}
svg.chart{display:block;width:100%;height:auto}
.chart text{font-size:10.5px;fill:var(--faint)}
.chart .end{text-anchor:end}
.chart .mid{text-anchor:middle}
.chart path{fill:none;stroke:var(--line)}
.chart .grid{stroke:var(--grid)}
.chart polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
.chart polyline.single{stroke-width:1;opacity:.28}
.chart polyline.held{stroke-width:1.3}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);
  vertical-align:top;max-width:420px;overflow-wrap:break-word}
.tight td,.tight th{white-space:nowrap}
th{color:var(--faint);font-weight:500}
ul.remarks{list-style:none;margin:0;padding:0;display:grid;gap:8px}
.remarks li{display:flex;gap:10px;padding:8px 12px;background:var(--card);
  border:1px solid var(--line);border-radius:8px}
.remarks li.warning{background:var(--warn-paper);border-color:var(--warn)}
.remarks i{flex:none;width:20px;height:20px;margin-top:1px;border-radius:50%;text-align:center;
  font:600 13px/20px system-ui,sans-serif;background:var(--line)}
.remarks .warning i{background:var(--warn);color:var(--warn-paper)}
details{margin:8px 0;color:var(--faint);font-size:13.5px}
.remarks p{margin:0 0 2px}
.remarks .read{font-size:13px;color:var(--faint)}
.sample{color:var(--ink)}
details table{color:var(--ink)}
summary{cursor:pointer}
.sample{margin:0 0 12px;padding:10px 12px;background:var(--card);border:1px solid var(--line);
  border-radius:8px}
.sides{display:grid;gap:4px 20px;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
pre{margin:2px 0;white-space:pre-wrap;overflow-wrap:anywhere;
  font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre.prompt{color:var(--faint);margin-bottom:8px}
"""
)
