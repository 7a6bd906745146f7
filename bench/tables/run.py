#!/usr/bin/env python3
"""Makes the paper tables at the size of this machine, and one page of figures.

    cmake --build build/release --target tables
    python3 bench/tables/run.py --build build/release            # all tables, then build/release/tables/index.html
    python3 bench/tables/run.py --build build/release --quick    # seconds each: shows that everything works
    python3 bench/tables/run.py --build build/release --only flat_keys --full
    python3 bench/tables/run.py --render bench/tables/results    # a page of the long runs that were kept

Needs python3-matplotlib. Each program prints its table and writes JSON; this adds the command and the commit, draws every figure as SVG
and renders one HTML page on which each figure stands beside the command that made it.
"""
import argparse
import html
import io
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

try:
    import matplotlib
except ImportError:
    sys.exit(f"run.py: {sys.executable} has no matplotlib (Debian: apt-get install python3-matplotlib, and /usr/bin/python3)")
HERE = pathlib.Path(__file__).resolve().parent
INK = "#222222"
# Each series has a colour and a marker; colours are told apart by the colour-blind, too, and have a lighter twin for dark pages.
COLOURS = {"#0072b2": "#5aa9e6", "#d55e00": "#ff8a4c", "#00805d": "#3fc79a", "#b0568a": "#e39ac4",
           "#a87400": "#f0c04a", "#4d4d4d": "#c8c8c8", "#2a9db5": "#8fe0f0", "#5b3f8c": "#b59df0"}
MARKERS = "os^DvPX<>"
FOLDED = 12  # rows that a table shows without being asked
matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lithe", "font.family": "sans-serif",
                            "axes.spines.top": False, "axes.spines.right": False, "savefig.transparent": True,
                            "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "axes.axisbelow": True,
                            **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK)})
import matplotlib.pyplot as plt

STYLE = """
:root { color-scheme: light dark; --ink: #222222; --page: #fdfdfb; --shade: #f0f0ea; --line: #d8d8d2; --small: #666;
        --seen: #00694c; --part: #8a5a00; --unseen: #a8421a; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --page: #17181a; --shade: #25272a; --line: #3c3f43; --small: #a0a0a0;
          --seen: #4fd0a5; --part: #f0c04a; --unseen: #ff9a6a; DARK } }
body { font: 16px/1.5 Georgia, serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink); background: var(--page); }
a { color: var(--s0); } h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
table { border-collapse: collapse; font: 14px/1.4 sans-serif; } .wide { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); } td.text, th.text { text-align: left; }
th { background: var(--shade); } summary { cursor: pointer; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 1rem 0; flex: 1 1 26rem; } svg { max-width: 100%; height: auto; }
code, pre { font: 13px/1.4 monospace; background: var(--shade); } pre { padding: .5rem; overflow-x: auto; }
.seen { color: var(--seen); } .part, .against td { color: var(--part); } .unseen { color: var(--unseen); } .small { color: var(--small); font-size: 13px; }
"""
for mode, tones in {"LIGHT": COLOURS.keys(), "DARK": COLOURS.values()}.items():
    STYLE = STYLE.replace(mode, " ".join(f"--s{i}: {tone};" for i, tone in enumerate(tones)))


def commit():
    run = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def make(program, arguments, output):
    """Runs one table program; its exit status. With status 0 its JSON, the command that repeats it and the commit are in `output`."""
    name = program.name.removeprefix("table_")
    target = output / f"{name}.json"
    fresh = target.with_suffix(".json.new")
    print(f"== {program.name}", flush=True)
    start = time.time()
    status = subprocess.run([str(program), *arguments, "--json", str(fresh)]).returncode
    if status == 0 and not fresh.exists():
        status = 1
    if status != 0:
        kept = f"; {target.name} is that of an earlier run" if target.exists() else ""
        print(f"== {program.name} {'STOPPED' if status == 130 else 'FAILED'}{kept}", flush=True)
        return status
    result = json.loads(fresh.read_text())
    result["command"] = " ".join(["python3 bench/tables/run.py --only", name, *arguments])
    result["commit"] = commit()
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    fresh.replace(target)
    print(f"== {program.name} {time.time() - start:.0f} s", flush=True)
    return 0


def style(styles, name):
    """The colour and the marker of a series, the same in all figures of a table."""
    i = styles.setdefault(name, len(styles))
    return list(COLOURS)[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def draw(result, figure, styles):
    """One figure as SVG. Rows without an x, and those at 0 of a logarithmic axis, are levels: dashed lines across."""
    columns = {name: i for i, name in enumerate(result["columns"])}
    lines, levels = {}, {}
    for row in result["rows"]:
        x, y = row[columns[figure["x"]]], row[columns[figure["y"]]]
        if y is None or (figure.get("only") and row[0] != figure["only"]):
            continue
        if x is None or (x == 0 and figure["log_x"]):
            levels[row[0]] = y
        else:
            lines.setdefault(row[columns[figure["by"]]] if figure["by"] else "", []).append((x, y))
    fig, axes = plt.subplots(figsize=(6, 3.8))
    names = all(isinstance(x, str) for points in lines.values() for x, _ in points)
    values = [y for points in lines.values() for _, y in points]
    dots = figure["by"] or min(values, default=0) > 0.5 * max(values, default=0)  # bars would cover each other, or all look alike
    for name, points in lines.items():
        colour, marker = style(styles, name)
        xs, ys = zip(*(points if names else sorted(points)))
        if names and not dots:
            axes.barh(xs, ys, color=colour, label=str(name))
        elif names:
            axes.plot(ys, xs, marker, color=colour, label=str(name))
        else:
            axes.plot(xs, ys, marker=marker, color=colour, label=str(name))
    for name, y in levels.items():
        axes.axhline(y, linestyle="--", color=style(styles, name)[0], label=str(name))
    if names:
        axes.invert_yaxis()
        axes.set_xlabel(figure["y"])
    else:
        axes.set_xlabel(figure["x"])
        axes.set_ylabel(figure["y"])
        if figure["log_x"]:
            axes.set_xscale("log", base=2)
        if figure["log_y"]:
            axes.set_yscale("log")
    if figure["by"] or levels:  # below the axes, where no line is
        axes.legend(title=figure["by"], frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    axes.set_title(figure["title"], fontsize=11)
    text = io.StringIO()
    fig.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)
    svg = text.getvalue()
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--s{i}, {colour})")
    return svg.replace(INK, f"var(--ink, {INK})")


def decimals(x):
    """Of a number's last digit but two; of 0, none."""
    return 2 - math.floor(math.log10(abs(x))) if x else 0


def cells(column):
    """The texts of a column: three digits of each number, a fourth where it tells the numbers apart, and none beyond what they have."""
    numbers = [x for x in column if isinstance(x, float)]
    apart = decimals(max(numbers, default=0) - min(numbers, default=0))
    exact = next((n for n in range(8) if all(round(x, n) == x for x in numbers)), 8)

    def text(x):
        if x is None:
            return "-"
        if isinstance(x, float):
            n = min(exact, max(decimals(x), min(apart, decimals(x) + 1)))
            return f"{round(x, n):,.{max(n, 0)}f}"
        return f"{x:,}" if isinstance(x, int) else html.escape(str(x))
    return [text(x) for x in column]


def table(result):
    """Rows that go against the effect are marked; a long table is folded."""
    columns = list(zip(*result["rows"]))
    kinds = [' class="text"' if any(isinstance(x, str) for x in column) else "" for column in columns]
    against = set(result["against"])
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, result["columns"]))
    rows = "".join(
        f"<tr{' class=against' if i in against else ''}>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, row))
        + (f"<td>{'✗' if i in against else ''}</td>" if against else "") + "</tr>"
        for i, row in enumerate(zip(*map(cells, columns))))
    text = f'<div class="wide"><table><tr>{head}{"<th></th>" if against else ""}</tr>{rows}</table></div>'
    return text if len(result["rows"]) <= FOLDED else f"<details><summary>{len(result['rows'])} rows</summary>{text}</details>"


def section(name, result, output):
    styles, figures = {}, []
    for i, figure in enumerate(result.get("figures", [])):
        svg = draw(result, figure, styles)
        (output / f"{name}_{i}.svg").write_text(svg)
        figures.append(f'<figure role="img" aria-label="{html.escape(figure["title"])}">{svg[svg.index("<svg"):]}</figure>')
    seen = "unseen" if not result["shown"] or result["length"] == "quick" else "part" if result["against"] else "seen"
    return f"""<h2 id="{name}">{html.escape(result["title"])}</h2>
<p>{html.escape(result["question"])} <span class="small">{html.escape(result["source"])}</span></p>
<p class="{seen}">{html.escape(result["verdict"])}</p><p>{html.escape(result["finding"])}</p>
<div class="figures">{"".join(figures)}</div>
{table(result)}
<pre>{html.escape(result.get("command", ""))}</pre>
<p class="small">{result["seconds"]:.0f} s, {result["workers"]} threads, seed {result["seed"]}, commit {html.escape(result.get("commit", ""))}, {html.escape(result["machine"])}, {html.escape(result["flags"])}</p>
"""


def render(source, output):
    """The page of all results in `source`."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(source.glob("*.json"))}
    contents = "".join(f'<li><a href="#{name}">{html.escape(r["title"])}</a>: {html.escape(r["finding"])}</li>' for name, r in results.items())
    body = "".join(section(name, r, output) for name, r in results.items())
    page = output / "index.html"
    page.write_text(f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Lithe: the papers at two-core size</title><style>{STYLE}</style>"
                    f"<h1>Lithe: the papers' headlines at the size of a small machine</h1><ul>{contents}</ul>{body}</html>\n")
    print(f"wrote {page}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"), help="build folder with the table programs")
    parser.add_argument("--output", type=pathlib.Path, help="folder for JSON, SVG and the page; default: tables in the build folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tables alone")
    parser.add_argument("--render", type=pathlib.Path, metavar="FOLDER", help="run nothing, draw the page of the results in this folder (into --output)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_const", dest="length", const=["--quick"], default=[],
                        help="seconds instead of minutes: shows that everything works, not what comes out")
    length.add_argument("--full", action="store_const", dest="length", const=["--full"], help="as long as it takes")
    parser.add_argument("--workers", help="threads of each program; default: one for each processor that it may use")
    asked = parser.parse_args()
    arguments = asked.length + (["--workers", asked.workers] if asked.workers else [])
    output = asked.output or asked.build / "tables"
    output.mkdir(parents=True, exist_ok=True)
    if asked.render:
        if not any(asked.render.glob("*.json")):
            sys.exit(f"run.py: no results (*.json) in {asked.render}")
        return render(asked.render, output)
    programs = sorted(p for p in (asked.build / "bench" / "tables").glob("table_*") if p.is_file())
    if asked.only:
        unknown = set(asked.only) - {p.name.removeprefix("table_") for p in programs}
        if unknown:
            sys.exit(f"run.py: no table named {', '.join(sorted(unknown))} in {asked.build}; built: {', '.join(p.name.removeprefix('table_') for p in programs)}")
        programs = [p for p in programs if p.name.removeprefix("table_") in asked.only]
    if not programs:
        sys.exit(f"run.py: no table programs in {asked.build}; build them first: cmake --build {asked.build} --target tables")
    signal.signal(signal.SIGINT, lambda *_: None)  # the program that runs hears Ctrl-C too, and ends with status 130
    failed, stopped = [], False
    for program in programs:
        status = make(program, arguments, output)
        stopped = status == 130
        if stopped:
            break
        if status != 0:
            failed.append(program.name)
    if any(output.glob("*.json")):
        render(output, output)
    if failed:
        print(f"run.py: failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(130 if stopped else 1 if failed else 0)


if __name__ == "__main__":
    main()
