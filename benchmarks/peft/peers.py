"""The methods that are measured: this library, transformers + PEFT [1], and a plain reference.

All get one `Task`: the same weights, prefix and batches. Read `Task`, then `Ours`, `Peft` (training
steps) and `OurTexts`, `PeftTexts` (generation). `PlainSteps` and `log_p_of_texts` are the
reference, the plain model in fp64 without kernels. Shapes use the letters of
`minprefix/models/gpt2.py`.

A peer is used in its fastest usual form: SDPA, a fused AdamW, no dropout, no mask without padding,
gradients clipped at 1 as in `transformers.Trainer`. It computes its own loss.

[1] https://github.com/huggingface/peft (prefix-tuning)
"""

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from minprefix.data.batches import BatchOrder, Encoded, collate, encode_examples
from minprefix.data.examples import Example
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.graphs import GraphedPasses
from minprefix.training.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = torch.float64  # the precision of the reference
CHECKED = 2  # steps that are compared; the second one depends on the optimizer
# |difference| from the plain model in fp64, relative. Worst seen with mini: loss
# 2e-7 and 3e-3, norm 1e-4 (a sum of 3 million squares in fp32) and 2e-2
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
NORM_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
# after a near-tie, beams may find another text: how much less likely it may be on average, in nats
# per token. Largest seen in bf16: 0.08 (8 texts of 64 tokens); greedy texts are 0.19 below 5 beams
BEAM_TOLERANCE = {"fp32": 0.05, "bf16": 0.15}
LR, CLIP = 1e-3, 1.0  # AdamW's; the largest norm of the gradient
SWITCHES: dict[str, Callable[[], AbstractContextManager]] = {  # ours, with one thing off
    "eager": partial(patch.dict, os.environ, {"MINPREFIX_CUDA_GRAPHS": "0"}),
    "unfused": partial(patch.dict, os.environ, {"MINPREFIX_FUSED": "0"}),
    "many-rows": partial(patch.multiple, kernels, FEW_ROWS=0, SOME_ROWS=0),  # PyTorch's products
}
KNOWN = 50  # consecutive steps without a new bucket, after which new ones are rare
SHAPES = 30  # steps of PEFT on real texts before the timing, so that few shapes are new
CHUNK = 4  # rows at a time of the plain model, which keeps all activations in fp64


class Numbers:
    """A tokenizer for texts of token ids: "17 4" <-> [17, 4]."""

    def __init__(self, eos_id: int):
        self.bos_id = self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Task:
    """The work of all methods in one measurement."""

    model: GPT2  # weights of `dtype`, on the CPU
    prefix: Prefix  # fp32, on the CPU
    tokenizer: object
    examples: list[Example]  # for the training batches
    dtype: str
    device: str
    batch_size: int  # B
    shuffled: bool = False  # do not sort batches by length: the default of transformers' Trainer

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def encoded(self) -> list[Encoded]:
        return encode_examples(self.tokenizer, self.examples)

    @cached_property
    def order(self) -> BatchOrder:
        return BatchOrder([len(row.ids) for row in self.encoded], self.batch_size, seed=0)

    def rows(self, step: int) -> list[Encoded]:
        """The batch of a training step: that of `Trainer`, unless `shuffled`."""
        if not self.shuffled:
            return [self.encoded[i] for i in self.order.batch(step)]
        rng = np.random.default_rng([1, step])
        return [self.encoded[i] for i in rng.integers(len(self.encoded), size=self.batch_size)]


def without(switch: str | None) -> AbstractContextManager:
    """Within the block, one of `SWITCHES` is off; None = all are unchanged."""
    return SWITCHES[switch]() if switch else nullcontext()


class Ours:
    """`Trainer.step`, as in `python -m minprefix train`, with or without --compile.

    switch: which of `SWITCHES` is off while it is built and runs.
    """

    def __init__(self, task: Task, folder, compiled: bool = False, switch: str | None = None):
        model = copy.deepcopy(task.model).to(task.device)
        prefix = copy.deepcopy(task.prefix).to(task.device)
        # enough steps that the learning rate hardly changes
        config = TrainConfig(
            steps=10**6, batch_size=task.batch_size, lr=LR, clip=CLIP, precision=task.dtype,
            warmup_steps=0,
            compile=compiled,
        )  # fmt: skip
        self.task, self.switch = task, switch
        data = task.examples, []
        with without(switch):
            self.trainer = Trainer(model, task.tokenizer, config, *data, folder, prefix)

    @property
    def done(self) -> int:
        return self.trainer.step_done

    def warm_up(self, steps: int) -> None:
        """Steps before the timing; with CUDA graphs, until batches need no new buckets."""
        for _ in range(steps):
            self.step()
        passes, known = self.trainer.passes, 0
        while isinstance(passes, GraphedPasses) and known < KNOWN:
            before = len(passes.replays)
            self.step()
            known = known + 1 if len(passes.replays) == before else 0

    def step(self) -> tuple[Tensor, Tensor]:
        """One step: loss (nats per target token) and norm of the gradient, without waiting for the
        GPU."""
        with without(self.switch):
            entry = self.trainer.step()
        return entry["nats"] / entry["targets"], entry["norm"]


class PlainSteps:
    """The training loop with the plain model in fp64: the reference for the others."""

    def __init__(self, task: Task):
        self.task, self.done = task, 0
        self.model = copy.deepcopy(task.model).to(task.device, EXACT).requires_grad_(False)
        self.prefix = copy.deepcopy(task.prefix).to(task.device, EXACT)
        self.optimizer = torch.optim.AdamW(self.prefix.parameters(), lr=LR, weight_decay=0)

    def step(self) -> tuple[Tensor, Tensor]:
        rows = self.task.rows(self.done)
        targets = sum(len(row.ids) - row.prompt_len for row in rows)
        self.done += 1
        total = torch.zeros((), device=self.task.device)
        for start in range(0, len(rows), CHUNK):
            batch = collate(rows[start : start + CHUNK], self.task.tokenizer.eos_id)
            ids, labels = (x.to(self.task.device) for x in (batch.input_ids, batch.labels))
            loss = self.model.token_losses(ids, labels, prefix=self.prefix).sum() / targets
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.prefix.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm


def peft_model(task: Task, prefix: Prefix):
    """transformers' GPT-2 and PEFT's prefix with our weights, in `dtype`; the prefix in fp32."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    config = task.model.config
    sizes = transformers.GPT2Config(**config.of_model(), attn_implementation="sdpa")
    twin = transformers.GPT2LMHeadModel(sizes).to(task.torch_dtype)
    weights = {f"transformer.{name}": weight for name, weight in task.model.state_dict().items()}
    twin.load_state_dict(weights | {"lm_head.weight": task.model.wte.weight})
    mlp = prefix.mlp
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=prefix.prefix_len,
        prefix_projection=mlp is not None,
        encoder_hidden_size=None if mlp is None else mlp.linear_in.out_features,
    )
    with warnings.catch_warnings(action="ignore"):  # about names that will change
        model = peft.get_peft_model(twin, settings)
    encoder = model.prompt_encoder["default"].float()
    with torch.no_grad():
        if mlp is None:  # row p holds feature ((2 l + kv) H + h) D + d
            table = prefix.table().permute(3, 0, 1, 2, 4).flatten(1)  # (P, 2 L C)
            encoder.embedding.weight.copy_(table)
        else:
            encoder.embedding.weight.copy_(mlp.prefix_embd)
            encoder.transform[0].load_state_dict(mlp.linear_in.state_dict())
            encoder.transform[2].load_state_dict(mlp.linear_out.state_dict())
    return model.to(task.device).eval()


class Peft:
    """A training step of transformers + PEFT, compiled or not."""

    def __init__(self, task: Task, compiled: bool = False):
        self.task, self.done = task, 0
        self.model = peft_model(task, task.prefix)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0, fused=True)
        self.forward = torch.compile(self.model) if compiled else self.model

    def warm_up(self, steps: int) -> None:
        """Steps before the timing; with rows of different lengths more, as each new shape costs."""
        ragged = len({len(row.ids) for row in self.task.encoded}) > 1
        for _ in range(max(steps, SHAPES) if ragged and self.task.device != "cpu" else steps):
            self.step()

    def step(self) -> tuple[Tensor, Tensor]:
        rows, device = self.task.rows(self.done), self.task.device
        batch = collate(rows, self.task.tokenizer.eos_id)
        self.done += 1
        ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        mask = None
        if batch.lengths.min() < ids.shape[1]:
            mask = (torch.arange(ids.shape[1]) < batch.lengths[:, None]).long().to(device)
        # labels are already shifted, so that both have the loss at the same positions
        loss = self.forward(
            input_ids=ids, attention_mask=mask, labels=labels, shift_labels=labels
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm


class OurTexts:
    """`minprefix.generate` with the exported prefix; `switch` as in `Ours`."""

    def __init__(
        self, task: Task, num_beams: int, exact: bool = False, switch: str | None = None
    ):  # fmt: skip
        self.task, self.num_beams, self.switch = task, num_beams, switch
        dtype = EXACT if exact else task.torch_dtype
        self.model = copy.deepcopy(task.model).to(task.device, dtype)
        self.prefix = task.prefix.export().to(task.device, EXACT if exact else torch.float32)

    def texts(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """The n new tokens of each prompt; no text ends earlier."""
        config = GenerationConfig(max_new_tokens=n, min_new_tokens=n, num_beams=self.num_beams)
        with without(self.switch):
            texts = generate(
                self.model, self.task.tokenizer, prompts, prefix=self.prefix, config=config,
                batch_size=len(prompts),
            )  # fmt: skip
        return [self.task.tokenizer.encode(text) for text in texts]


class PeftTexts:
    """`generate` of transformers + PEFT."""

    def __init__(self, task: Task, num_beams: int):
        self.task, self.num_beams = task, num_beams
        self.model = peft_model(task, task.prefix.export())

    def texts(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.task.device)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=n, min_new_tokens=n, num_beams=self.num_beams,
                pad_token_id=self.task.tokenizer.eos_id,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()


@torch.no_grad()
def log_p_of_texts(
    task: Task, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[Tensor, Tensor, float]:
    """log p (nats) of whole texts by the plain fp64 model, and the rounding error.

    Returns:
        chosen, best: (B, n), of the texts' tokens, and of the most likely ones except end of text.
        error: the largest |log p in the task's dtype - log p| of any token at any position.
    """
    exact, low = (copy.deepcopy(task.model).to(task.device, d) for d in (EXACT, task.torch_dtype))
    prefix = task.prefix.export().to(task.device)
    exact_prefix = copy.deepcopy(prefix).double()
    ids = torch.tensor([[*a, *b] for a, b in zip(prompts, texts, strict=True)])  # (B, T + n)
    first, parts, error = len(prompts[0]) - 1, [], 0.0
    for rows in ids.to(task.device).split(CHUNK):
        log_p, low_p = (
            F.linear(model.hidden_states(rows, prefix=p)[:, first:-1], model.wte.weight)
            .double()
            .log_softmax(-1)  # (rows, n, V)
            for model, p in ((exact, exact_prefix), (low, prefix))
        )
        error = max(error, (log_p - low_p).abs().max().item())
        chosen = log_p.gather(-1, rows[:, first + 1 :, None])[..., 0]
        log_p[..., task.tokenizer.eos_id] = float("-inf")
        parts.append(torch.stack([chosen, log_p.amax(-1)]).cpu())
    chosen, best = torch.cat(parts, dim=1)
    return chosen, best, error


class WrongResult(Exception):
    """The results of a method differ from those of the plain model."""


def first_steps(method) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps, for the comparison."""
    return [tuple(float(x) for x in method.step()) for _ in range(CHECKED)]


def check_steps(dtype: str, got: list[tuple], exact: list[tuple]) -> dict:
    """Compare losses and gradient norms of the first steps with those of the plain model."""
    pairs = zip(got, exact, strict=True)
    for step, ((loss, norm), (exact_loss, exact_norm)) in enumerate(pairs, 1):
        for name, a, b, tolerance in (
            ("loss", loss, exact_loss, LOSS_TOLERANCE[dtype]),
            ("gradient norm", norm, exact_norm, NORM_TOLERANCE[dtype]),
        ):
            if not abs(a - b) <= tolerance * abs(b):  # also NaN
                raise WrongResult(
                    f"{name} of step {step} is {a:.6g}, the plain model's is {b:.6g} "
                    f"(tolerance {tolerance:g} of it)"
                )
    return {"loss": f"{got[0][0]:.6f}", "exact_loss": f"{exact[0][0]:.6f}"}


def check_texts(task, prompts, texts, reference, num_beams: int) -> dict:
    """Compare the tokens of texts with the choices of the plain model.

    Greedy: each token has the highest logit, or is so close to it that rounding may decide: within
    4 times the largest error of a log p in this dtype (2 tokens, each with up to twice that error).
    Beams: texts are on average as likely as those of the same search in fp64.
    """
    n = len(reference[0])
    if [len(text) for text in texts] != [n] * len(prompts):
        raise WrongResult(f"texts of {[len(text) for text in texts]} tokens instead of {n} each")
    differ = sum(a != b for a, b in zip(texts, reference, strict=True))
    chosen, best, error = log_p_of_texts(task, prompts, texts)
    if num_beams > 1:
        right = log_p_of_texts(task, prompts, reference)[0]
        less = (right.mean() - chosen.mean()).item()
        if not less <= BEAM_TOLERANCE[task.dtype]:
            raise WrongResult(f"the texts are less likely by {less:.3g} nats a token")
        return {"differ": differ}
    gap, bound = best - chosen, 4 * error  # (B, n)
    if not gap.max() <= bound:
        b, t = divmod(int(gap.argmax()), n)
        raise WrongResult(
            f"token {t + 1} of text {b + 1} is {gap[b, t]:.3g} nats less likely than the best, "
            f"rounding explains {bound:.2g}"
        )
    return {"differ": differ, "near_ties": int((gap > 0).sum())}
