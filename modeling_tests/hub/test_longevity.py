"""Checkpoints outlive releases of the library: what Hub files need of it is counted, and may vanish one by one."""

import contextlib
import importlib
import itertools
import json
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from library_names import HUB, Use, library_names
from tiny import (
    MIXED,
    TESTS,
    assert_logits_equal,
    child_environment,
    make_inputs,
    picture,
    tiny_config,
    tiny_model,
    tiny_processor,
    user,
)
from transformers import pipeline
from transformers.cache_utils import DynamicCache

from uni_moe_hf.hub.compat_uni_moe import CACHE, RELEASE


WHISPER = "transformers.models.whisper.modeling_whisper."

# Every name that nobody promises: why it is used, and what happens where it is gone.
TABLE = {
    Use("accessed", "_can_record_outputs"): "what the library's decoder records; where it is gone, nothing",
    Use("accessed", "_attn_implementation"): "the kernel that was asked for; BEATs would use torch's own",
    Use("accessed", "_forward_hooks"): "torch: layers that must be called are not read past; none would be seen",
    Use("accessed", "_forward_pre_hooks"): "as above",
    Use("accessed", "_linear_pointwise"): "torch's oneDNN product, tried once per process; else `F.linear`",
    Use("changed", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"): "`transformers serve`, stock `any-to-any` find the model",
    Use("declared", "_can_compile_fullgraph"): "a flag that the library reads; unread, `generate` does not compile",
    Use("declared", "_fsdp_plan"): "a flag for FSDP2; unread, the head is sharded",
    Use("declared", "_input_embed_layer"): "the name of BEATs' first layer; unread, the default name is tried",
    Use("declared", "_keep_in_fp32_modules_strict"): "routers stay in float32; unread, they have the model's dtype",
    Use("declared", "_no_split_modules"): "layers that offloading and FSDP2 keep whole",
    Use("declared", "_skip_keys_device_placement"): "offloading leaves caches where they are; unread, it is slower",
    Use("declared", "_supports_attention_backend"): "a flag: other kernels may be asked for",
    Use("declared", "_supports_flash_attn"): "as above",
    Use("declared", "_supports_flex_attn"): "as above",
    Use("declared", "_supports_sdpa"): "as above",
    Use("declared", "_tied_weights_keys"): "weights that are one tensor; unread, a tied head would be stored twice",
    Use("declared", "_tp_plan"): "how tensor parallelism splits the head",
    Use("imported", "transformers.integrations.moe._grouped_linear"): "else torch's own, compiled in bfloat16 alone",
    Use("imported", "transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"): "see changed",
    Use("imported", f"{WHISPER}WhisperDecoder"): "the speech connector; speech says that it cannot be heard",
    Use("imported", f"{WHISPER}WhisperEncoder"): "the speech tower, likewise",
    Use("imported", "transformers.utils.chat_template_utils.Chat"): "else conversations are answered one by one",
    Use("imported", "transformers.utils.chat_template_utils.render_jinja_template"): "else answers are found by turns",
    Use("imported", "transformers.utils.output_capturing.OutputRecorder"): "router logits; asking for them says so",
    Use("imported", "transformers.utils.output_capturing.select_hidden_states"): "else all are kept: more memory",
    Use("imported", "transformers.utils.torch_compilable_check"): "else the same check with a graph break",
    Use("overridden", "_experts_implementation"): "keeps names of routes from towers, which refuse them",
    Use("overridden", "_init_weights"): "the library's extension point for initialisation",
    Use("overridden", "get_correct_experts_implementation"): "takes names of routes; unread, loading refuses them",
    Use("overridden", "is_custom_code"): "weights that a file lacks are initialised as in the library's own models",
}


def test_every_name_that_nobody_promises_stands_in_the_table():
    assert set(library_names()) == set(TABLE)
    assert len(TABLE) <= 31, "fewer is better: a public way, a hook, a few lines of our own?"


def test_the_search_finds_names_of_every_kind(tmp_path):
    (tmp_path / "probe_uni_moe.py").write_text(
        "from transformers.utils.generic import _private\n"
        "from transformers.utils import torch_compilable_check\n"
        "from transformers import PreTrainedModel\n"
        "from torch._prims_common import check\n"
        "class Ours:\n"
        "    def _own(self): return self._own() or getattr(self, '_foreign')\n"
        "PreTrainedModel._flag = 1\n"
        "model._tied_keys\n"
    )
    found = {}
    trees = library_names.__globals__
    tree = trees["ast"].parse((tmp_path / "probe_uni_moe.py").read_text())
    for search in (trees["imports"], trees["changed"], lambda tree: trees["accessed"](tree, {"_own"})):
        found |= {use.name.split(".")[-1]: use.kind for use in search(tree)}
    assert found == {
        "_private": "imported",
        "torch_compilable_check": "imported",
        "check": "imported",
        "_foreign": "accessed",
        "_flag": "accessed",
        "_tied_keys": "accessed",
        "PreTrainedModel": "changed",
    }


# One folder, every release


def test_a_folder_saved_under_the_oldest_release_gives_the_same_here(tmp_path):
    """Its code is that of the day on which it was saved."""
    folder, results = tmp_path / "saved", tmp_path / "results.json"
    with zipfile.ZipFile(TESTS / "fixtures" / "saved_under_5_16_1.zip") as archive:
        archive.extractall(folder)
    environment = child_environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="")
    command = [sys.executable, TESTS / "hub" / "saved_folder.py", "check", results, folder]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(results.read_text()).values()
    assert "error" not in found, found
    assert found["module"].startswith("transformers_modules.")
    assert found["scale"] > 0.1
    for name, gap in found["gaps"].items():
        # Words and ids are the same; logits, of order 0.3, but for the order of sums. BEATs' filterbank is a
        # logarithm: of nearly no energy it shows how the spectrum was rounded (4e-4 seen between instruction sets).
        allowed = 0 if name.startswith(("words", "inputs/input_ids")) else 1e-5
        assert gap <= (2e-3 if name == "inputs/input_values" else allowed), name
    assert found["deprecated"] == []


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_understood(own_model, name):
    inputs = make_inputs(own_model.config, MIXED)
    with torch.no_grad():
        whole = own_model(**inputs).logits
        cache = DynamicCache(config=own_model.config.get_text_config())
        outputs = own_model(**inputs, use_cache=True, **{name: cache})
        assert outputs[CACHE] is cache and cache.get_seq_length() == whole.shape[1]
        word = torch.tensor([[5]])
        ids = torch.cat([inputs["input_ids"], word], dim=1)
        longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = own_model(**longer).logits[:, -1:]
        assert_logits_equal(own_model(input_ids=word, **{name: cache}).logits, expected)
        with pytest.raises(ValueError, match="two names of one thing"):
            own_model(**inputs, cache=cache, past_key_values=cache)


# Names that vanish


@pytest.fixture
def without():
    """Imports the Hub files anew, as a checkpoint's code, from a library that has lost a name."""
    numbers, made = itertools.count(), []

    def load(lost: str | None) -> types.SimpleNamespace:
        name = f"checkpoint_{next(numbers)}"
        package = types.ModuleType(name)
        package.__path__ = [str(HUB)]
        sys.modules[name] = package
        made.append(name)
        stems = [file.stem for file in HUB.glob("*_uni_moe.py")]
        with pytest.MonkeyPatch.context() as patch:  # the library itself goes on using the name
            if lost is not None:
                module, _, attribute = lost.rpartition(".")
                patch.delattr(importlib.import_module(module), attribute, raising=False)  # or never had it
            files = {stem.removesuffix("_uni_moe"): importlib.import_module(f"{name}.{stem}") for stem in stems}
        return types.SimpleNamespace(**files)

    yield load
    for name in list(sys.modules):
        if name.split(".")[0] in made:
            del sys.modules[name]


def same_model(code: types.SimpleNamespace, model, **changes):
    """The model, by other code."""
    config = code.configuration.UniMoEConfig(**{**model.config.to_dict(), **changes})
    other = code.modeling.UniMoEForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    return other


IMPORTED = sorted({use.name for use in TABLE if use.kind == "imported"})


@pytest.mark.parametrize("name", [name for name in IMPORTED if WHISPER not in name])
def test_a_name_may_vanish_and_the_model_answers_the_same(own_model, without, name):
    inputs = make_inputs(own_model.config, MIXED, ("speech", 2))
    other = same_model(without(name), own_model)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert_logits_equal(other(**inputs).logits, own_model(**inputs).logits)
        other.set_experts_implementation("grouped_mm")
        assert_logits_equal(other(**inputs).logits, own_model(**inputs).logits)
    assert torch.equal(other.generate(**inputs, **settings), own_model.generate(**inputs, **settings))
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        other(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})


def test_without_a_recorder_asking_for_router_logits_says_so(own_model, without):
    other = same_model(without("transformers.utils.output_capturing.OutputRecorder"), own_model)
    with pytest.raises(ValueError, match="has no recorder of router logits"):
        other(**make_inputs(own_model.config, (3,)), output_router_logits=True)


@pytest.mark.parametrize("name", [name for name in IMPORTED if WHISPER in name])
def test_without_whisper_speech_says_so_and_the_rest_works(without, name):
    code = without(name)
    with pytest.raises(ImportError, match="has no `WhisperEncoder` where .* so speech cannot be heard"):
        same_model(code, tiny_model())
    deaf = tiny_model(without=("speech",))
    inputs = make_inputs(deaf.config, ("image", 2, "audio"))
    with torch.no_grad():
        assert_logits_equal(same_model(code, deaf)(**inputs).logits, deaf(**inputs).logits)


def test_without_the_librarys_renderer_answers_are_found_turn_by_turn(without):
    """The template's own marks and rendering by turns give the same mask, across placeholders and padding."""
    processor = tiny_processor(tiny_config())
    chats = [
        [
            *user({"type": "image", "image": picture()}, "what is this"),
            {"role": "assistant", "content": "a bird"},
            *user("is it red <image>"),
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ],
        [*user("hello"), {"role": "assistant", "content": "no"}],
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    marked = processor.apply_chat_template(chats, return_assistant_tokens_mask=True, **settings)
    assert set(marked) == {*processor.apply_chat_template(chats, **settings), "assistant_masks"}
    code = without("transformers.utils.chat_template_utils.render_jinja_template")
    parts = (processor.image_processor, processor.feature_extractor, processor.tokenizer)
    other = code.processing.UniMoEProcessor(*parts, image_seq_length=processor.image_seq_length)
    turns = other.apply_chat_template(chats, return_assistant_tokens_mask=True, **settings)
    assert torch.equal(turns["assistant_masks"], marked["assistant_masks"])
    said = [
        processor.tokenizer.decode(row[mask.bool()])
        for row, mask in zip(turns["input_ids"], turns["assistant_masks"], strict=True)
    ]
    assert said == ["a bird</s> yes</s>", "no</s>"]
    changing = "{% for m in messages %}{{ m['content']|length ~ m['content'] ~ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes around message 2 what depends on its text"):
        texts = [[{"role": m["role"], "content": "hi"} for m in chats[0]]]
        processor.apply_chat_template(
            texts, chat_template=changing, return_assistant_tokens_mask=True, tokenize=True, return_dict=True
        )


def test_without_the_pipelines_own_conversations_they_are_answered_one_by_one(own_model, without):
    processor = tiny_processor(own_model.config)
    chats = [user("what is this"), user({"type": "image", "image": picture()}, "what is this")]
    answers = {}
    for lost in (None, "transformers.utils.chat_template_utils.Chat"):
        kind = without(lost).generation.AnyToTextPipeline
        pipe = pipeline("any-to-text", model=own_model, processor=processor, pipeline_class=kind)
        results = pipe(chats, batch_size=2, max_new_tokens=4, return_full_text=False)
        answers[lost] = [each["generated_text"] for each in itertools.chain.from_iterable(results)]
    first, second = answers.values()
    assert first == second


def test_a_release_is_read_as_numbers():
    assert len(RELEASE) == 3 and RELEASE >= (5, 16, 1)
    text = (HUB / "compat_uni_moe.py").read_text(encoding="utf-8")
    assert text.count("RELEASE >=") <= 2, "ask for what is there, not for numbers"


@pytest.mark.parametrize("how", ["warned", "logged"])
def test_a_line_of_ours_that_uses_a_name_that_will_go_is_seen(deprecations, how):
    code = {
        "warned": "import warnings\nwarnings.warn('`old` is deprecated', FutureWarning)",
        "logged": "import logging\nlogging.getLogger('transformers').warning('`old` is deprecated')",
    }[how]
    library = compile(code, "/site-packages/transformers/modeling_utils.py", "exec")
    for caller, seen in ((HUB / "modeling_uni_moe.py", 1), ("/somewhere/else.py", 0)):
        deprecations.found.clear()
        with pytest.warns(FutureWarning) if how == "warned" else contextlib.nullcontext():
            exec(compile("exec(library)", str(caller), "exec"), {"library": library})
        assert len(deprecations.found) == seen
    deprecations.found.clear()
