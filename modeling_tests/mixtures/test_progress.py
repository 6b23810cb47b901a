"""Bars are drawn on terminals alone, and where they are wanted."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from tiny import ROOT, child_environment, tiny_model, tiny_processor
from transformers.utils import logging

from uni_moe_hf.cli import common, main
from uni_moe_hf.mixtures.progress import progress_bar


CODE = "from uni_moe_hf.mixtures.progress import progress_bar\nfor _ in progress_bar(range(3), desc='encoding'): pass"


def said_on_a_terminal(code: str) -> str:
    """What a process writes to a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = child_environment(PYTHONPATH=str(ROOT))
    child = subprocess.Popen([sys.executable, "-c", code], stderr=follower, stdout=follower, env=environment)
    os.close(follower)
    said = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    os.close(leader)
    assert child.wait(timeout=120) == 0, said
    return said.decode()


def test_a_terminal_sees_a_bar_with_an_estimate_and_a_file_sees_nothing():
    off = "from transformers.utils import logging\nlogging.disable_progress_bar()\n"
    said = said_on_a_terminal(f"{CODE}\n{off}{CODE.replace('encoding', 'reading')}")
    assert "encoding: 100%" in said and "reading" not in said
    command, environment = [sys.executable, "-c", CODE], child_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "encoding" not in done.stderr


def test_a_bar_gives_what_it_is_given_whether_it_is_drawn_or_not(capsys):
    for shown in (True, False):
        assert list(progress_bar(iter("abc"), shown=shown)) == ["a", "b", "c"]
        with progress_bar(total=2, shown=shown, desc="rows") as bar:
            bar.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("option", "level"), [([], logging.WARNING), (["--quiet"], logging.ERROR), (["--verbose"], logging.INFO)]
)
def test_a_command_says_as_much_as_is_wanted(option, level, tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor(model.config).save_pretrained(tmp_path)
    before, levels = logging.get_verbosity(), []
    monkeypatch.setattr(common, "print_report", lambda *_: None)
    monkeypatch.setattr("uni_moe_hf.cli.inspection.print_report", lambda *_: levels.append(logging.get_verbosity()))
    try:
        assert main(["routing", str(tmp_path), "--text", "what is it", *option]) == 0
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    assert levels == [level]


def test_quiet_and_verbose_at_once_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["info", "nowhere", "--quiet", "--verbose"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err
