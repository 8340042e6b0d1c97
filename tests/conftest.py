"""Shared helpers: tiny random models and runs, and the data of a development checkout."""

import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.bart import transformers_bart
from minprefix.data.examples import Example
from minprefix.methods.adapters import Adapter
from minprefix.methods.by_name import make_tuned
from minprefix.methods.config import BaselineConfig
from minprefix.models.bart import BART
from minprefix.models.config import BARTConfig, GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import BYTE_CHARS, ENDOFTEXT, Tokenizer
from minprefix.models.weights import ASSETS, save_model
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.loop import Loop
from minprefix.training.trainer import Trainer

# background jobs of a shell ignore Ctrl-C, and their children inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU
DEVICE = "cpu" if INTERPRETED else "cuda"  # for tests of the kernels
# for tests of the kernels; bf16 products are wrong in the interpreter
KERNEL_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = ["amber", "brook", "cedar", "dune", "ember", "fjord", "grove", "harbour", "inlet", "jetty"]
TINY = GPT2Config(
    vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=96, eos_token_id=96
)


def pytest_collection_modifyitems(items):
    """Run long tests first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def needs_kernels() -> None:
    """Skip a whole module if the Triton kernels cannot run."""
    if not (INTERPRETED or torch.cuda.is_available()):
        reason = "kernel tests: `make test-kernels` (TRITON_INTERPRET=1) or a GPU"
        pytest.skip(reason, allow_module_level=True)


def tiny_gpt2(seed: int = 0, dtype=torch.float64, **changes) -> GPT2:
    """A random GPT-2 of a few thousand parameters, in eval mode. Weights are larger than GPT-2's
    initial ones, so that logits differ clearly."""
    config = GPT2Config(**{**TINY.__dict__, **changes})
    model = GPT2(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.to(dtype).eval()


# tests run in several processes and make small calls: one thread for each and for its children
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def is_here(host) -> bool:
    """Whether a host name or address is this machine."""
    names = (None, "", "localhost", "::1", "::", "0.0.0.0", socket.gethostname())
    return host in names or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Only the tests of the official weights may connect to another machine."""
    if request.node.get_closest_marker("official"):
        return
    connect, ask = socket.socket.connect, socket.getaddrinfo

    def connect_here(self, address):
        if self.family != socket.AF_UNIX and not is_here(address[0]):
            pytest.fail(f"a test connects to {address}")
        return connect(self, address)

    def ask_here(host, *args, **kwargs):
        if not is_here(host):
            pytest.fail(f"a test asks where {host} is")
        return ask(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", ask_here)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data, which users do not have."""
    if not SHARED.is_dir():
        pytest.skip("needs the development data in ../shared, which is not here")
    return SHARED


def tiny_with_words(seed: int = 0, **changes) -> GPT2:
    """A tiny random model in fp32 with the vocabulary of mini's tokenizer."""
    sizes = {"vocab_size": 8192, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 96}
    ends = {"bos_token_id": 8191, "eos_token_id": 8191}
    return tiny_gpt2(seed, torch.float32, **{**sizes, **ends, **changes})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """`tiny_with_words` saved in a folder; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_with_words(), Tokenizer.from_folder(ASSETS / "mini"), folder)
    return folder


@pytest.fixture
def checkpoint(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder, to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture(scope="session")
def tables(tmp_path_factory) -> Path:
    """A data folder with a few small tables; no test changes it."""
    folder = tmp_path_factory.mktemp("tables")
    for split, numbers in {"train": range(8), "dev": range(8, 11), "test": range(11, 14)}.items():
        rows = [
            {
                "table": {"boat": f"Gull {n}", "colour": "green"},
                "text": f"Gull {n} is a green boat.",
            }
            for n in numbers
        ]
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def few_tables(tables: Path, folder: Path) -> Path:
    """Too few examples to hold any out, so that a run keeps its last step."""
    few = folder / "few.jsonl"
    few.write_text("".join((tables / "train.jsonl").read_text().splitlines(keepends=True)[:3]))
    return few


def in_process(capsys, main):
    """A function that runs a command line in this process: run("info", code=0) -> (stdout,
    stderr)."""

    def run(*argv, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            got = main([str(word) for word in argv])
        except SystemExit as stop:  # from --help and wrong usage
            got = stop.code
        out, err = capsys.readouterr()
        assert got == code, f"exit code {got}: {err}"
        return out, err

    return run


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within the block, writing more than `size` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def signalled(after: int, number: int = signal.SIGINT, times: int = 1) -> Iterator[None]:
    """Within the block, this process gets a signal in the training step after step `after`."""
    step = Trainer.step

    def interrupted(self):
        if self.step_done == after:
            for _ in range(times):
                signal.raise_signal(number)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        yield


class Killed(Exception):
    """Ends a run where a kill would."""


def run_until_killed(run: Loop, after: int) -> None:
    """Run until the step after step `after`, which raises and saves nothing."""
    step = run.step

    def killed() -> dict:
        if run.step_done == after:
            raise Killed
        return step()

    run.step = killed
    with pytest.raises(Killed):
        run.run(progress=False)


@pytest.fixture
def cli(capsys):
    """Run a command in this process: cli("info", "--json", code=0) -> (stdout, stderr)."""
    from minprefix.cli.main import main  # its packages are not on every machine with a GPU

    return in_process(capsys, main)


@pytest.fixture
def paper(capsys):
    """Run `python -m benchmarks.paper` in this process, like `cli`."""
    from benchmarks.paper.command import main

    return in_process(capsys, main)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new tensors with NaN, so that elements which a kernel does not write are found."""

    def filled(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", filled(torch.Tensor.new_empty_strided))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


def hf_twin(model: GPT2):
    """The GPT-2 of `transformers` with our weights, in their dtype: eager attention, eval mode."""
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    twin = GPT2LMHeadModel(HFConfig(**model.config.of_model(), attn_implementation="eager"))
    weights = {f"transformer.{name}": weight for name, weight in model.state_dict().items()}
    twin.load_state_dict(weights | {"lm_head.weight": model.head_weight})
    return twin.to(model.wte.weight.dtype).eval()


def random_ids(model: GPT2, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def assert_close(actual, exact, tolerance: float, name: str = "") -> None:
    """|actual - exact| <= tolerance * max(1, max |exact|), in the maximum norm."""
    assert actual.shape == exact.shape, f"{name}: shapes {actual.shape}, {exact.shape}"
    if exact.numel():
        err, size = (actual - exact).abs().max().item(), exact.abs().max().item()
        assert err <= tolerance * max(1, size), f"{name}: error {err:.1e}, largest {size:.1e}"


def assert_within_rounding(actual, low, exact, magnitude, max_score, name):
    """|actual - exact| <= 2 |low - exact| + 4 eps (1 + max_score) magnitude, in the maximum norm.

    `exact` is fp64, `low` plain PyTorch in the dtype of `actual`. 2: another summation order.
    4 eps (1 + |s|): a rounded score moves exp(s - lse) by eps |s|. PyTorch's fused attention on the
    CPU (it recomputes exp(s - lse) too) uses 0.22 of the budget at most, and beyond 2 |low - exact|
    0.02 eps (1 + |s|) magnitude.
    """
    err, low_err = ((x.double() - exact).abs().max().item() for x in (actual, low))
    budget = 2 * low_err + 4 * torch.finfo(actual.dtype).eps * (1 + max_score) * magnitude
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    assert err <= budget, f"{name}: error {err:.1e}, budget {budget:.1e}"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the embedded model."""
    return Tokenizer.from_folder(ASSETS / "mini")


def pairs(n: int, start: int = 0) -> list[Example]:
    """Small tables of different lengths with texts."""
    made = []
    for i in range(start, start + n):
        words = [WORDS[(i * 7 + j * 3) % 10] for j in range(2 + i % 5)]
        made.append(Example(f"place : {' '.join(words)}", (f"It is the {' '.join(words)} {i}.",)))
    return made


def small_model(dtype=torch.float32, **changes) -> GPT2:
    """A small random model with the embedded model's tokens."""
    sizes = {"vocab_size": 8192, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 128}
    return tiny_gpt2(
        dtype=dtype, **{**sizes, "bos_token_id": 8191, "eos_token_id": 8191, **changes}
    )


def trainer(
    tokenizer, out, *, model=None, prefix=None, dev=3, prefix_options=None, baseline_options=None,
    **config,
) -> Trainer:  # fmt: skip
    """A short run on `pairs`; `config` has fields of TrainConfig. Without a prefix a random one."""
    settings = {
        "batch_size": 4, "steps": 6, "lr": 1e-2, "warmup_steps": 0, "eval_every": 3,
        "log_every": 1, "precision": "fp32",
    }  # fmt: skip
    config = TrainConfig(**settings | config)
    model = model or small_model()
    if config.method == "prefix":
        kind = BARTPrefix if isinstance(model, BART) else Prefix
        tuned = prefix or kind.random(model.config, 3, 0, **(prefix_options or {}))
        tuned.to(model.wte.weight).bind(model)
    else:
        baseline = BaselineConfig(**(baseline_options or {}))
        tuned = make_tuned(model, tokenizer, config, baseline=baseline)
    return Trainer(model, tokenizer, config, pairs(10), pairs(dev, 50), out, tuned)


def an_adapter(model: GPT2, design: str = "lin", width: int = 5) -> Adapter:
    """An adapter with random weights everywhere, so that each of them matters."""
    adapter = Adapter.random(model.config, width, 0, design)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    adapter.bind(model)
    return adapter.to(model.wte.weight.dtype)


def another_model(**changes) -> GPT2:
    """Like `small_model`, with other weights."""
    model = small_model(**changes)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight += 0.1
    return model


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte, and the end of text: 257 tokens."""
    return Tokenizer({c: i for i, c in enumerate([*BYTE_CHARS, ENDOFTEXT])}, [])


def bart_bytes(mask: bool = False) -> Tokenizer:
    """A tokenizer with BART's special tokens and one token per byte: 260 tokens, and <mask>."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *BYTE_CHARS, *(["<mask>"] if mask else [])]
    return Tokenizer({token: n for n, token in enumerate(tokens)}, [], "bart")


def byte_model() -> GPT2:
    """A tiny frozen model, fp64, for the tokens of `byte_tokenizer`."""
    sizes = {"vocab_size": 257, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 128}
    return tiny_gpt2(**sizes, bos_token_id=256, eos_token_id=256).requires_grad_(False)


def tiny_bart(seed: int = 0, dtype=torch.float64, **changes) -> BART:
    """A random BART of a few thousand parameters, in eval mode; encoder and decoder differ in
    depth. Weights, and the head's bias, are large enough for logits that differ clearly."""
    sizes = {"vocab_size": 97, "n_positions": 48, "n_embd": 32, "n_encoder_layer": 2, "n_layer": 3}
    config = BARTConfig(**{**sizes, "n_head": 4, "n_inner": 48, **changes})
    model = BART(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in [*model.parameters(), model.head_bias]:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.to(dtype).eval()


def hf_bart_twin(model: BART):
    """The BART of `transformers` with our weights, in their dtype: eager attention, eval mode."""
    return transformers_bart(model, "eager")
