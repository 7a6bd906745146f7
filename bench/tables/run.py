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
import json
import pathlib
import subprocess
import sys
import time

try:
    import matplotlib
except ImportError:
    sys.exit(f"run.py: {sys.executable} has no matplotlib (Debian: apt-get install python3-matplotlib, and /usr/bin/python3)")
matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
                            "svg.hashsalt": "lithe"})
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).resolve().parent
COLOURS = ["#1b6ca8", "#d1495b", "#3c8d53", "#8d5a97", "#e08e1b", "#5c6b73"]
STYLE = """
body { font: 16px/1.5 Georgia, serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fdfdfb; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
table { border-collapse: collapse; font: 14px/1.4 sans-serif; } th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e0; }
th { background: #f0f0ea; } .figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 1rem 0; flex: 1 1 26rem; }
code, pre { font: 13px/1.4 monospace; background: #f0f0ea; } pre { padding: .5rem; overflow-x: auto; }
.seen { color: #3c8d53; } .unseen { color: #b3541e; } .small { color: #777; font-size: 13px; }
"""


def commit():
    run = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def make(program, arguments, output):
    """Runs one table program; its JSON with the command that repeats it and the commit, or None."""
    name = program.name.removeprefix("table_")
    target = output / f"{name}.json"
    command = [str(program), *arguments, "--json", str(target)]
    print(f"== {program.name}", flush=True)
    start = time.time()
    target.unlink(missing_ok=True)
    if subprocess.run(command).returncode != 0 or not target.exists():
        print(f"== {program.name} FAILED", flush=True)
        return None
    result = json.loads(target.read_text())
    result["command"] = " ".join(["python3 bench/tables/run.py --only", name, *arguments])
    result["commit"] = commit()
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"== {program.name} {time.time() - start:.0f} s", flush=True)
    return result


def draw(result, figure, path):
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
    for (name, y), colour in zip(levels.items(), COLOURS[::-1] * 4):
        axes.axhline(y, linestyle="--", color=colour, label=str(name))
    names = all(isinstance(x, str) for points in lines.values() for x, _ in points)
    values = [y for points in lines.values() for _, y in points]
    dots = figure["by"] or min(values, default=0) > 0.5 * max(values, default=0)  # bars would cover each other, or all look alike
    for (name, points), colour in zip(lines.items(), COLOURS * 4):
        if names and dots:
            axes.plot([y for _, y in points], [x for x, _ in points], "o", color=colour, label=str(name))
            axes.grid(alpha=0.25)
        elif names:
            axes.barh([x for x, _ in points], [y for _, y in points], color=colour, label=str(name))
        else:
            points = sorted(points)
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color=colour, label=str(name))
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
        axes.grid(alpha=0.25)
    if figure["by"] or levels:
        axes.legend(title=figure["by"], frameon=False)
    axes.set_title(figure["title"], fontsize=11)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def cell(x):
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    return html.escape(str(x))


def section(name, result, output):
    figures = []
    for i, figure in enumerate(result.get("figures", [])):
        path = output / f"{name}_{i}.svg"
        draw(result, figure, path)
        figures.append(f"<figure>{path.read_text()[path.read_text().index('<svg'):]}</figure>")
    rows = "".join("<tr>" + "".join(f"<td>{cell(x)}</td>" for x in row) + "</tr>" for row in result["rows"])
    seen = '<p class="seen">The effect of the paper is seen here.</p>' if result["shown"] else '<p class="unseen">The effect of the paper is not seen at this size.</p>'
    if result["length"] == "quick":
        seen = '<p class="unseen">A quick run: it shows that the program works, not what comes out.</p>'
    return f"""<h2 id="{name}">{html.escape(result["title"])}</h2>
<p>{html.escape(result["question"])} <span class="small">{html.escape(result["source"])}</span></p>
<div class="figures">{"".join(figures)}</div>
<table><tr>{"".join(f"<th>{html.escape(c)}</th>" for c in result["columns"])}</tr>{rows}</table>
<p>{html.escape(result["finding"])}</p>{seen}
<pre>{html.escape(result.get("command", ""))}</pre>
<p class="small">{result["seconds"]:.0f} s, {result["workers"]} threads, seed {result["seed"]}, commit {html.escape(result.get("commit", ""))}, {html.escape(result["machine"])}, {html.escape(result["flags"])}</p>
"""


def render(source, output):
    """The page of all results in `source`."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(source.glob("*.json"))}
    contents = "".join(f'<li><a href="#{name}">{html.escape(r["title"])}</a>: {html.escape(r["finding"])}</li>' for name, r in results.items())
    body = "".join(section(name, r, output) for name, r in results.items())
    page = output / "index.html"
    page.write_text(f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Lithe: the papers at two-core size</title><style>{STYLE}</style>"
                    f"<h1>Lithe: the papers' headlines at the size of a small machine</h1><ul>{contents}</ul>{body}</html>\n")
    print(f"wrote {page}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"), help="build folder with the table programs")
    parser.add_argument("--output", type=pathlib.Path, help="folder for JSON, SVG and the page; default: tables in the build folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tables alone")
    parser.add_argument("--render", type=pathlib.Path, metavar="FOLDER", help="run nothing, draw the page of the results in this folder (into --output)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_const", dest="length", const=["--quick"], default=[])
    length.add_argument("--full", action="store_const", dest="length", const=["--full"])
    parser.add_argument("--workers", help="threads of each program; default: all processors")
    asked = parser.parse_args()
    arguments = asked.length + (["--workers", asked.workers] if asked.workers else [])
    output = asked.output or asked.build / "tables"
    output.mkdir(parents=True, exist_ok=True)
    if asked.render:
        if not any(asked.render.glob("*.json")):
            sys.exit(f"run.py: no results (*.json) in {asked.render}")
        return render(asked.render, output)
    programs = sorted(p for p in (asked.build.resolve() / "bench" / "tables").glob("table_*") if p.is_file())
    if asked.only:
        unknown = set(asked.only) - {p.name.removeprefix("table_") for p in programs}
        if unknown:
            sys.exit(f"run.py: no table named {', '.join(sorted(unknown))} in {asked.build}; built: {', '.join(p.name.removeprefix('table_') for p in programs)}")
        programs = [p for p in programs if p.name.removeprefix("table_") in asked.only]
    if not programs:
        sys.exit(f"run.py: no table programs in {asked.build}; build them first: cmake --build {asked.build} --target tables")
    failed = [p.name for p in programs if make(p, arguments, output) is None]
    render(output, output)
    if failed:
        sys.exit(f"run.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
