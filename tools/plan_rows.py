"""The rows of a plan: every split x precision x mask x network, with its latency in parts, its cost and its quality.

In: options (what a device could run), networks, the cloud and the price. Out: `Row`s. The parts follow one after
another, as in runtime's `generate`; an app may encode the prompt while the cloud works, and `overlapped_ms` says what
it gets then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrelay.tools.networks import Network
from latentrelay.tools.plan_cloud import CloudSpeed, Price
from latentrelay.tools.plan_evidence import Evidence, Quality, Setting
from latentrelay.tools.plan_times import DeviceTimes
from latentrelay.tools.plan_wire import handoff_bytes, request_bytes

OVERLAPS = ("text_encoder",)  # what a device can do while the cloud works
ALL_COMPUTED = "all computed"
OFFLINE = "offline"


@dataclass(frozen=True)
class Mask:
    """How a run from `split` makes its steps: `computed` by the network, `predicted` without; `settings` name the
    method where a quality figure may be known of it; `psnr_db` from the build's held-out runs, of the final latents."""

    split: int
    label: str
    computed: int
    predicted: int
    settings: str | None = None
    psnr_db: float | None = None
    level: str = "normal"


@dataclass(frozen=True, eq=False)
class Option:
    """What the device could run: a bundle that is there, or a released student that `build` would make one of."""

    name: str
    student: str
    precision: str
    num_steps: int
    sampler: str
    guidance: float
    model_digest: str | None
    light_decoder: bool
    latent_shape: tuple[int, int, int]
    downscale: int
    timesteps: tuple[float, ...]
    needs_x0_prev: bool
    times: DeviceTimes
    bytes: int | None
    splits: tuple[int, ...]
    masks: tuple[Mask, ...] = ()
    bundle: Path | None = None
    kernels: str | None = None
    speedups: dict[str, float] = field(default_factory=dict)

    def ways(self, split: int) -> Iterator[Mask]:
        """Every step computed, and the masks of this split."""
        left = self.num_steps - split
        yield Mask(split, ALL_COMPUTED, left, 0)
        yield from (mask for mask in self.masks if mask.split == split and mask.predicted)


@dataclass(frozen=True, eq=False)
class Row:
    """One combination. `parts` are milliseconds, `total_ms` their sum, and `overlapped_ms` what is left of it where the
    prompt is encoded while the cloud works; `cost` None without a price."""

    option: Option
    mask: Mask
    network: Network
    parts: dict[str, float]
    total_ms: float
    overlapped_ms: float
    cloud_ms: float
    cost: float | None
    up_bytes: int
    down_bytes: int
    quality: Quality
    device_energy_j: float | None = None

    @property
    def split(self) -> int:
        """The first step on the device."""
        return self.mask.split

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the device's energy only where it is known."""
        row = {
            "name": self.option.name,
            "bundle": str(self.option.bundle) if self.option.bundle else None,
            "student": self.option.student,
            "precision": self.option.precision,
            "split": self.split,
            "num_steps": self.option.num_steps,
            "mask": self.mask.label,
            "mask_level": self.mask.level,
            "computed_steps": self.mask.computed,
            "predicted_steps": self.mask.predicted,
            "network": self.network.name,
            "latency_ms": round(self.total_ms, 3),
            "latency_parts_ms": {name: round(ms, 3) for name, ms in self.parts.items()},
            "can_overlap": list(OVERLAPS) if 0 < self.split < self.option.num_steps else [],
            "latency_overlapped_ms": round(self.overlapped_ms, 3),
            "cloud_ms": round(self.cloud_ms, 3),
            "cost": None if self.cost is None else round(self.cost, 9),
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "bundle_bytes": self.option.bytes,
            "device_label": self.option.times.label,
            "device_source": self.option.times.source,
            "quality": self.quality.to_dict(),
        }
        if self.device_energy_j is not None:
            row["device_energy_j"] = round(self.device_energy_j, 4)
        return row


def rows(
    options: Sequence[Option],
    networks: Sequence[Network],
    cloud: CloudSpeed,
    evidence: Evidence,
    price: Price | None,
    device_watts: float | None = None,
) -> list[Row]:
    """Every row that can be run: without a network those of split 0 alone, without a predicted step's time no mask."""
    found = []
    whole = {(each.model_digest, each.light_decoder): each for each in reversed(options)}  # all steps in the cloud: the
    for network in networks:  # device decodes alone, so one option stands for all that decode alike
        for option in options:
            for split in option.splits:
                if split and not network.connected:
                    continue
                if split == option.num_steps and whole[option.model_digest, option.light_decoder] is not option:
                    continue
                for mask in option.ways(split):
                    row = _row(option, mask, network, cloud, evidence, price, device_watts)
                    if row is not None:
                        found.append(row)
    return found


def _row(
    option: Option,
    mask: Mask,
    network: Network,
    cloud: CloudSpeed,
    evidence: Evidence,
    price: Price | None,
    watts: float | None,
) -> Row | None:
    split, times = mask.split, option.times
    steps_ms = times.steps_ms(mask.computed, mask.predicted)
    if steps_ms is None:
        return None
    up, down, transfer = 0, 0, 0.0
    if split:
        pixels = [option.downscale * side for side in option.latent_shape[1:]]
        up = request_bytes(option.num_steps, split, pixels[0], pixels[1])
        down = handoff_bytes(
            option.timesteps,
            split,
            option.latent_shape,
            downscale=option.downscale,
            needs_x0_prev=option.needs_x0_prev,
        )
        transfer = network.transfer_ms(up, down)
    text = times.text_ms if split < option.num_steps else 0.0
    parts = {
        "cloud_queue": cloud.waiting_ms(split),
        "cloud_steps": cloud.steps_ms(split),
        "transfer": transfer,
        "text_encoder": text,
        "device_steps": steps_ms,
        "decode": times.decode_ms,
    }
    away = parts["cloud_queue"] + parts["cloud_steps"] + transfer
    device = text + steps_ms + times.decode_ms
    return Row(
        option,
        mask,
        network,
        parts,
        away + device,
        max(away, text) + steps_ms + times.decode_ms,
        parts["cloud_steps"],
        None if price is None else price.of(split, cloud),
        up,
        down,
        _quality(option, mask, evidence),
        None if watts is None else 1e-3 * watts * device,
    )


def _quality(option: Option, mask: Mask, evidence: Evidence) -> Quality:
    """What was measured of the combination; a mask whose accuracy nobody measured still has the build's dB."""
    from latentrelay.tools.plan_evidence import IN_DB

    found = evidence.quality(
        Setting(
            option.model_digest,
            option.student,
            option.precision,
            mask.split,
            option.num_steps,
            option.sampler,
            option.guidance,
            option.light_decoder,
            mask.settings if mask.predicted else None,
            mask.computed if mask.predicted else None,
            option.kernels,
        )
    )
    if not found.known and mask.predicted and mask.psnr_db is not None:
        words = "the bundle's manifest: held-out runs of its build"
        return Quality(IN_DB, words, psnr_db=mask.psnr_db, psnr_to="latents of the float run")
    return found
