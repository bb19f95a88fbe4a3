"""`latentrelay devices`: what there is, what one says, files of the user's own, and names that do not exist."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latentrelay.device_profiles
import pytest

Run = Callable[..., Any]
SHIPPED = Path(latentrelay.device_profiles.__file__).parent
FIRST = {
    "galaxy-s24",
    "generic-android",
    "iphone-15-pro",
    "pixel-8",
    "raspberry-pi-5",
    "x86-laptop-openvino",
    "x86-laptop-vnni",
    "mac-m1",
    "ipad-m2",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with one profile of the user's own, valid."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    text = (SHIPPED / "pixel-8.toml").read_text()
    assert 'name = "pixel-8"' in text
    lines = [
        "aliases = []" if line.startswith("aliases = ") else line
        for line in text.replace('name = "pixel-8"', 'name = "my-phone"').splitlines()
    ]
    (folder / "my-phone.toml").write_text("\n".join(lines) + "\n")
    return folder


def test_list_names_every_profile(command: Run) -> None:
    names = {item["name"] for item in command("devices", "list", "--json").json["profiles"]}
    assert names >= FIRST
    said = command("devices", "list")
    assert said.status == 0
    assert all(name in said.out for name in names)


def test_a_folder_of_ones_own_is_added(command: Run, own: Path) -> None:
    listed = command("devices", "list", "--profiles", own, "--json").json["profiles"]
    assert FIRST | {"my-phone"} <= {item["name"] for item in listed}
    assert command("devices", "show", "my-phone", "--profiles", own, "--json").json["name"] == "my-phone"
    assert command("devices", "list", "--profiles", own / "none", "--json").status == 3


@pytest.mark.parametrize("name", sorted(FIRST))
def test_show_says_everything(name: str, command: Run) -> None:
    document = command("devices", "show", name, "--json").json
    assert (document["name"], document["schema_version"]) == (name, "1.1" if name.startswith("x86") else "1.0")
    said = command("devices", "show", name).out
    assert document["chipset"] in said
    assert all(source["title"] in said for source in document["sources"])


def test_an_unknown_name_lists_what_exists_and_the_nearest(command: Run) -> None:
    done = command("devices", "show", "pixle-8", "--json")
    assert (done.status, done.json["error"]) == (2, "UnknownProfileError")
    assert "Did you mean 'pixel-8'?" in done.json["reason"]
    assert all(name in done.json["reason"] for name in FIRST)


def test_validate_accepts_a_good_file(command: Run, own: Path) -> None:
    done = command("devices", "validate", own / "my-phone.toml", "--json")
    assert (done.status, done.json["ok"], done.json["name"]) == (0, True, "my-phone")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "[[[" + text, "not TOML"),
        (lambda text: "colour = 'red'\n" + text, "'colour': got an unknown key"),
        (lambda text: text.replace("chipset = ", "chipsett = "), "did you mean 'chipset'"),
        (lambda text: text.replace('target_precision = "', 'target_precision = "x'), "target_precision"),
    ],
)
def test_validate_refuses_a_broken_file(
    change: Callable[[str], str], words: str, command: Run, own: Path, tmp_path: Path
) -> None:
    path = own / "my-phone.toml"
    path.write_text(change(path.read_text()))
    done = command("devices", "validate", path, "--json")
    document = done.json
    assert (done.status, document["ok"], document["error"]) == (3, False, "ProfileFileError")
    assert words in document["reason"]
    assert document["path"] == str(path)


def test_validate_refuses_what_is_not_there(command: Run, tmp_path: Path) -> None:
    assert command("devices", "validate", tmp_path / "none.toml", "--json").status == 3


def test_a_file_under_another_name_is_refused(command: Run, own: Path) -> None:
    shutil.move(own / "my-phone.toml", own / "other.toml")
    done = command("devices", "validate", own / "other.toml", "--json")
    assert done.status == 3
    assert "'name'" in done.json["reason"]
