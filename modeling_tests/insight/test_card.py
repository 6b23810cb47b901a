"""A checkpoint's page on the Hub: how to ask the model, its scores, its figures; renewed, pushed with its pictures."""

import base64
import http.server
import json
import re
import subprocess
import sys
import threading

import pytest
from huggingface_hub import EvalResult, ModelCard
from tiny import DENSE, child_environment, picture, tiny_model, tiny_processor, tone, user

from uni_moe_hf import complete_card, evaluate, routing_report
from uni_moe_hf.cli.main import main


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}
CLIPS = ({"type": "image", "image": picture()}, {"type": "audio", "audio": tone(0.3)})
ROWS = [{"messages": [*user(clip, "what is it"), ANSWER], "task": clip["type"]} for clip in CLIPS * 5]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = tiny_model({"shared_expert_base": True})
    processor = tiny_processor(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def looked_at(checkpoint):
    _, model, processor = checkpoint
    evaluation = evaluate(model, processor, "short-answers", ROWS, quiet=True)
    return routing_report(model, processor, ROWS, num_examples=0), evaluation


def test_a_card_has_snippets_scores_and_figures_and_renews_them(checkpoint, looked_at):
    folder, _, _ = checkpoint
    report, evaluation = looked_at
    (folder / "README.md").unlink(missing_ok=True)
    path = complete_card(folder, report, evaluation, name="me/birds")
    card = ModelCard.load(path)
    for way in (
        'pipeline("any-to-text", model="me/birds"',
        'AutoModel.from_pretrained("me/birds"',
        "vllm serve me/birds",
    ):
        assert way in card.text
    for figure in re.findall(r"!\[.+?\]\((.+?)\)", card.text):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert {"figures/spread.png", "figures/knock-out.png"} <= set(re.findall(r"\((figures/.+?)\)", card.text))
    exact = evaluation.figures["all"]["exact_match"]
    assert f"{100 * exact.value:.1f} %" in card.text and "| image | 5 |" in card.text and "| audio | 5 |" in card.text
    (result,) = [each for each in card.data.eval_results if each.metric_type == "exact_match"]
    assert result.metric_value == round(exact.value, 4)
    path.write_text(path.read_text().replace("## Asking it", "## Changed by hand") + "\nA word of mine.\n")
    again = complete_card(folder, report, evaluation).read_text()
    assert "vllm serve me/birds" in again and 'model="me/birds"' in again  # the name stays
    assert again.count("## Asking it") == again.count("## Scores") == again.count("## Who works on what") == 1
    assert "A word of mine." in again and "Changed by hand" not in again
    other = EvalResult("any-to-any", "custom", "VQAv2", "accuracy", 0.7)
    card = ModelCard.load(path)
    card.data.eval_results = [*card.data.eval_results, other]
    for ending, breaks in (("", "\n"), ("\n\n", "\r\n")):  # as editors leave files
        text = f"---\n{card.data.to_yaml()}\n---\n{card.text.strip()}{ending}"
        path.write_bytes(text.replace("\n", breaks).encode())
        again = complete_card(folder, report, evaluation, name="me/fish").read_text()
        assert again.count("<!-- asking -->") == again.count("<!-- routing -->") == 1
        assert "VQAv2" in again and 'model="me/fish"' in again and "me/birds" not in again


def test_the_snippets_of_a_card_run_in_a_process_without_this_package(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    (folder / "README.md").unlink(missing_ok=True)
    text = complete_card(folder, name=str(folder)).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    code = "import sys; sys.modules['uni_moe_hf'] = None\n" + "\n".join(snippets)
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=child_environment(), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


class StandIn(http.server.BaseHTTPRequestHandler):
    """What the Hub answers when a folder is uploaded; keeps the files."""

    files: dict[str, bytes] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict = {"errors": [], "warnings": []}  # of the card's metadata
        if "/preupload/" in self.path:
            named = [each["path"] for each in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/me/birds/commit/0", "commitOid": "0" * 40, "success": True}
        elif self.path.endswith("/create"):
            answer = {"url": "https://huggingface.co/me/birds"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


def test_a_card_with_pictures_is_pushed_whole(checkpoint, looked_at, tmp_path):
    folder, _, _ = checkpoint
    complete_card(folder, *looked_at, name="me/birds")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from huggingface_hub import HfApi\napi = HfApi(token='hf_none')\napi.create_repo('me/birds', exist_ok=True)\n"
        f"api.upload_folder(repo_id='me/birds', folder_path={str(folder)!r})"
    )
    environment = child_environment(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    server.shutdown()
    assert child.returncode == 0, child.stderr[-2000:]
    for name in ("README.md", "figures/spread.png", "figures/knock-out.png", "config.json", "modeling_uni_moe.py"):
        assert StandIn.files[name] == (folder / name).read_bytes(), name


def test_the_command_takes_what_other_commands_leave(checkpoint, looked_at, tmp_path, capsys):
    folder, _, _ = checkpoint
    report, evaluation = looked_at
    report.save(tmp_path / "report")
    (tmp_path / "results.json").write_text(json.dumps(evaluation.to_dict()))
    given = ["--report", str(tmp_path / "report"), "--results", str(tmp_path / "results.json"), "--name", "me/other"]
    assert main(["card", str(folder), *given]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    text = (folder / "README.md").read_text()
    assert "vllm serve me/other" in text and "## Scores" in text and "figures/spread.png" in text


def test_what_a_card_cannot_be_made_of_is_said(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        complete_card(tmp_path / "empty")
    with pytest.raises(ValueError, match="none of the figures"):
        complete_card(folder, report=tmp_path / "empty")
    for content, sentence in (("{", "is no JSON"), ("{}", "no figures of an evaluation")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=sentence):
            complete_card(folder, evaluation=tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"task": "a", "figures": {"all": {}}}')
    with pytest.raises(ValueError, match="no figures of an evaluation"):
        complete_card(folder, evaluation=tmp_path / "results.json")
    with pytest.raises(ValueError, match="is none of a repository"):
        complete_card(folder, name='me/"birds"')
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no config of a model"):
        complete_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "uni_moe"}')
    (tmp_path / "README.md").write_text("---\na: [\n---\n# broken")
    with pytest.raises(ValueError, match="README.md' cannot be read as a model card"):
        complete_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', not 'uni_moe'"):
        complete_card(tmp_path)


def test_a_dense_model_has_a_card_without_figures(tmp_path):
    model = tiny_model(DENSE)
    model.save_pretrained(tmp_path)
    text = complete_card(tmp_path).read_text()
    assert "Who works on what" not in text and "## Asking it" in text
