"""Layers of torchvision's networks: each one that is listed works, as it is listed."""

import pytest

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.cnn_layers import describe_layers, list_layers, stride_of
from anomaly_clip.cli import main

SLOW = pytest.mark.slow
NETWORKS = [
    "resnet18",
    *(pytest.param(name, marks=SLOW) for name in ("squeezenet1_1", "vgg11_bn", "alexnet")),
    *(pytest.param(name, marks=SLOW) for name in ("convnext_tiny", "efficientnet_b0")),
    *(pytest.param(name, marks=SLOW) for name in ("mobilenet_v2", "mobilenet_v3_small")),
    *(pytest.param(name, marks=SLOW) for name in ("densenet121", "regnet_y_400mf", "mnasnet0_5")),
    *(pytest.param(name, marks=SLOW) for name in ("googlenet", "inception_v3", "swin_t")),
    *(pytest.param(name, marks=SLOW) for name in ("shufflenet_v2_x0_5", "wide_resnet50_2")),
]


@pytest.mark.filterwarnings("ignore:NOTE. The nodes", "ignore:The default weight initialization")
@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_is_a_feature_map_as_listed(name: str) -> None:
    layers = list_layers(name)
    assert 1 <= len(layers) <= 12
    strides = [layer.stride for layer in layers]
    assert strides == sorted(strides)
    assert len({layer[1:] for layer in layers}) == len(layers)
    backbone = CNNBackbone(name, "random", [layer.name for layer in layers])
    assert backbone.strides == {layer.name: layer.stride for layer in layers}
    assert backbone.channels == {layer.name: layer.channels for layer in layers}


def test_the_coarse_layers_of_squeezenet() -> None:
    assert list_layers("squeezenet1_1") == [
        ("features.1", 2, 64),  # after the ReLU, as the last layer of its size
        ("features.4", 4, 128),
        ("features.7", 8, 256),
        ("features.10", 16, 384),
        ("features.12", 16, 512),
    ]


def test_a_transformer_has_none() -> None:
    assert list_layers("vit_b_16") == []


@pytest.mark.slow
def test_a_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="no feature maps, so use a convolutional network"):
        CNNBackbone("vit_b_16", "random", ["layer2"])


def test_strides_are_rounded_to_powers_of_two() -> None:
    assert stride_of((1, 8, 127, 127)) == 2
    assert stride_of((1, 8, 15, 15)) == 16
    assert stride_of((1, 8, 4, 4), side=32) == 8


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("layer2", "squeezenet1_1 has no layer2; its layers (name, stride, channels): features.1"),
        ("feature.4", "has no feature.4; did you mean features.4? its layers"),
    ],
)
def test_messages_list_the_layers(layer: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CNNBackbone("squeezenet1_1", "random", [layer])
    assert expected in str(error.value)
    assert "features.7 (8, 256)" in str(error.value)
    assert str(error.value).endswith("flatten (pooled)")


def test_layers_have_to_be_named_for_networks_without_stages() -> None:
    with pytest.raises(ValueError, match=r"squeezenet1_1 is not set; its layers .* features\.12"):
        CNNBackbone("squeezenet1_1", "random")
    assert "layer4 (32, 512)" in describe_layers("resnet18", "layer9")


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ("--config patchcore --model.backbone.name squeezenet1_1", 0, "features.12"),
        ("--model PaDiM", 0, "layer4"),
        ("--model PatchCore --model.backbone.name vit_b_16", 0, "none: it has no feature maps"),
        ("--config sdp", 0, "--model.backbone.pretrained"),
        ("--config sdp --data Demo --model Nothing", 0, "name the method"),
        (
            "--model PatchCore --model.backbone.name resnet19",
            2,
            "timm has such a model; did you mean resnet18",
        ),
    ],
)
def test_help_lists_the_layers(
    options: str, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *options.split(), "--model.backbone.help"]) == code
    out = capsys.readouterr()
    assert expected in out.out + out.err
