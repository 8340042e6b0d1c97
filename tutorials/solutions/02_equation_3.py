"""Solutions to the exercises of 02_equation_3."""

import math

import torch
import torch.nn.functional as F

import minprefix
from kernels import prefix_attention
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.parametrisations import token_activations
from minprefix.prefix.prefix import Prefix

model, tokenizer = minprefix.load("mini", dtype=torch.float64)
model.requires_grad_(False)
config = model.config
H, C, D = config.n_head, config.n_embd, config.head_dim
z = torch.tensor([tokenizer.encode("name : The Eagle | type : pub")])  # (1, T)
T = z.shape[1]
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gap(a, b):
    return (a - b).abs().max().item()


def parts(q, k, v, prefix_k, prefix_v):
    """o_P, o_S (1, H, T, D) and lam (1, H, T, 1): attention to the prefix alone, to z alone."""
    none = prefix_k[:, :0]
    o_S, log_Z_S = prefix_attention(q, k, v, none, none, return_lse=True)
    o_P, log_Z_P = prefix_attention(
        q, prefix_k[None], prefix_v[None], none, none, causal=False, return_lse=True
    )
    return o_P, o_S, torch.sigmoid(log_Z_P - log_Z_S)[..., None]


def exercise_1():
    """Nothing: attention sums over the positions of the prefix, and a sum has no order. Where each
    once stood is in its key already. Words in another order have other keys and values."""
    table = random(config.n_layer, 2, H, 5, D)
    order = torch.tensor([3, 0, 4, 2, 1])
    logits = model(z, prefix=Prefix.from_table(table, 5))
    moved = gap(model(z, prefix=Prefix.from_table(table[..., order, :], 5)), logits)
    ids = tokenizer.encode("Write one short sentence")[:5]
    assert len(ids) == 5
    texts = [
        Prefix.from_table(token_activations(model, x), 5) for x in (ids, [ids[i] for i in order])
    ]
    words = gap(model(z, prefix=texts[0]), model(z, prefix=texts[1]))
    print(f"  in another order, logits move by {moved:.0e} (prefix), {words:.1f} (words)")
    assert moved < 1e-11 and words > 0.1


def exercise_2():
    """Query t then sees the first t + 1 of [PREFIX; text]: the whole prefix from t = P - 1 on, and
    only the tokens up to t - P. If token j changes, outputs from j + P on move, instead of those
    from j on: a token sees neither itself nor the P - 1 tokens before it. Nothing fails, so look
    which outputs move when one token changes; that test is cheap."""
    n, P, j = 12, 4, 5
    q, k, v = random(3, H, n, D)
    prefix_k, prefix_v = random(2, H, P, D)

    def outputs(diagonal, k):
        s = q @ torch.cat([prefix_k, k], 1).mT / math.sqrt(D)  # (H, n, P + n)
        seen = torch.ones(n, P + n, dtype=torch.bool).tril(diagonal)
        return s.masked_fill(~seen, -math.inf).softmax(-1) @ torch.cat([prefix_v, v], 1)

    other = k.clone()
    other[:, j] += 1
    moved = {}
    for name, diagonal in (("right", P), ("tril()", 0)):
        moves = (outputs(diagonal, k) - outputs(diagonal, other)).abs().amax((0, 2)) > 1e-12
        moved[name] = moves.nonzero()[:, 0].tolist()
        print(f"  {name:6}: the key of token {j} moves outputs {moved[name]}")
    assert moved == {"right": [*range(j, n)], "tril()": [*range(j + P, n)]}


def exercise_3():
    """lam = sigmoid(log Z_P - log Z_S) and sigmoid' = sigmoid (1 - sigmoid), so with
    o = o_S + lam (o_P - o_S) the claim follows. All that reaches keys has the factor lam: none does
    where lam = 0. With P = 1, o_P = v whatever the key is; then the key is reached through
    lam alone, and not where lam is 0 or 1 or where v = o_S already:

        dk = sum_t lam_t (1 - lam_t) do_t . (v - o_S,t) q_t / sqrt(D)
    """
    q, k, v, do = random(4, 1, H, T, D)
    prefix_k, prefix_v = random(H, 1, D).requires_grad_(), random(H, 1, D)
    (dk,) = torch.autograd.grad(prefix_attention(q, k, v, prefix_k, prefix_v), prefix_k, do)
    o_P, o_S, lam = (x.detach() for x in parts(q, k, v, prefix_k, prefix_v))
    d_log_Z = lam * (1 - lam) * (do * (o_P - o_S)).sum(-1, keepdim=True)  # (1, H, T, 1)
    by_hand = (d_log_Z * q).sum((0, 2))[:, None] / math.sqrt(D)  # d log Z_P / dk = q / sqrt(D)
    print(f"  by hand and autograd differ by {gap(by_hand, dk):.0e} of {dk.abs().max():.2g}")
    assert gap(by_hand, dk) < 1e-12 * dk.abs().max()


def exercise_4():
    """Embeddings at positions 0 .. P-1 go through the model like those of tokens. By causality
    their keys and values do not depend on the text, so they are a table: one that C P numbers
    reach, a factor 2 L fewer than equation (3) frees."""
    P = 5
    prefix = Prefix.random(config, P, seed=0, parametrisation="embedding").double()
    prefix.bind(model)
    free = sum(parameter.numel() for parameter in prefix.parameters())
    as_tokens = torch.cat([prefix.virtual.virtual_embd[None], model.wte(z)], dim=1)  # (1, P + T, C)
    through_model = model(as_tokens)[:, P:]
    as_table = model(z, prefix=prefix.export())
    print(f"  differ by {gap(through_model, as_table):.0e}; {free:,} numbers instead of "
          f"{prefix.export().prefix_table.numel():,}")  # fmt: skip
    assert gap(through_model, as_table) < 1e-11
    assert prefix.export().prefix_table.numel() == 2 * config.n_layer * free == 2 * free * 8


def exercise_5():
    """Pad the shorter prefix and hide the padding from its row: the one mask that prefixes need.
    If the zeros stay visible, each takes exp(0) of the attention, and that row is wrong."""

    def attend(q, k, v, prefixes, hide=True):
        """q, k, v (B, H, T, D), prefixes B pairs (H, P_b, D) -> (B, H, T, D)."""
        lens = torch.tensor([pk.shape[1] for pk, _ in prefixes])
        P = int(lens.max())
        pk, pv = (torch.stack([F.pad(x, (0, 0, 0, P - x.shape[1])) for x in xs])
                  for xs in zip(*prefixes, strict=True))  # fmt: skip
        s = q @ torch.cat([pk, k], dim=2).mT / math.sqrt(D)  # (B, H, T, P + T)
        seen = torch.ones(len(lens), T, P + T, dtype=torch.bool).tril(P)
        if hide:
            seen[:, :, :P] = (torch.arange(P) < lens[:, None])[:, None]
        return s.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ torch.cat([pv, v], dim=2)

    q, k, v = random(3, 2, H, T, D)
    users = [tuple(random(2, H, P, D)) for P in (3, 7)]
    o, visible = attend(q, k, v, users), attend(q, k, v, users, hide=False)
    for b, user in enumerate(users):
        alone = prefix_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], *user)
        assert gap(o[b : b + 1], alone) < 1e-13
    print(f"  visible padding moves the shorter one's outputs by {gap(visible[0], o[0]):.2f}")
    assert gap(visible[0], o[0]) > 0.01 and gap(visible[1], o[1]) == 0
    # the same in the whole model, where the two rows also stand at other positions
    prefixes = [Prefix.random(config, P, seed=P).double() for P in (3, 7)]
    logits = model(z.expand(2, -1), prefix=PrefixBank(prefixes))
    differences = [gap(logits[b], model(z, prefix=prefixes[b])[0]) for b in range(2)]
    print(f"  two users in one batch: logits differ by {max(differences):.0e} from each alone")
    assert max(differences) < 1e-11


for exercise in (exercise_1, exercise_2, exercise_3, exercise_4, exercise_5):
    print(exercise.__name__)
    exercise()
