"""Train a tiny OLMoE for minutes on text of this machine, and capture its routing: a real trace for anyone.

    python bench/tiny_olmoe.py OUT_DIR [--minutes 3] [--steps N] [--requests 64] [--output 128] [--threads 1]

Writes a model folder (OUT_DIR/tiny-olmoe), prompts from files that were not trained on (OUT_DIR/prompts.jsonl) and the
trace (OUT_DIR/tiny-olmoe.h5), whose 6 layers of 32 experts fit the preset tiny-olmoe. Needs the extra [capture]; reads
the sources of Python's standard library, and documentation where there is some; no network. With --steps instead of
--minutes, the same text and versions give the same model. At the end it says what tells a trained router from noise:
the loss on unseen text, and how many of its experts a token shares with the one before it.
"""

import argparse
import gzip
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONTEXT = 128  # tokens of a training sample
BATCH = 8
VOCABULARY = 2048
TEXT_BYTES = 24 << 20
FILE_BYTES = 64 << 10  # of one file, so that no large one dominates
KINDS = {".py", ".txt", ".rst", ".md", ".gz", ".html", ""}


def texts() -> list[str]:
    """Texts of this machine, shuffled; the same in every run as long as the files are."""
    folders = [Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/doc"), Path("/usr/share/common-licenses")]
    found, seen = [], set()
    for folder in folders:
        size = 0
        for text in _files(folder):
            if size < TEXT_BYTES // 2 and hash(text[:2000]) not in seen and len(text) > 1000:
                seen.add(hash(text[:2000]))  # licences come in hundreds of copies
                found.append(text)
                size += len(text)
    random.Random(0).shuffle(found)
    return found


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in KINDS or "site-packages" in path.parts or not path.is_file():
            continue
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield file.read(FILE_BYTES).decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue  # not text, or not ours to read


def train_tokenizer(samples: list[str]):
    """A byte-level BPE tokenizer that begins each text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def new_model():
    """An OLMoE of 5.5 million parameters with random weights."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    return OlmoeForCausalLM(config)


def train(model, tokens: np.ndarray, minutes: float, steps: int | None, learning_rate: float = 2e-3) -> int:
    """Train on windows of `tokens`, the rate falling to zero by the end of the time or the steps; return the steps."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    windows, step, start = np.random.default_rng(0), 0, time.monotonic()
    model.train()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("train", total=1.0)
        while (done := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
            begins = windows.integers(0, tokens.size - CONTEXT, BATCH)
            batch = torch.from_numpy(np.stack([tokens[begin : begin + CONTEXT] for begin in begins]))
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update(task, completed=done, description=f"train, loss {loss.item():.2f}")
    return step


def unseen_loss(model, tokens: np.ndarray) -> float:
    """Mean cross-entropy in nats over 64 windows."""
    import torch

    model.eval()
    losses = []
    with torch.inference_mode():
        for begin in np.linspace(0, tokens.size - CONTEXT - 1, 64).astype(int):
            batch = torch.from_numpy(tokens[None, begin : begin + CONTEXT])
            logits = model(input_ids=batch, output_router_logits=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, batch[0, 1:]).item())
    return float(np.mean(losses))


def overlap(path: Path) -> tuple[float, float]:
    """Share of a decode token's experts that the token before it chose as well, and the same with rows shuffled."""
    from moetrace.trace import Trace

    with Trace.open(path) as trace:
        rows = trace.rows
        experts, request = trace.read("experts", 0, rows), trace.read("request", 0, rows)
        decode = np.repeat(trace.phase, np.diff(trace.offset)) == 1

    def shared(experts: np.ndarray) -> float:
        same = (request[1:] == request[:-1]) & decode[1:] & decode[:-1]
        return float((experts[1:, :, :, None] == experts[:-1, :, None, :]).any(-1)[same].mean())

    return shared(experts), shared(np.random.default_rng(0).permutation(experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch
    import transformers

    from moetrace.capture.session import Sampling, capture

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    folder = options.out / "tiny-olmoe"
    found = texts()
    kept = max(options.requests, len(found) // 20)
    unseen, trained = found[:kept], found[kept:]
    tokenizer = train_tokenizer(trained[:400])
    ids = [np.array(tokenizer(text).input_ids) for text in trained]
    tokens, other = np.concatenate(ids), np.concatenate([np.array(tokenizer(text).input_ids) for text in unseen])
    print(f"{len(trained):,} texts, {tokens.size / 1e6:.1f} M tokens; {len(unseen)} texts are kept unseen.")
    model = new_model()
    before = unseen_loss(model, other)
    steps = train(model, tokens, options.minutes, options.steps)
    print(f"{steps} steps; loss on unseen text {before:.2f} -> {unseen_loss(model, other):.2f} nats a token.")
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lengths = np.random.default_rng(0).integers(100, 800, options.requests)
    lines = [json.dumps({"prompt": text[:length]}) for text, length in zip(unseen, lengths, strict=False)]
    (options.out / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = options.out / "tiny-olmoe.h5"
    capture(folder, options.out / "prompts.jsonl", out, Sampling(options.output, temperature=1.0))
    shared, shuffled = overlap(out)
    print(f"{out}: a decode token shares {shared:.1%} of its experts with the one before; shuffled, {shuffled:.1%}.")


if __name__ == "__main__":
    main()
