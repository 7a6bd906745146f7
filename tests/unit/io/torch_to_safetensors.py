"""What examples/import/torch_to_safetensors.py chooses, says and writes. With PyTorch real files are read, too."""
import argparse
import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import unittest

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../examples/import/torch_to_safetensors.py")
SPEC = importlib.util.spec_from_file_location("torch_to_safetensors", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
sys.dont_write_bytecode = True
SPEC.loader.exec_module(script)
try:
    import torch
except ImportError:
    torch = None


class Tensor:
    """Stands for a tensor of bytes."""

    def __init__(self, data=b"\0", element_size=1, shape=None):
        self.data, self.bytes_each, self.shape = data, element_size, shape or [len(data) // element_size]

    def numel(self):
        return len(self.data) // self.bytes_each

    def element_size(self):
        return self.bytes_each


class Module:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def is_tensor(x):
    return isinstance(x, Tensor)


class Choice(unittest.TestCase):
    weights = {"layer.weight": Tensor(), "layer.bias": Tensor()}

    def chosen(self, checkpoint, path=None):
        found, mapping, others = script.choose(checkpoint, is_tensor, path)
        self.assertIs(mapping, self.weights)
        return found, others

    def refusal(self, checkpoint, path=None):
        with self.assertRaises(script.Refusal) as caught:
            script.choose(checkpoint, is_tensor, path)
        return str(caught.exception)

    def test_a_state_dict_by_itself_is_taken(self):
        self.assertEqual(self.chosen(self.weights), ("", []))
        self.assertEqual(self.chosen(Module(self.weights)), ("", []))

    def test_the_nested_model_is_taken_though_tensors_stand_beside_it(self):
        for key in ("state_dict", "model", "model_state_dict", "module", "params"):
            self.assertEqual(self.chosen({"epoch": 3, key: self.weights, "best_acc1": Tensor()}), (key, []))
        self.assertEqual(self.chosen({"model": Module(self.weights), "args": argparse.Namespace(lr=1)}), ("model", []))
        optimizer = {"state": {0: {"exp_avg": Tensor()}}}
        deeper = {"state_dict": {"model": self.weights}, "optimizer": optimizer}
        self.assertEqual(self.chosen(deeper), ("state_dict/model", []))

    def test_several_models_are_a_refusal_and_a_key_chooses(self):
        checkpoint = {"model": {"w": Tensor()}, "state_dict": self.weights, "epoch": 1}
        text = self.refusal(checkpoint)
        self.assertIn("--key model: mapping of 1 entries, 1 of them tensors", text)
        self.assertIn("--key state_dict: mapping of 2 entries, 2 of them tensors", text)
        self.assertEqual(self.chosen(checkpoint, "state_dict"), ("state_dict", []))
        self.assertIn("--key model_ema", self.refusal({"model": self.weights, "model_ema": {"w": Tensor()}}))
        self.assertIn("--key a/b: expected a mapping of tensors there", self.refusal(checkpoint, "a/b"))
        self.assertEqual(self.chosen({"a": {"b/c": {"d": self.weights}}}, "a/b/c/d"), ("a/b/c/d", []))

    def test_what_is_not_known_is_a_refusal_that_lists_what_there_is(self):
        text = self.refusal({"generator": self.weights, "epoch": 3, "best": Tensor(b"12", 1, [2])})
        for line in ("generator: mapping of 2 entries, 2 of them tensors", "epoch: int", "best: tensor [2]"):
            self.assertIn(line, text)
        self.assertIn("found a list", self.refusal([Tensor()]))
        self.assertIn("found none", self.refusal({"model": self.weights, "x": {"y": 1}}, "x"))
        self.assertIn("... and 8 more", self.refusal({f"part{i}": {"w": Tensor()} for i in range(20)}))
        self.assertIn("epoch: int", self.refusal({"epoch": 3}))

    def test_entries_that_are_no_tensors_are_named(self):
        path, mapping, others = script.choose({"w": Tensor(), "step": 3, "options": {"rate": 0.1}}, is_tensor)
        self.assertEqual((path, others), ("", ["step", "options"]))
        whole = {"w": Tensor(), "generator": {"v": Tensor()}}
        self.assertIn("--key '' for the whole", self.refusal(whole))
        self.assertEqual(script.choose(whole, is_tensor, "")[2], ["generator"])

    def test_names_are_stripped_once_each(self):
        self.assertEqual(list(script.renamed({"module.a": 1, "b": 2}, "module.")), ["a", "b"])
        with self.assertRaisesRegex(script.Refusal, "'a'.*twice"):
            script.renamed({"module.a": 1, "a": 2}, "module.")
        with self.assertRaisesRegex(script.Refusal, "__metadata__"):
            script.renamed({"__metadata__": 1}, "")

    def test_tied_tensors_are_found(self):
        tied = Tensor()
        tensors = {"a": tied, "b": Tensor(), "c": tied, "d": None}
        self.assertEqual(script.shared(tensors, lambda t: None if t is None else id(t)), [["a", "c"]])

    def test_a_file_of_more_than_tensors_is_a_sentence_that_names_the_option(self):
        for text in ("Weights only load failed.\nGLOBAL argparse.Namespace was not an allowed global by default.",
                     "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` may do. "
                     "Unsupported class argparse.Namespace"):
            said = script.load_refusal(pickle.UnpicklingError(text))
            self.assertIn("--trust", said)
            self.assertIn("argparse.Namespace", said)
            self.assertNotIn("\n", said)
        for error in (pickle.UnpicklingError("invalid load key, '<'."), EOFError("Ran out of input"),
                      RuntimeError("failed finding central directory")):
            self.assertNotIn("--trust", script.load_refusal(error))

    def test_the_file_is_written_whole_or_not_at_all(self):
        rows = script.layout({"b": Tensor(b"12345678", 4), "a": Tensor(b"9", 1), "c": Tensor(b"", 8, [0, 3])},
                             lambda t: {1: "uint8", 4: "float32", 8: "int64"}[t.element_size()])
        self.assertEqual([name for name, _, _ in rows], ["c", "b", "a"])
        with self.assertRaisesRegex(script.Refusal, "'x'.*complex64"):
            script.layout({"x": Tensor()}, lambda t: "complex64")
        with tempfile.TemporaryDirectory() as folder:
            target = os.path.join(folder, "x.safetensors")
            self.assertEqual(script.write(target, rows, lambda t: t.data), 9)
            with open(target, "rb") as file:
                text = file.read()
            length = struct.unpack("<Q", text[:8])[0]
            header = json.loads(text[8:8 + length])
            self.assertEqual(header["b"], {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})
            self.assertEqual(text[8 + length:], b"123456789")

            def broken(tensor):
                raise OSError("full")

            with self.assertRaises(OSError):
                script.write(target, rows, broken)
            with open(target, "rb") as file:
                self.assertEqual(file.read(), text)
            self.assertEqual(os.listdir(folder), ["x.safetensors"])


@unittest.skipUnless(torch, "PyTorch is not installed")
class Files(unittest.TestCase):
    def run_script(self, checkpoint, *options):
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, "x.pth"), os.path.join(folder, "x.safetensors")
            torch.save(checkpoint, source)
            command = [sys.executable, SCRIPT, source, target, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self.assertNotIn("Traceback", done.stderr)
            self.assertEqual(done.returncode == 0, os.path.exists(target))
            if done.returncode != 0:
                return done.stderr, {}
            with open(target, "rb") as file:
                text = file.read()
            length = struct.unpack("<Q", text[:8])[0]
            header = json.loads(text[8:8 + length])
            del header["__metadata__"]
            data = text[8 + length:]
            return done.stdout, {name: (entry, data[slice(*entry["data_offsets"])]) for name, entry in header.items()}

    def test_a_training_checkpoint_becomes_its_model(self):
        weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
        state = {"w": weight, "t": weight.t(), "tied": weight, "h": weight.bfloat16(), "n": 3}
        said, tensors = self.run_script({"epoch": 3, "best_acc1": torch.tensor(0.5), "state_dict": state})
        self.assertEqual(sorted(tensors), ["h", "t", "tied", "w"])
        self.assertEqual(tensors["t"][0]["shape"], [3, 2])
        self.assertEqual(tensors["t"][1], weight.t().contiguous().numpy().tobytes())
        self.assertEqual(tensors["h"][0]["dtype"], "BF16")
        for part in ("4 tensors", "from 'state_dict'", "left out beside it: epoch, best_acc1",
                     "left out, no tensors: n", "not contiguous, written row by row: t",
                     "one tensor, written under each of its names: w, tied"):
            self.assertIn(part, said)

    def test_options_in_the_file_need_trust(self):
        checkpoint = {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(rate=0.1)}
        said, _ = self.run_script(checkpoint)
        self.assertIn("--trust", said)
        self.assertIn("Namespace", said)
        self.assertEqual(list(self.run_script(checkpoint, "--trust")[1]), ["w"])

    def test_refusals_are_sentences(self):
        two = {"model": {"w": torch.ones(2)}, "state_dict": {"v": torch.ones(2)}}
        self.assertIn("--key model", self.run_script(two)[0])
        self.assertIn("'w'", self.run_script({"w": torch.ones(2, dtype=torch.complex64)})[0])
        self.assertIn("sparse", self.run_script({"w": torch.ones(2, 2).to_sparse()})[0])


if __name__ == "__main__":
    unittest.main()
