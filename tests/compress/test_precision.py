"""The recipe as a plain function: what each kind and role of layer gets, the float list, JSON, and refusals."""

import pytest
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.precision import (
    KERNELS,
    MEANING,
    PRECISIONS,
    Layer,
    LayerRule,
    PrecisionRecipe,
    recipe_for,
    rule_for,
)

CONV = Layer("down_blocks.0.resnets.0.conv1", "conv", (8, 8, 3, 3), 36_864, "body")
LINEAR = Layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "linear", (16, 16), 4_096, "body")
FIRST = Layer("conv_in", "conv", (8, 4, 3, 3), 18_432, "first")
TIME = Layer("time_embedding.linear_1", "linear", (32, 8), 256, "time")
LAYERS = (FIRST, TIME, CONV, LINEAR)


def test_every_precision_means_something_on_every_kernel_set() -> None:
    assert set(MEANING) == {(precision, kernels) for precision in PRECISIONS for kernels in KERNELS}
    assert all(words.endswith(".") for words in MEANING.values())


@pytest.mark.parametrize(
    ("precision", "kernels", "conv", "linear"),
    [
        ("fp32", "onnxruntime-x64", LayerRule(), LayerRule()),
        ("fp16", "coreml", LayerRule("float16", "float16"), LayerRule("float16", "float16")),
        ("w8a16", "openvino", LayerRule("int8", "float32"), LayerRule("int8", "float32")),
        ("w8a8", "onnxruntime-x64", LayerRule("int8", "uint8"), LayerRule("int8", "uint8")),
        ("w8a8", "onnxruntime-arm", LayerRule("int8", "int8"), LayerRule("int8", "int8")),
        ("w4a16", "onnxruntime-arm", LayerRule("int8", "float32"), LayerRule("int4", "float32", group=32)),
        ("w4a8", "onnxruntime-x64", LayerRule("int8", "uint8"), LayerRule("int4", "dynamic", group=32)),
        ("w4a8", "coreml", LayerRule("int4", "int8", group=32), LayerRule("int4", "int8", group=32)),
    ],
)
def test_the_plain_rules(precision: str, kernels: str, conv: LayerRule, linear: LayerRule) -> None:
    assert rule_for(CONV, precision, kernels) == conv
    assert rule_for(LINEAR, precision, kernels) == linear


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("layer", [FIRST, TIME])
def test_the_time_path_and_the_ends_compute_in_float(layer: Layer, precision: str) -> None:
    rule = rule_for(layer, precision, "onnxruntime-x64")
    assert rule.activations == "float32"
    assert rule.weights == ("float32" if precision == "w8a8" else "int8")
    assert rule.reason


def test_the_float_list_and_its_share() -> None:
    recipe = recipe_for(LAYERS, "w8a8", "onnxruntime-x64", [LINEAR.name])
    assert recipe.float_list.names == (FIRST.name, TIME.name, LINEAR.name)
    assert recipe.float_list.mac_share == pytest.approx((18_432 + 256 + 4_096) / (18_432 + 256 + 4_096 + 36_864))
    assert recipe_for(LAYERS, "fp32", "openvino").float_list.names == ()
    assert recipe_for(LAYERS, "w8a16", "openvino").float_list.names == ()


def test_a_recipe_survives_json_and_an_old_plan_has_no_rules() -> None:
    recipe = recipe_for(LAYERS, "w4a8", "onnxruntime-arm", [CONV.name])
    assert PrecisionRecipe.from_json(recipe.to_json()) == recipe
    assert PrecisionRecipe.from_json({"precision": "fp32"}).rules == {}


def test_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(PrecisionError, match="unknown precision, got w4a4"):
        rule_for(CONV, "w4a4", "onnxruntime-x64")
    with pytest.raises(PrecisionError, match="unknown kernels, got tflite"):
        rule_for(CONV, "w8a8", "tflite")
    with pytest.raises(PrecisionError, match="unknown float layer, got conv_inn"):
        recipe_for(LAYERS, "w8a8", "onnxruntime-x64", ["conv_inn"])
    with pytest.raises(PrecisionError, match="other keys"):
        PrecisionRecipe.from_json({"precision": "w8a8", "rule": {}})
    with pytest.raises(PrecisionError, match="malformed"):
        PrecisionRecipe.from_json({"precision": "w8a8", "rules": {"a": {"bits": 8}}})
