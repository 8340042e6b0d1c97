"""The kernels compile for GPUs that this machine does not have: A100, H100, B200 and MI300.

This needs a process without TRITON_INTERPRET=1, with which nothing can be compiled.
"""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing can be compiled", allow_module_level=True)

from kernels.assembler import compile_kernel  # noqa: E402
from kernels.launch import SHARED_MEMORY, TILES, Launch, recorded  # noqa: E402
from kernels.tools.cases import (  # noqa: E402
    CALLS,
    DIMENSIONS,
    GPU_TARGETS,
    OTHERS,
    Case,
    call,
    calls,
    cover,
    launches_of,
    pairwise,
)
from kernels.tools.compile_offline import (  # noqa: E402
    ALLOWED_SPILLS,
    Compiled,
    Job,
    Result,
    compile_launch,
    jobs_of,
    problem,
    quick_key,
    row,
    run_job,
    run_jobs,
    specialise,
)

PLAIN = Case(**{name: values[0] for name, values in DIMENSIONS.items()})
PLAIN = PLAIN._replace(target="sm_90", dtype="bf16", head_dim=64, prefix_len=10)


def default_launches(case: Case) -> list[Launch]:
    return [launch for launch in launches_of(case) if launch.default]


def test_every_choice_is_launched():
    """The defaults are what runs without tuning; a plan's own stages are launched with it."""
    case = PLAIN._replace(op="backward", seq_len=200)
    with recorded("sm_90") as plain:
        call(case)
    found = launches_of(case)
    defaults = [launch[:3] for launch in found if launch.default]
    assert defaults == [launch[:3] for launch in plain]
    tiles: dict[str, set] = {}
    for launch in found:
        tiles.setdefault(launch.kernel.fn.__name__, set()).add(launch.tile)
    rows = TILES["sm_90"]
    for name in ("bwd_dq_short", "bwd_dkdv", "reduce"):
        kernel = f"_{name.removesuffix('_short')}_kernel"
        assert tiles[kernel] == set(rows[name, 2, 64]), name
    assert {tile[:2] for tile in tiles["_bwd_short_kernel"]} == {(64, 64), (128, 64), (128, 128)}


def test_cover_meets_every_pair_once_and_is_small():
    """Each two values of different dimensions are in some case, for each op."""
    cases = cover()
    for op in DIMENSIONS["op"]:
        mine = [case for case in cases if case.op == op]
        for a, b in combinations([name for name in DIMENSIONS if name != "op"], 2):
            met = {(getattr(case, a), getattr(case, b)) for case in mine}
            missing = set(product(DIMENSIONS[a], DIMENSIONS[b])) - met
            assert not missing, f"{op}: {a}, {b}: {missing}"
    assert cases == cover(), "not deterministic"
    assert len(jobs_of(cases)) <= 370


def test_calls_are_each_length_with_each_prefix():
    """For each op, D and number of heads, and with one thing more: a bank, kv_lens, ..."""
    cases = list(calls())
    assert len(cases) == len(set(cases))
    assert {case.op for case in cases} == set(DIMENSIONS["op"])
    cases = [case for case in cases if case.op not in OTHERS]
    plain = {"prefix_index": False, "kv_lens": False, "q_offset": False, "prefix_dtype": "same"}
    for changes in ({}, *({name: True} for name in list(plain)[:3]), {"prefix_dtype": "fp32"}):
        want = plain | changes
        met = {
            tuple(getattr(case, name) for name in CALLS)
            for case in cases
            if case.need == "all" and all(getattr(case, x) == y for x, y in want.items())
        }
        bare = "prefix_index" in changes or "prefix_dtype" in changes  # of no prefix
        wanted = {x for x in product(*CALLS.values()) if x[-1] or not bare}
        assert met == wanted, changes
    assert {case.need for case in cases if case.op == "backward"} == {"all", "prefix"}
    few = list(calls(kv_lens=(True,), seq_len=(50,), head_dim=(64,)))
    assert few and all(case.kv_lens and case.seq_len == 50 for case in few)


def test_launches_that_look_alike_are_one_kernel():
    """`quick_key` may tell apart what Triton takes for one, never the other way round."""
    keys: dict[tuple, set[str]] = {}
    for case in list(calls(head_dim=(80,), n_head=(12,)))[::7]:
        for launch in launches_of(case):
            seen = quick_key(launch, case.target)
            keys.setdefault(seen, set()).add(specialise(launch, case.target)[2])
    assert len(keys) > 20 and all(len(names) == 1 for names in keys.values())


def test_pairwise_of_two_dimensions_is_their_product():
    cases = pairwise({"a": (1, 2, 3), "b": (4, 5)})
    met = sorted((case["a"], case["b"]) for case in cases)
    assert met == sorted(product((1, 2, 3), (4, 5)))


def test_a_launch_is_specialised_as_spelled_out():
    case = PLAIN._replace(prefix_index=True, prefix_lens=True, prefix_dtype="fp32")
    launch = default_launches(case)[0]
    source, options, _ = specialise(launch, "sm_90")
    kinds, names = source.signature, launch.kernel.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = {names[path[0]] for path, value in source.attrs.items() if value}
    assert (kinds["q_ptr"], kinds["prefix_k_ptr"], kinds["lse_ptr"]) == ("*bf16", "*fp32", "*fp32")
    assert (kinds["prefix_index_ptr"], kinds["prefix_lens_ptr"]) == ("*i64", "*i32")
    assert kinds["kv_lens_ptr"] == "constexpr" and constants["kv_lens_ptr"] is None
    assert kinds["stride_lens"] == "constexpr" and constants["stride_lens"] == 1
    assert (kinds["seq_len"], kinds["n_head"], kinds["scale2"]) == ("i32", "i32", "fp32")
    assert (constants["D"], constants["CAUSAL"], constants["BLOCK_P"]) == (64, True, 16)
    assert {"q_ptr", "prefix_index_ptr", "stride_qb", "stride_ph"} <= divisible
    assert not {"seq_len", "n_head", "scale2"} & divisible
    assert (options.num_warps, options.num_stages) == launch.tile[2:]


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_it_is_what_triton_would_launch(target, monkeypatch):
    """Triton's launch, up to the point where it needs a GPU, comes to the same compiled kernel."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPU_TARGETS[target],
    )
    launch = default_launches(PLAIN)[0]  # the tiles of sm_90, also where the target is another
    source, options, _ = specialise(launch, target)
    mine = compile_kernel(source, GPU_TARGETS[target], options.__dict__)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    launch.kernel.device_caches.clear()
    warps, stages = launch.tile[2:]
    theirs = launch.kernel.run(
        grid=(1,), warmup=True, **launch.arguments, num_warps=warps, num_stages=stages
    )
    launch.kernel.device_caches.clear()
    assert mine.hash == theirs.hash


def test_what_fails_is_named():
    fine = Compiled(100, 1024, 0, 0, False, 1.0, "")
    job = Job(PLAIN, 0, "fwd", "64 x 64", True)
    assert problem(job, fine) == ""
    assert "shared memory" in problem(job, fine._replace(shared=SHARED_MEMORY["sm_90"] + 1))
    assert "tensor memory" in problem(job, fine._replace(tensor_memory=513))
    pressed = fine._replace(spills=52)
    assert "spills 52 bytes" in problem(job, pressed)
    assert problem(job._replace(default=False), pressed) == ""
    assert problem(job, fine._replace(spills=48)) == ""
    broken = run_job(Job(PLAIN._replace(target="sm_1"), 0, "fwd", "-", True))
    assert "KeyError" in broken.problem and "FAILED" in row(broken)


PRODUCTS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "mma"}
NO_TENSOR_CORES = ("tf32", "xf32", "mma.sync", "wgmma", "tcgen05.mma")


def wrong_products(result: Result) -> list[str]:
    """Tensor cores for products of fp32, which would not be IEEE; or none for those of 16 bits in
    attention: wgmma on Hopper, mma on Ampere, tcgen05 or mma on Blackwell."""
    (case, _, name, *_), compiled, _ = result
    if compiled is None:  # it launches nothing
        return []
    if case.dtype == "fp32":
        return [word for word in NO_TENSOR_CORES if word in compiled.assembly]
    if not name.startswith(("fwd", "bwd")) or case.head_dim != 64 or case.need == "prefix":
        return []
    return [] if PRODUCTS.get(case.target, "") in compiled.assembly else ["no tensor cores"]


@pytest.mark.slow
def test_cover_compiles_without_spills_within_shared_memory():
    """A pairwise cover, and what training and decoding call at D = 64 with 12 heads, at a few
    lengths (`make sass` has all): the default tiles. They spill a dozen registers at most;
    exceptions are in ALLOWED_SPILLS. No machine code looks miscompiled. Products are IEEE in fp32
    and made by tensor cores in 16 bits."""
    usual = calls(head_dim=(64,), n_head=(12,), seq_len=(50, 128, 1000), prefix_len=(10, 200))
    jobs = [job for job in jobs_of([*cover(), *usual]) if job.default]
    results = list(run_jobs(jobs, processes=2))
    failed = [row(result) for result in results if result.problem]
    assert not failed, "\n".join(failed)
    failed = [f"{row(result)} {wrong}" for result in results if (wrong := wrong_products(result))]
    assert not failed, "\n".join(failed)
    assert {result.job.case.target for result in results} == set(GPU_TARGETS)
    assert [spill for spill, (_, reason) in ALLOWED_SPILLS.items() if not reason] == []


@pytest.mark.slow
@pytest.mark.parametrize("op", ["few_rows", "some_rows", "decode"])
def test_weights_are_read_before_the_wait(op):
    """On Hopper and Blackwell, and nothing else is read there before the kernels before have ended.
    An A100 can neither wait nor start early."""
    for target in ("sm_80", "sm_90", "sm_100"):
        for launch in default_launches(PLAIN._replace(op=op, target=target, prefix_len=0)):
            if "PDL" not in launch.arguments:  # `_merge_kernel`
                continue
            ptx, overlaps = compile_launch(launch, target).assembly, target != "sm_80"
            assert launch.arguments["PDL"] == overlaps and ("griddepcontrol" in ptx) == overlaps
            if overlaps:
                wait, start = (ptx.index(f"griddepcontrol.{x}") for x in ("wait", "launch"))
                read = min(ptx.index(x) for x in ("ld.global", "cp.async.cg") if x in ptx)
                assert wait < start < read if op == "decode" else start < read < wait
                assert "st.global" not in ptx[:wait]
                loads = ptx[:wait].count("ld.global"), ptx[wait:].count("ld.global")
                assert op != "few_rows" or loads[0] > loads[1] > 0  # weights; positions
                assert op != "some_rows" or min(loads) > 0
                if S := launch.arguments.get("PARTS"):  # the norm: gain, shift, bias; x and in fp32
                    assert loads == (3, 1 + 2 * S)


def test_kernels_of_training_do_not_overlap():
    """Only in a step of generation is it known what an earlier kernel writes."""
    for op in ("forward", "backward", "add_norm", "cross_entropy"):
        for launch in default_launches(PLAIN._replace(op=op, target="sm_90")):
            assert not launch.arguments.get("PDL")
