"""A small residual network with batch normalisation.

Source: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016 (section 4.2: the
networks for CIFAR-10, with projections on the shortcuts that change shape). Attributes are named as in torchvision.
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))``: [B, C, H, W] to [B, C', H/s, W/s].

    Args:
        inputs: C.
        outputs: C'.
        stride: s, of the first convolution.

    Attributes:
        downsample: a 1x1 convolution and batch normalisation where the shape changes, else None (the identity).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H/s, W/s]."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


def _layer(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs) for _ in range(count - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


class ResNet(nn.Module):
    """Stem, three layers of basic blocks, mean over places, linear: [B, C, H, W] float to [B, K] scores.

    Convolutions start from He's normal distribution (fan-out), as in the paper; the rest as torch does it.

    Args:
        channels: C of the images.
        classes: K.
        widths: channels of each layer; all but the first halve height and width.
        blocks: basic blocks in each layer.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        blocks: tuple[int, int, int] = (2, 2, 2),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _layer(widths[0], widths[0], blocks[0], stride=1)
        self.layer2 = _layer(widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _layer(widths[1], widths[2], blocks[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] float to [B, K] scores."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.fc(self.avgpool(h).flatten(1))
