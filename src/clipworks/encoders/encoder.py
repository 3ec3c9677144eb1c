"""`Encoder`: two towers, a tokenizer and the preprocessing that belong together, under one fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_choice, check_range
from ..progress import Progress
from . import precision as precisions
from .config import EncoderConfig
from .layers import resize_positions, stretch_positions
from .text import TextTransformer
from .vit import VisionTransformer

ON_LONG = ("truncate", "error", "chunk-mean")


class Encoder(nn.Module):
    """Images and texts to vectors of one space.

    Parameters
    ----------
    config : shapes of both towers, preprocessing, scale
    tokenizer : object with `encode(texts, context_length, on_long) -> (ids, truncated)`, `chunks`, `pad_id`,
        `eot_id`, `fingerprint`; None for an encoder that is given token ids only
    preprocess : from an image to pixels (default: `Preprocess(config.preprocess)`)
    seed : of the random start weights; None leaves torch's defaults, for loaders that fill them anyway

    Attributes
    ----------
    dim, image_size, context_length : of the joint space, of the images in pixels, of the texts in tokens
    logit_scale : factor of the similarities, exp(log_scale)
    source : the name or path it was loaded from, while it is as it was then
    log_scale, bias : learned logarithm of that factor; learned bias (SigLIP) or None
    truncated : how many texts were cut so far
    fingerprint : hash of everything that decides a vector
    """

    def __init__(self, config: EncoderConfig, tokenizer: Any = None, preprocess: Any = None, *, seed: int | None = 0):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self._preprocess = preprocess
        self.visual: Any  # either tower; both have run, project and config
        if config.vision.kind == "resnet":
            from .resnet import ModifiedResNet

            self.visual = ModifiedResNet(config.vision, config.dim)
        else:
            self.visual = VisionTransformer(config.vision, config.dim)
        self.text = TextTransformer(config.text, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(float(config.init_log_scale)))
        self.register_parameter(
            "bias", None if config.logit_bias is None else nn.Parameter(torch.tensor(float(config.logit_bias)))
        )
        self.truncated = 0
        self._hash: tuple[Any, str] | None = None
        self._origin: tuple[Any, str] | None = None
        if seed is not None:
            from .initialise import initialise

            initialise(self, seed)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def image_size(self) -> int:
        return self.config.vision.image_size

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    @property
    def logit_scale(self) -> float:
        return float(self.log_scale.detach().exp())

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are multiplied with."""
        return self.text.dtype

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16"."""
        return {v: k for k, v in precisions.DTYPES.items()}.get(self.dtype, str(self.dtype))

    @property
    def preprocess(self) -> Any:
        """From an image to a float tensor (3, H, W)."""
        if self._preprocess is None:
            from .preprocess import Preprocess

            self._preprocess = Preprocess(self.config.preprocess)
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: Any) -> None:
        self._preprocess = value

    # -- differentiable ------------------------------------------------------------------------------------------

    def encode_image(self, pixels: torch.Tensor, *, normalize: bool = True, **seams: Any) -> torch.Tensor:
        """Pixels (B, 3, H, W) to float32 (B, dim), with gradients; `seams` as in the tower's `run`.

        Pixels on another device come to the encoder's; the result stays there.
        """
        return _finish(self.visual(pixels.to(self.device, self.dtype), **seams), normalize)

    def encode_text(
        self, tokens: torch.Tensor | None = None, *, normalize: bool = True, **seams: Any
    ) -> torch.Tensor:
        """Token ids (B, L) to float32 (B, dim), with gradients; `seams` as in the tower's `run`.

        Ids on another device come to the encoder's; the result stays there.
        """
        return _finish(self.text(None if tokens is None else tokens.to(self.device), **seams), normalize)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit image features, unit text features and the scale, for a contrastive loss."""
        return self.encode_image(pixels), self.encode_text(tokens), self.log_scale.exp()

    # -- inference -----------------------------------------------------------------------------------------------

    def images(
        self, x: Any, *, batch_size: int = 32, normalize: bool = True, progress: bool | None = None
    ) -> torch.Tensor:
        """Encode images.

        Parameters
        ----------
        x : one or a list of paths, encoded bytes, PIL images, uint8 arrays (H, W, 3) or items of a source; or a float
            tensor of preprocessed pixels (N, 3, H, W)
        batch_size : images per pass
        normalize : whether rows have length one
        progress : True shows a bar on a terminal

        Returns
        -------
        float32 (N, dim) on the CPU

        Raises
        ------
        BadImage
            For an image that cannot be used, naming it.
        """
        check_range("batch_size", batch_size, 1)
        from ..data.item import as_items
        from ..data.loader import load_batches

        batches: Iterable[torch.Tensor]
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            pixels = x[None] if x.ndim == 3 else x
            if pixels.ndim != 4 or pixels.shape[1] != 3:
                raise ClipworksError(f"pixels must have the shape (N, 3, H, W). Got {tuple(x.shape)}.")
            count, batches = len(pixels), pixels.split(batch_size)
        else:
            items = as_items(x)
            count = len(items)
            batches = (batch.pixels for batch in load_batches(items, self.preprocess, batch_size))
        parts = []
        with self._inference():
            bar = Progress(batches, count, "encoding images", unit=len, enabled=None if progress else False)
            for batch in bar:
                parts.append(self.encode_image(batch.to(self.device), normalize=normalize).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def texts(
        self, x: str | Sequence[str], *, batch_size: int = 256, normalize: bool = True, on_long: str = "truncate"
    ) -> torch.Tensor:
        """Encode texts.

        Parameters
        ----------
        x : one text or a list
        batch_size : texts per pass; they are sorted by length, and a batch costs what its longest text costs
        normalize : whether rows have length one
        on_long : for texts beyond the context: "truncate" (counted, reported once), "error", or "chunk-mean",
            which encodes all of the text in pieces and averages their vectors

        Returns
        -------
        float32 (N, dim) on the CPU, in the order given
        """
        check_range("batch_size", batch_size, 1)
        check_choice("on_long", on_long, ON_LONG)
        if on_long == "chunk-mean":
            tokens, owner = self._tokenizer().chunks(x, self.context_length)
            rows = self._rows(self._pad(tokens), batch_size, normalize)
            count = int(owner.max()) + 1 if len(owner) else 0
            total = torch.zeros(count, self.dim).index_add_(0, owner, rows)
            mean = total / torch.bincount(owner, minlength=count)[:, None]
            return F.normalize(mean, dim=-1) if normalize else mean
        return self._rows(self._encode(x, on_long), batch_size, normalize)

    def tokenize(self, x: str | Sequence[str], on_long: str = "truncate") -> torch.Tensor:
        """Token ids, int64 (N, L); L is the longest row, or the whole context where the last position is read.

        Parameters
        ----------
        x : one text or a list
        on_long : "truncate" or "error"; cut texts are counted in `truncated`, and the first are reported
        """
        return self._encode(x, on_long)

    def _encode(self, x: str | Sequence[str], on_long: str) -> torch.Tensor:
        tokens, cut = self._tokenizer().encode(x, self.context_length, on_long)
        if cut and not self.truncated:
            warnings.warn(
                f"{cut} of {len(tokens)} texts are longer than {self.context_length} tokens and were cut. Further ones "
                "are only counted (`encoder.truncated`); on_long='chunk-mean' reads all of a text.",
                stacklevel=3,
            )
        self.truncated += cut
        return self._pad(tokens)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ClipworksError("this encoder has no tokenizer, so it can only encode token ids (encode_text).")
        return self.tokenizer

    def _pad(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.text.pool != "last":
            return tokens
        return F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self.config.text.pad_id)

    def _rows(self, tokens: torch.Tensor, batch_size: int, normalize: bool) -> torch.Tensor:
        if not len(tokens):
            return torch.empty(0, self.dim)
        order = self.text.lengths(tokens).argsort(stable=True)
        with self._inference():
            parts = [
                self.encode_text(tokens[part].to(self.device), normalize=normalize).cpu()
                for part in order.split(batch_size)
            ]
        # filled outside inference mode: the result may then be used where gradients are computed
        rows = torch.empty(len(tokens), self.dim, dtype=parts[0].dtype)
        rows[order] = torch.cat(parts)
        return rows

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = [m for m in self.modules() if m.training]
        if training:
            self.eval()
        try:
            place = self.device
            with torch.inference_mode(), precisions.fast_matmul(place), precisions.exact_convolutions(place):
                yield
        finally:
            for module in training:
                module.training = True

    # -- shape, precision, identity ------------------------------------------------------------------------------

    def resize(self, *, image_size: int | None = None, context_length: int | None = None, keep: int = 20) -> Encoder:
        """Bring the positional tables to another image size or a longer context, in place, configuration included.

        Parameters
        ----------
        image_size : new side in pixels (the table is interpolated)
        context_length : new number of tokens, not below the present one (the table is stretched, see
            `layers.stretch_positions`)
        keep : rows at the start of the text table that stay as they are
        """
        config = self.config
        if image_size is not None and image_size != self.image_size:
            vision = dataclasses.replace(config.vision, image_size=image_size)
            preprocess = dataclasses.replace(config.preprocess, size=image_size)
            config = dataclasses.replace(config, vision=vision, preprocess=preprocess)
            holder = self.visual.pool if vision.kind == "resnet" else self.visual
            table = holder.positions
            holder.positions = _parameter(resize_positions(table, holder.grid, vision.grid), table)
            holder.grid, self.visual.config = vision.grid, vision
            if self._preprocess is not None:
                self._preprocess = dataclasses.replace(self._preprocess, config=preprocess)
        if context_length is not None and context_length != self.context_length:
            text = dataclasses.replace(config.text, context_length=context_length)
            config = dataclasses.replace(config, text=text)
            rows = self.text.positions
            self.text.positions = _parameter(stretch_positions(rows, context_length, keep), rows)
            self.text.config = text
        self.config = config
        return self

    def to_precision(self, precision: str) -> Encoder:
        """Convert the weights in place to "fp32", "bf16", "fp16" or "auto" (see `precision.choose`)."""
        asked = precisions.choose(precision, self.device)
        if asked != self.precision:  # there and back is not the same weights, though they may lie in the same memory
            self._hash = self._origin = None
        precisions.convert(self, precisions.DTYPES[asked])
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration, weights, preprocessing, tokenizer and precision, as 64 hex digits.

        Cached until a weight changes in place or is replaced; after writing through `.data` call `refresh`.
        """
        key = self._state()
        if self._hash is None or self._hash[0] != key:
            self._hash = (key, self._digest(self.state_dict(keep_vars=True)))
        return self._hash[1]

    @property
    def source(self) -> str | None:
        """The name or path that `load` read this encoder from; None if it has been changed since, or was made here."""
        return None if self._origin is None or self._origin[0] != self._state() else self._origin[1]

    def loaded_from(self, source: str) -> Encoder:
        """Remember that `load` gives this very encoder for a name or path."""
        self._origin = (self._state(), source)
        return self

    def _state(self) -> tuple:
        """What changes with anything that decides a vector, unless a weight is written through `.data`."""
        return (self.config, self.precision, id(self.tokenizer), self._preprocess_key(), self._structure(),
                tuple((t.data_ptr(), t._version) for t in self.state_dict(keep_vars=True).values()))  # fmt: skip

    def refresh(self) -> str:
        """Compute the fingerprint anew."""
        self._hash = self._origin = None
        return self.fingerprint

    def _preprocess_key(self) -> str:
        return str(getattr(self.preprocess, "fingerprint", "") or self.config.preprocess)

    def _structure(self) -> str:
        # names of classes only: unlike a module's text form they do not change between versions of torch
        return " ".join(f"{name}:{type(module).__name__}" for name, module in self.named_modules())

    def _digest(self, state: dict[str, torch.Tensor]) -> str:
        record = {
            # a name decides no vector: the same weights under another file name are the same encoder
            "config": {k: v for k, v in self.config.to_dict().items() if k != "name"},
            "preprocess": self._preprocess_key(),
            "tokenizer": getattr(self.tokenizer, "fingerprint", "none"),
            "precision": self.precision,
            "structure": self._structure(),
        }
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _finish(features: torch.Tensor, normalize: bool) -> torch.Tensor:
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features, dim=-1) if normalize else features


def _parameter(values: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=like.requires_grad)


