"""The search for a prompt: planted optima, resuming, the kept files."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import another_model, byte_model, byte_tokenizer, pairs, small_model
from test_prompt_scores import plain_nats, rows_of
from torch.nn.functional import cross_entropy

from minprefix.data.batches import encode_examples, encode_prompt
from minprefix.data.examples import Example
from minprefix.generation.texts import generate
from minprefix.methods.config import SearchConfig
from minprefix.methods.hard_prompt import HardPrompt, TokenPrompt, answer
from minprefix.methods.search.moves import race, starting_prompts
from minprefix.methods.search.scores import prompt_nats, target_tokens
from minprefix.methods.search.search import PromptSearch
from minprefix.models.weights import fingerprint
from minprefix.prefix.prefix import Prefix
from minprefix.training.run_folder import earlier_path, read_state, state_path

SHORT = {"candidates": 8, "batch_size": 4, "judge_rows": 4, "starts": 6, "eval_every": 2}


@pytest.mark.slow
@pytest.mark.parametrize("prompt_len, rank", [(1, 1), (2, 16)])
def test_the_search_comes_to_the_best_of_all_prompts(tmp_path, prompt_len, rank):
    """Brute force over all printable prompts of bytes; `rank`: the place accepted, 1 = the best."""
    model, tokenizer = byte_model(), byte_tokenizer()
    examples = [Example(f"{word}", (f"{word} ok",)) for word in ("one", "two", "six", "ten")]
    config = SearchConfig(
        prompt_len=prompt_len, steps=24, candidates=48, top_k=48, batch_size=4, judge_rows=2,
        chains=2, starts=8, printable=True, eval_every=1,
    )  # fmt: skip
    # the same rows for all purposes: then the optimum is one and the same
    search = PromptSearch(model, tokenizer, config, examples * 2, examples, tmp_path)
    search.rows = search.judge_rows = search.dev_rows
    found = search.run(progress=False)
    usable = search.usable.nonzero()[:, 0].tolist()
    assert len(usable) == 96  # printable ASCII and the line break
    everything = list(itertools.product(usable, repeat=prompt_len))
    nats = prompt_nats(model, torch.tensor(everything), search.dev_rows, 256)
    losses = (nats / target_tokens(search.dev_rows)).sort().values
    better = int((losses < found["dev_loss"] * (1 - 1e-12)).sum())
    assert found["dev_loss"] == pytest.approx(losses[better].item(), rel=1e-12)
    assert better < rank
    # by far not all were tried
    assert prompt_len == 1 or search.spent < 0.3 * len(everything) * len(search.dev_rows)


def made(tokenizer, out, *, model=None, train=None, dev=3, **config) -> PromptSearch:
    """A short search on `pairs`."""
    model = model or small_model(torch.float64)
    settings = SearchConfig(**{"prompt_len": 4, "steps": 6, **SHORT, **config})
    dev_pairs = pairs(dev, 50) if dev else []
    return PromptSearch(model, tokenizer, settings, train or pairs(12), dev_pairs, out)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state_of(folder) -> dict:
    state = read_state(folder, keys=PromptSearch.state_keys)
    return {name: value for name, value in state.items() if name != "seconds"}


def files_of(folder) -> dict:
    """What a run keeps, without the time that it took."""
    log = [{**entry, "seconds": 0} for entry in log_of(folder)]
    names = [name for name in ("prompt.json", "prefix.safetensors") if (folder / name).exists()]
    return {"log.jsonl": log} | {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
def test_a_resumed_search_is_the_unbroken_one(tokenizer, tmp_path, after, monkeypatch):
    options = {"after": after, "patience": 1, "chains": 2}
    whole = made(tokenizer, tmp_path / "whole", **options)
    result = whole.run(progress=False)
    for last in (0, 3, 5):  # steps that were done when it was killed, in the middle of the next
        folder, step = tmp_path / f"cut{last}", PromptSearch.step

        def killed(self, last=last, step=step):
            entry = step(self)
            if self.step_done > last:
                (self.out / "log.jsonl").open("a").write('{"step": 99, "torn')
                raise KeyboardInterrupt
            return entry

        monkeypatch.setattr(PromptSearch, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            made(tokenizer, folder, **options).run(progress=False)
        monkeypatch.setattr(PromptSearch, "step", step)
        again = made(tokenizer, folder, **options)
        again.load_state()
        assert again.step_done == last
        found = again.run(progress=False)
        assert {**found, "seconds": 0} == {**result, "seconds": 0}
        assert files_of(folder) == files_of(tmp_path / "whole")
        assert state_of(folder) == state_of(tmp_path / "whole")


def test_the_loss_falls_and_the_log_tells_what_was_spent(tokenizer, tmp_path, monkeypatch):
    counted = []

    def counting(model, prompts, rows, *rest):
        counted.append(len(prompts) * len(rows))
        return prompt_nats(model, prompts, rows, *rest)

    monkeypatch.setattr("minprefix.methods.search.search.prompt_nats", counting)
    found = made(tokenizer, tmp_path, steps=8).run(progress=False)
    log = log_of(tmp_path)
    assert found["dev_loss"] == min(entry["dev_loss"] for entry in log if "dev_loss" in entry)
    first = next(entry for entry in log if "dev_loss" in entry)
    assert (
        found["dev_loss"] < first["dev_loss"]
        and found["dev_loss"] < log[0]["dev_loss_without_prompt"]
    )
    steps = [entry for entry in log if "accepted" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    gradients = sum(2 * entry["batch_rows"] for entry in steps)
    assert found["row_evaluations"] == sum(counted) + gradients
    judged = {}
    for entry in steps:  # a chain never becomes worse, and changes only if accepted
        if entry["chain"] in judged and len({e["chain"] for e in steps}) == 1:
            before = judged[entry["chain"]]
            assert (entry["judge_loss"] < before) == entry["accepted"]
        judged[entry["chain"]] = entry["judge_loss"]


def test_the_budget_ends_the_search(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=1000, budget=900)
    found = search.run(progress=False)
    assert 900 <= found["row_evaluations"] < 1500 and 0 < found["steps"] < 20
    again = made(tokenizer, tmp_path, steps=1000, budget=900)
    again.load_state()
    assert again.run(progress=False) == found


def test_the_last_step_evaluates_every_chain(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=1, chains=3, eval_every=9)
    search.run(progress=False)
    seen = {tuple(entry["tokens"]) for entry in log_of(tmp_path) if "dev_loss" in entry}
    assert {tuple(prompt) for prompt, _ in search.chains} <= seen


def test_only_what_wins_with_the_judge_is_accepted(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path)
    search.race_starts()
    search.chains = [(prompt, 0.0) for prompt, _ in search.chains]  # nothing is better
    prompts = [list(prompt) for prompt, _ in search.chains]
    for _ in range(2 * search.config.patience):
        assert search.step()["accepted"] is False
    assert [prompt for prompt, _ in search.chains if prompt not in prompts] == []
    assert search.level == 2  # and the minibatch grew
    assert len(search.draw(99)[1]) == min(len(search.rows), 4 * 4)
    judged = {tuple(row.ids) for row in search.judge_rows}
    assert not judged & {tuple(row.ids) for row in search.rows}


# what is kept ----------------------------------------------------------------------------------


def test_the_kept_prefix_is_the_tokens_in_front(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=2)
    found = search.run(progress=False)
    model, prefix = search.exact, search.prefix(found["tokens"])
    ids = torch.tensor([encode_prompt(tokenizer, "place : amber")])
    plain = model(torch.cat([torch.tensor([found["tokens"]]), ids], 1))[:, 4:]
    assert (model(ids, prefix=prefix) - plain).abs().max() < 1e-12 * max(1, plain.abs().max())
    kept = Prefix.load(tmp_path / "prefix.safetensors")  # in fp32
    assert torch.equal(kept.prefix_table, prefix.prefix_table.float())
    assert (kept.position_offset, kept.linearisation, kept.base) == (4, "paper", prefix.base)
    prompts = [encode_prompt(tokenizer, example.source) for example in pairs(3)]
    written = [
        generate(model, tokenizer, texts, prefix=used, max_new_tokens=6)
        for texts, used in ((prompts, prefix), ([found["tokens"] + p for p in prompts], None))
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("after", [0, 2])
def test_prompt_json_gives_the_tokens_around_a_table(tokenizer, tmp_path, after):
    found = made(tokenizer, tmp_path, steps=1, after=after).run(progress=False)
    prompt, tokens = TokenPrompt.load(tmp_path / "prompt.json", tokenizer), found["tokens"]
    middle = tokenizer.encode("boat : Gull")
    if after:
        assert prompt.render("boat : Gull") == tokens[:2] + middle + tokens[2:]
        assert not (tmp_path / "prefix.safetensors").exists()
    else:
        assert prompt.render("boat : Gull") == tokens + middle + [tokenizer.bos_id]


@pytest.mark.parametrize("after", [0, 2])
def test_prompt_json_keeps_the_frame_of_the_search(tokenizer, tmp_path, after):
    config = SearchConfig(prompt_len=4, steps=1, after=after, **SHORT)
    model, frame = small_model(torch.float64), "original-code"
    search = PromptSearch(model, tokenizer, config, pairs(12), pairs(2), tmp_path, frame)
    found = search.run(progress=False)["tokens"]
    prompt = TokenPrompt.load(tmp_path / "prompt.json", tokenizer)
    example = pairs(1)[0]
    (row,) = encode_examples(tokenizer, [example], frame)
    nats = plain_nats(model, found, [row], after)
    asked, target = prompt.render(example.source), row.ids[row.prompt_len :]
    logits = model(torch.tensor([asked + target[:-1]]))[0, len(asked) - 1 :]
    written = cross_entropy(logits, torch.tensor(target), reduction="sum").item()
    assert written == pytest.approx(nats, rel=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prompt_json_belongs_to_the_model_of_the_search(tokenizer, tmp_path, precision):
    config = SearchConfig(prompt_len=4, steps=1, after=2, precision=precision, **SHORT)
    model, path = small_model(), tmp_path / "prompt.json"
    PromptSearch(model, tokenizer, config, pairs(12), [], tmp_path).run(progress=False)
    sources, few = [pairs(1)[0].source], {"max_new_tokens": 2}
    texts = answer(model, tokenizer, TokenPrompt.load(path, tokenizer), sources, **few)
    with pytest.raises(ValueError, match="this prompt was made for another model: its base is"):
        answer(another_model(), tokenizer, TokenPrompt.load(path, tokenizer), sources, **few)
    found = json.loads(path.read_text())
    assert found.pop("base") == fingerprint(model)
    path.write_text(json.dumps(found))  # as older searches left it: for any model
    prompt = TokenPrompt.load(path, tokenizer)
    assert answer(model, tokenizer, prompt, sources, **few) == texts
    assert answer(another_model(), tokenizer, prompt, sources, **few) is not None


@pytest.mark.parametrize("after", [0, 2])
def test_a_printable_prompt_can_be_typed(tokenizer, tmp_path, after):
    search = made(tokenizer, tmp_path, printable=True, after=after, prompt_len=5)
    found = search.run(progress=False)
    assert found["text"].replace("\n", "").isprintable()
    if after:
        source = pairs(12)[0].source
        typed = tokenizer.encode(HardPrompt(found["text"]).render(source))
        assert typed == TokenPrompt.load(tmp_path / "prompt.json", tokenizer).render(source)
    else:
        assert tokenizer.encode(found["text"]) == found["tokens"]
        typed = Prefix.from_prompt(search.exact, tokenizer, found["text"])
        assert torch.equal(typed.table(), search.prefix(found["tokens"]).table())


def test_what_cannot_be_typed_is_not_allowed(tokenizer, tmp_path):
    letters = [tokenizer.encode(letter)[0] for letter in "the"]  # typed, these are one token
    words = tokenizer.encode("Say the")
    front = made(tokenizer, tmp_path, printable=True, prompt_len=3)
    assert not front.form.is_allowed(letters) and front.form.is_allowed(words)
    assert made(tokenizer, tmp_path, prompt_len=3).form.is_allowed(letters)
    around = made(tokenizer, tmp_path, printable=True, prompt_len=3, after=1)
    colon = tokenizer.encode(":")[0]
    assert around.form.is_allowed([*words[:2], colon])
    alone = front.usable.nonzero()[:, 0].tolist()  # can be typed, but here joins "place"
    joins = next(v for v in alone if len(tokenizer.encode(tokenizer.decode([v]) + "place")) == 1)
    assert front.form.is_allowed([*words[:2], joins]) and not around.form.is_allowed(
        [words[0], joins, colon]
    )
    assert not front.usable[tokenizer.bos_id]
    assert [v for v in alone if "\ufffd" in tokenizer.decode([v])] == []


def test_a_worse_prompt_does_not_replace_the_best(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=1)
    search.run(progress=False)
    kept = files_of(tmp_path)
    search.measured = [(0, 0.0)]
    search.chains = [([5, 6, 7, 8], 0.0)]
    search.measure(1)
    now = files_of(tmp_path)
    assert now.pop("log.jsonl") != kept.pop("log.jsonl") and now == kept
    assert search.best == 0.0 and search.best_prompt != [5, 6, 7, 8]


def test_starts_hold_the_written_instructions(tokenizer):
    rows, rng = rows_of(tokenizer), np.random.default_rng(0)
    for A in (0, 3):
        starts = starting_prompts(
            tokenizer, ["One two {table} three four."], rows, range(8192), lambda p: True, 9, A,
            40, rng,
        )  # fmt: skip
        assert len(starts) == 40 == len(set(map(tuple, starts)))
        assert {len(prompt) for prompt in starts} == {9}
        first = tokenizer.encode("One two ")
        assert starts[0][: len(first)] == first
        after = tokenizer.encode(" three four.")
        assert A == 0 or starts[0][-3:] == after[-3:]


def test_a_race_ends_with_the_best(tokenizer):
    rows = rows_of(tokenizer, 5) * 4
    worth, spent = {i: abs(i - 37) for i in range(64)}, []

    def nats_of(prompts, some):
        spent.append(len(prompts) * len(some))
        return np.array([float(worth[p[0]] * len(some)) for p in prompts])

    prompts = [[i] for i in range(64)]
    best = race(nats_of, prompts, rows, 3)
    assert [p for p, _ in best] == [[37], [36], [38]]
    assert best[1][1] == pytest.approx(20 / target_tokens(rows))
    assert sum(spent) == 64 * 1 + 16 * 4 + 4 * 15  # of 20 rows: 1, then 5, then all
    assert race(nats_of, prompts, rows, 3, present=[37]) == []
    better = race(nats_of, prompts, rows, 3, present=[38])
    assert [p for p, _ in better] == [[37]]
    assert race(nats_of, [], rows, 3) == []


# errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"prompt_len": 0}, "prompt_len must be at least 1, got 0"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"after": 11}, r"after must lie in \[0, 10\], got 11"),
        ({"seed": -1}, "seed must be >= 0 and finite, got -1"),
        ({"chains": 9, "starts": 8}, "chains 9 must not be more than starts 8"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
    ],
)
def test_impossible_settings_are_named(options, expected):
    with pytest.raises(ValueError, match=expected):
        SearchConfig(**options)


def test_impossible_searches_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="leaves no room for a text in 128 positions"):
        made(tokenizer, tmp_path, prompt_len=128)
    with pytest.raises(ValueError, match="tokens .*, at most 9 are allowed"):
        made(tokenizer, tmp_path, prompt_len=120)
    with pytest.raises(ValueError, match="at least two training pairs, got 1"):
        made(tokenizer, tmp_path, train=pairs(1))
    with pytest.raises(ValueError, match="start must be a text, got an empty one"):
        made(tokenizer, tmp_path, start=("",))
    search = made(tokenizer, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="no saved state in this run folder"):
        search.load_state()
    search.run(progress=False)
    with pytest.raises(ValueError, match="holds a run"):
        made(tokenizer, tmp_path / "run", steps=1).run(progress=False)
    with pytest.raises(ValueError, match="the saved run differs in data, steps"):
        made(tokenizer, tmp_path / "run", steps=2, dev=2).load_state()
    for path in (state_path(tmp_path / "run"), earlier_path(tmp_path / "run")):
        path.write_text('{"step_done": 1}')
    with pytest.raises(ValueError, match=r"state\.pt: damaged, or not a training state"):
        made(tokenizer, tmp_path / "run", steps=1).load_state()
    (tmp_path / "run" / "prompt.json").write_text('{"before": [1], "after": "x"}')
    with pytest.raises(ValueError, match="not a prompt of the command search"):
        TokenPrompt.load(tmp_path / "run" / "prompt.json", tokenizer)
    found = {"before": [1], "after": [8192], "linearisation": "paper"}
    for change, expected in (
        ({}, "token id 8192 is not in"),
        ({"linearisation": 1}, "must be one"),
        ({"base": 1}, "base 1 is not a fingerprint"),
    ):
        (tmp_path / "run" / "prompt.json").write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=f"prompt.json: .*{expected}"):
            TokenPrompt.load(tmp_path / "run" / "prompt.json", tokenizer)


def test_without_dev_data_the_judge_chooses(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=3, dev=0)
    found = search.run(progress=False)
    assert search.dev_rows == search.judge_rows and "dev_loss_template" not in found
