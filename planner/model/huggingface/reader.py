"""Reads a Hugging Face config.json into a ModelSpec, by the tables of the families.

A config is data from strangers: it is parsed as plain JSON, never imports transformers and never runs code.
Every fault is reported at its key, all at once. Keys that would change what a step costs and are not
modelled are refused; keys that are not part of the description are named in the model's sources.

Every architecture that is read, and the wrappers that hold one of them as their text part.

Finds in a config the part that describes the language model, and the family that reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from planner.foundation.decode import load_json_object, load_toml_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import nearest_names
from planner.model.huggingface.arithmetic import read_arithmetic
from planner.model.huggingface.classic import CLASSIC_FAMILIES
from planner.model.huggingface.dense import DENSE_FAMILIES
from planner.model.huggingface.experts import EXPERT_FAMILIES
from planner.model.huggingface.family import FULL, KEYS, Description, Family
from planner.model.huggingface.mixed import MIXED_FAMILIES
from planner.model.huggingface.segments import encoder, encoder_decoder
from planner.model.huggingface.values import (
    CHANGES_COST,
    CODE_KEYS,
    INERT,
    NOTED,
    Values,
    contradictions,
    lookup,
    show,
)
from planner.model.huggingface.variants import VARIANT_FAMILIES
from planner.model.spec import ModelSpec, Norm

_OWN = {
    **DENSE_FAMILIES,
    **VARIANT_FAMILIES,
    **CLASSIC_FAMILIES,
    **EXPERT_FAMILIES,
    **MIXED_FAMILIES,
}

FAMILIES: Mapping[str, Family] = MappingProxyType({**_OWN, "qwen2_5_vl_text": _OWN["qwen2_vl_text"]})
"""Every model_type that is read."""

WRAPPERS: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "llama4": "llama4_text",
        "mistral3": "mistral",
        "qwen2_vl": "qwen2_vl_text",
        "qwen2_5_vl": "qwen2_5_vl_text",
        "qwen3_vl": "qwen3_vl_text",
        "qwen3_vl_moe": "qwen3_vl_moe_text",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "llava": "llama",
        "llava_next": "llama",
        "llava_next_video": "llama",
        "llava_onevision": "qwen2",
        "video_llava": "llama",
        "vipllava": "llama",
        "idefics3": "llama",
        "smolvlm": "llama",
        "internvl": "qwen2",
        "paligemma": "gemma",
        "aya_vision": "cohere2",
        "kimi_k25": "kimi_k2",
    }
)
"""Multimodal model_types, and the text model that they hold where they do not name it."""

TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""Keys under which wrappers hold their text model."""


@frozen
class TextPart:
    """The text model of a config: its table, its family, and the path that errors begin with.

    `nested` tables are read with the class's defaults where keys are absent, as wrappers are published;
    `wrapped` says that a wrapper holds it, nested or beside its own keys.
    """

    config: Mapping[str, Any]
    family: Family
    model_type: str
    where: str
    nested: bool = False
    wrapped: bool = False
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def locate(config: Mapping[str, Any], source: str, arch: str | None) -> TextPart:
    """The text model of `config`. Raises InputError where its architecture is not known."""
    own = config.get("model_type")
    inner = None if isinstance(own, str) and own in FAMILIES else _inner(config)
    wrapper = isinstance(own, str) and own in WRAPPERS
    notes: tuple[str, ...] = (
        () if arch is None else (f"read as {arch}, as --arch says; its own model_type is {show(own)}",)
    )
    if arch is not None and any(config.get(key) for key in CODE_KEYS):
        notes += ("code that the config names was not run",)
    if inner is None:
        model_type = _chosen(arch, WRAPPERS[str(own)] if wrapper else own, f"{source}: ")
        notes += _vision(own) if wrapper else ()
        return _part(config, model_type, f"{source}: ", notes=notes, wrapped=wrapper)
    name, table = inner
    where = f"{source}: {name}."
    text_type = table.get("model_type") or (WRAPPERS[str(own)] if wrapper else None)
    if isinstance(text_type, str):
        text_type = WRAPPERS.get(text_type, text_type)
    model_type = _chosen(arch, text_type, where)
    problems = () if arch else _code(config, source)
    return _part(
        _with_tie(config, table), model_type, where, nested=True, wrapped=True, problems=problems,
        notes=(*notes, *_vision(own), *_quantised(config)),
    )  # fmt: skip


def _part(config: Mapping[str, Any], model_type: str, where: str, **rest: Any) -> TextPart:
    return TextPart(config=config, family=FAMILIES[model_type], model_type=model_type, where=where, **rest)


def _vision(own: object) -> tuple[str, ...]:
    return (f"the text model of {show(own)}; what reads images, video or sound is not counted",)


def _quantised(config: Mapping[str, Any]) -> tuple[str, ...]:
    if not config.get("quantization_config"):
        return ()
    return ("published with quantised weights; training starts from dequantised ones",)


def _inner(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The nested text model of a wrapper, with its key."""
    for name in TEXT_PARTS:
        table = config.get(name)
        if isinstance(table, Mapping):
            return name, table
    return None


def _with_tie(config: Mapping[str, Any], table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nested table; where it does not say whether embeddings are tied, the wrapper does."""
    tie = "tie_word_embeddings"
    return {**table, tie: config[tie]} if tie in config and tie not in table else table


def _code(config: Mapping[str, Any], source: str) -> tuple[Problem, ...]:
    return tuple(
        Problem(
            where=f"{source}: {key}",
            fault="says that code defines this model; code from a config is never run.",
            fix="if the text model's architecture is known, name it with --arch, or remove the key",
        )
        for key in CODE_KEYS
        if config.get(key)
    )


def _chosen(arch: str | None, model_type: object, where: str) -> str:
    """The family to read by: `arch` if given, else the config's own. Raises InputError if it is unknown."""
    if arch is not None:
        known = WRAPPERS.get(arch, arch)
        if known in FAMILIES:
            return known
        raise _unknown("--arch", arch, "")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    if model_type is None:
        raise InputError(Problem(where=f"{where}model_type", fault="is missing.", legal=_listed([])))
    raise _unknown(f"{where}model_type", model_type, "; or --arch NAME reads it as a known one")


def _unknown(where: str, model_type: object, more: str) -> InputError:
    near = nearest_names(str(model_type)[:60], [*FAMILIES, *WRAPPERS]) if isinstance(model_type, str) else []
    return InputError(
        Problem(
            where=where,
            fault=f"{show(model_type)} is no architecture that is known.",
            legal=_listed(near),
            fix=(f"did you mean '{near[0]}'" if near else "name the architecture") + more,
        )
    )


def _listed(near: list[str]) -> str:
    """The names that are near, or else the first, and how many there are."""
    return ", ".join(near or list(FAMILIES)[:12]) + f", ... ({len(FAMILIES)} in all)"


MAX_CONFIG_BYTES = 4 * 1024 * 1024
"""Published configs are a few KiB; larger files are refused before they are read."""

TYPO_LIKENESS = 0.85
"""An unread key that is this like an absent one is taken for its misspelling."""

MAX_COMPARED_KEYS = 200
"""Misspellings are looked for among this many keys: comparing takes time, and configs have some fifty."""


def read_config_file(
    path: Path, name: str | None = None, sources: tuple[str, ...] = (), arch: str | None = None
) -> ModelSpec:
    """The model in a config.json, or in the folder that holds one. Raises InputError with every fault."""
    file = path / "config.json" if path.is_dir() else path
    config = load_json_object(file, MAX_CONFIG_BYTES)
    own_name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return read_config(
        config, source=str(file), name=name or own_name, sources=sources or (file.name,), arch=arch
    )


def read_model_toml(path: Path, arch: str | None = None) -> ModelSpec:
    """The model in a TOML file: the keys of config.json, `name` and `sources`, and no others."""
    table = load_toml_object(path, MAX_CONFIG_BYTES)
    problems = []
    name, sources = table.pop("name", path.stem), table.pop("sources", [path.name])
    if not isinstance(name, str):
        problems.append(Problem(where=f"{path}: name", fault="is not a text."))
    if not isinstance(sources, list) or not all(isinstance(item, str) for item in sources):
        problems.append(Problem(where=f"{path}: sources", fault="is not a list of texts."))
    part = locate(table, str(path), arch)
    known = _tops(part.family.all_names) | INERT | part.family.inert | _tops(NOTED)
    for key in part.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean '{near[0]}'" if near else ""
            problems.append(Problem(where=f"{part.where}{key[:60]}", fault="unknown key.", fix=fix))
    if problems:
        raise InputError(*problems)
    return read_config(table, source=str(path), name=name, sources=tuple(sources), arch=arch)


def read_config(
    config: Mapping[str, Any],
    *,
    source: str,
    name: str,
    sources: tuple[str, ...] = (),
    arch: str | None = None,
) -> ModelSpec:
    """The model that a parsed config describes; `arch` names its family whatever model_type it has.

    Raises InputError with every fault and its path.
    """
    part = locate(config, source, arch)
    family, values = part.family, Values(part.config, part.where)
    problems = [*part.problems, *_refusals(part, arch is not None)]
    described = _described(part, values)
    problems += [*values.problems, *_misspelt(part)]
    if not problems:
        description = Description(**{**family.fixed, **described, **_derived(described)})
        problems = [_contradiction(part, *fault) for fault in contradictions(description, family)]
    if problems:
        raise InputError(*problems)
    notes = (*sources, *part.notes, *_notes(part))
    spec = _spec(description, family, name[:100], part.model_type, notes)
    arithmetic = read_arithmetic(values, part.model_type, description, spec.segments)
    if values.problems:
        raise InputError(*values.problems)
    return dataclasses.replace(spec, arithmetic=arithmetic)


def _contradiction(part: TextPart, fact: str, fault: str, legal: str) -> Problem:
    """At the key that the config has, or else at the usual one, whose default it is."""
    names = part.family.names_of(fact)
    own = next((name for name in names if lookup(part.config, name) is not None), None)
    if own is None:
        derived = part.family.defaults.get(fact) is None
        fault += " The key is absent: this is " + ("derived." if derived else "the class's default.")
    return Problem(where=f"{part.where}{own or names[0]}", fault=fault, legal=legal)


def _described(part: TextPart, values: Values) -> dict[str, Any]:
    """The value of every fact that the family reads; checks what only one value of is described."""
    family, read = part.family, {}
    _tables(part, values)
    for fact, default in family.defaults.items():
        names = family.names_of(fact)
        if _is_needed(part, fact) and all(lookup(part.config, name) is None for name in names):
            values.problems.append(_missing(part, names[0]))
            continue
        read[fact] = values.read(KEYS[fact], names, default)
    for name, (only, reason) in family.only.items():
        value = lookup(part.config, name)
        if value is not None and value != only:
            values.fault(name, f"is {show(value)}: {reason}.", show(only))
    return read


def _is_needed(part: TextPart, fact: str) -> bool:
    return KEYS[fact].needed and not part.nested and fact not in part.family.needless


def _derived(described: Mapping[str, Any]) -> dict[str, Any]:
    """An embedding of the model's own width is no projection; a norm may go without its parameters."""
    derived: dict[str, Any] = {}
    if described.get("embedding_width") == described["hidden"]:
        derived["embedding_width"] = None
    if not described.get("affine", True):
        derived["norm"] = Norm.LAYERNORM_WITHOUT_PARAMETERS
    return derived


def _tables(part: TextPart, values: Values) -> None:
    """Faults of keys that should hold a table of others, such as rope_parameters."""
    dotted = [name for name in (*part.family.all_names, *NOTED) if "." in name]
    for parent in dict.fromkeys(name.split(".")[0] for name in dotted):
        value = part.config.get(parent, {})
        if not isinstance(value, (dict, type(None))):
            values.fault(parent, f"is {show(value)}.", "a table")


def _refusals(part: TextPart, arch_given: bool) -> list[Problem]:
    """Problems of keys that point at code, or that change the cost in a way that is not modelled."""
    config, read = part.config, _tops(part.family.all_names) | part.family.inert
    problems = []
    for key in CODE_KEYS:
        if config.get(key) and not arch_given:
            problems.append(
                Problem(
                    where=f"{part.where}{key}",
                    fault="says that code defines this model; code from a config is never run.",
                    fix=f"if the architecture is exactly {part.model_type}, say --arch {part.model_type} "
                    "or remove the key",
                )
            )
    for key, reason in CHANGES_COST.items():
        switched_off = key == "sliding_window" and config.get("use_sliding_window") is False
        flat = part.wrapped and key in ("vision_config", "audio_config")
        if key not in read and config.get(key) and not switched_off and not flat:
            problems.append(Problem(where=f"{part.where}{key}", fault=f"is set: {reason}."))
    layer_types = config.get("layer_types") or []
    if "layer_types" not in read and (
        not isinstance(layer_types, list) or any(kind != FULL for kind in layer_types)
    ):
        fault = "names other than full attention, which this family does not have."
        problems.append(Problem(where=f"{part.where}layer_types", fault=fault))
    return problems


def _tops(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _missing(part: TextPart, key: str) -> Problem:
    names = [name[:100] for name in list(part.config)[:MAX_COMPARED_KEYS] if name != key]
    near = difflib.get_close_matches(key, names, n=1)
    fix = f"is '{near[0][:60]}' a misspelling" if near else ""
    return Problem(where=f"{part.where}{key}", fault="is missing.", fix=fix)


def _misspelt(part: TextPart) -> list[Problem]:
    """Problems of keys that no family knows but that look like an optional key that is absent."""
    unread = _unread(part)[:MAX_COMPARED_KEYS]
    if not unread:
        return []
    known = {name for other in FAMILIES.values() for name in (*other.all_names, *other.inert)}
    family = part.family
    all_names = [family.names_of(fact) for fact in family.defaults if not _is_needed(part, fact)]
    absent = [names[0] for names in all_names if all(lookup(part.config, name) is None for name in names)]
    problems = []
    for key in unread:
        near = difflib.get_close_matches(key[:100], absent, n=1, cutoff=TYPO_LIKENESS)
        if near and key not in known:
            where = f"{part.where}{key[:60]}"
            problems.append(Problem(where=where, fault="unknown key.", fix=f"did you mean '{near[0]}'"))
    return problems


def _unread(part: TextPart) -> list[str]:
    family = part.family
    known = _tops(family.all_names) | family.inert | family.noted.keys() | INERT | _tops(NOTED)
    known |= {*CHANGES_COST, *CODE_KEYS, "layer_types"}
    return [str(key) for key, value in part.config.items() if key not in known and _says(value)]


def _says(value: Any) -> bool:
    """Whether a value says anything: null, false, nothing and empty do not."""
    return value is not None and value is not False and value not in ("", [], {})


def _notes(part: TextPart) -> tuple[str, ...]:
    """What the config says that the ModelSpec does not: it does not change the cost, and is not hidden."""
    notes = [part.family.remark] if part.family.remark else []
    for key, (harmless, note) in {**NOTED, **part.family.noted}.items():
        value = lookup(part.config, key)
        if value is not None and value != harmless:
            notes.append(note.format(value=show(value)))
    left = _left_to_the_class(part)
    if left:
        notes.append("not in the config, as the class has it: " + ", ".join(left))
    unread = [] if part.wrapped and not part.nested else _unread(part)
    if unread:
        more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
        notes.append("keys not read: " + ", ".join(key[:40] for key in unread[:10]) + more)
    return tuple(notes)


def _left_to_the_class(part: TextPart) -> list[str]:
    """Needed keys that the config does not have, with the class's value."""
    defaults = part.family.defaults
    absent = [
        (part.family.names_of(fact)[0], value)
        for fact, value in defaults.items()
        if KEYS[fact].needed and all(lookup(part.config, name) is None for name in part.family.names_of(fact))
    ]
    return [f"{name} = {value}" for name, value in absent if value]


def _spec(d: Description, family: Family, name: str, model_type: str, sources: tuple[str, ...]) -> ModelSpec:
    segments = family.build(d, family)
    stacks = 0 if family.build is encoder else 2 if family.build is encoder_decoder else 1
    return ModelSpec(
        name=name,
        model_type=model_type,
        hidden=d.hidden,
        vocab=d.vocab,
        max_positions=max(1, d.max_positions - d.reserved_positions),
        learned_positions=d.max_positions + d.extra_positions if d.learned_positions else 0,
        rope_theta=d.rope_theta,
        norm=d.norm,
        norm_eps=d.norm_eps,
        initializer_range=d.initializer_range,
        tied_embeddings=d.tied,
        segments=segments,
        sources=sources,
        embedding_width=d.embedding_width,
        embedding_norm=d.embedding_norm,
        token_types=d.token_types,
        head_bias=d.head_bias,
        pooler=d.pooler,
        final_norms=stacks if d.norm_first and not d.no_final_norm else 0,
        encoder_layers=d.layers if family.build is encoder_decoder else 0,
    )
