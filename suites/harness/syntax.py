"""What a file's code says: a digest of its syntax, and what it imports. Comments, layout and
docstrings do not count.

Parsing the 60 files of a run takes longer than all else that a child does before it measures, so
what was found is kept on the node's own disk under the digest of a file's bytes: it cannot be out
of date, and is lost without harm.
"""

import ast
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import uuid
from functools import cache
from pathlib import Path

MAX_ENTRIES = 5000  # of files as they were once, about 1 MB; then only what is used now is kept


def digest(path: str) -> str:
    """Of the syntax tree; empty where there is no file."""
    return _found(path)[0] if path else ""


def imports(path: str) -> list[str]:
    """Names in its import statements, and each that may be a module."""
    return _found(path)[1] if path else []


def keep() -> None:
    """Writes what was parsed here for those who come next."""
    global _is_new
    if not _is_new:
        return
    _is_new = False
    path = _place()
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    kept = _known() if len(_known()) <= MAX_ENTRIES else {k: _known()[k] for k in _used}
    with contextlib.suppress(OSError):  # a disk that is full, or not ours: parsed again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(path)


_is_new = False
_used: set[str] = set()


@cache
def _found(path: str) -> tuple[str, list[str]]:
    global _is_new
    with open(path, "rb") as file:
        content = file.read()
    key = hashlib.blake2b(content, digest_size=16).hexdigest()
    if key not in _known():
        _known()[key] = _parse(content)
        _is_new = True
    _used.add(key)
    return _known()[key]


@cache
def _known() -> dict[str, tuple[str, list[str]]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_place().read_text(encoding="utf-8"))
    return {}


@cache
def _place() -> Path:
    """Of this Python, whose syntax trees are its own, and of the code of this file."""
    code = f"{sys.version} {Path(__file__).read_text(encoding='utf-8')}"
    name = hashlib.blake2b(code.encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir(), f"aerie-cache-{os.getuid()}", f"syntax-{name}.json")


def _parse(content: bytes) -> tuple[str, list[str]]:
    tree = ast.parse(content)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and body and ast.get_docstring(node, clean=False):
            node.body = body[1:]
    syntax = hashlib.blake2b(ast.dump(tree).encode(), digest_size=16).hexdigest()
    return syntax, sorted(names)
