"""Routers: what a model returns in their place is refused in a sentence, and they are read once a pass."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moetrace.capture.routers import Recorder, find_routers  # noqa: E402
from moetrace.spec.errors import MoetraceError  # noqa: E402


def network(name: str, output, layers: int = 2, **attributes):
    """A module with a router of class `name` in each layer that returns `output`."""

    def forward(self, x):
        return output() if callable(output) else output

    kind = type(name, (torch.nn.Module,), {"forward": forward})

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = kind()
            for key, value in ({"num_experts": 4, "top_k": 2} | attributes).items():
                setattr(self.gate, key, value)
            self.experts = torch.nn.Identity()

        def forward(self, x):
            self.gate(x)
            return x

    class FakeModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(layers)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return FakeModel()


def routed(rows=3, ids=((0, 3), (1, 2), (3, 0)), weight=0.5):
    return torch.zeros(rows, 4), torch.full((len(ids), 2), weight), torch.tensor(ids)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(3, 4), "returned a Tensor, not"),
        (routed()[:2], "returned 2 values"),
        ((*routed(), None), "returned 4 values"),
        ((routed()[0], routed()[2], routed()[1]), "returned ids as torch.float32"),
        ((None, None, None), "returned the shapes"),
        ((torch.zeros(3, 5), *routed()[1:]), r"returned the shapes \(3, 5\)"),
        (routed(rows=2), r"returned the shapes \(2, 4\)"),
        (routed(ids=((0, 4), (1, 2), (0, 1))), "chose expert 4, but there are 4"),
        (routed(ids=((0, -1), (1, 2), (0, 1))), "chose expert -1"),
        (routed(ids=((0, 1), (2, 2), (0, 1))), "chooses expert 2 more than once"),
        (routed(weight=float("nan")), "the weight nan"),
        (routed(weight=1e6), "the weight 1000000.0"),
        (routed(rows=1, ids=((0, 1),)), "chose for 1 rows, not 3"),
    ],
)
def test_a_router_that_returns_something_else_is_refused(output, words):
    model = network("OddTopKRouter", output)
    with pytest.raises(MoetraceError, match=words), Recorder(find_routers(model)) as recorder:
        model(torch.zeros(3, 8))
        recorder.take(3)
    assert not any(module._forward_hooks for module in model.modules()), "hooks go, whatever happens"


def test_a_router_runs_once_a_pass():
    model = network("OddTopKRouter", routed())
    with Recorder(find_routers(model)) as recorder:
        model(torch.zeros(3, 8))
        with pytest.raises(MoetraceError, match="ran twice in one pass"):
            model(torch.zeros(3, 8))
    with Recorder(find_routers(model)) as recorder:
        model.layers[1](torch.zeros(3, 8))
        with pytest.raises(MoetraceError, match=r"OddTopKRouter \(layers\.0\.gate\) did not run"):
            recorder.take(3)


def test_copies_are_taken_before_the_model_goes_on():
    weights, ids = torch.full((1, 2), 0.5), torch.tensor([[0, 1]])
    model = network("OddTopKRouter", (torch.zeros(1, 4), weights, ids), layers=1)
    with Recorder(find_routers(model)) as recorder:
        model(torch.zeros(1, 8))
        weights.zero_()
        ids.zero_()
        choices = recorder.take(1)
    assert choices.experts.tolist() == [[[0, 1]]] and choices.gates.tolist() == [[[0.5, 0.5]]]


def test_models_that_no_trace_can_hold_are_refused():
    with pytest.raises(MoetraceError, match=r"FakeModel routes with OddRouter \(layers\.0\.gate\), which"):
        find_routers(network("OddRouter", None))
    with pytest.raises(MoetraceError, match="does not say num_experts and top_k"):
        find_routers(network("OddTopKRouter", None, top_k=None))
    model = network("OddTopKRouter", None)
    model.layers[1].gate.top_k = 1
    with pytest.raises(MoetraceError, match=r"chooses 1 of 4 experts, but .* 2 of 4"):
        find_routers(model)
    model = network("OddTopKRouter", None)
    model.layers[1].other = model.layers[0].gate.__class__()
    model.layers[1].other.num_experts, model.layers[1].other.top_k = 4, 2
    with pytest.raises(MoetraceError, match="two routers in layer 1"):
        find_routers(model)
    model = network("OddTopKRouter", None)
    model.tower = network("OddTopKRouter", None)
    with pytest.raises(MoetraceError, match=r"two stacks of layers, layers and tower\.layers"):
        find_routers(model)
    model = network("OddTopKRouter", None)
    model.gate = model.layers[0].gate.__class__()
    with pytest.raises(MoetraceError, match=r"\(gate\) is not in one numbered layer"):
        find_routers(model)
