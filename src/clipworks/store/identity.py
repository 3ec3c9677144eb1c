"""Which encoder made a collection: what is recorded, and what differs when another one comes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CollectionError
from .journal import sha256

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder
    from .collection import Collection

DEFAULT = "clipworks-small"


def describe(encoder: Encoder, source: str | None = None) -> dict[str, Any]:
    """What a collection records about its encoder, ready for JSON."""
    preprocess = encoder.preprocess
    return {
        "fingerprint": encoder.fingerprint,
        "name": encoder.config.name,
        "source": source or getattr(encoder, "source", None),
        "dim": encoder.dim,
        "precision": encoder.precision,
        **({"runtime": encoder.runtime} if hasattr(encoder, "runtime") else {}),
        "fast": bool(getattr(preprocess, "fast", False)),
        "preprocess": str(getattr(preprocess, "fingerprint", "")),
        "tokenizer": str(getattr(encoder.tokenizer, "fingerprint", "none")),
        "config": encoder.config.to_dict(),
    }


def recorded(encoder: Encoder, source: str | None = None) -> dict[str, Any]:
    """As `describe`, with the SHA-256 of the weights file that was loaded by name: for a new collection."""
    made = describe(encoder, source)
    path = weights_file(made["source"])
    return made | ({} if path is None else {"weights": sha256(path)})


def weights_file(source: str | None) -> Path | None:
    """The weights file of the package or of the user that a name stands for; None for any other name."""
    from .. import encoders

    if not source:
        return None
    bundled = Path(encoders.__file__).with_name("weights") / f"{source}.safetensors"  # as `encoders.loading` finds it
    given = Path(source)
    found = bundled if bundled.name == f"{source}.safetensors" else given
    return next((p for p in (found, given) if p.suffix == ".safetensors" and p.is_file()), None)


def differences(recorded: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The fields in which two encoders differ, each as "field: recorded -> given"; the weights if no other does."""
    ignored = {"fingerprint", "source", "config.name", "name", "weights"}
    one, two = flat(recorded), flat(given)
    names = sorted({*one, *two} - ignored)
    found = [f"{k}: {one.get(k)!r} -> {two.get(k)!r}" for k in names if one.get(k) != two.get(k)]
    plain = [line for line in found if not line.startswith(("preprocess:", "tokenizer:"))]
    if not plain and found:  # only then is a hash worth showing
        return [f"{line.split(':')[0]}: rules or files differ" for line in found]
    return plain or ["weights"]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def check_same(path: Any, recorded: dict[str, Any], given: dict[str, Any], remedy: str) -> None:
    """Refuse an encoder other than the recorded one, with both fingerprints and what differs."""
    mine, other = recorded.get("fingerprint", ""), given["fingerprint"]
    if mine == other or not mine:
        return
    fields = "; ".join(differences(recorded, given)[:6])
    raise CollectionError(
        f"collection {str(path)!r} was made by encoder {recorded.get('name')!r} (fingerprint {mine[:12]}), this is "
        f"{given['name']!r} (fingerprint {other[:12]}). They differ in {fields}. "
        f"Vectors of both cannot be compared; {remedy}"
    )


def encoder_of(collection: Collection, encoder: str | Encoder | None = None) -> Encoder:
    """The encoder for a collection's queries: the given one if it fits, else the recorded one.

    Raises
    ------
    CollectionError
        If the encoder is not the one that made the collection, or the collection does not say which did.
    """
    recorded = collection.meta["encoder"]
    if not recorded.get("fingerprint") and encoder is None:
        raise CollectionError(f"collection {str(collection.path)!r} does not say which encoder made it; give encoder=.")
    model, name = obtain(encoder, recorded)
    check_same(collection.path, recorded, describe(model, name), "give the encoder that made the collection.")
    if model.dim != collection.dim:
        raise CollectionError(f"the encoder's vectors have length {model.dim}, the collection's {collection.dim}.")
    return model


def obtain(
    encoder: str | Encoder | None,
    recorded: dict[str, Any] | None = None,
    precision: str | None = None,
    fast: bool | None = None,
    device: str | None = None,
) -> tuple[Encoder, str | None]:
    """The encoder to use, and the name it was loaded by.

    Parameters
    ----------
    encoder : an encoder, a name or path for `clipworks.load`, or None for the recorded one (the default model for
        a new collection)
    recorded : what the collection says of its encoder
    precision, fast : None keeps the encoder's, or the recorded, ones; an encoder that is given is never changed
    device : of an encoder that is loaded here, as for `clipworks.load`
    """
    recorded = recorded or {}
    source = encoder if isinstance(encoder, str) else None
    if encoder is None:
        source = recorded.get("source") or recorded.get("name") or DEFAULT
    if source is not None:
        from ..encoders.loading import load
        from ..encoders.precision import DTYPES
        from ..encoders.runtime.folder import is_export

        kept = recorded.get("precision")
        if kept not in DTYPES or is_export(Path(source)):  # an export has its own: then the fingerprints tell
            kept = None
        precision = precision or kept or "auto"
        fast = recorded.get("fast") if fast is None else fast
        loaded: Encoder = load(source, precision=precision, device=device)
    else:
        loaded = encoder  # type: ignore[assignment]
        if precision is not None and precision != loaded.precision:
            loaded = copy.deepcopy(loaded).to_precision(precision)
    if fast is not None and fast != getattr(loaded.preprocess, "fast", False):
        changed = dataclasses.replace(loaded.preprocess, fast=fast)
        loaded = copy.copy(loaded)
        loaded.preprocess = changed
    return loaded, source
