"""Bearer tokens: from one value or a file, compared in constant time, read again when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

import pytest
from latentrelay.cloud import tokens as module
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.tokens import ANONYMOUS, Caller, CallerLimits, Tokens
from latentrelay.runtime.errors import RequestError

SECRET = "s3cret-s3cret-s3cret"
HASHED = hashlib.sha256(b"another").hexdigest()
FILE = f"""
[[token]]
name = "phone"
token = "{SECRET}"
requests_per_minute = 30
open_jobs = 2
steps_per_day = 1000

[[token]]
name = "tablet"
sha256 = "{HASHED}"
"""


def write(path: Path, text: str) -> Path:
    """A file with another mtime than it had."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


def refused(tokens: Tokens, given: str | None) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        tokens.authenticate(given)
    return caught.value


def test_no_tokens_let_everyone_call() -> None:
    tokens = Tokens.none()
    assert tokens.open
    for given in (None, "", "Bearer x", "nonsense"):
        assert tokens.authenticate(given) is ANONYMOUS
    assert tokens.names == ("anonymous",)


def test_one_token() -> None:
    tokens = Tokens.single("correct horse")
    assert not tokens.open
    for given in ("Bearer correct horse", "bearer correct horse", "BEARER   correct horse "):
        assert tokens.authenticate(given) == Caller("default")


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer correct horse x",
        "Basic correct horse",
        "correct horse",
        "Bearer\tcorrect horse",
        "Bearer Bearer correct horse",
        "Bearer CORRECT HORSE",
        "Bearer correct horse\0",
        "Bearer " + "x" * 100_000,
        "Bearer correct horse" + " " * 5000,
        "Bearer \udcff",
        "Bearer caf\u00e9",
    ],
)
def test_everything_else_is_the_same_401(given: str | None) -> None:
    problem = refused(Tokens.single("correct horse"), given)
    assert (problem.status, problem.kind, problem.field) == (401, "unauthorised", "authorization")
    assert problem.headers == {"WWW-Authenticate": "Bearer"}
    assert problem.document() == refused(Tokens.single("correct horse"), "Bearer other").document()


@pytest.mark.parametrize("token", ["", " x", "x ", "a\nb", "a\0b", "a\x7fb"])
def test_what_cannot_be_a_token(token: str) -> None:
    with pytest.raises(RequestError, match="token"):
        Tokens.single(token)


def test_a_file_names_callers_and_limits(tmp_path: Path) -> None:
    tokens = Tokens.from_file(write(tmp_path / "tokens.toml", FILE))
    assert tokens.authenticate(f"Bearer {SECRET}") == Caller("phone", CallerLimits(30, 2, 1000))
    assert tokens.authenticate("Bearer another") == Caller("tablet")
    assert tokens.names == ("phone", "tablet")
    assert SECRET not in repr(vars(tokens))
    refused(tokens, f"Bearer {HASHED}")


def test_every_entry_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f'[[token]]\nname = "n{row}"\ntoken = "token-{row}"\n' for row in range(20))
    tokens = Tokens.from_file(write(tmp_path / "tokens.toml", text))
    compared: list[tuple[bytes, bytes]] = []

    def comparing(given: bytes, held: bytes) -> bool:
        compared.append((given, held))
        return hmac.compare_digest(given, held)

    class Comparing:
        compare_digest = staticmethod(comparing)

    monkeypatch.setattr(module, "hmac", Comparing)
    for given in ("token-0", "token-19", "wrong", "", "x" * 4000):
        compared.clear()
        try:
            tokens.authenticate(f"Bearer {given}")
        except ProblemError:
            assert given not in ("token-0", "token-19")
        assert len(compared) == 20
        assert {len(each) for pair in compared for each in pair} == {32}  # digests: no length to learn either


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens.toml", FILE)
    tokens = Tokens.from_file(path)
    write(path, FILE.replace(SECRET, "fresh-token"))
    assert tokens.authenticate("Bearer fresh-token").name == "phone"
    refused(tokens, f"Bearer {SECRET}")


@pytest.mark.parametrize("broken", ["[[token", "", f'[[token]]\nname = "phone"\ntoken = "{SECRET}"\nextra = 1'])
def test_a_file_broken_later_leaves_the_tokens_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    path = write(tmp_path / "tokens.toml", FILE)
    tokens = Tokens.from_file(path)
    write(path, broken)
    for _ in range(3):
        assert tokens.authenticate(f"Bearer {SECRET}").name == "phone"
    assert len(caplog.records) == 1
    path.unlink()
    assert tokens.authenticate(f"Bearer {SECRET}").name == "phone"
    assert SECRET not in caplog.text
    write(path, FILE.replace(SECRET, "fresh-token"))
    assert tokens.authenticate("Bearer fresh-token").name == "phone"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "token"),
        ("[[token]]", "name"),
        ('[[token]]\nname = "a"', "token.0"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET}"\nsha256 = "{HASHED}"', "token.0"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET}"\nrequests = 1', "requests"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET}"\nopen_jobs = 0', "open_jobs"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET}"\nopen_jobs = "1"', "open_jobs"),
        (f'[[token]]\nname = "a b"\ntoken = "{SECRET}"', "name"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET} x"', "token"),
        ('[[token]]\nname = "a"\nsha256 = "00"', "sha256"),
        (f'[[token]]\nname = "a"\ntoken = "{SECRET}', "not TOML"),
        (f'token = "{SECRET}"', "token"),
    ],
)
def test_mistakes_in_the_file_are_named_without_the_token(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(RequestError) as caught:
        Tokens.from_file(write(tmp_path / "tokens.toml", text))
    assert place in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_file_that_cannot_be_read_is_misuse(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(RequestError, match="tokens file"):
            Tokens.from_file(path)
    (tmp_path / "big.toml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(RequestError, match="more than"):
        Tokens.from_file(tmp_path / "big.toml")


def test_nothing_is_logged_of_a_refusal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        refused(Tokens.single("correct horse"), "Bearer some guess")
    assert not caplog.records
