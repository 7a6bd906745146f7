#!/usr/bin/python3
"""Writes the graphs that onnx_peer.js times: the layers of lithe_bench in ONNX, float32, random weights.

    /usr/bin/python3 onnx_graphs.py DIRECTORY

The table of value rows is an input and not a weight: a gigabyte does not have to go through a file.
"""
import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FEATURES, HEADS, SUB_KEYS, HALF, TOP_K, HIDDEN = 1024, 4, 512, 256, 32, 4096
SLOTS, PICKS = SUB_KEYS * SUB_KEYS, HEADS * TOP_K
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
random = np.random.default_rng(0)


class Graph:
    def __init__(self):
        self.nodes, self.constants, self.inputs = [], [], []

    def input(self, name, shape, kind=FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *numbers):
        return self.constant(np.array(numbers, dtype=np.int64))

    def weight(self, *shape):
        return self.constant((random.uniform(-1, 1, shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)).astype(np.float32))

    def op(self, kind, *inputs, outputs=1, **attributes):
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def save(self, path, output, shape):
        self.nodes.append(helper.make_node("Identity", [output], ["y"])) if not self.nodes else self.rename(output)
        graph = helper.make_graph(self.nodes, path.stem, self.inputs, [helper.make_tensor_value_info("y", FLOAT, shape)], self.constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))

    def rename(self, output):
        for node in self.nodes:
            node.output[:] = ["y" if name == output else name for name in node.output]


def weighted_rows(g, slots, weights, values, tokens):
    """slots, weights [T x 128] -> [T x 1024]"""
    rows = g.op("Gather", values, slots, axis=0)
    w = g.op("Reshape", weights, g.ints(tokens, 1, PICKS))
    return g.op("Reshape", g.op("MatMul", w, rows), g.ints(tokens, FEATURES))


def product_key_memory(path, tokens):
    g = Graph()
    x, values = g.input("x", [tokens, FEATURES]), g.input("values", [SLOTS, FEATURES])
    q = g.op("Add", g.op("MatMul", x, g.weight(FEATURES, HEADS * 2 * HALF)), g.weight(HEADS * 2 * HALF))
    q = g.op("Transpose", g.op("Reshape", q, g.ints(tokens, 2 * HEADS, HALF)), perm=[1, 0, 2])
    scores = g.op("MatMul", q, g.weight(2 * HEADS, HALF, SUB_KEYS))
    best, index = g.op("TopK", scores, g.ints(TOP_K), outputs=2, axis=-1)

    def halves(t):
        first, second = g.op("Split", g.op("Reshape", t, g.ints(HEADS, 2, tokens, TOP_K)), outputs=2, axis=1)
        return (g.op("Reshape", first, g.ints(HEADS, tokens, TOP_K, 1)), g.op("Reshape", second, g.ints(HEADS, tokens, 1, TOP_K)))
    flat = g.ints(HEADS, tokens, TOP_K * TOP_K)
    kept, at = g.op("TopK", g.op("Reshape", g.op("Add", *halves(best)), flat), g.ints(TOP_K), outputs=2, axis=-1)
    i, j = halves(index)
    pairs = g.op("Reshape", g.op("Add", g.op("Mul", i, g.ints(SUB_KEYS)), j), flat)
    slots = g.op("GatherElements", pairs, at, axis=-1)
    weights = g.op("Softmax", kept, axis=-1)
    by_token = [g.op("Reshape", g.op("Transpose", t, perm=[1, 0, 2]), g.ints(tokens, PICKS)) for t in (slots, weights)]
    g.save(path, weighted_rows(g, *by_token, values, tokens), [tokens, FEATURES])


def gather_sum(path, tokens):
    g = Graph()
    slots, weights = g.input("slots", [tokens, PICKS], INT64), g.input("weights", [tokens, PICKS])
    g.save(path, weighted_rows(g, slots, weights, g.input("values", [SLOTS, FEATURES]), tokens), [tokens, FEATURES])


def top_k(path, lists):
    g = Graph()
    best, _ = g.op("TopK", g.input("x", [lists, SUB_KEYS]), g.ints(TOP_K), outputs=2, axis=-1)
    g.save(path, best, [lists, TOP_K])


def feed_forward(path, tokens):
    g = Graph()
    hidden = g.op("Relu", g.op("Gemm", g.input("x", [tokens, FEATURES]), g.weight(FEATURES, HIDDEN), g.weight(HIDDEN)))
    g.save(path, g.op("Gemm", hidden, g.weight(HIDDEN, FEATURES), g.weight(FEATURES)), [tokens, FEATURES])


def attention(path, length, causal):
    g = Graph()
    q, k, v = (g.input(name, [1, length, 256]) for name in "qkv")
    y = g.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=4, **({"unidirectional": 1} if causal else {}))
    g.save(path, y, [1, length, 256])


def local_attention(path, length, chunk=64):
    """Causal, each chunk of 64 sees itself and the chunk before; 4 heads of 64."""
    g, n = Graph(), length // chunk
    q, k, v = (g.op("Reshape", g.input(name, [4, length, 64]), g.ints(4, n, chunk, 64)) for name in "qkv")

    def both(t):
        earlier = g.op("Slice", g.op("Pad", t, g.ints(0, 1, 0, 0, 0, 0, 0, 0)), g.ints(0), g.ints(n), g.ints(1))
        return g.op("Concat", earlier, t, axis=2)
    row, column = np.arange(chunk)[:, None], np.arange(2 * chunk)[None, :]
    hidden = np.broadcast_to(column > chunk + row, (n, chunk, 2 * chunk)).copy()
    hidden[0, :, :chunk] = True
    mask = g.constant(np.where(hidden, np.float32(-1e30), np.float32(0))[None])
    scores = g.op("MatMul", g.op("Mul", q, g.constant(np.float32(0.125).reshape(1))), g.op("Transpose", both(k), perm=[0, 1, 3, 2]))
    y = g.op("MatMul", g.op("Softmax", g.op("Add", scores, mask), axis=-1), both(v))
    g.save(path, g.op("Reshape", y, g.ints(4, length, 64)), [4, length, 64])


def heads_attention(path, length, shared, features=768, heads=12):
    """Causal, with projections: separate heads by the fused operator, or keys and queries of a shared width and a mixing matrix."""
    g, width = Graph(), features // heads
    x = g.input("x", [length, features])
    project = lambda t, outputs: g.op("Add", g.op("MatMul", t, g.weight(features, outputs)), g.weight(outputs))
    if not shared:
        q, k, v = (g.op("Reshape", project(x, features), g.ints(1, length, features)) for _ in "qkv")
        y = g.op("Reshape", g.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=heads, unidirectional=1), g.ints(length, features))
    else:
        q = g.op("Mul", g.op("Reshape", project(x, shared), g.ints(1, length, shared)), g.weight(heads, 1, shared))
        scores = g.op("MatMul", q, g.op("Transpose", project(x, shared), perm=[1, 0]))
        mask = g.constant(np.triu(np.full((length, length), -1e30, np.float32), 1))
        v = g.op("Transpose", g.op("Reshape", project(x, features), g.ints(length, heads, width)), perm=[1, 0, 2])
        y = g.op("MatMul", g.op("Softmax", g.op("Add", scores, mask), axis=-1), v)
        y = g.op("Reshape", g.op("Transpose", y, perm=[1, 0, 2]), g.ints(length, features))
    g.save(path, project(y, features), [length, features])


def mixture_of_experts(path, tokens, features=512, hidden=1264, experts=32):
    """Two experts of each token, by the fused operator."""
    g = Graph()
    x = g.input("x", [tokens, features])
    first, second = g.weight(experts, hidden, features), g.weight(experts, features, hidden)
    y = g.op("MoE", x, g.op("MatMul", x, g.weight(features, experts)), first, "", second, domain="com.microsoft", k=2, activation_type="gelu")
    g.save(path, y, [tokens, features])


def ultra_mem(path, tokens, features=512, keys=1352, width=80, heads=2, rank=2, m=42, expansion=4, value_width=256):
    """Tucker-decomposed retrieval with two cores; the table of values is an input."""
    g, picks = Graph(), heads * m
    rows = keys * keys // expansion
    x, values = g.input("x", [tokens, features]), g.input("values", [rows, value_width])
    q = g.op("Reshape", g.op("MatMul", x, g.weight(features, 2 * width)), g.ints(tokens, 2, width))
    mean = g.op("ReduceMean", g.op("Mul", q, q), axes=[-1])
    q = g.op("Div", q, g.op("Sqrt", g.op("Add", mean, g.constant(np.float32(1e-5).reshape(1)))))
    chosen, factors = [], []
    for half in g.op("Split", q, outputs=2, axis=1):
        scores = g.op("Reshape", g.op("MatMul", g.op("Reshape", half, g.ints(tokens, width)), g.weight(width, heads * rank * keys)),
                      g.ints(tokens, heads, rank, keys))
        leading = g.constant(random.uniform(0.5, 1, (1, heads, 1, rank)).astype(np.float32))
        _, ids = g.op("TopK", g.op("Reshape", g.op("MatMul", leading, scores), g.ints(tokens, heads, keys)), g.ints(m), outputs=2, axis=-1)
        chosen.append(ids)
        every_rank = g.op("Expand", g.op("Reshape", ids, g.ints(tokens, heads, 1, m)), g.ints(tokens, heads, rank, m))
        factors.append(g.op("GatherElements", scores, every_rank, axis=-1))
    left = g.op("Transpose", factors[0], perm=[0, 1, 3, 2])
    cores = [g.constant(random.uniform(0, 1, (1, heads, rank, rank)).astype(np.float32)) for _ in range(2)]
    grids = [g.op("Reshape", g.op("MatMul", g.op("MatMul", left, core), factors[1]), g.ints(tokens, heads, m * m)) for core in cores]
    _, at = g.op("TopK", g.op("Add", *grids), g.ints(m), outputs=2, axis=-1)
    i, j = g.op("GatherElements", chosen[0], g.op("Div", at, g.ints(m)), axis=-1), g.op("GatherElements", chosen[1], g.op("Mod", at, g.ints(m)), axis=-1)
    address = g.op("Reshape", g.op("Add", g.op("Mul", i, g.ints(keys)), j), g.ints(tokens, picks))
    place = g.op("Gather", g.constant(random.permutation(keys * keys).astype(np.int64)), address)
    group = g.op("Reshape", g.op("Div", place, g.ints(rows)), g.ints(tokens, 1, picks))
    mine = g.op("Cast", g.op("Equal", group, g.constant(np.arange(expansion).reshape(1, expansion, 1))), to=FLOAT)
    sums = []
    for grid, half in zip(grids, g.op("Split", g.op("Gather", values, g.op("Mod", place, g.ints(rows)), axis=0), outputs=2, axis=2)):
        weights = g.op("Reshape", g.op("GatherElements", grid, at, axis=-1), g.ints(tokens, 1, picks))
        sums.append(g.op("MatMul", g.op("Mul", mine, weights), half))
    o = g.op("Reshape", g.op("Concat", *sums, axis=-1), g.ints(tokens, expansion * value_width))
    g.save(path, g.op("MatMul", o, g.weight(expansion * value_width, features)), [tokens, features])


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for tokens in (1, 64, 512):
        product_key_memory(folder / f"product_key_memory_{tokens}.onnx", tokens)
        feed_forward(folder / f"feed_forward_{tokens}.onnx", tokens)
    gather_sum(folder / "gather_sum.onnx", 512)
    top_k(folder / "top_k.onnx", 512 * 2 * HEADS)
    for length in (4096, 8192, 16384):
        attention(folder / f"attention_causal_{length}.onnx", length, True)
    attention(folder / "attention_bidirectional_8192.onnx", 8192, False)
    local_attention(folder / "attention_local_16384.onnx", 16384)
    for shared in (0, 256):
        heads_attention(folder / f"collaborative_{shared}_512.onnx", 512, shared)
    for tokens in (64, 512):
        ultra_mem(folder / f"ultra_mem_{tokens}.onnx", tokens)
        mixture_of_experts(folder / f"mixture_of_experts_{tokens}.onnx", tokens)


if __name__ == "__main__":
    main()
