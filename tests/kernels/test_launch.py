"""Launching kernels: the table of tiles, optional tuning, the arguments of kernels."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import HEAD_DIMS, launch  # noqa: E402
from kernels.launch import TILES, Tile, run_best, tiles_of  # noqa: E402

HEADS = SimpleNamespace(
    is_cuda=True, shape=(2, 3, 4, 64), element_size=lambda: 2, dtype=torch.bfloat16,
    device=torch.device("cpu"),
)  # fmt: skip


@pytest.mark.parametrize("target", TILES)
def test_every_row_is_there(target):
    """Each kernel, dtype and head size finds tiles; only the short backward may have none."""
    names = {name for name, _, _ in TILES["sm_90"]}
    backward = {"bwd_short", "bwd_dq", "bwd_dq_short", "bwd_dkdv", "bwd_dprefix"}
    short = {"fwd_short", "decode_short"}
    assert names == backward | short | {"fwd", "reduce", "reduce_bank", "decode"}
    with launch.recorded(target):
        for name in names:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for head_dim in HEAD_DIMS:
                    tiles = tiles_of(name, torch.empty(1, head_dim, dtype=dtype, device="meta"))
                    assert tiles or name == "bwd_short"
                    assert len(set(tiles)) == len(tiles)


def test_untuned_runs_the_default(monkeypatch):
    monkeypatch.delenv("MINPREFIX_AUTOTUNE", raising=False)
    tiles = [Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)]
    assert run_best("fwd", HEADS, (128, 16), lambda tile: tile, tiles) == tiles[0]


def test_tuning_takes_the_fastest_and_measures_once(monkeypatch):
    """Per kernel, dtype, head size and bucket; the default while a CUDA graph is captured."""
    tiles = [Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)]
    seconds, timed = dict(zip(tiles, (3.0, 1.0, 2.0), strict=True)), []
    capturing = True

    def do_bench(run):
        timed.append(run())
        return seconds[timed[-1]]

    monkeypatch.setenv("MINPREFIX_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert run_best("fwd", HEADS, (128, 16), lambda tile: tile, tiles) == tiles[0] and not timed
    capturing = False
    for _ in range(2):
        assert run_best("fwd", HEADS, (128, 16), lambda tile: tile, tiles) == tiles[1]
    assert timed == tiles
    run_best("fwd", HEADS, (256, 16), lambda tile: tile, tiles)
    assert len(timed) == 6


def test_a_kernel_gets_what_it_names():
    kernel = SimpleNamespace(arg_names=["q_ptr", "BLOCK_M", "scale"])
    with launch.recorded("sm_90") as launches:
        launch.launch(kernel, 7, Tile(64, 32, 4, 2), q_ptr=1, scale=0.5, n_head=12)
        with pytest.raises(KeyError, match="q_ptr"):
            launch.launch(kernel, 7, Tile(64, 32, 4, 2), scale=0.5)
    assert launches[0].arguments == {"q_ptr": 1, "BLOCK_M": 64, "scale": 0.5}
    assert launches[0].programs == 7 and launches[0].tile.num_warps == 4
