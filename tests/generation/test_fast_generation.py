"""Fast generation: the same tokens as the plain loops, also with static shapes; its copies."""

import pytest
import torch
from conftest import assert_close, random_ids, tiny_bart, tiny_gpt2
from test_generation import (
    BAD_WORDS,
    EOS,
    METHODS,
    TEXTS,
    Chars,
    prefer,
    ragged_bank,
    random_prompts,
)

from minprefix.generation import caches
from minprefix.generation import fast as fast_generation
from minprefix.generation.caches import RowCache
from minprefix.generation.config import GenerationConfig
from minprefix.generation.decoding import Beginning
from minprefix.generation.fast import order_without
from minprefix.generation.graphs import uses_graphs
from minprefix.generation.texts import generate, generate_ids, stream
from minprefix.methods.adapters import Adapter
from minprefix.models.cache import KVCache
from minprefix.models.weights import load
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

OPTIONS = {
    **METHODS,
    "two beams": {"num_beams": 2, "length_penalty": -0.5},
    "many beams": {"num_beams": 9, "length_penalty": 2.0},
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def captured(monkeypatch):
    """Static shapes on the CPU: what would be captured runs at each replay. Counts the captures."""
    captures = []

    def capture(run, device, pool):
        captures.append(1)
        with torch.inference_mode():
            out = run().clone()  # as the first run of a capture, it must not disturb the next

        def replay():
            return out.copy_(run())

        return replay

    monkeypatch.setattr(fast_generation, "uses_graphs", lambda device: True)
    monkeypatch.setattr(fast_generation, "capture", capture)
    monkeypatch.setattr(caches, "COLUMNS", 8)  # several buckets in a short text
    monkeypatch.setattr(fast_generation, "AHEAD", 2)
    fast_generation.KEPT.clear()
    yield captures
    fast_generation.KEPT.clear()


def test_graphs_are_the_default_on_cuda(monkeypatch):
    monkeypatch.delenv("MINPREFIX_CUDA_GRAPHS", raising=False)
    found = {device: uses_graphs(torch.device(device)) for device in ("cpu", "cuda")}
    assert found == {"cpu": False, "cuda": True}
    monkeypatch.setenv("MINPREFIX_CUDA_GRAPHS", "0")
    assert not uses_graphs(torch.device("cuda"))


def prefixes(model):
    """Arguments for 10 prompts."""
    gated = Prefix.random(model.config, 3, seed=1, gate=True).double()
    torch.nn.init.uniform_(gated.gate, 0.0, 2, torch.Generator().manual_seed(9))
    gated.gate.data[1] = 0
    virtual = Prefix.random(model.config, 3, seed=2, parametrisation="embedding").double()
    virtual.bind(model)
    infix, gated_infix = (
        Prefix.from_table(p.table(), 4, p.gate, place="infix") for p in (virtual, gated)
    )
    mixed = PrefixBank([infix, gated, gated_infix, virtual])
    return {
        "none": {},
        "prefix": {"prefix": Prefix.random(model.config, 5, seed=0).double()},
        "offset": {"prefix": Prefix.random(model.config, 2, seed=0, position_offset=7).double()},
        "gated": {"prefix": gated},
        "embedding": {"prefix": virtual},
        "infix": {"prefix": infix},
        "gated infix": {"prefix": gated_infix},
        "mixed bank": {"prefix": mixed, "prefix_index": [2, -1, 0, 3, 1, 3, 0, 2, -1, 1]},
        "bank": {"prefix": ragged_bank(model), "prefix_index": [2, -1, 0, 3, 1, 3, 0, 2, -1, 1]},
    }


def assert_equals_plain(model, prompts, bad_words_ids=(), kinds=None, **options) -> list:
    """With every kind of prefix."""
    texts = []
    for kind, prefix in prefixes(model).items():
        if kinds is None or kind in kinds:
            args = (model, prompts, GenerationConfig(**options), EOS)
            plain = generate_ids(*args, **prefix, bad_words_ids=bad_words_ids, fast=False)
            fast = generate_ids(*args, **prefix, bad_words_ids=bad_words_ids)
            assert fast == plain, kind
            texts += plain
    return texts


def fill_new_caches(monkeypatch, value: float) -> None:
    """The memory of caches then holds this before it is written."""
    made = KVCache.__init__

    def allocate(self, *args, **options):
        made(self, *args, **options)
        self.k.fill_(value)
        self.v.fill_(value)

    monkeypatch.setattr(KVCache, "__init__", allocate)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_cache_held_before_cannot_matter(method, static, request, monkeypatch):
    model, prompts = prefer(tiny_gpt2(), [EOS], 0.3), random_prompts(10)
    options, kinds = {"max_new_tokens": 8, **METHODS[method]}, ["none", "bank", "mixed bank"]
    texts = assert_equals_plain(model, prompts, kinds=kinds, **options)
    if static:
        request.getfixturevalue("captured")
    for value in (float("nan"), float("inf"), 3e38):
        fill_new_caches(monkeypatch, value)
        assert assert_equals_plain(model, prompts, kinds=kinds, **options) == texts


@pytest.mark.parametrize("method", OPTIONS)
def test_equals_plain(method):
    model, prompts = prefer(tiny_gpt2(), [EOS], 0.3), random_prompts(10)
    options = {"max_new_tokens": 14, **OPTIONS[method]}
    texts = assert_equals_plain(model, prompts, **options)
    assert len({len(text) for text in texts}) > 1  # rows end at different steps
    # forbid what was generated late in some texts, after others had ended
    words = [
        text[n : n + size]
        for text in texts
        for n, size in ((3, 2), (4, 3), (7, 3))
        if text[n + 3 :]
    ]
    others = assert_equals_plain(model, prompts, BAD_WORDS + words, min_new_tokens=4, **options)
    assert len(words) > 9 and sum(x != y for x, y in zip(texts, others, strict=True)) > 9


@pytest.mark.parametrize("method", OPTIONS)
def test_static_shapes_equal_plain(captured, method):
    """Buckets of rows and of columns, kept and reused; rows that are padding stay finite."""
    model, options = prefer(tiny_gpt2(), [EOS], 0.3), {"max_new_tokens": 14, **OPTIONS[method]}
    assert_equals_plain(model, random_prompts(10), BAD_WORDS, **options)
    captured.clear()
    for seed in (4, 5, 4):  # the same sizes: one batch is kept, with its graphs
        prompts = [[7] * 20] + random_prompts(9, seed=seed)
        assert_equals_plain(model, prompts, kinds=["prefix"], **options)
    [batch] = fast_generation.KEPT.values()
    steps = {(rows, columns) for rows, columns in batch.graphs if columns}
    assert len(captured) == len(batch.graphs) == len(steps) + 1  # and that of the prompts
    rows, columns = zip(*steps, strict=True)
    assert set(rows) <= {1, 2, 4, 8, 16}
    assert 1 < len(set(columns)) <= 7 and (len(set(rows)) > 1 or "beams" in method)
    captured.clear()
    with pytest.MonkeyPatch.context() as patch:  # too many positions: as in the first call
        patch.setattr(fast_generation, "GRAPHED", 0)
        patch.setattr(fast_generation.Decoding, "read_again", None)
        assert_equals_plain(model, prompts, kinds=["prefix"], **options)
    assert not captured


def test_kept_batch_follows_the_weights(captured):
    """Other weights or another prefix of the same sizes, in the same place or not."""
    model, prompts = prefer(tiny_gpt2(), [EOS], 0.3), random_prompts(10)
    options = {"kinds": ["prefix"], "max_new_tokens": 6}
    for _ in range(2):  # the second call also records the prompts
        before = assert_equals_plain(model, prompts, **options)
    count = len(captured)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight += 0.3
    assert assert_equals_plain(model, prompts, **options) != before
    assert len(captured) == count  # in place: the same graphs
    model.h[0].mlp.c_fc.weight.data = model.h[0].mlp.c_fc.weight.data - 0.2
    assert_equals_plain(model, prompts, **options)
    assert len(captured) > count


def test_kept_batch_follows_the_weights_of_an_adapter(captured):
    model, options = prefer(tiny_gpt2(), [EOS], 0.3), {"kinds": ["prefix"], "max_new_tokens": 6}
    adapter, prompts = Adapter.random(model.config, 4, seed=0).double(), random_prompts(4)
    adapter.bind(model)
    with adapter.attached(model):
        for _ in range(2):
            assert_equals_plain(model, prompts, **options)
        count = len(captured)
        assert_equals_plain(model, prompts, **options)
        assert len(captured) == count
        for weight in adapter.parameters():
            weight.data = weight.data + 0.3  # elsewhere in memory
        assert_equals_plain(model, prompts, **options)
        assert len(captured) > count


def test_two_streams_at_once(captured):
    """Each has a batch of its own, though they share the model."""
    model, tokenizer, options = tiny_gpt2(), Chars(), {"max_new_tokens": 12}
    prompts = [[1, 2, 3], [4, 5]]
    generate(model, tokenizer, prompts[:1], **options)  # the batch that is kept
    streams = [stream(model, tokenizer, prompt, **options) for prompt in prompts]
    texts = ["", ""]
    for _ in range(12):
        texts = [text + next(pieces) for text, pieces in zip(texts, streams, strict=True)]
    assert texts == generate(model, tokenizer, prompts, fast=False, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}], ids=str)
def test_stream_equals_plain(options):
    """Also when it ends early, and when it is dropped in between."""
    model, tokenizer = prefer(tiny_gpt2(), [EOS], 0.3), Chars()
    for prompt in random_prompts(6):
        pieces = {
            fast: list(stream(model, tokenizer, prompt, max_new_tokens=20, fast=fast, **options))
            for fast in (True, False)
        }
        assert pieces[True] == pieces[False]
    pieces = stream(model, tokenizer, [1, 2], max_new_tokens=20)
    assert next(pieces)
    pieces.close()


@pytest.mark.parametrize("num_beams", [1, 5])
def test_mini_in_fp32(num_beams):
    """Equal up to near-ties: where texts part, the plain loop's best two logits are close."""
    model, tokenizer = load("mini")
    prefix = Prefix.from_words(model, tokenizer, "table-to-text:")
    prompts = [tokenizer.encode(text) for text in TEXTS[::2][:20]]
    config = GenerationConfig(max_new_tokens=12, num_beams=num_beams)
    args = (model, prompts, config, tokenizer.eos_id)
    fast, plain = (generate_ids(*args, prefix=prefix, fast=fast) for fast in (True, False))
    parted = [b for b in range(len(prompts)) if fast[b] != plain[b]]
    assert len(parted) <= 1
    for b in parted if num_beams == 1 else []:
        n = next(n for n, (x, y) in enumerate(zip(fast[b], plain[b], strict=False)) if x != y)
        with torch.no_grad():
            logits = model(torch.tensor([prompts[b] + plain[b][:n]]), prefix=prefix)[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second < 1e-3  # rounding of the logits: about 1e-5


def test_order_without():
    assert order_without([False, True, False, True, False]) == [0, 4, 2]
    assert order_without([True, True]) == []
    assert order_without([False] * 3) == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 30):
        ended = (torch.rand(n, generator=generator) < 0.4).tolist()
        order = order_without(ended)
        assert sorted(order) == [row for row in range(n) if not ended[row]]
        assert [row for i, row in enumerate(order) if row < len(order) and row != i] == []


@pytest.mark.parametrize("num_beams", [1, 5])
def test_caches_stay_where_they_are(monkeypatch, num_beams):
    """They are allocated once; only rows that take the place of ended ones are copied."""
    moved, sizes, addresses = [], [], set()
    move, attend = RowCache.move, RowCache.attend

    def counted_move(self, to, source):
        moved.append(len(to))
        move(self, to, source)

    def noted_attend(self, *args):
        addresses.add((type(self), self.k.data_ptr(), self.v.data_ptr()))
        sizes.append(self.k.shape)
        return attend(self, *args)

    monkeypatch.setattr(RowCache, "move", counted_move)
    monkeypatch.setattr(RowCache, "attend", noted_attend)
    model, prompts = prefer(tiny_gpt2(), [EOS], 0.3), random_prompts(16)
    config = GenerationConfig(max_new_tokens=20, num_beams=num_beams)
    new = generate_ids(model, prompts, config, EOS)
    assert sum(len(tokens) < 20 for tokens in new) > 2
    assert len(addresses) == 1
    longest = max(map(len, prompts))
    # (L, B, H, S, D): the prompts once, a slot for each token of each beam
    assert set(map(tuple, sizes)) == {(3, 16, 4, longest + 20 * num_beams, 8)}
    assert 0 < sum(moved) <= 16  # each row at most once


def taken(model, prompts, config, acts):
    """A batch that has read the prompts."""
    beginning = Beginning(prompts)
    batch = fast_generation.take_batch(
        model, beginning, config.for_model(model), (EOS,), acts, bad_words_ids=[]
    )
    batch.read(model, beginning, acts, seeds=[0] * len(prompts))
    return batch


@pytest.mark.parametrize("gate", [False, True])
def test_beams_see_their_ancestors(gate):
    """A step's logits are those of each beam's text read from its beginning."""
    model, prompts, K = tiny_gpt2(), random_prompts(4), 3
    prefix = Prefix.random(model.config, 5, seed=0, gate=gate).double()
    if gate:
        torch.nn.init.uniform_(prefix.gate, 0.0, 2, torch.Generator().manual_seed(9))
    config = GenerationConfig(max_new_tokens=6, num_beams=K)
    acts = prefix.activations()
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        batch = taken(model, prompts, config, acts)
        batch.cache.seen[:, :, batch.cache.prompt_len :] = False  # what was chosen is not taken
        texts = [[tokens] for tokens in prompts]
        for step in range(5):
            parents = torch.randint(len(texts[0]), (4, K), generator=generator)
            tokens = random_ids(model, 4, K, seed=step)
            batch.cache.follow(parents)
            batch.choice.ids.copy_(tokens)
            logits = batch.logits(model)  # (4, K, V)
            batch.cache.count()
            texts = [
                [texts[b][parents[b, i]] + [tokens[b, i].item()] for i in range(K)]
                for b in range(4)
            ]
            for b in range(4):
                exact = model(torch.tensor(texts[b]), prefix=prefix)[:, -1]
                # merged from two parts in fp64: another order of summation; worst seen: 1.2e-15
                assert_close(logits[b], exact, 1e-13, f"step {step}, prompt {b}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*OPTIONS, "BART", "BART, two beams"])
def test_graphs_equal_eager_steps(method, dtype, monkeypatch):
    """fp64: the plain loop's tokens. Else: the tokens of the same steps without capture."""
    bart, method = method.startswith("BART"), method.removeprefix("BART, ")
    model = tiny_bart(n_embd=64) if bart else prefer(tiny_gpt2(n_embd=64), [EOS], 0.3)
    model = model.to("cuda", dtype)
    prefix = (BARTPrefix if bart else Prefix).random(model.config, 5, seed=0).to("cuda", dtype)
    config = GenerationConfig(max_new_tokens=14, **OPTIONS.get(method, {}))
    args = (model, random_prompts(10), config, EOS)
    graphs = [generate_ids(*args, prefix=prefix, bad_words_ids=BAD_WORDS) for _ in range(2)]
    assert graphs[0] == graphs[1]
    if dtype == torch.float64:
        plain = generate_ids(*args, prefix=prefix, bad_words_ids=BAD_WORDS, fast=False)
    else:
        fast_generation.KEPT.clear()
        monkeypatch.setattr(fast_generation, "capture", lambda run, device, pool: run)
        plain = generate_ids(*args, prefix=prefix, bad_words_ids=BAD_WORDS)
    assert graphs[0] == plain


@pytest.mark.gpu
@needs_gpu
def test_steps_do_not_wait():
    """One replay a step: no operation of a captured step synchronises."""
    model = tiny_gpt2(dtype=torch.float32, n_embd=64).cuda()
    prefix = Prefix.random(model.config, 5, seed=0).cuda()
    acts, prompts = prefix.activations(), random_prompts(4)
    config = GenerationConfig(max_new_tokens=14)
    with torch.inference_mode():
        batch = taken(model, prompts, config, acts)
        batch.step(model)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                batch.step(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(batch.graphs) == 1
