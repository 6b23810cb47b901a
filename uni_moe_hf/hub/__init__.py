"""
What travels inside every saved checkpoint and runs there without this package.
Nothing here imports anything of ours from outside this folder.
"""
