"""Conversions by command, and changes of their files."""

import json
from pathlib import Path

import torch
from originals import read

from uni_moe_hf.cli import main


def command_for(arguments: dict, output: Path) -> list[str]:
    """`uni-moe convert` with the arguments of `convert_checkpoint`."""
    command = ["convert", "--output", str(output)]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def read_base(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= read(file)
    return tensors


def assert_same_files(back: Path, original: Path) -> None:
    """Every pickle holds the same tensors under the same names, every config says the same."""
    for folder in (path for path in original.iterdir() if path.name in ("base", "finetuned", "experts")):
        if folder.name == "base":
            expected = read_base(folder)
            if (original / "experts").is_dir():  # feed-forward layers of the model that the base was shared with
                expected = {key: value for key, value in expected.items() if ".mlp." not in key}
            pairs = [(read_base(back / "base"), expected)]
        else:
            names = {file.name for file in folder.glob("*.bin")}
            assert names == {file.name for file in (back / folder.name).glob("*.bin")}
            pairs = [(read(back / folder.name / name), read(folder / name)) for name in names]
        for found, expected in pairs:
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype, key
        for file in folder.glob("*config.json"):
            assert json.loads((back / folder.name / file.name).read_text()) == json.loads(file.read_text())


# --- Bad input: one sentence, and nothing left behind


def edit(file: Path, change) -> None:
    tensors = read(file)
    torch.save(change(tensors), file)


def set_config(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def convert_by_command(arguments: dict, output: Path, capsys) -> str:
    """Exit code 1 and the sentence."""
    assert main(command_for(arguments, output)) == 1
    message = capsys.readouterr().err
    assert message.count("uni-moe: ") == 1 and message.strip().count("\n") == 0
    return message
