"""`minprefix::attention` as an operator: torch.library's checks, torch.compile, CUDA graphs."""

import pytest
import torch
from conftest import DEVICE, INTERPRETED, assert_close, needs_kernels
from test_reference import named_case
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import on_triton, prefix_attention, prefix_attention_qkv

needs_kernels()

from kernels import attention  # noqa: E402  (imports Triton)

OPTIONS = ("prefix_index", "prefix_lens", "kv_lens", "q_offset")


def arguments(T=20, P=5, requires_grad=(True,) * 5, **options):
    case = named_case("bank, index, ragged", "square", P, T=T, S=T, D=16, **options)
    case = case.to(torch.float32)
    tensors = [
        x.to(DEVICE).requires_grad_(y) for x, y in zip(case.tensors, requires_grad, strict=True)
    ]
    index = [case.options.get(name) for name in OPTIONS]
    return *tensors, *(None if x is None else x.to(DEVICE) for x in index), True, None


def fused(T=20, **kwargs):
    q, k, v, *rest = arguments(T, **kwargs)
    qkv = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).contiguous().detach()
    return qkv.requires_grad_(q.requires_grad), None, None, *rest


CALLS = {
    "all": lambda: arguments(),
    "tiles": lambda: arguments(T=70, kv_lens=[70, 0, 9]),
    "long prefix": lambda: arguments(P=40),
    "no prefix": lambda: arguments(P=0),
    "only the prefix": lambda: arguments(requires_grad=(False,) * 3 + (True,) * 2),
    "decoding": lambda: arguments(T=3, requires_grad=(False,) * 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, fake (shapes, strides, dtypes), autograd and aot dispatch agree with the real op."""
    torch.library.opcheck(torch.ops.minprefix.attention.default, CALLS[name]())


@pytest.mark.parametrize("kwargs", [{}, {"requires_grad": (False,) * 3 + (True,) * 2}])
def test_opcheck_qkv(kwargs):
    torch.library.opcheck(torch.ops.minprefix.attention.default, fused(**kwargs))


@pytest.mark.parametrize("make", [arguments, fused])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)])
def test_opcheck_backward(needs, make):
    inputs = [x.detach() if torch.is_tensor(x) else x for x in make(T=40)]
    o, lse = torch.ops.minprefix.attention(*inputs)
    call = (torch.randn_like(o), None, o, lse, *needs, *inputs)
    checks = ("test_schema", "test_faketensor")  # it has no gradient of its own
    torch.library.opcheck(torch.ops.minprefix.attention_backward.default, call, test_utils=checks)


class Block(torch.nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self, fused_qkv: bool):
        super().__init__()
        self.into, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.fused_qkv = fused_qkv

    def forward(self, x, prefix_k, prefix_v):
        B, T, C = x.shape
        qkv = self.into(x).view(B, T, 3, 2, 16)
        if self.fused_qkv:
            o = prefix_attention_qkv(qkv, prefix_k, prefix_v)
        else:
            o = prefix_attention(*qkv.permute(2, 0, 3, 1, 4), prefix_k, prefix_v)
        return self.out(o.transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_compiles_without_a_break(fused_qkv):
    """One graph, which holds our operator, and the results of eager mode."""
    torch.manual_seed(0)
    block = Block(fused_qkv).to(DEVICE)
    x, prefix = torch.randn(2, 20, 32, device=DEVICE), torch.randn(2, 2, 5, 16, device=DEVICE)
    assert on_triton(prefix)
    prefix.requires_grad_()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    exact = block(x, *prefix)
    torch.compile(block, backend=backend, fullgraph=True)(x, *prefix)
    code = graphs[0].print_readable(print_output=False)
    assert len(graphs) == 1 and "minprefix.attention" in code

    torch._dynamo.reset()
    compiled = torch.compile(
        block, backend="aot_eager" if INTERPRETED else "inductor", fullgraph=True
    )
    actual = compiled(x, *prefix)
    do = torch.randn_like(exact)
    parameters = (prefix, *block.parameters())
    grads = (torch.autograd.grad(o, parameters, do) for o in (actual, exact))
    # the same kernels; the linear layers may sum in another order: fp32, worst seen 0
    assert_close(actual, exact, 1e-5)
    for mine, eager in zip(*grads, strict=True):
        assert_close(mine, eager, 1e-5)


def test_a_tracer_sees_the_operator():
    """make_fx on plain tensors: the eager short cut would leave an empty graph."""
    inputs = [x.detach() if torch.is_tensor(x) else x for x in arguments()]
    graph = make_fx(lambda *x: attention.attention(*x, *inputs[5:]))(*inputs[:5])
    assert "minprefix.attention" in graph.code
    for mine, direct in zip(graph(*inputs[:5]), attention.attention(*inputs), strict=True):
        assert torch.equal(mine, direct)


def test_no_second_derivative():
    q, *rest = arguments()
    o, _ = attention.attention(q, *rest)
    do = torch.randn_like(o).requires_grad_()
    (dq,) = torch.autograd.grad(o, q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("T", [1, 70])
def test_cuda_graph(T):
    """Captured once, replayed on new values: the results of a direct call."""
    inputs = arguments(T=T, requires_grad=(T > 8,) * 5)
    do = torch.randn(3, 2, T, 16, device="cuda")

    def step():
        o, lse = attention.attention(*inputs)
        grads = torch.autograd.grad(o, inputs[:5], do) if T > 8 else ()
        return o, lse, *grads

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs[:5]:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for mine, direct in zip(captured, step(), strict=True):
        assert torch.equal(mine, direct)
