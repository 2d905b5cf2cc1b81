"""``aot.compile_for`` with its results kept in a folder, so that Triton and ptxas run once for each kernel.

A file is named by a hash of all that its result depends on: Triton's own hashes of source, constants and options, its
version and the environment variables that it obeys, the target, the versions of ptxas and cuobjdump, and the fields kept.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from .. import files
from . import aot

FIELDS = ", ".join(field.name for field in dataclasses.fields(aot.Compiled))


def compile_for(folder: Path, fn, signature: Mapping[str, str], constexprs: Mapping[str, object], aligned: Iterable[str],
                cc: int, **options) -> aot.Compiled:
    """``aot.compile_for``, or what it made of the same kernel before.

    Raises:
        OSError: ``folder`` cannot be written. Whatever the compiler raises.
    """
    backend = make_backend(GPUTarget("cuda", cc, 32))  # its hash: the target, and ptxas's version
    told = (aot.source_of(fn, signature, constexprs, aligned).hash(),
            backend.parse_options({**aot.FUSION, **options}).hash(), triton.__version__,
            str(sorted(get_cache_invalidating_env_vars().items())), backend.hash(), knobs.nvidia.cuobjdump.version, FIELDS)
    path = folder / f"{hashlib.sha256(chr(10).join(told).encode()).hexdigest()}.json.gz"
    found = _read(path)
    if found is None:
        found = aot.compile_for(fn, signature, constexprs, aligned, cc, **options)
        folder.mkdir(parents=True, exist_ok=True)
        kept = gzip.compress(json.dumps(dataclasses.asdict(found)).encode())
        files.replace(path, lambda temporary: temporary.write_bytes(kept))
    return found


def _read(path: Path) -> aot.Compiled | None:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        return aot.Compiled(**found | dict(losses=tuple(found["losses"])))
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error):  # there is none, or half of one
        return None
