"""Products with norm, bias, GELU and residual: the kernels of few_rows.py and some_rows.py against
PyTorch in fp64, alone and within a model that generates.

They run here in Triton's interpreter (`make test-kernels`) or on a GPU.
"""

import copy

import pytest
import torch
from conftest import (
    DEVICE,
    assert_within_rounding,
    byte_model,
    byte_tokenizer,
    needs_kernels,
    tiny_gpt2,
)

import kernels
from kernels import add_norm, fused_linear, linear_parts, takes_few, takes_some
from kernels.reference import add_norm_plain, fused_linear_plain
from minprefix.generation import fast
from minprefix.generation.texts import generate
from minprefix.methods.adapters import Adapter
from minprefix.models import fused
from minprefix.models.activations import Visible
from minprefix.models.fused import fused_blocks
from minprefix.models.gpt2 import Block
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.prefix import Prefix

needs_kernels()

from kernels import few_rows, some_rows  # noqa: E402  (import Triton)
from kernels import launch as launching  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
FORMS = ["", "norm", "gelu", "residual", "norm gelu residual"]
SIZES = [(1, 33, 70), (3, 300, 17), (4, 64, 700), (2, 513, 96)]  # n, K, N
SOME_SIZES = [(5, 33, 70), (16, 300, 17), (17, 1100, 48), (32, 64, 700)]

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def inputs(n: int, K: int, N: int, dtype, form: str, seed: int = 0) -> dict:
    """The arguments of `fused_linear`; products are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (n, K), (K, N), (N,), (K,), (K,), (n, N)
    x, weight, bias, gain, shift, residual = (
        torch.randn(size, generator=generator) for size in sizes
    )
    given = [a.to(dtype) for a in (x, weight * K**-0.5, bias, gain, shift, residual)]
    return {
        "x": given[0], "weight": given[1], "bias": given[2], "gelu": "gelu" in form,
        "norm": (*given[3:5], EPS) if "norm" in form else None,
        "residual": given[5] if "residual" in form else None,
    }  # fmt: skip


def changed(arguments: dict, change) -> dict:
    """With each tensor, those of the norm too, changed."""

    def one(a):
        return change(a) if isinstance(a, torch.Tensor) else a

    norm = arguments["norm"]
    new = {name: one(a) for name, a in arguments.items()}
    return new | {"norm": norm and tuple(one(a) for a in norm)}


def ours(arguments: dict) -> torch.Tensor:
    return fused_linear(**changed(arguments, lambda a: a.to(DEVICE))).cpu()


def magnitude(exact: dict) -> float:
    """The largest sum of absolute values in one y. GELU's slope is at most 1.13."""
    norm, residual = exact["norm"], exact["residual"]
    x = exact["x"] if norm is None else torch.layer_norm(exact["x"], exact["x"].shape[-1:], *norm)
    y = x.abs() @ exact["weight"].abs() + exact["bias"].abs()
    return (1.13 * y + (0 if residual is None else residual.abs())).max().item()


def check(arguments: dict) -> None:
    exact = changed(arguments, torch.Tensor.double)
    actual, low = ours(arguments), fused_linear_plain(**arguments)
    assert actual.dtype == low.dtype and actual.shape == low.shape
    largest = magnitude(exact)
    assert_within_rounding(actual, low, fused_linear_plain(**exact), largest, 0.0, "y")


@pytest.fixture
def launched(monkeypatch) -> list:
    """The kernels that `few_rows` and `some_rows` launch."""
    found, launch = [], few_rows.launch

    def noted(kernel, *arguments, **options):
        found.append(kernel)
        launch(kernel, *arguments, **options)

    for module in (few_rows, some_rows):
        monkeypatch.setattr(module, "launch", noted)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_within_rounding(sizes, form, dtype, launched):
    check(inputs(*sizes, dtype, form))
    assert len(launched) == takes_few(torch.empty(1, 1, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["", "gelu", "norm", "residual"])
@pytest.mark.parametrize("sizes", SOME_SIZES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_some_positions_within_rounding(sizes, form, dtype, launched):
    """PyTorch's product with a norm or a residual."""
    check(inputs(*sizes, dtype, form))
    taken = takes_some(torch.empty(sizes[:2], dtype=dtype, device=DEVICE))
    assert launched == [some_rows._some_rows_kernel] * (taken and form in ("", "gelu"))


@pytest.mark.parametrize(
    "sizes, n_parts", list(zip([*SOME_SIZES, (6, 1024, 40)], (1, 3, 3, 1, 4), strict=True)), ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_partial_sums(sizes, n_parts, launched):
    """Up to four, whose sum is the product, and which the norm adds with bias and residual."""
    a = inputs(*sizes, torch.float16, "residual")
    x, weight, bias, s = (a[name].to(DEVICE) for name in ("x", "weight", "bias", "residual"))
    if not takes_some(x[:, :1]):
        pytest.skip("needs Hopper or later")
    parts, product = linear_parts(x, weight), x.double() @ weight.double()
    assert parts.dtype == torch.float32 and len(parts) == n_parts
    assert (parts.double().sum(0) - product).abs().max() < 1e-4 and len(launched) == 1
    gain, shift = torch.randn(2, sizes[2]).half().to(DEVICE)
    actual = add_norm(s, parts, gain, shift, EPS, bias)
    exact = [b.double().cpu() for b in (s, product[None], gain, shift, bias)]
    exact = add_norm_plain(*exact[:4], EPS, exact[4])
    low = add_norm_plain(*(b.cpu() for b in (s, parts, gain, shift)), EPS, bias.cpu())
    for name, one, other, right in zip(("s", "n"), actual, low, exact, strict=True):
        largest = right.abs().max().item() + 1
        assert_within_rounding(one.cpu(), other, right, largest, 0.0, name)
    with pytest.raises(ValueError, match="do not fit"):
        add_norm(s, parts[:, 1:], gain, shift, EPS, bias)


def test_parts_of_what_the_kernel_does_not_take(launched):
    """PyTorch's product, one part: views that are no rows, more positions, fp32, no inputs. Shapes
    that disagree are an error and read nothing."""
    a = inputs(6, 64, 40, torch.float16, "")
    x, weight = a["x"].to(DEVICE), a["weight"].to(DEVICE)
    product = x.double() @ weight.double()
    for x_, weight_ in (
        (x, weight.t().contiguous().t()), (x.t().contiguous().t(), weight),
        (x.float(), weight.float()), (x, weight.float()), (x.repeat(6, 1), weight),
    ):  # fmt: skip
        parts = linear_parts(x_, weight_)
        assert parts.shape == (1, len(x_), 40) and parts.dtype == torch.float32
        assert (parts[0, -6:] - product).abs().max() < 1e-5  # fp32; worst of 50 seeds: 1.3e-6
    assert linear_parts(x[:, :0], weight[:0]).eq(0).all()
    assert torch.equal(fused_linear(x[:, :0], weight[:0], weight[0]), weight[:1].expand(6, 40))
    assert not launched
    with pytest.raises(ValueError, match=r"do not fit: x \(6, 64\) and weight \(63, 40\)"):
        linear_parts(x, weight[1:])


def test_parts_of_many_inputs(monkeypatch, launched):
    """A program never has more than MOST_INPUTS, for which it has enough shared memory."""
    monkeypatch.setattr(some_rows, "MOST_INPUTS", 64)
    a = inputs(6, 300, 8, torch.float16, "")
    x, weight = a["x"].to(DEVICE), a["weight"].to(DEVICE)
    if not takes_some(x):
        pytest.skip("needs Hopper or later")
    parts = linear_parts(x, weight)
    assert len(parts) == 5 and len(launched) == 1
    assert (parts.sum(0) - x.double() @ weight.double()).abs().max() < 1e-5  # as above


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_bad_position_of_some_stays_alone():
    a = inputs(18, 70, 40, torch.float16, "gelu")
    clean = ours(a)
    a["x"][1, 3], a["x"][17, 0] = float("inf"), float("nan")
    found, others = ours(a), [row for row in range(18) if row not in (1, 17)]
    assert torch.equal(found[others], clean[others])
    assert not found[[1, 17]].isfinite().any()


@pytest.mark.parametrize("n", [1, 3])
def test_weights_in_pieces(n, monkeypatch, launched):
    """More weights than a program can hold; a norm of as many inputs goes to PyTorch."""
    monkeypatch.setattr(few_rows, "HELD", 2**10)
    monkeypatch.setattr(few_rows, "PIECE", 64 * 4)
    monkeypatch.setattr(kernels, "MOST_NORMED", 128)
    a = inputs(n, 200, 40, torch.float32, "residual")
    assert few_rows.form_of(a["x"], 40).block_k == 64
    check(a)
    assert len(launched) == 1
    check(inputs(n, 200, 40, torch.float32, "norm"))
    assert len(launched) == 1


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_values(dtype):
    """Positions far from zero and of equal numbers; GELU at both its ends; a residual near the
    largest number."""
    a = inputs(4, 100, 40, dtype, "norm gelu residual")
    a["x"][0] += 100
    a["x"][1] = 7
    a["bias"][:4] = torch.tensor([-200.0, 200.0, -9.0, 9.0])
    a["residual"][2, :] = 6e4
    check(a)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_bad_position_stays_alone():
    """inf and NaN reach no other position."""
    a = inputs(4, 70, 40, torch.float32, "norm residual")
    clean = ours(a)
    a["x"][1, 3], a["x"][3, 0] = float("inf"), float("nan")
    found = ours(a)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and found[[1, 3]].isnan().all()


@pytest.mark.parametrize("n, form", [(4, "norm gelu residual"), (20, "gelu")])
def test_results_repeat(n, form):
    a = inputs(n, 300, 40, torch.float16, form)
    assert torch.equal(ours(a), ours(a))


def test_views():
    """Parts of larger tensors, and positions in two dimensions that no stride describes."""
    a = inputs(4, 64, 40, torch.float32, "norm residual")
    a["x"] = torch.cat([a["x"], a["x"] + 1], 1)[:, 32:96]
    a["weight"] = torch.cat([a["weight"], a["weight"]], 1)[:, 7:47]
    a["residual"] = a["residual"][:1].expand(4, 40)
    check(a)
    grid = {"x": a["x"].view(2, 2, 64).transpose(0, 1)}
    grid["residual"] = a["residual"].reshape(2, 2, 40).transpose(0, 1)
    assert torch.equal(ours(a | grid), ours(a).view(2, 2, 40).transpose(0, 1))


def test_who_takes_pytorch(monkeypatch, launched):
    a = inputs(4, 32, 16, torch.float32, "norm gelu residual")
    a = changed(a, lambda x: x.to(DEVICE))
    many = {name: a[name].repeat(2, 1) for name in ("x", "residual")}  # 8 positions
    fused_linear(**a | many)
    fused_linear(**changed(a, torch.Tensor.double))
    fused_linear(**a | {"residual": a["residual"].double()})
    fused_linear(**a | {"x": a["x"][:0], "residual": a["residual"][:0]})
    with torch.enable_grad():
        weight = a["weight"].clone().requires_grad_()
        fused_linear(**a | {"weight": weight}).sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.autocast(DEVICE, torch.bfloat16):
        fused_linear(**a | {"norm": None})
    with monkeypatch.context() as patch:
        patch.setenv("MINPREFIX_FUSED", "0")
        fused_linear(**a)
    assert not launched
    fused_linear(**a)
    assert len(launched) == 1
    for name in ("x", "bias", "residual"):
        with pytest.raises(ValueError, match=f"^{name} .* does not fit a weight"):
            fused_linear(**a | {name: a[name][..., 1:]})
    with pytest.raises(ValueError, match="^shift .* does not fit a weight"):
        fused_linear(**a | {"norm": (a["norm"][0], a["norm"][1][1:], EPS)})


def test_who_takes_the_kernel_of_some_positions():
    """5 to 32 of them, in 16 bits, on Hopper or later, without gradients and autocast."""

    def taken(n: int = 9, K: int = 64, dtype=torch.float16, target: str = "sm_90") -> bool:
        with launching.recorded(target):
            return takes_some(torch.empty(n, K, dtype=dtype, device=DEVICE))

    assert taken() and taken(5) and taken(32) and taken(K=1) and taken(K=kernels.MOST_INPUTS)
    assert taken(target="sm_100")
    assert not (taken(4) or taken(33) or taken(K=0) or taken(K=kernels.MOST_INPUTS + 1))
    assert not (taken(target="sm_80") or taken(target="gfx942") or taken(dtype=torch.float32))
    with torch.enable_grad():
        assert not taken()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not taken()


def test_forms_are_as_the_header_says():
    """A thread holds at most 128 weights of bf16, and each weight is held by some thread."""
    C = 1024
    products = (C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)
    for target in launching.SHARED_MEMORY:
        with launching.recorded(target):
            for n, dtype in ((1, torch.bfloat16), (4, torch.bfloat16), (1, torch.float32)):
                programs = []
                for K, N in products:
                    x = torch.empty(n, K, dtype=dtype, device="meta")
                    form = few_rows.form_of(x, N)
                    programs.append(N // form.block_n)
                    assert form.block_k == K
                    held = K * form.block_n // (32 * form.num_warps)
                    assert held * x.element_size() <= 256
                if target == "sm_90" and dtype == torch.bfloat16:
                    assert programs == ([96, 64, 128, 64] if n == 1 else [96, 128, 128, 128])


def test_tiles_of_some_rows_are_as_the_header_says():
    """Enough programs, and no more memory than a multiprocessor has; each input is read once."""
    C, bits = 1024, 2
    programs = []
    for inputs, parts, N in ((C, 1, 3 * C), (C, 4, C), (C, 1, 4 * C), (4 * C, 4, C)):
        tile, block_k = some_rows.tile_of(32, inputs // parts)
        programs.append(inputs // block_k * (N // tile.block_n))
    assert programs == [96, 128, 128, 128]
    for n, inputs in ((5, 33), (16, 768), (17, 1024), (32, 1280), (32, kernels.MOST_INPUTS)):
        tile, block_k = some_rows.tile_of(n, inputs)
        assert tile.block_m >= n and block_k >= inputs and block_k >= 16 * tile.num_warps
        memory = bits * block_k * (tile.block_m + tile.block_n)
        assert memory <= 192 * 2**10 < launching.SHARED_MEMORY["sm_90"]
        if inputs == C:  # more than 16 positions: no room for the next product's programs
            assert (
                2 * memory > launching.SHARED_MEMORY["sm_90"] > 2 * bits * C * (16 + tile.block_n)
            )


def test_kernels_overlap_where_the_gpu_and_the_driver_can(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(launching, "driver_version", lambda: 13000)
    assert not launching.overlaps(device)  # the interpreter
    monkeypatch.setattr(launching, "target_of", lambda device: "sm_90")
    assert launching.overlaps(device)
    with monkeypatch.context() as patch:
        patch.setenv("MINPREFIX_FUSED", "0")
        assert not launching.overlaps(device)
    monkeypatch.setattr(launching, "driver_version", lambda: 12020)
    assert not launching.overlaps(device)


# whole models -----------------------------------------------------------------------------------

PROMPTS = ["name : The Eagle", "food", "area : riverside | name"]


@pytest.fixture
def replayed(monkeypatch):
    """On the CPU, what a graph would replay runs as it is; on a GPU there are graphs anyway."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fast, "uses_graphs", lambda device: True)
        monkeypatch.setattr(fast, "capture", lambda run, device, pool: run)


def texts(model, prompts=PROMPTS, **options) -> list[str]:
    """Of the second call, in which a graph reads the prompts too."""
    fast.KEPT.clear()
    with torch.enable_grad():
        for _ in range(2):
            found = generate(model, byte_tokenizer(), prompts, max_new_tokens=6, **options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["greedy", "beams", "bank", "some rows"])
@pytest.mark.usefixtures("replayed")
def test_generated_tokens_are_the_same(how, monkeypatch, launched):
    """These logits have no near-ties: four kernels in each layer of a step, or a norm with each
    sum, or PyTorch's blocks. Some rows, in fp16, take PyTorch's product in the last layer."""
    some = how == "some rows"
    model = copy.deepcopy(byte_model()).to(DEVICE, torch.float16 if some else torch.float32)
    if some and not takes_some(model.wte.weight.new_empty(6, 1)):
        pytest.skip("needs Hopper or later")
    prefixes = [Prefix.random(model.config, 3, seed).to(DEVICE) for seed in range(2)]
    options: dict = {"prefix": prefixes[0]}
    if how == "beams":
        options |= {"prompts": PROMPTS[:1], "num_beams": 3}
    if how == "bank":
        options |= {"prefix": PrefixBank(prefixes), "prefix_index": [1, -1, 0]}
    if some:
        options |= {"prompts": [*PROMPTS, "x", "price : high", "near : Burger King"]}
    found = texts(model, **options)
    assert launched and len(launched) % (4 * model.config.n_layer - some) == 0
    launched.clear()
    sums = []
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    monkeypatch.setattr(kernels, "SOME_ROWS", 0)
    monkeypatch.setattr(fused, "add_norm", lambda *a: sums.append(1) or kernels.add_norm(*a))
    assert texts(model, **options) == found and not launched
    assert sums and len(sums) % (2 * model.config.n_layer) == 0
    sums.clear()
    monkeypatch.setenv("MINPREFIX_FUSED", "0")
    assert texts(model, **options) == found and not launched and not sums


def test_a_step_of_some_rows(launched):
    """Seven kernels in a layer; in the last, PyTorch's product and sum are left."""
    model = tiny_gpt2(0, torch.float16, n_layer=3, n_embd=64).to(DEVICE)
    prefix, x = model.activations_of(None).layers()[0], torch.randn(9, 1, 64).half()
    if not takes_some(x.to(DEVICE)):
        pytest.skip("needs Hopper or later")

    def hidden(of, x) -> torch.Tensor:
        for block in of.h:
            x = block(x, prefix, Visible(), attend=lambda q, k, v, *_: q + v)
        return x

    exact, low = copy.deepcopy(model).double().cpu(), copy.deepcopy(model).cpu()
    with fused_blocks(model, 9):
        found = hidden(model, x.to(DEVICE)).cpu()
    assert len(launched) == 4 * 3 - 1
    right = hidden(exact, x.double())
    assert_within_rounding(found, hidden(low, x), right, right.abs().max().item(), 0.0, "x")


def test_blocks_that_are_no_plain_ones_run_as_they_are(monkeypatch):
    """A step of dropout, of another function in the MLP, or of an adapter between the two sums."""
    x, sizes = torch.randn(2, 1, 32, device=DEVICE), {"n_layer": 1}
    model, other = (
        tiny_gpt2(0, torch.float32, **sizes, activation_function=name).to(DEVICE)
        for name in ("gelu_new", "relu")
    )
    ran = []
    for name in ("step_forward", "rows_forward"):
        monkeypatch.setattr(fused, name, lambda *_, name=name, **__: ran.append(name))
    monkeypatch.setitem(fused.FUSED, Block, lambda *_, **__: ran.append("fused_forward"))

    def how(of, rows: int = 2) -> str:
        ran.clear()
        with fused_blocks(of, rows):
            of.h[0](x, of.activations_of(None).layers()[0], Visible())
        return ran[0] if ran else "plain"

    adapter = Adapter.random(model.config, 4, 0, "houlsby").to(DEVICE)
    adapter.bind(model)
    assert (how(model), how(other)) == ("step_forward", "fused_forward")
    half = copy.deepcopy(model).half()
    taken = takes_some(half.wte.weight.new_empty(5, 32))
    assert how(half, 5) == ("rows_forward" if taken else "fused_forward")
    assert how(copy.deepcopy(other).half(), 5) == "fused_forward"
    assert how(half, kernels.SOME_ROWS + 1) == how(model, 5) == "fused_forward"
    with fused_blocks(model, 2):
        assert how(model) == "step_forward"  # as it was found
    assert how(copy.deepcopy(model).train()) == "plain"
    adapter.attach(model)
    assert how(model) == "fused_forward"
    adapter.detach(model)
    assert how(model) == "step_forward"
    assert "forward" not in vars(model.h[0])
