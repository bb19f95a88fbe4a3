"""Whole blocks removed from a U-Net, as in BK-SDM (arXiv 2305.15798): the mid block, the innermost levels, layers.

In: a stock U-Net and a `BlockRecipe`. Out: a smaller stock U-Net (its config.json says everything) that holds the
weights of the blocks that stay, and the `block_map` that a feature loss compares along. Widths inside blocks are
prune_unet.py's. Of a down block the first layers stay, of an up block the first and the last ones, because their
shapes fit the neighbours that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from torch import nn

_LEVEL_LISTS = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)


@dataclass(frozen=True)
class BlockRecipe:
    """What stays: whether the mid block does, how many innermost levels go, layers a block (None: as it is)."""

    mid: bool = True
    levels_removed: int = 0
    layers: int | None = None


# BK-SDM's three sizes of SD 1.x, by the names of its model cards.
BLOCK_RECIPES = {
    "none": BlockRecipe(),
    "bk-sdm-base": BlockRecipe(layers=1),
    "bk-sdm-small": BlockRecipe(mid=False, layers=1),
    "bk-sdm-tiny": BlockRecipe(mid=False, levels_removed=1, layers=1),
}


def remove_blocks(unet: UNet2DConditionModel, recipe: BlockRecipe) -> UNet2DConditionModel:
    """A new U-Net of the blocks that stay, with their weights. Raises UnitError where the shapes do not allow it."""
    check_recipe(unet, recipe)
    student = UNet2DConditionModel.from_config(removed_config(unet, recipe))
    names = dict(_renamed(unet, recipe))
    state = {theirs: tensor for ours, tensor in unet.state_dict().items() if (theirs := _target(ours, names))}
    expected = student.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in expected}
    student.load_state_dict(state)  # strict: what stays is exactly what the smaller network has
    return student


def block_map(unet: nn.Module, recipe: BlockRecipe) -> dict[str, str]:
    """Where features are compared: a student module's path -> the teacher's; both give tensors of one shape.

    One pair a block: the last attention (or resnet) before the sampler, whose outputs pruning leaves alone.
    """
    pairs: dict[str, str] = {}
    config: Any = unet.config
    layers = recipe.layers or config.layers_per_block
    for ours, theirs in _blocks(unet, recipe):
        teacher: Any = unet.get_submodule(theirs)
        kind = "attentions" if hasattr(teacher, "attentions") else "resnets"
        last = len(getattr(teacher, kind)) - 1
        here = layers - 1 if ours.startswith("down") else layers
        pairs[f"{ours}.{kind}.{here}"] = f"{theirs}.{kind}.{last}"
    if recipe.mid and getattr(unet, "mid_block", None) is not None:
        pairs["mid_block"] = "mid_block"
    return pairs


def teacher_path(unet: UNet2DConditionModel, recipe: BlockRecipe, path: str) -> str:
    """Where a module of the smaller network came from: "up_blocks.0.resnets.1" -> "up_blocks.1.resnets.2"."""
    for theirs, ours in _renamed(unet, recipe):
        if f"{path}.".startswith(ours):
            return (theirs + f"{path}."[len(ours) :]).removesuffix(".")
    return path


def check_recipe(unet: UNet2DConditionModel, recipe: BlockRecipe) -> None:
    """Raise UnitError where the network cannot lose these blocks."""
    widths, levels = unet.config.block_out_channels, recipe.levels_removed
    if not 0 <= levels < len(widths) - 1:
        raise UnitError("levels cannot be removed", got=levels, expected=f"0..{len(widths) - 2}")
    outer = widths[len(widths) - 1 - levels :]
    if len(set(outer)) != 1:
        raise UnitError("innermost levels of different widths cannot be removed", got=outer, expected="equal widths")
    present = unet.config.layers_per_block
    if not isinstance(present, int):
        raise UnitError("layers_per_block", got=present, expected="one number")
    if recipe.layers is not None and not 1 <= recipe.layers <= present:
        raise UnitError("layers a block", got=recipe.layers, expected=f"1..{present}")


def removed_config(unet: UNet2DConditionModel, recipe: BlockRecipe) -> dict[str, Any]:
    """The smaller network's configuration."""
    config = {name: value for name, value in dict(unet.config).items() if not name.startswith("_")}
    stay = len(config["block_out_channels"]) - recipe.levels_removed
    for name in _LEVEL_LISTS:
        if isinstance(config.get(name), (list, tuple)):
            config[name] = list(config[name])[:stay]
    config["up_block_types"] = list(config["up_block_types"])[recipe.levels_removed :]
    if recipe.layers is not None:
        config["layers_per_block"] = recipe.layers
    if not recipe.mid:
        config["mid_block_type"] = None
    return config


def _blocks(unet: Any, recipe: BlockRecipe) -> Iterator[tuple[str, str]]:
    """Student block path, teacher block path."""
    levels, gone = len(unet.config.block_out_channels), recipe.levels_removed
    for level in range(levels - gone):
        yield f"down_blocks.{level}", f"down_blocks.{level}"
    for level in range(levels - gone):
        yield f"up_blocks.{level}", f"up_blocks.{level + gone}"


def _renamed(unet: Any, recipe: BlockRecipe) -> Iterator[tuple[str, str]]:
    """Teacher path prefix -> student path prefix for everything inside blocks that stays."""
    present = unet.config.layers_per_block
    layers = recipe.layers or present
    for ours, theirs in _blocks(unet, recipe):
        down = ours.startswith("down")
        stays = list(range(layers)) if down else [0, *range(present + 1 - layers, present + 1)]
        for kind in ("resnets", "attentions"):
            yield from ((f"{theirs}.{kind}.{old}.", f"{ours}.{kind}.{new}.") for new, old in enumerate(stays))
        for kind in ("downsamplers", "upsamplers"):
            yield f"{theirs}.{kind}.", f"{ours}.{kind}."
    if recipe.mid:
        yield "mid_block.", "mid_block."


def _target(name: str, renamed: dict[str, str]) -> str | None:
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return None if name.split(".")[0] in ("down_blocks", "up_blocks", "mid_block") else name


def recipe_record(recipe: BlockRecipe) -> dict[str, Any]:
    """The recipe as JSON values, for a Plan."""
    return asdict(recipe)


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
