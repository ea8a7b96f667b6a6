"""What a model says to the prompts of a configuration."""

import torch
from torch import nn

from trainstack.config.schema import EvalSection
from trainstack.errors import ConfigError
from trainstack.model.trial import positions_of

DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 50}
ANSWERED = {"do_sample": False}


@torch.no_grad()
def answer(
    causal_lm: nn.Module,
    tokenizer,
    section: EvalSection,
    is_chat: bool,
    ends: list[int],
    seed: int,
    seq_len: int,
) -> tuple[str, str]:
    """What the model says to eval.prompts, and how that ended, for people.

    ``is_chat``: the prompt is a question, and the answer the most likely one, as a person would get
    it; else it is the beginning of a text, which is continued at random, with a fixed seed.
    ``ends``: tokens at which it stops. No longer than the model has positions, or ``seq_len``.
    """
    causal_lm.eval()
    torch.manual_seed(seed)
    ids = prompt_of(tokenizer, section.prompts[0], is_chat)
    most, positions = section.sample_tokens, max(positions_of(causal_lm), seq_len)
    if positions_of(causal_lm):
        most = min(most, positions - len(ids))
    if most < 1:
        raise ConfigError(
            f"eval.prompts has {len(ids):,} of the {positions:,} tokens that the model can "
            "read; shorten it"
        )
    inputs = torch.tensor([ids], device=next(causal_lm.parameters()).device)
    output = causal_lm.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most, eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id, tokenizer=tokenizer,
        return_dict_in_generate=False,  # its own settings may ask for them
        **(ANSWERED if is_chat else DRAWN),
    )  # fmt: skip
    causal_lm.train()
    said = output[0, len(ids) :].tolist()
    text = tokenizer.decode(said if is_chat else [*ids, *said], skip_special_tokens=True)
    end = "was cut, and did not stop"
    if said[-1] in ends or len(said) < most:
        end = f"stopped by itself, after {len(said)} tokens"
    elif most < section.sample_tokens:
        end = f"was cut after {most} tokens: with the prompt they are the {positions:,} it can read"
    return text, f"{end} (eval.sample_tokens={section.sample_tokens})"


def prompt_of(tokenizer, text: str, is_chat: bool) -> list[int]:
    """A question, or the beginning of a text, as tokens."""
    if is_chat:
        question = [{"role": "user", "content": text}]
        asked = {"add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template(question, **asked)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # another text would follow
