"""Chains: an MLP and a small convolutional network, each an ``nn.Sequential`` with torch's default initialisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def mlp(inputs: int, classes: int, widths: Sequence[int] = (256, 256)) -> nn.Sequential:
    """A multilayer perceptron: Flatten, then Linear and ReLU for each hidden width, then Linear.

    All modules are direct children of the Sequential.

    Args:
        inputs: D, features of one example after flattening.
        classes: K, scores of one example.
        widths: of the hidden layers.

    Returns:
        A model from [B, ...] float with D numbers an example to [B, K] scores.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    before = inputs
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, classes))


def convnet(channels: int, classes: int, widths: Sequence[int] = (32, 64, 128)) -> nn.Sequential:
    """A small convolutional network without normalisation.

    One child for each width, a Sequential of Conv2d 3x3, ReLU and MaxPool2d that halves height and width; then
    AdaptiveAvgPool2d to 1x1, Flatten and Linear.

    Args:
        channels: C of the images.
        classes: K, scores of one image.
        widths: channels after each block.

    Returns:
        A model from [B, C, H, W] float to [B, K] scores; H and W at least 2 to the number of blocks (8).
    """
    blocks: list[nn.Module] = []
    before = channels
    for width in widths:
        blocks.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)))
        before = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
