"""The constant prompt to its embedding, with Stable Diffusion 3.5's text encoders. Once, at conversion: PyTorch is needed here alone.

    text   = [ CLIP-L | CLIP-G | zeros up to the width ] then [ T5 ]      77 + 77 tokens
    pooled = [ CLIP-L | CLIP-G ]

as diffusers' `StableDiffusion3Pipeline.encode_prompt` has it at `max_sequence_length=77`. What a folder lacks counts as zeros.
"""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float
from tqdm import tqdm

from convert_weights.source import ConversionError
from svdp_jax.config import ModelConfig
from svdp_jax.files import first_line

CLIP_TOKENS = 77
ENCODERS = {"text_encoder": "CLIP-L", "text_encoder_2": "CLIP-G", "text_encoder_3": "T5-XXL"}  # folder -> what is in it; its tokenizer is in tokenizer*


def encode(folder: pathlib.Path, prompt: str, model: ModelConfig) -> tuple[Float[np.ndarray, "T E"], Float[np.ndarray, "Y"]]:
    """(text, pooled) of a prompt, in float32, one encoder in memory at a time; T5-XXL takes 19 GB of it.

    Raises ConversionError if the folder has no encoder, one that cannot be read, or one of another width than the model's.
    """
    present = _present(folder)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConversionError(f"--text-encoders needs PyTorch and transformers: pip install -e '.[convert]' ({error})") from error
    outputs = {}
    for name in tqdm(present, desc="encoding the prompt", unit="encoder", dynamic_ncols=True):
        tokens = CLIP_TOKENS if name != "text_encoder_3" else model.text_tokens - CLIP_TOKENS
        outputs[name] = _run(folder, name, prompt, tokens)
    if absent := [f"{label} ({name}/)" for name, label in ENCODERS.items() if name not in present]:
        print(f"zeros stand for the text encoders that {folder} lacks: {', '.join(absent)}")
    return assemble(outputs, model)


def assemble(outputs: dict[str, tuple[np.ndarray, np.ndarray | None]], model: ModelConfig) -> tuple[Float[np.ndarray, "T E"], Float[np.ndarray, "Y"]]:
    """Encoder -> (states [tokens, width], pooled [width] or None), to (text, pooled). The pooled width is that of both CLIPs together."""
    text, pooled = np.zeros((model.text_tokens, model.text_width), np.float32), np.zeros(model.pooled_width, np.float32)
    widths = {name: states.shape[1] for name, (states, _) in outputs.items()}
    clips = [widths[name] for name in ("text_encoder", "text_encoder_2") if name in widths]
    if sum(clips) > model.pooled_width or (len(clips) == 2 and sum(clips) < model.pooled_width):
        raise ConversionError(f"text encoders of another model: CLIPs of width {' + '.join(map(str, clips))}, where the model's pooled width is {model.pooled_width}")
    if widths.get("text_encoder_3", model.text_width) != model.text_width:
        raise ConversionError(f"text_encoder_3 is {widths['text_encoder_3']} wide, and the model takes text of width {model.text_width}")
    for name, start in ("text_encoder", 0), ("text_encoder_2", model.pooled_width - widths.get("text_encoder_2", 0)):
        if name in outputs:
            states, vector = outputs[name]
            text[:CLIP_TOKENS, start : start + widths[name]] = states
            pooled[start : start + widths[name]] = vector
    if "text_encoder_3" in outputs:
        text[CLIP_TOKENS:] = outputs["text_encoder_3"][0]
    return text, pooled


def _present(folder: pathlib.Path) -> list[str]:
    """The encoders of a folder, each of which must have its tokenizer."""
    if not folder.is_dir():
        raise ConversionError(f"--text-encoders {folder} is no directory: give a diffusers folder with text_encoder/, tokenizer/ and so on")
    present = [name for name in ENCODERS if (folder / name).is_dir()]
    if not present:
        raise ConversionError(f"--text-encoders {folder} holds none of {', '.join(f'{name}/' for name in ENCODERS)}")
    for name in present:
        if not (folder / _tokenizer(name)).is_dir():
            raise ConversionError(f"--text-encoders {folder} holds {name}/ but no {_tokenizer(name)}/")
    return present


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _run(folder: pathlib.Path, name: str, prompt: str, tokens: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(states [tokens, width], pooled [width] or None) of one encoder."""
    import torch
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    clip = name != "text_encoder_3"
    try:
        tokenizer = (CLIPTokenizer if clip else T5TokenizerFast).from_pretrained(folder / _tokenizer(name), local_files_only=True)
        options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
        encoder = (CLIPTextModelWithProjection if clip else T5EncoderModel).from_pretrained(folder / name, **options).eval()
    except (OSError, ValueError, KeyError, TypeError, ImportError, safetensors.SafetensorError) as error:
        raise ConversionError(f"--text-encoders: {folder / name} cannot be read: {first_line(error)}") from error
    if len(tokenizer(prompt).input_ids) > tokens:
        warnings.warn(f"the prompt is cut: {name} sees its first {tokens} tokens", stacklevel=2)
    ids = tokenizer(prompt, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        if not clip:
            return encoder(ids)[0][0].numpy(), None  # no mask: padding is attended to, as in training
        output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2][0].numpy(), output.text_embeds[0].numpy()
