"""The benchmark of tiles finds every stage and candidate automatically, in the real launchers."""

import pytest
import torch
from conftest import needs_kernels

needs_kernels()

from benchmarks.kernels import tiles as bench_tiles  # noqa: E402
from benchmarks.kernels import warm  # noqa: E402  (imports Triton)
from benchmarks.kernels.clock import cpu_times  # noqa: E402
from benchmarks.kernels.decode import Shape as Step  # noqa: E402
from benchmarks.kernels.peers import Shape  # noqa: E402
from kernels import decode, launch  # noqa: E402
from kernels.inputs import Append, Inputs  # noqa: E402
from kernels.launch import Tile  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def any_clock(monkeypatch):
    """Without a GPU the code runs, and its times mean nothing."""
    if DEVICE == "cpu":
        monkeypatch.setattr(bench_tiles, "graph_times", cpu_times)


def case(shape: Shape) -> bench_tiles.Case:
    return bench_tiles.attention_case(shape, DEVICE, 2, torch.float32)


@pytest.mark.parametrize("T", [20, 70])
def test_every_candidate_has_a_time_or_a_note(any_clock, T):
    shape = Shape(2, T, 1, 5)
    rows = list(bench_tiles.explore(case(shape), set()))
    stages = {row["stage"] for row in rows}
    assert {bench_tiles.WHOLE, "fwd_short", "bwd_short"} <= stages
    for stage in stages:  # one default each, and each has a time
        defaults = [row for row in rows if row["stage"] == stage and row["default"]]
        assert len(defaults) == 1 and defaults[0]["us"], stage
    assert [row for row in rows if not row["us"] and not row["note"]] == []
    whole = [line for line in bench_tiles.table(rows) if line.startswith("whole")]
    assert f"T={T}" in "\n".join(whole)


def test_what_has_a_row_is_left_out(any_clock):
    rows = list(bench_tiles.explore(case(Shape(1, 20, 1, 5)), set()))
    done = {tuple(str(row[name]) for name in bench_tiles.KEY) for row in rows}
    again = list(bench_tiles.explore(case(Shape(1, 20, 1, 5)), done))
    assert {row["stage"] for row in again} == {bench_tiles.WHOLE}


def test_a_wrong_tile_is_named_and_not_timed(any_clock, monkeypatch):
    original = launch.launch

    def wrong(kernel, programs, tile, **arguments):
        original(kernel, programs, tile, **arguments)
        if tile.block_n == 16 and "o_ptr" in arguments:
            arguments["o_ptr"].add_(1)

    monkeypatch.setattr(bench_tiles.attention, "launch", wrong)
    tiles = launch.TILES[launch.target_of(torch.device(DEVICE))]
    key = ("fwd_short", 4, 64)
    monkeypatch.setitem(tiles, key, [*tiles[key][:1], Tile(32, 16, 4, 1)])
    rows = list(bench_tiles.explore(case(Shape(1, 20, 1, 5)), set()))
    bad = [row for row in rows if row["tile"] == "32,16,4,1"]
    assert [row["us"] for row in bad] == [""] and "wrong: error of o" in bad[0]["note"]
    assert "32,16,4,1: wrong" in "\n".join(bench_tiles.table(rows))


def test_stages_inside_a_plan_are_found():
    def outer(choice):
        def run(plan):
            return [plan] if plan == "fast" else choice("inner", [Tile(1, 1, 1, 1)], lambda t: [t])

        return choice("outer", ["fast", None], run)

    choice = bench_tiles.Choice(record=True)
    assert outer(choice) == ["fast"]
    assert list(choice.stages) == ["outer", "inner in split"]
    assert choice.stages["inner in split"].path == {"outer": None}
    assert outer(bench_tiles.Choice({"outer": None})) == [Tile(1, 1, 1, 1)]


def test_warming_up_has_every_tile_once():
    cases = [case(Shape(2, 100, 1, 5)), case(Shape(3, 90, 1, 5))]
    found = list(warm.launches(cases, True, "sm_90"))
    names = {one.kernel.__name__ for one in found}
    assert {"_fwd_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel", "_reduce_kernel"} <= names
    half = bench_tiles.attention_case(Shape(2, 100, 1, 5), DEVICE, 1, torch.half)
    found = warm.launches([half], True, "sm_90")
    forward = [one.tile for one in found if one.kernel.__name__ == "_fwd_kernel"]
    assert sorted(forward) == sorted(launch.TILES["sm_90"]["fwd_short", 2, 64])


def test_decoding_is_explored_too(any_clock, monkeypatch):
    monkeypatch.setattr(
        bench_tiles.steps.Truth, "problem", lambda self, o: ""
    )  # bf16, see conftest
    if DEVICE == "cpu":
        monkeypatch.setattr(bench_tiles.steps, "ours", ours_interpreted)
    rows = list(bench_tiles.explore(bench_tiles.decode_case(Step(2, 1, 20, 5), DEVICE, 1), set()))
    assert {row["stage"] for row in rows} == {"decode", bench_tiles.WHOLE}


def ours_interpreted(s):
    """`decode.ours` through the kernel, where the device is a CPU."""
    inputs = Inputs(s.q, *s.keys(), *s.prefix, s.index, None, None, s.q_offset)
    return lambda: decode.decode(inputs, Append(s.new[0], s.new[1]))[0]
