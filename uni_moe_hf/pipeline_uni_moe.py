"""`pipeline("any-to-text")`: conversations with any media in, text out."""

from typing import Any

from transformers import ImageTextToTextPipeline, Pipeline
from transformers.pipelines.image_text_to_text import Chat


class AnyToTextPipeline(ImageTextToTextPipeline):
    r"""
    Answers conversations that hold text, pictures, videos, speech and sound. Arguments and results follow
    `image-text-to-text`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("any-to-text", model="checkpoint", trust_remote_code=True)
    >>> chat = [{"role": "user", "content": [{"type": "audio", "path": "bell.wav"}, {"type": "text", "text": "What is it?"}]}]
    >>> pipe(chat, max_new_tokens=20, return_full_text=False)[0]["generated_text"]
    ```
    """

    def __init__(self, *args, **kwargs):
        # Past ImageTextToTextPipeline: it looks the model up in a list that only holds the library's own.
        Pipeline.__init__(self, *args, **kwargs)

    def __call__(
        self,
        text: str | list | None = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        **kwargs,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Args:
            text (`list[dict]`, a list of those, `str` or `list[str]`):
                A conversation or several, media inside their parts as `{"type": "image" | "video" | "audio" |
                "speech", "path" | "url" | <type>: ...}`; or raw prompts with one placeholder per clip.
            images, videos, audio, speech (*optional*):
                Media of raw prompts, in reading order: paths, URLs, arrays or PIL images.
            max_new_tokens (`int`, *optional*, defaults to 256): Longest answer.
            return_full_text (`bool`, *optional*, defaults to `True`): Whether results repeat the conversation.
            generate_kwargs (`dict`, *optional*): For `generate`, for example a `streamer`.

        Returns:
            `list[dict]` with `input_text` and `generated_text`; a list of such lists for several conversations.

        Raises:
            ValueError: no input at all, or media beside a conversation.
        """
        media = {"images": images, "videos": videos, "audio": audio, "speech": speech}
        media = {name: clips for name, clips in media.items() if clips is not None}
        if not media:
            if text is None:
                raise ValueError("Pass a conversation or a prompt as `text`.")
            return super().__call__(text=text, **kwargs)
        if text is None or not (isinstance(text, str) or isinstance(text[0], str)):
            raise ValueError(
                f"Got {', '.join(media)} beside {'no text' if text is None else 'a conversation'}; put media into the "
                "conversation's parts, or pass a raw prompt with one placeholder per clip as `text`."
            )
        return Pipeline.__call__(self, {"text": text, **media}, **kwargs)

    def preprocess(self, inputs: Any = None, **processing_kwargs) -> dict[str, Any]:
        """Conversations as in the parent; raw prompts with media go to the processor as they are."""
        if isinstance(inputs, Chat) or not isinstance(inputs, dict):
            return super().preprocess(inputs, **processing_kwargs)
        kwargs = {**processing_kwargs, **(processing_kwargs.pop("processor_kwargs", None) or {})}
        kwargs.setdefault("padding", isinstance(inputs["text"], list))
        model_inputs = self.processor(**inputs, return_tensors="pt", **kwargs).to(dtype=self.dtype)
        model_inputs["text"] = inputs["text"]
        return model_inputs

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves model and processor; the folder works alone, in a process without this package."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["AnyToTextPipeline"]
