"""The signs of a miscompiled kernel: each one is detected in excerpts of our kernels' SASS."""

import os
import subprocess
import sys

import pytest

from kernels import HAVE_TRITON, INTERPRETED, assembler
from kernels.assembler import version_of
from kernels.tools import sass
from kernels.tools.sass import is_layout, signs, signs_of
from kernels.tools.sass_code import parse, registers
from kernels.tools.sass_flow import IN_FLIGHT, VALUES, solve

needs_compiler = pytest.mark.skipif(
    INTERPRETED or not HAVE_TRITON, reason="nothing can be compiled here"
)

# _bwd_short_kernel, 64 x 64, T 50, P 10: nothing has written UR9
UNSET = """
        /*2630*/  UMOV UR36, URZ ;
        /*2640*/  UIADD3 UR38, UP0, UR9, 0x20, URZ ;
        /*2650*/  UIADD3.X UR39, UR9, -0x3ffffff0, URZ, UP0, !UPT ;
        /*2660*/  UMOV UR37, 0x40000040 ;
        /*2670*/  HGMMA.64x16x16.F32.BF16 R56, gdesc[UR36].tnspA.tnspB, RZ, !UPT, gsb0 ;
        /*2680*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*2690*/  EXIT ;
"""
# _bwd_dq_kernel, 64 x 64, T 1000, P 10: the pair at 2930 is right, the pair at 2950 is not
TWICE = """
        /*2800*/  S2UR UR6, SR_CgaCtaId ;
        /*2810*/  USHF.R.U32.HI UR4, URZ, 0x4, UR6 ;
        /*2820*/  UMOV UR45, 0x40000040 ;
        /*2900*/  USGXT.U32 UR26, UR4, 0xe ;
        /*2920*/  UMOV UR4, URZ ;
        /*2930*/  UIADD3 UR46, UP0, UR26, 0x20, URZ ;
        /*2940*/  UIADD3.X UR47, UR4, -0x3ffffff0, URZ, UP0, !UPT ;
        /*2950*/  UIADD3 UR4, UP0, UR6, 0x20, URZ ;
        /*2960*/  UIADD3.64 UR50, UR46, 0x20, URZ ;
        /*2970*/  UIADD3.X UR5, UR6, -0x3ffffff0, URZ, UP0, !UPT ;
        /*2e40*/  UMOV UR44, UR26 ;
        /*2e50*/  UMOV UR46, UR4 ;
        /*2e60*/  UMOV UR47, UR5 ;
        /*3020*/  HGMMA.64x16x16.F32.BF16 R88, gdesc[UR44].tnspA.tnspB, RZ, !UPT, gsb0 ;
        /*3030*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*3040*/  EXIT ;
"""
# the same by ptxas 13.4
RIGHT = """
        /*2800*/  S2UR UR5, SR_CgaCtaId ;
        /*2810*/  USHF.R.U32.HI UR5, URZ, 0x4, UR5 ;
        /*2820*/  UMOV UR45, 0x40000040 ;
        /*2900*/  USGXT.U32 UR26, UR5, 0xe ;
        /*2910*/  UMOV UR4, URZ ;
        /*2920*/  UMOV UR44, UR26 ;
        /*2e00*/  UIADD3 UR46, UP0, UR26, 0x20, URZ ;
        /*2e10*/  UIADD3.X UR47, UR4, -0x3ffffff0, URZ, UP0, !UPT ;
        /*3000*/  HGMMA.64x16x16.F32.BF16 R88, gdesc[UR44].tnspA.tnspB, RZ, !UPT, gsb0 ;
        /*3030*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*3040*/  FADD R88, R88, R89 ;
        /*3050*/  EXIT ;
"""
# _bwd_dq_kernel: dq += ds k, ds in registers
REGISTERS = """
        /*3f00*/  UMOV UR18, 0x100 ;
        /*3f08*/  UMOV UR19, 0x40000040 ;
        /*3f10*/  WARPGROUP.ARRIVE ;
        /*3f70*/  HGMMA.64x64x16.F32.BF16 R24, R108, gdesc[UR16].tnspB, RZ, !UPT ;
        /*4070*/  HGMMA.64x64x16.F32.BF16 R24, R104, gdesc[UR16].tnspB, R24, gsb0 ;
        /*4080*/  MOV R112, R3 ;
        /*4100*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*4110*/  FMUL R24, R24, R108 ;
        /*4120*/  EXIT ;
"""


def kinds(listing: str) -> list[str]:
    return sorted({sign.kind for sign in signs_of(parse(listing))})


@pytest.mark.parametrize(
    "listing, want",
    [(UNSET, ["twice", "unset"]), (TWICE, ["descriptor", "twice"]), (RIGHT, []), (REGISTERS, [])],
)
def test_excerpts(listing, want):
    assert kinds(listing) == want


def test_the_text_says_where():
    found = signs_of(parse(TWICE))
    assert [sign.text.split(":")[0] for sign in found] == ["2950", "3020"]
    assert "UR6 is in both words" in found[0].text and "address + 0xc0000010" in found[1].text


@pytest.mark.parametrize(
    "change, want",
    [  # RIGHT, with one thing changed
        (("UMOV UR45, 0x40000040", "UMOV UR45, 0x40000020"), ["descriptor"]),  # another's stride
        (("UMOV UR45, 0x40000040", "UMOV UR45, 0x40000041"), ["descriptor"]),
        (("UMOV UR45, 0x40000040", "UMOV UR45, URZ"), ["descriptor"]),
        (("UMOV UR45, 0x40000040", "R2UR UR45, R3"), []),  # not followed
        (("UMOV UR45, 0x40000040", "UMOV UR43, 0x40000040"), ["unset"]),
        (("UMOV UR4, URZ", "UMOV UR4, 0x10"), ["descriptor"]),
        (("UMOV UR4, URZ", "R2UR UR4, R3"), []),  # a zero that waited in a register of the thread
        (("UMOV UR4, URZ", "USGXT.U32 UR4, UR5, 0xe"), ["descriptor"]),  # an address
        (("UIADD3.X UR47, UR4,", "UIADD3.X UR47, UR26,"), ["descriptor", "twice"]),
        (("UIADD3 UR46, UP0,", "UIADD3 UR46, UP1,"), ["unset"]),  # the carry
        (("UIADD3 UR46, UP0,", "@UP3 UIADD3 UR46, UP0,"), ["unset"]),
        (("FADD R88, R88, R89", "@!P0 FADD R88, R88, R89"), ["unset"]),
        (("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"), ["running"]),
    ],
)
def test_mutations(change, want):
    assert change[0] in RIGHT
    assert kinds(RIGHT.replace(*change)) == want


@pytest.mark.parametrize("name, want", [("R112", []), ("R107", ["running"]), ("R30", ["running"])])
def test_registers_of_a_running_product(name, want):
    """A fragment of four registers, and 32 sums of fp32, until the wait."""
    assert kinds(REGISTERS.replace("MOV R112", f"MOV {name}")) == want


def test_what_is_written_in_a_loop_or_on_one_path_is_written():
    listing = """
        /*0000*/  ISETP.NE.AND P0, PT, R1, RZ, PT ;
        /*0010*/  @!P0 BRA `(.L_x_1) ;
        /*0020*/  UMOV UR4, 0x1 ;
.L_x_1:
        /*0030*/  UIADD3 UR4, UR4, 0x1, URZ ;
        /*0040*/  @P0  BRA `(.L_x_1) ;
        /*0050*/  EXIT ;
.L_x_2:
        /*0060*/  BRA `(.L_x_2) ;
    """
    code = parse(listing)
    assert signs_of(code) == []
    before = solve(code, VALUES)
    assert "UR4" not in before[2] and before[3]["UR4"] == "unknown" and before[6] is None
    assert kinds(listing.replace("UMOV UR4, 0x1", "UMOV UR5, 0x1")) == ["unset"]


def test_groups_are_waited_for_in_order():
    """`gsb0, 0x1` leaves the latest group running."""
    wait = "/*4090*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n/*4100*/"
    code = parse(REGISTERS.replace("R108, gdesc[UR16].tnspB, RZ, !UPT", r"\g<0>", 0)
                 .replace("RZ, !UPT ;", "RZ, !UPT, gsb0 ;").replace("/*4100*/", wait))  # fmt: skip
    running = [len(state) for state in solve(code, IN_FLIGHT)]
    assert running == [0, 0, 0, 0, 1, 2, 2, 1, 0, 0]


def test_layouts():
    """128, 64 and 32 bytes of swizzle with their strides, or none; Blackwell's bit 46."""
    for word in (0x40000040, 0x80000020, 0xC0000010, 0x40000000):
        assert is_layout(word, 0) and not is_layout(word, 1 << 14)
        assert is_layout(word | 1 << 14, 1 << 14) and not is_layout(word + 1, 0)
    others = (0, 0x10, 0x40, 0x40000020, 0xC0000020)
    assert [hex(word) for word in others if is_layout(word, 0)] == []


REGISTER_CASES = [  # instruction, what it reads, what it writes
    ("UIADD3 UR38, UP0, UR9, 0x20, URZ", "UR9", "UR38 UP0"),
    ("UIADD3.X UR39, UR9, -0x3ffffff0, URZ, UP0, !UPT", "UR9 UP0", "UR39"),
    ("UIADD3.64 UR50, UR46, 0x20, URZ", "UR46 UR47", "UR50 UR51"),
    ("UIMAD.WIDE.U32 UR4, UR5, UR9, UR12", "UR5 UR9 UR12 UR13", "UR4 UR5"),
    ("UISETP.GE.AND UP1, UPT, UR4, URZ, UPT", "UR4", "UP1"),
    ("@!UP1 USEL UR4, UR5, UR6, UP0", "UP1 UR5 UR6 UP0", "UR4"),
    ("ULDC.64 UR18, c[0x0][0x258]", "", "UR18 UR19"),
    ("VOTEU.ANY UP0, P0", "P0", "UP0"),
    ("R2UR UR12, R5", "R5", "UR12"),
    ("LDG.E.128 R32, desc[UR34][R12.64]", "UR34 UR35 R12 R13", "R32 R33 R34 R35"),
    ("STS.128 [R20+UR15+0xc000], R32", "R20 UR15 R32", ""),
    ("LDSM.16.M88.4 R152, [R171+UR7+0x18000]", "R171 UR7", "R152 R153 R154 R155"),
    ("IADD3.X R23, R8, UR19, RZ, P3, !PT", "R8 UR19 P3", "R23"),
    ("PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0", "UP0", "P1"),
    ("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT", "UR4 UR5 UR6 UR7", "R24 R25 R26 R27"),
    ("HGMMA.64x8x16.F32.BF16 R24, R32, gdesc[UR4].tnspB, RZ, !UPT", "R32 R33 R34 R35 UR6 UR7",
     "R24 R25 R26 R27"),
    ("UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR58], tmem[UR22], idesc[UR23], UP1",
     "UR6 UR7 UR8 UR9 UR58 UR22 UR23 UP1", ""),
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR64], R139", "UR64 R139", "P3"),
]  # fmt: skip


@pytest.mark.parametrize("text, reads, writes", REGISTER_CASES)
def test_registers(text, reads, writes):
    (instruction,) = parse(f"        /*0000*/                   {text} ;")
    touched = registers(instruction)
    assert (touched.reads, touched.writes) == (set(reads.split()), set(writes.split()))


def bundled() -> str:
    """Triton's own ptxas for sm_90, where it is older than 12.9."""
    own = [one for one in assembler.tools("ptxas") if one.origin == "of the package triton"]
    if not own or own[0].version >= assembler.oldest_accepted(90):
        pytest.skip("this Triton bundles no ptxas that is too old for sm_90")
    return own[0].path


@needs_compiler
@pytest.mark.slow
def test_the_old_assembler_is_flagged_and_ours_is_not():
    """Short backward passes of 50 tokens, in some of which ptxas 12.8.93 makes the fault.

    In which ones hangs on small things: if this finds none after a change of the kernels, `python
    -m kernels.tools.sass --quick --ptxas OLD` lists those that there are.
    """
    from kernels.tools.cases import calls, launches_of
    from kernels.tools.compile_offline import compile_launch

    old, flagged = bundled(), []
    for case in calls(
        op=("backward",), head_dim=(64,), n_head=(12,), seq_len=(50,), prefix_len=(10, 20),
        need=("all",), prefix_index=(False,), prefix_dtype=("same",), q_offset=(False,),
    ):  # fmt: skip
        for launch in launches_of(case):
            if launch.default:
                flagged += signs(compile_launch(launch, "sm_90", old).binary)
                assert signs(compile_launch(launch, "sm_90").binary) == []
    assert "twice" in {sign.kind for sign in flagged}


def run(*options: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kernels.tools.sass", *options]
    variables = {"TRITON_INTERPRET": "0"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.slow
@needs_compiler
def test_command_refuses_an_old_assembler(tmp_path):
    """As the operator does. With --ptxas it is checked."""
    path = tmp_path / "ptxas"
    path.write_text("#!/bin/sh\necho release 12.8, V12.8.93\n")
    path.chmod(0o755)
    result = run("--quick", TRITON_PTXAS_PATH=str(path))
    assert result.returncode == 1 and "12.8.93" in result.stderr and result.stdout == ""
    assert version_of(str(path)) == (12, 8, 93)
    assert "does not run" in run("--ptxas", str(tmp_path / "gone")).stderr


def test_an_nvdisasm_is_needed(monkeypatch):
    monkeypatch.setattr(assembler, "tools", lambda *names: [])
    with pytest.raises(RuntimeError, match="nvdisasm was not found"):
        sass.nvdisasm.__wrapped__()
