"""Builds the model that a command line names, and inputs for it: `package.module:factory` or `hf:type,key=value…`."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler.errors import AttnError, MissingPackageError, ShapeError, did_you_mean

_ALWAYS = ("attn_implementation", "torch_dtype")  # every configuration takes these, none shows them
FORMS = "`package.module:factory` or `hf:type,key=value…`"


class ModelError(AttnError, ValueError):
    """A model that was named on the command line cannot be built."""


@dataclass(frozen=True)
class Asked:
    """What a command line says about the inputs."""

    length: int = 1024
    batch: int = 1
    implementation: str | None = None
    train: bool = False
    weights: bool = False  # whether models that are only described get any, random ones


@dataclass(frozen=True)
class Built:
    """A model and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> str:
        """What it is called with, as a message says it."""
        named = [*((str(number), x) for number, x in enumerate(self.args)), *self.kwargs.items()]
        said = [f"{name}: {x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"{name}: {x!r:.40}" for name, x in named]
        return f"its inputs ({', '.join(said).replace('torch.', '')})"


def build(source: str, asked: Asked) -> Built:
    """Build a model by its name on the command line."""
    if source.startswith("hf:"):
        return _from_transformers(source, asked)
    if ":" in source:
        return _from_factory(source, asked)
    raise ModelError(f'"{source}" names no model; write {FORMS}')


def _from_factory(source: str, asked: Asked) -> Built:
    """A function without arguments that returns a model, or a model with its arguments (a tuple) or keywords (a mapping)."""
    where, _, name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    if not all(part.isidentifier() for part in where.split(".")):
        raise ModelError(f'"{source}": "{where}" is no name of a module; write {FORMS}')
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise ModelError(f'"{source}": there is no module "{error.name}"; it is searched for from this folder on') from error
    except (ImportError, SyntaxError) as error:
        raise ModelError(f'"{source}": {where} cannot be imported: {type(error).__name__}: {error}') from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ModelError(f'"{source}": {where} has no function "{name}"{did_you_mean(name, known)}')
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(f'"{source}" is called without arguments: {error}') from error
    made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f'"{source}" returned {type(model).__name__}; expected a module, or (module, inputs)')
    model.train(asked.train)
    if inputs is None:
        return Built(model, (), inputs_of(model, asked))
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    kwargs = inputs if isinstance(inputs, Mapping) else {}
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(f'"{source}" returned inputs that its model does not take: {error}') from error
    return Built(model, args, kwargs)


def _from_transformers(source: str, asked: Asked) -> Built:
    """A model of random weights, as its configuration describes it; on the meta device unless weights are asked for."""
    transformers = _transformers()
    kind, _, overrides = source.removeprefix("hf:").partition(",")
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind not in known:
        raise ModelError(f'"{source}": transformers knows no model type "{kind}"{did_you_mean(kind, known)}')
    settings = dict(_overrides(source, overrides))
    if asked.implementation:
        settings["attn_implementation"] = asked.implementation
    config = _config(source, transformers.CONFIG_MAPPING[kind], settings)
    make = _model_class(transformers, kind)
    if make is None:
        raise ModelError(f'"{source}": transformers has no model class for "{kind}"')
    with torch.device("cpu" if asked.weights else "meta"):
        model = make(config)
    model.train(asked.train)
    return Built(model, (), inputs_of(model, asked))


def _config(source: str, make: Callable[..., Any], settings: Mapping[str, object]) -> Any:
    """The configuration; transformers itself would keep a misspelt key and say nothing."""
    from huggingface_hub.errors import StrictDataclassError  # transformers brings it along

    plain = make()
    known = [name for name in vars(plain) if not name.startswith("_")]
    for key in settings:
        if key not in _ALWAYS and not hasattr(plain, key):
            raise ModelError(f'"{source}": this configuration has no "{key}"{did_you_mean(key, known)}')
    try:
        return make(**settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f'"{source}" is no configuration: {error}') from error


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingPackageError("models named `hf:…` need the package transformers: pip install transformers") from error


def _model_class(transformers: ModuleType, kind: str) -> Callable[[Any], nn.Module] | None:
    """The class a configuration is for: a language model where there is one."""
    modeling = importlib.import_module("transformers.models.auto.modeling_auto")
    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", ""):
        names = getattr(modeling, f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES")
        if kind in names:
            name = names[kind]
            found: Callable[[Any], nn.Module] = getattr(transformers, name if isinstance(name, str) else name[0])
            return found
    return None


def _overrides(source: str, text: str) -> Iterator[tuple[str, object]]:
    for part in _split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise ModelError(f'"{source}": expected key=value, found "{part}"')
        try:
            yield key.strip(), ast.literal_eval(value)
        except (ValueError, SyntaxError):
            yield key.strip(), value.strip()


def _split(text: str) -> Iterator[str]:
    """Split at the commas that stand outside of brackets."""
    depth, start = 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "[({") - (sign in "])}")
        if sign == "," and not depth:
            yield text[start:at]
            start = at + 1
    if text[start:].strip():
        yield text[start:]


def _vocabulary(config: Any) -> int:
    """How many tokens there are."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", None) or 2)


def inputs_of(model: nn.Module, asked: Asked) -> dict[str, Any]:
    """Inputs of the kind a transformers model says it reads."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} says nothing about its inputs: let the factory return (model, inputs)")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    main = getattr(model, "main_input_name", "input_ids")
    drawn = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        return {main: torch.randn(asked.batch, *_image(config), generator=drawn).to(device)}
    tokens, others = torch.randint(_vocabulary(config), (2, asked.batch, asked.length), generator=drawn).to(device)
    if main != "input_ids":
        raise ModelError(f"{type(model).__name__} reads `{main}`; write a factory that returns (model, inputs)")
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and asked.length > limit:
        raise ShapeError(f"this model has {limit} positions; give --length {limit} or less, or max_position_embeddings=…")
    if getattr(config, "is_encoder_decoder", False):
        return {main: tokens, "decoder_input_ids": others, "use_cache": False}
    return {main: tokens} | ({"use_cache": False} if hasattr(config, "use_cache") else {})


def _image(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(vision, "num_channels", 3), height, width
