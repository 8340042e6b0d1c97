"""One run of an experiment: train a method on a data set with one seed, generate texts, score them.

Read `Run` (the definition), then `execute` (which leads to scores.json). A run depends only on its
definition, the data and the model's weights. Its name, `Run.id`, is a digest of the definition, so
two tables that need the same run share its folder. scores.json also identifies the weights and the
data (`check_origin`), so that results from others are not mistaken for those from yours. The folder
holds the files of `training.Trainer` (or `search.PromptSearch`), and at the end

    scores.json    scores, counts, seconds: the mark of a finished run
    texts.jsonl    the text generated for each table
    failure.json   instead of both: why the run failed

Fine-tuned weights and the training state, each as large as a model, are deleted once the scores are
written; prefixes and adapters are kept.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minprefix.data.batches import encode_prompt, spread
from minprefix.data.examples import Example
from minprefix.data.load import MissingSplit, load_examples
from minprefix.data.splits import low_data, subset
from minprefix.files import read_json, write_text
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate
from minprefix.methods.adapters import Adapter
from minprefix.methods.by_name import make_tuned
from minprefix.methods.config import BaselineConfig, SearchConfig
from minprefix.methods.hard_prompt import TokenPrompt, answer
from minprefix.methods.search.search import PromptSearch
from minprefix.metrics.official import official_scores
from minprefix.metrics.quick import slot_coverage
from minprefix.models import weights
from minprefix.models.weights import fingerprint, same_model
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

SUITES = {"restaurants": "e2e"}  # official scores of data sets whose name is not a suite


# newer fields of TrainConfig, with the values for runs that are older
LATER = {"time": None, "most_steps": None, "patience": 0, "auto_batch": False}


@dataclass(frozen=True)
class Run:
    """The method and data of a run, and how it is scored."""

    data: str  # "e2e", "webnlg", "dart" or "restaurants"
    model: str  # a name for `weights.load`
    train: TrainConfig | None = None  # None: a searched prompt
    prefix: PrefixConfig | None = None  # of method "prefix"
    baseline: BaselineConfig | None = None  # of methods "ft-top" and "adapter"
    search: SearchConfig | None = None  # of a searched prompt
    size: int | None = None  # low data: training pairs, and 30 % of it dev pairs; None = all
    share: float | None = None  # share of the training pairs; the dev data is unchanged
    subset: int = 0  # the seed by which pairs are chosen for a size or share
    split: str = "test"  # the split that is scored; the sweep uses "dev"
    tables: int | None = None  # inputs of the split that are scored, evenly spread; None = all
    decoding: GenerationConfig = field(default_factory=GenerationConfig)
    batch_size: int = 64  # tables decoded at a time

    @property
    def method(self) -> str:
        return "search" if self.train is None else self.train.method

    @property
    def seed(self) -> int:
        return (self.train or self.search).seed

    @property
    def id(self) -> str:
        """A readable name, followed by a digest of all fields."""
        definition = asdict(self)
        # with the fields that existed when the committed results were made
        if self.search is not None:
            definition["search"]["behind"] = definition["search"].pop("after")
        if self.train is not None:
            trained = definition["train"]
            trained["epochs"] = trained["epochs"] or 5.0
            for name, value in LATER.items():
                if trained[name] == value:
                    del trained[name]
        decoding = definition["decoding"]
        usual = {"max_new_tokens": 100, "min_new_tokens": 0, "num_beams": 1}
        usual |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        decoding |= {name: value for name, value in usual.items() if decoding[name] is None}
        for name, value in (
            ("repetition_penalty", None),
            ("num_return_sequences", 1),
            ("stop", ()),
        ):
            if decoding[name] == value:
                del decoding[name]
        text = json.dumps(definition, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        length = "" if self.prefix is None else f"{self.prefix.prefix_len or ''}"
        few = f"-n{self.size}.{self.subset}" if self.size else ""
        return f"{self.data}-{self.method}{length}{few}-s{self.seed}-{digest}"


def data_path(data: str, data_dir: Path | None) -> str | Path:
    """The argument of `load_examples`: a folder in `data_dir`, or the name of a data set."""
    return data if data_dir is None or data == "restaurants" else data_dir / data


def why_missing(data: str, data_dir: Path | None) -> str:
    """Why a data set cannot be trained on, in one line without paths; "" if it can."""
    for split in ("train", "dev", "test"):
        try:
            load_examples(data_path(data, data_dir), split)
        except FileNotFoundError:
            return f"{data} is not available"
        except MissingSplit:
            return f"the {split} split of {data} is not available"
    return ""


def training_data(run: Run, data_dir: Path | None) -> tuple[list[Example], list[Example]]:
    """Training and dev examples of the run."""
    path = data_path(run.data, data_dir)
    train, dev = load_examples(path, "train"), load_examples(path, "dev")
    if run.size is not None:
        return low_data(train, dev, run.size, run.subset)
    if run.share is not None:
        pairs = sum(len(example.targets) for example in train)
        train = subset(train, max(1, round(run.share * pairs)), run.subset)
    return train, dev


def data_digest(data: str, data_dir: Path | None) -> str:
    """A sha256 of all examples of a data set, in hexadecimal."""
    digest = hashlib.sha256()
    for split in ("train", "dev", "test"):
        for example in load_examples(data_path(data, data_dir), split):
            digest.update(json.dumps([split, example.source, *example.targets]).encode())
    return digest.hexdigest()


def check_origin(folder: Path, record: dict, origin: dict[str, str]) -> None:
    """ValueError if a finished run has other weights or data, which older records do not name."""
    for name, now in origin.items():
        if not same_model(record.get("origin", {}).get(name, now), now):
            raise ValueError(
                f"{folder} is a finished run with other {name}: give another --runs, or remove it"
            )


def make_training(run: Run, data_dir: Path | None, folder: Path, device: str):
    """The run's `Trainer` or `PromptSearch` at step 0."""
    model, tokenizer = weights.load(run.model, device=device)
    weights.need_gpt2(model, "tables and figures")
    train, dev = training_data(run, data_dir)
    if run.train is None:
        return PromptSearch(model, tokenizer, run.search, train, dev, folder)
    tuned = make_tuned(model, tokenizer, run.train, run.prefix, run.baseline)
    return Trainer(model, tokenizer, run.train, train, dev, folder, tuned)


def trained(run: Run, folder: Path, device: str):
    """The kept model (with its adapter), tokenizer, and prefix or searched prompt (or None)."""
    tuned = run.method in ("finetune", "ft-top")
    model, tokenizer = weights.load(folder / "model" if tuned else run.model, device=device)
    if run.method == "adapter":
        Adapter.load(folder / "adapter.safetensors").to(device).attach(model)
    if run.method == "search":
        return model, tokenizer, TokenPrompt.load(folder / "prompt.json", tokenizer)
    if run.method == "prefix":
        return model, tokenizer, Prefix.load(folder / "prefix.safetensors").to(device)
    return model, tokenizer, None


def write_texts(
    run: Run, model, tokenizer, extra: Prefix | TokenPrompt | None, examples: list[Example]
) -> list[str]:
    """A text for each example; equal sources are decoded once."""
    sources = list(dict.fromkeys(example.source for example in examples))
    options = {"config": run.decoding, "batch_size": run.batch_size}
    if isinstance(extra, TokenPrompt):
        texts = answer(model, tokenizer, extra, sources, **options)
    else:
        prompts = [encode_prompt(tokenizer, source) for source in sources]
        texts = generate(model, tokenizer, prompts, prefix=extra, **options)
    found = dict(zip(sources, (text.strip() for text in texts), strict=True))
    return [found[example.source] for example in examples]


def score_texts(run: Run, texts: list[str], examples: list[Example]) -> dict[str, float]:
    """The official columns of the data set; for tables also the values found in the texts."""
    suite = SUITES.get(run.data, run.data)
    groups = [example.group for example in examples] if suite == "webnlg" else None
    references = [example.targets for example in examples]
    scores = official_scores(texts, references, suite, groups, note=lambda text: None)
    if all(example.table for example in examples):
        scores["slots %"] = slot_coverage(texts, [example.table for example in examples])
    return scores


def execute(run: Run, folder: Path, data_dir: Path | None = None, device: str = "cpu") -> dict:
    """Train (from the last state, if there is one), generate texts and score them.

    Returns:
        the contents of scores.json.
    Raises:
        Interrupted: Ctrl-C; the state is saved.
        ValueError, OSError, FloatingPointError: from loading, training and scoring.
    """
    from benchmarks.machine import machine  # in the checkout, next to the package

    machine()  # record the commit at the start, not at the end
    training = make_training(run, data_dir, folder, device)
    origin = {"weights": fingerprint(training.model), "data": data_digest(run.data, data_dir)}
    precision = "bf16" if training.bf16 else "fp32"
    search = run.train is None
    training.resume()
    result = training.run(progress=False)
    n_trained = 0 if search else sum(p.numel() for p in training.trained.parameters())
    rows, dev_rows = len(training.rows), len(training.dev_rows)
    lr = None if search else training.config.lr
    del training
    model, tokenizer, extra = trained(run, folder, device)
    n_kept = n_trained
    if isinstance(extra, Prefix):  # the table, without its MLP
        n_kept = sum(p.numel() for p in extra.parameters())
    examples = load_examples(data_path(run.data, data_dir), run.split)
    if run.tables is not None:
        examples = spread(examples, run.tables)
    began = time.perf_counter()
    texts = write_texts(run, model, tokenizer, extra, examples)
    decode_seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in read_log(folder) if "loss" in entry]
    best = result["dev_loss" if search else "best_dev_loss"]
    record = {
        "scores": score_texts(run, texts, examples),
        "origin": origin,
        "lr": lr,
        "precision": precision,
        "steps": result["steps"],
        "dev_loss": best if math.isfinite(best) else None,
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None,
        "pairs": rows,
        "dev_pairs": dev_rows,
        "tables": len(examples),
        "trained": n_trained,
        "kept": n_kept,
        "train_seconds": round(result["seconds"], 2),
        "decode_seconds": round(decode_seconds, 2),
    }
    record |= machine()
    lines = (
        json.dumps({"source": e.source, "text": t}, ensure_ascii=False) + "\n"
        for e, t in zip(examples, texts, strict=True)
    )
    write_text(folder / "texts.jsonl", "".join(lines))
    write_text(folder / "scores.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return record


def record_of(folder: Path) -> dict | None:
    """The contents of scores.json of a finished run."""
    path = folder / "scores.json"
    return read_json(path) if path.exists() else None


def failure_of(folder: Path) -> str:
    """Why the run failed; "" if it did not."""
    path = folder / "failure.json"
    return read_json(path)["reason"] if path.exists() else ""
