"""The study's page and figures, from its results."""


def write_page(*args):
    pass
