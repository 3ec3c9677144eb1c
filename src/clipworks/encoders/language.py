"""A sentence or language model of the transformers library as one vector per text.

A causal model pools badly, as its words do not know those behind them. Where a model turns out to be causal it is run
with a mask that hides nothing but padding, as LLM2Vec does (BehnamGhader et al. 2024); nothing in the model is changed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ClipworksError, check_choice, check_range, need
from .layers import masked_mean, pick
from .tokenizers.pretrained import PretrainedTokenizer

POOLS = ("mean", "first", "last")
FILL = -1  # of short rows: no token of any model, so what is padding is never in doubt


class LanguageModel(nn.Module):
    """Token ids to one vector per text; the weights do not learn, and copies share them.

    Parameters
    ----------
    model : folder or name of a model on the Hugging Face hub (which is fetched if it is not there; none of its code is
        run), or the loaded model
    tokenizer : the loaded tokenizer, where the model is loaded
    pool : "mean" of the words, or the state of the "first" or "last" one
    bidirectional : let the words of a causal model see those behind them
    context_length : most tokens of a text, where the model takes as many

    Attributes
    ----------
    width : of the vectors
    tokenizer : as an `Encoder` takes it; it fills short rows with -1
    causal : whether a word's state does not depend on those behind it
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, pool: str = "mean", bidirectional: bool = True,
        context_length: int = 512,
    ):  # fmt: skip
        super().__init__()
        if isinstance(model, str):
            library = need("transformers", "teachers")
            try:
                tokenizer = tokenizer or library.AutoTokenizer.from_pretrained(model)
                model = library.AutoModel.from_pretrained(model)
            except (OSError, ValueError) as error:
                reason = str(error).strip().split("\n")[0]
                got = f"Got {model!r}: {reason}"
                raise ClipworksError(f"language_model must be a model of transformers. {got}") from None
        if not isinstance(model, nn.Module) or not hasattr(model, "base_model"):
            raise ClipworksError(f"language_model must be a name, a folder or a loaded model of transformers. "
                                 f"Got {type(model).__name__}.")  # fmt: skip
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ClipworksError(f"tokenizer must be a loaded one of transformers that has a tokenizer.json. "
                                 f"Got {type(tokenizer).__name__}.")  # fmt: skip
        inner: Any = model.base_model
        inner = inner.get_encoder() if inner.config.is_encoder_decoder else inner
        self.model: Any = inner.eval().requires_grad_(False)
        room = getattr(inner.config, "max_position_embeddings", None) or context_length
        self.context_length = int(min(check_range("context_length", context_length, 3), room))
        self.width, self.vocab_size = int(inner.config.hidden_size), int(inner.config.vocab_size)
        self.pool = check_choice("pool", pool, POOLS)
        file = tokenizer.backend_tokenizer.to_str().encode()
        self.tokenizer = PretrainedTokenizer(file, pad_id=FILL, eot_id=FILL)
        known = inspect.signature(inner.forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in known else {}
        self._open = False
        if bidirectional and self.causal:
            self._open = True
            if self.causal:
                raise ClipworksError(f"bidirectional needs a model whose attention takes a mask of its own. "
                                     f"{type(inner).__name__} stays causal.")  # fmt: skip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), -1 behind the last, to (B, width)."""
        words = tokens >= 0
        states = self.states(tokens)
        if self.pool == "mean":
            return masked_mean(states, words)
        return states[:, 0] if self.pool == "first" else pick(states, words.sum(1) - 1)[:, 0]

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last layer's output for every token, (B, L, width)."""
        words = tokens >= 0
        mask = words.long()
        if self._open:
            dtype = next(self.model.parameters()).dtype
            hidden = torch.zeros(len(tokens), 1, 1, tokens.shape[1], dtype=dtype, device=tokens.device)
            hidden = hidden.masked_fill(~words[:, None, None], torch.finfo(dtype).min)
            mask = hidden.expand(-1, -1, tokens.shape[1], -1)
        return self.model(input_ids=tokens.clamp(min=0), attention_mask=mask, **self._extra).last_hidden_state

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of every text, int64 (B,)."""
        return (tokens >= 0).sum(1)

    @property
    def causal(self) -> bool:
        """Whether the first word's state stays as it is when the last word is another one."""
        first = self.vocab_size // 2
        rows = torch.tensor([[0, 1, 0], [0, 1, 2]]) + max(0, min(first, self.vocab_size - 3))
        with torch.no_grad():
            one, other = self.states(rows.to(next(self.model.parameters()).device))[:, 0].float()
        return bool((one - other).abs().max() <= 1e-6 * one.abs().max())

    def add_lora(self, rank: int) -> None:
        """Put low-rank additions that learn beside every linear map, with twice their rank as factor (LLM2Vec)."""
        peft = need("peft", "adapt")
        names = [n for n, part in self.model.named_modules() if _is_linear(part) and "pooler" not in n]
        config = peft.LoraConfig(r=int(check_range("rank", rank, 1)), lora_alpha=2 * rank, target_modules=names,
                                 bias="none")  # fmt: skip
        peft.inject_adapter_in_model(config, self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        memo |= {id(value): value for _, value in _still(self)}
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class LanguageTower(nn.Module):
    """A text tower made of a frozen model and an adapter.

    Parameters
    ----------
    model : `LanguageModel`, or a text tower
    adapter : module from its vectors into the joint space, with the last map as `out`
    mark : of the model's weights, see `digest`
    """

    digest: torch.Tensor

    def __init__(self, model: Any, adapter: Any, mark: torch.Tensor):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.register_buffer("digest", mark)

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.out.weight.dtype

    def forward(
        self, tokens: torch.Tensor | None = None, *, vectors: torch.Tensor | None = None, **seams: Any
    ) -> torch.Tensor:
        """Token ids (B, L), or the model's vectors (B, width), to (B, dim), not normalised."""
        if seams or (tokens is None) == (vectors is None):
            got = ", ".join(seams) or "neither or both"
            raise ClipworksError(f"a language model as text tower takes tokens or vectors. Got {got}.")
        return self.adapter(self.vectors(tokens) if vectors is None else vectors)  # type: ignore[arg-type]

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) to the model's vectors (B, width)."""
        return self.model(tokens).to(self.dtype)

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Columns that decide each row's vector, int64 (B,)."""
        return self.model.lengths(tokens)


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"  # GPT-2's


def _still(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that never learn, by the names that they have without additions."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if "lora_" not in name:
            yield name.replace("base_layer.", ""), value


def digest(module: nn.Module) -> torch.Tensor:
    """Return a mark of a module's weights, uint8 (32,): of their names, shapes and first thousand values each."""
    state = hashlib.sha256()
    for name, value in sorted(_still(module), key=lambda pair: pair[0]):
        state.update(f"{name} {tuple(value.shape)}".encode())
        state.update(value.detach().reshape(-1)[:1000].cpu().double().numpy().tobytes())
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)
