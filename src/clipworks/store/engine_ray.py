"""`embed(..., engine="ray")`: images decoded and encoded by actors on one machine or many, through Ray Data.

The caller keeps what must not be in two places: it walks the source, knows what the collection holds, and is its only
writer. Blocks of a few batches go out to actors that hold the encoder and come back in the order in which they went;
Ray holds them back while the caller is busy, and gives the block of a dead actor to another one. An actor forms the
same batches as the caller alone would, pads them alike and computes with as many threads, so that the vectors are the
same to the bit on machines of one kind.

What dies with the caller is what is on its way; the collection keeps what was committed, and the same command goes on.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import BadImage, ClipworksError, need
from ..progress import Progress

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

BATCHES = 4  # per block: an actor decodes the next batch of a block while it encodes one
PORTION = 1 << 30  # bytes of items that Ray is given at a time: a million paths, or some thousand images in memory
RESULTS = 1 << 28  # bytes of results that may wait for the caller
RETRIES = 5  # times that a block whose actor died is tried again: an image may be what kills it


@dataclass
class Encoded:
    """A batch as an actor gives it back.

    Attributes
    ----------
    items : of the images that could be used, without the images, their digests computed
    vectors : (len(items), dim) float32
    errors : the bad ones among the batch
    waited, worked : seconds in which the encoder waited for images, and in which it or they were at work
    """

    items: list[Item]
    vectors: np.ndarray
    errors: list[BadImage] = field(default_factory=list)
    waited: float = 0.0
    worked: float = 0.0

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> list[str]:
        return [item.key for item in self.items]


class RayBatches:
    """Iterate over the batches of `items`, encoded by actors, in order.

    Joins the Ray that is running in this process or that RAY_ADDRESS names; starts one of its own otherwise, and ends
    it afterwards.

    Parameters
    ----------
    items : to encode
    model : the encoder; a copy of it is sent to every actor
    name : what an exported encoder was loaded by, since its graphs cannot be sent
    batch_size, workers : images per pass; decoding threads per actor (default: one per thread of the encoder)
    actors : how many (default: one per GPU if the encoder is on one, else as many as fit the processors)

    Attributes
    ----------
    wait_share : share of the actors' time in which the encoder waited for images

    Raises
    ------
    MissingExtra
        If Ray is not installed.
    ClipworksError
        If the source fails, or Ray does; what came before is delivered.
    """

    def __init__(
        self, items: Iterable[Item], model: Encoder, name: str | None, batch_size: int, workers: int | None,
        actors: int | None,
    ):  # fmt: skip
        import torch

        need("ray.data", "scale")
        self.items, self.actors = items, actors
        self.waited = self.worked = 0.0
        self.threads = torch.get_num_threads()
        self.work: dict[str, Any] = {
            "fingerprint": model.fingerprint, "device": model.device.type, "batch_size": batch_size,
            "workers": workers or self.threads, "threads": self.threads,
        }  # fmt: skip
        self.model = _portable(model, name)

    @property
    def wait_share(self) -> float:
        return self.waited / self.worked if self.worked else 0.0

    def __iter__(self) -> Iterator[Encoded]:
        import ray
        import ray.data
        import ray.exceptions

        with _cluster():
            size = BATCHES * self.work["batch_size"]
            room = ray.data.ExecutionResources.for_limits(object_store_memory=RESULTS)
            tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tries).remote(1 + RETRIES)
            given = {"model": ray.put(self.model), "tries": tries, **self.work}
            options = self._options() | {"fn_constructor_kwargs": given}
            for blocks in _portions(self.items, size):
                tables = [pa.table({"name": [name], "block": pa.array([block], pa.large_binary())})
                          for name, block in blocks]  # fmt: skip
                blocks.clear()
                data = ray.data.from_arrow(tables).map_batches(_Actor, **options)
                del tables
                data.context.execution_options.preserve_order = True
                data.context.execution_options.resource_limits = room
                data.context.enable_progress_bars = False
                try:
                    for row in data.iter_rows():
                        yield from self._counted(pickle.loads(row["block"]))
                except ray.exceptions.RayError as error:
                    raise ClipworksError(f"Ray could not go on: {_first_line(error)}") from error

    def _counted(self, found: list[Encoded] | ClipworksError) -> Iterator[Encoded]:
        if isinstance(found, ClipworksError):
            raise found
        for batch in found:
            self.waited, self.worked = self.waited + batch.waited, self.worked + batch.worked
            yield batch

    def _options(self) -> dict[str, Any]:
        """How many actors there are, and what each needs. Ray starts a dead one again, and begins its block again."""
        import ray
        from ray.data import ActorPoolStrategy

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self.work["device"] == "cuda":
            needs, room = {"num_gpus": 1}, sum(int(node.get("GPU", 0)) for node in nodes)
        else:
            cores = [int(node.get("CPU", 0)) for node in nodes]
            cores_each = max(1, min(self.threads, max(cores, default=1)))  # never more than a machine has
            needs, room = {"num_cpus": cores_each}, sum(count // cores_each for count in cores)
        return {
            "compute": ActorPoolStrategy(size=self.actors or max(1, room)), **needs,
            "batch_size": 1, "batch_format": "pyarrow",
        }  # fmt: skip


class _Tries:
    """An actor that counts how often each block is begun: Ray itself would begin one that kills its actor for ever."""

    def __init__(self, most: int):
        self.most, self.begun = most, Counter[str]()

    def begin(self, name: str) -> int:
        """Count a beginning; how often the block was begun before if that is as often as it may, else 0."""
        before = self.begun[name]
        self.begun[name] += 1
        return before if before >= self.most else 0


class _Actor:
    """The encoder on some machine; a call decodes and encodes one block."""

    def __init__(
        self, model: Any, tries: Any, fingerprint: str, device: str, batch_size: int, workers: int, threads: int
    ):
        import ray
        import torch

        torch.set_num_threads(threads)
        found = ray.get(model)
        if isinstance(found, tuple):
            from .identity import obtain

            found, _ = obtain(*found)
        self.model: Encoder = found.to(device)
        self.batch_size, self.workers, self.tries = batch_size, workers, tries
        self.differs = self.model.fingerprint != fingerprint

    def __call__(self, table: pa.Table) -> pa.Table:
        import ray

        name = table["name"][0].as_py()
        found: list[Encoded] | ClipworksError
        try:
            if died := ray.get(self.tries.begin.remote(name)):
                raise ClipworksError(f"the process that encodes the images from {name} died {died} times: an image may "
                                     "be what ends it, or it lacks memory.")  # fmt: skip
            found = self._encode(pickle.loads(table["block"][0].as_py()))
        except ClipworksError as error:
            found = error
        return pa.table({"block": pa.array([pickle.dumps(found)], pa.large_binary())})

    def _encode(self, items: list[Item]) -> list[Encoded]:
        from ..data.loader import load_batches
        from .embed import vectors_of_batch

        if self.differs:
            raise ClipworksError(
                "an actor's encoder differs from the caller's in its fingerprint; all machines need the same clipworks "
                "and, for an exported encoder, the same files."
            )
        batches = load_batches(items, self.model.preprocess, self.batch_size, self.workers, "report")
        bar = Progress(batches, enabled=False)
        found = []
        for batch in bar:
            vectors = vectors_of_batch(self.model, batch, self.batch_size)
            for item in batch.items:
                item.image = None  # its digest is known by now
            found.append(Encoded(batch.items, vectors, batch.errors))
        if found:
            found[-1].waited, found[-1].worked = bar.waited, bar.elapsed
        return found


def _portable(model: Encoder, name: str | None) -> Any:
    """What an actor gets: a copy of the encoder without its device, or how to load an exported one."""
    import copy

    if not hasattr(model, "runtime"):
        return model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
    if name is None:
        raise ClipworksError(
            "an exported encoder cannot be sent to other processes; give encoder= as the path of its folder, which "
            "every machine must see."
        )
    return os.path.abspath(name), None, None, bool(getattr(model.preprocess, "fast", False))


def _portions(items: Iterable[Item], size: int) -> Iterator[list[tuple[str, bytes]]]:
    """Blocks of `size` items, which they are and pickled, as many at a time as are to be in memory; then the error that
    the source had."""
    blocks: list[tuple[str, bytes]] = []
    block: list[Item] = []
    failure: Exception | None = None
    held = 0
    walk = iter(items)
    while failure is None:
        try:
            block.append(next(walk))
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if len(block) == size:
            blocks.append(_packed(block))
            held, block = held + len(blocks[-1][1]), []
            if held >= PORTION:
                yield blocks
                blocks, held = [], 0
    if block:
        blocks.append(_packed(block))
    if blocks:
        yield blocks
    if failure is not None:
        raise failure


def _packed(block: list[Item]) -> tuple[str, bytes]:
    return f"{block[0].key!r} to {block[-1].key!r}", pickle.dumps(block)


@contextmanager
def _cluster() -> Iterator[None]:
    """Ray as it is here, or one that ends with the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many kinds; on a busy machine its processes may start too slowly for its patience
        given = os.environ.get("RAY_ADDRESS")
        place = f"the cluster of RAY_ADDRESS={given!r}" if given else "Ray"
        raise ClipworksError(f"{place} cannot be reached or started: {_first_line(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["Encoded", "RayBatches"]
