from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from anomaly_clip.backbones.cnn import ImagewiseMaxPool2d, replace_max_pooling
from anomaly_clip.backbones.frozen import fingerprint

POOLINGS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1)),
]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_values_are_those_of_torch(pooling: nn.MaxPool2d) -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(pooling))
    plain = copy.deepcopy(network)
    replace_max_pooling(network)
    assert type(network.get_submodule("1.0")) is ImagewiseMaxPool2d
    images = torch.randn(4, 3, 17, 18)
    images[1, 0, 3, 3] = torch.nan
    expected = plain(images)
    for case in (images, images.contiguous(memory_format=torch.channels_last)):
        assert_close(network(case), expected, rtol=0, atol=0, equal_nan=True)
        assert network(case).is_contiguous()
    assert network(images[:0]).shape == (0, *expected.shape[1:])
    assert_close(network[1](images.bfloat16()), plain[1](images.bfloat16()), equal_nan=True)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_the_hash_of_a_network_stays(pooling: nn.MaxPool2d) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), copy.deepcopy(pooling))
    before = fingerprint(network), str(network)
    replace_max_pooling(network)
    assert (fingerprint(network), str(network)) == before


def test_gradients_are_those_of_torch() -> None:
    network = nn.Sequential(nn.MaxPool2d(3, 2, 1))
    images = torch.randn(2, 3, 9, 9, requires_grad=True)
    (expected,) = torch.autograd.grad(network(images).square().sum(), images)
    replace_max_pooling(network)
    (gradient,) = torch.autograd.grad(network(images).square().sum(), images)
    assert_close(gradient, expected, rtol=0, atol=0)


def test_copies_and_exported_graphs_pool_alike() -> None:
    network = nn.Sequential(nn.MaxPool2d(3, 2, 1)).eval()
    replace_max_pooling(network)
    images = torch.randn(2, 3, 9, 9)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other(images).equal(network(images))
    program = torch.export.export(network, (images,))
    assert program.module()(images).equal(network(images))
    assert "split" not in str(program.graph)  # a loop over images would fix the size of a batch


def test_pooling_with_indices_stays() -> None:
    network = nn.Sequential(nn.MaxPool2d(2, return_indices=True))
    replace_max_pooling(network)
    assert type(network[0]) is nn.MaxPool2d
