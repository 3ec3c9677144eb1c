"""The text transformer: causal and read at the end token (CLIP), bidirectional (SigLIP), or BERT-shaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import ClipworksError
from .config import TextConfig
from .layers import Block, Rule, TowerOutput, check_mask, masked_mean, pick, put_prompts, run_blocks


class TextTransformer(nn.Module):
    """Text tower.

    Parameters
    ----------
    config : shape of the tower
    dim : dimensions of the joint space
    """

    def __init__(self, config: TextConfig, dim: int):
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(config.context_length, width).normal_(0, 0.01))
        self.norm_embedding = nn.LayerNorm(width, eps) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, config.activation, eps, config.norm_order)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, eps) if config.norm_final else nn.Identity()
        self.projection = nn.Linear(width, dim, bias=config.projection_bias) if config.projection else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.dtype

    def forward(self, tokens: torch.Tensor | None = None, **seams) -> torch.Tensor:
        """(B, L) token ids to (B, dim), not normalised; `seams` as in `run`."""
        return self.run(tokens, **{"whole": False, **seams}).pooled

    def run(
        self,
        tokens: torch.Tensor | None = None,
        *,
        embeddings: torch.Tensor | None = None,
        eot: torch.Tensor | None = None,
        prompts: Mapping[int, torch.Tensor] | None = None,
        attention: Mapping[int, Rule] | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cut: bool = True,
        output_layers: Sequence[int] = (),
        output_attention: Sequence[int] = (),
        whole: bool = True,
    ) -> TowerOutput:
        """Encode with any of the seams.

        Parameters
        ----------
        tokens : int64 (B, L), padded on the right
        embeddings : (B, L, width) in the place of the embeddings of `tokens` (positions are still added)
        eot : int64 (B,), where the end token of each row of `embeddings` stands (needed for pool "eot" unless
            `tokens` say it)
        prompts : layer -> (n, width) or (B, n, width), put behind the start token. Those of layer 0 are word
            embeddings: they take positions 1 to n and the words move on by n. Those of later layers are that
            block's input in the place of the earlier ones' outputs (inserted if there were none).
        attention : layer -> rule, see `layers.attention_weights`
        mask : bool (B, L), False hides a token from all others and from a mean pool
        positions : table used instead of the tower's own
        cut : drop what lies behind the longest text of the batch where that changes nothing (see `lengths`)
        output_layers, output_attention : layers whose output or attention weights are returned
        whole : False leaves out what the last block computes for tokens that are not pooled (a vector that is read at
            one token needs their keys and values alone); `tokens` then holds the pooled one

        Returns
        -------
        `TowerOutput`
        """
        prompts = dict(prompts or {})
        if tokens is not None:
            if tokens.ndim != 2 or tokens.is_floating_point():
                raise ClipworksError(
                    f"tokens must be integers of shape (B, L). Got {tokens.dtype} of shape {tuple(tokens.shape)}."
                )
            if cut and embeddings is None and mask is None:
                tokens = tokens[:, : int(self.lengths(tokens).max())]
            if self.config.pool == "eot" and eot is None:
                eot = self.end(tokens)
            if self.config.mask_padding and mask is None:
                mask = tokens != self.config.pad_id
        elif embeddings is None:
            raise ClipworksError("one of tokens and embeddings must be given. Got neither.")
        elif self.config.pool == "eot" and eot is None:
            raise ClipworksError("embeddings need eot, the position of the end token in every row. Got None.")
        x = self.tokens(tokens) if embeddings is None else embeddings.to(self.positions.dtype)
        mask = None if mask is None else check_mask(mask, x)
        n_prompts = 0
        if 0 in prompts:
            length, x = x.shape[1], put_prompts(x, prompts.pop(0), 1, 0)
            n_prompts = x.shape[1] - length
            if mask is not None:
                mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), n_prompts), mask[:, 1:]], dim=1)
        table = self.positions if positions is None else positions
        if x.shape[1] > len(table):
            raise ClipworksError(f"texts may have {len(table)} tokens, prompts included. Got {x.shape[1]}.")
        before, words = n_prompts, x.shape[1] - n_prompts

        def place(n: int) -> torch.Tensor:
            """Where the vector is read when there are n prompts."""
            if self.config.pool == "eot" and eot is not None:
                return eot + n
            return torch.full((x.shape[0],), 0 if self.config.pool == "first" else words + n - 1, device=x.device)

        x, layers, maps, n_prompts = run_blocks(
            self.blocks, self.norm_embedding(x + table[: x.shape[1]].to(x.dtype)), head=1, n_prompts=n_prompts,
            causal=self.config.causal, mask=mask, prompts=prompts, attention=attention,
            output_layers=output_layers, output_attention=output_attention,
            at=None if whole or self.config.pool == "mean" else place,
        )  # fmt: skip
        if mask is not None and n_prompts != before:
            mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), n_prompts), mask[:, 1 + before :]], dim=1)
        if self.config.pool == "mean":
            pooled = masked_mean(self.norm(x), mask)
        else:
            pooled = self.norm(pick(x, place(n_prompts)) if whole else x)[:, 0]
        pooled = self.projection(pooled)
        return TowerOutput(pooled, x, layers, maps, 1 + n_prompts)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of any layer (..., width) into the joint space (..., dim): last norm and projection."""
        return self.projection(self.norm(tokens))

    def end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position of the first end token in every row: int64 (B,)."""
        found = tokens == self.config.eot_id
        if not torch.compiler.is_exporting() and not bool(found.any(1).all()):
            raise ClipworksError(f"tokens must hold the end token {self.config.eot_id} in every row. One row has none.")
        return found.int().argmax(1)

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Columns that decide each row's vector, int64 (B,): up to its end token if later ones cannot be seen
        (causal), up to its last word if padding is hidden, else all."""
        if self.config.causal and self.config.pool == "eot":
            return self.end(tokens) + 1
        if self.config.mask_padding and self.config.pool in ("mean", "first"):
            places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            return (places * (tokens != self.config.pad_id)).amax(1).clamp(min=1)
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
