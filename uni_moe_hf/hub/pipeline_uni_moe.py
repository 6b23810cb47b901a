"""`pipeline("any-to-text")`: conversations with any media in, text out."""

from typing import Any

from transformers import ImageTextToTextPipeline, Pipeline


try:
    # How the base class tells a conversation from a batch.
    from transformers.utils.chat_template_utils import Chat
except ImportError:
    Chat = None


class AnyToTextPipeline(ImageTextToTextPipeline):
    r"""
    Answers conversations that hold text, pictures, videos, speech and sound. Arguments and results follow
    `image-text-to-text`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("any-to-text", model="checkpoint", trust_remote_code=True)
    >>> parts = [{"type": "audio", "path": "bell.wav"}, {"type": "text", "text": "What is it?"}]
    >>> chat = [{"role": "user", "content": parts}]
    >>> pipe(chat, max_new_tokens=20, return_full_text=False)[0]["generated_text"]
    ```
    """

    def __init__(self, *args, **kwargs):
        self.default_batch_size = kwargs.get("batch_size") or 1
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
        if text is None or (isinstance(text, list) and not text):
            beside = f" Got {', '.join(media)} beside no text; media need one placeholder each." if media else ""
            raise ValueError(f"Pass a conversation or a prompt as `text`; it is missing or empty.{beside}")
        is_raw = isinstance(text, str) or isinstance(text[0], str)
        if media and not is_raw:
            raise ValueError(
                f"Got {', '.join(media)} beside a conversation; put media into the conversation's parts, or pass a "
                "raw prompt with one placeholder per clip as `text`."
            )
        if media:
            return Pipeline.__call__(self, {"text": text, **media}, **kwargs)

        batch_size = kwargs.get("batch_size") or self.default_batch_size
        if is_raw or isinstance(text[0], dict) or batch_size == 1:
            return super().__call__(text=text, **kwargs)
        wanted = {**self.model.generation_config.to_dict(), **(kwargs.get("generate_kwargs") or {}), **kwargs}
        if Chat is None or (wanted.get("num_return_sequences") or 1) > 1:
            # Before 5.23 the base class mixes up the several answers of several conversations.
            return super().__call__(text=text, **{**kwargs, "batch_size": 1})
        # The base class can only join samples that hold the same kinds of media, so batches are made here.
        results, kwargs = [], {**kwargs, "batch_size": 1}
        for start in range(0, len(text), batch_size):
            chats = [Chat(chat) for chat in text[start : start + batch_size]]
            records = Pipeline.__call__(self, {"chats": chats}, **kwargs)
            per_chat = len(records) // len(chats)
            results += [records[first : first + per_chat] for first in range(0, len(records), per_chat)]
        return results

    def preprocess(self, inputs: Any = None, **processing_kwargs) -> dict[str, Any]:
        """Single conversations as in the parent; batches of them, and prompts with media, go to the processor here."""
        if not isinstance(inputs, dict):
            return super().preprocess(inputs, **processing_kwargs)
        processor_kwargs = processing_kwargs.pop("processor_kwargs", None) or {}
        if "chats" not in inputs:
            kwargs = {"padding": isinstance(inputs["text"], list), **processing_kwargs, **processor_kwargs}
            model_inputs = self.processor(**inputs, return_tensors="pt", **kwargs).to(dtype=self.dtype)
            model_inputs["text"] = inputs["text"]
            return model_inputs
        processing_kwargs.pop("timeout", None)
        model_inputs = self.processor.apply_chat_template(
            [chat.messages for chat in inputs["chats"]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not processing_kwargs.get("continue_final_message"),
            processor_kwargs={"padding": True, "padding_side": "left", **processor_kwargs},
            **processing_kwargs,
        ).to(dtype=self.dtype)
        model_inputs["text"] = inputs["chats"]
        return model_inputs

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves model and processor; the folder works alone, in a process without this package."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["AnyToTextPipeline"]
