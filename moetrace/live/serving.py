"""A server's description of itself: its engine, the version, and the name of its model."""

from typing import NamedTuple

import msgspec

from moetrace.live.exchange import Client, RequestError
from moetrace.spec.errors import MoetraceError, UsageError, printable

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
_MOST_BYTES = 4 << 20
_NAME = 300


class _Card(msgspec.Struct):
    id: str
    owned_by: str = ""


class _Cards(msgspec.Struct):
    """The answer to `/v1/models`; both engines put their own name into `owned_by`."""

    data: list[_Card]


class _About(msgspec.Struct):
    """From vLLM's `/version` and SGLang's `/server_info`; their other fields (keys among them) are not read."""

    version: str = ""
    enable_return_routed_experts: bool | None = None


class Served(NamedTuple):
    """An engine with a model."""

    engine: str  # one of ENGINES
    model: str  # the name by which it is asked for
    version: str  # "" if the server does not say it


def served(client: Client, engine: str | None = None, model: str | None = None) -> Served:
    """The engine of the server, unless the user names it.

    Raises RequestError if it can't be reached, UsageError if it does not say what it is, or has no model of that name,
    and MoetraceError if it says that it does not return routing.
    """
    if engine is None or model is None:
        cards = _cards(client)
        names = [card.id for card in cards]
        if model is not None and model not in names:
            raise UsageError(f"{client.address} serves no {model!r}, but {', '.join(names)[:_NAME]}.")
        card = next(card for card in cards if model in (None, card.id))
        model = card.id
        if engine is None and card.owned_by not in ENGINES:
            owner = card.owned_by[:_NAME]
            raise UsageError(
                f"{client.address} does not say which engine it is (its models are owned by {owner!r}): give --engine "
                f"vllm or --engine sglang."
            )
        engine = engine or card.owned_by
    about = _about(client, ("/version",) if engine == "vllm" else ("/server_info", "/get_server_info"))
    if about.enable_return_routed_experts is False:
        raise MoetraceError(f"{client.address} runs without --enable-return-routed-experts: start it with that option.")
    return Served(engine, model, printable(about.version[:100]))


def _cards(client: Client) -> list[_Card]:
    try:
        cards = msgspec.json.decode(client.get("/v1/models", _MOST_BYTES), type=_Cards).data
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        cards = []
    if not cards or not cards[0].id or len(cards[0].id) > _NAME:
        raise UsageError(f"{client.address}/v1/models lists no model: give --engine and --served-model.")
    return cards


def _about(client: Client, paths: tuple[str, ...]) -> _About:
    """The answer of one of the paths; older versions, and routers before a server, may lack all."""
    for path in paths:
        try:
            return msgspec.json.decode(client.get(path, _MOST_BYTES), type=_About)
        except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
    return _About()
