"""Solutions to the exercises of tutorial 4 (04_fused_attention). Each one is asserted.

Shapes use the letters of the table in tutorial 1.
"""

import math

import torch

from kernels import prefix_attention

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
B, H, T, P, D, BLOCK = 3, 2, 21, 6, 16, 8
scale = D**-0.5
q, k, v, do = (torch.randn(B, H, T, D) for _ in range(4))


def softmax_step(u, z, m, s, v):
    """As in the tutorial: one tile of scores s (M, N) into the running softmax of M queries."""
    m_new = torch.maximum(m, s.amax(1))
    p, alpha = torch.exp(s - m_new[:, None]), torch.exp(m - m_new)
    return u * alpha[:, None] + p @ v, z * alpha + p.sum(1), m_new


def forward_head(q, k, v, prefix_k, prefix_v, columns: int, prefix_first: bool = True):
    """o, lse of one row and head that sees `columns` of the prefix, and the masked tiles."""
    out, lse, masked = torch.empty_like(q), q.new_empty(len(q)), 0
    for m0 in range(0, len(q), BLOCK):
        i = torch.arange(m0, min(m0 + BLOCK, len(q)))
        plan = [("sequence", n0) for n0 in range(0, int(i[-1]) + 1, BLOCK)]
        prefix = [("prefix", p0) for p0 in range(0, columns, BLOCK)]
        plan = prefix + plan if prefix_first else plan + prefix
        u, z, m = (
            torch.zeros(len(i), q.shape[1]),
            torch.zeros(len(i)),
            torch.full((len(i),), -math.inf),
        )
        for kind, at in plan:
            if kind == "prefix":
                cols = slice(at, min(at + BLOCK, columns))  # exercise 2: the row's own length
                s, values = scale * q[i] @ prefix_k[cols].T, prefix_v[cols]
            else:
                j = torch.arange(at, min(at + BLOCK, int(i[-1]) + 1))
                hidden = j > i[:, None]
                masked += bool(hidden.any())
                s, values = (scale * q[i] @ k[j].T).masked_fill(hidden, -math.inf), v[j]
            u, z, m = softmax_step(u, z, m, s, values)
        out[i], lse[i] = u / z[:, None], m + z.log()
    return out, lse, masked


# 1. The prefix after the sequence: o and lse are the same but for rounding, and so is the number of
#    masked tiles: which tiles need a mask has nothing to do with the order in which they are read.
prefix_k, prefix_v = torch.randn(2, H, P, D)
first = forward_head(q[0, 0], k[0, 0], v[0, 0], prefix_k[0], prefix_v[0], P)
last = forward_head(q[0, 0], k[0, 0], v[0, 0], prefix_k[0], prefix_v[0], P, prefix_first=False)
gap = max((a - b).abs().max().item() for a, b in zip(first[:2], last[:2], strict=True))
print(f"1. prefix last: largest |difference| {gap:.1e}, masked tiles {first[2]} and {last[2]}")
assert gap < 2e-14 and first[2] == last[2] > 0  # worst seen 1e-15

# 2. Ragged prefixes: the loop over prefix tiles ends at the row's own length.
lens, index = torch.tensor([6, 2, 4]), torch.tensor([1, -1, 2])  # of the bank; of the rows
bank_k, bank_v = torch.randn(2, 3, H, P, D)
o, lse = prefix_attention(
    q, k, v, bank_k, bank_v, prefix_index=index, prefix_lens=lens, return_lse=True
)
gap = 0.0
for b, n in enumerate(index.tolist()):
    columns = int(lens[n]) if n >= 0 else 0
    for h in range(H):
        mine = forward_head(q[b, h], k[b, h], v[b, h], bank_k[n, h], bank_v[n, h], columns)
        gap = max(gap, (mine[0] - o[b, h]).abs().max().item())
        gap = max(gap, (mine[1] - lse[b, h]).abs().max().item())
print(f"2. a bank of ragged prefixes: largest |difference| {gap:.1e}")
assert gap < 2e-14

# 3. d lse_i / d s_ij = p_ij, so ds_ij = p_ij (dp_ij - delta_i + dlse_i): only delta changes,
#    delta = rowsum(do * o) - dlse.
leaves = [x.clone().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
o, lse = prefix_attention(*leaves, return_lse=True)
dlse = torch.randn(B, H, T)
exact = torch.autograd.grad((o, lse), leaves, (do, dlse))
delta = (do * o).sum(-1) - dlse  # (B, H, T)
visible = torch.ones(T, P + T).tril(P)
keys = torch.cat([prefix_k.expand(B, -1, -1, -1), k], dim=2)
values = torch.cat([prefix_v.expand(B, -1, -1, -1), v], dim=2)
p = torch.exp(scale * q @ keys.mT - lse[..., None]) * visible
ds = p * (do @ values.mT - delta[..., None])  # (B, H, T, P + T)
dkeys = scale * ds.mT @ q
found = scale * ds @ keys, dkeys[:, :, P:], dkeys[:, :, :P].sum(0)
gap = max(
    (a - b).abs().max().item() for a, b in zip(found, (exact[0], exact[1], exact[3]), strict=True)
)
print(f"3. with a gradient at lse: largest |difference| {gap:.1e}")
assert gap < 5e-14

# 4. Parts of the cache, merged by lse: o = sum_c exp(lse_c - lse) o_c.
S, splits = 100, 4
cache_k, cache_v, one = torch.randn(B, H, S, D), torch.randn(B, H, S, D), q[:, :, :1]
none, parts = prefix_k[:, :0], []
for c in range(splits):
    cols = slice(c * S // splits, (c + 1) * S // splits)
    p_k, p_v = (prefix_k, prefix_v) if c == 0 else (none, none)  # the prefix goes with the first
    part = prefix_attention(
        one, cache_k[:, :, cols], cache_v[:, :, cols], p_k, p_v, causal=False, return_lse=True
    )
    parts.append(part)
lse_c = torch.stack([lse for _, lse in parts])  # (C, B, H, 1)
share = torch.softmax(lse_c, dim=0)[..., None]  # exp(lse_c - lse)
merged = (share * torch.stack([o for o, _ in parts])).sum(0)
gap = (merged - prefix_attention(one, cache_k, cache_v, prefix_k, prefix_v)).abs().max().item()
added = 2 * 4 * splits * B * H * (D + 1)  # fp32 o_c and lse_c, written and read
cache = 2 * 2 * B * H * S * D  # bf16 keys and values
print(f"4. {splits} splits: largest |difference| {gap:.1e}; {added} bytes added to {cache}")
assert gap < 2e-14
# More parts mean more programs: worth these bytes where few rows would leave most of a GPU idle.

# 5. The sums over the columns split into those over the prefix and those over the sequence. With
#    q = x W_q, the scores of the prefix are x W_1 with W_1 = W_q K_P^T / sqrt(D), (C, P): a first
#    layer of width P, whose activation is the softmax; V_P is the second layer. lambda is a gate
#    that the softmax provides, lambda = sigmoid(lse_P - lse_S).
C = 48
x, w_q = torch.randn(B, T, C), torch.randn(H, C, D) / C**0.5
q_x = torch.einsum("btc,hcd->bhtd", x, w_q)
empty = k[:, :, :0]
o, lse = prefix_attention(q_x, k, v, prefix_k, prefix_v, return_lse=True)
o_s, lse_s = prefix_attention(q_x, k, v, none, none, return_lse=True)
_, lse_p = prefix_attention(q_x, empty, empty, prefix_k, prefix_v, return_lse=True)
w_1 = scale * w_q @ prefix_k.mT  # (H, C, P)
adapter = (x[:, None] @ w_1).softmax(-1) @ prefix_v  # (B, H, T, D)
lam = torch.sigmoid(lse_p - lse_s)[..., None]  # (B, H, T, 1)
gap = ((1 - lam) * o_s + lam * adapter - o).abs().max().item()
print(f"5. an adapter with a gate: largest |difference| {gap:.1e}; lambda falls from "
      f"{lam[:, :, 0].mean():.2f} at query 0 to {lam[:, :, -1].mean():.2f} at the end")  # fmt: skip
assert gap < 2e-14 and lam[:, :, 0].mean() > lam[:, :, -1].mean()  # more text, less prefix
