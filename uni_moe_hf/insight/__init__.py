"""
Looking into a trained model.
Imports `hub`, `mixtures`, `original` and `training`.
"""
