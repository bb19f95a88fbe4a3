"""Any recipe as a running network: quantise the float graph by it and open the deployed session on the result.

In: unet/model.onnx in float32, activation ranges, what layers see at their inputs, and how a bundle would open the
graph. Out: `RecipeDeployment`, the `Deploy` that layer sensitivity and recipe choice ask for. Rounded weights are kept
by layer and rule, so that a hundred recipes of one network do not round the same weights a hundred times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir
from latentrelay.compress.denoising_chain import Denoiser
from latentrelay.compress.precision import Layer, LayerRule, PrecisionRecipe
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.weight_fit import InputStatistics, WeightFit
from latentrelay.export.activation_ranges import Ranges
from latentrelay.export.deployed import OnnxDenoiser
from latentrelay.export.layers import is_layer, layers_of
from latentrelay.export.quantise_graph import quantise
from latentrelay.export.weight_only import fit_layer
from latentrelay.runtime.manifest import BackendSpec


@dataclass
class RecipeDeployment:
    """`latent`: channels, rows, columns; `states`: tokens, width. Graphs live in a scratch folder only while they are
    opened. Raises what quantising and opening raise."""

    unet_onnx: Path
    ranges: Ranges | None
    statistics: Mapping[str, InputStatistics]
    table: SolverTable
    spec: BackendSpec
    latent: Sequence[int]
    states: Sequence[int]
    _fits: dict[tuple[str, LayerRule, str], WeightFit] = field(default_factory=dict)

    def __call__(self, recipe: PrecisionRecipe) -> Denoiser:
        """See `Deploy`."""
        with tempfile.TemporaryDirectory(prefix="recipe-") as folder:
            out = Path(folder) / "model.onnx"
            self.write(recipe, out)
            return OnnxDenoiser(out, self.table, self.spec, self.latent, self.states)

    def write(self, recipe: PrecisionRecipe, out: Path) -> int:
        """Write `out` and its data file; returns their bytes together."""
        quantise(self.unet_onnx, recipe, self.ranges, out, fits=self.fits(recipe))
        return sum(path.stat().st_size for path in out.parent.glob(f"{out.name}*"))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The network's layers."""
        return layers_of(onnx_ir.load(self.unet_onnx))

    def fits(self, recipe: PrecisionRecipe) -> dict[str, WeightFit]:
        """Rounded weights of the recipe's layers without static activations, each rounded once a rule."""
        model = onnx_ir.load(self.unet_onnx)
        layers = {layer.name: layer for layer in layers_of(model)}
        found = {}
        for node in [node for node in model.graph if is_layer(node)]:
            name = node.name or ""
            rule = recipe.rules[name]
            if rule.weights not in ("int8", "int4") or rule.activations not in ("float32", "dynamic"):
                continue
            key = (name, rule, recipe.kernels)
            if key not in self._fits:
                seen = self.statistics.get(name)
                self._fits[key] = fit_layer(node, layers[name], rule, recipe.kernels, seen)
            found[name] = self._fits[key]
        return found
