"""A torch module to one .mlpackage, on Linux too: traced, converted by coremltools, saved so that equal means equal.

Float16 throughout, except what `keep_float32` names by module path (the step's tables and solver, the sine of the
timestep). `save_package` writes Core ML's folder with neither date nor random identifiers in it: the same module gives
the same bytes. Compression is a later pass (`export/coreml_compress.py`); nothing here runs a package.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.export.coreml_graphs import PackageInput
from latentrelay.export.coremltools_import import coremltools, milproto, quiet
from latentrelay.export.errors import ConversionError, DeploymentTargetError, ExportError

SPECIFICATION, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights"
_LOWEST = "iOS16"  # float16 inputs and outputs, and every compressed weight, came with it


def target_of(name: str) -> Any:
    """coremltools' deployment target of that name ("iOS18", "macOS15"); iOS 16 is the lowest that is written."""
    try:
        target = coremltools.target[name]
    except KeyError:
        known = ", ".join(each.name for each in coremltools.target)
        raise ExportError("unknown Core ML deployment target", got=name, expected=known, do="Correct it.") from None
    if target < coremltools.target[_LOWEST]:
        raise DeploymentTargetError("float16 outputs", "every package", target=name, needs=_LOWEST)
    return target


def convert(
    module: torch.nn.Module,
    inputs: Sequence[PackageInput],
    outputs: Sequence[str],
    *,
    target: str,
    compute_units: str,
    precision: str = "fp16",
    keep_float32: Collection[str] = (),
) -> Any:
    """A coremltools MLModel of `module`, not loaded (`skip_model_load`), inputs and outputs float32 or int32.

    `precision`: "fp16", or "fp32" for everything in float32. `keep_float32`: module names whose operations stay in
    float32. Raises ConversionError, naming the operator where coremltools says which one it has no conversion for.
    """
    selected = coremltools.precision.FLOAT32
    if precision == "fp16":
        selected = coremltools.transform.FP16ComputePrecision(op_selector=lambda op: not _inside(op, keep_float32))
    wanted = target_of(target)
    types = [
        coremltools.TensorType(name=each.name, shape=each.shape, dtype=np.dtype(each.dtype).type) for each in inputs
    ]
    failure = ""
    with quiet(), torch.no_grad():
        try:
            examples = tuple(each.example() for each in inputs)
            traced = torch.jit.trace(module.eval(), examples, check_trace=False)  # type: ignore[no-untyped-call]
            return coremltools.convert(
                traced,
                inputs=types,
                outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in outputs],
                convert_to="mlprogram",
                minimum_deployment_target=wanted,
                compute_units=coremltools.ComputeUnit[compute_units],
                compute_precision=selected,
                skip_model_load=True,
            )
        except (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError) as error:
            failure = str(error).strip().splitlines()[0]
            traceback.clear_frames(error.__traceback__)  # its temporary folders go here, where warnings are held back
    raise ConversionError(
        f"coremltools cannot convert {type(module).__name__}: {failure}",
        do="The model's code uses an operator without a Core ML form; report the model.",
    )


def _inside(op: Any, names: Collection[str]) -> bool:
    """Whether an operation comes out of one of the modules named, anywhere on its path."""
    for source, path in op.scopes.items():
        if source.name == "TORCHSCRIPT_MODULE_NAME":
            return any(name in names for name in path)
    return False


def save_package(model: Any, package: Path) -> int:
    """Write `model` to `package` (a new folder), free of dates and random names; returns its bytes."""
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".coreml.") as work, quiet():
        written = Path(work, "model.mlpackage")
        model.save(str(written))
        specification = coremltools.utils.load_spec(str(written))
        specification.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
        Path(written, SPECIFICATION).write_bytes(specification.SerializeToString(deterministic=True))
        _rename_items(written / "Manifest.json")
        shutil.move(written, package)
    return package_bytes(package)


def _rename_items(manifest: Path) -> None:
    """Core ML's Manifest.json names its items by random UUIDs; here they are derived from the items' paths."""
    document = json.loads(manifest.read_text(encoding="utf-8"))
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in document["itemInfoEntries"].items()
    }
    document["itemInfoEntries"] = {names[old]: item for old, item in document["itemInfoEntries"].items()}
    document["rootModelIdentifier"] = names[document["rootModelIdentifier"]]
    manifest.write_text(json.dumps(document, sort_keys=True, indent=4) + "\n", encoding="utf-8")


def package_bytes(package: Path) -> int:
    """Bytes of all files of a package."""
    return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())


def load_program(package: Path, specification: Any = None) -> Any:
    """A saved package's program as coremltools' PyMIL, its weights read from the package's own files."""
    found = specification or coremltools.utils.load_spec(str(package))
    with quiet():
        return milproto.load(found, found.specificationVersion, str(package / WEIGHTS))


def check_operators(program: Any, target: str) -> None:
    """Raise DeploymentTargetError, naming operator and output, if `target` lacks an operator of the program."""
    wanted = target_of(target)
    registry = coremltools.converters.mil.mil.ops.registry.SSAOpRegistry.core_ops
    for function in program.functions.values():
        for op in function.operations:
            first = min(registry[op.op_type])
            if first > wanted:
                raise DeploymentTargetError(op.op_type, op.outputs[0].name, target=target, needs=first.name)
