"""Capture: what it records is what the experts were given, in every family; the model's output stays as it was."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from support.tiny_models import CAPTURED, EXPERTS, FAMILIES, TOP_K, build, prompts, save  # noqa: E402

from moetrace.capture.checkpoint import load_weights, open_folder  # noqa: E402
from moetrace.capture.routers import Recorder, find_routers  # noqa: E402
from moetrace.capture.session import Sampling, capture, draw_token  # noqa: E402
from moetrace.spec.errors import MoetraceError, UsageError  # noqa: E402
from moetrace.trace import Trace  # noqa: E402

OUTPUT = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The saved model of a family, saved once."""
    saved = {}

    def of(family: str) -> Path:
        if family not in saved:
            saved[family] = save(family, tmp_path_factory.mktemp("models") / family)
        return saved[family]

    return of


def captured(model_dir: Path, out: Path, given=None, **options) -> Trace:
    """The trace of a capture of prompts of token ids."""
    lines = [json.dumps({"token_ids": ids}) for ids in given or prompts()]
    (out.parent / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    own = {name: options.pop(name) for name in list(options) if name in Sampling._fields}
    sampling = Sampling(**{"output": OUTPUT, "ignore_eos": True} | own)
    capture(model_dir, out.parent / "prompts.jsonl", out, sampling, **{"dtype": "float64"} | options)
    trace = Trace.open(out)
    trace.verify()
    return trace


def by_request(trace: Trace) -> list[dict[str, np.ndarray]]:
    """The rows of each request, by position."""
    columns = {name: trace.read(name, 0, trace.rows) for name in ("request", "position", "token", "experts", "gates")}
    order = np.lexsort((columns["position"], columns["request"]))
    columns = {name: values[order] for name, values in columns.items()}
    cuts = np.flatnonzero(np.diff(columns["request"])) + 1
    parts = zip(*(np.split(values, cuts) for values in columns.values()), strict=True)
    return [dict(zip(columns, part, strict=True)) for part in parts]


def steps(trace: Trace) -> list[tuple[int, int]]:
    """(rows, phase) of each step."""
    return list(zip(np.diff(trace.offset).tolist(), trace.phase.tolist(), strict=True))


def executed(model, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [rows, layers, k] that the expert modules were given for `tokens`, all at once, without a cache.

    Where the experts are given no ids (Llama 4), the k experts with the largest logits, and the sigmoids of these.
    """
    seen = []

    def given(module, arguments, named):
        ids, weights = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)][1:3]
        ids, weights = (weights, ids) if ids.is_floating_point() else (ids, weights)
        seen.append((ids.reshape(-1, TOP_K).clone(), weights.reshape(-1, TOP_K).clone()))

    def logits(module, arguments, output):
        ids = np.argsort(-output[1].numpy(), axis=1)[:, :TOP_K]
        seen.append((ids, 1 / (1 + np.exp(-np.take_along_axis(output[1].numpy(), ids, axis=1)))))

    hooks = []
    for module in model.modules():
        if type(module).__name__ == "Llama4Router":
            hooks.append(module.register_forward_hook(logits))
        elif "Experts" in type(module).__name__ and "Llama4" not in type(module).__name__:
            hooks.append(module.register_forward_pre_hook(given, with_kwargs=True))
    with torch.inference_mode():
        model(torch.tensor(tokens)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return tuple(np.stack([np.asarray(part[which]) for part in seen], axis=1) for which in (0, 1))


def same_choices(rows: dict[str, np.ndarray], ids: np.ndarray, weights: np.ndarray) -> None:
    """Assert that rows chose `ids` with `weights`, in whatever order."""
    ours, theirs = np.argsort(rows["experts"], axis=-1), np.argsort(ids, axis=-1)
    assert np.array_equal(np.take_along_axis(rows["experts"], ours, -1), np.take_along_axis(ids, theirs, -1))
    gates = np.take_along_axis(rows["gates"], ours, -1).astype(float)
    assert np.allclose(gates, np.take_along_axis(weights, theirs, -1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", CAPTURED)
def test_captured_is_what_the_experts_are_given(family, folder, tmp_path):
    """Prefill and decode with a cache, alone and in a padded batch, against one pass over all tokens."""
    model = load_weights(open_folder(folder(family)), "float64", "cpu")
    alone = captured(folder(family), tmp_path / "1.h5")
    together = captured(folder(family), tmp_path / "3.h5", batch=3)
    assert alone.layer_index.tolist() == FAMILIES[family][2]
    assert (alone.num_experts, alone.top_k) == (EXPERTS, TOP_K)
    lengths = [len(ids) for ids in prompts()]
    assert steps(alone) == [step for length in lengths for step in [(length, 0), *[(1, 1)] * OUTPUT]]
    assert steps(together) == [*((length, 0) for length in lengths), *[(3, 1)] * OUTPUT]
    for one, other, prompt in zip(by_request(alone), by_request(together), prompts(), strict=True):
        assert one["position"].tolist() == list(range(len(prompt) + OUTPUT))
        assert one["token"][: len(prompt)].tolist() == prompt
        assert np.array_equal(one["token"], other["token"])
        with torch.inference_mode():
            logits = model(torch.tensor(one["token"][None].astype(np.int64)), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == one["token"][len(prompt) :].tolist(), "greedy"
        for rows in (one, other):
            same_choices(rows, *executed(model, rows["token"].astype(np.int64)))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"])
def test_captured_ids_are_the_top_k_of_the_logits(family, folder, tmp_path):
    """Where routing is the top k of the logits that the model itself can return."""
    model = load_weights(open_folder(folder(family)), "float64", "cpu")
    for rows in by_request(captured(folder(family), tmp_path / "a.h5")):
        with torch.inference_mode():
            output = model(torch.tensor(rows["token"][None].astype(np.int64)), output_router_logits=True)
        logits = np.stack([layer.numpy() for layer in output.router_logits], axis=1).astype(float)
        ids = np.argsort(-logits, axis=-1)[..., :TOP_K]
        mass = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights = np.take_along_axis(mass, ids, -1)
        normalised = {"mixtral": True, "gpt-oss": True, "qwen3-moe": True}.get(family, False)
        weights /= weights.sum(-1, keepdims=True) if normalised else mass.sum(-1, keepdims=True)
        same_choices(rows, ids, weights)


def hidden_states(routers, model, tokens) -> list:
    """What each of the routers is given for `tokens`: [rows, h]."""
    seen = []

    def given(module, arguments):
        seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]).clone())

    hooks = [router.register_forward_pre_hook(given) for router in routers]
    with torch.inference_mode():
        model(torch.tensor(tokens[None].astype(np.int64)))
    for hook in hooks:
        hook.remove()
    return seen


def deepseek(config, router, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [rows, k] of a DeepSeek router for hidden states [rows, h], by the words of the papers."""
    logits = hidden @ router.weight.detach().numpy().astype(float).T
    sigmoid = hasattr(router, "e_score_correction_bias")
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids, weights = [], []
    for row in scores:
        bias = router.e_score_correction_bias.numpy().astype(float) if sigmoid else np.zeros(EXPERTS)
        choice = row + bias
        if sigmoid or config.topk_method == "group_limited_greedy":
            groups = choice.reshape(config.n_group, -1)
            of_group = np.sort(groups, -1)[:, -2:].sum(-1) if sigmoid else groups.max(-1)
            allowed = np.argsort(-of_group)[: config.topk_group]
            barred = ~np.isin(np.arange(EXPERTS) // groups.shape[1], allowed)
            choice = np.where(barred, -np.inf, choice)
        chosen = np.argsort(-choice)[:TOP_K]
        weight = row[chosen]
        if sigmoid and config.norm_topk_prob:
            weight = weight / weight.sum()
        ids.append(chosen)
        weights.append(weight * config.routed_scaling_factor)
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v2-groups", "deepseek-v3"])
def test_deepseek_routing_from_hidden_states_by_hand(family, folder, tmp_path):
    model = load_weights(open_folder(folder(family)), "float64", "cpu")
    by_logits = 0  # rows where the largest logits would be another choice
    for rows in by_request(captured(folder(family), tmp_path / "a.h5")):
        routers = find_routers(model)
        seen = hidden_states([router.module for router in routers], model, rows["token"])
        found = [deepseek(model.config, router.module, h.numpy()) for router, h in zip(routers, seen, strict=True)]
        same_choices(rows, *(np.stack(arrays, axis=1) for arrays in zip(*found, strict=True)))
        for entry, (router, hidden) in enumerate(zip(routers, seen, strict=True)):
            logits = hidden.numpy() @ router.module.weight.detach().numpy().T
            largest = np.sort(np.argsort(-logits, -1)[:, :TOP_K], -1)
            by_logits += int((largest != np.sort(rows["experts"][:, entry], -1)).any(-1).sum())
    assert (by_logits == 0) == (family == "deepseek-v2"), "bias and groups matter, or the test tests nothing"


@pytest.mark.parametrize("family", CAPTURED)
def test_output_is_the_same_to_the_bit(family):
    model = build(family)
    tokens = torch.tensor([prompts()[1]])
    with torch.inference_mode():
        before = model(tokens).logits
        with Recorder(find_routers(model)) as recorder:
            during = model(tokens).logits
            recorder.take(tokens.numel())
        after = model(tokens).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_cache_means_something_else():
    """The families' decode test would not notice a cache that is ignored if positions made no difference."""
    model = build("olmoe")
    with torch.inference_mode():
        whole, last = model(torch.tensor([[5, 6, 7]])).logits[0, -1], model(torch.tensor([[7]])).logits[0, -1]
    assert not torch.allclose(whole, last)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            "jetmoe",
            r"JetMoeForCausalLM routes with JetMoeTopKGating \(model\.layers\.0\..*, which capture does not know",
        ),
        ("llama", "LlamaForCausalLM has no MoE layers"),
        ("longcat-flash", r"LongcatFlashTopkRouter \(model\.layers\.0\.mlp\.router\) returned the shapes"),
    ],
)
def test_models_that_are_not_known_are_one_sentence(family, words, folder, tmp_path):
    with pytest.raises(MoetraceError, match=words):
        captured(folder(family), tmp_path / "a.h5", dtype="auto")
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_sequence_ends_with_its_token(folder, tmp_path):
    free = by_request(captured(folder("olmoe"), tmp_path / "a.h5", output=8))
    end = int(free[0]["token"][len(prompts()[0]) + 3])  # the fourth output token of the first request
    save("olmoe", tmp_path / "ends", eos_token_id=end)
    for batch in (1, 3):
        ended = captured(tmp_path / "ends", tmp_path / "b.h5", output=8, batch=batch, ignore_eos=False)
        for before, after, prompt in zip(free, by_request(ended), prompts(), strict=True):
            output = before["token"][len(prompt) :].tolist()
            count = output.index(end) if end in output else 8
            assert after["token"].tolist() == prompt + output[:count], "the end itself is no row"
            assert np.array_equal(after["experts"], before["experts"][: len(prompt) + count])


def test_samples_depend_on_the_seed_and_not_on_the_batch(folder, tmp_path):
    def tokens(**options) -> list[list[int]]:
        trace = captured(folder("mixtral"), tmp_path / "a.h5", **options)
        return [rows["token"].tolist() for rows in by_request(trace)]

    sampled = tokens(temperature=1.5, seed=1)
    assert sampled == tokens(temperature=1.5, seed=1, batch=2) != tokens(temperature=1.5, seed=2)
    assert tokens(temperature=1e-9) == tokens(temperature=1e-320) == tokens() != sampled


def test_draws_follow_the_softmax():
    random, logits, draws = np.random.default_rng(0), np.log([0.5, 0.3, 0.2]), 20_000
    for temperature in (1.0, 0.5):
        share = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        counts = np.bincount([draw_token(logits, temperature, random) for _ in range(draws)], minlength=3)
        assert np.all(np.abs(counts - draws * share) < 4 * np.sqrt(draws * share * (1 - share)))


def test_same_capture_same_bytes_and_no_path(folder, tmp_path):
    first = captured(folder("olmoe"), tmp_path / "a.h5", temperature=1.0, batch=2)
    captured(folder("olmoe"), tmp_path / "b.h5", temperature=1.0, batch=2)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert str(tmp_path) not in json.dumps(first.source) and str(folder("olmoe").parent) not in json.dumps(first.source)
    assert first.source["engine"] == "transformers" and first.source["version"] == transformers.__version__
    assert first.source["dtype"] == "float64" and first.source["parameters"]["batch"] == 2
    assert first.model == first.source["recorded_model"] == "olmoe"


def test_long_captures_are_written_in_blocks(folder, tmp_path, monkeypatch):
    whole = captured(folder("olmoe"), tmp_path / "a.h5", batch=2)
    monkeypatch.setattr("moetrace.capture.session.BLOCK_BYTES", 100)
    captured(folder("olmoe"), tmp_path / "b.h5", batch=2)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    captured(folder("olmoe"), tmp_path / "c.h5", batch=2, compress="zstd")
    assert np.array_equal(
        Trace.open(tmp_path / "c.h5").read("experts", 0, whole.rows), whole.read("experts", 0, whole.rows)
    )


def test_the_folder_names_the_model(folder, tmp_path):
    def name(path: Path, **options) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(folder("mixtral")) if "models--" not in str(path) else path.mkdir()
        if "models--" in str(path):
            for file in folder("mixtral").iterdir():
                (path / file.name).symlink_to(file)
        return captured(path, tmp_path / "a.h5", output=0, **options).model

    assert name(tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "fc7ac94") == (
        "mistralai/Mixtral-8x7B-v0.1"
    ), "the preset's 32 layers are not these 3"
    with pytest.raises(UsageError, match=r"has 3 MoE layers of 8 experts, but the model mixtral-8x7b has 32 of 8"):
        name(tmp_path / "again", model="mixtral-8x7b")


def test_prefill_only_and_cut_prompts(folder, tmp_path):
    trace = captured(folder("gpt-oss"), tmp_path / "a.h5", output=0, max_prompt=5)
    assert steps(trace) == [(4, 0), (5, 0), (5, 0)] and trace.source["prompts_cut"] == 2
    assert [rows["token"].tolist() for rows in by_request(trace)] == [ids[:5] for ids in prompts()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": -1}, "output is -1, but must be 0 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_prompt": 0}, "max_prompt is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_wrong_options_are_wrong_usage(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        captured(tmp_path, tmp_path / "a.h5", **options)


def test_too_long_for_the_model(folder, tmp_path):
    with pytest.raises(
        MoetraceError, match=r"the prompt of request 1 has 20 tokens, and with 120 of output goes beyond the 128"
    ):
        captured(folder("olmoe"), tmp_path / "a.h5", [[5], [7] * 20], output=120)


def test_unwritable_is_said_before_the_model_runs(tmp_path):
    with pytest.raises(MoetraceError, match="could not be written"):
        capture(tmp_path, tmp_path / "none", tmp_path / "missing" / "a.h5", Sampling(1))


def test_devices_that_are_not_there(folder, tmp_path):
    for device in ("abacus", "cuda:99", "meta"):
        with pytest.raises(MoetraceError, match=f"the device '{device}' can't be used"):
            captured(folder("olmoe"), tmp_path / "a.h5", device=device)
