"""Whole pipelines of toy size in diffusers layout: the published classes with random weights, text
encoder, tokenizer, transformer, VAE and scheduler. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from toy_model import toy_shape, toy_shape_21

TEXT_WIDTH = 24  # of a text token
VOCABULARY = 600  # enough for each of their words to be a token
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What the byte pairs are learnt from: words of prompts, and those of the templates
SENTENCES = (
    "a cat",
    "a dog in the rain, seen from afar",
    "the sea at night",
    "system user assistant",
    "Comprehend and analyze the provided prompt.",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
)
# <|im_start|>ROLE\nTEXT<|im_end|>\n, as Qwen3-VL's own template writes a message of text
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
SCHEDULER = {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "use_dynamic_shifting": True,
}


def write_pipeline(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model of `family` ("qwen-image" or "qwen-image-2.1"), which its diffusers pipeline
    loads with from_pretrained; returns `folder`.
    """
    torch.manual_seed(seed)
    makers = {"qwen-image": _qwen_image, "qwen-image-2.1": _qwen_image_21}
    makers[family](folder).save_pretrained(folder)
    return folder


def _qwen_image(folder: Path) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = make_tokenizer(folder / "tokenizer")
    text = _text_config(len(tokenizer)) | {
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2], "rope_type": "default"}
    }
    vision = _vision_config() | {"fullatt_block_indexes": [0]}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(**toy_shape(text_width=TEXT_WIDTH)),
    )


def _qwen_image_21(folder: Path) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = make_tokenizer(folder / "processor")
    text = _text_config(len(tokenizer)) | {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = _vision_config() | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    images = {"token": "<|image_pad|>", "video": "<|video_pad|>"}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in images.items()}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["token_id"],
        video_token_id=ids["video_id"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    transformer = QwenImage21Transformer2DModel(**toy_shape_21(text_width=TEXT_WIDTH))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith("time_text_embed."):  # larger, it would blow up a time's last digits
                continue
            if parameter.ndim > 1:  # what diffusers begins with hardly lets the prompt matter
                parameter.normal_(std=0.2)
            else:  # a norm that scales by one would hide that it is missing
                parameter.add_(0.1 * torch.randn_like(parameter))
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
        ),
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=processor,
        transformer=transformer,
    )


def make_tokenizer(folder: Path) -> Any:
    """Qwen's byte-level BPE, learnt from a few sentences; its files come to lie in `folder`."""
    from transformers import Qwen2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(SENTENCES, VOCABULARY, min_frequency=1, show_progress=False)
    learner.save_model(str(folder))
    path = folder / "vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(SPECIAL)}
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    return Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=list(SPECIAL[1:]))


def _text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _vision_config() -> dict[str, Any]:
    return {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
