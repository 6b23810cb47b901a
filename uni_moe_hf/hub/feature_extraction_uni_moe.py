"""
From sound to tensors: a waveform to windows, a window to features.

Speech windows become Whisper's log-mel (`input_features`), sound windows what the encoder of sound takes
(`input_values`): BEATs' filterbank, or what another encoder's own feature extractor makes.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import BatchFeature, FeatureExtractionMixin, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from .media_uni_moe import check_waveform


# The smallest energy that Kaldi takes the logarithm of: float32's epsilon.
FBANK_FLOOR = 1.192092955078125e-07


class YamnetFeatureExtractor(FeatureExtractionMixin):
    r"""
    YAMNet's log-mel: 25 ms frames every 10 ms, magnitudes in 64 bins from 125 to 7500 Hz.

    Args:
        chunk_length (`int`, *optional*, defaults to 12): Seconds of a window, which a clip is filled up to with zeros;
            12 is a whole number of patches.
    """

    model_input_names = ["input_values"]
    sampling_rate = 16000

    def __init__(self, chunk_length: int = 12, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(chunk_length, int) or chunk_length < 1:
            raise ValueError(f"`chunk_length={chunk_length!r}` must be a whole number of seconds.")
        self.chunk_length = chunk_length

    def __call__(self, audio: np.ndarray, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """`(num_samples,)` of at most a window to `input_values` `(1, 100 * chunk_length, 64)`."""
        samples = self.chunk_length * self.sampling_rate
        waveform = torch.zeros(samples + 240)  # so that there is a frame for each 10 ms
        waveform[: len(audio)] = torch.from_numpy(np.asarray(audio, dtype=np.float32))
        spectrum = torch.fft.rfft(waveform.unfold(0, 400, 160) * torch.hann_window(400), n=512).abs()  # (frames, 257)
        filters = mel_filter_bank(257, 64, 125, 7500, 16000, mel_scale="htk", triangularize_in_mel_space=True)
        log_mel = torch.log(spectrum @ torch.from_numpy(filters).float() + 0.001)
        return BatchFeature({"input_values": log_mel[None].numpy()}, tensor_type=return_tensors)


# Feature extractors of sound -> seconds of a window, by their settings.
FRONT_ENDS: dict[str, Callable[[Any], float]] = {
    "ASTFeatureExtractor": lambda extractor: extractor.max_length / 100,  # frames of 10 ms
    "ClapFeatureExtractor": lambda extractor: extractor.max_length_s,
    "WhisperFeatureExtractor": lambda extractor: extractor.chunk_length,
    "YamnetFeatureExtractor": lambda extractor: extractor.chunk_length,
}
OWN_FRONT_ENDS = {"YamnetFeatureExtractor": YamnetFeatureExtractor}
# AST takes no fewer samples than one of its frames has.
FEWEST_SAMPLES = 400


def _mel_energies(
    frames: torch.Tensor, windowed: Callable[[torch.Tensor], torch.Tensor], n_fft: int, filters: torch.Tensor
) -> torch.Tensor:
    """`(num_frames, mel_bins)`; 512 frames at a time, so that one step finds in the cache what the last one wrote."""
    energies = torch.empty(frames.shape[0], filters.shape[1])
    for block, out in zip(frames.split(512), energies.split(512), strict=True):
        spectrum = torch.fft.rfft(windowed(block), n=n_fft)  # (512, n_fft // 2 + 1)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # `abs` would take a root first
        torch.mm(power, filters, out=out)
    return energies


def _stacked(features: Iterator[np.ndarray], count: int) -> np.ndarray:
    """`(count, ...)`, each written where it stays: an hour of windows is not held twice."""
    stacked = np.empty(0, np.float32)
    for index, each in enumerate(features):
        if not index:
            stacked = np.empty((count, *each.shape), np.float32)
        stacked[index] = each
    return stacked


class UniMoEFeatureExtractor(WhisperFeatureExtractor):
    r"""
    One extractor for both ears. Clips of any length are cut into windows of `chunk_length` seconds.

    Args:
        feature_size (`int`, *optional*, defaults to 80): Mel bins of Whisper's log-mel.
        sampling_rate (`int`, *optional*, defaults to 16000): In hertz.
        hop_length (`int`, *optional*, defaults to 160): Samples between two frames.
        chunk_length (`int`, *optional*, defaults to 30): Window length in seconds.
        n_fft (`int`, *optional*, defaults to 400): Samples of one Whisper frame.
        num_audio_mel_bins (`int`, *optional*, defaults to 128): Mel bins of BEATs' filterbank.
        audio_front_end (`dict`, *optional*): Settings of the feature extractor of another encoder of sound, as its
            `to_dict` gives them, `feature_extractor_type` among them; sound has its sampling rate and its window then.
        cut_speech_windows (`bool`, *optional*, defaults to `False`): Whether windows of speech end with their clip,
            at a whole second, in place of silence up to `chunk_length`; `config.cut_speech_windows` of the model.
        max_speech_windows (`int`, *optional*): Longest speech clip, in windows; unlimited by default.
        max_audio_windows (`int`, *optional*, defaults to 20): Longest sound clip, in windows (10 minutes, as in the
            original, which drops the rest silently; here it is an error).

    Source: `Uni_MoE_speech/inference_all.py@f5e82dd` and `Uni_MoE_audio/model/audio_encoder/BEATs.py@f5e82dd`.
    """

    model_input_names = ["input_features", "input_features_mask", "input_values", "input_values_mask"]

    # Statistics of AudioSet with which BEATs was trained, from `BEATs.py::preprocess`.
    fbank_mean = 15.41663
    fbank_std = 6.55582

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        chunk_length: int = 30,
        n_fft: int = 400,
        num_audio_mel_bins: int = 128,
        max_speech_windows: int | None = None,
        max_audio_windows: int | None = 20,
        audio_front_end: dict[str, Any] | None = None,
        cut_speech_windows: bool = False,
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            hop_length=hop_length,
            chunk_length=chunk_length,
            n_fft=n_fft,
            **kwargs,
        )
        self.num_audio_mel_bins = num_audio_mel_bins
        self.max_speech_windows = max_speech_windows
        self.max_audio_windows = max_audio_windows
        self.audio_front_end = audio_front_end
        self.cut_speech_windows = cut_speech_windows
        if audio_front_end is not None and audio_front_end.get("feature_extractor_type") not in FRONT_ENDS:
            raise ValueError(
                f"`audio_front_end` is of type {audio_front_end.get('feature_extractor_type')!r}; known are "
                f"{list(FRONT_ENDS)}."
            )

    @cached_property
    def _front_end(self) -> Any:
        """The feature extractor of sound; `None` for BEATs' own way."""
        if self.audio_front_end is None:
            return None
        kind = self.audio_front_end["feature_extractor_type"]
        return (OWN_FRONT_ENDS.get(kind) or getattr(transformers, kind)).from_dict(self.audio_front_end)

    def rate_of(self, ear: str) -> int:
        """In hertz, what "audio" or "speech" is heard at."""
        return self.sampling_rate if ear == "speech" or self._front_end is None else self._front_end.sampling_rate

    def window_of(self, ear: str) -> float:
        """Seconds of a window of "audio" or "speech"."""
        if ear == "speech" or self._front_end is None:
            return self.chunk_length
        return FRONT_ENDS[type(self._front_end).__name__](self._front_end)

    def samples_of(self, ear: str) -> int:
        """Samples of a window of "audio" or "speech"."""
        return round(self.window_of(ear) * self.rate_of(ear))

    def num_windows(self, num_samples: int, ear: str) -> int:
        """Windows of a clip: every started one counts, so exactly `window_of(ear)` seconds are one window."""
        return max(1, -(-num_samples // self.samples_of(ear)))

    def __call__(
        self,
        audio: np.ndarray | list[np.ndarray] | None = None,
        speech: np.ndarray | list[np.ndarray] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            audio (`np.ndarray` of shape `(num_samples,)` or a list of them, *optional*):
                Clips of environmental sound: mono, float in [-1, 1].
            speech (`np.ndarray` of shape `(num_samples,)` or a list of them, *optional*):
                Clips of spoken language, likewise.
            sampling_rate (`int`, *optional*):
                Of all clips, in hertz; must be that at which each is heard, see [`rate_of`].
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            [`BatchFeature`] with `input_values` `(num_windows, frames, num_audio_mel_bins)`, or as the encoder's own
            feature extractor shapes it, and `input_values_mask` `(num_windows, frames)`, 1 = valid, a frame
            for each 10 ms, for sound; `input_features` `(num_windows, feature_size, mel_frames)` for speech, with
            `input_features_mask` `(num_windows, mel_frames)`, 1 = valid, where windows are cut. The windows of all
            clips follow each other.

        Raises:
            ValueError: another sampling rate; an empty, NaN or integer waveform; a clip of too many windows.
        """
        for ear, clips in (("audio", audio), ("speech", speech)):
            if clips is not None and sampling_rate not in (None, rate := self.rate_of(ear)):
                raise ValueError(
                    f"The {ear} has a sampling rate of {sampling_rate} Hz but the model hears {rate} Hz; "
                    f"resample it, or pass a path or {{'array', 'sampling_rate'}} to the processor, which resamples."
                )
        data = {}
        if audio is not None:
            windows = self._windows(audio, "audio", self.max_audio_windows)
            features = self._fbank if self._front_end is None else self._front_end_features
            data["input_values"] = _stacked(map(features, windows), len(windows))
            data["input_values_mask"] = np.stack([self._frame_mask(window) for window in windows])
        if speech is not None:
            windows = self._windows(speech, "speech", self.max_speech_windows)
            if self.dither:
                features = super().__call__(windows, sampling_rate=self.sampling_rate, return_tensors="np")
                data["input_features"] = features["input_features"]
            else:
                data["input_features"] = _stacked(map(self._log_mel, windows), len(windows))
            if self.cut_speech_windows:
                per_second = self.sampling_rate // self.hop_length
                frames = np.array([per_second * -(-len(window) // self.sampling_rate) for window in windows])
                data["input_features"] = data["input_features"][..., : frames.max()]
                data["input_features_mask"] = (np.arange(frames.max()) < frames[:, None]).astype(np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def _windows(self, clips: np.ndarray | list[np.ndarray], kind: str, max_windows: int | None) -> list[np.ndarray]:
        """Consecutive windows of all clips; only the last of a clip may be short."""
        if isinstance(clips, list | tuple) and clips and isinstance(clips[0], int | float):
            clips = [clips]  # one waveform as a plain list
        if not isinstance(clips, list | tuple):
            clips = np.asarray(clips)
            if clips.ndim != 1:
                raise ValueError(
                    f"`{kind}` is one array of shape {clips.shape}, which may be channels or clips; pass a list of "
                    "waveforms, each `(num_samples,)`."
                )
            clips = [clips]
        if len(clips) == 0:
            raise ValueError(f"`{kind}` is an empty list; leave it out where there are no clips.")
        windows, length = [], self.samples_of(kind)
        for clip in (check_waveform(clip) for clip in clips):
            count = self.num_windows(len(clip), kind)
            if max_windows is not None and count > max_windows:
                raise ValueError(
                    f"A clip of {kind} lasts {len(clip) / self.rate_of(kind):.1f} s, which is {count} windows of "
                    f"{self.window_of(kind):g} s, but at most {max_windows} are allowed; cut it, or raise "
                    f"`max_{kind}_windows` of the feature extractor."
                )
            windows += [clip[start : start + length] for start in range(0, count * length, length)]
        return windows

    def _front_end_features(self, window: np.ndarray) -> np.ndarray:
        """What the encoder's own feature extractor makes of a window."""
        window = np.pad(window, (0, max(0, FEWEST_SAMPLES - len(window))))
        features = self._front_end(window, sampling_rate=self._front_end.sampling_rate, return_tensors="np")
        return features[self._front_end.model_input_names[0]][0]

    def _log_mel(self, window: np.ndarray) -> np.ndarray:
        """
        `(feature_size, mel_frames)` log-mel of a window, as [`WhisperFeatureExtractor`] gives it for one extended by
        zeros. Frames that hold nothing but these zeros are known beforehand.
        """
        half, hop = self.n_fft // 2, self.hop_length
        count = min(self.nb_max_frames, 1 + (len(window) + half - 1) // hop)  # frames that reach a sample
        waveform = torch.from_numpy(np.ascontiguousarray(window, dtype=np.float32))
        waveform = F.pad(waveform, (0, self.n_samples - len(window)))
        waveform = F.pad(waveform[None], (half, half), mode="reflect")[0]
        frames, window = waveform.unfold(0, self.n_fft, hop)[:count], torch.hann_window(self.n_fft)
        filters = torch.from_numpy(self.mel_filters).float()
        energies = _mel_energies(frames, lambda block: block * window, self.n_fft, filters)  # (count, feature_size)
        log_mel = torch.full((self.nb_max_frames, self.feature_size), -10.0)
        log_mel[:count] = energies.clamp_(min=1e-10).log10_()
        return torch.maximum(log_mel, log_mel.max() - 8.0).add_(4.0).div_(4.0).t().numpy()

    @cached_property
    def _fbank_filters(self) -> torch.Tensor:
        """`(257, num_audio_mel_bins)` Kaldi mel filters."""
        with warnings.catch_warnings():
            # 128 bins over 512 points leave the lowest filters empty, in Kaldi and in BEATs' training alike.
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            filters = mel_filter_bank(
                num_frequency_bins=257,
                num_mel_filters=self.num_audio_mel_bins,
                min_frequency=20.0,
                max_frequency=self.sampling_rate / 2,
                sampling_rate=self.sampling_rate,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        return torch.from_numpy(filters).float()

    def _fbank(self, window: np.ndarray) -> np.ndarray:
        """
        `(frames, num_audio_mel_bins)` normalised Kaldi filterbank of a window, extended by its last sample. Frames of
        nothing but that sample hold no energy.
        """
        frames = 1 + (self.n_samples - 400) // 160
        count = min(frames, -(-len(window) // 160))  # frames that reach a sample
        end = 160 * (count - 1) + 400
        window = np.pad(window[:end], (0, max(0, end - len(window))), mode="edge")
        silence = (np.log(FBANK_FLOOR) - self.fbank_mean) / (2 * self.fbank_std)
        fbank = np.full((frames, self.num_audio_mel_bins), silence, dtype=np.float32)
        fbank[:count] = self.kaldi_fbank(window)
        return fbank

    def kaldi_fbank(self, waveform: np.ndarray) -> np.ndarray:
        """
        Args:
            waveform (`np.ndarray` of shape `(num_samples,)`): Mono, float in [-1, 1], at least 25 ms.

        Returns:
            `np.ndarray` of shape `(frames, num_audio_mel_bins)`, float32: log energies of 25 ms frames every 10 ms, as
            `torchaudio.compliance.kaldi.fbank` gives them, normalised by BEATs' constants.
        """
        frames = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)).unfold(0, 400, 160)
        window = 2**15 * torch.hann_window(400, periodic=False).pow(0.85)  # Povey's, on 16-bit samples

        def windowed(block: torch.Tensor) -> torch.Tensor:
            # The mean of equal samples must be exactly that sample: their frame has no energy, not a trace of it.
            block = block - block.mean(dim=1, keepdim=True, dtype=torch.float64).float()
            emphasised = torch.empty_like(block)
            torch.sub(block[:, 1:], block[:, :-1], alpha=0.97, out=emphasised[:, 1:])
            torch.mul(block[:, 0], 1 - 0.97, out=emphasised[:, 0])
            return emphasised.mul_(window)

        fbank = _mel_energies(frames, windowed, 512, self._fbank_filters).clamp_(min=FBANK_FLOOR).log_()
        return fbank.sub_(self.fbank_mean).div_(2 * self.fbank_std).numpy()

    def _frame_mask(self, window: np.ndarray) -> np.ndarray:
        """`(frames,)` 1 where a frame holds a real sample; of BEATs by its own arithmetic: equal runs of samples."""
        if self._front_end is not None:
            frames = round(100 * self.window_of("audio"))
            return (np.arange(frames) * self._front_end.sampling_rate / 100 < len(window)).astype(np.int64)
        frames = 1 + (self.n_samples - 400) // 160
        run = self.n_samples // frames
        return (np.arange(frames) * run < len(window)).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """As in the parent, without what follows from the settings."""
        output = super().to_dict()
        for name in ("_fbank_filters", "_front_end"):
            output.pop(name, None)
        return output


__all__ = ["FRONT_ENDS", "UniMoEFeatureExtractor", "YamnetFeatureExtractor"]
