"""The cost of prefix-tuning a full-size BART: one training step, and one text by beam search.

    python -m benchmarks.bart                                  # bart-large's sizes, P = 200
    python -m benchmarks.bart --device cuda --dtype bfloat16 --batch-size 16
    python -m benchmarks.bart --peers                          # also transformers and PEFT
    python -m benchmarks.bart --out benchmarks/bart.csv        # adds rows to a CSV

Weights are random, because times do not depend on them. The step is that of XSum in the paper
(sources of 512 tokens, targets of 60, a prefix with MLPs in all three attentions): forward,
backward and AdamW. The first step is warm-up, and the median of the others is printed. The text has
60 new tokens and is generated with 6 beams; on a GPU it is written twice before it is timed, and
also without CUDA graphs.

The peers make the same step: `transformers` with frozen weights and no prefix, for gradients of the
source's embeddings, and PEFT; the text is that of transformers, without a prefix. PEFT's prefix is
only in the decoder, so its backward pass does not reach the encoder; "minprefix, decoder" is ours
with only that prefix. Peak memory is the largest resident set of the process on a CPU, and
allocated memory on a GPU; MiB = 2**20.
"""

import argparse
import resource
import statistics
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.machine import add_row, machine
from minprefix.cli.report import format_rows
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate_ids
from minprefix.methods.adapters import count
from minprefix.models import weights_bart
from minprefix.models.bart import BART
from minprefix.models.config import EMBEDDED, OFFICIAL, SITES
from minprefix.models.weights import find, read_config
from minprefix.prefix.bart import BARTPrefix

MID_DIM = 800  # width of the MLPs, as in the authors' code for XSum
NO_GRAPHS = "minprefix, no graphs"


def peak_mib(device: str) -> float:
    """Since the last reset on a GPU; since the start of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux: KiB


def timed(call, device: str) -> float:
    """Seconds of one call, synchronised with the GPU before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def transformers_bart(model: BART, attention: str):
    """transformers' BART with the same weights, in their dtype; attention "eager" or "sdpa"."""
    from transformers import BartConfig, BartForConditionalGeneration

    values = weights_bart.in_their_names(model.config.of_model())
    twin = BartForConditionalGeneration(BartConfig(**values, attn_implementation=attention))
    tensors = weights_bart.to_checkpoint(model.state_dict())
    names = {n if n == "final_logits_bias" else f"model.{n}": x for n, x in tensors.items()}
    copies = {f"model.{name}" if "embed" in name else name for name in weights_bart.TIED}
    twin.load_state_dict(names | dict.fromkeys(copies, model.wte.weight))
    return twin.to(model.wte.weight).eval()


def our_losses(model: BART, args, sites=SITES):
    """The trained module, and a function (sources, decoder inputs, labels) -> losses."""
    options = {"parametrisation": "mlp", "mid_dim": MID_DIM, "sites": sites}
    prefix = BARTPrefix.random(model.config, args.prefix_len, 0, **options).to(args.device)

    def losses(sources, inputs, labels):
        return model.token_losses(inputs, labels, source_ids=sources, prefix=prefix)

    return [*prefix.parameters()], losses


def transformers_losses(model: BART, args):
    """Like `our_losses`, without a prefix; nothing is trained."""
    twin = transformers_bart(model, "sdpa").requires_grad_(False)

    def losses(sources, inputs, labels):
        embd = twin.get_input_embeddings()(sources).requires_grad_()
        logits = twin(inputs_embeds=embd, decoder_input_ids=inputs).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")

    return [], losses


def peft_losses(model: BART, args):
    """Like `our_losses`, with PEFT's prefix."""
    import peft

    settings = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=args.prefix_len, prefix_projection=True,
        encoder_hidden_size=MID_DIM,
    )  # fmt: skip
    twin = peft.get_peft_model(transformers_bart(model, "sdpa"), settings).to(args.device).eval()
    twin.prompt_encoder.float()

    def losses(sources, inputs, labels):
        logits = twin(input_ids=sources, decoder_input_ids=inputs).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")

    return [p for p in twin.parameters() if p.requires_grad], losses


METHODS = {
    "minprefix": our_losses,
    "minprefix, decoder": partial(our_losses, sites=("decoder",)),
    "transformers": transformers_losses,
    "peft": peft_losses,
}


def train_step(model: BART, args, method: str = "minprefix") -> tuple[float, float]:
    """Median seconds of a step of one of METHODS, and peak MiB."""
    trained, losses = METHODS[method](model, args)
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0, fused=True) if trained else None
    B, V = args.batch_size, model.config.vocab_size
    sources = torch.randint(4, V, (B, args.source), device=args.device)
    targets = torch.randint(4, V, (B, args.target + 1), device=args.device)

    def step() -> None:
        losses(sources, targets[:, :-1], targets[:, 1:]).mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = [timed(step, args.device) for _ in range(1 + args.steps)][1:]
    return statistics.median(seconds), peak_mib(args.device)


def write_text(model: BART, args, method: str = "minprefix") -> tuple[float, float]:
    """Seconds of a batch of texts by beam search, and peak MiB. On a GPU the first calls compile
    and record."""
    prefix = BARTPrefix.random(model.config, args.prefix_len, 0).to(args.device)
    config = GenerationConfig(
        max_new_tokens=args.target, min_new_tokens=args.target - 1, num_beams=args.num_beams,
        length_penalty=0.8,
    )  # fmt: skip
    sources = torch.randint(4, model.config.vocab_size, (args.batch_size, args.source))
    lengths = {"max_new_tokens": args.target, "min_new_tokens": args.target - 1}
    if method == "transformers":
        ids, twin = sources.to(args.device), transformers_bart(model, "sdpa")
        call = partial(twin.generate, ids, num_beams=args.num_beams, do_sample=False, **lengths)
    else:
        given = model, sources.tolist(), config, model.config.eos_token_id
        call = partial(generate_ids, *given, prefix=prefix)
    graphs = {} if method != NO_GRAPHS else {"MINPREFIX_CUDA_GRAPHS": "0"}
    with patch.dict("os.environ", graphs):
        seconds = [timed(call, args.device) for _ in range(3 if args.device != "cpu" else 1)]
    return seconds[-1], peak_mib(args.device)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name, (config, _) in OFFICIAL.items() if config.family == "BART"]
    names.append("mini-bart")
    parser.add_argument("--model", default="facebook/bart-large", choices=names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, value in {
        "batch-size": 1, "prefix-len": 200, "source": 512, "target": 60, "steps": 1, "num-beams": 6,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="also time the other libraries")
    parser.add_argument("--out", type=Path, help="CSV to add the rows to")
    args = parser.parse_args(argv)
    embedded = args.model in EMBEDDED
    config = read_config(find(args.model)) if embedded else OFFICIAL[args.model][0]
    torch.manual_seed(0)
    with torch.device(args.device):
        model = BART(config).init_weights(0)
    model = model.to(getattr(torch, args.dtype)).requires_grad_(False).eval()
    rows = []
    runs = [("training step", "minprefix", train_step)]
    if args.peers:
        runs += [("training step", m, partial(train_step, method=m)) for m in METHODS][1:]
    writers = ["minprefix", *([NO_GRAPHS] if args.device != "cpu" else [])]
    writers += ["transformers"] if args.peers else []
    text = f"text, {args.num_beams} beams"
    runs += [(text, method, partial(write_text, method=method)) for method in writers]
    for work, method, measure in runs:
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds, peak = measure(model, args)
        row = {"work": work, "method": method}
        rows.append(row | {"seconds": round(seconds, 3), "peak MiB": round(peak)})
        if args.out:
            names = ("model", "device", "dtype", "batch_size", "prefix_len", "source", "target")
            key = row | {"beams": args.num_beams} | {name: getattr(args, name) for name in names}
            add_row(args.out, key | rows[-1] | machine(), tuple(key))
        print(f"{method}, {work}: {seconds:.2f} s, peak {peak:,.0f} MiB", flush=True)
    sizes = f"B {args.batch_size}, P {args.prefix_len}, {args.source}/{args.target} tokens"
    print(f"{args.model}, {count(model):,} parameters, {args.dtype}, {args.device}, {sizes}")
    print(format_rows(rows))
    return rows


if __name__ == "__main__":
    main()
