"""Device profiles: what ships, what the schema refuses and how it says so, and a folder of the user's own."""

from __future__ import annotations

import re
from pathlib import Path

import latentrelay.device_profiles as device_profiles
import pytest
from latentrelay.device_profiles import (
    DeviceProfile,
    ProfileError,
    ProfileFileError,
    UnknownProfileError,
    list_profiles,
    load_profile,
    validate_file,
)
from pydantic import ValidationError

FOLDER = Path(device_profiles.__file__).parent
NAMES = [
    *("galaxy-s23", "galaxy-s24", "galaxy-s25", "generic-android", "generic-ios", "ipad-m2", "iphone-12"),
    *("iphone-13-pro", "iphone-15-pro", "iphone-16", "jetson-orin-nano", "mac-m1", "pixel-8", "raspberry-pi-5"),
    *("snapdragon-7", "x86-laptop-openvino", "x86-laptop-vnni"),
]
BYTES_A_WEIGHT = {"fp16": 2, "w8a16": 1, "w8a8": 1}


def written(folder: Path, name: str, *changes: tuple[str, str], base: str = "raspberry-pi-5") -> Path:
    """A copy of a shipped profile under another name, with regular-expression changes that must apply."""
    text = (FOLDER / f"{base}.toml").read_text()
    renames = ((rf'^name = "{base}"', f'name = "{name}"'), (r"^aliases = .*", "aliases = []"))
    for pattern, replacement in (*renames, *changes):
        text, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert count == 1, pattern
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_the_shipped_profiles_exist() -> None:
    assert [profile.name for profile in list_profiles()] == NAMES


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_profile_is_sound(path: Path) -> None:
    profile = validate_file(path)
    assert profile.schema_version in ("1.0", "1.1")
    x64 = "x86" in profile.chipset
    onnxruntime = "onnxruntime-x64" if x64 else "onnxruntime-arm"
    assert profile.backend.kernels == ("openvino" if profile.backend.name == "openvino" else onnxruntime)
    assert profile.support.onnx_opset == 20
    # The student must fit: fp32 weights on disk or 8-bit weights in memory stay well under the ceiling.
    assert profile.target_unet_parameters.parameters / 2**20 < 0.5 * profile.memory.application_ceiling_mib
    assert re.search(r"\d", profile.target_unet_parameters.derivation)
    assert profile.latency_ms("unet") is not None
    assert any(source.url for source in profile.sources)


@pytest.mark.parametrize("name", NAMES)
def test_derivations_are_right(name: str) -> None:
    """859.5M x (ms a call may take) / (ms the full U-Net takes) = the target, from the profile's own first anchor."""
    profile = load_profile(name)
    target, memory = profile.target_unet_parameters, profile.memory
    found = re.search(r"859\.5M x ([\d.]+) / ([\d.]+) = (\d+)M", target.derivation)
    assert found is not None
    budget, full, result = map(float, found.groups())
    assert round(859.5 * budget / full) == pytest.approx(result, abs=1)
    assert target.parameters == pytest.approx(result * 1e6, rel=0.01)
    assert full in {anchor.ms / unit for anchor in profile.latency for unit in (1, 2, 1000, 2000)}
    calls = 2 * (profile.defaults.num_steps - profile.defaults.split)
    assert (
        f"= {calls} calls" in target.derivation or f"for {calls // 2} device steps of 2 branches" in target.derivation
    )
    weights_mib = target.parameters * BYTES_A_WEIGHT[profile.target_precision] / 2**20
    assert weights_mib < min(0.5 * memory.application_ceiling_mib, memory.largest_file_mib)


@pytest.mark.parametrize("name", NAMES)
def test_the_calls_fit_the_seconds_that_are_left(name: str) -> None:
    text = load_profile(name).target_unet_parameters.derivation
    found = re.search(r"= (\d+) calls, ([\d.]+) (s|ms) each", text)
    assert found is not None
    seconds = int(found[1]) * float(found[2]) * (1 if found[3] == "s" else 1e-3)
    stated = re.search(r"leaves ([\d.]+) s for", text) or re.search(r"(?:^|Under )([\d.]+) s ", text)
    assert stated is not None
    assert seconds <= float(stated[1]) * 1.005
    assert seconds >= float(stated[1]) * 0.85


def test_apples_steps_are_two_branches() -> None:
    """Published as guided steps a second: the profile's figure is half a step, rounded to a millisecond."""
    for name, steps_a_second in (("iphone-12", 1.44), ("iphone-13-pro", 2.55), ("ipad-m2", 3.07), ("mac-m1", 2.19)):
        assert load_profile(name).latency_ms("unet") == round(1000 / steps_a_second / 2)


def test_published_figures() -> None:
    s24 = load_profile("galaxy-s24")
    assert (s24.latency_ms("unet"), s24.latency_ms("vae_decoder")) == (79.1, 203.2)
    assert {anchor.label for anchor in s24.latency} == {"published"}
    s25, seven = load_profile("galaxy-s25"), load_profile("snapdragon-7")
    assert (s25.latency_ms("unet"), s25.latency_ms("vae_decoder")) == (60.2, 180.0)
    assert (seven.latency_ms("unet"), seven.latency_ms("vae_decoder")) == (183.9, 512.1)
    assert load_profile("iphone-15-pro").npu.tops == 35.0
    assert s24.backend.execution_providers[0].name == "QNNExecutionProvider"


def test_devices_of_one_class_share_a_student() -> None:
    sizes: dict[str, set[int]] = {}
    for profile in list_profiles():
        sizes.setdefault(profile.student_class, set()).add(profile.target_unet_parameters.parameters)
    assert all(len(each) == 1 for each in sizes.values()), sizes


@pytest.mark.parametrize("name", ["Galaxy S24", "galaxy_s24", "samsung galaxy s24", "S24"])
def test_aliases_and_spelling(name: str) -> None:
    assert load_profile(name).name == "galaxy-s24"


def test_snapshot_round_trip() -> None:
    for profile in list_profiles():
        assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile
        assert profile.model_dump(mode="json")["name"] == profile.name


def test_profiles_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_profile("pixel-8").name = "other"


def test_unknown_name_lists_what_exists_and_the_nearest() -> None:
    with pytest.raises(UnknownProfileError) as caught:
        load_profile("galaxy-s26")
    assert caught.value.exit_status == 2
    assert caught.value.nearest in {"galaxy-s23", "galaxy-s24", "galaxy-s25"}
    assert "'galaxy-s26'" in str(caught.value)
    assert f"Did you mean '{caught.value.nearest}'?" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_unknown_name_without_a_near_match() -> None:
    with pytest.raises(UnknownProfileError) as caught:
        load_profile("zzzzqqqq")
    assert caught.value.nearest is None
    assert "Did you mean" not in str(caught.value)


def test_user_folder_adds_and_replaces(tmp_path: Path) -> None:
    written(tmp_path, "my-board")
    written(tmp_path, "pixel-8", (r'^title = ".*"', 'title = "My own Pixel"'), base="pixel-8")
    profiles = list_profiles(tmp_path)
    assert len(profiles) == len(list_profiles()) + 1
    assert load_profile("my-board", tmp_path).chipset == "Broadcom BCM2712"
    assert load_profile("pixel-8", tmp_path).title == "My own Pixel"
    assert load_profile("pixel-8").title == "Google Pixel 8"
    assert load_profile(tmp_path / "my-board.toml") == load_profile("my-board", tmp_path)


def test_a_users_profile_wins_an_alias(tmp_path: Path) -> None:
    written(tmp_path, "my-board", (r"^aliases = .*", 'aliases = ["RPI5"]'))
    assert load_profile("rpi5", tmp_path).name == "my-board"
    assert load_profile("pi5", tmp_path).name == "raspberry-pi-5"
    assert load_profile("rpi5").name == "raspberry-pi-5"
    listed = {profile.name: profile for profile in list_profiles(tmp_path)}
    assert "rpi5" not in listed["raspberry-pi-5"].aliases
    assert [name for name, profile in listed.items() if profile.answers_to("rpi5")] == ["my-board"]


def test_a_users_name_wins_a_shipped_alias_and_a_users_alias_a_shipped_name(tmp_path: Path) -> None:
    written(tmp_path, "pi5", (r'^title = ".*"', 'title = "My own Pi"'))
    assert load_profile("pi5", tmp_path).title == "My own Pi"
    assert load_profile("raspberry-pi-5", tmp_path).title == "Raspberry Pi 5 (8 GB)"
    written(tmp_path, "my-phone", (r"^aliases = .*", 'aliases = ["pixel 8"]'))
    assert load_profile("pixel-8", tmp_path).name == "my-phone"
    assert "pixel-8" not in {profile.name for profile in list_profiles(tmp_path)}


def test_two_profiles_of_one_folder_may_not_share_an_alias(tmp_path: Path) -> None:
    one = written(tmp_path, "board-one", (r"^aliases = .*", 'aliases = ["my board"]'))
    two = written(tmp_path, "board-two", (r"^aliases = .*", 'aliases = ["My_Board"]'))
    with pytest.raises(ProfileFileError, match="'my-board' is already a name or alias") as caught:
        list_profiles(tmp_path)
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)
    assert load_profile(one).name == "board-one"


CASES = [
    ("unknown key", (r"^count = 0", "count = 0\ncuont = 1"), ["npu.cuont", "count, name, source, tops", "'count'"]),
    ("wrong type", (r"^threads = 4", 'threads = "4"'), ["backend.threads", "'4' (str)", "valid integer"]),
    ("number for bool", (r"^int8 = true", "int8 = 1"), ["support.int8", "1 (int)", "valid boolean"]),
    ("float for int", (r"^total_mib = 8192", "total_mib = 8192.5"), ["memory.total_mib", "8192.5", "integer"]),
    ("not finite", (r"^ms = 10400.0", "ms = inf"), ["not finite"]),
    ("a date", (r'^title = ".*"', "title = 2026-11-23"), ["date"]),
    ("missing", (r"^vendor = .*", ""), ["'vendor'", "got nothing"]),
    ("form factor", (r'^form_factor = ".*"', 'form_factor = "toaster"'), ["form_factor", "'toaster'", "'phone'"]),
    ("ceiling", (r"^application_ceiling_mib = .*", "application_ceiling_mib = 9000"), ["memory", "9000", "8192"]),
    ("uncited", (r'^source = "bk-sdm"', 'source = "hearsay"'), ["hearsay", "expected among"]),
    ("split", (r"^split = 20", "split = 26"), ["split is 26", "0..num_steps = 25"]),
    ("version", (r'^schema_version = "1.[01]"', 'schema_version = "2.0"'), ["2.0", "expected 1.1"]),
    ("precision", (r"^int8 = true", "int8 = false"), ["w8a8", "support.int8 is false"]),
    (
        "provider",
        (r'^name = "CPUExecutionProvider"', 'name = "QNNExecutionProvider"'),
        ["expected CPUExecutionProvider"],
    ),
    ("units", (r"^threads = 4", 'threads = 4\ncompute_units = "ALL"'), ["compute_units", "coreml"]),
    ("option", (r'^name = "CPU.*', 'name = "CPUExecutionProvider"\noptions = {a = 1}'), ["options.a", "valid string"]),
    ("http", (r'^url = "https', 'url = "http'), ["sources.0.url", "^https"]),
]


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_profile_says_file_key_got_expected(
    tmp_path: Path, change: tuple[str, str], expected: list[str]
) -> None:
    path = written(tmp_path, "broken", change)
    with pytest.raises(ProfileFileError) as caught:
        validate_file(path)
    assert caught.value.exit_status == 3
    assert caught.value.path == path
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_toml_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('schema_version = "1.0"\nname = \n')
    with pytest.raises(ProfileFileError, match=r"broken\.toml: not TOML: .*line 2"):
        load_profile(path)


def test_name_must_be_the_files_own(tmp_path: Path) -> None:
    path = written(tmp_path, "one").rename(tmp_path / "two.toml")
    with pytest.raises(ProfileFileError, match="key 'name': got 'one', expected the file's own name 'two'"):
        validate_file(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ProfileFileError, match=r"nowhere\.toml: cannot be read"):
        load_profile("nowhere.toml")
    with pytest.raises(ProfileFileError, match="no such folder"):
        list_profiles(tmp_path / "absent")


def test_error_tree() -> None:
    assert issubclass(UnknownProfileError, ProfileError)
    assert issubclass(ProfileFileError, ProfileError)
    assert ProfileError.exit_status == 1
