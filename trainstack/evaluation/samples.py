"""What a model says to the prompts of a configuration."""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import StoppingCriteriaList

from trainstack import distributed
from trainstack.chat.template import load_tokenizer
from trainstack.checkpoint.snapshot import ENDS, GENERATION, ends_in, small_files
from trainstack.config.schema import Config
from trainstack.data.corpus import Corpus
from trainstack.distributed import World, any_rank
from trainstack.errors import ConfigError, first_words
from trainstack.evaluation.held_out import as_used
from trainstack.model.causal_lm import special_tokens
from trainstack.model.loss import CausalLMLoss
from trainstack.model.trial import positions_of
from trainstack.waits import ANSWER_SECONDS

DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 50}
ANSWERED = {"do_sample": False}
Prompt = str | list[dict[str, str]]  # messages


class Said(NamedTuple):
    """What the model said to one prompt."""

    prompt: str
    text: str  # for people, who see the prompt too
    end: str  # how it ended
    problem: str = ""  # why there is none


class Prompts:
    """``eval.prompts``, and what it takes to ask a model.

    A list of messages, and where ``is_chat`` a text too, gets the most likely answer, as a person
    would; else a text is continued at random, each with a seed of its own. ``small_files``: those
    of a checkpoint, by name, so that the model is asked and stops as at inference.
    """

    def __init__(self, config: Config, is_chat: bool, small_files: dict[str, bytes]):
        self.config, self.is_chat, self.small_files = config, is_chat, small_files
        settings = json.loads(small_files.get(GENERATION, b"{}"))
        self.ends = ends_in(settings.get(ENDS))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Made when it is needed first."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.small_files.items():
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            return load_tokenizer(Path(folder))

    def ask(
        self, loss_model: CausalLMLoss, world: World, wants_stop: Callable[[], bool]
    ) -> list[Said] | None:
        """What it says to each, the same at any world size; None if any rank wants to stop.

        ``wants_stop`` is asked before each token. What fails is told, and raises nothing. What
        training draws at random stays as it is. Collective: every rank must call this.
        """
        prompts, own = self.config.eval.prompts, []
        devices = [world.device] if world.device.type == "cuda" else []
        for first in range(0, len(prompts), world.world_size):
            if any_rank(wants_stop(), world):
                return None
            number = first + world.rank
            if number < len(prompts):
                with torch.random.fork_rng(devices), as_used(loss_model), loss_model.autocast():
                    own.append(self._answer(loss_model, number, wants_stop))
        if not prompts:
            return []
        if any_rank(wants_stop(), world):
            return None
        of_ranks = distributed.gather(own)
        return [of_ranks[n % world.world_size][n // world.world_size] for n in range(len(prompts))]

    def _answer(
        self, loss_model: CausalLMLoss, number: int, wants_stop: Callable[[], bool]
    ) -> Said:
        prompt = self.config.eval.prompts[number]
        torch.manual_seed(self.config.run.seed + number)
        try:
            return self.answer(loss_model.causal_lm, prompt, wants_stop)
        except Exception as error:  # of a tokenizer, a template, a model: training goes on
            problem = str(error) if isinstance(error, ConfigError) else first_words(error)
            return Said(shown(prompt), "", "", problem)

    @torch.no_grad()
    def answer(
        self, causal_lm: Any, prompt: Prompt, wants_stop: Callable[[], bool] = lambda: False
    ) -> Said:
        """What the model, which is in eval mode, says to one prompt.

        No longer than it has positions, or ``data.seq_len``. ConfigError if the prompt is as long.
        """
        ids, wanted = self._ids_of(prompt), self.config.eval.sample_tokens
        most, positions = wanted, max(positions_of(causal_lm), self.config.data.seq_len)
        if positions_of(causal_lm):
            most = min(most, positions - len(ids))
        if most < 1:
            raise ConfigError(
                f"eval.prompts has {len(ids):,} of the {positions:,} tokens that the model can "
                "read; shorten it"
            )
        inputs = torch.tensor([ids], device=next(causal_lm.parameters()).device)
        is_answer = self._is_asked(prompt)
        started = time.monotonic()
        output = causal_lm.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most,
            eos_token_id=self.ends, pad_token_id=self.tokenizer.eos_token_id,
            tokenizer=self.tokenizer, max_time=ANSWER_SECONDS,
            stopping_criteria=StoppingCriteriaList([lambda ids, _: stopping(ids, wants_stop())]),
            return_dict_in_generate=False,  # its own settings may ask for them
            **(ANSWERED if is_answer else DRAWN),
        )  # fmt: skip
        said = output[0, len(ids) :].tolist()
        text = self.tokenizer.decode(said if is_answer else [*ids, *said], skip_special_tokens=True)
        end = "was cut, and did not stop"
        if time.monotonic() - started > ANSWER_SECONDS:
            end = f"was cut after {ANSWER_SECONDS} s"
        elif said[-1] in self.ends or len(said) < most:
            end = f"stopped by itself, after {len(said)} tokens"
        elif most < wanted:
            end = f"was cut after {most} tokens: with the prompt they are the {positions:,} it can "
            end += "read"
        text = f"{shown(prompt)} -> {text}" if is_answer else text
        return Said(shown(prompt), text, f"{end} (eval.sample_tokens={wanted})")

    def _is_asked(self, prompt: Prompt) -> bool:
        return self.is_chat or not isinstance(prompt, str)

    def _ids_of(self, prompt: Prompt) -> list[int]:
        """A conversation up to its answer, or the beginning of a text, as tokens."""
        if not self._is_asked(prompt):
            ids = self.tokenizer(prompt)["input_ids"]
            # Behind an end another text would follow.
            return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"eval.prompts has messages ({shown(prompt)}), and the model has no chat template; "
                "write a text to be continued, or data.chat_template=FILE"
            )
        asked = {"add_generation_prompt": True, "return_dict": True}
        return self.tokenizer.apply_chat_template(question, **asked)["input_ids"]


def files_beside(causal_lm: nn.Module, model_folder: Path, corpus: Corpus) -> dict[str, bytes]:
    """What a checkpoint has beside the weights: the model writes and stops as it learned."""
    ends, odd = special_tokens(causal_lm, model_folder, corpus.ends)
    return small_files(causal_lm, model_folder, ends, corpus.chat_template, odd)


def shown(prompt: Prompt) -> str:
    """A prompt as people read it: of a conversation what was said last, and before."""
    return prompt if isinstance(prompt, str) else " | ".join(m["content"] for m in prompt)


def stopping(ids: torch.Tensor, is_wanted: bool) -> torch.Tensor:
    """For generate(): bool [samples]."""
    return torch.full((len(ids),), is_wanted, device=ids.device)
