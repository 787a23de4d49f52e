"""`moetrace list`: the presets, each with its main figures, and all other names, with their meanings."""

import itertools
import re
from collections.abc import Mapping, Sequence

import click

from moetrace.cli.tables.output import figure, format_option, print_rows, stdout_console

_HEADERS = {
    "models": {
        "name": "model",
        "layers": "layers",
        "experts": "experts",
        "top_k": "k",
        "weight_bits": "bits",
        "expert_mb": "expert\nMB",
        "experts_gb": "experts\nGB",
        "dense_gb": "dense\nGB",
    },
    "systems": {
        "name": "system",
        "gpu": "GPU",
        "gpus": "GPUs",
        "gpu_tflops": "TFLOP\n/s",
        "gpu_bandwidth_gb_s": "GB/s",
        "gpu_memory_gb": "GB",
        "units": "NDP\nunits",
        "unit_gmac_s": "GMAC/s\neach",
        "unit_bandwidth_gb_s": "GB/s\neach",
        "cpu_bandwidth_gb_s": "CPU\nGB/s",
        "link_gb_s": "link\nGB/s",
    },
    "policies": {
        "name": "policy",
        "placement": "placement",
        "schedule": "schedule",
        "dispatch": "dispatch",
        "residency": "residency",
        "prefetch": "prefetch",
        "scope": "scope",
        "meaning": "meaning",
    },
}

# Columns of policies, by whether they are of a cluster.
_POLICY_TABLES = {
    False: ("name", "placement", "dispatch", "residency", "prefetch", "scope"),
    True: ("name", "placement", "schedule"),
}

# Columns of systems that stay together where a terminal is too narrow for all: the GPU, the NDP units, the host.
_SYSTEM_GROUPS = (
    ("gpu", "gpus", "gpu_tflops", "gpu_bandwidth_gb_s", "gpu_memory_gb"),
    ("units", "unit_gmac_s", "unit_bandwidth_gb_s"),
    ("cpu_bandwidth_gb_s", "link_gb_s"),
)

# The choices -> the kind of their records: `FOLDERS` of spec.choices the other way, which `--help` would wait for.
_CHOICES = {"placements": "placement", "dispatches": "dispatch", "residencies": "residency", "prefetches": "prefetch"}
_OF_A_CHOICE = {
    "name": "name",
    "meaning": "meaning",
    "parameters": "parameters",
    "goes_with": "goes with",
    "used_by": "used by",
}

# Lists of other names -> their columns.
_NAMED = {
    "cache-policies": {"name": "name", "meaning": "meaning", "parameters": "parameters", "used_by": "used by"},
    "predictors": {"name": "name", "meaning": "meaning"},
    "profiles": {"name": "profile", "layers": "layers", "experts": "experts", "top_k": "k"}
    | {"model_top_k": "k of the\nmodel", "source": "fitted to"},
    "import-formats": {"name": "format", "meaning": "meaning"},
    "export-formats": {"name": "format", "endings": "files end with", "meaning": "meaning"},
}


@click.command("list")
@click.argument("kind", type=click.Choice([*_HEADERS, *_CHOICES, *_NAMED]), metavar="KIND")
@format_option
def command(kind: str, form: str) -> None:
    """List names with their meanings.

    \b
    KIND is one of
      models, systems, policies: the presets; `moetrace show` prints all of one;
      placements, dispatches, residencies, prefetches: the choices of a policy;
      cache-policies, predictors: of `moetrace analyze cache` and `prefetch`;
      profiles: what `moetrace generate` imitates;
      import-formats, export-formats: what `import` reads and `export` writes.
    """
    from moetrace.spec import list_presets

    if kind in _NAMED:
        print_rows(_NAMED[kind], _named_rows(kind), form)
        return
    if kind in _CHOICES:
        from moetrace.spec.choices import described

        print_rows(_OF_A_CHOICE, described(_CHOICES[kind]), form)
        return
    row_of = {"models": _model_row, "systems": _system_row, "policies": _policy_row}[kind]
    rows = [row_of(name) for name in list_presets(kind)]
    if kind == "systems" and form == "table":
        _print_systems(rows)
    elif kind == "policies" and form == "table":
        for own, columns in _POLICY_TABLES.items():  # policies of one GPU, then those of a cluster
            choices = {name: _HEADERS[kind][name] for name in columns}
            print_rows(choices, [row for row in rows if (row["schedule"] is not None) == own], form)
            stdout_console().print()
        print_rows({"name": "policy", "meaning": "meaning"}, rows, form)
    else:
        print_rows(_HEADERS[kind], rows, form)


def _named_rows(kind: str) -> Sequence[Mapping[str, object]]:
    if kind == "cache-policies":
        from moetrace.spec.choices import cache_policies, described

        return [row for name in cache_policies() for row in described("residency") if row["name"] == name]
    if kind == "profiles":
        from moetrace.generators import list_profiles

        return [_profile_row(name) for name in list_profiles()]
    if kind == "export-formats":
        from moetrace.exports import FORMATS

        return [{"name": name, "endings": " ".join(ends), "meaning": said} for name, (ends, said) in FORMATS.items()]
    from moetrace.analyze.prefetch.value import PREDICTORS
    from moetrace.importers import formats

    meanings = PREDICTORS if kind == "predictors" else formats.FORMATS
    return [{"name": name, "meaning": meaning} for name, meaning in meanings.items()]


def _profile_row(name: str) -> dict[str, object]:
    from moetrace.generators import load_profile, top_k_of
    from moetrace.generators.profile import source_of

    profile = load_profile(name)
    shape = {field: getattr(profile, field) for field in ("layers", "experts", "top_k")}
    return {"name": name, **shape, "model_top_k": top_k_of(profile), "source": source_of(name)}


def _print_systems(rows: list[dict[str, object]]) -> None:
    """Print a table in several parts if the width requires it: in one, the names of GPUs would break over lines."""
    from moetrace.cli.tables.parts import TextColumn, print_parts

    def column(key: str) -> TextColumn:
        is_text = key in ("name", "gpu")
        return TextColumn(_HEADERS["systems"][key], [figure(row[key]) for row in rows], right=not is_text)

    groups = [[column(key) for key in group] for group in _SYSTEM_GROUPS]
    print_parts(stdout_console(), [column("name")], groups)


def _model_row(name: str) -> dict[str, object]:
    from moetrace.spec import load_model

    model = load_model(name)
    expert_bytes = model.expert_bytes()
    return {
        "name": name,
        "layers": model.moe_layers,
        "experts": model.most_experts,
        "top_k": model.most_top_k,
        "weight_bits": model.weight_bits,
        "expert_mb": float(expert_bytes.max()) / 1e6,
        "experts_gb": float(expert_bytes.sum()) / 1e9,
        "dense_gb": (model.moe_layers * model.dense_bytes + model.head_bytes) / 1e9,
    }


def _system_row(name: str) -> dict[str, object]:
    from moetrace.spec import load_system

    system = load_system(name)
    ndp, link, cpu = system.ndp, system.link, system.cpu
    return {
        "name": name,
        "gpu": system.gpu.name,
        "gpus": system.cluster.all_gpus if system.cluster else 1,
        "gpu_tflops": system.gpu.tflops,
        "gpu_bandwidth_gb_s": system.gpu.bandwidth_gb_s,
        "gpu_memory_gb": system.gpu.memory_gb,
        "units": system.units,
        "unit_gmac_s": ndp and ndp.gmac_s,
        "unit_bandwidth_gb_s": ndp and ndp.bandwidth_gb_s,
        "cpu_bandwidth_gb_s": cpu and cpu.bandwidth_gb_s,
        "link_gb_s": link and link.bandwidth_gb_s,
    }


def _policy_row(name: str) -> dict[str, object]:
    from moetrace.spec import canonical, load_policy
    from moetrace.spec.named import preset_text

    comment = itertools.takewhile(lambda line: line.startswith("#"), preset_text("policies", name).splitlines())
    first = re.match(r".*?\.(?=\s|$)", " ".join(line.strip("# ") for line in comment))
    policy = load_policy(name)
    choices = {field: None if field in policy.unread else value for field, value in canonical(policy).items()}
    return {**choices, "meaning": first[0].removesuffix(".") if first else None}
