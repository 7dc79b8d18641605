"""A run on paper: what recipe=check says of a recipe that it does not run.

view.py         what is looked at, printed; what is wrong, gathered
examine.py      what lies on this machine: shards, vocabularies, bases, conversations, text; read only
text.py training.py pretraining.py tuning.py      the recipes, one after the other
findings.py     the checks: figures and settings in, findings out
curve.py        the learning rate of a whole run, and its picture
estimate.py     memory by part, disk
"""
