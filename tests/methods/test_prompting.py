"""Hard prompts: the model's input with and without examples, and the end of its answer."""

import pytest
from conftest import tiny_with_words

from minprefix.data.examples import Example
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import TEMPLATES
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.hard_prompt import HardPrompt, answer, show_examples
from minprefix.metrics.quick import score
from minprefix.prefix.prefix import Prefix

TRAIN = [Example(f"boat : Gull {n}", (f"Gull {n} floats.", "Other.")) for n in range(5)]


def test_render_puts_the_table_into_the_words():
    assert HardPrompt("Say {table}:").render("boat : Gull") == "Say boat : Gull:"
    # braces in a table are text, not places to fill
    assert HardPrompt("{table} {x}").render("a {table}") == "a {table} {x}"
    assert [template for template in TEMPLATES if "T" not in HardPrompt(template).render("T")] == []


def test_render_shows_solved_examples_first():
    prompt = HardPrompt("{table}\nText:", (("a", "A."), ("b", "B.")))
    assert prompt.render("c") == "a\nText: A.\n\nb\nText: B.\n\nc\nText:"


def test_examples_are_drawn_without_repetition():
    pairs = {(example.source, example.targets[0]) for example in TRAIN}
    drawn = show_examples("{table}", TRAIN, 3).shown
    assert len(set(drawn)) == 3 and set(drawn) <= pairs
    assert show_examples("{table}", TRAIN, 3).shown == drawn
    assert set(show_examples("{table}", TRAIN, 5).shown) == pairs
    assert show_examples("{table}", TRAIN, 0) == HardPrompt("{table}")
    for shots in (-1, 6):
        with pytest.raises(ValueError, match=rf"\[0, 5\], the training tables, got {shots}"):
            show_examples("{table}", TRAIN, shots)


@pytest.mark.parametrize(
    "written, kept",
    [
        (" A boat.\nMore.", "A boat."),
        ("\n\n A boat. \nMore.", "A boat."),
        (" A boat.", "A boat."),
        (" A boat.\r\nMore.", "A boat."),
        ("\n \n", ""),
        ("", ""),
    ],
)
def test_the_answer_ends_at_the_first_line_break(monkeypatch, written, kept):
    asked = []

    def write(model, tokenizer, prompts, **options):
        asked.append((prompts, options))
        return [written] * len(prompts)

    monkeypatch.setattr("minprefix.methods.hard_prompt.generate", write)
    assert answer(None, None, HardPrompt("{table}:"), ["a", "b"], batch_size=7) == [kept, kept]
    assert asked == [(["a:", "b:"], {"batch_size": 7})]


def test_evaluation_scores_what_each_method_writes(monkeypatch, tokenizer):
    model, calls = tiny_with_words(), []

    def write(model, tokenizer, prompts, **options):
        calls.append((prompts, options.get("prefix")))
        return [f" Gull {n} floats. \n" for n in range(len(prompts))]

    monkeypatch.setattr("minprefix.methods.hard_prompt.generate", write)
    monkeypatch.setattr("minprefix.methods.evaluate.generate", write)
    prefix = Prefix.random(model.config, 2, 0)
    examples = TRAIN[:2]
    framed = [tokenizer.encode(e.source) + [tokenizer.bos_id] for e in examples]
    in_code = [tokenizer.encode(f" {e.source} ") + [tokenizer.bos_id] for e in examples]
    methods = [
        ({}, (framed, None)),
        ({"prefix": prefix}, (framed, prefix)),
        ({"prefix": prefix, "linearisation": "original-code"}, (in_code, prefix)),
        ({"prompt": HardPrompt("{table}!")}, (["boat : Gull 0!", "boat : Gull 1!"], None)),
    ]
    expected = ["Gull 0 floats.", "Gull 1 floats."]
    for options, call in methods:
        scores, texts = evaluate_method(model, tokenizer, examples, **options)
        assert texts == expected and calls.pop() == call
        assert scores == score(expected, examples) and scores["bleu"] == pytest.approx(100)


def test_evaluation_does_not_depend_on_the_batch_size(tokenizer):
    model, config = tiny_with_words().double(), GenerationConfig(max_new_tokens=5)
    prompt = HardPrompt("{table}!", (("two", "words"),))
    for options in ({}, {"prompt": prompt}, {"prefix": Prefix.random(model.config, 2, 0).double()}):
        results = [
            evaluate_method(model, tokenizer, TRAIN, config=config, batch_size=n, **options)
            for n in (1, 3)
        ]
        assert results[0] == results[1] and any(results[0][1])
