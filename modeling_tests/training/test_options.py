"""Options of the scripts: what they say is done, or refused."""

import json

import pytest
from datasets import Dataset
from tiny import FEATURES, tiny_model, tiny_processor
from tiny_training import rows, write_media
from trl import SFTConfig

from uni_moe_hf import StageArguments
from uni_moe_hf.training.options import PartsArguments, parse_options
from uni_moe_hf.training.rows import row_modalities


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_media(tmp_path_factory.mktemp("data"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(8))))
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows(3))))
    return folder


def parsed(tmp_path, *args: str) -> tuple[StageArguments, SFTConfig]:
    return parse_options((StageArguments, SFTConfig), ["--output_dir", str(tmp_path), "--report_to", "none", *args])


def test_without_a_gpu_a_run_takes_the_cpu_and_float32(tmp_path):
    _, training = parsed(tmp_path)
    assert training.use_cpu and not training.bf16
    assert parsed(tmp_path, "--bf16", "true")[1].bf16
    (tmp_path / "x.yaml").write_text("bf16: true\n")
    assert parsed(tmp_path, "--config", str(tmp_path / "x.yaml"))[1].bf16


def test_rows_are_streamed_and_sampled_as_the_options_say(data, tmp_path):
    name = ["--dataset_name", str(data / "rows.jsonl")]
    whole, _ = parsed(tmp_path, *name)
    streamed, _ = parsed(tmp_path, *name, "--dataset_streaming", "--question", "a", "b")
    assert len(whole.rows()) == 8 and not hasattr(streamed.rows(), "__len__")
    assert streamed.question == ["a", "b"]
    model = tiny_model()
    processor = tiny_processor(model.config)
    for args in (whole, parsed(tmp_path, *name, "--dataset_streaming")[0]):
        for count, sizes in ((4, [1, 1, 1, 1, 2, 2]), (1, [1] * 6)):
            batches = list(args.sample(args.rows(), model, processor, count, batch_size=3))
            assert sorted(len(batch["input_ids"]) for batch in batches) == sizes
            kinds = [frozenset(batch) & set(FEATURES.values()) for batch in batches]
            assert len(set(kinds)) == len(kinds) == 6  # each batch is of rows with the same media


def test_a_sample_passes_over_rows_that_training_skips(data, tmp_path):
    args, _ = parsed(tmp_path, "--dataset_name", str(data / "rows.jsonl"), "--skip_bad_rows")
    broken = {**args.rows()[0], "_root": str(tmp_path / "nowhere")}
    model = tiny_model()
    processor = tiny_processor(model.config)
    batches = list(args.sample(Dataset.from_list([broken, dict(args.rows()[4])]), model, processor, 4))
    assert [len(batch["input_ids"]) for batch in batches] == [1]


def test_a_split_to_evaluate_on_is_read_or_refused(data, tmp_path):
    name = ["--dataset_name", str(data / "rows.jsonl")]
    args, training = parsed(tmp_path, *name)
    assert args.splits(training)[1] is None
    args, training = parsed(tmp_path, *name, "--dataset_test_split", "held_out")
    with pytest.raises(ValueError, match="nothing is evaluated; add `--eval_strategy`"):
        args.splits(training)
    evaluated = [*name, "--eval_strategy", "steps", "--eval_steps", "1"]
    args, training = parsed(tmp_path, *evaluated)
    with pytest.raises(ValueError, match="hold some out with `--eval_rows N`, or name a file"):
        args.splits(training)
    args, training = parsed(tmp_path, *evaluated, "--dataset_test_split", str(data / "held_out.jsonl"))
    assert len(args.splits(training)[1]) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dtype", "float8"], "`dtype` is 'float8'"),
        (["--ignore_bias_buffers"], "`ignore_bias_buffers` is for models with boolean masks"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        parsed(tmp_path, *options)


def test_options_of_data_that_mean_nothing_are_refused(data, tmp_path):
    args, _ = parsed(tmp_path, "--dataset_name", str(data / "rows.jsonl"), "--dataset_config", "en")
    with pytest.raises(ValueError, match="no configurations; leave out 'en'"):
        args.rows()
    with pytest.raises(ValueError, match="There are no data"):
        parsed(tmp_path)[0].rows()


def test_loading_is_told_the_dtype_and_the_attention(tmp_path):
    args, *_ = parse_options(
        (StageArguments, SFTConfig, PartsArguments),
        ["--llm", "x", "--output_dir", str(tmp_path), "--dtype", "bfloat16", "--attn_implementation", "eager"],
    )
    assert (
        args.loading() == {"dtype": "bfloat16", "attn_implementation": "eager"} and parsed(tmp_path)[0].loading() == {}
    )


def test_a_row_that_cannot_be_used_is_told_before_models_are_loaded(data, tmp_path):
    (tmp_path / "rows.csv").write_text("photo,label\n0.png,a bird\n")
    name = ["--dataset_name", str(tmp_path / "rows.csv")]
    with pytest.raises(ValueError, match=r"Row 1 of '.*rows\.csv' cannot be used: .*photo=image"):
        parsed(tmp_path, *name)[0].rows()
    args, _ = parsed(tmp_path, *name, "--columns", "photo=image", "label=caption")
    rows = args.rows()
    assert rows[0]["answer"] == "a bird"
    args.check_modalities(rows, ["image"], tiny_processor())
    with pytest.raises(ValueError, match="The expert is for speech, but of 1 rows none holds it; they hold image"):
        args.check_modalities(rows, ["speech"], tiny_processor())


@pytest.mark.parametrize("streaming", [False, True])
def test_an_expert_may_be_trained_on_the_rows_of_its_modalities_alone(data, tmp_path, streaming):
    more = ["--dataset_streaming", "true"] if streaming else []
    args, _ = parsed(tmp_path, "--dataset_name", str(data / "rows.jsonl"), *more)
    processor, whole = tiny_processor(), list(args.rows())
    kinds = {
        kind: [row for row in whole if kind in row_modalities(row)[0]]
        for kind in ("image", "video", "audio", "speech")
    }
    for wanted in (["image"], ["audio", "speech"]):
        found = list(args.only_with(args.rows(), wanted, processor))
        expected = [row["_row"] for row in whole if any(row in kinds[kind] for kind in wanted)]
        assert sorted(row["_row"] for row in found) == sorted(expected) and 0 < len(found) < len(whole)
    # What cannot be read stays, for the collator to name.
    broken = Dataset.from_list([{"nothing": "known"}])
    assert [*args.only_with(broken, ["image"], processor)] == [broken[0]]
