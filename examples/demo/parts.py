"""
A stand-in for what a user would download: tiny towers and a tiny Llama, each with a short pretraining of its own.

Towers learn labels, the Llama learns text. Nothing here is part of the recipe; afterwards all four are frozen and
`uni_moe_hf.from_pretrained_parts` joins them. Only training nuisances (voices, positions, pitches) are ever drawn.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import make_data
import numpy as np
import soxr
import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from tqdm import trange
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

from uni_moe_hf import BeatsConfig, BeatsModel, UniMoEFeatureExtractor
from uni_moe_hf.evaluation.speaking import speak
from uni_moe_hf.hub.templates_uni_moe import VICUNA_CHAT_TEMPLATE


WIDTH = 96
# Vicuna's without its system sentences: they would be more than half of what a tiny model has to read.
CHAT_TEMPLATE = re.sub(r"\n *\{\{- \"(A chat|The assistant) .*", "", VICUNA_CHAT_TEMPLATE)
EXTRACTOR = UniMoEFeatureExtractor(chunk_length=world.SECONDS)


def fit(
    name: str, modules: nn.Module, loss_of: Callable[[np.random.Generator], torch.Tensor], steps: int, lr: float
) -> None:
    """Adam with a one-cycle schedule; `loss_of` draws its own batch."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    modules.train()
    progress = trange(steps, desc=f"pretrain {name}", unit="step", mininterval=1.0)
    for _ in progress:
        loss = loss_of(rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    modules.eval()


def vision_tower(folder: Path, steps: int = 1000, batch: int = 96, pictures: int = 20000) -> None:
    """
    A CLIP-shaped vision model that names colour and shape from the layer that the connector will read.

    Half of the pictures show grey shapes: without them a tower learns which pairs of colour and shape exist, and is
    blind to the pairs that are held out.
    """
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIDE,
        patch_size=8,
    )
    tower = CLIPVisionModel(config)
    rng = np.random.default_rng(1)
    colours = [*world.COLOURS, world.GREY]
    heads = nn.ModuleList([nn.Linear(WIDTH, len(colours)), nn.Linear(WIDTH, len(world.SHAPES))])
    pixels, targets = np.zeros((pictures, world.SIDE, world.SIDE, 3), np.uint8), np.zeros((pictures, 2), np.int64)
    for index in range(pictures):
        facts = make_data.draw_facts("image", "train", rng)
        pixels[index] = world.picture(world.tint(facts["colour"], rng), facts["shape"], "train", rng)
        targets[index] = colours.index(facts["colour"]), world.SHAPES.index(facts["shape"])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(0, pictures, batch)
        images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2) / 255 * rng.uniform(0.85, 1.15)
        images = images.flip(-1) if rng.random() < 0.5 else images  # every shape is its own mirror image
        images = (images.clamp(0, 1) - mean) / std
        features = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:].mean(dim=1)
        colour, shape = torch.from_numpy(targets[chosen]).unbind(1)
        return F.cross_entropy(heads[0](features), colour) + F.cross_entropy(heads[1](features), shape)

    fit("vision tower", nn.ModuleList([tower, heads]), loss_of, steps, lr=2e-3)
    tower.save_pretrained(folder)
    square = {"height": world.SIDE, "width": world.SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": world.SIDE}, crop_size=square).save_pretrained(folder)


def altered(log_mel: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """`(batch, mel_bins, frames)` as if spoken by other voices: shifted in pitch, with bands and moments missing."""
    log_mel = log_mel.clone()
    for clip in log_mel:
        clip.copy_(clip.roll(int(rng.integers(-2, 3)), dims=0))
        band, moment = int(rng.integers(0, 70)), int(rng.integers(0, 180))
        clip[band : band + int(rng.integers(0, 8))] = clip.mean()
        clip[:, moment : moment + int(rng.integers(0, 15))] = clip.mean()
    return log_mel


def speech_tower(folder: Path, steps: int = 500, batch: int = 48, recordings: int = 2400) -> None:
    """A Whisper-shaped model whose encoder tells words and spoken questions apart."""
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=50 * world.SECONDS,
        max_target_positions=32,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    whisper = WhisperModel(config)
    texts = [*world.WORDS, *(text for texts in world.SPOKEN_QUESTIONS.values() for text in texts)]
    head = nn.Linear(WIDTH, len(texts))
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(texts), recordings)
    voices = [make_data.draw_voice("train", rng) for _ in labels]
    waves = rng.normal(0, 0.002, (recordings, world.RATE * world.SECONDS)).astype(np.float32)
    for wave, label, voice in zip(waves, labels, voices, strict=True):
        spoken, rate = speak(texts[label], **voice)
        clip = soxr.resample(spoken.astype(np.float32) / 32768, rate, world.RATE) * rng.uniform(0.5, 1.2)
        start = rng.integers(0, 4000) * (rng.random() < 0.5)
        wave[start : start + len(clip)] += clip[: len(wave) - start]
    features = EXTRACTOR(speech=list(waves), return_tensors="pt")["input_features"]

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = rng.integers(0, recordings, batch)
        encoded = whisper.encoder(altered(features[chosen], rng)).last_hidden_state.mean(dim=1)
        return F.cross_entropy(head(encoded), torch.from_numpy(labels[chosen]))

    fit("speech tower", nn.ModuleList([whisper.encoder, head]), loss_of, steps, lr=2e-3)
    whisper.save_pretrained(folder)


def audio_tower(folder: Path, steps: int = 170, batch: int = 48, recordings: int = 900) -> None:
    """A BEATs-shaped model that names sound events."""
    config = BeatsConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        patch_embedding_size=64,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=8,
        num_buckets=64,
        max_bucket_distance=200,
    )
    tower = BeatsModel(config)
    head = nn.Linear(WIDTH, len(world.SOUNDS))
    rng = np.random.default_rng(2)
    labels = torch.from_numpy(rng.integers(0, len(world.SOUNDS), recordings))
    clips = [world.sound(world.SOUNDS[label], "train", rng) for label in labels]
    features = EXTRACTOR(audio=clips, return_tensors="pt")["input_values"]

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(0, recordings, batch))
        encoded = tower(features[chosen]).last_hidden_state.mean(dim=1)
        return F.cross_entropy(head(encoded), labels[chosen])

    fit("audio tower", nn.ModuleList([tower, head]), loss_of, steps, lr=1e-3)
    tower.save_pretrained(folder)


def text_samples(rng: np.random.Generator, count: int) -> list[list[dict]]:
    """
    Conversations in which words stand where media will stand: what a clip shows, repeated and shuffled.

    What is asked about a picture or video stands beside an unrelated word: no colour or shape may predict another.
    """
    others = [*world.SOUNDS, *world.WORDS]
    samples = []
    for _ in range(count):
        facts = {kind: make_data.draw_facts(kind, "train", rng) for kind in (*make_data.TRAIN_FILES, "question")}
        task = str(rng.choice([*make_data.TRAIN_FILES, "question", *make_data.MIXED]))
        if task in make_data.MIXED:
            clips = [(facts[kind], {}) for kind in ("image", "video", "audio", "question")]
            made = make_data.mixed_row(task, *clips)["messages"]
            question = next((part["text"] for part in made[0]["content"] if part.get("text")), None)
            answer = made[1]["content"][0]["text"]
        elif task == "question" or rng.random() < 0.4:
            question, answer = make_data.caption(task, facts[task])
        else:
            question, answer = make_data.single_question(task, facts[task], rng)
        shown = []
        for kind in {"question": ("question",), **make_data.CLIPS}.get(task, (task,)):
            if kind in ("speech", "question"):
                shown.append(facts[kind]["text"])
                continue
            words = [facts["audio"]["sound"]]
            if kind in ("image", "video"):
                told = answer.split() if question and question.startswith("Describe") else answer.split()[:1]
                words = [*told, str(rng.choice(others))]
            shown.append(" ".join(str(word) for word in rng.permutation(words * int(rng.integers(1, 6)))))
        prompt = "\n".join([*shown, question] if question else shown)
        samples.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    return samples


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def language_model(folder: Path, steps: int = 260, batch: int = 32) -> None:
    """A Llama that answers questions about words in its prompt."""
    rng = np.random.default_rng(3)
    samples = text_samples(rng, 6000)
    texts = [f" {message['content']}" for sample in samples for message in sample]
    tokenizer = make_tokenizer([*texts, *["USER: ASSISTANT:"] * 50])
    tokenizer.chat_template = CHAT_TEMPLATE

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    llm = LlamaForCausalLM(config)
    rendered = [tokenizer.apply_chat_template(sample, tokenize=False) for sample in samples]
    encoded = tokenizer(rendered, padding=True, padding_side="right", return_tensors="pt")
    # The answer starts behind the last " ASSISTANT:".
    marker = tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"][-1]
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    answer = (ids == marker).flip(1).cumsum(1).flip(1) == 0
    labels = ids.masked_fill(~answer | (mask == 0), -100)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(samples), batch))
        length = int(mask[chosen].sum(1).max())
        rows = {"input_ids": ids[chosen, :length], "attention_mask": mask[chosen, :length]}
        return llm(**rows, labels=labels[chosen, :length]).loss

    fit("language model", llm, loss_of, steps, lr=2e-3)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PARTS: dict[str, Callable[[Path], None]] = {
    "vision_tower": vision_tower,
    "speech_tower": speech_tower,
    "audio_tower": audio_tower,
    "llm": language_model,
}


def main(folder: str, *names: str) -> None:
    """Pretrains the named parts, or all."""
    for name in names or PARTS:
        torch.manual_seed(0)
        partial(PARTS[name], Path(folder) / name)()


if __name__ == "__main__":
    main(*sys.argv[1:])
