"""Many prefixes of one model, mixed freely in one batch (section 8.2 of Li & Liang 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minprefix.files import brief
from minprefix.models.activations import PrefixActivations
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix


class PrefixBank:
    """Several prefixes for one model, in memory.

    `model(ids, prefix=bank, prefix_index=index)`: row b uses prefix index[b], -1 = none. Lengths,
    position offsets, gates and places may differ: each row is computed as it would be alone.
    """

    def __init__(self, prefixes: list[Prefix]):
        if isinstance(prefixes, torch.nn.Module):
            raise ValueError("a bank needs a list of prefixes, got one prefix")
        if not prefixes:
            raise ValueError("a bank needs at least one prefix")
        for prefix in prefixes:
            if not isinstance(prefix, Prefix):
                raise ValueError(f"a bank holds prefixes of GPT-2, got a {type(prefix).__name__}")
        self.prefixes = list(prefixes)

    def activations(self, prefix_index: Tensor | None = None) -> PrefixActivations:
        """Tables padded to the longest, (L, 2, N, H, P, D). No index: row b uses prefix b."""
        tables = [prefix.table() for prefix in self.prefixes]
        if len({(*t.shape[:3], t.shape[4]) for t in tables}) > 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in tables)
            raise ValueError(f"prefixes of one bank must fit one model, their tables are {shapes}")
        device, N = tables[0].device, len(tables)
        lens = torch.tensor([prefix.prefix_len for prefix in self.prefixes], device=device)
        P = max(prefix.prefix_len for prefix in self.prefixes)
        table = torch.stack([F.pad(t, (0, 0, 0, P - t.shape[-2])) for t in tables], dim=2)
        if not isinstance(prefix_index, Tensor | None):
            raise ValueError(f"prefix_index must be a tensor, got {brief(prefix_index)}")
        if prefix_index is None:
            prefix_index = torch.arange(N, device=device)
        elif (
            prefix_index.device.type == "cpu"
            and prefix_index.numel()
            and (prefix_index.min() < -1 or prefix_index.max() >= N)
        ):
            found = brief(prefix_index.tolist())
            raise ValueError(f"prefix_index must lie in [-1, {N - 1}], got {found}")
        offsets = torch.tensor([prefix.position_offset for prefix in self.prefixes], device=device)
        infix = [prefix.place == "infix" for prefix in self.prefixes]  # (N,)
        row = prefix_index.clamp(min=0)
        return PrefixActivations(
            table,
            position_offset=torch.where(prefix_index >= 0, offsets[row], 0),
            max_offset=max(prefix.position_offset for prefix in self.prefixes),
            gate=self._gates(table),
            index=prefix_index,
            lens=lens,
            infix=torch.tensor(infix, device=device)[row] if any(infix) else False,
        )

    def _gates(self, table: Tensor) -> Tensor | None:
        """The gates (L, N, H), with 1 for a prefix that has none; None if no prefix has a gate."""
        if all(prefix.gate is None for prefix in self.prefixes):
            return None
        ones = table.new_ones(table.shape[0], table.shape[3])
        gates = [ones if prefix.gate is None else prefix.gate for prefix in self.prefixes]
        return torch.stack(gates, dim=1)

    def check_base(self, model: GPT2) -> None:
        """ValueError if one of the prefixes belongs to another model than `model`."""
        for prefix in self.prefixes:
            prefix.check_base(model)
