"""A collection of small pictures made with a toy encoder, served in the process of the test."""

from importlib.util import find_spec

import pytest
from small_server import COUNT, picture

from clipworks.encoders.formats.native import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.store.collection import Collection
from clipworks.store.embed import embed

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "httpx")):  # the extra "serve" is not there
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folder with `photos/`, `toy.safetensors` and the collection `kept`."""
    folder = tmp_path_factory.mktemp("served")
    save(toy_encoder(tokenizer=CLIPTokenizer()), folder / "toy.safetensors")
    for i in range(COUNT):
        target = folder / "photos" / ("even" if i % 2 == 0 else "odd") / f"{i:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(target)
        target.with_suffix(".txt").write_text(f"picture {i}")
    embed(str(folder / "photos"), str(folder / "kept"), encoder=str(folder / "toy.safetensors"), progress=False,
          label_from="folder")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def kept(place):
    return Collection.open(place / "kept")


@pytest.fixture(scope="session")
def client(place):
    """A client of an application without a token."""
    from starlette.testclient import TestClient

    from clipworks.server.app import create_app

    app = create_app(place / "kept")
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as made:
        made.service = app.service
        yield made
