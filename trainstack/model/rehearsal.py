"""Whether a model can be trained as configured: a small copy of it is, for a step, on a CPU.

What it finds is said before the queue, and whether the weights have the shapes that the real model
has. It cannot find out about their values, about memory and about the kernels of a GPU, which is
said too.
"""

import bisect
import contextlib
import importlib.util
import inspect
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainstack.config.schema import Config
from trainstack.errors import ConfigError, first_words
from trainstack.model.causal_lm import (
    build_causal_lm,
    check_weights,
    count_parameters,
    notes_on,
    quantisation,
)
from trainstack.model.loss import CausalLMLoss
from trainstack.model.small_copy import small_configs
from trainstack.model.trial import TOKENS, some_tokens

MOST_PARAMETERS = 110e6  # of a small copy; with its gradients in fp32 that is 0.9 GB
MOST_TOKENS = 4096  # of a sequence that is tried whole
CPU = torch.device("cpu")
GENERATES = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
LIMITS = ("max_position_embeddings", "max_seq_len", "context_length")  # names of config.json
WAYS_OUT = (  # settings that may help
    ("model", "attn_implementation", "auto"),
    ("train", "activation_checkpointing", False),
    ("train", "precision", "fp32"),
    ("data", "packing", "none"),
    ("data", "packing", "concat"),
)


@dataclass
class Rehearsal:
    """What was found out: lines for people, and how many parameters the real model has."""

    parameters: int
    notes: list[str]


def rehearse(folder: Path, config: Config) -> Rehearsal:
    """Try what a run of this configuration would do with the model in ``folder``.

    ConfigError, in one line, if it cannot be trained like this. Touches no network.
    """
    transformers.logging.set_verbosity_error()  # what matters is said in our lines
    transformers.logging.disable_progress_bar()
    try:
        real = read_config(folder)
        check_kind(real, config.model.init)
        check_flash(real, config)
        whole = build_whole(real)
        if type(whole.config) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(
                f"its part for text alone ({whole.config.model_type}) is saved as a model that "
                "transformers does not load as a causal LM; choose another model"
            )
        small, reason = small_copy(real)
        notes = checked(small, config) if small else [f"no small copy could be tried ({reason})"]
        notes += check_weights(folder, whole) if config.model.init == "pretrained" else []
        notes += notes_on(whole, folder)
    except ConfigError as error:
        name = config.model.name
        raise ConfigError(f"model {name} cannot be trained as configured: {error}") from None
    if type(whole.config) is not type(real):
        notes.append(f"only its part for text is trained and saved, as {type(whole).__name__}")
    if quantisation(real):
        notes.append("its config.json says that it is quantised; from scratch it is not")
    return Rehearsal(count_parameters(whole), notes)


def read_config(folder: Path) -> Any:
    """The configuration of a model as transformers reads it; no code of others is run."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class of that configuration raises
        raise ConfigError(
            f"transformers {transformers.__version__} cannot read its config.json "
            f"({first_words(error)}); choose another model"
        ) from None


def check_kind(real: Any, init: str) -> None:
    """ConfigError if this is no decoder-only language model, or its weights cannot be trained."""
    named = " ".join([real.model_type, *(f"({name})" for name in real.architectures or [])])
    other = [name for name in real.architectures or [] if not generates(name, real, init)]
    problem, fix = None, "choose a causal LM such as Llama or Qwen"
    if real.is_encoder_decoder:
        problem = "is an encoder-decoder model, and only decoder-only ones are trained here"
    elif type(real) not in AutoModelForCausalLM._model_mapping:
        problem = "is no causal LM: transformers has none for it"
        if real.sub_configs:
            problem = "is made of several parts, and transformers has no causal LM of its text part"
            fix = "choose the text-only model that it was made from"
    elif other:
        problem = f"is no causal LM: {other[0]} has another head, or none"
        fix = "choose the model that it was made from"
    elif init == "pretrained" and quantisation(real):
        problem = f"has quantised weights ({quantisation(real)}), which cannot be trained"
        fix = "name a repository that has them in bf16 or fp32"
    if problem:
        raise ConfigError(f"{named} {problem}; {fix}")


def generates(architecture: str, real: Any, init: str) -> bool:
    """Whether a class that a config.json names is a language model, or one without its head."""
    known = getattr(transformers, architecture, None)
    if known is None:
        return bool(GENERATES.search(architecture))
    is_bare = architecture == type(real).__name__.replace("Config", "Model")
    has_head = init == "scratch" or getattr(real, "tie_word_embeddings", False)
    return (is_bare and has_head) or issubclass(known, transformers.GenerationMixin)


def check_flash(real: Any, config: Config) -> None:
    """ConfigError if flash attention is asked for and cannot be."""
    if config.model.attn_implementation != "flash_attention_2":
        return
    problem = None
    if not AutoModelForCausalLM._model_mapping[type(real)]._supports_flash_attn:
        problem = f"{real.model_type} does not have it"
    elif importlib.util.find_spec("flash_attn") is None:
        problem = "the package flash-attn is not installed"
    elif config.train.precision not in ("bf16", "fp16"):
        problem = f"it knows no {config.train.precision}, only bf16 and fp16"
    if problem:
        raise ConfigError(
            f"model.attn_implementation=flash_attention_2: {problem}; write "
            "model.attn_implementation=auto"
        )


def build_whole(real: Any) -> nn.Module:
    """The real model without memory for its weights (on torch's device meta)."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(real, dtype=torch.float32)
    except Exception as error:  # whatever the model's class raises
        what, fix = "transformers builds no model from its config.json", "choose another model"
        if isinstance(error, ImportError):
            what, fix = "a package that it needs is missing", "install it into the environment"
        raise ConfigError(f"{what} ({first_words(error)}); {fix}") from None


def small_copy(real: Any) -> tuple[Any, str]:
    """The configuration of a small copy that runs; or None, and why there is none.

    ConfigError if a copy fails that differs from the model in its vocabulary alone.
    """
    reasons = []
    for values in small_configs(real.to_dict()):
        try:
            small = type(real).from_dict(values)
            size = count_parameters(build_whole(small)) / 1e6
            if size > MOST_PARAMETERS / 1e6:
                reasons.append(f"the smallest has {size:,.0f}M parameters")
                continue
            with torch.no_grad():
                causal_lm = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
                logits_of(causal_lm, some_tokens(causal_lm, TOKENS))
            return small, ""
        except Exception as error:  # its code may not go with what was made smaller
            reasons.append(first_words(error))
    if not reasons[-1].startswith("the smallest has"):
        raise ConfigError(f"its own code fails with text ({reasons[-1]}); choose another model")
    return None, reasons[0]


def checked(small: Any, config: Config) -> list[str]:
    """What a small copy shows; ConfigError if it cannot be trained as configured."""
    causal_lm = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    check_future(causal_lm)
    notes = check_positions(causal_lm, config.data.seq_len)
    tried = config
    if config.model.attn_implementation == "flash_attention_2":
        tried = changed(config, "model", "attn_implementation", "auto")
    try:
        attention, lines = step(small, tried)
    except Exception as error:  # of the model's code, of torch, of ours
        reason = str(error) if isinstance(error, ConfigError) else first_words(error)
        ways = " or ".join(ways_out(small, tried))
        if ways:
            reason = f"{reason.partition('; ')[0]}; write {ways}"
        elif not isinstance(error, ConfigError):
            reason = f"{reason}; choose another model"
        raise ConfigError(reason) from None
    untried = "the values of real weights, memory, the kernels of a GPU"
    untried += ", torch_compile" if config.train.torch_compile else ""
    untried += "" if tried is config else ", flash attention"
    parts = [attention, config.train.precision, f"packing {config.data.packing}"]
    summary = f"a small copy of it learns with {', '.join(parts)}; not tried: {untried}"
    return [summary, *notes, *lines]


def step(small: Any, config: Config) -> tuple[str, list[str]]:
    """Forward and backward pass of a small copy, as a run would make them.

    Returns the attention that it has, and what was logged.
    """
    train = config.train.model_copy(update={"torch_compile": False})
    with tempfile.TemporaryDirectory() as folder, logged() as lines:
        small.save_pretrained(folder)
        causal_lm = build_causal_lm(
            Path(folder), "scratch", config.model, train.precision, config.run.seed
        )
        loss_model = CausalLMLoss(causal_lm, train, CPU, config.data.packing)
        loss_model.train()
        positions = None
        if config.data.packing != "concat":
            positions = torch.arange(TOKENS).remainder(TOKENS // 2).repeat(2, 1)
        tokens = some_tokens(causal_lm, TOKENS).repeat(2, 1)
        loss = loss_model(tokens, tokens.roll(-1), positions)
        loss.backward()
    if not loss.isfinite():
        raise ConfigError("its loss is not finite at the first step; choose another model")
    return f"{causal_lm.config._attn_implementation} attention", [*lines]


def ways_out(small: Any, config: Config) -> list[str]:
    """The settings of which one alone lets a small copy be trained."""
    found = []
    for section, key, value in WAYS_OUT:
        if getattr(getattr(config, section), key) == value:
            continue
        with contextlib.suppress(Exception):  # whatever it is, this is no way out
            step(small, changed(config, section, key, value))
            found.append(f"{section}.{key}={value}".lower())
    return found


def changed(config: Config, section: str, key: str, value: Any) -> Config:
    """The same configuration with another value of one setting."""
    part = getattr(config, section).model_copy(update={key: value})
    return config.model_copy(update={section: part})


@torch.no_grad()
def check_future(causal_lm: nn.Module) -> None:
    """ConfigError if what a token predicts depends on a token behind it."""
    tokens = some_tokens(causal_lm, TOKENS)
    other = tokens.clone()
    other[:, -1] = tokens[:, 0]
    before, after = (logits_of(causal_lm, inputs)[:, :-1] for inputs in (tokens, other))
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigError(
            f"{type(causal_lm).__name__} is not causal: a token sees the tokens behind it, as in "
            "an encoder such as BERT; choose a causal LM such as Llama or Qwen"
        )


@torch.no_grad()
def check_positions(causal_lm: nn.Module, seq_len: int) -> list[str]:
    """A line if sequences are longer than the model was made for; ConfigError if it cannot."""
    text = causal_lm.config.get_text_config()
    limit = next((getattr(text, key) for key in LIMITS if getattr(text, key, None)), 0)
    takes_positions = "position_ids" in inspect.signature(causal_lm.forward).parameters

    def has(number: int) -> bool:
        """Whether a sequence may have so many tokens; if possible only the last are tried."""
        positions = torch.arange(max(0, number - 2) if takes_positions else 0, number)
        arguments = {"position_ids": positions.unsqueeze(0)} if takes_positions else {}
        tokens = some_tokens(causal_lm, len(positions))
        try:
            causal_lm(input_ids=tokens, **arguments, use_cache=False)
        except Exception:  # IndexError of an embedding, RuntimeError of another table
            return False
        return True

    is_tried = takes_positions or 0 < limit < seq_len <= MOST_TOKENS
    if is_tried and not has(seq_len) and has(2):
        most = bisect.bisect_left(range(seq_len), True, key=lambda number: not has(number + 1))
        raise ConfigError(
            f"data.seq_len={seq_len}: it has a table of {most} positions, and none beyond; write "
            f"data.seq_len={most} or less"
        )
    if 0 < limit < seq_len:
        return [
            f"data.seq_len={seq_len} is beyond the {limit} positions of its config.json; they are "
            "computed, so it trains, but it may not know those beyond"
        ]
    return []


def logits_of(causal_lm: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return causal_lm(input_ids=tokens, use_cache=False, return_dict=True).logits


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What this package logs within it, line by line, instead of a log."""
    lines, log = [], logging.getLogger("trainstack")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage().removeprefix("model: "))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
