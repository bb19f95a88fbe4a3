"""What a runtime makes of a quantised graph, counted: the record that both counters return and a bundle keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class KernelCount:
    """What really runs. `kernels`: how many of each kernel that multiplies, by name; `float_list`: layers that the
    recipe leaves out, `float_mac_share` (0..1) their part of all layers' multiply-adds; `activation_products`: nodes
    that multiply two activations (attention), in no share."""

    integer_convs: int
    integer_linears: int
    float_list: tuple[str, ...]
    float_mac_share: float
    activation_products: int
    kernels: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {**asdict(self), "float_list": list(self.float_list), "kernels": dict(self.kernels)}
