"""Hostile checkpoints and bundles: each is refused with one line of its own, and nothing of it runs or is left behind.

One table of what may be wrong with a folder, and what the command says of it.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.checkpoint_checks import check_tokenizer
from cosmos_export.cli import main as export_command
from cosmos_export.errors import CheckpointError
from cosmos_runtime import MANIFEST_NAME, describe_file
from cosmos_runtime.cli import main as run_command

from ..runtime.tiny_bundles import byte_tokenizer, write_bundle  # noqa: TID252

VOCABULARY = 257
TINY = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 24}
TINY |= {"vocab_size": VOCABULARY, "max_sequence_length": 32}

Spoil = Callable[[Path], object]


class Payload:
    """A pickle that makes a file of the name `ran` where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place / "ran"),)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    from cosmos_export.config import CosmosAdvancedConfig
    from cosmos_export.model.loading import random_checkpoint

    checkpoint = random_checkpoint(CosmosAdvancedConfig(**TINY), name="tiny")
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A small checkpoint with a tokenizer, as it should be."""
    from cosmos_export.config import CosmosAdvancedConfig

    place = tmp_path / "checkpoint"
    save_checkpoint(place, CosmosAdvancedConfig(**TINY), tensors)
    byte_tokenizer().save(str(place / "tokenizer.json"))
    return place


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def set_tokenizer(folder: Path, **changes: Any) -> None:
    document = json.loads(byte_tokenizer().to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**document, **changes}))


def as_pickle(folder: Path, content: Callable[[Path], Any], *, legacy: bool = False) -> None:
    (folder / "model.safetensors").unlink()
    if legacy:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content(folder)))
    else:
        torch.save(content(folder), folder / "pytorch_model.bin")


def as_shards(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder.with_name("elsewhere.safetensors"))
    index = {"weight_map": {"norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replaced(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def a_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def put_around(ids: list[int]) -> dict[str, Any]:
    """A post-processor that puts a token of these ids before every text."""
    token = {"SpecialToken": {"id": "[S]", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"[S]": {"id": "[S]", "ids": ids, "tokens": ["[S]"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": [token, text], "pair": [token, text], "special_tokens": special}


CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    # Weights. A pickle is a program.
    "pickle with a payload": (lambda f: as_pickle(f, Payload), "holds more than tensors and was refused"),
    "old pickle with a payload": (lambda f: as_pickle(f, Payload, legacy=True), "pytorch_model.bin"),
    "payload among tensors": (
        lambda f: as_pickle(f, lambda place: {"norm.weight": torch.ones(16), "x": Payload(place)}),
        "holds more than tensors and was refused",
    ),
    "pickle of something else": (lambda f: as_pickle(f, lambda place: [1, 2]), "not a plain state dict"),
    "wrong shape": (
        lambda f: set_tensors(f, lambda t: t.update({"norm.weight": torch.ones(17)})),
        "norm.weight has shape (17,), expected (16,)",
    ),
    "integers": (
        lambda f: set_tensors(f, lambda t: t.update({"norm.weight": torch.ones(16, dtype=torch.int64)})),
        "norm.weight has dtype",
    ),
    "not a number": (
        lambda f: set_tensors(f, lambda t: t["norm.weight"].fill_(float("nan"))),
        "norm.weight",
    ),
    "infinite": (
        lambda f: set_tensors(f, lambda t: t["layers.0.attention.q_proj.weight"][3].fill_(float("inf"))),
        "layers.0.attention.q_proj.weight",
    ),
    "header beyond the file": (
        lambda f: replaced(f, "model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
        "not a readable safetensors file",
    ),
    "shard in another folder": (lambda f: as_shards(f, "../elsewhere.safetensors"), "files of the same folder"),
    "shard at an absolute path": (lambda f: as_shards(f, "/etc/passwd"), "files of the same folder"),
    "rotary table too short": (
        lambda f: set_tensors(f, lambda t: t.update({"rope.cos": torch.ones(31, 4)})),
        "rope.cos is a rotary table of 31 positions, expected at least max_sequence_length 32",
    ),
    # Configuration.
    "dim of 10^9": (lambda f: set_config(f, dim=10**9), "dim must be at most 65536, got 1000000000"),
    "vocabulary of 10^12": (lambda f: set_config(f, vocab_size=10**12), "vocab_size must be at most 4194304"),
    "a million layers": (lambda f: set_config(f, n_layers=10**6), "n_layers must be at most 1024, got 1000000"),
    "sizes too large together": (
        lambda f: set_config(f, dim=2**16, hidden_dim=2**20, n_layers=1024),
        "2.1e+14 parameters, expected at most 1e+12",
    ),
    "a rotary table of 4 GB": (
        lambda f: set_config(f, max_sequence_length=2**24, head_dim=128),
        "a rotary table of 1073741824 angles",
    ),
    "negative heads": (lambda f: set_config(f, n_heads=-2), "n_heads must be a positive integer, got -2"),
    "no heads": (lambda f: set_config(f, n_kv_heads=0), "n_kv_heads must be a positive integer, got 0"),
    "heads that do not share": (lambda f: set_config(f, n_heads=3, n_kv_heads=2), "n_heads must be a multiple"),
    "odd head_dim": (lambda f: set_config(f, head_dim=7), "head_dim must be even"),
    "sizes of other types": (
        lambda f: set_config(f, dim="16", n_layers=True),
        "dim must be a positive integer, got '16'",
    ),
    "NaN": (lambda f: set_config(f, rope_theta=float("nan")), "rope_theta must be a positive finite number, got nan"),
    "sampling defaults": (
        lambda f: set_config(f, generation={"temperature": "hot"}),
        "generation.temperature: expected",
    ),
    "stop ids outside": (lambda f: set_config(f, generation={"stop_ids": [257]}), "generation.stop_ids must be"),
    "a key twice": (lambda f: replaced(f, "config.json", '{"dim": 16, "dim": 32}'), "key 'dim' is given twice"),
    "nested deep": (lambda f: replaced(f, "config.json", '{"x": ' + "[" * 10**5), "nested deeper than 64 levels"),
    "100 MB of JSON": (
        lambda f: os.truncate(f / "config.json", 100_000_000),
        "100000000 bytes, expected at most 1048576",
    ),
    "a byte order mark": (lambda f: replaced(f, "config.json", b"\xef\xbb\xbf{}"), "byte order mark"),
    "not UTF-8": (lambda f: replaced(f, "config.json", b'{"dim": "\xff"}'), "can't decode byte 0xff"),
    "a number of 5,000 digits": (lambda f: replaced(f, "config.json", '{"dim": ' + "9" * 5000 + "}"), "4300 digits"),
    "a pipe for a configuration": (lambda f: a_pipe(f, "config.json"), "no regular file"),
    # Tokenizer.
    "no tokenizer": (lambda f: replaced(f, "tokenizer.json", "not JSON"), "tokenizer.json: not a tokenizer"),
    "a pipe for a tokenizer": (lambda f: a_pipe(f, "tokenizer.json"), "expected a tokenizer.json"),
    "huge tokenizer": (
        lambda f: os.truncate(f / "tokenizer.json", 100_000_000),
        "at most 67108864 bytes, got 100000000",
    ),
    "more tokens than the model": (
        lambda f: set_tokenizer(f, model={"type": "WordLevel", "vocab": {"a": 0, "b": 257}, "unk_token": "a"}),
        "expected ids from 0 to 256 (the model's vocab_size is 257), got token 'b' with id 257",
    ),
    "special token outside": (
        lambda f: set_tokenizer(f, post_processor=put_around([999_999])),
        "got id 999999 (put around every text)",
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
@pytest.mark.timeout(60)
def test_a_hostile_checkpoint_is_refused_in_one_line(folder: Path, tmp_path: Path, what: str) -> None:
    spoil, words = CHECKPOINTS[what]
    spoil(folder)
    result = invoke(
        export_command, "onnx", "--checkpoint", folder, "--recipe", "fp32", "--verify", "off", "--out", tmp_path / "out"
    )
    assert result.exit_code == 1, result.output
    *progress, line = result.stderr.splitlines()
    assert not [text for text in progress if "error" in text.lower() or "Traceback" in text]
    assert line.startswith("error: ")
    assert words in line
    assert len(line) < 700
    assert not (folder / "ran").exists(), "the payload of the pickle ran"
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_payload_of_the_pickle_is_a_live_one(tmp_path: Path) -> None:
    """The sentinel of the table does appear where a pickle is loaded as pickles are."""
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / "ran").is_dir()


def test_what_is_not_spoilt_is_exported(folder: Path, tmp_path: Path) -> None:
    set_tokenizer(folder, post_processor=put_around([VOCABULARY - 1]))
    set_tensors(folder, lambda t: t.update({"rope.cos": torch.ones(32, 4)}))
    options = ("--recipe", "fp32", "--verify", "off", "--out", tmp_path / "out")
    assert invoke(export_command, "onnx", "--checkpoint", folder, *options).exit_code == 0
    generate = ("generate", tmp_path / "out", "--prompt", "ab", "--max-new-tokens", 2)
    assert invoke(run_command, *generate).exit_code == 0
    set_manifest(tmp_path / "out", "model", "max_sequence_length", value=33)
    refused = invoke(run_command, *generate)
    assert refused.exit_code == 1
    assert "model.max_sequence_length 33, and 'rope.cos' has 32 positions" in refused.stderr


def test_a_tokenizer_that_panics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library's own code fails, what comes out is no Exception."""
    import tokenizers

    class PanicException(BaseException):
        pass

    class Backend:
        @staticmethod
        def from_file(path: str) -> None:
            raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", Backend)
    with pytest.raises(CheckpointError, match="not a tokenizer: it fails inside: index out of bounds"):
        check_tokenizer(Checkpoint.open(folder).tokenizer, VOCABULARY)


def reseal(folder: Path) -> None:
    """The manifest's sizes and hashes as they have to be: what who altered a file would do."""
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    for name in document["files"]:
        entry = describe_file(folder / name)
        document["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    path.write_text(json.dumps(document), encoding="utf-8")


def set_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


def set_manifest(folder: Path, *path: str, value: Any) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(document), encoding="utf-8")


def place_weights_at(model: onnx.ModelProto, location: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


def link_weights_outside(folder: Path) -> None:
    outside = folder.with_name("weights")
    (folder / "model.onnx.data").rename(outside)
    (folder / "model.onnx.data").symlink_to(outside)


BUNDLES: dict[str, tuple[Spoil, str]] = {
    "weights in the folder above": (
        lambda f: set_graph(f, lambda m: place_weights_at(m, "../model.onnx.data")),
        "expected the name of a file beside the graph",
    ),
    "weights at an absolute path": (
        lambda f: set_graph(f, lambda m: place_weights_at(m, "/etc/passwd")),
        "expected the name of a file beside the graph",
    ),
    "weights behind a link": (link_weights_outside, "a symbolic link that leaves the bundle"),
    "an operator of a library": (
        lambda f: set_graph(f, lambda m: setattr(m.graph.node[0], "domain", "com.example")),
        "com.example::Gather",
    ),
    "no graph": (lambda f: (replaced(f, "model.onnx", b"\0" * 64), reseal(f)), "model.onnx"),
    "half a file": (lambda f: os.truncate(f / "model.onnx.data", 100), "bytes, got 100"),
    "a vocabulary of 10^12": (
        lambda f: set_manifest(f, "model", "vocab_size", value=10**12),
        "model.vocab_size: expected an integer, at most 4194304",
    ),
    "a sequence of 10^12": (
        lambda f: set_manifest(f, "model", "max_sequence_length", value=10**12),
        "model.max_sequence_length: expected an integer, at most 16777216",
    ),
    "more tokens than the embedding has": (
        lambda f: set_manifest(f, "model", "vocab_size", value=258),
        "model.vocab_size 258, and 'embedding' has 257 tokens",
    ),
    "settings of no heads": (
        lambda f: set_manifest(
            f, "capabilities", value={"names": ["safety"], "settings": {"safety": {}}, "memory": None}
        ),
        "capabilities.settings.safety.level: missing",
    ),
    "a manifest nested deep": (lambda f: replaced(f, MANIFEST_NAME, "[" * 10**5), "nested deeper than 64 levels"),
    "half a character": (lambda f: set_manifest(f, "name", value="\ud800"), "half of a surrogate pair"),
    "another tokenizer": (
        lambda f: (set_tokenizer(f, post_processor=put_around([257])), reseal(f)),
        "got id 257 (put around every text)",
    ),
}


@pytest.mark.parametrize("what", BUNDLES)
@pytest.mark.timeout(60)
def test_a_hostile_bundle_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    place = write_bundle(tmp_path / "bundle")
    spoil, words = BUNDLES[what]
    spoil(place)
    result = invoke(run_command, "generate", place, "--prompt", "ab", "--max-new-tokens", "1")
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def invoke(command: Any, *arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])
