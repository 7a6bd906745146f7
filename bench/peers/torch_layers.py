"""The layers that torch_peer.py times, in plain PyTorch, as their papers' code or a common port writes them."""
import functools
import math

import torch
import torch.nn.functional as F

FEATURES, HEADS, SUB_KEYS, HALF, TOP_K = 1024, 4, 512, 256, 32
SLOTS = SUB_KEYS * SUB_KEYS

_table = None


def shared_table():
    """1 GiB of value rows, once a process."""
    global _table
    if _table is None:
        _table = torch.empty(SLOTS, FEATURES).uniform_(-1, 1)
    return _table


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


@functools.lru_cache(maxsize=None)
def causal_mask(length):
    return torch.full((length, length), -math.inf).triu(1)


class Residual(torch.nn.Module):
    """A part of a pre-norm block without its residual sum, over sequences [batch, length, features]: causal attention or a feed-forward."""

    def __init__(self, features, heads, feed_forward, bias=False):
        super().__init__()
        self.norm, self.heads, self.feed_forward = torch.nn.LayerNorm(features), heads, feed_forward
        self.up = torch.nn.Linear(features, 4 * features) if feed_forward else torch.nn.Linear(features, 3 * features, bias=bias)
        self.down = torch.nn.Linear(4 * features, features) if feed_forward else torch.nn.Linear(features, features, bias=bias)

    def forward(self, x):
        h = self.up(self.norm(x))
        if self.feed_forward:
            return self.down(F.gelu(h))
        batch, length, features = x.shape
        q, k, v = h.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal_mask(length)
        return self.down((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, features))


class LanguageModel(torch.nn.Module):
    def __init__(self, layers, features=128, heads=4, context=256, vocabulary=256):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocabulary, features), torch.nn.Embedding(context, features)
        self.parts = torch.nn.ModuleList(Residual(features, heads, feed_forward, bias=True) for _ in range(layers) for feed_forward in (False, True))
        self.norm, self.head = torch.nn.LayerNorm(features), torch.nn.Linear(features, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for part in self.parts:
            x = x + part(x)
        return self.head(self.norm(x))


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
        width = features // self.heads
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


class MixtureOfExperts(torch.nn.Module):
    """Experts of two matrices with GELU, each over the rows that chose it."""

    def __init__(self, features=512, hidden=1264, experts=32, top_k=2):
        super().__init__()
        self.top_k, self.router = top_k, torch.nn.Linear(features, experts, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(features, hidden, bias=False), torch.nn.GELU(),
                                                               torch.nn.Linear(hidden, features, bias=False)) for _ in range(experts))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            row, place = (chosen == e).nonzero(as_tuple=True)
            y.index_add_(0, row, self.experts[e](x[row]) * weights[row, place, None])
        return y


class UltraMem(torch.nn.Module):
    """Tucker-decomposed retrieval of rank 2 with two cores, one query for all heads, and one table of values seen as four (arXiv 2411.12364)."""

    def __init__(self, features=512, sub_keys=1352, width=80, heads=2, rank=2, cores=2, top_k=42, expansion=4, value_width=256):
        super().__init__()
        self.sub_keys, self.width, self.top_k, self.expansion, self.value_width = sub_keys, width, top_k, expansion, value_width
        self.rows = sub_keys * sub_keys // expansion
        normal = lambda *shape: torch.nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))
        self.query, self.query_norm, self.key_norm = normal(2 * width, features), torch.nn.Parameter(torch.ones(width)), torch.nn.Parameter(torch.ones(width))
        self.keys = normal(2, heads, rank, sub_keys, width)
        self.cores = torch.nn.Parameter(torch.rand(cores, heads, rank, rank))
        u, _, t = torch.linalg.svd(self.cores.detach().sum(0))
        self.register_buffer("leading", torch.stack([u[..., 0], t[..., 0, :]]).abs())  # [axis, head, rank]
        self.register_buffer("permutation", torch.randperm(sub_keys * sub_keys))
        self.slices = torch.nn.ModuleList(torch.nn.EmbeddingBag(self.rows, value_width // cores, mode="sum", sparse=True) for _ in range(cores))
        self.output = normal(features, expansion * value_width)
        self.unit = None  # the normed keys, which inference makes once

    @staticmethod
    def normed(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def forward(self, x):
        tokens, m, n = x.shape[0], self.top_k, self.sub_keys
        q = self.normed((x @ self.query.t()).view(tokens, 2, self.width), self.query_norm)
        keys = self.unit
        if self.training or keys is None:
            keys = self.normed(self.keys, self.key_norm)
            self.unit = None if self.training else keys
        chosen, factors = [], []
        for axis in range(2):
            scores = (q[:, axis] @ keys[axis].flatten(0, 2).t()).view(tokens, *keys.shape[1:4])  # [token, head, rank, key]
            with torch.no_grad():
                ids = torch.einsum("thrn,hr->thn", scores, self.leading[axis]).topk(m, dim=-1).indices
            chosen.append(ids)
            factors.append(scores.gather(-1, ids.unsqueeze(2).expand(-1, -1, keys.shape[2], -1)))
        left = torch.einsum("thri,chrs->cthsi", factors[0], self.cores)
        grid = (left.transpose(-1, -2) @ factors[1]).flatten(-2)  # [core, token, head, pair]
        with torch.no_grad():
            at = grid.sum(0).topk(m, dim=-1).indices
            address = chosen[0].gather(-1, at // m) * n + chosen[1].gather(-1, at % m)
            place = self.permutation[address.view(tokens, -1)]
            group = place // self.rows + self.expansion * torch.arange(tokens).unsqueeze(1)
            order = group.flatten().argsort(stable=True)
            slots = (place % self.rows).flatten()[order]
            count = torch.bincount(group.flatten(), minlength=tokens * self.expansion)
            start = count.cumsum(0) - count
        weights = grid.gather(-1, at.expand_as(grid[..., :m])).flatten(1)[:, order]
        o = torch.cat([table(slots, start, per_sample_weights=w) for table, w in zip(self.slices, weights)], -1)
        return o.view(tokens, -1) @ self.output.t()


class HeadsAttention(torch.nn.Module):
    """Causal self-attention over one sequence: separate heads, or keys and queries of a shared width with a mixing matrix (arXiv 2006.16362)."""

    def __init__(self, features=768, heads=12, shared=0):
        super().__init__()
        self.heads, self.width, self.shared = heads, features // heads, shared
        self.query, self.key = torch.nn.Linear(features, shared or features), torch.nn.Linear(features, shared or features)
        self.value, self.output = torch.nn.Linear(features, features), torch.nn.Linear(features, features)
        self.mixing = torch.nn.Parameter(torch.randn(heads, shared)) if shared else None

    def split(self, x):
        return x.view(len(x), self.heads, self.width).transpose(0, 1)

    def queries(self, x):
        q = self.query(x) / math.sqrt(self.width)
        return q * self.mixing.unsqueeze(1) if self.shared else self.split(q)

    def forward(self, x):
        length, k = len(x), self.key(x)
        scores = self.queries(x) @ (k.t() if self.shared else self.split(k).transpose(1, 2))
        return self.output(((scores + causal_mask(length)).softmax(-1) @ self.split(self.value(x))).transpose(0, 1).reshape(length, -1))


def local_attention(q, k, v, chunk=64):
    """Causal attention of each chunk to itself and the chunk before; q, k, v [heads, length, width]."""
    chunks = lambda t: t.view(t.shape[0], -1, chunk, t.shape[-1])
    both = lambda t: torch.cat([chunks(F.pad(t, (0, 0, chunk, 0)))[:, :-1], chunks(t)], 2)
    scores = chunks(q) @ both(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores + torch.full((chunk, 2 * chunk), -math.inf).triu(chunk + 1)
    scores[:, 0, :, :chunk] = -math.inf
    return (scores.softmax(-1) @ both(v)).flatten(1, 2)


class ReversibleStack(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) for each block; backward rebuilds the inputs from the outputs (arXiv 2001.04451)."""

    @staticmethod
    def forward(ctx, a, b, blocks, *parameters):
        with torch.no_grad():
            for f, g in blocks:
                a = a + f(b)
                b = b + g(a)
        ctx.blocks = blocks
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx, da, db):
        a, b = ctx.saved_tensors
        for f, g in reversed(ctx.blocks):
            for part in (g, f):
                source = a.detach().requires_grad_()
                with torch.enable_grad():
                    out = part(source)
                out.backward(db)
                # the part that came last is undone; the two streams change places
                a, b, da, db = b - out.detach(), a, db, da + source.grad
        return (da, db, None, *[None] * (len(ctx.needs_input_grad) - 3))


class Decoder(torch.nn.Module):
    """Decoder blocks over a memory, step by step for a batch, each row only as deep as it is told; rows that left give their keys and
    values to the blocks above (arXiv 1910.10073)."""

    def __init__(self, blocks=6, features=256, heads=4, hidden=1024, classes=1024):
        super().__init__()
        linear, norm = torch.nn.Linear, lambda: torch.nn.LayerNorm(features)
        make = lambda: torch.nn.ModuleDict({
            "norm_1": norm(), "query": linear(features, features), "key_value": linear(features, 2 * features), "out": linear(features, features),
            "norm_2": norm(), "cross_query": linear(features, features), "memory": linear(features, 2 * features), "cross": linear(features, features),
            "norm_3": norm(), "up": linear(features, hidden), "down": linear(hidden, features)})
        self.heads, self.blocks = heads, torch.nn.ModuleList(make() for _ in range(blocks))
        self.answers = torch.nn.ModuleList(linear(features, classes) for _ in range(blocks))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def attend(self, q, k, v):
        """q [rows, features], k and v [rows, heads, keys, width]"""
        q = q.view(len(q), self.heads, 1, -1)
        return ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).flatten(1)

    def forward(self, x, memory, exits):
        """x [batch, features] for every step, memory [batch, rows, features], exits [steps, batch]."""
        steps, batch = exits.shape
        cache = [tuple(x.new_empty(batch, self.heads, steps, x.shape[1] // self.heads) for _ in "kv") for _ in self.blocks]
        memories = [tuple(self.split(t).contiguous() for t in b["memory"](memory).chunk(2, -1)) for b in self.blocks]
        for t in range(steps):
            h, logits = x.clone(), x.new_empty(batch, self.answers[0].out_features)
            for n, (b, kept, (mk, mv)) in enumerate(zip(self.blocks, cache, memories)):
                normed = b["norm_1"](h)
                for store, row in zip(kept, b["key_value"](normed).chunk(2, -1)):
                    store[:, :, t] = row.view(batch, self.heads, -1)
                rows = (exits[t] > n).nonzero().flatten()
                if len(rows) == 0:
                    continue
                rows = rows if len(rows) < batch else slice(None)
                y = h[rows]
                y = y + b["out"](self.attend(b["query"](normed[rows]), *(store[rows, :, : t + 1] for store in kept)))
                y = y + b["cross"](self.attend(b["cross_query"](b["norm_2"](y)), mk[rows], mv[rows]))
                y = y + b["down"](F.relu(b["up"](b["norm_3"](y))))
                h[rows] = y
                leave = (exits[t] == n + 1).nonzero().flatten()
                if len(leave):
                    logits[leave] = self.answers[n](h[leave])
        return logits
