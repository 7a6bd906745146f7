#!/usr/bin/env python3
"""Runs lithe_bench, PyTorch and ONNX Runtime in turn on this machine and prints one table of ratios.

    python3 bench/peers/compare.py --bench build/release/bench/lithe_bench

A round measures every case on every side, one after the other; a column is the median of the rounds, a ratio the median of the ratios
of single rounds, so that a machine that changes its speed changes both sides. Peers: Debian's python3-torch (with OpenBLAS, fetched
into the cache folder if the system has only the reference BLAS), and ONNX Runtime by `npm install --ignore-scripts
onnxruntime-node` into the cache folder. A peer that is missing leaves its column empty and says why.

--builds also builds lithe_bench for x86-64-v3 (AVX2) and with Eigen's path alone, and adds their columns. --memory compares peak
memory instead, --long the cores of LSH and of exact causal attention over length.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ORT_VERSION = "1.30.0"
PYTHON = "/usr/bin/python3"  # the one that Debian's packages serve

# Limits, without any code of Lithe: multiply-adds, reading memory in order, weights that stay in the caches, random rows of 4 KiB and 1 KiB.
GEMM, STREAM, CACHED_12, CACHED_32, ROWS, NARROW_ROWS = LIMITS = [
    "limit/gemm", "limit/stream/MiB:2048", "limit/stream/MiB:12", "limit/stream/MiB:32", "limit/random_rows/cols:1024", "limit/random_rows/cols:256"]
PKM = {GEMM: 6.29e6, ROWS: 128 * 4096}
ULTRA_MEM = {GEMM: 2.08e6, NARROW_ROWS: 84 * 1024}
COLLABORATIVE = 4 * 768 * (256 + 768) + 256 * 2 * (12 * 256 + 768)  # 256 shared dimensions, 256 tokens seen on average
LSH = 3 * 2 * 256**2 + 98e3 + 8 * 128 * 4 * 256  # projections, hashing, 8 rounds of windows of 128 keys
EXPERTS, EXPERT_BYTES = 2 * 4 * 512 * 1264, 32 * 8 * 512 * 1264  # FLOPs of two, bytes of all
REVERSIBLE = 6 * (4 * 2 * 256**2 + 64 * 4 * 256 + 4 * 256 * 1024)  # forward
DECODER = 6 * (6 * 2 * 256**2 + 4 * 256 * 1024 + 20 * 4 * 256**2 / 16) + 2 * 256 * 1024
# case: (target ratio to the better peer, what an item takes of each limit: FLOPs or bytes). An item is a token, of top-k a list.
CASES = {
    "top_k/n:512/k:32": (14, {}),
    "gather_sum/rows:262144/cols:1024": (1, {ROWS: 128 * 4096}),
    "product_key_memory/forward/tokens:512": (3.3, PKM),
    "product_key_memory/forward/tokens:64": (2.8, PKM),
    "product_key_memory/forward/tokens:1": (1.8, {CACHED_12: 12.6e6, ROWS: 128 * 4096}),
    "product_key_memory/train/tokens:512": (5, {}),
    "ultra_mem/forward/tokens:512": (1, ULTRA_MEM),
    "ultra_mem/forward/tokens:64": (1, ULTRA_MEM),
    "ultra_mem/train/tokens:512": (1, {}),
    "mixture_of_experts/forward/tokens:512": (1, {GEMM: EXPERTS}),  # experts are read and multiplied at once: the one that takes longer
    "mixture_of_experts/forward/tokens:64": (1, {STREAM: EXPERT_BYTES / 64}),
    "mixture_of_experts/train/tokens:512": (1, {GEMM: 3 * EXPERTS}),
    "feed_forward/forward/tokens:512": (1, {GEMM: 16.78e6}),
    "feed_forward/forward/tokens:1": (1, {CACHED_32: 33.6e6}),
    "attention/exact_causal/length:8192": (3, {GEMM: 8192 * 512}),
    "attention/exact_bidirectional/length:8192": (1, {GEMM: 8192 * 1024}),
    "attention/local/length:16384": (1, {GEMM: 96 * 1024}),
    "attention/lsh_layer/length:16384/rounds:8": (12, {GEMM: LSH}),
    "attention/lsh_layer_train/length:4096/rounds:8": (1, {}),
    "reversible/train/layers:6": (1, {GEMM: 4 * REVERSIBLE}),
    "reversible/train_stored/layers:6": (1, {GEMM: 3 * REVERSIBLE}),
    "collaborative/forward/length:512/shared:0": (1, {GEMM: 8 * 768**2 + 256 * 4 * 768}),
    "collaborative/forward/length:512/shared:256": (1, {GEMM: COLLABORATIVE}),
    "collaborative/training/length:512/shared:256": (1, {GEMM: 3 * COLLABORATIVE}),
    "exits/full_depth/batch:32": (1, {GEMM: DECODER}),
    "exits/slowest_row/batch:32": (1, {}),
    "exits/of_each_row/batch:32": (1, {}),
    "exits/of_each_row/batch:1": (1, {}),
    "language_model/train/layers:3/features:128": (4, {GEMM: 3 * (3 * (8 * 128**2 + 128 * 4 * 128 + 4 * 128 * 512) + 2 * 128 * 256)}),
}
LONG = {4096: 1, 8192: None, 16384: 5, 65536: 18, 262144: None}  # length: target ratio of exact attention to LSH attention
ONNX_LONGEST = 16384  # its scores take 4 GiB there
MEMORY_CASES = ["attention/lsh_layer/length:4096/rounds:8", "attention/lsh_layer/length:16384/rounds:8"]
BUILDS = {"AVX2": "-O3 -march=x86-64-v3 -DNDEBUG", "Eigen": "-O3 -march=native -DLITHE_EIGEN_KERNELS -DNDEBUG"}


class Peer:
    """A program that takes case names and answers with lines of JSON. `missing` says why there is none."""

    def __init__(self, command, env=None, missing=None):
        self.missing, self.process, self.version, self.notes = missing, None, "", {}
        self.command, self.env = command, env
        if missing is None:
            complaints = tempfile.TemporaryFile("w+")
            try:
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True, env=env)
                hello = json.loads(self.process.stdout.readline())
                self.version = " ".join(str(hello[k]) for k in ("version", "cpu") if k in hello)
            except (OSError, ValueError):
                complaints.seek(0)
                self.missing = complaints.read().strip().split("\n")[-1] or f"{command[0]} does not start"

    def measure(self, case):
        if self.missing is not None or case in self.notes:
            return None
        try:
            self.process.stdin.write(case + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.missing = f"its process ended at {case}"
            return None
        if "error" in answer:
            self.notes[case] = answer["error"]
        return answer.get("us_per_token")

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def torch_peer(cache, threads, seconds):
    """PyTorch, with a BLAS that is worth comparing with: without one its products run at some GFLOP/s."""
    env, blas = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads)), "the system's BLAS"
    try:
        found = run(PYTHON, "-c", "import ctypes; ctypes.CDLL('libblas.so.3'); print(next(l.split()[-1] for l in open('/proc/self/maps') if 'blas' in l))")
        if not re.search("openblas|mkl|blis", os.path.realpath(found.strip())):
            if not list(cache.glob("openblas/usr/lib/*/openblas-openmp")):
                cache.mkdir(parents=True, exist_ok=True)
                run("apt-get", "download", "libopenblas0-openmp", cwd=cache)
                run("dpkg", "-x", str(next(cache.glob("libopenblas0-openmp_*.deb"))), str(cache / "openblas"))
            folder = next(cache.glob("openblas/usr/lib/*/openblas-openmp"))
            env["LD_LIBRARY_PATH"] = str(folder)
            found = str(next(folder.glob("libopenblas*-r*.so")))
        blas = os.path.basename(os.path.realpath(found.strip()))
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        blas = f"the reference BLAS (no OpenBLAS: {error}): FIGURES NOT WORTH COMPARING"
    peer = Peer([PYTHON, str(HERE / "torch_peer.py"), "--threads", str(threads), "--seconds", str(seconds)], env)
    peer.version += f", {blas}"
    return peer


def onnx_peer(cache, threads, seconds):
    if not shutil.which("node") or not shutil.which("npm"):
        return Peer([], missing="node and npm are not installed (Debian: apt-get install nodejs npm)")
    try:
        package = cache / "node_modules" / "onnxruntime-node" / "package.json"
        if not package.exists() or json.loads(package.read_text())["version"] != ORT_VERSION:
            cache.mkdir(parents=True, exist_ok=True)
            run("npm", "install", "--ignore-scripts", "--no-save", "--prefix", str(cache), f"onnxruntime-node@{ORT_VERSION}")
        run(PYTHON, str(HERE / "onnx_graphs.py"), str(cache / "graphs"))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().split("\n")[-1]
        return Peer([], missing=reason)
    return Peer(["node", str(HERE / "onnx_peer.js"), str(cache / "graphs"), str(cache / "node_modules"), str(threads), str(seconds)])


class Bench:
    """A lithe_bench program. Values are microseconds an item, of limits GFLOP/s or GB/s."""

    def __init__(self, program, threads, seconds):
        self.program, self.threads, self.seconds, self.context, self.missing, self.labels = program, threads, seconds, {}, set(), {}

    def measure(self, case):
        if case in self.missing:
            return None
        name = f"^{case}/workers:{self.threads}/real_time$"
        done = subprocess.run([str(self.program), f"--benchmark_filter={name}", f"--benchmark_min_time={self.seconds}", "--benchmark_format=json"],
                              capture_output=True, text=True)
        try:
            answer = json.loads(done.stdout)
            self.context, result = answer["context"], answer["benchmarks"][0]
        except (ValueError, IndexError, KeyError):
            self.missing.add(case)
            return None
        if case.startswith("limit/"):
            value = result.get("best_GFLOP/s") or result["best_GB/s"]
            self.labels[case] = max(self.labels.get(case, (0, "")), (value, result.get("label", "")))
            return value
        return 1e6 / result["items_per_second"]

    def describe(self):
        return f"{self.context.get('compiler', '?')}, {self.context.get('flags', '?')}, kernels {self.context.get('kernels', '?')}"


def peak_mib(command, text="", env=None):
    """The operating system's count of a process's largest memory."""
    process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=env)
    process.stdin.write(text)
    process.stdin.close()
    return os.wait4(process.pid, 0)[2].ru_maxrss / 1024


def print_memory(bench, torch):
    """What a case adds to the memory of a process that has loaded its program and nothing else."""
    if torch.missing is not None:
        sys.exit(f"compare: no PyTorch to compare with: {torch.missing}")
    print("| case | Lithe MiB | PyTorch MiB | PyTorch / Lithe |\n|---|---|---|---|")
    for case in MEMORY_CASES:
        filtered = lambda name: [bench.program, f"--benchmark_filter=^{name}$", "--benchmark_min_time=0.01"]
        ours = peak_mib(filtered(f"{case}/workers:{bench.threads}/real_time")) - peak_mib(filtered("nothing"))
        theirs = peak_mib(torch.command, case + "\n", torch.env) - peak_mib(torch.command, "", torch.env)
        print(f"| {case} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.1f} |", flush=True)


def print_long(bench, onnx, rounds):
    """LSH attention with 8 rounds against the better exact attention; the longest one is left out, it takes minutes."""
    samples = {length: [] for length in LONG}
    for _ in range(rounds):
        for length in LONG:
            exact = f"attention/exact_causal/length:{length}"
            samples[length].append([bench.measure(f"attention/lsh/length:{length}/rounds:8"), bench.measure(exact) if length < max(LONG) else None,
                                    onnx.measure(exact) if length <= ONNX_LONGEST else None])
    onnx.close()
    rows = [["length", "LSH us a token", "exact", "ONNX Runtime", "ratio", "target", ""]]
    for length, target in LONG.items():
        ratio = advantage(samples[length])
        rows.append([str(length), *(text(median(column)) for column in zip(*samples[length])), text(ratio), text(target), verdict(ratio, target)])
    print(f"ONNX Runtime: {'none: ' + onnx.missing if onnx.missing else onnx.version}")
    print_table(rows)


def build_variants(threads, seconds):
    benches = {}
    for name, flags in BUILDS.items():
        folder = ROOT / "build" / f"compare-{name.lower()}"
        print(f"building {folder} ({flags})", file=sys.stderr)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                        f"-DCMAKE_CXX_FLAGS_RELEASE={flags}"], check=True, stdout=sys.stderr)
        subprocess.run(["cmake", "--build", str(folder), "--target", "lithe_bench"], check=True, stdout=sys.stderr)
        benches[name] = Bench(folder / "bench" / "lithe_bench", threads, seconds)
    return benches


def text(value, digits=3):
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def advantage(rounds):
    """The median over rounds [ours, *others] of how many times as fast as the best of the others we are, or None."""
    return median([min(x for x in others if x is not None) / ours for ours, *others in rounds if ours is not None and any(others)])


def verdict(ratio, target):
    if ratio is None:
        return ""
    return "PEER WINS" if ratio < 1 else "" if target is None or ratio >= target else "below target"


def row(case, samples, names, limits):
    """The line of a case; the first of `names` is ours."""
    target, takes = CASES[case]
    ours, peers = names[0], ["PyTorch", "ONNX Runtime"]
    ratio = advantage([[s[ours], *(s[p] for p in peers)] for s in samples])
    share, mine = "-", median([s[ours] for s in samples])
    if mine is not None and takes and all(limits[limit] for limit in takes):
        least = sum(amount / limits[limit] for limit, amount in takes.items()) * 1e-3  # nanoseconds to microseconds
        share = f"{100 * least / mine:.0f} %"
    columns = [text(median([s[n] for s in samples])) for n in names + peers]
    return [case, *columns, text(ratio), text(target), share, verdict(ratio, target)]


def print_table(rows):
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for number, r in enumerate(rows):
        print("| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bench", type=pathlib.Path, default=ROOT / "build/release/bench/lithe_bench", help="our program")
    options.add_argument("--builds", action="store_true", help="also build and time the AVX2 and the Eigen-only kernels")
    options.add_argument("--memory", action="store_true", help="the peak memory of long attention instead of times")
    options.add_argument("--long", action="store_true", help="LSH against exact attention over length")
    options.add_argument("--cases", default="", help="regular expression: only these")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=0.5, help="time for a case, side and round")
    options.add_argument("--threads", type=int, default=2, choices=[1, 2], help="those that lithe_bench has cases for")
    options.add_argument("--cache", type=pathlib.Path, default=ROOT / "build/peers", help="where peers are installed")
    options = options.parse_args()

    benches = {"Lithe": Bench(options.bench.resolve(), options.threads, options.seconds)}
    if not options.bench.exists():
        sys.exit(f"compare: {options.bench} does not exist; build the target lithe_bench first")
    if options.builds:
        benches |= build_variants(options.threads, options.seconds)
    peers = {"PyTorch": torch_peer(options.cache.resolve(), options.threads, options.seconds),
             "ONNX Runtime": onnx_peer(options.cache.resolve(), options.threads, options.seconds)}

    if options.memory:
        return print_memory(benches["Lithe"], peers["PyTorch"])
    if options.long:
        return print_long(benches["Lithe"], peers["ONNX Runtime"], options.rounds)
    cases = [c for c in CASES if re.search(options.cases, c)]
    samples, limits = {c: [] for c in cases}, {limit: [] for limit in LIMITS if any(limit in CASES[c][1] for c in cases)}
    for number in range(options.rounds):
        for limit in limits:
            limits[limit].append(benches["Lithe"].measure(limit))
        for case in cases:
            print(f"\rround {number + 1}/{options.rounds}: {case:60}", end="", file=sys.stderr, flush=True)
            samples[case].append({name: side.measure(case) for name, side in {**benches, **peers}.items()})
            time.sleep(0.05)  # idle peers stop spinning
    print("\r" + " " * 80 + "\r", end="", file=sys.stderr)
    for peer in peers.values():
        peer.close()

    context = benches["Lithe"].context
    print(f"machine: {context.get('machine', '?')}, {options.threads} threads, float32, {options.rounds} rounds in turn, medians")
    for name, bench in benches.items():
        print(f"{name}: {bench.describe()}")
    for name, peer in peers.items():
        print(f"{name}: {'none: ' + peer.missing if peer.missing else peer.version}")
    limits = {c: max((v for v in values if v is not None), default=None) for c, values in limits.items()}
    for case, value in limits.items():
        print(f"{case}: {benches['Lithe'].labels[case][1] if value is not None else 'not measured'}")
    print()
    header = ["case, us a token", *benches, "PyTorch", "ONNX Runtime", "ratio", "target", "of limit", ""]
    print_table([header] + [row(c, samples[c], list(benches), limits) for c in cases])
    print("\nAn item of top_k is a list. ratio: better peer / Lithe, above 1 is faster. of limit: its multiply-adds and what it must read,\n"
          "at the limits above, one after the other.")
    for name, peer in peers.items():
        for note in sorted(set(peer.notes.values())):
            print(f"{name}, {note}: {', '.join(case for case in cases if peer.notes.get(case) == note)}")


if __name__ == "__main__":
    main()
