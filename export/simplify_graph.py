"""A U-Net's graph with fewer nodes: fused attention, fixed shapes instead of computed ones, no identities.

In: a graph straight from torch.onnx with static latent size. Out: the same graph, modified in place, equal up to
rounding. What ONNX Runtime fuses by itself when a session opens (SiLU, GELU with its bias, normalisation with the
addition before it) is left in standard operators, so that other tools read it too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from latentrelay.export.attention_nodes import fuse_attention
from onnx_ir.passes import common as passes


def simplify(model: onnx_ir.Model, kernels: str) -> None:
    """Rewrite `model` for `kernels` (see compress/precision.py); raises ExportError on attention of an unknown form."""
    fuse_attention(model, kernels)
    _fix_group_norm_shapes(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _fix_group_norm_shapes(model: onnx_ir.Model) -> None:
    """Group norm folds groups out of its input and back to the input's own shape, which torch.onnx computes anew each
    time: only the batch of it is not known."""
    for node in list(model.graph):
        computed = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] is not None else None
        whole = computed.inputs[0] if computed is not None and computed.op_type == "Shape" else None
        shape = whole.shape if whole is not None else None
        if shape is None or not all(isinstance(size, int) for size in shape[1:]):
            continue
        value = np.array([0, *(int(size) for size in shape[1:] if isinstance(size, int))], dtype=np.int64)
        constant = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(value)}, name=f"{node.name}/shape")
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.outputs[0].shape = shape
