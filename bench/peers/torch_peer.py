#!/usr/bin/python3
"""Times PyTorch on the layers that lithe_bench times, float32.

    echo product_key_memory/forward/tokens:512 | /usr/bin/python3 torch_peer.py --threads 2

Reads case names from stdin, one a line, and answers each with one line of JSON: {"case", "peer", "us_per_token", "runs"}; a case it
does not have gives {"case", "peer", "error"}. What a case needs is built at its first call and kept, so a caller may ask for the
same case again and again, in turn with other programs.
"""
import argparse
import itertools
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from torch_layers import (FEATURES, HEADS, TOP_K, Decoder, HeadsAttention, LanguageModel, LshAttention, MixtureOfExperts, ProductKeyMemory,
                          Residual, ReversibleStack, UltraMem, causal_mask, local_attention, shared_table)


def no_grad(call):
    def run():
        with torch.no_grad():
            call()
    return run


def forward_of(layer, *shape, sets=1):
    """Inference; with several sets over fresh tokens at each call, so that what they pick is in no cache."""
    fresh = itertools.cycle([torch.randn(*shape) for _ in range(sets)])
    layer.eval()
    return no_grad(lambda: layer(next(fresh))), math.prod(shape[:-1])


def training_of(layer, *shape, sets=1):
    """Forward and backward."""
    fresh, upstream = itertools.cycle([torch.randn(*shape, requires_grad=True) for _ in range(sets)]), torch.randn(*shape)

    def step():
        x = next(fresh)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)
    return step, math.prod(shape[:-1])


def cold_sets(tokens):
    return 8 if tokens > 1 else 256


def feed_forward(tokens):
    hidden = 4 * FEATURES
    return forward_of(torch.nn.Sequential(torch.nn.Linear(FEATURES, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, FEATURES)), tokens, FEATURES)


def top_k(n, k):
    lists = 512 * 8
    x = torch.randn(lists, n)
    return no_grad(lambda: x.topk(k, dim=-1)), lists


def gather_sum(rows, cols):
    tokens, table = 512, shared_table()
    picks = itertools.cycle([(torch.randint(rows, (tokens, HEADS * TOP_K)), torch.rand(tokens, HEADS * TOP_K)) for _ in range(8)])

    def run():
        slots, weights = next(picks)
        F.embedding_bag(slots, table, mode="sum", per_sample_weights=weights)
    return no_grad(run), tokens


def attention(length, causal):
    q, k, v = (torch.randn(4, length, 64) for _ in range(3))

    def run():
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(1 / 8)
        if causal:
            scores += causal_mask(length)
        torch.bmm(scores.softmax(-1), v)
    return no_grad(run), length


def local(length):
    q, k, v = (torch.randn(4, length, 64) for _ in range(3))
    return no_grad(lambda: local_attention(q, k, v)), length


def reversible_train(layers, stored):
    """8 sequences of 128 tokens, two streams of 256 features."""
    parts = torch.nn.ModuleList(Residual(256, 4, feed_forward) for _ in range(layers) for feed_forward in (False, True))
    blocks = list(zip(parts[::2], parts[1::2]))
    x = [torch.randn(8, 128, 256, requires_grad=True) for _ in "ab"]
    upstream = [torch.randn(8, 128, 256) for _ in "ab"]

    def step():
        parts.zero_grad(set_to_none=True)
        a, b = x
        a.grad = b.grad = None
        if stored:
            for f, g in blocks:
                a = a + f(b)
                b = b + g(a)
        else:
            a, b = ReversibleStack.apply(a, b, blocks, *parts.parameters())
        torch.autograd.backward((a, b), upstream)
    return step, 8 * 128


def exits(batch, depth, steps=16):
    """Depths as lithe_bench draws them: half of the rows leave after block 1, then half of the rest, and so on; or all blocks."""
    model, x, memory = Decoder().eval(), torch.randn(batch, 256), torch.randn(batch, 20, 256)
    depths = torch.ones(steps, batch, dtype=torch.long)
    for n in range(1, 6):
        depths += (depths == n) & ((torch.rand(steps, batch) < 0.5) | (depth == "full"))
    if depth == "slowest":
        depths = depths.max(1, keepdim=True).values.expand(-1, batch)
    return no_grad(lambda: model(x, memory, depths)), batch * steps


def language_model_train(layers, features):
    batch, context = 16, 256
    model = LanguageModel(layers, features)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(256, (batch, context + 1))

    def step():
        optimiser.zero_grad(set_to_none=True)
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.reshape(-1, 256), ids[:, 1:].reshape(-1)).backward()
        optimiser.step()
    return step, batch * context


FAMILIES = {
    "top_k": lambda p: top_k(p["n"], p["k"]),
    "gather_sum": lambda p: gather_sum(p["rows"], p["cols"]),
    "product_key_memory/forward": lambda p: forward_of(ProductKeyMemory(), p["tokens"], FEATURES, sets=cold_sets(p["tokens"])),
    "product_key_memory/train": lambda p: training_of(ProductKeyMemory(), p["tokens"], FEATURES, sets=4),
    "ultra_mem/forward": lambda p: forward_of(UltraMem(), p["tokens"], 512, sets=cold_sets(p["tokens"])),
    "ultra_mem/train": lambda p: training_of(UltraMem(), p["tokens"], 512, sets=4),
    "mixture_of_experts/forward": lambda p: forward_of(MixtureOfExperts(), p["tokens"], 512, sets=cold_sets(p["tokens"])),
    "mixture_of_experts/train": lambda p: training_of(MixtureOfExperts(), p["tokens"], 512, sets=4),
    "feed_forward/forward": lambda p: feed_forward(p["tokens"]),
    "attention/exact_causal": lambda p: attention(p["length"], True),
    "attention/exact_bidirectional": lambda p: attention(p["length"], False),
    "attention/local": lambda p: local(p["length"]),
    "attention/lsh_layer": lambda p: forward_of(LshAttention(256, 4, p["rounds"]), 1, p["length"], 256),
    "attention/lsh_layer_train": lambda p: training_of(LshAttention(256, 4, p["rounds"]), 1, p["length"], 256),
    "collaborative/forward": lambda p: forward_of(HeadsAttention(shared=p["shared"]), p["length"], 768),
    "collaborative/training": lambda p: training_of(HeadsAttention(shared=p["shared"]), p["length"], 768),
    "reversible/train": lambda p: reversible_train(p["layers"], stored=False),
    "reversible/train_stored": lambda p: reversible_train(p["layers"], stored=True),
    "exits/full_depth": lambda p: exits(p["batch"], "full"),
    "exits/slowest_row": lambda p: exits(p["batch"], "slowest"),
    "exits/of_each_row": lambda p: exits(p["batch"], "drawn"),
    "language_model/train": lambda p: language_model_train(p["layers"], p["features"]),
}


def parse(case):
    """'a/b/n:512/k:32' -> ('a/b', {'n': 512, 'k': 32})"""
    parts = case.split("/")
    return "/".join(p for p in parts if ":" not in p), {k: int(v) for k, v in (p.split(":") for p in parts if ":" in p)}


def measure(run, seconds):
    """Median seconds of a call; two calls at least."""
    times, start = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times), len(times)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seconds", type=float, default=1.0, help="time spent on a case each time it is asked for")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    built = {}
    print(json.dumps({"peer": "pytorch", "version": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()
                      if hasattr(torch.backends, "cpu") and hasattr(torch.backends.cpu, "get_cpu_capability")
                      else next((line.split()[-1] for line in torch.__config__.show().split("\n") if "CPU capability" in line), "")}), flush=True)
    for line in sys.stdin:
        case = line.strip()
        answer = {"case": case, "peer": "pytorch"}
        try:
            family, parameters = parse(case)
            if family not in FAMILIES:
                raise ValueError("no such case")
            if case not in built:
                built[case] = FAMILIES[family](parameters)
                built[case][0]()  # warm-up
            run, items = built[case]
            seconds, answer["runs"] = measure(run, options.seconds)
            answer["us_per_token"] = seconds / items * 1e6
        except (RuntimeError, ValueError, MemoryError) as error:
            answer["error"] = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
