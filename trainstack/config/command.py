"""``python -m trainstack config``: checks a configuration and prints it with its arithmetic.

Usage: ``python -m trainstack config [--config FILE] [--world-size N] [key=value ...]``. Imports
neither torch nor transformers, so that a check on a login node takes a blink.
"""

from trainstack.config.load import load
from trainstack.options import parser_of


def main(arguments: list[str]) -> int:
    parser = parser_of("config", __doc__, has_config=True)
    parser.add_argument("--world-size", type=int, default=1, metavar="N")
    options = parser.parse_args(arguments)
    config = load(options.config, options.overrides)
    plan = config.batch_plan(options.world_size)
    print(config.to_yaml())
    print(f"# {plan}")
    if config.train.max_steps:
        tokens = config.train.max_steps * plan.tokens_per_step
        print(f"# {config.train.max_steps:,} steps = {tokens:,} tokens")
    return 0
