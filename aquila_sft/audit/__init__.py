"""The label audit: what a model will really be trained on, looked at before the first step.

    prepared rows, the files they come from, tokenizer, base -> findings; errors stop the run with exit status 2

Preparation says what it did (ledger.json); the audit reads what is there. It derives from the ids alone which tokens
ought to be supervised, in a way of its own, and compares; a mistake would have to be made twice to pass.

rows.py        every token of every row, in numpy: turns, turn ends, supervision, special ids
sample.py      a sample: rows as the trainer gets them, conversations of the files against what was prepared of them
template.py    what is served: padding, begin, the base's own template, apply_chat_template, recipe=chat
embedding.py   whether the base has ever been trained on the template's ids
report.py      all of them, one conversation of each source with supervised tokens marked, findings
"""
