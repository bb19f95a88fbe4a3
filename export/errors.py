"""Every error the export raises, below the runtime's root. A message says what, got, expected and what to do.

LatentRelayError
`- ExportError
   |- SourceError               the model cannot be found or read (`.bin`/`.ckpt` pickles are never read)
   |- UnsupportedSourceError    it can be read, but one named part of it has no export; see `.part`
   |- OutputExistsError         the output folder holds something that must not be replaced
   |- ParityError               a graph disagrees with torch; see `.component` and `.snr_db`
   |- ActivationError         an activation is NaN or Inf; see `.layer` and `.step`
   |- RangeExplodedError      an activation's range explodes at one step; see `.layer`, `.step` and `.times`
   |- UnfusedLayerError       a layer that the recipe wants in integer runs in float; see `.layer`
   |- LayerRuleError            a layer cannot be stored or computed as its rule says; see `.layer`
   |- CutError                  a U-Net's graph cannot be cut at one place; `.place` names it
   |- ConversionError           coremltools cannot convert a component; the message names the operator
   |- DeploymentTargetError     Core ML at the deployment target lacks an operator; see `.operator` and `.needs`
   `- UnknownOperatorError      the interpreter of Core ML programs lacks an operator; see `.operator` and `.output`
"""

from __future__ import annotations

from latentrelay.runtime.errors import MISUSED, REFUSED, LatentRelayError


class ExportError(LatentRelayError):
    """An export did not produce a bundle; nothing was left behind."""


class SourceError(ExportError):
    """The source pipeline is missing, incomplete or not stored as safetensors."""

    exit_status = MISUSED


class UnsupportedSourceError(ExportError):
    """One part of the source pipeline has no export; `.part` names it."""

    exit_status = REFUSED

    def __init__(self, part: str, *, got: object, expected: object) -> None:
        super().__init__(
            f"this pipeline cannot be exported because of its {part}",
            got=got,
            expected=expected,
            do="Supported are Stable Diffusion 1.x and 2.x text-to-image pipelines of any width.",
        )
        self.part = part


class OutputExistsError(ExportError):
    """The output folder is a bundle and `overwrite` is off, or it is not a bundle at all."""

    exit_status = MISUSED


class ParityError(ExportError):
    """A graph's output is further from torch's than the gate allows."""

    exit_status = REFUSED

    def __init__(self, component: str, snr_db: float, gate_db: float) -> None:
        super().__init__(
            f"parity gate: {component} disagrees with torch",
            got=f"{snr_db:.1f} dB SNR",
            expected=f">= {gate_db:.0f} dB",
            do="Report the model; the bundle was not written.",
        )
        self.component, self.snr_db, self.gate_db = component, snr_db, gate_db


class ConversionError(ExportError):
    """coremltools refused a component."""


class DeploymentTargetError(ExportError):
    """A Core ML operator or number format came with a later system than the profile's deployment target."""

    exit_status = REFUSED

    def __init__(self, operator: str, where: str, *, target: str, needs: str) -> None:
        super().__init__(
            f"Core ML operator {operator} ({where}) is missing at the deployment target",
            got=target,
            expected=f"{needs} or later",
            do="Choose a precision that the target has, or raise support.coreml_deployment_target in the profile.",
        )
        self.operator, self.target, self.needs = operator, target, needs


class UnknownOperatorError(ExportError):
    """A Core ML program holds an operator that the interpreter does not know, so its parity cannot be checked."""

    def __init__(self, operator: str, output: str) -> None:
        super().__init__(
            f"the interpreter of Core ML programs does not know operator {operator}",
            got=f"{operator}, whose output is {output}",
            expected="an operator listed in export/mil_operators.py",
            do="Add it there with a test against torch.",
        )
        self.operator, self.output = operator, output


class LayerRuleError(ExportError):
    """A layer cannot be stored or computed as its rule says; `.layer` names it."""

    exit_status = REFUSED

    def __init__(self, layer: str, what: str, *, got: object = None, expected: object = None) -> None:
        super().__init__(f"{layer}: {what}", got=got, expected=expected, do="Choose another precision for this layer.")
        self.layer = layer


class CutError(ExportError):
    """A U-Net's graph cannot be cut: one place in it is not what it must be; `.place` names it."""

    exit_status = REFUSED

    def __init__(self, place: str, *, got: object, expected: object) -> None:
        super().__init__(
            f"this graph cannot be cut: {place}",
            got=got,
            expected=expected,
            do="Export the U-Net with this project, or build without predicted steps.",
        )
        self.place = place


class ActivationError(ExportError):
    """An activation of the float network is NaN or Inf; `.layer` says which, `.step` when."""

    exit_status = REFUSED

    def __init__(self, layer: str, step: int) -> None:
        super().__init__(
            f"{layer} is not finite at step {step}",
            got="NaN or Inf",
            expected="finite numbers",
            do="Check the network's weights and the recorded inputs; nothing can be quantised from this.",
        )
        self.layer, self.step = layer, step


class RangeExplodedError(ExportError):
    """One step's range would leave the other steps a few levels; `.layer`, `.step`, `.times` the others' median."""

    exit_status = REFUSED

    def __init__(self, layer: str, step: int, reach: float, median: float) -> None:
        times = reach / median if median > 0.0 else float("inf")
        super().__init__(
            f"the range of {layer} explodes at step {step}",
            got=f"{reach:.4g}, {times:.1f} times the median {median:.4g} of the other steps",
            expected="steps of the same order",
            do="Check that step's inputs, or keep this layer in float.",
        )
        self.layer, self.step, self.times = layer, step, times


class UnfusedLayerError(ExportError):
    """A layer that the recipe computes on integers is not an integer kernel in the runtime's own graph; `.layer`."""

    exit_status = REFUSED

    def __init__(self, layer: str, got: str, expected: str) -> None:
        super().__init__(
            f"{layer} did not fuse to an integer kernel",
            got=got,
            expected=expected,
            do="Build for this machine's kernel set, or put the layer on the recipe's float list.",
        )
        self.layer = layer
