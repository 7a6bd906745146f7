#!/usr/bin/python3
"""Times PyTorch on the layers that lithe_bench times, float32.

    echo product_key_memory/forward/tokens:512 | /usr/bin/python3 torch_peer.py --threads 2

Reads case names from stdin, one a line, and answers each with one line of JSON: {"case", "peer", "us_per_token", "runs"}; a case it
does not have gives {"case", "peer", "error"}. What a case needs is built at its first call and kept, so a caller may ask for the
same case again and again, in turn with other programs.
"""
import argparse
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

FEATURES, HEADS, SUB_KEYS, HALF, TOP_K, HIDDEN = 1024, 4, 512, 256, 32, 4096
SLOTS = SUB_KEYS * SUB_KEYS


class ProductKeyMemory(torch.nn.Module):
    """Query network, product keys, weighted sum of value rows, in the way of the published layers."""

    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(FEATURES, HEADS * 2 * HALF)
        self.keys = torch.nn.Parameter(torch.empty(2 * HEADS, HALF, SUB_KEYS).uniform_(-1, 1) / math.sqrt(HALF))
        self.values = torch.nn.EmbeddingBag(SLOTS, FEATURES, mode="sum", sparse=True, _weight=shared_table())

    def forward(self, x):
        tokens = x.shape[0]
        q = self.query(x).view(tokens, 2 * HEADS, HALF).transpose(0, 1)
        scores = torch.bmm(q, self.keys).view(HEADS, 2, tokens, SUB_KEYS)
        best, index = scores.topk(TOP_K, dim=-1)
        pairs = (best[:, 0, :, :, None] + best[:, 1, :, None, :]).view(HEADS, tokens, -1)
        kept, at = pairs.topk(TOP_K, dim=-1)
        slot = (index[:, 0, :, :, None] * SUB_KEYS + index[:, 1, :, None, :]).view(HEADS, tokens, -1).gather(-1, at)
        weight = F.softmax(kept, dim=-1)
        return self.values(slot.transpose(0, 1).reshape(tokens, -1), per_sample_weights=weight.transpose(0, 1).reshape(tokens, -1))


class Block(torch.nn.Module):
    def __init__(self, features, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(features), torch.nn.LayerNorm(features)
        self.qkv, self.out = torch.nn.Linear(features, 3 * features), torch.nn.Linear(features, features)
        self.up, self.down = torch.nn.Linear(features, hidden), torch.nn.Linear(hidden, features)

    def forward(self, x, mask):
        batch, length, features = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, features)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LanguageModel(torch.nn.Module):
    def __init__(self, layers, features=128, heads=4, hidden=512, context=256, vocabulary=256):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocabulary, features), torch.nn.Embedding(context, features)
        self.blocks = torch.nn.ModuleList(Block(features, heads, hidden) for _ in range(layers))
        self.norm, self.head = torch.nn.LayerNorm(features), torch.nn.Linear(features, vocabulary)
        self.register_buffer("mask", torch.full((context, context), -math.inf).triu(1))

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


_table = None


def shared_table():
    """1 GiB of value rows, once a process."""
    global _table
    if _table is None:
        _table = torch.empty(SLOTS, FEATURES).uniform_(-1, 1)
    return _table


def no_grad(call):
    def run():
        with torch.no_grad():
            call()
    return run


def product_key_memory_forward(tokens):
    layer = ProductKeyMemory().eval()
    fresh = [torch.randn(tokens, FEATURES) for _ in range(8 if tokens > 1 else 256)]  # fresh tokens: the value rows are not in a cache
    turn = iter(range(1 << 60))
    return no_grad(lambda: layer(fresh[next(turn) % len(fresh)])), tokens


def product_key_memory_train(tokens):
    layer = ProductKeyMemory()
    fresh = [torch.randn(tokens, FEATURES, requires_grad=True) for _ in range(4)]
    upstream = torch.randn(tokens, FEATURES)
    turn = iter(range(1 << 60))

    def step():
        x = fresh[next(turn) % len(fresh)]
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)
    return step, tokens


def feed_forward(tokens):
    layer = torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, FEATURES)).eval()
    x = torch.randn(tokens, FEATURES)
    return no_grad(lambda: layer(x)), tokens


def top_k(n, k):
    lists = 512 * 8
    x = torch.randn(lists, n)
    return no_grad(lambda: x.topk(k, dim=-1)), lists


def gather_sum(rows, cols):
    tokens, table = 512, shared_table()
    picks = [(torch.randint(rows, (tokens, HEADS * TOP_K)), torch.rand(tokens, HEADS * TOP_K)) for _ in range(8)]
    turn = iter(range(1 << 60))

    def run():
        slots, weights = picks[next(turn) % len(picks)]
        F.embedding_bag(slots, table, mode="sum", per_sample_weights=weights)
    return no_grad(run), tokens


def attention(length, causal):
    q, k, v = (torch.randn(4, length, 64) for _ in range(3))
    mask = torch.full((length, length), -math.inf).triu(1) if causal else None

    def run():
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(1 / 8)
        if causal:
            scores += mask
        torch.bmm(scores.softmax(-1), v)
    return no_grad(run), length


class LshAttention(torch.nn.Module):
    """LSH self-attention in the way of Hugging Face's Reformer: causal, one chunk before, all rounds sorted and cut together."""

    def __init__(self, features, heads, rounds, chunk=64):
        super().__init__()
        self.heads, self.rounds, self.chunk = heads, rounds, chunk
        self.query_key = torch.nn.Linear(features, features, bias=False)
        self.value = torch.nn.Linear(features, features, bias=False)
        self.output = torch.nn.Linear(features, features, bias=False)

    def buckets(self, length):
        e = (2 * (length // self.chunk)).bit_length() - 1
        limit = 2 * max(math.isqrt(length // self.chunk), self.chunk)
        return [2 ** e] if 2 ** e <= limit else [2 ** (e // 2), 2 ** (e - e // 2)]

    def ids(self, q, factors, rotations):
        """q [batch, heads, length, width] -> [batch, heads, rounds, length], the number of the round included."""
        z = torch.einsum("bhld,hdrs->bhrls", q, rotations)
        bucket, step, at = 0, 1, 0
        for f in factors:
            part = z[..., at: at + f // 2]
            bucket = bucket + step * torch.cat([part, -part], -1).argmax(-1)
            step, at = step * f, at + f // 2
        return bucket + step * torch.arange(self.rounds).view(-1, 1)

    def forward(self, x, factors=None, rotations=None):
        batch, length, features = x.shape
        width, window = features // self.heads, 2 * self.chunk
        q = self.query_key(x).view(batch, length, self.heads, width).transpose(1, 2)
        v = self.value(x).view(batch, length, self.heads, width).transpose(1, 2)
        factors = factors or self.buckets(length)
        if rotations is None:
            rotations = torch.randn(self.heads, width, self.rounds, sum(factors) // 2)
        with torch.no_grad():
            order = self.ids(q, factors, rotations).flatten(2).argsort(dim=-1, stable=True)
            undo = order.argsort(dim=-1)
            position = order % length
        take = position.unsqueeze(-1).expand(-1, -1, -1, width)
        chunks = lambda t: t.view(batch, self.heads, -1, self.chunk, *t.shape[3:])
        both = lambda t: torch.cat([t.roll(1, dims=2), t], dim=3)
        sq, sv, t = chunks(q.gather(2, take)), chunks(v.gather(2, take)), chunks(position)
        k = sq * torch.rsqrt(sq.square().mean(-1, keepdim=True) + 1e-6) / math.sqrt(width)
        scores = sq @ both(k).transpose(-1, -2)
        ti, tj = t.unsqueeze(-1), both(t).unsqueeze(-2)
        scores = torch.where(ti < tj, scores.new_tensor(-1e9), scores)
        scores = torch.where(ti == tj, scores.new_tensor(-1e5), scores)
        total = scores.logsumexp(-1, keepdim=True)
        out = ((scores - total).exp() @ both(sv)).flatten(2, 3)
        out = out.gather(2, undo.unsqueeze(-1).expand_as(out)).view(batch, self.heads, self.rounds, length, width)
        total = total.flatten(2).gather(2, undo).view(batch, self.heads, self.rounds, length, 1)
        y = ((total - total.logsumexp(2, keepdim=True)).exp() * out).sum(2)
        return self.output(y.transpose(1, 2).reshape(batch, length, features))


def lsh_layer(length, rounds, train):
    layer = LshAttention(256, 4, rounds)
    x = torch.randn(1, length, 256, requires_grad=train)
    if not train:
        return no_grad(lambda: layer(x)), length
    upstream = torch.randn(1, length, 256)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)
    return step, length


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
    "product_key_memory/forward": lambda p: product_key_memory_forward(p["tokens"]),
    "product_key_memory/train": lambda p: product_key_memory_train(p["tokens"]),
    "feed_forward/forward": lambda p: feed_forward(p["tokens"]),
    "attention/exact_causal": lambda p: attention(p["length"], True),
    "attention/exact_bidirectional": lambda p: attention(p["length"], False),
    "attention/lsh_layer": lambda p: lsh_layer(p["length"], p["rounds"], False),
    "attention/lsh_layer_train": lambda p: lsh_layer(p["length"], p["rounds"], True),
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
                raise ValueError("no such case in PyTorch")
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
