"""The image transformer of CLIP, LAION, MetaCLIP, DFN, SigLIP and SigLIP 2 (fixed resolution), with its seams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ClipworksError
from .config import VisionConfig
from .layers import MLP, Attention, Block, Rule, TowerOutput, check_mask, masked_mean, resize_positions, run_blocks
from .stems import build_stem


class AttentionPool(nn.Module):
    """SigLIP's pool: a learned query attends to all tokens, then a feed-forward part with residual sum."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(config.width).normal_(0, config.width**-0.5))
        self.attention = Attention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, need_map: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, width) to (B, width), and the weights (B, heads, 1, N) if asked for; `mask` (B, N) hides tokens."""
        query = self.probe.expand(x.shape[0], 1, -1)
        keys = None if mask is None else mask[:, None, None, :]
        y, weights = self.attention(query, x, mask=keys, need_map=need_map)
        return (y + self.mlp(self.norm(y)))[:, 0], weights


class Memory(nn.Module):
    """A table of known things: softmax(keys(x)) weighs a vector per thing; their sum is added to the image's vector.

    With a classifier's weights as keys and the vectors of its class names as values this is ConSE (Norouzi et al.
    2014, Zero-Shot Learning by Convex Combination of Semantic Embeddings). What is recognised speaks; what is not
    does not, as the mean of many unlike vectors is short.

    Parameters
    ----------
    width : channels of a token
    pairs : number of things
    dim : dimensions of the joint space
    """

    def __init__(self, width: int, pairs: int, dim: int):
        super().__init__()
        self.keys, self.values = nn.Linear(width, pairs), nn.Linear(pairs, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width), the mean of the stem's tokens or each of them, to (..., dim)."""
        return self.values(self.keys(x).softmax(-1))


class VisionTransformer(nn.Module):
    """Image tower.

    Parameters
    ----------
    config : shape of the tower
    dim : dimensions of the joint space
    """

    def __init__(self, config: VisionConfig, dim: int):
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.config, self.grid = config, config.grid
        self.stem = build_stem(config)
        self.head = int(config.class_token)
        scale = width**-0.5
        self.class_token = nn.Parameter(torch.empty(width).normal_(0, scale)) if config.class_token else None
        self.positions = nn.Parameter(torch.empty(self.head + self.grid[0] * self.grid[1], width).normal_(0, scale))
        self.norm_pre = nn.LayerNorm(width, eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, config.activation, eps) for _ in range(config.depth)
        )
        self.norm_post = nn.LayerNorm(width, eps) if config.norm_post else nn.Identity()
        self.pool = AttentionPool(config) if config.pool == "attention" else None
        self.projection = nn.Linear(width, dim, bias=False) if config.projection else nn.Identity()
        self.memory = Memory(width, config.memory, dim) if config.memory else None

    def forward(self, pixels: torch.Tensor | None = None, **seams) -> torch.Tensor:
        """(B, 3, H, W) to (B, dim), not normalised; `seams` as in `run`."""
        return self.run(pixels, **{"whole": False, **seams}).pooled

    def run(
        self,
        pixels: torch.Tensor | None = None,
        *,
        embeddings: torch.Tensor | None = None,
        prompts: Mapping[int, torch.Tensor] | None = None,
        attention: Mapping[int, Rule] | None = None,
        keep: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_layers: Sequence[int] = (),
        output_attention: Sequence[int | str] = (),
        output_stem: Sequence[int] = (),
        whole: bool = True,
        stop: int | None = None,
    ) -> TowerOutput:
        """Encode with any of the seams.

        Parameters
        ----------
        pixels : (B, 3, H, W), preprocessed; for sizes other than the trained one positions are interpolated
        embeddings : (B, width, h, w) in the place of pixels, what `stem` gave for them: kept, it need not run again
        prompts : layer -> (n, width) or (B, n, width), put behind the class token as that block's input; a later
            layer's prompts take the place of the earlier ones' outputs. They carry no position and have not been
            through `norm_pre`: a method whose paper does that applies `visual.norm_pre` itself.
        attention : layer -> rule, see `layers.attention_weights`
        keep : int64 (B, n), patches that are kept; each carries its own position
        mask : bool (B, patches), False hides a patch from all other tokens and from the pool
        positions : table used instead of the tower's own, for its grid or for that of these pixels
        output_layers : layers whose output is returned (0 is the first block; negative from the end)
        output_attention : layers whose attention weights are returned; "pool" for those of an attention pool
        output_stem : sizes of cells in pixels; the stem's last map with such cells is returned (convolutional stems)
        whole : False leaves out what the last block computes for tokens that are not pooled (a class token needs
            their keys and values alone); `tokens` then holds the pooled one
        stop : run only the blocks before this one (negative from the end); `tokens` are then what it would be given,
            and `pooled` is read from them

        Returns
        -------
        `TowerOutput`
        """
        stem: dict[int, torch.Tensor] = {}
        if pixels is not None and embeddings is None:
            x, stem = self._stem(pixels, output_stem)
        elif pixels is None and embeddings is not None:
            x = embeddings.to(self.positions.dtype)
        else:
            raise ClipworksError("one of pixels and embeddings must be given, and not both.")
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2).contiguous()
        table = self._table(self.positions if positions is None else positions, x.shape[1], grid).to(x.dtype)
        places = table[self.head :]
        if mask is not None:
            mask = check_mask(mask, x)
        if keep is not None:
            _check_keep(keep, x)
            x, places = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2])), places[keep]
            mask = None if mask is None else mask.gather(1, keep)
        recalled = None if self.memory is None else self.memory(masked_mean(x, mask))
        x = x + places
        if self.class_token is not None:
            first = (self.class_token + table[0]).to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat([first, x], dim=1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), self.head), mask], dim=1)
        first = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        x, layers, maps, n_prompts = run_blocks(
            self.blocks, self.norm_pre(x), head=self.head, mask=mask, prompts=prompts, attention=attention,
            output_layers=output_layers, output_attention=output_attention,
            at=None if whole or self.config.pool != "class" else lambda _: first, stop=stop,
        )  # fmt: skip
        prefix = self.head + n_prompts
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), prefix), mask[:, self.head :]], dim=1)
        if self.pool is not None:
            pooled, weights = self.pool(self.norm_post(x), mask, need_map="pool" in output_attention)
            if weights is not None:
                maps["pool"] = weights
        elif "pool" in output_attention:
            raise ClipworksError("output_attention 'pool' needs a tower with an attention pool. This one has none.")
        elif self.config.pool == "class":
            pooled = self.norm_post(x[:, 0])
        else:
            pooled = masked_mean(self.norm_post(x[:, prefix:]), None if mask is None else mask[:, prefix:])
        pooled = self.projection(pooled)
        return TowerOutput(pooled if recalled is None else pooled + recalled, x, layers, maps, prefix,
                           grid if keep is None else None, self.class_token is not None, stem)  # fmt: skip

    def project(self, tokens: torch.Tensor, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of any layer (..., width) into the joint space (..., dim), each as if it were the pooled one.

        With a class token or mean pool that is the last norm and the projection; with an attention pool every
        token is pooled alone (its value, since the weights of a single token are 1). With `embedded` (..., width), what
        the stem gave for the same patches, a tower that has a memory adds what it recalls of each patch, as the pooled
        vector has what it recalls of their mean.
        """
        x = self.norm_post(tokens)
        if self.pool is not None:
            x = self.pool(x.reshape(-1, 1, x.shape[-1]))[0].reshape(x.shape)
        x = self.projection(x)
        return x if embedded is None or self.memory is None else x + self.memory(embedded)

    def _stem(self, pixels: torch.Tensor, sides: Sequence[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """First tokens as a map, and the earlier maps asked for."""
        if not sides:
            return self.stem(pixels), {}
        stem: Any = self.stem
        if not hasattr(stem, "maps"):
            raise ClipworksError(f"output_stem needs a convolutional stem; {self.config.stem!r} has no earlier maps. "
                                 f"Got {tuple(sides)!r}.")  # fmt: skip
        return stem.maps(pixels, sides)

    def _table(self, table: torch.Tensor, cells: int, grid: tuple[int, int]) -> torch.Tensor:
        """The table for this grid: as it is if it has the rows, else interpolated from the trained grid."""
        trained = self.head + self.grid[0] * self.grid[1]
        if table.shape[0] not in (trained, self.head + cells):
            raise ClipworksError(
                f"positions must have {self.head + cells} rows, one per token of these images, or {trained} as the "
                f"tower's own. Got {table.shape[0]}."
            )
        if table.shape[0] == self.head + cells and (grid == self.grid or table is not self.positions):
            return table
        return resize_positions(table, self.grid, grid)


def _check_keep(keep: torch.Tensor, x: torch.Tensor) -> None:
    if keep.ndim != 2 or len(keep) != len(x) or keep.is_floating_point():
        raise ClipworksError(
            f"keep must have the shape ({len(x)}, n) and hold integers. Got {keep.dtype} of shape {tuple(keep.shape)}."
        )
    # on a GPU the check would wait for the device at every training step; there the kernel itself stops
    if keep.device.type == "cpu" and keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < x.shape[1]:
        raise ClipworksError(
            f"keep must hold patch numbers from 0 to {x.shape[1] - 1}. Got {int(keep.min())} to {int(keep.max())}."
        )
