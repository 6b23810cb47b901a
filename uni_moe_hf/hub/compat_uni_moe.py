"""
What differs between releases of Transformers, 5.16.1 and everything newer, and of torch, in one place.

Checkpoints carry this code to libraries that do not exist yet. So the other Hub files use documented names; what they
need besides is imported here, each with what happens where it is gone.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import transformers


OLDEST = (5, 16, 1)


RELEASE = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:3])

if RELEASE < OLDEST:  # a newer one is never refused
    raise ImportError(
        f"Uni-MoE needs transformers {'.'.join(map(str, OLDEST))} or newer, this is {transformers.__version__}: "
        "`pip install -U transformers`."
    )

from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402  older releases end above


# Before 5.18 the library's own processors look up the scores of whatever ids a prompt holds.
SCORES_BEAR_PLACEHOLDERS = RELEASE >= (5, 18)
# Before 5.22 a prompt that is read in chunks is run over a filled cache from its beginning again.
CHUNKS_GO_ON = RELEASE >= (5, 22)

# 5.24 renamed `past_key_values` to `cache`, in outputs and arguments alike; calls with either name are understood.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among keyword arguments, whatever it is called; `None` without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def named_cache(cache: Any, past_key_values: Any) -> dict[str, Any]:
    """
    The cache as a keyword argument, under the name that this release reads.

    Raises:
        ValueError: two caches.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Got both `cache` and `past_key_values`, which are two names of one thing; pass one.")
    return {CACHE: past_key_values if cache is None else cache}


def can_return_tuple(forward: Callable) -> Callable:
    """Lets a forward pass that returns a `ModelOutput` take `return_dict=False`, which the config may say as well."""

    @wraps(forward)
    def wrapped(self, *args, return_dict: bool | None = None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return outputs if wants_dict else outputs.to_tuple()

    return wrapped


try:
    # What servers answer requests with.
    from starlette.exceptions import HTTPException
except ImportError:
    HTTPException = None


def answers_requests(function: Callable) -> Callable:
    """Lets a `ValueError` be one that `transformers serve` answers with 400 and its sentence, in place of 500."""
    if HTTPException is None:
        return function

    @wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error)) from error

    return wrapped


if HTTPException is not None:

    class RequestError(ValueError, HTTPException):
        """A `ValueError` in every way, and what FastAPI makes of one that a client caused."""

        status_code = 400
        __str__ = BaseException.__str__

        def __init__(self, detail: str = ""):
            ValueError.__init__(self, detail)
            self.detail = detail.encode("utf-8", "replace").decode()  # JSON takes no half characters
            header = "".join(character if character.isprintable() else " " for character in detail)
            self.headers = {"X-Error-Message": header.encode("latin-1", "replace").decode("latin-1")}


try:
    # Since 5.23: keeps the one hidden state that is read instead of those of all layers.
    from transformers.utils.output_capturing import select_hidden_states
except ImportError:

    def select_hidden_states(argument: str) -> Callable:
        """All hidden states are kept: more memory, the same result."""

        def decorate(function: Callable) -> Callable:
            @wraps(function)
            def wrapped(self, *args, **kwargs):
                return function(self, *args, **{**kwargs, "output_hidden_states": True})

            return wrapped

        return decorate


try:
    # What keeps router logits during a forward pass, under compiling and checkpointing too.
    from transformers.utils.output_capturing import OutputRecorder
except ImportError:
    OutputRecorder = None

try:
    # A check that neither breaks a compiled graph nor waits for the device there.
    from transformers.utils import torch_compilable_check
except ImportError:

    def torch_compilable_check(condition: Any, message: Callable[[], str]) -> None:
        """The same, with a graph break where it is compiled."""
        if not condition:
            raise ValueError(message())


try:
    # Grouped products that compile in every dtype; torch's own do in bfloat16 alone.
    from transformers.integrations.moe import _grouped_linear as grouped_linear
except ImportError:
    grouped_linear = None

try:
    # Finds what `{% generation %}` marks; without it, answers are found by rendering turn by turn.
    from transformers.utils.chat_template_utils import render_jinja_template
except ImportError:
    render_jinja_template = None

try:
    # Keeps only a layer's input for backward, where checkpointing is switched on.
    from transformers import GradientCheckpointingLayer
except ImportError:
    GradientCheckpointingLayer = torch.nn.Module


@cache
def onednn_linear() -> Callable | None:
    """
    Torch's private operator for `rows @ weight.T` through oneDNN, tried once per process against the public ones.

    Public is only `torch.set_float32_matmul_precision("medium")`, for the whole process, and on AMX it means bf16.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    generator = torch.Generator().manual_seed(0)
    rows, weight, base = (torch.randn(*shape, generator=generator) for shape in ((24, 48), (32, 48), (24, 32)))
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        plain = operator(rows, weight, None, "none", [], "")
        turned = operator(rows, weight.t().contiguous().t(), None, "none", [], "")
        added = operator.binary(rows, base, weight, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return None
    expected = rows @ weight.t()
    pairs = ((plain, expected), (turned, expected), (added, base + expected))
    return operator if all(torch.allclose(actual, wanted, atol=1e-4) for actual, wanted in pairs) else None


def same_permissions(folder: str | Path) -> None:
    """Weights may be read by whom the files beside them may be read: safetensors writes them for their owner alone."""
    files = [path for path in Path(folder).iterdir() if path.is_file()]
    usual = [path for path in files if path.suffix == ".json"]
    for path in files:
        if path.suffix == ".safetensors" and usual:
            path.chmod(usual[0].stat().st_mode & 0o777)


def missing(name: str, needed_for: str) -> type:
    """What stands in for a class that this release has no more: making one says what cannot be done."""

    class Missing:
        def __init__(self, *args, **kwargs):
            raise ImportError(
                f"transformers {transformers.__version__} has no `{name}` where this checkpoint's code looks for it, "
                f"so {needed_for}; use an older release, or save the checkpoint anew with a newer uni_moe_hf."
            )

    return Missing


try:
    # The two halves of Whisper, each without the other.
    from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder
except ImportError:
    WhisperEncoder = WhisperDecoder = missing("WhisperEncoder", "speech cannot be heard")


try:
    # Encoders of sound.
    from transformers import ASTModel, ClapAudioModel
except ImportError:
    ASTModel = ClapAudioModel = missing("ASTModel and ClapAudioModel", "these cannot hear sound")


def register_multimodal_type(model_type: str, architecture: str) -> None:
    """
    `transformers serve` and the stock `any-to-any` pipeline look a model's type up here before its own code. Where
    the table is gone they do not know the model; everything else does.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    except ImportError:
        return
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(model_type, architecture)
