"""Evaluation: benchmarks as they are defined in recipes/eval/, through lm-eval, into a table like the model card's.

recipes/eval/*.yaml -> benchmarks -> items (from the Hub or a folder) -> engine -> scores -> results.{md,csv,json}
                                                             |
                   scorer: log-likelihoods and answers of a model; choosing: token by token; journal: goes on
"""
