"""What a run is: config.yaml, read strictly, with every problem reported at once.

schema.py       every setting with its type and range
schedules.py    the schedules of transformers, without torch
batch.py        a step's sequences over processes and micro steps
names.py        names of models, data sets and splits
load.py         file and overrides become a Config, or problems
problems.py     one line per problem: location, value, fix
strict_yaml.py  YAML as people mean it, with line numbers
other_names.py  what other trainers call our settings
command.py      python -m trainstack config
"""
