"""Figures of a training: sent to TensorBoard and Trackio, or files in its folder."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from tiny_training import make_own_trainer, write_media

from uni_moe_hf import LiveFiguresCallback, RoutingFiguresCallback
from uni_moe_hf.insight import live
from uni_moe_hf.mixtures.routing import RoutingReport


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def test_figures_go_to_tensorboard_every_few_logs_and_scalars_always(media, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_own_trainer(media, tmp_path, tiny_model(), "moe", report_to="tensorboard")
    RoutingFiguresCallback.add_to(trainer, 2)
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"routing/over_steps", "routing/utilisation"}
    for tag in events.Tags()["images"]:
        assert [image.step for image in events.Images(tag)] == [2, 4]
        assert events.Images(tag)[0].width > 300
    assert [event.step for event in events.Scalars("train/specialisation/max")] == [1, 2, 3, 4]


def test_figures_go_to_trackio_as_pictures(media, tmp_path, monkeypatch):
    sent = []
    stub = SimpleNamespace(Image=np.asarray, log=lambda values, step: sent.append((values, step)))
    monkeypatch.setitem(sys.modules, "trackio", stub)
    trainer = make_own_trainer(media, tmp_path, tiny_model(), "moe")
    trainer.args.report_to = ["trackio"]
    RoutingFiguresCallback.add_to(trainer, 4)
    trainer.train()
    assert [(*values, step) for values, step in sent] == [("routing/over_steps", 4), ("routing/utilisation", 4)]
    assert all(picture.ndim == 3 and picture.dtype == np.uint8 for values, _ in sent for picture in values.values())


def test_without_a_place_for_them_there_are_no_figures_and_bad_numbers_are_refused(media, tmp_path):
    trainer = make_own_trainer(media, tmp_path, tiny_model(), "moe")
    before = len(trainer.callback_handler.callbacks)
    RoutingFiguresCallback.add_to(trainer, 10)
    trainer.args.report_to = ["tensorboard"]
    RoutingFiguresCallback.add_to(trainer, 0)
    assert len(trainer.callback_handler.callbacks) == before
    with pytest.raises(ValueError, match="`routing_figures` is -1"):
        RoutingFiguresCallback.add_to(trainer, -1)


@pytest.mark.parametrize(("stage", "drawn"), [("connectors", {"losses"}), ("moe", {"losses", "routing"})])
def test_live_figures_are_whole_files_in_the_folder_of_the_stage(media, tmp_path, stage, drawn, monkeypatch):
    monkeypatch.setattr(live, "PAUSE", 0.0)
    dense = {"mlp_layer_types": ["dense", "dense"]}
    trainer = make_own_trainer(media, tmp_path, tiny_model(dense if stage == "connectors" else None), stage)
    LiveFiguresCallback.add_to(trainer, False)
    LiveFiguresCallback.add_to(trainer, True)
    assert sum(isinstance(each, LiveFiguresCallback) for each in trainer.callback_handler.callbacks) == 1
    trainer.train()
    folder = tmp_path / "figures"
    assert {file.name for file in folder.iterdir()} == {f"{name}.png" for name in drawn}
    for file in folder.iterdir():
        with Image.open(file) as figure:
            assert figure.width > 500 and len(set(np.asarray(figure.convert("L")).flat)) > 20


def test_specialisation_is_1_where_the_expert_tells_the_modality_and_0_where_it_does_not():
    planted = torch.diag_embed(torch.tensor([[3, 4, 5, 6]]))
    even = torch.full((1, 4, 4), 5)
    nothing = torch.zeros(1, 4, 4, dtype=torch.long)
    report = RoutingReport(torch.cat([planted, even, nothing]), (0, 1, 2), ("a", "b", "c", "d"), 1)
    assert report.specialisation.tolist() == pytest.approx([1.0, 0.0, 0.0])
