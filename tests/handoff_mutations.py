"""Hostile handoff blobs, made from valid ones: what the fuzz tests of the parser and of its bar feed to it.

`cases(seeds, count, seed)` yields (kind, blob). A blob is taken apart without the parser under test, changed in one to
three ways of one kind, and put together again; the kinds are in KINDS. `examined(blob)` parses it and gives the
outcome: "accepted" or the refusal's message without its figures. Whatever else happens is an exception for the caller.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from latentrelay.runtime.errors import HandoffFormatError
from latentrelay.runtime.handoff import Handoff

META = "latentrelay"
ODD_TEXTS = [
    "NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e999", "-1e999", "1e-999", "0.1e1", "1E+2", "01", "+1", ".5", "1.",
    "0x10", "9" * 400, "-" + "9" * 400, "9" * 4300, "9" * 5000, "1" + "0" * 308 + ".0", "18446744073709551616",
    "9007199254740993", "2147483648", "-1", "0", "1", "true", "false", "null", '""', '"x"', '"\\ud800"', '"\\u0000"',
    '"\ufeff"', '"\\udc00\\ud800"', "[]", "[[]]", "{}", "[1,2,3,4]", "[0,64]", '{"a":1,"a":2}', "undefined", "'x'", "",
    "[1,]", "//x", '"' + "a" * 3000 + '"', '"__proto__"', '"../../etc/passwd"', '"%s%n"', "1_000", "\u0661",
]  # fmt: skip
FIELDS = (
    "model_family", "model_digest", "scheduler_class", "scheduler_digest", "num_steps", "timesteps", "next_step",
    "prediction_type", "guidance", "scaling_factor", "shift_factor", "seed", "init_noise_sigma", "height", "width",
    "dtype", "prompt_salt", "prompt_digest", "producer", "generator", "latent_space", "additional_metadata",
    "schema_version", "extra", "unknown",
)  # fmt: skip
RUNS = [
    "[[0,1,10000]]", "[[0,1,10001]]", "[[0,1,1000000000]]", "[[0,1,18446744073709551616]]", "[[999,-1,4]]", "[[0,0,4]]",
    "[[999,-333.25,4]]", "[[1e8,1e9,4]]", "[[1,2]]", "[[1,2,3,4]]", "[[1,2,0]]", "[[1,2,-4]]", "[[1,2,4.0]]",
    "[[1,2,true]]", "[[[1,2,4],0,1]]", "[[null,1,4]]", "[[9" + "9" * 400 + ",1,4]]", "[[1,9" + "9" * 400 + ",4]]",
    "[9" + "9" * 400 + ",1,2,3]", "[[1,1e308,4]]", "[999,[666,-333,3]]", "[[5000,-1,5000],[5000,-1,5001]]",
    "[1,[],2,3]",
]  # fmt: skip


def apart(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header with its metadata as an object, and body."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header["__metadata__"] = json.loads(header["__metadata__"][META])
    return header, blob[end:]


class Raw(str):
    """Text that stands in the JSON as it is."""


def written(value: Any) -> str:
    """JSON, with Raw as it is and pairs for objects whose keys repeat."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item) for item in value) + "]"
    return json.dumps(value)


def framed(text: bytes, body: bytes, length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return (size & (2**64 - 1)).to_bytes(8, "little") + text + body


def together(header: dict[str, Any], body: bytes, *, keep_metadata: bool = False) -> bytes:
    """The blob of a header that `apart` gave and something has changed."""
    header = dict(header)
    if not keep_metadata and "__metadata__" in header:
        header["__metadata__"] = {META: written(header["__metadata__"])}
    text = written(header).encode("utf-8", "surrogatepass")
    return framed(text + b" " * (-len(text) % 8), body)


Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def changed_bytes(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """A few bytes flipped, replaced, removed, repeated, put in; or the end cut off."""
    data = bytearray(blob)
    for _ in range(dice.randint(1, 3)):
        place, size = dice.randrange(len(data) + 1), dice.choice((1, 1, 2, 8, 64))
        way = dice.randrange(6)
        if way == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif way == 1:
            data[place : place + size] = dice.randbytes(size)
        elif way == 2:
            del data[place : place + size]
        elif way == 3:
            data[place:place] = data[place : place + size]
        elif way == 4:
            data[place:place] = dice.choice(
                (b"\0", b"\xff", b'"', b"{", b"}", b"\\", b",", b"\xed\xa0\x80", b"\xc0\x80")
            )
        else:
            del data[place:]
    return bytes(data)


def header_lengths(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Another length in the first eight bytes."""
    true = int.from_bytes(blob[:8], "little")
    edges = [0, 1, 2, 7, 8, true - 8, true - 1, true + 1, true + 8, len(blob) - 8, len(blob) - 7, len(blob)]
    edges += [2**n - 1 for n in (8, 16, 18, 31, 32, 63, 64)] + [2**n for n in (16, 18, 31, 32, 63)]
    length = dice.choice([*edges, dice.randrange(2 * len(blob)), dice.getrandbits(64)])
    return framed(blob[8:], b"", length)


def header_text(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """A piece of the header's text is put in place of another, or an odd text in place of a word or number."""
    end = 8 + int.from_bytes(blob[:8], "little")
    text = blob[8:end].decode()
    for _ in range(dice.randint(1, 2)):
        words = list(re.finditer(r'[-\w.+]+|"[^"\\]*"|[\[\]{}:,]', text))
        if not words:
            break
        word = dice.choice(words)
        text = text[: word.start()] + dice.choice([*ODD_TEXTS, dice.choice(words).group()]) + text[word.end() :]
    return framed(text.encode("utf-8", "surrogatepass"), blob[end:])


def encodings(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """The header in another encoding, with a mark before it, or spaces and zeros around it."""
    end = 8 + int.from_bytes(blob[:8], "little")
    text, body = blob[8:end].decode(), blob[end:]
    codec = dice.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-8", "utf-7"])
    space = dice.choice(["", " ", "\n", "\t", "\0", "\ufeff", "\u00a0", " " * 4096])
    return framed((dice.choice([space, ""]) + text + space).encode(codec), body)


def metadata_fields(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Odd values in place of metadata fields, or fields left out."""
    header, body = apart(blob)
    for _ in range(dice.randint(1, 3)):
        name = dice.choice(FIELDS)
        if dice.random() < 0.15:
            header["__metadata__"].pop(name, None)
        else:
            header["__metadata__"][name] = Raw(dice.choice(ODD_TEXTS) or "0")
    return together(header, body)


def versions(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Other schema versions, with fields nobody knows."""
    header, body = apart(blob)
    version = dice.choice(
        ["1.0", "1.1", "1.2", "1.99999", "1.100000", "2.0", "0.9", "1", "1.1.1", "1.-1", "1.\u0661", ""]
    )
    header["__metadata__"]["schema_version"] = version
    for _ in range(dice.randrange(3)):
        header["__metadata__"][dice.choice(["colour", "extra", "", "__class__", "\u00e9" * 50])] = Raw(
            dice.choice(ODD_TEXTS) or "0"
        )
    return together(header, body)


def timesteps(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Runs of timesteps: broken, huge, many, and such as would fill the memory."""
    header, body = apart(blob)
    runs = dice.choice([*RUNS, "[" + ",".join(["[0,1,9999]"] * dice.choice((2, 50, 5000))) + "]"])
    header["__metadata__"]["schema_version"] = dice.choice(["1.1", "1.1", "1.2", "1.0"])
    header["__metadata__"]["timesteps"] = Raw(runs)
    if dice.random() < 0.3:
        header["__metadata__"]["num_steps"] = dice.choice([1, 4, 9999, 10_000, 10_001])
    return together(header, body)


def nesting(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Deep lists and objects, in the header, in the metadata, in unknown fields."""
    header, body = apart(blob)
    depth = dice.choice([2, 10, 60, 64, 65, 100, 300, 480, 700, 900, 980, 1100, 5000, 20_000])
    opened, closed = dice.choice([("[", "]"), ('{"a":', "}")])
    deep = opened * depth + dice.choice(["1", ""]) + closed * dice.choice([depth, depth, depth, depth - 1, 0])
    place = dice.randrange(5)
    if place == 0:
        return framed((opened + deep).encode(), body)
    if place == 1:
        header["latents"][dice.choice(["shape", "data_offsets", "dtype"])] = Raw(deep)
    elif place == 2:
        header["__metadata__"] = {META: deep}
        return together(header, body, keep_metadata=True)
    elif place == 3:
        header["__metadata__"]["additional_metadata"] = Raw('{"deep":' + deep + "}")
    else:
        header["__metadata__"] |= {"schema_version": "1.7", "deep": Raw(deep)}
    return together(header, body)


def tensor_entries(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Offsets, shapes, dtypes, names and numbers of tensors that do not fit the body."""
    header, body = apart(blob)
    numbers = [-(2**63), -65, -64, -1, 0, 1, 2, 4, 32, 63, 64, 65, 128, 2048, 2049, 2**31, 2**32, 2**62, 2**63, 2**64]
    for _ in range(dice.randint(1, 3)):
        names = [name for name in header if name != "__metadata__"]
        entry = header[dice.choice(names)] if names else {}
        way = dice.randrange(9)
        if not isinstance(entry, dict):
            continue
        if way == 0:
            entry["data_offsets"] = [dice.choice(numbers) for _ in range(dice.choice((2, 2, 2, 1, 3)))]
        elif way == 1:
            entry["shape"] = [dice.choice(numbers) for _ in range(dice.choice((4, 4, 4, 3, 5, 0)))]
        elif way == 2:
            entry["dtype"] = dice.choice(
                ["F16", "F32", "F64", "BF16", "I64", "U8", "BOOL", "f16", "F8_E4M3", "", None, 16]
            )
        elif way == 3 and names:
            header[dice.choice(["latents", "x0_prev", "prompt_embeds", "", "__metadata__", "../x"])] = header.pop(
                names[-1]
            )
        elif way == 4:
            header[dice.choice(["x0_prev", "more", "latents2"])] = {
                "dtype": "F32", "shape": [1, 4, 2, 2], "data_offsets": [dice.choice(numbers), dice.choice(numbers)],
            }  # fmt: skip
        elif way == 5 and names:
            header.pop(dice.choice(names))
        elif way == 6:
            entry[dice.choice(["dtype", "shape", "data_offsets", "strides"])] = Raw(dice.choice(ODD_TEXTS) or "0")
        elif way == 7:
            body += b"\0" * dice.choice([1, 8, 64])
        else:
            body = body[: dice.randrange(len(body) + 1)]
    return together(header, body)


def repeated_keys(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """A key twice: in the header, in an entry, in the metadata, with the same value or another."""
    header, body = apart(blob)
    inner = written(header["__metadata__"])
    outer = {**header, "__metadata__": {META: inner}}
    texts = [written(outer), inner, written(header["latents"])]
    place = dice.randrange(3)
    found = list(re.finditer(r'"([a-z_0-9]+)":', texts[place]))
    key = dice.choice(found).group(1)
    doubled = "{" + json.dumps(key) + ":" + dice.choice(["1", '"x"', "null"]) + "," + texts[place][1:]
    if place == 0:
        return framed(doubled.encode(), body)
    if place == 1:
        outer["__metadata__"] = {META: doubled}
    else:
        outer["latents"] = Raw(doubled)
    return together(outer, body, keep_metadata=True)


def metadata_text(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Something else than one text of JSON under the metadata's key."""
    header, body = apart(blob)
    odd = dice.choice([*ODD_TEXTS, "{", "[" * 3000, "{}", "nul\0l", " " * 5000])
    header["__metadata__"] = dice.choice(
        [{META: odd}, {META: Raw(odd or "0")}, {"format": "pt", META: "{}"}, {}, Raw(odd or "0"), {META.upper(): odd}]
    )
    return together(header, body, keep_metadata=True)


def values(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """NaN, Inf, largest and least numbers among the latents."""
    header, body = apart(blob)
    half = header["latents"]["dtype"] == "F16"
    array = np.frombuffer(body, dtype="<f2" if half else "<f4").copy()
    odd = [np.nan, np.inf, -np.inf, -0.0, 65504.0, 6e-8, 1e-40, np.finfo("f4").max]
    for _ in range(dice.randint(1, 3)):
        if array.size:
            with np.errstate(over="ignore"):
                array[dice.randrange(array.size)] = dice.choice(odd)
    return together(header, array.tobytes())


def packed(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """Compressed, wrapped in another file format, or such that a careless reader would unpack it."""
    zeros = zlib.compress(b"\0" * 2**20)
    return dice.choice(
        [
            gzip.compress(blob, mtime=0),
            zlib.compress(blob),
            blob[:8] + zlib.compress(blob[8:]),
            framed(gzip.compress(blob[8:], mtime=0), blob),
            b"PK\x03\x04" + blob,
            b"\x80\x04\x95" + struct.pack("<Q", len(blob)) + blob + b".",
            b"\x93NUMPY\x01\x00" + blob,
            b"GGUF" + blob,
            b"\x89PNG\r\n\x1a\n" + blob,
            b"",
            b"\0" * dice.choice([1, 7, 8, 9, 4096]),
            framed(b"{}", zeros),
            blob + zeros,
        ]
    )


def spliced(dice: random.Random, blob: bytes, seeds: Sequence[bytes]) -> bytes:
    """The front of one blob and the back of another, or the header of one over the body of another."""
    other = dice.choice(seeds)
    if dice.random() < 0.5:
        return blob[: dice.randrange(len(blob))] + other[dice.randrange(len(other)) :]
    return together(apart(blob)[0], apart(other)[1])


KINDS: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        changed_bytes, header_lengths, header_text, encodings, metadata_fields, versions, timesteps, nesting,
        tensor_entries, repeated_keys, metadata_text, values, packed, spliced,
    )
}  # fmt: skip


def cases(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` hostile blobs with the names of their kinds, in turn; the same for the same `seed`."""
    dice, names = random.Random(seed), list(KINDS)
    for row in range(count):
        name = names[row % len(names)]
        yield name, KINDS[name](dice, dice.choice(seeds), seeds)


def examined(blob: bytes) -> str:
    """ "accepted", where the parser reads it and reads again what it then writes; else the refusal's shape."""
    try:
        handoff = Handoff.from_bytes(blob)
    except HandoffFormatError as error:
        message = str(error)
        if len(message) > 2000:
            raise ValueError(f"a refusal of {len(message)} characters") from error
        return shape_of(message)
    for array in (handoff.latents, handoff.x0_prev):
        if array is not None and not np.isfinite(array).all():
            raise ValueError("values that are not finite were accepted")
    again = handoff.to_bytes()
    if len(again) < 2**18 and Handoff.from_bytes(again) != handoff:
        raise ValueError("what was read is written as something else")
    hash(handoff)
    return "accepted"


def shape_of(message: str) -> str:
    """A refusal without what it quotes, so that equal reasons are equal texts."""
    text = message.removeprefix("the handoff blob is malformed: ").split(". Ask the cloud")[0]
    if "codec can't" in text:
        return "not UTF-8"
    text = re.sub(r"got .*?(, expected|$| in )", r"got _\1", text, flags=re.DOTALL)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "_", text)
    text = re.sub(r"unknown key .*", "unknown key _", text, flags=re.DOTALL)
    text = re.sub(r"additional_metadata\..*|producer\..*?:", "field:", text, flags=re.DOTALL)
    return re.sub(r"[-+]?\d[\d.e+]*", "#", text)[:120]
