#!/usr/bin/python3
"""Turns a PyTorch checkpoint (.bin, .pth, .pt) into a safetensors file:

    torch_to_safetensors.py pytorch_model.bin model.safetensors

Needs only PyTorch (Debian: apt-get install python3-torch). The model may lie inside other things, as training
programs save it: the one mapping of names to tensors below "state_dict", "model", "module" and the like is taken.
Where there are several (a model and its moving average), --key chooses one by the path that the program prints. What
is left out is said. Tensors that share their memory (tied weights) are written under each of their names. Files are
read as data alone; --trust also runs the code that a file may contain: only for files that you trust.
"""
import argparse
import json
import os
import pickle
import re
import struct
import sys

NESTED = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "params", "weights",
          "ema", "model_ema", "state_dict_ema", "teacher", "student")
TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
         "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


class Refusal(Exception):
    """A sentence for the user."""


def is_mapping(x):
    return hasattr(x, "items") and hasattr(x, "keys")


def unwrapped(x):
    """The state dict of a whole module that was pickled, anything else as it is."""
    return x.state_dict() if not is_mapping(x) and callable(getattr(x, "state_dict", None)) else x


def describe(value, is_tensor):
    if is_tensor(value):
        return f"tensor {list(value.shape)}"
    value = unwrapped(value)
    if is_mapping(value):
        tensors = sum(bool(is_tensor(v)) for v in value.values())
        return f"mapping of {len(value)} entries, {tensors} of them tensors"
    return type(value).__name__


def listing(mapping, is_tensor, most=12):
    """The entries of a mapping, a line each."""
    lines = [f"  {key}: {describe(value, is_tensor)}" for key, value in list(mapping.items())[:most]]
    if len(mapping) > most:
        lines.append(f"  ... and {len(mapping) - most} more")
    return "\n".join(lines)


def at_path(checkpoint, path):
    """What stands at "a/b" in nested mappings; a key may contain a slash itself."""
    here = unwrapped(checkpoint)
    if path == "":
        return here
    if is_mapping(here):
        for key, value in here.items():
            if path == str(key):
                return unwrapped(value)
            if path.startswith(f"{key}/"):
                found = at_path(value, path[len(str(key)) + 1:])
                if found is not None:
                    return found
    return None


def candidates(mapping, is_tensor, path="", depth=0):
    """[(path, mapping)] of the state dicts in a checkpoint: the innermost mappings of tensors below the usual names."""
    found = []
    for key, value in mapping.items():
        value = unwrapped(value)
        if str(key) not in NESTED or not is_mapping(value):
            continue
        here = f"{path}{key}"
        inner = candidates(value, is_tensor, here + "/", depth + 1) if depth < 8 else []
        if inner:
            found += inner
        elif any(is_tensor(v) for v in value.values()):
            found.append((here, value))
    return found


def holds_tensors(value, is_tensor, depth=0):
    """Whether tensors lie in a mapping, however deep."""
    value = unwrapped(value)
    return is_mapping(value) and depth < 8 and any(
        is_tensor(v) or holds_tensors(v, is_tensor, depth + 1) for v in value.values())


def choose(checkpoint, is_tensor, path=None):
    """(path, state dict, names of its entries that are no tensors). Raises Refusal where there is none or several."""
    checkpoint = unwrapped(checkpoint)
    if not is_mapping(checkpoint):
        raise Refusal(f"expected a state dict, found a {type(checkpoint).__name__}")
    if path is not None:
        chosen = at_path(checkpoint, path)
        if not is_mapping(chosen):
            raise Refusal(f"--key {path}: expected a mapping of tensors there; there is:\n"
                          f"{listing(checkpoint, is_tensor)}")
    else:
        found = candidates(checkpoint, is_tensor)
        tensors = [key for key, value in checkpoint.items() if is_tensor(value)]
        if len(found) > 1:
            choices = "\n".join(f"  --key {p}: {describe(m, is_tensor)}" for p, m in found)
            raise Refusal(f"expected one state dict, found several; choose one by --key:\n{choices}")
        nested = [key for key, value in checkpoint.items() if holds_tensors(value, is_tensor)]
        if found:
            path, chosen = found[0]
        elif tensors and not nested:
            path, chosen = "", checkpoint
        else:
            raise Refusal("expected a state dict, alone or as 'state_dict', 'model', ...; choose by --key (--key '' "
                          f"for the whole); there is:\n{listing(checkpoint, is_tensor)}")
    if not any(is_tensor(value) for value in chosen.values()):
        raise Refusal(f"expected tensors{' at ' + path if path else ''}, found none; there is:\n"
                      f"{listing(chosen, is_tensor)}")
    return path, chosen, [str(key) for key, value in chosen.items() if not is_tensor(value)]


def load_refusal(error):
    """The sentence for a file that torch.load does not read."""
    text = str(error)
    signs = ("invalid load key", "truncated", "EOF", "Ran out of input", "central directory")
    damaged = any(sign in text for sign in signs)
    if isinstance(error, pickle.UnpicklingError) and not damaged:
        named = re.search(r"(?:class|GLOBAL) ([\w.]+)", text)
        kind = named.group(1) if named else "options as argparse.Namespace, a whole module, ..."
        return (f"the file holds more than tensors ({kind}), which is read by running code that "
                "the file names: give --trust if you trust where it comes from")
    return f"cannot be read as a PyTorch checkpoint: {text.splitlines()[0] if text else type(error).__name__}"


def layout(tensors, type_of):
    """[(name, tensor, type)] in the order of the file: larger elements first, so that data are aligned without gaps."""
    rows = []
    for name, tensor in tensors.items():
        kind = type_of(tensor)
        if kind not in TYPES:
            raise Refusal(f"tensor '{name}': expected a dense tensor of plain numbers, found {kind}")
        rows.append((name, tensor, TYPES[kind]))
    return sorted(rows, key=lambda row: (-row[1].element_size(), row[0]))


def renamed(tensors, strip):
    """Names as text, without a prefix."""
    result = {}
    for key, tensor in tensors.items():
        name = str(key)
        name = name[len(strip):] if strip and name.startswith(strip) else name
        if name in result or name == "__metadata__":
            raise Refusal(f"tensor '{name}': expected once, and not by this name" if name == "__metadata__" else
                          f"tensor '{name}': expected once, found twice (after --strip)")
        result[name] = tensor
    return result


def shared(tensors, memory_of):
    """Groups of names whose tensors are the same memory."""
    groups = {}
    for name, tensor in tensors.items():
        key = memory_of(tensor)
        if key is not None:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def header_of(rows):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor, kind in rows:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8), offset


def write(target, rows, raw_bytes):
    """Whole or not at all: beside the target, then in its place."""
    text, size = header_of(rows)
    target = os.path.realpath(target)
    partial = f"{target}.partial-{os.getpid()}"
    try:
        with open(partial, "xb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, tensor, _ in rows:
                out.write(raw_bytes(tensor))
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--key", help="where the model lies in the checkpoint, for example 'model' or 'state/ema'")
    parser.add_argument("--strip", default="", help="a prefix to take off the names, for example 'module.'")
    parser.add_argument("--trust", action="store_true",
                        help="read files that hold more than tensors, which may run code of the file")
    arguments = parser.parse_args()
    import torch

    def is_tensor(x):
        return isinstance(x, torch.Tensor)

    def type_of(tensor):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            return f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        return str(tensor.dtype).replace("torch.", "")

    def raw_bytes(tensor):
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.dtype == torch.bfloat16:  # numpy has no bfloat16
            flat = flat.view(torch.int16)
        return flat.numpy().tobytes()

    def memory_of(tensor):
        return None if tensor.numel() == 0 else (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))

    try:
        try:
            checkpoint = torch.load(arguments.source, map_location="cpu", weights_only=not arguments.trust)
        except Exception as error:  # torch.load throws many kinds
            raise Refusal(load_refusal(error)) from None
        path, chosen, others = choose(checkpoint, is_tensor, arguments.key)
        tensors = renamed({key: value for key, value in chosen.items() if is_tensor(value)}, arguments.strip)
        rows = layout(tensors, type_of)
        size = write(arguments.target, rows, raw_bytes)
    except (Refusal, OSError) as refusal:
        sys.exit(f"{arguments.source}: {refusal}")
    print(f"{arguments.target}: {len(rows)} tensors, {size} bytes" + (f", from '{path}'" if path else ""))
    if path and is_mapping(checkpoint):
        rest = [str(key) for key in checkpoint if str(key) != path.split("/")[0]]
        if rest:
            print(f"left out beside it: {', '.join(rest[:12])}{', ...' if len(rest) > 12 else ''}")
    if others:
        print(f"left out, no tensors: {', '.join(others[:12])}{', ...' if len(others) > 12 else ''}")
    strided = [name for name, tensor, _ in rows if not tensor.is_contiguous()]
    if strided:
        print(f"not contiguous, written row by row: {', '.join(strided[:12])}{', ...' if len(strided) > 12 else ''}")
    for names in shared(tensors, memory_of):
        print(f"one tensor, written under each of its names: {', '.join(names)}")


if __name__ == "__main__":
    main()
