"""Which ptxas assembles our kernels, that only they use it, and what happens without a good one."""

import importlib
import json
import os
import pkgutil
import warnings
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import assembler, prefix_attention
from kernels.assembler import Assembler, assembling, choose, refusal, version_of
from kernels.reference import prefix_attention_eager
from minprefix.cli import info
from minprefix.cli.main import main

COMPILES = kernels.HAVE_TRITON and not kernels.INTERPRETED


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without a ptxas, to which `toolkit` adds some. Nothing is remembered."""

    def forget():
        for function in (assembler._users, refusal, version_of, assembler.driver_version):
            function.cache_clear()
        kernels._why_not.clear()

    names = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "CUDA_HOME", "CUDA_PATH")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(assembler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assembler, "driver_version", fake_driver(0))
    forget()
    yield
    monkeypatch.undo()
    forget()


def fake_driver(version: int):
    def driver_version() -> int:
        return version

    driver_version.cache_clear = lambda: None
    return driver_version


def toolkit(folder, version: str, code: int = 0) -> str:
    """A folder bin with a ptxas that reports a version."""
    path = folder / "bin" / "ptxas"
    path.parent.mkdir(parents=True)
    release = ".".join(version.split(".")[:2])
    text = f"ptxas: NVIDIA (R) Ptx optimizing assembler\\nrelease {release}, V{version}\\nBuild x"
    path.write_text(f"#!/bin/sh\nprintf '{text}\\n'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_the_newest_is_chosen(bare, monkeypatch, tmp_path):
    old, new = toolkit(tmp_path / "a", "9.2.148"), toolkit(tmp_path / "b", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("PATH", os.path.dirname(new))
    assert choose(90) == Assembler(new, (13, 0, 88), "on PATH")
    assert version_of(old) == (9, 2, 148)
    assert refusal(90) == refusal(80) == refusal(100) == ""


def test_the_users_is_taken_whatever_it_is(bare, monkeypatch, tmp_path):
    toolkit(tmp_path / "b", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "b"))
    old = toolkit(tmp_path / "a", "12.8.93")
    monkeypatch.setenv("TRITON_PTXAS_PATH", old)
    assert choose(90) == Assembler(old, (12, 8, 93), "TRITON_PTXAS_PATH")
    assert "12.8.93" in refusal(90) and "older than 12.9" in refusal(90)
    assert refusal(80) == refusal(100) == ""


def test_tritons_second_variable(bare, monkeypatch, tmp_path):
    """It is read for sm_90 where the first is not set, and before the first for sm_100."""
    one, two = toolkit(tmp_path / "a", "12.9.86"), toolkit(tmp_path / "b", "13.4.59")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", two)
    assert [choose(arch) and choose(arch).path for arch in (80, 90, 100)] == [None, two, two]
    assembler._users.cache_clear()
    monkeypatch.setenv("TRITON_PTXAS_PATH", one)
    assert [choose(arch).path for arch in (80, 90, 100)] == [one, one, two]


def test_one_that_does_not_run(bare, monkeypatch, tmp_path):
    """Of those that are found it is passed over, of the user's it is said."""
    broken = toolkit(tmp_path / "a", "13.4.59", code=1)
    good = toolkit(tmp_path / "b", "12.9.86")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "b"))
    assert choose(90).path == good and refusal(90) == ""
    monkeypatch.setenv("TRITON_PTXAS_PATH", broken)
    for function in (assembler._users, refusal):
        function.cache_clear()
    assert refusal(90) == f"TRITON_PTXAS_PATH names {broken}, which does not run"


def test_code_that_the_driver_cannot_load(bare, monkeypatch, tmp_path):
    """A driver for CUDA 12 gets the newest of CUDA 12, or nothing."""
    new, old = toolkit(tmp_path / "a", "13.1.80"), toolkit(tmp_path / "b", "12.9.86")
    monkeypatch.setattr(assembler, "driver_version", fake_driver(12080))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("PATH", os.path.dirname(old))
    assert choose(90).path == old and refusal(90) == ""
    refusal.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert "13.1.80" in refusal(90) and "the driver (CUDA 12.8) cannot load" in refusal(90)
    refusal.cache_clear()
    monkeypatch.setattr(assembler, "driver_version", fake_driver(13000))
    assert choose(90).path == new and refusal(90) == ""


def test_none_at_all(bare):
    assert choose(90) is None and refusal(90) == "no ptxas was found to assemble for sm_90"


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def test_with_only_an_old_one_the_reference_path_runs(bare, monkeypatch, tmp_path):
    """One warning that names both versions, and the right numbers."""
    toolkit(tmp_path / "a", "12.8.93")
    monkeypatch.setenv("PATH", str(tmp_path / "a" / "bin"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(kernels, "HAVE_TRITON", True)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=random) for _ in range(3))
    prefix_k, prefix_v = torch.randn(2, 3, 4, 16, generator=random)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            o = prefix_attention(q.as_subclass(OnGPU), k, v, prefix_k, prefix_v)
    assert len(seen) == 1 and seen[0].category is RuntimeWarning
    assert "12.8.93" in str(seen[0].message) and "12.9" in str(seen[0].message)
    exact = prefix_attention_eager(*(x.double() for x in (q, k, v, prefix_k, prefix_v)))
    assert (o - exact).abs().max() < 1e-5  # rounding of fp32; measured 3e-7
    assert kernels.why_not(0).startswith("ptxas 12.8.93")


def test_older_gpus_and_amd_ask_for_no_assembler(bare, monkeypatch):
    monkeypatch.setattr(kernels, "HAVE_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert kernels.why_not(0) == "the GPU is sm_75, the kernels need sm_80 or later"
    kernels._why_not.clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.why_not(0) == ""


def test_torch_compile_does_not_look_inside(bare, monkeypatch, tmp_path):
    """Starting a program to ask its version would break the graph."""
    monkeypatch.setattr(kernels, "HAVE_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    toolkit(tmp_path / "a", "13.3.33")
    monkeypatch.setenv("PATH", str(tmp_path / "a" / "bin"))

    def double(x):
        return x + x if kernels.why_not(0) == "" else x

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2


@pytest.mark.skipif(not COMPILES, reason="nothing can be compiled")
class TestTriton:
    """What Triton does inside and outside of `assembling`."""

    @pytest.fixture(autouse=True)
    def compiler(self):
        from triton.backends.nvidia import compiler

        self.compiler = compiler

    def test_inside_it_is_used_for_each_architecture(self, tmp_path):
        """Triton's versions look at different knobs; all is as before afterwards."""
        path = toolkit(tmp_path, "77.0.1")
        before = {arch: self.compiler.get_ptxas(arch).path for arch in (80, 90, 100)}
        variables = dict(os.environ)
        with assembling(path):
            for arch in before:
                assert self.compiler.get_ptxas(arch).path == path
                assert "V77.0.1" in self.compiler.get_ptxas_version(arch)
        assert {arch: self.compiler.get_ptxas(arch).path for arch in before} == before
        assert "V77.0.1" not in self.compiler.get_ptxas_version(90)
        assert dict(os.environ) == variables

    def test_what_triton_remembers_does_not_come_in(self, tmp_path):
        """Other code filled Triton's memory with its own version, which is part of the key of the
        cache on disk: under that key there may be a miscompiled kernel of ours."""
        backend = self.compiler.CUDABackend
        target = assembler_target()
        theirs = backend(target).hash()  # fills get_ptxas_version
        with assembling(toolkit(tmp_path, "77.0.1")):
            ours = backend(target).hash()
        assert "V77.0.1" in ours and ours != theirs
        assert backend(target).hash() == theirs

    def test_one_that_vanished(self, tmp_path):
        """Triton would quietly take its own."""
        gone = assembling(str(tmp_path / "gone"))
        with pytest.raises(RuntimeError, match="cannot run the assembler"), gone:
            pass

    def test_a_refused_one_compiles_nothing(self, bare, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_PTXAS_PATH", toolkit(tmp_path, "12.8.93"))
        with pytest.raises(RuntimeError, match=r"12\.8\.93 .* older than 12\.9"):
            assembler.compile_kernel(None, assembler_target())

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_kernels_get_ours_and_other_code_keeps_its_own(self, asynchronous, monkeypatch):
        """Both come to Triton's `compile` by a launch; also when that happens later in a thread."""
        import triton
        from triton.runtime._async_compile import AsyncCompileMode

        from kernels.attention import _fwd_kernel
        from kernels.tiles import softmax_step

        seen = []

        def compile_nothing(source, target, options, **more):
            seen.append(self.compiler.get_ptxas(90).path)
            return SimpleNamespace(result=lambda: None)

        monkeypatch.setattr(triton, "compile", compile_nothing)
        own = self.compiler.get_ptxas(90).path
        other = triton.JITFunction(softmax_step.fn)
        for kernel in (_fwd_kernel, other):
            monkeypatch.setitem(kernel.device_caches, 7, ({}, {}, assembler_target(), None, None))
            monkeypatch.setattr(kernel, "compile", compile_nothing, raising=False)
            monkeypatch.setattr(kernel, "ASTSource", lambda *arguments: None, raising=False)
        monkeypatch.setattr(triton.runtime.jit, "get_cache_key", lambda *rest: str(len(seen)))
        arguments = ("key", {}, 7, {}, SimpleNamespace(), {}, True)
        if asynchronous:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool, AsyncCompileMode(pool, ignore_errors=True):
                _fwd_kernel._do_compile(*arguments)
                pool.submit(lambda: None).result()
                other._do_compile(*arguments)
        else:
            _fwd_kernel._do_compile(*arguments)
            other._do_compile(*arguments)
        assert seen == [choose(90).path, own]

    def test_every_kernel_is_marked(self):
        """A kernel that is launched and not marked would be compiled by Triton's default."""
        from triton import JITFunction

        found = {}
        for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
            if not module.name.startswith("kernels.tools"):
                for one in vars(importlib.import_module(module.name)).values():
                    if isinstance(one, JITFunction) and one.__name__.endswith("_kernel"):
                        found[one.__name__] = "_do_compile" in vars(one)
        assert len(found) >= 8 and all(found.values()), found


def assembler_target():
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def test_report_says_which_path_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = assembler.report()
    assert rows["attention"] == "plain PyTorch" and "no GPU" in rows["why"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(assembler, "driver_version", lambda: 13000)
    monkeypatch.setattr(kernels, "_why_not", {0: ""})
    monkeypatch.setattr(assembler, "choose", lambda arch: Assembler("/p", (13, 0, 88), "on PATH"))
    rows = assembler.report()
    assert rows["gpu"] == "H200, sm_90, driver for CUDA 13.0"
    assert rows["assembler"].endswith("accepted; 13.3 or newer is recommended")
    assert rows["attention"] == "Triton kernels" and "why" not in rows
    kernels._why_not[0] = "ptxas is old"
    assert assembler.report()["attention"] == "plain PyTorch"
    assert assembler.report()["why"] == "ptxas is old"


def test_info_gpu(monkeypatch, capsys):
    rows = {"gpu": "H200", "attention": "plain PyTorch", "why": "ptxas is old"}
    monkeypatch.setattr(info, "report", lambda: rows)
    assert main(["info", "--gpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "why:       ptxas is old"
    assert main(["info", "--gpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


@pytest.mark.parametrize(
    "version, words",
    [((12, 8, 93), "at least 12.9"), ((13, 1, 80), "13.3 or newer is"), ((13, 3, 33), "as rec")],
)
def test_advice(version, words):
    assert words in assembler.advice(Assembler("/p", version, "on PATH"))
