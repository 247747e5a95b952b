"""Cases that the fuzzer or a reviewer has found, by name: (reader, what makes the case)."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from tests.checkpoint.directories import CONFIG, model_tensors
from tests.fuzz import distributed, token_files, tokenizing
from tests.fuzz.archives import _EVIL, Archive, Record, _in_a_tar, records_of
from tests.fuzz.conversions import ConvertCase
from tests.fuzz.directories import Files, Special, hub_seeds, megatron_seed, torch_bytes
from tests.fuzz.distributed import core_seed
from tests.fuzz.documents import ALIASES
from tests.fuzz.pickles import _KNOTS
from tests.fuzz.readers import _legacies, _zips


def _knot(number: int) -> bytes:
    return _KNOTS[number](20000) + b"."


def _twice() -> bytes:
    records = records_of(_zips()[0])
    return Archive([replace(records[0], data=_EVIL), *records]).build()


def _bomb() -> bytes:
    records = records_of(_zips()[0])
    root = records[0].name.partition(b"/")[0]
    return Archive([*records, Record(root + b"/byteorder", b"little" + b"\0" * 10**8, method=12)]).build()


def _third_pickle() -> bytes:
    """Code in the pickle that says which machine wrote the file."""
    content = _legacies()[0]
    start = content.index(b"\x80\x02}", 20)
    return content[:start] + _EVIL[:-1] + b"0" + content[start + 2 :]


def _expanded() -> Files:
    """Tensors of 2**28 rows that are one element."""
    config = {**CONFIG, "n_layer": 1, "n_inner": 2**28}
    small = model_tensors({**CONFIG, "n_layer": 1, "n_inner": 4})
    tensors = {
        name: torch.zeros(1).expand([2**28 if size == 4 and "mlp" in name else size for size in tensor.shape])
        for name, tensor in small.items()
    }
    return {"config.json": json.dumps(config).encode(), "pytorch_model.bin": torch_bytes(tensors)}


def _training(**files: bytes) -> Files:
    from tests.fuzz.training import healthy

    names = {"metadata": "optimizer/.metadata", "random": "random_state_0.pt"}
    changed = {names[name]: content for name, content in files.items()}
    return {name: content for name, content in {**healthy("checkpoint"), **changed}.items() if name != "checksums.json"}


def _converted(files: Files, to: str = "hub") -> ConvertCase:
    return ConvertCase(files, {"to": to, "dry_run": False, **({} if to == "hub" else {"tp_size": 2})})


def _layers_of_nothing(tensors: int, layers: int) -> Files:
    """Tensors of many layers, none of which has an element, so that they take no bytes."""
    old, nothing = distributed.content("stacked"), torch.zeros(layers, 0)
    names = [f"{number}.layers.x" for number in range(tensors)]
    shapes = {**old.shapes, **dict.fromkeys(names, (layers, 0))}
    changed = replace(old, shapes=shapes, chunks={**old.chunks, **{name: [((0, 0), nothing)] for name in names}})
    return distributed.written("stacked", changed)


def _grid_of_chunks() -> Files:
    """A tensor of 27,000 elements, each in a chunk of its own."""
    old, name, one = distributed.content("stacked"), "x", torch.Size((1, 1, 1))

    def change(metadata: dcp.Metadata) -> None:
        chunks = [dcp.ChunkStorageMetadata(torch.Size(offset), one) for offset in product(range(30), repeat=3)]
        size = torch.Size((30, 30, 30))
        metadata.state_dict_metadata[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(), size, chunks)

    return distributed.written("stacked", replace(old, change_metadata=change))


def _embedding_without_rows() -> Files:
    """The word embeddings are a single number."""
    old, name = distributed.content("stacked"), "embedding.word_embeddings.weight"
    changed = replace(old, shapes={**old.shapes, name: ()}, chunks={**old.chunks, name: [((), torch.zeros(()))]})
    return distributed.written("stacked", changed)


def _name_that_is_a_knot() -> Files:
    """The index has tuples that share their halves where a chunk has the name of its tensor."""
    files, name = distributed.written("stacked", distributed.content("stacked")), "iter_0001000/.metadata"
    content = files[name]
    assert isinstance(content, bytes)
    pickled = re.sub(rb"(?s)fqn\x94h.", b"fqn\x94" + _knot(0)[:-1], content[11:], count=1)
    return {**files, name: content[:3] + struct.pack("<Q", len(pickled)) + pickled}  # as long as the frame says


def _complete(**files: bytes | Special) -> Files:
    """A directory of tokens whose tokenizer has other files."""
    return {**tokenizing.complete_directory(), **{f"out/{name}.json": content for name, content in files.items()}}


def _tokenizer(**changes: Any) -> bytes:
    """A tokenizer for which the tokenizers library has an error of its own."""
    content = tokenizing.complete_directory()["out/tokenizer.json"]
    assert isinstance(content, bytes)
    return json.dumps({**json.loads(content), **changes}).encode()


_TWO_SEQUENCES = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
_PANIC = {"type": "TemplateProcessing", "single": _TWO_SEQUENCES, "pair": _TWO_SEQUENCES, "special_tokens": {}}


def _interrupted(name: str, change: Callable[[bytes], bytes | Special]) -> Files:
    """Interrupted work of which one file was changed."""
    files, path = tokenizing.interrupted_directory(), f".out.incomplete/{name}"
    content = files.get(path, b"")
    assert isinstance(content, bytes)
    return {**files, path: change(content)}


def _fewer_tokens(journal: bytes) -> bytes:
    """The journal knows of one token less."""
    return re.sub(rb"(\[\d+, \d+, )(\d+)", lambda found: found[1] + b"%d" % (int(found[2]) - 1), journal)


def _row_of_no_text() -> Files:
    files, name = tokenizing.data_sets()[0], "saved/data-00000-of-00001.arrow"
    content = files[name]
    assert isinstance(content, bytes)
    return {**files, name: content.replace(b"One text", b"One \xffext")}


_DOTTED = b"\x80\x04X\x1a\0\0\0megatron.core._rank_utils\0X\x09\0\0\0os.system\x93."
_BROKEN_TOKENIZER = b'{"model": {"vocab": {"a": 0}, "vocab": {}}}'

FOUND: dict[str, tuple[str, Callable[[], Any]]] = {
    **{f"knot {number}": ("pickle", partial(_knot, number)) for number in range(len(_KNOTS))},
    "memo far away": ("pickle", lambda: b"\x80\x02Nr\xff\xff\xff\x7f."),
    "long text that is not there": ("pickle", lambda: b"\x80\x02X\xff\xff\xff\x7f."),
    "longer text that is not there": ("pickle", lambda: b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."),
    "long number that is not there": ("pickle", lambda: b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "number of many digits": ("pickle", lambda: b"L" + b"7" * 5000 + b"L\n."),
    "many marks": ("pickle", lambda: b"(" * 10000 + b"."),
    "long line": ("pickle", lambda: b"c" + b"x" * 10**6 + b"\n"),
    "dotted attribute": ("pickle", lambda: _DOTTED),
    "two pickles of one name": ("torch-file", _twice),
    "compressed byte order": ("torch-file", _bomb),
    "code in the third pickle": ("torch-file", _third_pickle),
    "tar and legacy file in one": ("torch-file", lambda: _in_a_tar(_legacies()[0])),
    "metadata twice": ("safetensors", lambda: _safetensors(b'{"__metadata__": {}, "__metadata__": {"a": "b"}}')),
    "size that overflows": (
        "safetensors",
        lambda: _safetensors(b'{"a": {"dtype": "U8", "shape": [4294967296, 4294967296, 0], "data_offsets": [0, 0]}}'),
    ),
    "FIFO": ("inspect", lambda: {**hub_seeds()["bin"], "pytorch_model.bin": Special("fifo")}),
    "endless configuration": ("inspect", lambda: {**hub_seeds()["hub"], "config.json": Special("link", "/dev/zero")}),
    "many heads": (
        "dry-run",
        lambda: _dry({**hub_seeds()["hub"], "config.json": json.dumps({**CONFIG, "n_head": 2**30}).encode()}),
    ),
    "one element as a model": ("convert-hub", lambda: _converted(_expanded())),
    "large tracker": (
        "inspect",
        lambda: {**megatron_seed("megatron"), "latest_checkpointed_iteration.txt": Special("zeros", size=2**30)},
    ),
    "architectures that are no list": (
        "inspect",
        lambda: {**megatron_seed("megatron"), "config.json": b'{"num_attention_heads": 8, "architectures": 1.5}'},
    ),
    "large README": (
        "convert-hub",
        lambda: _converted({**hub_seeds()["hub"], "README.md": Special("zeros", size=2**30)}),
    ),
    "link out of the source": (
        "convert-hub",
        lambda: _converted({**hub_seeds()["hub"], "LICENSE": Special("link", "../secret")}),
    ),
    "tokenizer that is not read again": (
        "convert-hub",
        lambda: _converted({**hub_seeds()["hub"], "tokenizer.json": _BROKEN_TOKENIZER}, "megatron-lm"),
    ),
    "aliases of aliases": (
        "inspect",
        lambda: {**core_seed("bridge"), "iter_0001000/run_config.yaml": ALIASES.encode()},
    ),
    "layers beyond a limit": ("convert-core", lambda: _converted(_layers_of_nothing(1, 10**6))),
    "grid of chunks": ("inspect", _grid_of_chunks),
    "embedding without rows": ("inspect", _embedding_without_rows),
    "name that is a knot": ("inspect", _name_that_is_a_knot),
    "layers of nothing": ("inspect", lambda: _layers_of_nothing(200, 10**5)),
    "code in a checkpoint's metadata": ("training", lambda: _training(metadata=_EVIL)),
    "random state of nothing": ("training", lambda: _training(random=torch_bytes([]))),
    "random state of another shape": ("training", lambda: _training(random=torch_bytes({"python": (3, (1,), None)}))),
}
FOUND |= {
    "documents beyond 64 bits": ("token-files", lambda: token_files.pair(token_files.documents_around())),
    "sequences beyond 64 bits": ("token-files", lambda: token_files.pair(token_files.sequences_around("TNTIDX"))),
    "tokenizer of no kind": ("token-directory", lambda: {"out/tokenizer.json": _tokenizer(model=1)}),
    "tokenizer that panics": ("token-directory", lambda: _complete(tokenizer=_tokenizer(post_processor=_PANIC))),
    "nested tokenizer": ("token-directory", lambda: _complete(tokenizer_config=b"[" * 3000)),
    "length that is no number": (
        "token-directory",
        lambda: _complete(tokenizer_config=b'{"tokenizer_class": "GPT2Tokenizer", "model_max_length": "x"}'),
    ),
    "half a character in a tokenizer": (
        "token-directory",
        lambda: _complete(tokenizer_config=b'{"tokenizer_class": "GPT2Tokenizer", "x": "\\ud800"}'),
    ),
    "large tokenizer": ("token-directory", lambda: _complete(tokenizer_config=Special("zeros", size=2**30))),
    "journal that was cut": ("token-directory", lambda: _interrupted("journal", lambda content: content[:60])),
    "journal of nothing": ("token-directory", lambda: _interrupted("journal", lambda content: b"{}")),
    "journal that is no text": ("token-directory", lambda: _interrupted("journal", lambda content: b"\xff" * 99)),
    "journal of fewer tokens": ("token-directory", lambda: _interrupted("journal", _fewer_tokens)),
    "journal that is a pipe": ("token-directory", lambda: _interrupted("journal", lambda content: Special("fifo"))),
    "other tokens": (
        "token-directory",
        lambda: _interrupted("out/tokens.bin", lambda content: b"\7" + content[1:]),
    ),
    "other lengths": ("token-directory", lambda: _interrupted("lengths", lambda content: b"\7" + content[1:])),
    "tokens that are a link": (
        "token-directory",
        lambda: _interrupted("out/tokens.bin", lambda content: Special("link", "../../../secret")),
    ),
    "file of other work": ("token-directory", lambda: _interrupted("out/merges.txt", lambda content: b"a b")),
    "nested mark": ("token-directory", lambda: _interrupted("hf_megatron_writer.json", lambda content: b"[" * 3000)),
    "mark that is a link": (
        "token-directory",
        lambda: _interrupted("hf_megatron_writer.json", lambda content: Special("link", "../../secret")),
    ),
    "line without an end": ("tokenize", lambda: {"0.jsonl": Special("zeros", size=2**30)}),
    "large text": ("tokenize", lambda: {"0.txt": Special("zeros", size=2**30)}),
    "line of many values": ("tokenize", lambda: {"0.jsonl": b'{"a": [' + b"[]," * 12 * 10**6 + b'[]], "text": "a"}'}),
    "row of no text": ("tokenize", _row_of_no_text),
    "data set that is a pipe": (
        "tokenize",
        lambda: {**tokenizing.data_sets()[0], "saved/data-00000-of-00001.arrow": Special("fifo")},
    ),
    "large description of a data set": (
        "tokenize",
        lambda: {**tokenizing.data_sets()[0], "saved/dataset_info.json": Special("zeros", size=2**30)},
    ),
}


def _dry(files: Files) -> ConvertCase:
    return ConvertCase(files, {"to": "tp", "tp_size": 2, "dry_run": True})


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header
