"""Whether a model can be trained as configured: a small copy of it is, for a step, on a CPU.

What it finds is said before the queue, and whether the weights have the shapes that the real model
has. It cannot find out about their values, about memory and about the kernels of a GPU, which is
said too.
"""

import contextlib
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from trainstack.adapter import lora
from trainstack.checkpoint.snapshot import CONFIG
from trainstack.config.schema import Config
from trainstack.errors import ConfigError, first_words
from trainstack.model.attention import OURS, packed_tokens
from trainstack.model.causal_lm import (
    build_causal_lm,
    check_kind,
    check_weights,
    count_parameters,
    notes_on,
    quantisation,
    read_config,
)
from trainstack.model.loss import CausalLMLoss
from trainstack.model.small_copy import corrected, is_number, small_configs
from trainstack.model.trial import (
    TOKENS,
    check_future,
    check_positions,
    generation_problem,
    idle_routers,
    logits_of,
    some_tokens,
)
from trainstack.storage.files import read_object

NO_FIX = "choose another model"  # if no value of its config.json is to blame
MOST_SECONDS = 40  # to find one
MOST_PARAMETERS = 110e6  # of a small copy; with its gradients in fp32 that is 0.9 GB
CPU = torch.device("cpu")
WAYS_OUT = (  # settings that may help
    ("model", "attn_implementation", "auto"),
    ("train", "activation_checkpointing", False),
    ("train", "precision", "fp32"),
    ("data", "packing", "none"),
    ("data", "packing", "concat"),
)


@dataclass
class Rehearsal:
    """What was found out: lines for people, and how many parameters a checkpoint would hold."""

    parameters: int
    notes: list[str]


def rehearse(folder: Path, config: Config) -> Rehearsal:
    """Try what a run of this configuration would do with the model in ``folder``.

    ConfigError, in one line, if it cannot be trained like this. Touches no network.
    """
    transformers.logging.set_verbosity_error()  # what matters is said in our lines
    transformers.logging.disable_progress_bar()
    try:
        return rehearsed(folder, config)
    except ConfigError as error:
        name = config.model.name
        raise ConfigError(f"model {name} cannot be trained as configured: {error}") from None


def rehearsed(folder: Path, config: Config) -> Rehearsal:
    """The same; ConfigError without the name of the model."""
    try:
        real = read_config(folder)
        check_kind(real, config.model.init)
        check_flash(real, config)
        whole, notes = tried(real, config)
    except ConfigError as error:
        problem, _, fix = str(error).rpartition("; ")
        if fix.endswith(NO_FIX):
            fix = remedy(folder, lambda other: tried(other, config, problem)) or fix
        raise ConfigError(f"{problem}; {fix}") from None
    notes += check_generation(folder, real)
    notes += check_weights(folder, whole) if config.model.init == "pretrained" else []
    notes += notes_on(whole, folder)
    if type(whole.config) is not type(real):
        notes.append(f"only its part for text is trained and saved, as {type(whole).__name__}")
    if quantisation(real):
        notes.append("its config.json says that it is quantised; from scratch it is not")
    if config.adapter.type:  # last: it changes the names of the weights
        notes += with_adapter(whole, config)
    return Rehearsal(lora.count_saved(whole), notes)


def with_adapter(whole: nn.Module, config: Config) -> list[str]:
    """Put the adapter beside the layers of the real model, which has no memory; lines on that."""
    with logged() as lines, torch.device("meta"):
        lora.add_adapter(whole, config.adapter, config.run.seed)
        lora.tell_rest(whole)
    return lines


def tried(real: Any, config: Config, before: str = "") -> tuple[nn.Module, list[str]]:
    """The real model without memory, and lines on a small copy that was trained for a step.

    ``before``: the problem that it had before its config.json was corrected.
    """
    whole = build_whole(real)
    if type(whole.config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"its part for text alone ({whole.config.model_type}) is saved as a model that "
            f"transformers does not load as a causal LM; {NO_FIX}"
        )
    small, reason = small_copy(real, before)
    return whole, checked(small, config, before) if small else [
        f"no small copy could be tried ({reason})"
    ]


def remedy(
    folder: Path,
    works: Callable[[Any], Any],
    may_be_wrong: Callable[[Any], bool] = lambda value: True,
) -> str:
    """What to change in config.json so that it works: what helps by itself; empty if nothing."""
    found, until = {}, time.monotonic() + MOST_SECONDS
    for key, fix, values in corrected(read_object(folder / CONFIG), may_be_wrong):
        if key not in found and time.monotonic() < until:
            with contextlib.suppress(Exception):  # whatever it is, this does not help
                if works(CONFIG_MAPPING[values["model_type"]].from_dict(values)):
                    found[key] = fix
    fixes = sorted(found.values(), key=lambda fix: not fix.startswith("write"))  # the plain first
    return f"{' or '.join(fixes)} in its config.json" if found else ""


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
        what, fix = "transformers builds no model from its config.json", f"correct it, or {NO_FIX}"
        if isinstance(error, ImportError):
            what, fix = "a package that it needs is missing", f"install it, or {NO_FIX}"
        raise ConfigError(f"{what} ({first_words(error)}); {fix}") from None


def small_copy(real: Any, before: str = "") -> tuple[Any, str]:
    """The configuration of a small copy that runs; or None, and why there is none.

    No other copy is tried once one has the problem of before: nothing was corrected.
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
            if ": " in reasons[-1] and reasons[-1] in before:
                break
    if not reasons[-1].startswith("the smallest has"):
        raise ConfigError(f"its own code fails with text ({reasons[-1]}); {NO_FIX}")
    return None, reasons[0]


def checked(small: Any, config: Config, before: str = "") -> list[str]:
    """What a small copy shows; ConfigError if it cannot be trained as configured.

    With a problem of before, only whether it is gone is asked, and for no other way out.
    """
    causal_lm = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    check_future(causal_lm)
    notes = check_positions(causal_lm, config.data.seq_len, config.data.packing)
    notes += idle_routers(causal_lm)
    used = config
    if config.model.attn_implementation == "flash_attention_2":
        used = changed(config, "model", "attn_implementation", "auto")
    try:
        attention, lines = step(small, used)
    except Exception as error:  # of the model's code, of torch, of ours
        reason = str(error) if isinstance(error, ConfigError) else first_words(error)
        ways = "" if before else " or ".join(ways_out(small, used))
        if ways:
            reason = f"{reason.partition('; ')[0]}; write {ways}"
        elif not isinstance(error, ConfigError):
            reason = f"{reason}; {NO_FIX}"
        raise ConfigError(reason) from None
    untried = "the values of real weights, memory, the kernels of a GPU"
    untried += ", torch_compile" if config.train.torch_compile else ""
    untried += "" if used is config else ", flash attention"
    parts = [attention, config.train.precision, f"packing {config.data.packing}"]
    parts += ["LoRA"] if config.adapter.type else []
    summary = f"a small copy of it learns with {', '.join(parts)}; not tried: {untried}"
    return [summary, *notes, *lines]


def check_generation(folder: Path, real: Any) -> list[str]:
    """A line if what is trained could not be asked; ConfigError if its config.json is why."""
    problem = no_generation(real)
    if not problem:
        return []
    line = f"it trains, but {problem}"
    fix = remedy(folder, lambda other: not no_generation(other), lambda v: is_number(v) and v < 1)
    if fix:
        raise ConfigError(f"{line}; {fix}")
    return [line]


def no_generation(real: Any) -> str:
    """Why no small copy generates as it is trained, few layers or all; empty if one does."""
    problems = {}
    for values in small_configs(real.to_dict()):
        with contextlib.suppress(Exception):  # its code may not go with what was made smaller
            small = type(real).from_dict(values)
            layers = getattr(small.get_text_config(), "num_hidden_layers", 0)
            if layers in problems or count_parameters(build_whole(small)) > MOST_PARAMETERS:
                continue
            causal_lm = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            logits_of(causal_lm, some_tokens(causal_lm, TOKENS))
            problems[layers] = generation_problem(causal_lm)
            if not problems[layers]:
                return ""
    return next(iter(problems.values()), "no small copy runs")


def step(small: Any, config: Config) -> tuple[str, list[str]]:
    """Forward and backward pass of a small copy, as a run would make them.

    Returns the attention that it has, and what was logged.
    """
    with logged() as lines:
        loss_model = loss_of(small, config)
        causal_lm = loss_model.causal_lm
        tokens, *packed = packed_tokens(causal_lm)
        packed = packed if config.data.packing != "concat" else ()
        loss = loss_model(tokens, tokens.roll(-1), *packed)
        loss.backward()
    if not loss.isfinite():
        raise ConfigError(f"its loss is not finite at the first step; {NO_FIX}")
    attention = causal_lm.config._attn_implementation.replace(OURS, "sdpa")
    return f"{attention} attention", [*lines]


def loss_of(small: Any, config: Config) -> CausalLMLoss:
    """The model of a small configuration with its loss, tried as a run tries its own."""
    train = config.train.model_copy(update={"torch_compile": False})
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        adapter = lora.of_any_layer(config.adapter)
        arguments = (config.model, train.precision, config.run.seed, adapter)
        causal_lm = build_causal_lm(Path(folder), "scratch", *arguments)
    return CausalLMLoss(causal_lm, train, CPU, config.data.packing)


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
