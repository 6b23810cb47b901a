"""Our tasks and our model in lmms-eval: its contract here, the program itself in `benchmarks/bench_evaluation.py`."""

import importlib
import json
import sys
from dataclasses import make_dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from tiny import picture, tiny_model, tiny_processor, tone
from tiny_training import rows, write_media

from uni_moe_hf import UniMoEDataCollator, evaluate
from uni_moe_hf.evaluation import lmms_eval_tasks
from uni_moe_hf.evaluation.questions import load_questions
from uni_moe_hf.evaluation.tasks import Task, load_task


SHORT = Task("short", metrics=("exact_match", "chance"), decoding={"max_new_tokens": 4, "do_sample": False})


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = write_media(tmp_path_factory.mktemp("media"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(6))))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(seed=2)
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as lmms-eval does."""


def _function(loader, node):
    module, name = loader.construct_scalar(node).rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


Loader.add_constructor("!function", _function)


def exported(task, source, folder):
    """The task's config with its functions, and its rows as the harness hands them out."""
    name = lmms_eval_tasks.export_to_lmms_eval(task, load_questions(task, source), folder)
    config = yaml.load((folder / f"{name}.yaml").read_text(), Loader)
    file = folder / config["dataset_kwargs"]["data_files"]["test"]
    return config, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def harness(monkeypatch):
    """What our model needs of lmms-eval 0.7: its base class, its requests, its registry's manifest."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.models", "lmms_eval.api.model", "lmms_eval.api.instance")
    for name in (*names, "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    class lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

        rank = property(lambda self: self._rank)

    sys.modules["lmms_eval.api.model"].lmms = lmms
    sys.modules["lmms_eval.api.instance"].Instance = SimpleNamespace
    sys.modules["lmms_eval.api.instance"].GenerationResult = make_dataclass("GenerationResult", ["text"])
    sys.modules["lmms_eval.api"].instance = sys.modules["lmms_eval.api.instance"]
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = lambda name, **paths: SimpleNamespace(id=name, **paths)
    monkeypatch.delitem(sys.modules, "uni_moe_hf.evaluation.lmms_eval_model", raising=False)
    yield importlib.import_module("uni_moe_hf.evaluation.lmms_eval_model")
    sys.modules.pop("uni_moe_hf.evaluation.lmms_eval_model", None)


def requests(config, docs, extra=()):
    settings = config["generation_kwargs"]
    return [
        SimpleNamespace(args=("", config["doc_to_messages"], dict(settings), index, "ours", "test", *extra))
        for index in range(len(docs))
    ]


def test_the_harness_gets_our_answers_and_our_figures(harness, checkpoint, media, tmp_path):
    config, docs = exported(SHORT, media / "rows.jsonl", tmp_path)
    assert config["task"] == "uni_moe_short" and config["generation_kwargs"] == {**SHORT.decoding, "until": []}
    model = harness.UniMoE(str(checkpoint), batch_size="4", device="cpu", workers=0)
    model.task_dict = {"ours": {"test": docs}}
    answers = model.generate_until(requests(config, docs))
    expected = evaluate(model.model, model.processor, SHORT, media / "rows.jsonl", workers=0)
    assert answers == [expected.records[number]["prediction"] for number in range(1, 7)]
    results = [config["process_results"](doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    assert [metric["metric"] for metric in config["metric_list"]] == ["exact_match", "chance"]
    for metric in config["metric_list"]:
        value = metric["aggregation"]([result[metric["metric"]] for result in results])
        expects = expected.figures["all"][metric["metric"]].value
        assert value == expects or (value != value and expects != expects)
        assert metric["higher_is_better"]


def test_rows_for_the_harness_are_found_from_any_folder(media, tmp_path, monkeypatch):
    monkeypatch.chdir(media)
    _, docs = exported(SHORT, "rows.jsonl", tmp_path)
    sources = [source for doc in docs for source in lmms_eval_tasks.doc_to_visual(doc)]
    assert sources and all(str(media) in str(source) for source in sources)


def test_requests_with_other_settings_keep_their_order_and_stop_where_they_say(harness, checkpoint, media, tmp_path):
    config, docs = exported(SHORT, media / "rows.jsonl", tmp_path)
    model = harness.UniMoE(str(checkpoint), batch_size=2, device="cpu", workers=0, system_prompt="what")
    model.task_dict = {"ours": {"test": docs}}
    asked = requests(config, docs)
    whole = model.generate_until(asked)
    for place in (1, 4):
        asked[place].args[2].update(max_new_tokens=1)
    asked[0].args[2].update(until=[whole[0][-1]])
    mixed = model.generate_until(asked)
    assert all(whole[place].startswith(mixed[place]) and len(mixed[place]) < len(whole[place]) for place in (1, 4))
    assert mixed[0] == whole[0].split(whole[0][-1])[0].strip() and mixed[5] == whole[5]


def test_media_of_data_sets_are_taken_as_the_harness_holds_them(harness, checkpoint):
    model = harness.UniMoE(str(checkpoint), device="cpu", workers=0)
    sound = {"array": tone(), "sampling_rate": 16000}
    content = [
        {"type": "image", "url": Image.fromarray(picture())},
        {"type": "audio", "url": sound},
        {"type": "text", "text": "what is it"},
        {"type": "image", "url": Image.fromarray(picture(1))},
    ]
    ask = SimpleNamespace(
        args=(lambda doc: [{"role": "user", "content": content}], {"max_new_tokens": 3}, 0, "t", "s")
    )
    model.task_dict = {"t": {"s": [{}]}}
    ours = [{"type": p["type"], p["type"]: p["url"]} if "url" in p else p for p in content]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": ours}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ids = model.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    text = model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate_until([ask]) == [text.strip()]
    hearing = harness.UniMoE(str(checkpoint), device="cpu", workers=0, audio="speech")
    assert hearing._part(content[1])["type"] == "speech" and model._part(content[1])["type"] == "audio"
    assert model._part({"type": "audio", "url": sound, "modality": "speech"})["type"] == "speech"


def test_likelihoods_of_continuations_are_those_of_the_model(harness, checkpoint):
    model = harness.UniMoESimple(str(checkpoint), device="cpu", batch_size=3)
    shown = Image.fromarray(picture())
    model.task_dict = {"t": {"s": [{"picture": shown}]}}
    see = lambda doc: [doc["picture"]]  # noqa: E731
    words = ["a bird", "bell", "red", "no", "blue"]
    asked = [SimpleNamespace(args=("what is it", f" {word}", see, 0, "t", "s")) for word in words]
    found = model.loglikelihood(asked)
    collate = UniMoEDataCollator(model.processor)
    result = sys.modules["lmms_eval.api.instance"].GenerationResult
    assert all(isinstance(each, result) and each.text == tuple(each) and each.token_counts is None for each in found)
    for word, (value, is_greedy) in zip(words, found, strict=True):
        part = [{"type": "image", "image": shown}, {"type": "text", "text": "what is it"}]
        said = [{"role": "user", "content": part}, {"role": "assistant", "content": word}]
        batch = collate([{"messages": said}])
        with torch.no_grad():
            logits = model.model(**batch).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        assert value == pytest.approx(model.model(**batch).loss.item(), abs=1e-5)  # the lowest wins there
        assert is_greedy == bool((logits.argmax(-1) == labels)[labels != -100].all())


def test_the_simple_interface_answers_too(harness, checkpoint):
    model = harness.UniMoESimple(str(checkpoint), device="cpu", workers=0)
    model.task_dict = {"t": {"s": [{}]}}
    see = lambda doc: [Image.fromarray(picture())]  # noqa: E731
    ask = SimpleNamespace(args=("what is it", {"max_new_tokens": 3, "temperature": 0}, see, 0, "t", "s"))
    assert len(model.generate_until([ask])) == 1
    assert harness.UniMoESimple.is_simple and not harness.UniMoE.is_simple
    assert harness.MANIFEST.id == "uni_moe"
    for path in (harness.MANIFEST.simple_class_path, harness.MANIFEST.chat_class_path):
        assert hasattr(harness, path.rpartition(".")[2])


def test_settings_of_other_peoples_tasks_do_not_stop_it(harness):
    given = {"max_gen_toks": 5, "temperature": 0, "top_p": None, "use_cache": True, "until": ["x"], "num_beams": 1}
    assert harness._decoding(given) == {"max_new_tokens": 5, "temperature": 0, "num_beams": 1, "do_sample": False}


def test_arguments_that_are_none_and_rounds_are_refused(harness, checkpoint):
    with pytest.raises(ValueError, match="`uni_moe` has no argument 'fps'"):
        harness.UniMoE(str(checkpoint), device="cpu", fps=3)
    with pytest.raises(ValueError, match="it can be 'audio' .sound. or 'speech'"):
        harness.UniMoE(str(checkpoint), device="cpu", audio="music")
    with pytest.raises(NotImplementedError, match="tasks of several rounds"):
        harness.UniMoE(str(checkpoint), device="cpu").generate_until_multi_round([])


def test_what_the_harness_cannot_run_is_not_written(media, tmp_path):
    source = media / "rows.jsonl"
    for task, message in (("preference", "compares likelihoods"), ("mm-vet", "is scored by a judge")):
        with pytest.raises(ValueError, match=message):
            lmms_eval_tasks.export_to_lmms_eval(load_task(task), [], tmp_path)
    seen = [{"question": "what", "image": Image.fromarray(picture()), "answer": "x"}]
    with pytest.raises(ValueError, match="holds media in memory"):
        lmms_eval_tasks.export_to_lmms_eval(SHORT, load_questions(SHORT, seen), tmp_path)
    assert not [*tmp_path.iterdir()] and source.exists()


def test_the_plug_in_is_an_entry_point_of_the_package():
    from importlib.metadata import entry_points

    (found,) = [each for each in entry_points(group="lmms_eval.models") if each.name == "uni_moe"]
    assert found.value == "uni_moe_hf.evaluation.lmms_eval_model:MANIFEST"
