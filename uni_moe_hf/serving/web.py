"""
A page in the browser: media in any number, an answer as it is made, and the experts behind every token of it.

[`build`] makes the page, [`serve`] opens it. Everything is computed here; unless it is shared, nothing goes elsewhere.
"""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..hub.files_uni_moe import sentence_of
from ..mixtures.expert_adapters import expert_names
from ..mixtures.routing import routers_of
from ..training.row_files import load_rows
from ..training.rows import parts_of, rooted, row_to_messages
from . import web_page
from .live_answers import LiveAnswer, answer_live


MAX_EXAMPLES = 8
PAUSE = 0.15  # seconds between two states of the page, at least
LABELS = {"image": "Picture", "video": "Video", "speech": "Speech", "audio": "Sound"}


class Served(NamedTuple):
    """
    A model that answers on the page.

    Args:
        name (`str`): What stands above its answers.
        model (`nn.Module`): In evaluation mode, on its device.
        processor ([`UniMoEProcessor`]): Of the model.
    """

    name: str
    model: nn.Module
    processor: Any


def modalities_of(served: Sequence[Served]) -> list[str]:
    """What all models take, in the order of the page's tabs."""
    return [each for each in LABELS if all(each in one.processor.modalities for one in served)]


def examples_of(rows: str | Path, modalities: Sequence[str]) -> list[tuple[list[dict[str, str]], str]]:
    """
    Args:
        rows (`str` or `Path`): A file of rows; paths in it start from its folder.
        modalities (`Sequence[str]`): What the model takes.

    Returns:
        `list[tuple]`: clips, `{"type", "path"}` each, and what is asked of them, from the first user's message of the
        first row of every kind, [`MAX_EXAMPLES`] at most.

    Raises:
        ValueError, OSError: there is no such file, or it holds no rows.
    """
    found: dict[tuple[str, ...], tuple[list[dict[str, str]], str]] = {}
    for row in load_rows(str(rows)):
        messages = rooted(row_to_messages(row), Path(row.get("_root") or Path(rows).parent))
        parts = parts_of([message for message in messages if message["role"] == "user"][:1])
        clips = [part for part in parts if part.get("type", "text") != "text"]
        kinds = tuple(part["type"] for part in clips)
        if kinds in found or not set(kinds) <= set(modalities) or not all(_file(part) for part in clips):
            continue
        text = " ".join(part.get("text") or "" for part in parts if part.get("type", "text") == "text").strip()
        if not clips and not text:
            continue
        found[kinds] = ([{"type": part["type"], "path": _file(part)} for part in clips], text)
        if len(found) == MAX_EXAMPLES:
            break
    return list(found.values())


def _file(part: Mapping[str, Any]) -> str | None:
    """The file of a message part; `None` where it has none."""
    path = part.get("path") or part.get(part["type"])
    return str(path) if isinstance(path, str | Path) and Path(path).is_file() else None


def conversation(clips: Sequence[Mapping[str, str]], question: str) -> list[dict[str, Any]]:
    """
    Args:
        clips (`Sequence[dict]`): `{"type", "path"}` each, in the order in which they are shown to the model.
        question (`str`): What is asked; may be empty where a clip asks.

    Returns:
        `list[dict]`: messages.

    Raises:
        ValueError: there is neither.
    """
    text = [{"type": "text", "text": question.strip()}] if question.strip() else []
    if not clips and not text:
        raise ValueError("There is nothing to answer yet; add a clip, or write a question.")
    return [{"role": "user", "content": [*({"type": c["type"], "path": c["path"]} for c in clips), *text]}]


def answers(
    served: Sequence[Served],
    clips: Sequence[Mapping[str, str]],
    question: str,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[list[str]]:
    """
    Args:
        served (`Sequence[Served]`): One model, or two to compare.
        clips, question: As in [`conversation`].
        max_new_tokens (`int`): Longest answer.
        temperature (`float`): 0 for the likeliest words.

    Yields:
        `list[str]`: HTML of the answer and of the panel, model after model, whenever there is more to show.
    """
    states: list[LiveAnswer | str | None] = [None] * len(served)  # answers, or what went wrong
    yield _shown(states)
    try:
        chat = conversation(clips, question)
    except ValueError as error:
        yield _shown([str(error)] * len(served))
        return
    drawing = {"do_sample": True, "temperature": float(temperature)} if temperature > 0 else {"do_sample": False}
    streams = {
        index: answer_live(each.model, each.processor, chat, max_new_tokens, **drawing)
        for index, each in enumerate(served)
    }
    sent = 0.0
    try:
        while streams:
            for index in [*streams]:  # in turn, so that two answers grow side by side
                try:
                    states[index] = next(streams[index])
                except StopIteration:
                    del streams[index]
                except Exception as error:  # of whatever kind: the page goes on, and says what it was
                    del streams[index]
                    sentence = sentence_of(error)
                    for clip in clips:  # who uploaded it knows it by its name
                        sentence = sentence.replace(clip["path"], Path(clip["path"]).name)
                    states[index] = sentence
            if not streams or time.monotonic() - sent >= PAUSE:  # a page need not be sent anew for every token
                sent = time.monotonic()
                yield _shown(states)
    finally:
        for stream in streams.values():
            stream.close()


def _shown(states: Sequence[LiveAnswer | str | None]) -> list[str]:
    """HTML of answers and panels."""
    html = []
    for state in states:
        if isinstance(state, str):
            html += [web_page.problem(state), web_page.panel(None)]
        elif state is None:
            html += [web_page.answer(None, "Reading…"), web_page.panel(None)]
        else:
            note = f"{len(state.words)} tokens." if state.is_done else ""
            html += [web_page.answer(state, note), web_page.panel(state)]
    return html


def build(served: Sequence[Served], examples: Sequence[tuple[list[dict[str, str]], str]] = ()) -> Any:
    """
    Args:
        served (`Sequence[Served]`): One model, or two to compare.
        examples (`Sequence[tuple]`): What [`examples_of`] returns.

    Returns:
        `gradio.Blocks`.

    Raises:
        ImportError: Gradio is not installed.
    """
    gradio = _gradio()
    first, modalities = served[0], modalities_of(served)
    with gradio.Blocks(title=f"Uni-MoE: {first.name}", analytics_enabled=False, fill_width=True) as page:
        names, experts = " and ".join(each.name for each in served), _experts(first) if len(served) == 1 else None
        gradio.HTML(web_page.title(names, modalities, experts))
        clips = gradio.State([])
        buttons = _example_buttons(gradio, examples)
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=320):
                sources = _sources(gradio, modalities)
                _shown_clips(gradio, clips)
                question = gradio.Textbox(label="Question", lines=2, placeholder="What do you see and hear?")
                with gradio.Row():
                    ask = gradio.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    stop = gradio.Button("Stop", elem_id="stop", min_width=70)
                    clear = gradio.Button("Start over", elem_id="clear", min_width=110)
                with gradio.Accordion("Settings", open=False):
                    length = gradio.Slider(1, 1024, 128, step=1, label="Longest answer, in tokens")
                    temperature = gradio.Slider(0, 2, 0, step=0.05, label="Temperature; 0 takes the likeliest words")
            shown = []
            for each in served:
                with gradio.Column(scale=3, min_width=320):
                    if len(served) > 1:
                        gradio.HTML(web_page.title(each.name, (), _experts(each), level=3))
                    shown += [gradio.HTML(html) for html in _nothing()]

        for kind, source in sources.items():
            # Cleared once it is in the list, so that the next one can be added.
            source.change(
                lambda path, held, kind=kind: (held + [{"type": kind, "path": path}], None) if path else (held, None),
                [source, clips],
                [clips, source],
                show_progress="hidden",
            )

        def run(held: list, asked: str, longest: float, heat: float) -> Iterator[list[str]]:
            yield from answers(served, held, asked or "", int(longest), float(heat))

        asking = [clips, question, length, temperature]
        answering = {"fn": run, "inputs": asking, "outputs": shown, "concurrency_id": "model"}
        # What is asked while an answer comes is answered next.
        answering |= {"show_progress": "hidden", "trigger_mode": "always_last"}
        running = [ask.click(**answering), question.submit(**answering)]
        for button, (example, asked) in zip(buttons, examples, strict=True):
            filled = button.click(
                lambda example=example, asked=asked: (example, asked), None, [clips, question], show_progress="hidden"
            )
            running.append(filled.then(**{**answering, "trigger_mode": None}))
        stop.click(None, cancels=running)
        clear.click(lambda: [[], "", *_nothing() * len(served)], None, [clips, question, *shown], cancels=running)
        for button in buttons:
            button.click(None, cancels=running[:2])  # what was asked before makes way
    page.queue(default_concurrency_limit=1)
    return page


def _nothing() -> list[str]:
    """Answer and panel before there are any."""
    return [web_page.answer(None, "The answer comes here."), web_page.panel(None)]


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The web page needs Gradio: `pip install 'uni-moe-hf[web]'`.") from error
    return gradio


def _experts(served: Served) -> list[str]:
    try:
        routers_of(served.model)
    except ValueError:
        return []
    return list(expert_names(served.model.config.get_text_config()))


def _sources(gradio: Any, modalities: Sequence[str]) -> dict[str, Any]:
    """Where clips come from, by modality: a tab each. Files reach the processor as they are, broken ones too."""
    made = {}
    with gradio.Tabs():
        for kind in modalities:
            with gradio.Tab(LABELS[kind]):
                label = f"Add a {LABELS[kind].lower()}" if kind != "speech" else "Add speech"
                settings = {"label": label, "elem_id": f"add-{kind}"}
                if kind == "image":
                    made[kind] = gradio.Image(sources=["upload", "webcam", "clipboard"], height=170, **settings)
                    # On the instance: Gradio writes a file beside a module in which a component is derived.
                    made[kind].preprocess = lambda payload: None if payload is None else payload.path
                elif kind == "video":
                    made[kind] = gradio.Video(sources=["upload", "webcam"], height=170, **settings)
                else:
                    order = ["microphone", "upload"] if kind == "speech" else ["upload", "microphone"]
                    made[kind] = gradio.Audio(sources=order, type="filepath", **settings)
    return made


def _shown_clips(gradio: Any, clips: Any) -> None:
    """What has been added, in order, and how to take it away again."""

    @gradio.render(inputs=[clips])
    def show(held: list[dict[str, str]]) -> None:
        if not held:
            return
        with gradio.Row(elem_id="clips"):
            for index, clip in enumerate(held):
                with gradio.Column(min_width=250 if clip["type"] in ("audio", "speech") else 150, scale=0):
                    settings = {"value": clip["path"], "label": f"{index + 1}. {LABELS[clip['type']]}"}
                    if clip["type"] == "image":
                        gradio.Image(**settings, interactive=False, height=110, buttons=[])
                    elif clip["type"] == "video":
                        gradio.Video(**settings, interactive=False, height=110, buttons=[])
                    else:
                        gradio.Audio(**settings, interactive=False, buttons=[])
                    gradio.Button("Remove", size="sm").click(
                        lambda now, index=index: now[:index] + now[index + 1 :], [clips], [clips]
                    )


def _example_buttons(gradio: Any, examples: Sequence[tuple[list[dict[str, str]], str]]) -> list[Any]:
    if not examples:
        return []
    buttons = []
    with gradio.Row(elem_id="examples"):
        for clips, question in examples:
            kinds = " + ".join(LABELS[clip["type"]].lower() for clip in clips) or "text"
            shown = f"Try {kinds}: {question}" if question else f"Try {kinds}"
            buttons.append(gradio.Button(shown if len(shown) < 60 else shown[:57] + "…", size="sm", min_width=100))
    return buttons


def check_address(host: str, port: int) -> None:
    """
    Before models are loaded in vain.

    Raises:
        ValueError: there is no such host or port here, or it is in use.
        ImportError: Gradio is not installed.
    """
    _gradio()
    if not 0 < port < 65536:
        raise ValueError(f"There is no port {port}; choose one from 1 to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(
            f"There is no host '{host}' here; 127.0.0.1 is this machine, 0.0.0.0 all who reach it."
        ) from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ValueError(f"Port {port} of {host} is in use, or not ours to open; choose another one.") from error


def serve(
    served: Sequence[Served],
    examples: Sequence[tuple[list[dict[str, str]], str]] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    **settings: Any,
) -> Any:
    """
    Args:
        served, examples: As in [`build`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Who may reach the page; this machine alone by default.
        port (`int`, *optional*, defaults to 7860): Where.
        share (`bool`, *optional*, defaults to `False`): Whether Gradio's servers make the page public.
        settings: Further arguments of Gradio's `launch`.

    Returns:
        What `launch` returns, once the page is closed.

    Raises:
        ValueError: there is no such host or port here, or it is in use.
        ImportError: Gradio is not installed.
    """
    gradio = _gradio()
    check_address(host, port)
    page = build(served, examples)
    font = ["system-ui", "DejaVu Sans", "sans-serif"]  # no fonts from elsewhere
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        allowed_paths=sorted({clip["path"] for clips, _ in examples for clip in clips}),  # and nothing beside them
        max_file_size="200mb",
        css=web_page.STYLE,
        theme=gradio.themes.Soft(primary_hue="blue", font=font, font_mono=["monospace"]),
        footer_links=[],
        **settings,
    )


__all__ = ["Served", "answers", "build", "conversation", "examples_of", "serve"]
