"""The project's own launchers (csrc/, compiled for the host) over a CUDA runtime without a GPU: each launch is emulated.

    extension = Extension("@EMULATOR@/work/ext")
    with extension.emulated(schedule=Schedule(1)): ops.causal_conv3d(..., backend="cuda")
"""

import contextlib
import ctypes
import importlib.util
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from . import memory
from .codegen import Program
from .machine import Launch
from .ptx import parse

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
                            ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)


class Extension:
    def __init__(self, folder: str):
        self.folder = Path(folder)
        spec = importlib.util.spec_from_file_location("_C", self.folder / "_C.so")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(self.folder / "_C.so"))
        self.kernels, self.programs = {}, {}
        self.texts = {path.stem: path.read_text() for path in self.folder.glob("*.ptx")}
        self.change = None
        self.allocations = memory.Allocations()
        self.options, self.records, self.error = {}, [], None
        self.callback = CALLBACK(self.launched)
        self.processors(3)

    def processors(self, count: int) -> None:
        self.library.ptxsim_set(self.callback, count)

    def program(self, name: str) -> Program:
        """The kernel of this name; only its own text is parsed."""
        key = (name, self.change)
        if key not in self.programs:
            for text in self.texts.values():
                at = text.find(f".entry {name}(")
                if at < 0:
                    continue
                start = text.rfind("\n", 0, at)
                following = text.find(".entry ", at + 10)
                end = text.rfind("\n}", at, following if following > 0 else len(text)) + 3
                first = text.find(".entry ")
                head = text[:text.rfind("\n", 0, first)]
                files = "\n".join(line for line in text.splitlines() if line.startswith("\t.file"))
                between = text[text.rfind("\n}", 0, at) + 3:start] if at > first else ""
                body = text[start:end]
                if self.change:
                    body = self.change(body)
                (kernel,) = parse(head + "\n" + between + "\n" + body + "\n" + files).values()
                self.programs[key] = Program(kernel)
        return self.programs[key]

    def launched(self, name, grid, block, args, shared) -> int:
        try:
            program = self.program(name.decode())
            params = program.kernel.params
            raw = bytearray(params[-1].offset + params[-1].size)
            for at, param in enumerate(params):
                raw[param.offset:param.offset + param.size] = ctypes.string_at(args[at], param.size)
            start = time.perf_counter()
            launch = Launch(program, tuple(grid[:3]), tuple(block[:3]), bytes(raw), self.allocations, shared=shared, **self.options)
            self.records.append((name.decode(), tuple(grid[:3]), time.perf_counter() - start, launch))
            return 0
        except BaseException as error:  # noqa: BLE001: it is raised again where the launch was asked for
            self.error = error
            return 999

    def launch(self, name, like, **fields):
        """In the place of sora_fast.ops.cuda_backend.launch."""
        self.allocations = memory.Allocations()
        tensors = {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)}
        local = sys._getframe(1).f_locals
        for key, value in {**local, **tensors}.items():
            if isinstance(value, torch.Tensor):
                self.allocations.add_tensor(value, key)
        given = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
        self.error = None
        try:
            getattr(self.module, name)(device=0, stream=0, **given)
        finally:
            if self.error is not None:
                raise self.error
        found = [f for record in self.records[-1:] for f in record[3].findings.values()]
        if found and not self.allow_findings:
            raise memory.Fault("; ".join(found))

    allow_findings = False

    @contextlib.contextmanager
    def emulated(self, **options):
        from sora_fast.ops import cuda_backend

        self.options, self.records = options, []
        with mock.patch.object(cuda_backend, "launch", self.launch), \
                mock.patch.object(cuda_backend, "unsupported", lambda problem, kernel, wide: []):
            yield self
