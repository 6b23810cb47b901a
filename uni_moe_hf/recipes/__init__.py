"""
From files to a trained model: rows out of folders, memory estimated, the three stages from one YAML file.
May import `hub`, `mixtures`, `original` and `training`.
"""
