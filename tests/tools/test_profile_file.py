"""Profiles written as TOML: every shipped one reads back the same; bad names, folders and other files are refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from latentrelay.device_profiles import DeviceProfile, list_profiles, load_profile, validate_file
from latentrelay.runtime.errors import LatentRelayError, RequestError
from latentrelay.tools.profile_file import ProfileExistsError, profile_file, to_toml


def renamed(name: str, **changes: object) -> DeviceProfile:
    return load_profile("pixel-8").model_copy(update={"name": name, **changes})


def test_every_shipped_profile_reads_back_the_same(tmp_path: Path) -> None:
    for profile in list_profiles():
        path = tmp_path / f"{profile.name}.toml"
        with profile_file(path, overwrite=False) as write:
            write(profile, "one\n\ntwo")
        assert validate_file(path) == profile
        assert path.read_text().startswith("# one\n#\n# two\nschema_version = ")
    assert {path.suffix for path in tmp_path.iterdir()} == {".toml"}


@pytest.mark.parametrize(
    "title", ['a "quoted" \\ name', "tab\there", "line\nbreak", "Größe 手机 🦊", "[markup] # no comment"]
)
def test_awkward_text(title: str) -> None:
    assert tomllib.loads(to_toml(renamed("x", title=title)))["title"] == title


def test_bytes_that_toml_refuses_are_left_out() -> None:
    assert tomllib.loads(to_toml(renamed("x", title="a\x7fb\udc80c")))["title"] == "ab?c"


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("My Box.toml", "my-box.toml"),
        ("my_box.toml", "my-box.toml"),
        ("my-box.json", "my-box.toml"),
        ("--.toml", "this-machine.toml"),
        ("größe.toml", "gr-e.toml"),
        ("x" * 65 + ".toml", "x" * 64 + ".toml"),
    ],
)
def test_names_that_no_profile_can_have(tmp_path: Path, name: str, better: str) -> None:
    with pytest.raises(RequestError) as caught, profile_file(tmp_path / name, overwrite=True):
        pass
    assert f"Try {tmp_path / better}." in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is a folder.*mine\.toml"), profile_file(tmp_path, overwrite=True):
        pass


def test_what_is_there_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text("precious")
    with pytest.raises(ProfileExistsError, match="--overwrite") as caught, profile_file(path, overwrite=False):
        pass
    assert caught.value.exit_status == 2
    assert path.read_text() == "precious"
    with profile_file(path, overwrite=True) as write:
        assert path.read_text() == "precious"
        write(renamed("box"), "")
    assert validate_file(path).name == "box"


def test_a_link_that_leads_nowhere_is_there_too(tmp_path: Path) -> None:
    (tmp_path / "box.toml").symlink_to(tmp_path / "nothing")
    with pytest.raises(ProfileExistsError), profile_file(tmp_path / "box.toml", overwrite=False):
        pass


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    with profile_file(path, overwrite=False) as write:
        path.write_text("somebody else's")
        with pytest.raises(ProfileExistsError):
            write(renamed("box"), "")
    assert path.read_text() == "somebody else's"
    assert [item.name for item in tmp_path.iterdir()] == ["box.toml"]


def test_nothing_is_left_of_a_measurement_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "box.toml"
    with pytest.raises(KeyboardInterrupt), profile_file(path, overwrite=False):
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []


def test_a_profile_that_would_not_read_back_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    with (
        pytest.raises(LatentRelayError, match="does not follow the schema"),
        profile_file(path, overwrite=False) as write,
    ):
        write(renamed("box", vendor=""), "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), profile_file(tmp_path / "file" / "box.toml", overwrite=False):
        pass
