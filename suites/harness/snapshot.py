"""A copy of the code, taken once by content: what is queued runs from it, not from the checkout
that is edited meanwhile."""

import compileall
import hashlib
import json
import shutil
import uuid
from pathlib import Path

from suites.harness import provenance
from suites.harness.record import sync_folder, write_atomically

PACKAGES = ("implementations", "suites", "analysis", "configs")
SUFFIXES = (".py", ".yaml", ".j2")
FACTS = provenance.SNAPSHOT  # says of which commit the copy is


def take(store: Path) -> Path:
    """The folder STORE/code/DIGEST of our code, made if it is not there; whole, or not at all."""
    files = sorted(
        path
        for package in PACKAGES
        for path in (provenance.ROOT / package).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
    digest = hashlib.blake2b(digest_size=8)
    contents = {}
    for path in files:
        name = str(path.relative_to(provenance.ROOT))
        contents[name] = path.read_bytes()
        digest.update(f"{name} {len(contents[name])}\n".encode())
        digest.update(contents[name])
    folder = store.resolve() / "code" / digest.hexdigest()
    if folder.is_dir():
        return folder
    draft = folder.with_name(f".new-{uuid.uuid4().hex}")
    for name, content in contents.items():
        place = draft / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    facts = {"git_commit": provenance.git_commit()}
    write_atomically(draft / FACTS, json.dumps(facts))
    # or every process of every job compiles it, where bytecode is not written on the nodes
    compileall.compile_dir(draft, quiet=2, stripdir=str(draft), prependdir=str(folder))
    try:
        draft.rename(folder)
        sync_folder(folder.parent)
    except OSError:  # somebody else's copy of the same code is there
        shutil.rmtree(draft)
        if not folder.is_dir():
            raise
    return folder
