"""Capture: run prompts through a local Hugging Face MoE model, and write what its routers chose as a trace."""

import array
import inspect
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.capture.checkpoint import DTYPES, ModelFolder, extra, load_tokenizer, load_weights, open_folder
from moetrace.capture.prompts import in_short, read_prompts
from moetrace.capture.routers import Recorder, Router, RouterChoices, find_routers
from moetrace.spec.errors import MoetraceError, UsageError
from moetrace.trace.atomic import check_writable, real_path
from moetrace.trace.naming import model_name
from moetrace.trace.schema import BLOCK_BYTES, DECODE, PREFILL, expert_dtype
from moetrace.trace.writer import Writer
from moetrace.version import __version__

Progress = Callable[[int, int], None]


class Sampling(NamedTuple):
    """Settings of the generation after each prompt.

    Attributes:
        output: The most tokens that are generated, each a decode row. An end-of-sequence token is the last one.
        temperature: 0 is greedy; else tokens are sampled from the softmax at this temperature.
        seed: Each request samples with a stream of its own of this seed.
        batch: Requests that decode together.
        max_prompt: The most tokens of a prompt; the rest is cut off. By default prompts stay whole.
        ignore_eos: Generate further tokens after an end-of-sequence token.
    """

    output: int
    temperature: float = 0.0
    seed: int = 0
    batch: int = 1
    max_prompt: int | None = None
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise UsageError for a value that makes no sense."""
        for name, least in (("output", 0), ("seed", 0), ("batch", 1), ("max_prompt", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}, but must be {least} or more.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, but must be 0 (greedy) or more.")


def capture(
    model_dir: Path,
    prompts: Path,
    path: Path,
    sampling: Sampling,
    *,
    dtype: str = "auto",
    device: str = "auto",
    model: str | None = None,
    compress: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the trace of a Hugging Face MoE model as it reads prompts and continues them (docs/capture.md).

    Each prompt is one prefill step. Then each decode step has one row of each of the `batch` requests that still run.

    Args:
        model_dir: Folder of the model: weights, configuration, tokenizer.
        prompts: File of the prompts.
        path: The new trace file. On an error or Ctrl-C nothing is written.
        sampling: Settings of the generation after each prompt.
        dtype: Data type of the weights, one of `DTYPES`. "auto" is the checkpoint's own.
        device: A device of PyTorch. "auto" is "cuda" if there is one.
        model: The preset or TOML file that the trace is of. By default the folder's name decides.
        compress: "zstd" or "gzip". By default data is contiguous, so that it can be memory-mapped.
        progress: A function that gets the number of rows done, and the most that there can be.

    Raises:
        UsageError: A value makes no sense.
        MoetraceError: The folder holds no MoE model whose routers are known, or a prompt cannot be read.
    """
    sampling.check()
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    check_writable(path)
    folder = open_folder(model_dir)
    texts = read_prompts(prompts, lambda: load_tokenizer(folder), folder.config.vocab_size)
    cut = [ids[: sampling.max_prompt] for ids in texts]
    _check_lengths(prompts, folder, cut, sampling.output)
    network = load_weights(folder, dtype, device)
    routers = find_routers(network)
    first = routers[0]
    name = model_name(str(model_dir), folder.name, len(routers), first.num_experts, model)
    source = _source(folder, network, routers, sampling) | {
        "prompts_cut": sum(a.size < b.size for a, b in zip(cut, texts, strict=True))
    }
    with _Spool(real_path(path).parent, first.num_experts, (len(routers), first.top_k)) as spool:
        with Recorder(routers) as recorder:
            _Session(network, recorder, spool, sampling, progress).run(cut)
        with Writer(
            path,
            model=name,
            num_experts=first.num_experts,
            top_k=first.top_k,
            layers=len(routers),
            rows=spool.rows,
            steps=len(spool.steps),
            source=source,
            layer_index=np.array([router.layer for router in routers], np.uint16),
            optional=("gates", "token"),
            compress=compress,
        ) as writer:
            spool.write(writer)


class _Spool:
    """The rows of a trace in time order, in an unnamed file in `folder` that vanishes with the process.

    How many there will be is known only at the end, and then they are written; in memory are 9 bytes a step.
    """

    def __init__(self, folder: Path, num_experts: int, cell: tuple[int, int]) -> None:
        self._dtype = np.dtype(
            [
                ("experts", expert_dtype(num_experts), cell),
                ("gates", "<f2", cell),
                *((name, "<i4") for name in ("request", "position", "token")),
            ]
        )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self.rows = 0
        self.steps = array.array("q")  # rows of each
        self._phase = bytearray()

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, choices: RouterChoices, steps: np.ndarray, phase: int, **row: np.ndarray) -> None:
        """Add whole steps of one phase: `steps` [n] says how many rows each has."""
        records = np.empty(len(choices.experts), self._dtype)
        for name, values in {**choices._asdict(), **row}.items():
            records[name] = values
        self._file.write(records.data)
        self.rows += records.size
        self.steps.extend(steps.tolist())
        self._phase.extend([phase] * len(steps))

    def write(self, writer: Writer) -> None:
        """Append everything to `writer`, in blocks of whole steps."""
        self._file.seek(0)
        steps = np.frombuffer(self.steps, np.int64)
        phase = np.frombuffer(self._phase, np.uint8)
        ends = np.cumsum(steps)
        first = done = 0
        while first < steps.size:
            most = max(1, BLOCK_BYTES // self._dtype.itemsize)
            stop = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
            count = int(ends[stop - 1]) - done
            records = np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype)
            columns = {name: records[name] for name in self._dtype.names or ()}
            writer.append(steps=steps[first:stop], phase=phase[first:stop], **columns)
            done, first = done + count, stop


class _Session:
    """A model that reads prompts and continues them, group by group, each row's routing going to the spool."""

    def __init__(
        self, network: Any, recorder: Recorder, spool: _Spool, sampling: Sampling, progress: Progress | None
    ) -> None:
        self._torch = extra("torch")
        self._network, self._recorder, self._spool, self._sampling = network, recorder, spool, sampling
        accepted = inspect.signature(network.forward).parameters
        # Transformers 5.24 calls it `cache`, releases before `past_key_values`; what isn't named would be ignored.
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in accepted), None)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        shown = type(network).__name__
        if self._cache_name is None:
            raise MoetraceError(f"{shown} takes no KV cache, so it can't be captured.")
        if sampling.batch > 1 and not {"attention_mask", "position_ids"} <= set(accepted):
            raise MoetraceError(f"{shown} takes no padded prompts: capture it with --batch 1.")
        self._ends = _end_tokens(network)
        self._progress = progress
        self._done = self._total = 0

    def run(self, prompts: list[np.ndarray]) -> None:
        most = np.cumsum([ids.size + self._sampling.output for ids in prompts])
        self._total = int(most[-1])
        with self._torch.inference_mode():
            for first in range(0, len(prompts), self._sampling.batch):
                group = prompts[first : first + self._sampling.batch]
                self._continue(first, group)
                self._done = int(most[first + len(group) - 1])  # an early end leaves nothing to do
                self._advance(0)

    def _continue(self, first: int, prompts: list[np.ndarray]) -> None:
        """Prefill prompts as one left-padded pass, which makes one step of each; then decode them together."""
        lengths = np.array([ids.size for ids in prompts])
        request = first + np.arange(lengths.size)
        width = int(lengths.max())
        is_token = np.arange(width) >= (width - lengths)[:, None]  # [requests, width]: not padding
        tokens = np.zeros(is_token.shape, np.int64)
        tokens[is_token] = np.concatenate(prompts)
        logits, cache = self._pass(first, tokens, is_token, None)
        self._spool.append(
            self._recorder.take(is_token.size, is_token.ravel()),
            lengths,
            PREFILL,
            request=np.repeat(request, lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            token=tokens[is_token],
        )
        self._advance(int(lengths.sum()))
        streams = [np.random.default_rng((self._sampling.seed, int(index))) for index in request]
        live = np.ones(lengths.size, bool)
        for step in range(self._sampling.output):
            token = self._next(logits, streams, live)
            if not self._sampling.ignore_eos:
                live &= ~np.isin(token, self._ends)
            if not live.any():
                break
            is_token = np.concatenate([is_token, np.ones((lengths.size, 1), bool)], axis=1)
            logits, cache = self._pass(first, token[:, None], is_token, cache)  # ended requests run along, unrecorded
            self._spool.append(
                self._recorder.take(lengths.size, live),
                live.sum(keepdims=True),
                DECODE,
                request=request[live],
                position=(lengths + step)[live],
                token=token[live],
            )
            self._advance(int(live.sum()))

    def _pass(self, first: int, tokens: np.ndarray, is_token: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """Logits float64 [requests, vocabulary] after `tokens` [requests, n], the last n of `is_token`; the cache."""
        torch, device = self._torch, self._network.device
        more = dict(self._last_only)
        if not is_token.all():
            position = np.maximum(np.cumsum(is_token, axis=1) - 1, 0)[:, -tokens.shape[1] :]
            more["attention_mask"] = torch.from_numpy(is_token.astype(np.int64)).to(device)
            more["position_ids"] = torch.from_numpy(position.astype(np.int64)).to(device)
        assert self._cache_name is not None
        if cache is not None:
            more[self._cache_name] = cache
        try:
            output = self._network(
                input_ids=torch.from_numpy(tokens).to(device), use_cache=True, return_dict=True, **more
            )
            logits = output.logits[:, -1].to(torch.float64).cpu().numpy()
            cache = output.get(self._cache_name)
        except MoetraceError:
            raise
        except Exception as error:  # out of memory, an operation that the device does not have, ...
            raise MoetraceError(f"the model failed in the group of request {first}: {in_short(error)}.") from error
        if cache is None and self._sampling.output:
            raise MoetraceError(f"{type(self._network).__name__} returned no KV cache, so it can't be captured.")
        return logits, cache

    def _next(self, logits: np.ndarray, streams: list[np.random.Generator], live: np.ndarray) -> np.ndarray:
        """The next token of each request, int64; arbitrary for those that ended."""
        if not np.isfinite(logits[live].max(axis=1)).all():
            raise MoetraceError("the model's logits are not finite, so it chooses no token: try another --dtype.")
        greedy = logits.argmax(axis=1)
        if self._sampling.temperature == 0:
            return greedy
        for index in np.flatnonzero(live):
            greedy[index] = draw_token(logits[index], self._sampling.temperature, streams[index])
        return greedy

    def _advance(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


def draw_token(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """A token from the softmax of `logits` float64 [vocabulary] at a temperature above 0; takes one random number."""
    with np.errstate(over="ignore"):  # a temperature near 0 makes every logit below the largest minus infinity
        mass = np.cumsum(np.exp((logits - logits.max()) / temperature))
    return min(int(np.searchsorted(mass, random.random() * mass[-1], side="right")), mass.size - 1)


def _check_lengths(where: Path, folder: ModelFolder, prompts: list[np.ndarray], output: int) -> None:
    limit = getattr(folder.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda index: prompts[index].size)
    size = prompts[longest].size
    if isinstance(limit, int) and size + output > limit:
        raise MoetraceError(
            f"{where}: the prompt of request {longest} has {size} tokens, and with {output} of output goes beyond the "
            f"{limit} positions of the model: give a smaller --max-prompt or --output."
        )


def _end_tokens(network: Any) -> list[int]:
    """The ids that end a sequence, as the model's generation config says, or else its config."""
    for config in (network.generation_config, network.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def _source(folder: ModelFolder, network: Any, routers: list[Router], sampling: Sampling) -> dict[str, Any]:
    """Where the trace is from: everything that decides it, but no path and no clock time."""
    quantization = getattr(network.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "capture": f"moetrace {__version__}",
        "engine": "transformers",
        "version": extra("transformers").__version__,
        "torch": extra("torch").__version__,
        "recorded_model": folder.name[:300],
        "architecture": type(network).__name__,
        "router": type(routers[0].module).__name__,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": network.device.type,
        "quantization": str(quantization.get("quant_method", "unknown")) if quantization else None,
        "config_sha256": folder.config_sha256,
        "parameters": sampling._asdict(),
    }
