"""The host's own tokenizers and text encoders of transformers, with rows in the place of the encoders' large networks.

What a row is made of can be seen in it: its first number is its token's.
"""

import functools
import importlib
import io

import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from tiny_transformers import POOLED, TEXT


class Rows(torch.nn.Module):
    """What an encoder does, from tokens to rows (1, L, width): each row is made of its token alone."""

    def __init__(self, width=TEXT, masked=True, pooled=POOLED):
        super().__init__()
        self.masked, self.pooled = masked, pooled
        generator = torch.Generator().manual_seed(3)
        self.table = torch.nn.Parameter(torch.randn(97, width, generator=generator), requires_grad=False)

    def set_clip_options(self, options):
        pass

    def reset_clip_options(self):
        pass

    def encode_token_weights(self, chunks):
        tokens = torch.tensor([token for chunk in chunks for token, *_ in chunk])
        rows = self.table[tokens % len(self.table)].clone()
        rows[:, 0] = tokens
        extras = [{"attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}] if self.masked else []
        return (rows[None], torch.ones(1, self.pooled), *extras)


def _stage(module, host_class, **encoders):
    """The host's class that puts encoders together, with these in it."""
    own = getattr(importlib.import_module(f"comfy.text_encoders.{module}"), host_class)

    class Stage(own):
        def __init__(self, **_):
            torch.nn.Module.__init__(self)
            self.dtypes = {torch.float32}
            self.t5_attention_mask = False
            self.clip = self.clip_name = next(iter(encoders))
            for name, encoder in encoders.items():
                setattr(self, name, encoder)

        def encode_token_weights(self, tokens):
            context, *rest = super().encode_token_weights(tokens)
            return (context[..., :TEXT], *rest)  # SD3's is filled up to T5's width

    return Stage


def _sentencepiece():
    """A tokenizer of the kind that comes in a checkpoint, of a few English words."""
    from sentencepiece import SentencePieceTrainer

    written, words = io.BytesIO(), ["Cat, a photo of the cat on grass", "snowcat (cat) and fire hydrant, by night"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=written,
        vocab_size=60,
        minloglevel=9,
        pad_id=3,  # as of models that pad
        hard_vocab_limit=False,
    )
    return {"spiece_model": torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)}


def _sd3(**missing):
    def encoders():
        clips = {name: Rows(masked=False, pooled=POOLED // 2) for name in ("clip_l", "clip_g")}
        return {**clips, "t5xxl": Rows(4096, False), **missing}

    return "sd3_clip", "SD3Tokenizer", "SD3ClipModel", encoders


def _flux():
    return {"clip_l": Rows(masked=False), "t5xxl": Rows(masked=False)}


FAMILIES = {
    "sd3": _sd3(),
    "sd3 without T5": _sd3(t5xxl=None),
    "sd3 without CLIP": _sd3(clip_l=None, clip_g=None),
    "flux": ("flux", "FluxTokenizer", "FluxClipModel", _flux),
    "chroma": ("pixart_t5", "PixArtTokenizer", "PixArtT5XXL", lambda: {"t5xxl": Rows()}),
    "cosmos2": ("cosmos", "CosmosT5Tokenizer", "CosmosT5XXL", lambda: {"t5xxl": Rows()}),
    "qwen": ("qwen_image", "QwenImageTokenizer", "QwenImageTEModel", lambda: {"qwen25_7b": Rows()}),
    "zimage": ("z_image", "ZImageTokenizer", "ZImageTEModel", lambda: {"qwen3_4b": Rows()}),
    "anima": ("anima", "AnimaTokenizer", "AnimaTEModel", lambda: {"qwen3_06b": Rows()}),
    "lumina2": ("lumina2", "LuminaTokenizer", "LuminaModel", lambda: {"gemma2_2b": Rows()}),
    "wan": ("wan", "WanT5Tokenizer", "WanT5Model", lambda: {"umt5xxl": Rows()}),
}
"""By family: the host's file, its tokenizer and text encoder, and the networks in that."""


@functools.cache
def clip(family):
    """A CLIP of the family; skips the test by name where this host lacks its classes, or the files of its tokenizer."""
    module, tokenizer, stage, encoders = FAMILIES[family]
    try:
        tokenizer = getattr(importlib.import_module(f"comfy.text_encoders.{module}"), tokenizer)
        target = comfy.supported_models_base.ClipTarget(tokenizer, _stage(module, stage, **encoders()))
        shipped = family not in ("lumina2", "wan")
        return comfy.sd.CLIP(target, tokenizer_data={} if shipped else _sentencepiece())
    except (ImportError, OSError) as error:
        pytest.skip(f"this ComfyUI has no tokenizer of {family}: {error}")
