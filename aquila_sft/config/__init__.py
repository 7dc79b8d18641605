"""What a run is told: one dataclass a stage, made of groups; each `check()` says what no type can say.

Every field has its value in recipes/*.yaml; a field has a default here only where `null` is a meaningful choice.
door.py makes these from YAML; below it there is no DictConfig.

runs.py     a stage's dataclass: which groups it has      data.py, model.py    the groups      bounds.py    limits
"""
