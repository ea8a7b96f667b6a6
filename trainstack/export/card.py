"""README.md of an export: what the model is, what it learned from, how, and how well.

Nothing of this machine or its people is in it: of a path the last part, of a host nothing.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from trainstack.checkpoint.snapshot import TEMPLATE
from trainstack.errors import ConfigError, shown
from trainstack.export.source import Source
from trainstack.history.attempts import attempts_of, read_executions
from trainstack.history.ledger import compare, sampler_of
from trainstack.storage.files import object_in
from trainstack.units import counted, rounded

DECIDED = (  # settings that say what was learned, and how
    "run.seed", "data.seq_len", "data.packing", "data.learn", "train.global_batch_size",
    "train.precision", "adapter.type", "adapter.r", "adapter.alpha", "adapter.dropout",
    "adapter.target_modules", "optim.learning_rate", "optim.lr_scheduler_type",
    "optim.lr_scheduler_kwargs", "optim.warmup_steps", "optim.warmup_ratio", "optim.weight_decay",
    "optim.adam_beta1", "optim.adam_beta2", "optim.max_grad_norm",
)  # fmt: skip


class Made(NamedTuple):
    """What an export holds."""

    architecture: str
    parameters: int
    dtype: str
    is_merged: bool
    names: list[str]  # of its files


def card(source: Source, made: Made) -> str:
    """The whole page."""
    head = yaml.safe_dump(front_matter(source, made), sort_keys=False).strip()
    parts = [
        f"# {source.name}",
        what_it_is(source, made),
        "## Data",
        "\n".join(data_lines(source)),
        "## Training",
        training(source),
        "\n".join(("| setting | |", "|---|---|", *settings_of(source))),
        "## Evaluation",
        evaluation(source),
        "## Proof",
        proof(source),
        "## Versions",
        versions(source),
    ]
    return f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(source: Source, made: Made) -> dict[str, Any]:
    """What the Hub reads. No licence: nothing here knows that of the model and the data."""
    is_adapter = source.is_adapter and not made.is_merged
    base = source.model()
    found: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if base and base.is_public:
        found["base_model"] = base.name
        found["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if public := list(dict.fromkeys(o.name for o, _ in source.data_sets() if o.is_public)):
        found["datasets"] = public
    chat = ["conversational"] if TEMPLATE in made.names else []
    return found | {"tags": ["trainstack", *chat, *(["lora"] if source.is_adapter else [])]}


def what_it_is(source: Source, made: Made) -> str:
    base, size = source.model(), f"{counted(made.parameters, 'parameter')}, {made.dtype}"
    how = f"fine-tuned from {base.link()}" if base else "trained from scratch"
    model = f"`{made.architecture}` ({size})"
    if source.is_adapter:
        kind = "with a LoRA adapter merged into it" if made.is_merged else "with this LoRA adapter"
        model = f"`{made.architecture}` {kind} ({size})"
    return (
        f"{model}, {how}, at step {source.state.step:,} of the run `{source.name}`. It was trained "
        "with trainstack. Its licence is not stated here: those of the model and the data sets "
        "that it was made from apply."
    )


def data_lines(source: Source) -> Iterator[str]:
    for origin, weight in source.data_sets():
        share = f", weight {weight:g}" if weight else ""
        yield f"- {origin.link('datasets/')} ({origin.part}){share}"


def training(source: Source) -> str:
    state = source.state
    text = (
        f"{counted(state.step, 'step')} on {state.tokens_seen:,} tokens in "
        f"{counted(state.samples_seen, 'sequence')}, last by "
        f"{state.world_size} process{'es' if state.world_size > 1 else ''} with data parallelism."
    )
    if bad := state.step - state.updates:
        text += f" {counted(bad, 'update')} of them had a bad loss or gradient and were not made."
    return text


def settings_of(source: Source) -> Iterator[str]:
    """The rows of a table."""
    for key in DECIDED:
        section, name = key.split(".")
        value = source.state.settings.get(section, {}).get(name)
        if value is not None and (section != "adapter" or source.is_adapter):
            text = json.dumps(value) if isinstance(value, dict | list) else shown(value)
            yield f"| `{key}` | {text} |"


def evaluation(source: Source) -> str:
    """The last one up to the step."""
    known = source.run.evaluations() if source.run else ()
    found = [record for record in known if record["step"] <= source.state.step]
    if not found:
        return "It was not evaluated on held-out data."
    last = found[-1]
    text = f"At step {last['step']:,}, on {last['eval_tokens']:,} held-out tokens: loss "
    text += f"{last['eval_loss']:.4f}, perplexity {rounded(last['eval_perplexity'])}"
    if bits := last.get("eval_bits_per_byte"):
        text += f", {bits:.4f} bits per byte"
    return text + "."


def proof(source: Source) -> str:
    """Whether each step consumed its own samples, computed again from the run's record."""
    if source.run is None:
        return "The record of the samples that it learned from is not beside the checkpoint."
    state, run = source.state, source.run
    attempts = attempts_of(run.events(), read_executions(run.path / "samples.jsonl"))
    try:
        sampler = sampler_of(state.identity, source.home, state.left_out)
    except ConfigError:
        return "The tokens that it learned from are gone, so its samples were not checked again."
    found = compare(attempts, sampler, state.step)
    batch = sampler.global_batch_size
    return (
        f"Which samples each step consumed is on record, and was computed again: "
        f"{counted(found.steps, 'step')} = {counted(found.steps * batch, 'sample')}, repeated = "
        f"{found.repeated_steps * batch:,}, skipped = {found.skipped_steps * batch:,}."
    )


def versions(source: Source) -> str:
    """Of what trained it last, as far as the run knows them."""
    known = object_in(source.run.path / "environment.json") if source.run else {}
    found = {"torch": source.state.torch, **known.get("packages", {})}
    text = ", ".join(f"{n} {found[n]}" for n in ("torch", "transformers", "peft") if found.get(n))
    return text + (f", trainstack at {commit[:12]}" if (commit := known.get("git_commit")) else "")
