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


if __name__ == "__main__":
    main()
