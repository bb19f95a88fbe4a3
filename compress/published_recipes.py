"""Student shapes that were published, by name: which blocks stay and every width that differs from the source's.

In: the unit paths of the network that the block recipe leaves, in the order of the paper's tables. Out: widths by path.
Hybrid SD's 224M U-Net (arXiv 2408.06646; widths from the configuration of the released model) starts from BK-SDM-Tiny.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentrelay.compress.errors import UnitError
from latentrelay.compress.prunable_units import PrunableUnit, UnitKind
from latentrelay.compress.remove_blocks import BLOCK_RECIPES, BlockRecipe

LCM_EMBEDDING = 256 * 320  # the few-step variant's guidance embedding: 256 inputs into the 320-wide time embedding


@dataclass(frozen=True)
class PublishedRecipe:
    """A published shape for Stable Diffusion 1.x. `widths` has one number a unit of the kind, in module order."""

    blocks: BlockRecipe
    widths: Mapping[UnitKind, Sequence[int]]
    parameters: int
    source: str


RECIPES: dict[str, PublishedRecipe] = {
    "hybrid-sd-224m": PublishedRecipe(
        BLOCK_RECIPES["bk-sdm-tiny"],
        {
            "resnet": (256, 480, 960, 320, 320, 160, 160, 96, 256),
            "self_attention": (8, 4, 6, 6, 8, 8, 4, 8, 8),
        },
        224_492_676,
        "arXiv 2408.06646",
    ),
    "bk-sdm-base": PublishedRecipe(BLOCK_RECIPES["bk-sdm-base"], {}, 579_384_964, "arXiv 2305.15798"),
    "bk-sdm-small": PublishedRecipe(BLOCK_RECIPES["bk-sdm-small"], {}, 482_346_884, "arXiv 2305.15798"),
    "bk-sdm-tiny": PublishedRecipe(BLOCK_RECIPES["bk-sdm-tiny"], {}, 323_384_964, "arXiv 2305.15798"),
}


def published_widths(recipe: PublishedRecipe, units: Sequence[PrunableUnit]) -> dict[str, int]:
    """The recipe's widths by unit path. Raises UnitError where the network is not the one the recipe was made for."""
    widths = {unit.path: unit.width for unit in units}
    for kind, numbers in recipe.widths.items():
        paths = [unit.path for unit in units if unit.kind == kind]
        if len(paths) != len(numbers):
            raise UnitError(
                f"the published recipe is for another network: {kind} units",
                got=len(paths),
                expected=len(numbers),
                do="Use it with Stable Diffusion 1.x, or give a budget instead of a recipe.",
            )
        widths.update(zip(paths, numbers, strict=True))
    return widths
