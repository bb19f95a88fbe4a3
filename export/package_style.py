"""How Core ML packages are written where it is the user's choice and not the precision's. Core ML is not imported."""

from __future__ import annotations

from dataclasses import dataclass

from latentrelay.runtime.errors import RequestError

ENCODINGS = ("linear8", "linear4_block32", "palette8", "palette6", "palette4", "palette4_group16")


@dataclass(frozen=True)
class PackageStyle:
    """`encoding`: how the U-Net's weights are stored, None for the precision's own; `apple_layout`: `prompt_embeds` as
    (B, D, 1, T), which Apple's own U-Nets take. Raises RequestError on another encoding."""

    encoding: str | None = None
    apple_layout: bool = False

    def __post_init__(self) -> None:
        if self.encoding is not None and self.encoding not in ENCODINGS:
            raise RequestError("unknown Core ML encoding", got=self.encoding, expected=" | ".join(ENCODINGS))
