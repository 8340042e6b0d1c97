"""Chooses the ptxas that assembles our kernels, and rejects versions that miscompile them.

Triton generates PTX, which NVIDIA's program ptxas assembles to machine code. Versions before 12.9
miscompile our kernels for Hopper (sm_90): the matrix products of a prefix read shared memory at
wrong addresses, and gradients are wrong without any error. Before a kernel is compiled, `choose`
therefore takes the user's assembler (TRITON_PTXAS_PATH), or else the newest one available, and
`refusal` says if it cannot be used. `kernels.on_triton` then chooses the reference path.

Only our kernels are compiled in this way. The decorator `assembled` wraps the function that their
JITFunction calls when a kernel is not yet compiled, so it adds no cost to a launch. Triton finds
its assembler through process-wide knobs, which `assembling` sets during one compilation, under a
lock. Other Triton code that compiles at that moment in another thread also gets our assembler,
which is newer than its own.

Sources: the release notes of CUDA 13.3 describe a second fault, a register that is reused while a
wgmma still reads it (triton-lang/triton#11781, #9433). The first is similar to
triton-lang/triton#7196 and #11366.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Version = tuple[int, ...]  # 12.8.93 is (12, 8, 93)
RECOMMENDED: Version = (13, 3)  # for sm_90: both faults are fixed


class Assembler(NamedTuple):
    """A ptxas that runs, or (version None) one that the user has named and that does not run."""

    path: str
    version: Any  # a Version, or None
    origin: str  # where it comes from

    def __str__(self) -> str:
        return f"ptxas {dotted(self.version)} ({self.path}, {self.origin})"


def dotted(version: Version | None) -> str:
    return "that does not run" if version is None else ".".join(map(str, version))


def oldest_accepted(arch: int) -> Version:
    """The oldest version that is accepted for an architecture, 90 for sm_90."""
    if arch == 90:
        return (12, 9)  # older ones miscompile descriptors
    return (12, 8) if arch >= 100 else (0,)  # the first that supports Blackwell


def choose(arch: int) -> Assembler | None:
    """The assembler of our kernels for an NVIDIA architecture; None if there is none.

    It is the user's, if one is named. Otherwise it is the newest one whose code the driver can
    load, or, if none of these is new enough, the newest of all.
    """
    if user := _users(arch):
        name, path = user
        return Assembler(path, version_of(path), name)
    found = tools("ptxas", "ptxas-blackwell")
    loadable = [one for one in found if not _beyond_driver(one)]
    good = [one for one in loadable if one.version >= oldest_accepted(arch)]
    return max(good or found, key=lambda one: one.version, default=None)


@functools.cache
def refusal(arch: int) -> str:
    """Why our kernels must not be compiled for an architecture; "" if they may be."""
    found, wanted = choose(arch), dotted(oldest_accepted(arch))
    if found is None:
        return f"no ptxas was found to assemble for sm_{arch}"
    if found.version is None:
        return f"{found.origin} names {found.path}, which does not run"
    remedy = f"install CUDA {wanted} or newer, or a newer Triton, or set TRITON_PTXAS_PATH"
    if found.version < oldest_accepted(arch):
        return f"{found} is older than {wanted}, the oldest that is safe for sm_{arch}: {remedy}"
    if not _users(arch) and _beyond_driver(found):
        return (
            f"{found} makes code that the driver (CUDA {dotted(_driver())}) cannot load: {remedy}"
        )
    return ""


@functools.cache
def _users(arch: int) -> tuple[str, str] | None:
    """The environment variable that names the user's assembler, and its path. It is read only once,
    because inside `assembling` Triton's knobs set the same variables."""
    names = ["TRITON_PTXAS_PATH"]
    if arch >= 90:  # Triton reads the second one for sm_100, and from 3.9 on also for sm_90
        names.insert(0 if arch >= 100 else 1, "TRITON_PTXAS_BLACKWELL_PATH")
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), None)


def tools(*names: str) -> list[Assembler]:
    """NVIDIA's programs with these names that run: from Triton, a CUDA toolkit, or pip packages."""
    places: list[tuple[str, Path]] = []
    for package, pattern in (("triton", "backends/nvidia/bin"), ("nvidia", "*/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            places += [(f"of the package {package}", path) for path in Path(folder).glob(pattern)]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            places.append((f"of {variable}", Path(folder, "bin")))
    paths = [(origin, str(place / name)) for origin, place in places for name in names]
    paths += [("on PATH", path) for path in map(shutil.which, names) if path]
    found = {path: Assembler(path, version_of(path), origin) for origin, path in paths}
    return [one for one in found.values() if one.version is not None]


@functools.cache
def version_of(path: str) -> Version | None:
    """The version in the output of `path --version`, such as (12, 8, 93); None if it fails."""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+(?:\.\d+)+)", result.stdout)
    found = found or re.search(r"release (\d+\.\d+)", result.stdout)
    return tuple(map(int, found[1].split("."))) if found and result.returncode == 0 else None


@functools.cache
def driver_version() -> int:
    """The newest CUDA that the driver supports, 13000 for 13.0; 0 without NVIDIA's driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _driver() -> Version:
    return divmod(driver_version() // 10, 100)


def _beyond_driver(assembler: Assembler) -> bool:
    """Whether the driver cannot load the assembler's code: the file format of CUDA 13 is unknown to
    drivers for CUDA 12."""
    return 0 < driver_version() // 1000 < assembler.version[0]


_LOCK = threading.RLock()


@contextmanager
def assembling(path: str) -> Iterator[None]:
    """Within the block, Triton compiles with this ptxas for every NVIDIA architecture.

    For sm_90, Triton 3.6 to 3.8 use one knob and 3.9 another, so both are set. Triton also caches
    the assembler's version, which is part of the key of its cache on disk, and the PTX version that
    follows from it. Both are cleared at entry and exit; otherwise a kernel from another assembler
    would be found under our key.
    """
    import triton
    from triton.backends.nvidia import compiler

    def forget():
        for function in (compiler.get_ptxas_version, compiler.get_features):
            function.cache_clear()

    with _LOCK:
        try:
            with triton.knobs.nvidia.scope():
                triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell = path
                if triton.knobs.nvidia.ptxas.path != path:  # Triton would silently use its own
                    raise RuntimeError(f"Triton cannot run the assembler {path}")
                forget()
                yield
        finally:
            forget()


def compile_kernel(source, target=None, options=None, *, path: str | None = None, **more) -> Any:
    """`triton.compile` with our assembler, or with the one at `path`, which is not checked.

    RuntimeError if `refusal` gives a reason: no kernel is better than a wrong one.
    """
    import triton

    target = target or triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return triton.compile(source, target=target, options=options, **more)
    if path is None:
        if reason := refusal(target.arch):
            raise RuntimeError(reason)
        path = choose(target.arch).path  # type: ignore[union-attr]
    with assembling(path):
        return triton.compile(source, target=target, options=options, **more)


def assembled(kernel):
    """Decorator above `@triton.jit`: makes our assembler assemble the kernel.

    A JITFunction calls `_do_compile` when it has no machine code for a call, and `_do_compile`
    calls its `compile`: at once, or later in a thread (Triton's asynchronous compilation).
    """
    if not hasattr(kernel, "_do_compile"):  # with TRITON_INTERPRET=1 nothing is compiled
        return kernel
    compile_missing = kernel._do_compile

    def do_compile(*args, **kwargs):
        kernel.compile = compile_kernel  # each new device sets it to Triton's own again
        return compile_missing(*args, **kwargs)

    kernel._do_compile = do_compile
    return kernel


def report() -> dict[str, str]:
    """The output of `python -m minprefix info --gpu`: how attention is computed here, and why."""
    from kernels import HAVE_TRITON, why_not

    rows = {"gpu": "none", "torch": torch.__version__, "triton": "not installed"}
    if HAVE_TRITON:
        rows["triton"] = importlib.metadata.version("triton")
    why = "there is no GPU that PyTorch can use"
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        rows["gpu"], why = torch.cuda.get_device_name(index), why_not(index)
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(index)
            rows["gpu"] += f", sm_{major}{minor}, driver for CUDA {dotted(_driver())}"
            rows["assembler"] = str(choose(10 * major + minor) or "none")
            if (major, minor) == (9, 0):
                rows["assembler"] += f"; {advice(choose(90))}"
    else:
        rows["assembler"] = f"{choose(90) or 'none'} (for a GPU with sm_90)"
    rows["attention"] = "plain PyTorch" if why else "Triton kernels"
    return rows | ({"why": why} if why else {})


def advice(assembler: Assembler | None) -> str:
    """A short judgement of an assembler for sm_90."""
    if assembler is None or assembler.version is None or assembler.version < oldest_accepted(90):
        return f"at least {dotted(oldest_accepted(90))} is needed"
    if assembler.version < RECOMMENDED:
        return f"accepted; {dotted(RECOMMENDED)} or newer is recommended"
    return "as recommended"
