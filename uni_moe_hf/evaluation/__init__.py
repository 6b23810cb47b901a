"""
How good a model is: metrics, the paper's benchmarks as data, answers of a model, and the way into lmms-eval.
May import `hub`, `mixtures`, `original` and `training`.
"""
