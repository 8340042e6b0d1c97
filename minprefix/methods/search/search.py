"""Searches for a discrete prompt: the P tokens before a text that lower the loss most.

The objective is that of prefix-tuning, eq. (2) of Li & Liang 2021 [1], on the same rows in the same
frame, with the same frozen model. The search chooses P tokens, that is, one-hot vectors, whereas
embedding-only tuning finds any embeddings and prefix-tuning any activations: discrete <
embedding-only < prefix, each contained in the next. By default all tokens of the vocabulary are
therefore allowed, because the prompt is stored as ids and need not be typed; `printable` allows
only prompts that can be typed.

A bos between source and target tells the model that a new document begins, and words before it can
hardly change that. With `after` = A > 0, the last A tokens therefore replace the bos, like a
written instruction. This is outside the chain of inclusions above, and a stronger baseline.

The optimizer is greedy coordinate gradient [2], which is related to AutoPrompt [3] and ARCA [4]:
gradients in the one-hot vectors propose replacements, and the loss decides. It is extended by

    starts       task words, instructions, windows of training rows (a piece of a solved example)
                 and random tokens; the best few become chains, whose number is halved repeatedly
    moves        replace one token, or remove one and insert one elsewhere
    a race       score all candidates and the present prompt on a few rows, the best quarter on four
                 times as many, and so on; then combine the replacements of the finalists at
                 different places, one by one, as long as the loss falls
    a judge      training rows that no gradient and no race uses: a prompt is accepted only if it is
                 better there, so luck with a minibatch is not enough
    larger minibatches, once nothing is accepted any more

Dev rows choose which accepted prompt is kept. Read `SearchConfig`, `PromptSearch.begin` and
`PromptSearch.step`; `training/loop.py` has the loop. Step s depends only on the settings, the state
before it and (seed, s), so a run that was killed continues to the same result as an uninterrupted
run. A run folder holds

    log.jsonl            one line per step, with the row-evaluations spent so far
    state/state.pt       the state (search.json in folders of older versions)
    prompt.json          the best prompt on the dev rows: token ids, text, base model
    prefix.safetensors   if A = 0, the same prompt as an ordinary prefix

Effort is counted in row-evaluations: one forward pass of one row with one prompt; a gradient counts
as `GRADIENT_COST` of them.
[1] https://arxiv.org/abs/2101.00190   [2] https://arxiv.org/abs/2307.15043
[3] https://arxiv.org/abs/2010.15980   [4] https://arxiv.org/abs/2303.04381
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minprefix.data.batches import Encoded, digest, encode_examples, origins, spread
from minprefix.data.examples import Example
from minprefix.files import write_text
from minprefix.methods.config import TEMPLATES, SearchConfig
from minprefix.methods.hard_prompt import HardPrompt, template_rows
from minprefix.methods.search.moves import (
    PromptForm,
    changed_places,
    neighbours,
    race,
    starting_prompts,
)
from minprefix.methods.search.saved import MOST_LEVELS, check_search, read_older
from minprefix.methods.search.scores import (
    GRADIENT_COST,
    one_hot_gradient,
    prompt_nats,
    target_tokens,
)
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import fingerprint, need_gpt2
from minprefix.prefix.prefix import Prefix, token_activations
from minprefix.training.config import duration
from minprefix.training.loop import Loop
from minprefix.training.precision import in_bf16, uses_bf16

FINALISTS = 8  # prompts that reach the end of a race

# the attributes that form the state of a search, in addition to those of `Loop`
STATE = ("spent", "level", "refused", "chains", "best_prompt", "before")


class PromptSearch(Loop):
    """One search: `run()` continues from the current step to the end.

    Args:
        train: examples; each (source, target) pair is one training row.
        dev: examples that choose the prompt to keep; if there are none, the judge's rows choose it.
        out: the run folder.
        linearisation: frame of the rows, see `batches.encode_pair`.
    Raises:
        ValueError: a row too long for model and prompt, an empty target, fewer than two rows.
    """

    def __init__(
        self, model: GPT2 | BART, tokenizer, config: SearchConfig, train: list[Example],
        dev: list[Example], out: str | Path, linearisation: str = "paper",
    ):  # fmt: skip
        need_gpt2(model, "a searched prompt")
        assert isinstance(model, GPT2)
        super().__init__(
            config, out, model.wte.weight.device, steps=config.steps, log_every=1,
            eval_every=config.eval_every,
        )  # fmt: skip
        self.tokenizer, self.linearisation = tokenizer, linearisation
        self.exact = model.requires_grad_(False).eval()  # its activations are saved as a prefix
        self.bf16 = uses_bf16(config.precision, self.device)
        self.model = in_bf16(model).requires_grad_(False).eval() if self.bf16 else model
        self._encode(train, dev)
        usable = [self.form.is_usable(v) for v in range(model.config.vocab_size)]
        self.usable = torch.tensor(usable)  # (V,)
        # the state, in addition to that of `Loop`
        self.spent, self.level, self.refused = 0, 0, 0
        self.chains: list[tuple[list[int], float]] = []  # prompt and its loss on the judge's rows
        self.best_prompt, self.before = [], {}
        self.step_evaluations = 0  # row-evaluations of the last step

    def _encode(self, train: list[Example], dev: list[Example]) -> None:
        """Make the rows for training, for the judge and for dev, and the form of the prompts."""
        config, tokenizer = self.config, self.tokenizer
        P, A, n_positions = config.prompt_len, config.after, self.model.config.n_positions
        room = n_positions - P + (A > 0)  # the prompt replaces the bos
        if room < 1:
            raise ValueError(
                f"a prompt of {P} tokens leaves no room for a text in {n_positions} positions"
            )
        rows = encode_examples(tokenizer, train, self.linearisation, room + 1)
        if len(rows) < 2:
            raise ValueError(f"a search needs at least two training pairs, got {len(rows)}")
        order = np.random.default_rng([config.seed, 0]).permutation(len(rows))
        n_judge = min(config.judge_rows, len(rows) // 2)
        self.judge_rows = [rows[i] for i in order[:n_judge]]
        self.rows = [rows[i] for i in order[n_judge:]]
        some = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, 3)]
        sources = [tokenizer.decode(row.ids[: row.prompt_len - 1]) for row in some]
        self.form = PromptForm(tokenizer, A, config.printable, sources)
        self.dev_rows, self.templates = self.judge_rows, {}
        if dev:
            most = config.eval_pairs
            dev_rows = encode_examples(tokenizer, dev, self.linearisation, room + 1)
            self.dev_rows = spread(dev_rows, most)
            for template in TEMPLATES:
                rows = template_rows(tokenizer, HardPrompt(template), dev)
                self.templates[template] = spread(rows, most)

    # scores --------------------------------------------------------------------------------------

    def nats(self, prompts: Sequence[list[int]], rows: Sequence[Encoded]) -> np.ndarray:
        """Summed loss of each prompt on the rows, (N,); adds to the row-evaluations spent."""
        self.spent += len(prompts) * len(rows)
        ids = torch.tensor(prompts, dtype=torch.long, device=self.device)
        A = self.config.after if prompts[0] else 0  # without a prompt the rows keep their bos
        nats = prompt_nats(self.model, ids, rows, self.tokenizer.eos_id, A).cpu().numpy()
        if not np.isfinite(nats).all():
            of = f" of the rows {places}" if (places := origins(rows)) else ""
            step = self.step_done + 1
            raise FloatingPointError(f"a loss{of} is not finite in step {step}: look at the data")
        return nats

    def losses(self, prompts: list[list[int]], rows: list[Encoded]) -> np.ndarray:
        """Mean loss per target token, in nats: (N,)."""
        return self.nats(prompts, rows) / target_tokens(rows)

    # one step ------------------------------------------------------------------------------------

    def draw(self, step: int) -> tuple[np.random.Generator, list[Encoded]]:
        """The random generator of step 1, 2, ... and its minibatch; step 0 is for the starts."""
        rng = np.random.default_rng([self.config.seed, 1, step])
        size = min(len(self.rows), self.config.batch_size << self.level)
        return rng, [self.rows[i] for i in rng.choice(len(self.rows), size, replace=False)]

    def step(self) -> dict:
        """Try to improve one chain; returns what happened, for the log."""
        before = self.spent
        rng, rows = self.draw(self.step_done + 1)
        width = max(1, self.config.chains >> (4 * self.step_done // self.config.steps))
        self.chains = sorted(self.chains, key=lambda chain: chain[1])[:width]
        number = self.step_done % width
        present, loss = self.chains[number]
        self.spent += GRADIENT_COST * len(rows)
        ids = torch.tensor(present, device=self.device)
        gradient = one_hot_gradient(self.model, ids, rows, self.tokenizer.eos_id, self.config.after)
        proposed = neighbours(
            present, gradient, self.usable, self.form.is_allowed,
            top_k=self.config.top_k, count=self.config.candidates, rng=rng,
        )  # fmt: skip
        finalists = race(self.nats, proposed, rows, FINALISTS, present)
        accepted = False
        for prompt in self.judge_candidates(present, finalists, rows):
            judged = float(self.losses([prompt], self.judge_rows)[0])
            if accepted := judged < loss:
                self.chains[number] = (prompt, judged)
                break
        self.refused = 0 if accepted else self.refused + 1
        if self.refused >= self.config.patience and self.level < MOST_LEVELS:
            self.level, self.refused = self.level + 1, 0
        self.step_done += 1
        self.step_evaluations = self.spent - before
        prompt, loss = self.chains[number]
        return {
            "step": self.step_done,
            "chain": number,
            "judge_loss": loss,  # nats per target token, of this chain
            "accepted": accepted,
            "batch_rows": len(rows),
            "row_evaluations": self.spent,
            "text": self.form.text(prompt),
        }

    def judge_candidates(
        self, present: list[int], finalists: list[tuple[list[int], float]], rows: list[Encoded]
    ) -> list[list[int]]:
        """The prompts for the judge: the combination of the finalists, then the best one alone.

        Starting from the best finalist, the single replacements of the others are added one after
        the other, and kept if they lower the loss further.
        """
        if not finalists:
            return []
        (best, loss), joint = finalists[0], finalists[0][0]
        for prompt, _ in finalists[1:]:
            places = changed_places(prompt, present)
            if len(places) > 1 or joint[places[0]] != present[places[0]]:
                continue
            more = [*joint]
            more[places[0]] = prompt[places[0]]
            if self.form.is_allowed(more) and (lower := float(self.losses([more], rows)[0])) < loss:
                joint, loss = more, lower
        return [joint] if joint == best else [joint, best]

    def race_starts(self) -> None:
        """Turn the best of the starts into chains."""
        config, (rng, rows) = self.config, self.draw(0)
        prompts = starting_prompts(
            self.tokenizer, config.start, self.rows, self.usable.nonzero()[:, 0].tolist(),
            self.form.is_allowed, config.prompt_len, config.after, config.starts, rng,
        )  # fmt: skip
        best = race(self.nats, prompts, rows, config.chains)
        prompts = [prompt for prompt, _ in best]
        judged = self.losses(prompts, self.judge_rows)
        self.chains = [(p, float(x)) for p, x in zip(prompts, judged, strict=True)]

    # the loop ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Race the starts, unless that is done, and measure the losses that a prompt must beat."""
        if not self.has_begun():
            self.race_starts()
            self.before = self.baseline_losses()
            self.log({"step": 0} | self.before)
            how = ("without a prompt", "with the best written template")
            known = zip(self.before.values(), how, strict=False)
            self.print_above_bar("dev loss " + ", ".join(f"{x:.3f} {what}" for x, what in known))
            self.measure(1)
            self.save_state()

    def has_begun(self) -> bool:
        return bool(self.chains)

    def summary(self, window: list[dict], seconds: float) -> dict:
        return window[-1]

    def bar_text(self, entry: dict) -> str:
        return f"loss {min(loss for _, loss in self.chains):.3f}"

    def baseline_losses(self) -> dict[str, float]:
        """The dev loss without a prompt, and that of the best written template in its own frame."""
        losses = {"dev_loss_without_prompt": float(self.losses([[]], self.dev_rows)[0])}
        longest = self.model.config.n_positions + 1
        written = [
            float(self.losses([[]], rows)[0])
            for rows in self.templates.values()
            if max(len(row.ids) for row in rows) <= longest
        ]
        return losses | ({"dev_loss_template": min(written)} if written else {})

    first_steps = 1  # a step takes about as long as any other, often a minute

    def estimate(self, seconds: float) -> str:
        left, until = self.steps - self.step_done, f"step {self.steps}"
        if self.config.budget is not None:
            steps = math.ceil((self.config.budget - self.spent) / self.step_evaluations)
            left, until = min((left, until), (max(0, steps), "the end of the budget"))
        more = "; a step takes longer once the minibatch is doubled (--patience)"
        return f"about {duration(seconds * left)} to {until}, not counting evaluations{more}"

    def finished(self) -> bool:
        """Whether the steps are done or the budget is spent."""
        spent = self.config.budget is not None and self.spent >= self.config.budget
        return spent or self.step_done >= self.config.steps

    def result(self) -> dict:
        return {
            "text": self.form.text(self.best_prompt),
            "tokens": self.best_prompt,
            **self.before,
            "dev_loss": self.best,  # nats per target token, as above
            "steps": self.step_done,
            "row_evaluations": self.spent,
            "seconds": round(self.seconds, 1),
        }

    def evaluate(self) -> None:
        """Measure the best chain, and at the end all chains."""
        self.measure(len(self.chains) if self.finished() else 1)

    def measure(self, n: int) -> None:
        """Log the dev loss of the n best chains; keep the best prompt."""
        for prompt, _ in sorted(self.chains, key=lambda chain: chain[1])[:n]:
            if prompt == self.best_prompt:
                continue
            loss = float(self.losses([prompt], self.dev_rows)[0])
            better = loss < self.best
            self.measured.append((self.step_done, loss))
            self.log({"step": self.step_done, "dev_loss": loss, "tokens": prompt})
            if better:
                self.best_prompt = prompt
                self.keep()
            so_far = "the best so far" if better else f"best {self.best:.3f}"
            self.print_above_bar(f"step {self.step_done}: dev loss {loss:.3f}, {so_far}")

    # files ---------------------------------------------------------------------------------------

    def prefix(self, prompt: list[int]) -> Prefix:
        """The prompt as a prefix: its tokens' activations at positions 0 ... P - 1."""
        prefix = Prefix.from_table(token_activations(self.exact, prompt), len(prompt))
        prefix.bind(self.exact)
        prefix.linearisation = self.linearisation
        return prefix

    @property
    def kept(self) -> Path:
        return self.out / "prompt.json"

    def can_keep(self) -> bool:
        return True  # the best prompt is part of the state

    def keep(self) -> None:
        """Write prompt.json and prefix.safetensors."""
        before, after = self.form.parts(self.best_prompt)
        if not after:
            self.prefix(before).save(self.out / "prefix.safetensors")
            after = [self.tokenizer.bos_id]  # as in the frame
        found: dict[str, Any] = {"text": self.form.text(self.best_prompt)}
        found |= {"before": before, "after": after}
        found |= {"dev_loss": self.best, "linearisation": self.linearisation}
        found["base"] = fingerprint(self.exact)
        write_text(self.out / "prompt.json", json.dumps(found, indent=1) + "\n")

    state_keys = STATE
    saves_each_step = True

    def state(self) -> dict:
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict) -> None:
        check_search(state, self.config, self.model.config.vocab_size)
        for name in STATE:
            setattr(self, name, state[name])
        self.chains = [(prompt, loss) for prompt, loss in self.chains]

    def has_state(self) -> bool:
        return super().has_state() or self.older_state.exists()

    def read_state(self) -> dict:
        if super().has_state() or not self.older_state.exists():
            return super().read_state()
        return read_older(self.older_state, STATE)

    @property
    def older_state(self) -> Path:
        """The file in which older versions saved the state."""
        return self.out / "search.json"

    def settings(self) -> dict:
        """The settings, the rows and the base model."""
        rows = (*self.rows, *self.judge_rows, *self.dev_rows)
        settings = asdict(self.config) | {"data": digest(rows)}
        settings["start"] = list(settings["start"])  # as read from config.json
        return settings | {"base model": fingerprint(self.exact)}
