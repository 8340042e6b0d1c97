"""A valid file of each kind and its reader, for the mutations of `mutations.py`.

Everything is tiny: a model of two layers and 8 features, whose tokenizer has 300 tokens.
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minprefix.cli.main import main
from minprefix.cli.runs import read_run, rows_of
from minprefix.cli.train import make_trainer, read_settings
from minprefix.data.articles import ARCHIVE, SPLIT_IDS, convert_xsum
from minprefix.data.download import read_sums
from minprefix.data.load import load_examples
from minprefix.methods.adapters import Adapter
from minprefix.methods.hard_prompt import TokenPrompt
from minprefix.models import weights
from minprefix.models.bart import BART
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import BYTE_CHARS, Tokenizer
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.foreign import read_adapters, read_authors, rows_of_table
from minprefix.prefix.peft import read_peft, write_peft
from minprefix.prefix.prefix import Prefix
from minprefix.training.corpus import load_corpus
from minprefix.training.run_folder import earlier_path, read_log, state_path, truncate_log
from tests.fuzz.mutations import other_state, other_tensors

WORDS = "the boat is green and the small harbour has nineteen boats, Eagle 7 éü among them"
ROW = {"table": {"boat": "Gull 7", "colour": ["green", "blue"]}, "text": f"Gull: {WORDS}."}


@dataclass
class Valid:
    """A file (or its folder), and a function that reads it.

    Attributes:
        has_checksum: whether it has a checksum, so that no change may go undetected.
        change: damage to use instead of `mutations.mutated`; it updates the checksum.
    """

    path: Path
    read: Callable[[], Any]
    has_checksum: bool = False
    change: Callable[[Path, random.Random], None] | None = None


def command(*argv: object) -> tuple[int, str]:
    """Run a command line in this process: its exit code and what it wrote to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, err.getvalue()


def quietly(*argv: object) -> None:
    """Run a command line that works."""
    code, err = command(*argv)
    assert code == 0, err


def make_models(folder: Path) -> tuple[GPT2, Tokenizer]:
    """The folders gpt2, gpt2-bin (a pickle, and the tokenizer in one file) and bart."""
    tokenizer = Tokenizer.train([WORDS * 9], 300)
    size, last = tokenizer.vocab_size, tokenizer.eos_id
    config = GPT2Config(
        vocab_size=size, n_positions=96, n_embd=8, n_layer=2, n_head=2, bos_token_id=last,
        eos_token_id=last,
    )  # fmt: skip
    model = GPT2(config).init_weights(0).eval()
    weights.save_model(model, tokenizer, folder / "gpt2")
    (folder / "gpt2" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [last], "num_beams": 1, "bad_words_ids": [[3, 4]]})
    )
    pickled = Path(shutil.copytree(folder / "gpt2", folder / "gpt2-bin"))
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    vocab, merges = (pickled / "vocab.json").read_text(), (pickled / "merges.txt").read_text()
    pairs = [line.split() for line in merges.splitlines()[1:]]
    added = [{"id": last, "content": "<|endoftext|>", "special": True}]
    bpe = {"type": "BPE", "vocab": json.loads(vocab), "merges": pairs}
    before = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    (pickled / "tokenizer.json").write_text(
        json.dumps({"added_tokens": added, "pre_tokenizer": before, "model": bpe})
    )
    names = ["<s>", "<pad>", "</s>", "<unk>", *BYTE_CHARS]
    bart_tokens = Tokenizer({token: n for n, token in enumerate(names)}, [], "bart")
    sizes: dict = {"n_encoder_layer": 1, "n_layer": 1, "n_head": 2, "n_inner": 8, "n_embd": 8}
    bart = BART(BARTConfig(vocab_size=260, n_positions=48, **sizes)).init_weights(0).eval()
    weights.save_model(bart, bart_tokens, folder / "bart")
    prefix = BARTPrefix.random(bart.config, 2, 0)
    prefix.save(folder / "bart" / "prefix.safetensors")
    return model, tokenizer


def make_foreign(folder: Path, model: GPT2) -> None:
    """Folders as PEFT, adapter-hub and the authors' code write them."""
    prefix = Prefix.random(model.config, 3, 0)
    write_peft(folder / "peft", prefix)
    rows = rows_of_table(prefix.table().detach()).contiguous()
    for name in ("peft-bin", "authors", "hub"):
        (folder / name).mkdir()
    shutil.copy(folder / "peft" / "adapter_config.json", folder / "peft-bin")
    torch.save({"prompt_embeddings": rows}, folder / "peft-bin" / "adapter_model.bin")
    shutil.copy(folder / "gpt2" / "config.json", folder / "authors")
    width = rows.shape[1]
    state = {"wte.weight": torch.ones(3, 8), "control_trans.0.weight": torch.ones(4, 8),
             "control_trans.0.bias": torch.ones(4), "control_trans.2.weight": torch.ones(width, 4),
             "control_trans.2.bias": torch.ones(width)}  # fmt: skip
    torch.save(state, folder / "authors" / "pytorch_model.bin")
    own = {"architecture": "prefix_tuning", "prefix_length": 3, "non_linearity": "tanh"}
    (folder / "hub" / "adapter_config.json").write_text(
        json.dumps({"model_type": "gpt2", "config": own})
    )
    key = "transformer.h.0.attn.prefix_tuning.pool.prefix_tunings.b.self_prefix.control_trans"
    torch.save({key: rows.flatten()}, folder / "hub" / "pytorch_adapter.bin")


def make_data(folder: Path) -> dict[str, str | bytes]:
    """The contents of data files by name; parquet files are written to the folder."""
    triple = {"subject": "Spain", "property": "capital", "object": "Madrid"}
    lex = {"lex": "Madrid is it.", "comment": "good", "lang": "en"}
    entry = {"modifiedtripleset": [triple], "lexicalisations": [lex], "category": "City"}
    dart = {"tripleset": [["Spain", "CAPITAL", "Madrid"]], "annotations": [{"text": "It is."}]}
    xml = (
        '<benchmark><entries><entry category="City" eid="1"><modifiedtripleset><mtriple>Spain | '
        'capital | Madrid</mtriple></modifiedtripleset><lex comment="good">It is.</lex></entry>'
        "</entries></benchmark>"
    )
    files: dict[str, str | bytes] = {
        "rows.jsonl": "".join(json.dumps(ROW | {"text": f"{WORDS} {n}"}) + "\n" for n in range(6)),
        "rows.json": json.dumps([ROW, {"table": {"a": 1}, "text": None}]),
        "webnlg.json": json.dumps({"entries": [{"1": entry}]}),
        "dart.json": json.dumps([dart]),
        "e2e.csv": 'mr,ref\n"name[The Eagle], eatType[pub]","The Eagle, a ""pub""."\n',
        "webnlg.xml": xml,
        "pairs.txt": "name : X||X is it.\nname : Y||Y is.\n",
        "news.source": "one\ntwo\n",
        "news.target": "A.\nB.\n",
    }
    (folder / "data").mkdir()
    for name, text in files.items():
        (folder / "data" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"document": ["one", "two"], "summary": ["A.", "B."]})
    pyarrow.parquet.write_table(rows, folder / "data" / "rows.parquet")
    return files


def make_texts(folder: Path) -> dict[str, Path]:
    """Folders of text to pretrain on, each with one file."""
    ids = io.BytesIO()
    np.save(ids, np.arange(40, dtype=np.uint16) % 200)
    text = f"{WORDS}<|endoftext|>{WORDS}".encode()
    made = {"a.txt": text, "a.txt.gz": gzip.compress(text), "a.txt.xz": lzma.compress(text),
            "a.npy": ids.getvalue(), "a.npy.xz": lzma.compress(ids.getvalue())}  # fmt: skip
    for name, data in made.items():
        (folder / f"text-{name}").mkdir()
        (folder / f"text-{name}" / name).write_bytes(data)
    return {name: folder / f"text-{name}" for name in made}


def make_xsum(folder: Path) -> Path:
    """The authors' archive of one article, and their splits."""
    (folder / "xsum").mkdir()
    text = b"[SN]URL[SN]\nhttp://x\n[SN]FIRST-SENTENCE[SN]\nA.\n[SN]RESTBODY[SN]\nB.\n"
    with tarfile.open(folder / "xsum" / ARCHIVE, "w:gz") as tar:
        member = tarfile.TarInfo("bbc/1.summary")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    ids = {"train": ["1"], "validation": ["1"], "test": ["1"]}
    (folder / "xsum" / SPLIT_IDS).write_text(json.dumps(ids))
    return folder / "xsum"


def resumed(run: Path) -> None:
    """Load the state of a run as `train --resume` does."""
    trainer, _ = make_trainer(read_settings(run), run)
    trainer.load_state()


def read_run_log(run: Path) -> None:
    truncate_log(run, 1)
    read_log(run)
    rows_of({run: read_run(run)})


def make(folder: Path) -> dict[str, Valid]:
    """Make all files in a folder, which becomes the working directory."""
    os.chdir(folder)
    model, tokenizer = make_models(folder)
    make_foreign(folder, model)
    data, texts, xsum = make_data(folder), make_texts(folder), make_xsum(folder)
    for name, method in (("run", "prefix"), ("adapted", "adapter")):
        more = ("--mid-dim", 4) if method == "prefix" else ("--bottleneck", 2)
        quietly("train", "--model", folder / "gpt2", "--data", "data/rows.jsonl", "--out", name,
                "--steps", 2, "--eval-every", 1, "--batch-size", 2, "--samples", 0, "--device",
                "cpu", "--method", method, *more)  # fmt: skip
    earlier_path(folder / "run").unlink()  # a damaged state would be replaced by it
    prompt = {"before": [1, 2], "after": [3], "linearisation": "paper", "base": ""}
    (folder / "prompt.json").write_text(json.dumps(prompt))
    (folder / "SHA256SUMS").write_text(f"{64 * '0'}  a.txt\n")
    run, config = folder / "run", model.config

    def load(name: str) -> Callable[[], Any]:
        return partial(weights.load, str(folder / name))

    kept = {"prefix": run, "bart prefix": folder / "bart", "adapter": folder / "adapted"}
    found = {}
    for kind, place in kept.items():
        reader: Any = Adapter if kind == "adapter" else Prefix
        path = place / f"{kind.split()[-1]}.safetensors"
        found[kind] = Valid(path, partial(reader.load, path), has_checksum=True)
    found |= {
        "state": Valid(state_path(run), partial(resumed, run), has_checksum=True),
        "weights": Valid(folder / "gpt2" / "model.safetensors", load("gpt2"), has_checksum=True),
        "bart weights": Valid(
            folder / "bart" / "model.safetensors", load("bart"), has_checksum=True
        ),
        "pickle": Valid(folder / "gpt2-bin" / "pytorch_model.bin", load("gpt2-bin")),
        "log": Valid(run / "log.jsonl", partial(read_run_log, run)),
        "settings": Valid(run / "config.json", partial(resumed, run)),
        "prompt": Valid(
            folder / "prompt.json", partial(TokenPrompt.load, folder / "prompt.json", tokenizer)
        ),
        "sums": Valid(folder / "SHA256SUMS", partial(read_sums, folder / "SHA256SUMS")),
        "authors": Valid(
            folder / "authors" / "pytorch_model.bin", partial(read_authors, folder / "authors")
        ),
    }
    checkpoints = {
        "gpt2": ("config.json", "generation_config.json", "vocab.json", "merges.txt"),
        "bart": ("config.json", "vocab.json"),
        "gpt2-bin": ("tokenizer.json",),
    }
    for place, names in checkpoints.items():
        for name in names:
            found[f"{place} {name}"] = Valid(folder / place / name, load(place))
    for path, name in (("peft", "adapter_config.json"), ("peft", "adapter_model.safetensors"),
                       ("peft-bin", "adapter_model.bin")):  # fmt: skip
        found[f"{path} {name}"] = Valid(folder / path / name, partial(read_peft, folder / path))
    for name in ("adapter_config.json", "pytorch_adapter.bin"):
        read = partial(read_adapters, folder / "hub", config)
        found[f"hub {name}"] = Valid(folder / "hub" / name, read)
    for name in [*data, "rows.parquet"]:
        path = folder / "data" / name.replace("target", "source")
        found[name] = Valid(folder / "data" / name, partial(load_examples, path))
    for name, path in texts.items():
        known = tokenizer if "npy" in name else None
        found[name] = Valid(path / name, partial(load_corpus, path, known, 300, 0.1))
    for name in (ARCHIVE, SPLIT_IDS):
        read = partial(convert_xsum, xsum / ARCHIVE, xsum / SPLIT_IDS, xsum)
        found[f"xsum {name}"] = Valid(xsum / name, read)
    inside = {"state": other_state} | dict.fromkeys(
        ("prefix", "bart prefix", "adapter", "weights", "peft adapter_model.safetensors"),
        other_tensors,
    )
    for name, change in inside.items():
        found[f"inside {name}"] = Valid(found[name].path, found[name].read, change=change)
    return found
