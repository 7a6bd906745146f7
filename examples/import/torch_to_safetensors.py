#!/usr/bin/python3
"""Turns a PyTorch checkpoint (.bin, .pth, .pt) into a safetensors file:

    torch_to_safetensors.py pytorch_model.bin model.safetensors

Needs only PyTorch (Debian: apt-get install python3-torch). A state dict inside a dict of other things ("model", "state_dict", ...) is
found; tensors that share their memory (tied weights) are written under each of their names. torch.load runs code that a hostile file may
contain: convert only files that you trust.
"""
import argparse
import json
import os
import struct
import sys

import torch

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def tensors_of(checkpoint):
    """The state dict in a checkpoint: the mapping itself if it holds tensors, else the one nested mapping that does."""
    if hasattr(checkpoint, "state_dict"):
        checkpoint = checkpoint.state_dict()
    if not isinstance(checkpoint, dict):
        return {}
    tensors = {str(k): v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if tensors:
        return tensors
    for key in ("model", "state_dict", "model_state_dict", "module", "params", "weights"):
        if key in checkpoint:
            tensors = tensors_of(checkpoint[key])
            if tensors:
                return tensors
    return {}


def raw_bytes(tensor):
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:  # numpy has no bfloat16
        flat = flat.view(torch.int16)
    return flat.numpy().tobytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--strip", default="", help="a prefix to take off the names, for example 'module.'")
    arguments = parser.parse_args()

    tensors = tensors_of(torch.load(arguments.source, map_location="cpu"))
    if not tensors:
        sys.exit(f"{arguments.source}: expected a state dict of tensors, found none")
    header, offset, order = {"__metadata__": {"format": "pt"}}, 0, []
    # larger elements first, so that all data are aligned without gaps
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_quantized:
            sys.exit(f"{arguments.source}: tensor '{name}': expected a dense tensor of plain numbers, found {tensor.dtype}, {tensor.layout}")
        name = name[len(arguments.strip):] if name.startswith(arguments.strip) else name
        if name in header:
            sys.exit(f"{arguments.source}: tensor '{name}': expected once, found twice (after --strip)")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        order.append(tensor)
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = arguments.target + ".partial"
    try:
        with open(partial, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for tensor in order:
                out.write(raw_bytes(tensor))
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, arguments.target)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    print(f"{arguments.target}: {len(order)} tensors, {offset} bytes")


if __name__ == "__main__":
    main()
