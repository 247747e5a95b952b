"""Strategies for JSON: safetensors' headers, configurations, indices, tokenizers, and what is no JSON at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.pickles import INTEGERS, TEXTS, Draw, pick, rarely

# Values as they stand in a file; some are no JSON, though Python's parser takes them.
_RAW = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    '""',
    '"x"',
    "NaN",
    "Infinity",
    "-Infinity",
    "-0",
    "1e3",
    "1.0",
    "0.5",
    "-1",
]
_RAW += [
    "1E400",
    "1" * 400,
    "1" * 5000,
    "-" + "9" * 30,
    "[1]",
    '{"a": 1}',
    '["GPT2LMHeadModel"]',
    '"\\ud800"',
    "01",
    "+1",
]
_RAW += ['"\\u0000"', '"\\u001b[31m"', "[" * 3000, "[" * 500 + "]" * 500, '{"a":' * 3000, '"' + "a" * 70000 + '"', ""]
_RAW += ["18446744073709551615", "18446744073709551616", "9223372036854775808", "1 2", "'x'", "/**/1", "[1,]", '"\t"']
_ENCODINGS = ["utf-16", "utf-8-sig", "utf-32", "latin-1", "utf-16-le"]

Pairs = list[tuple[str, str]]


def raw_value(draw: Draw) -> str:
    """A value, in JSON or nearly."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return str(draw(INTEGERS.filter(lambda number: abs(number) < 10**300)))
    return _text(draw) if kind == 1 else str(pick(draw, _RAW))


def _text(draw: Draw) -> str:
    return json.dumps(draw(TEXTS), ensure_ascii=draw(st.booleans()))


def _object(pairs: Pairs) -> str:
    """An object that may have a key twice."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"


def pairs_of(content: dict[str, Any]) -> Pairs:
    """Keys and values, each in JSON."""
    return [(json.dumps(key), json.dumps(value)) for key, value in content.items()]


def _edit(draw: Draw, pairs: Pairs, more_keys: Sequence[str]) -> None:
    """Change one of the pairs, add one, or take one away."""
    at = draw(st.integers(0, max(len(pairs) - 1, 0)))
    match pick(draw, ["value", "value", "value", "add", "twice", "drop", "key", "swap"]):
        case "add":
            key = json.dumps(pick(draw, more_keys)) if more_keys and draw(st.booleans()) else _text(draw)
            pairs.insert(at, (key, raw_value(draw)))
        case _ if not pairs:
            return
        case "value":
            pairs[at] = (pairs[at][0], raw_value(draw))
        case "twice":
            pairs.append((pairs[at][0], pick(draw, [pairs[at][1], raw_value(draw)])))
        case "drop":
            del pairs[at]
        case "key":
            pairs[at] = (_text(draw), pairs[at][1])
        case "swap":
            other = draw(st.integers(0, len(pairs) - 1))
            pairs[at], pairs[other] = (pairs[at][0], pairs[other][1]), (pairs[other][0], pairs[at][1])


def encoded(draw: Draw, text: str) -> bytes:
    """A document's bytes, sometimes of an encoding or with an end that JSON does not have."""
    if not rarely(draw, 20):
        return text.encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        return text.encode(pick(draw, _ENCODINGS), "replace")
    return text.encode("utf-8", "surrogatepass") + pick(draw, [b" " * 9, b"\0", b"\xff", b"{}", b",", b"\n" * 5000])


def edited_json(draw: Draw, content: dict[str, Any], more_keys: Sequence[str] = (), most: int = 3) -> bytes:
    """A JSON object, changed; objects in it are changed inside, too."""
    pairs = pairs_of(content)
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    for _ in range(draw(st.integers(1, most))):
        if inner and draw(st.booleans()):
            key = pick(draw, inner)
            nested = pairs_of(content[key])
            _edit(draw, nested, ())
            pairs = [(k, _object(nested) if k == json.dumps(key) else value) for k, value in pairs]
        else:
            _edit(draw, pairs, more_keys)
    text = _object(pairs) if not rarely(draw, 20) else str(pick(draw, _RAW))
    return encoded(draw, text)


def large_json(draw: Draw) -> bytes:
    """A document of tens of megabytes, most of them one thing again and again."""
    count = pick(draw, [10**5, 10**6, 6 * 10**6, 16 * 10**6])
    makers: list[Callable[[], bytes]] = [
        lambda: b'{"a": [' + b"[]," * count + b"1]}",
        lambda: b'{"a": "' + b"x" * 8 * count + b'"}',
        lambda: b"{" + b'"a":1,' * count + b'"b":2}',
        lambda: b" " * 8 * count + b"{}",
        lambda: b"{" + b",".join(b'"%d":{}' % n for n in range(count // 16)) + b"}",
    ]
    return pick(draw, makers)()


# A text of 10 KB that stands for 10**9 values.
ALIASES = "a: &a [{x}]\nb: &b [{a}]\nmodel: {{window_size: [{b}]}}".format(
    x="x," * 1000, a="*a," * 1000, b="*b," * 1000
)
# Documents that are small and large, deep, endless or no data outside; and what a reader may take for a mapping.
_YAML = [
    "model: &a [*a]",
    "model: &a {transformer: *a}",
    "model: *nowhere",
    ALIASES,
    "model: " + "[" * 20000,
    "model: " + "{a: " * 5000,
    "model:\n" + "".join(" " * n + "a:\n" for n in range(1, 600)),
    "model: {" + "a: 1, " * 20000 + "}",
    "model: [" + "x," * 50000 + "]",
    'model: !!python/object/apply:os.system ["true"]',
    "model: !!python/name:os.system",
    "model: !!binary x",
    "%YAML 9.9\n---\nmodel: {}",
    "---\nmodel: {}\n---\nmodel: {}\n",
    "? {a: b}\n: 1",
    "? [1, 2]\n: 1",
    "- 1",
    "\t",
    "model: {num_layers: " + "1" * 5000 + "}",
    "model: {num_layers: .inf, hidden_size: 0x20, layernorm_epsilon: 1_0, normalization: 2001-01-01}",
    "model: " + "x" * 300000,
    "&" * 1000,
]


def edited_yaml(draw: Draw, content: dict[str, Any], more_keys: Sequence[str] = ()) -> bytes:
    """A YAML file: JSON, which is YAML too, changed; or a document with what JSON has not."""
    if rarely(draw, 4):
        return encoded(draw, pick(draw, _YAML).replace("model:", pick(draw, ["model:", "config:", "num_layers:"])))
    return edited_json(draw, content, more_keys)


# --- safetensors.

_DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "I64",
    "I32",
    "I16",
]
_DTYPES += ["I8", "U64", "U32", "U16", "U8", "BOOL", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "f32", "F32 ", "", "float32"]
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_SHAPES = [
    [],
    [0],
    [1],
    [2],
    [3, 2],
    [4, 0, 5],
    [1, 1, 1],
    [8],
    [2**32, 2**32, 0],
    [2**63, 2],
    [2**32, 2**32],
    [-1],
    [-2, -1],
]


def header_of(content: bytes) -> dict[str, Any]:
    """A safetensors file's header."""
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def edited_safetensors(draw: Draw, content: bytes, most: int = 3) -> bytes:
    """A file whose header was changed, or a new one of few tensors that fit."""
    header = header_of(content)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    if rarely(draw, 3):
        header, data = _few_tensors(draw)
    texts = pairs_of(header)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, max(len(texts) - 1, 0)))
        kind = pick(draw, ["entry", "entry", "entry", "top", "metadata"])
        if kind == "metadata":
            texts.append(('"__metadata__"', _metadata(draw, header.get("__metadata__"))))
        elif kind == "top" or not texts or not isinstance(entry := _loaded(texts[at][1]), dict):
            _edit(draw, texts, ["__metadata__", "wte.weight", "a"])
        else:
            texts[at] = (texts[at][0], _entry(draw, entry, len(data)))
    raw = encoded(draw, _object(texts))
    raw += b" " * pick(draw, [0, -len(raw) % 8, 1, 3])
    length = len(raw) + (pick(draw, [-1, 1, 8, 2**40, 2**63]) if rarely(draw, 25) else 0)
    end = pick(draw, [data] * 12 + [data[:-1], data + b"\0", b""])
    return struct.pack("<Q", max(length, 0)) + raw + end


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _few_tensors(draw: Draw) -> tuple[dict[str, Any], bytes]:
    """One to three tensors in order, mostly of right sizes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    position = 0
    for name in ("a", "b", "\u00e9")[: draw(st.integers(0, 3))]:
        dtype, shape = pick(draw, _DTYPES), pick(draw, _SHAPES)
        size = _BITS.get(dtype, 8)
        for number in shape:
            size *= number
        size = size // 8 if 0 <= size < 10**5 else 0
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header, b"\0" * position


def _entry(draw: Draw, entry: dict[str, Any], num_bytes: int) -> str:
    """A tensor's entry with one of its parts changed."""
    pairs = pairs_of(entry)
    offsets = entry.get("data_offsets")
    first, last = offsets if isinstance(offsets, list) and len(offsets) == 2 else (0, 0)
    texts = {
        "dtype": [json.dumps(pick(draw, _DTYPES))],
        "shape": [
            json.dumps(pick(draw, _SHAPES)),
            "[true]",
            "[1.0]",
            "[2,]",
            "[18446744073709551616]",
            "[-0]",
            "[1e0]",
        ],
        "data_offsets": [
            f"[{a}, {b}]" for a, b in ((first, first), (last, first), (first, num_bytes), (0, last), (-1, last))
        ]
        + [
            "[0]",
            "[0, 0, 0]",
            "[0.0, 0]",
            "[false, true]",
            f"[{first}, {2**64 + 1}]",
            f'{{"0": {first}, "1": {last}}}',
        ],
    }
    name = pick(draw, [*texts, "other"])
    if name == "other":
        _edit(draw, pairs, ["dtype", "shape", "data_offsets", "x"])
    else:
        pairs = [(key, pick(draw, texts[name]) if key == f'"{name}"' else value) for key, value in pairs]
    return _object(pairs)


def _metadata(draw: Draw, metadata: Any) -> str:
    """Metadata that may not be text, or that says other things of where a shard's tensors start."""
    pairs = pairs_of(metadata if isinstance(metadata, dict) else {"format": "pt"})
    _edit(draw, pairs, ["format", "DCP_SHARDING_INFO", "DCP_VERSION"])
    info = _loaded(dict(pairs).get('"DCP_SHARDING_INFO"', "null"))
    places = _loaded(info) if isinstance(info, str) else None
    if isinstance(places, dict) and places:
        name = pick(draw, sorted(places))
        starts = pick(draw, ["[0]", "[0, 0]", "[-1, 0]", "[1e3, 0]", "[NaN, 0]", "[true, 0]", '["5", 0]', "{}"])
        number = raw_value(draw)
        inner = [(json.dumps(key), json.dumps(value)) for key, value in places.items() if key != name]
        inner += [(json.dumps(name), f'{{"saved_offsets": {pick(draw, [starts, f"[{number}, 0]", number])}}}')]
        pairs = [(key, json.dumps(_object(inner)) if key == '"DCP_SHARDING_INFO"' else value) for key, value in pairs]
    return _object(pairs)


@st.composite
def safetensors_files(draw: Draw, seeds: Sequence[bytes]) -> bytes:
    """A changed file; rarely one with a header of tens of megabytes."""
    if rarely(draw, 200):
        raw = large_json(draw)
        return struct.pack("<Q", len(raw)) + raw
    return edited_safetensors(draw, pick(draw, seeds))
