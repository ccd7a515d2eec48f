"""The family adapter calls Qwen-Image as diffusers' own pipeline does."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from distill.config import AdapterSection, GuidanceSection
from distill.models import qwen_image
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 16, 6, 8)
    theirs = QwenImagePipeline._pack_latents(latents, 2, 16, 6, 8)
    assert torch.equal(qwen_image.pack(latents), theirs)
    assert torch.equal(qwen_image.unpack(theirs, 6, 8), latents)


def test_padding_does_not_change_a_prompt(transformer: QwenImageTransformer2DModel) -> None:
    short, long = Text(torch.randn(1, 2, 24)), Text(torch.randn(1, 5, 24))
    x, t = torch.randn(1, 16, 4, 4), torch.tensor([0.6])
    both = qwen_image.concatenate(short, long)
    with torch.no_grad():
        together = qwen_image.velocity(transformer, x.repeat(2, 1, 1, 1), t.repeat(2), both)
        alone = [qwen_image.velocity(transformer, x, t, text) for text in (short, long)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_guided_velocity_is_two_passes_in_one(transformer: QwenImageTransformer2DModel) -> None:
    text, negative = Text(torch.randn(3, 4, 24)), Text(torch.randn(1, 2, 24))
    x, t = torch.randn(3, 16, 4, 4), torch.rand(3)
    with torch.no_grad():
        guided = qwen_image.velocity_pair(transformer, x, t, text, negative, 4.0, False)[1]
        cond = qwen_image.velocity(transformer, x, t, text)
        uncond = qwen_image.velocity(transformer, x, t, negative.repeat(3))
    assert torch.allclose(guided, uncond + 4 * (cond - uncond), atol=1e-5)


def test_bf16_keeps_the_time_in_float32(transformer: QwenImageTransformer2DModel) -> None:
    """.7155 and the bfloat16 number beside it are two times, also where guidance doubles them."""
    bf16 = transformer.bfloat16()
    seen: list[torch.Tensor] = []
    bf16.time_text_embed.register_forward_hook(lambda module, args, out: seen.append(out))
    x, text = torch.randn(2, 16, 4, 4), Text(torch.randn(2, 3, 24))
    t = torch.tensor([0.7155, 0.71484375])
    assert t[0].bfloat16() == t[1]
    with torch.no_grad():
        qwen_image.velocity(bf16, x, t, text)
        qwen_image.velocity_pair(bf16, x, t, text, text, 4.0, False)
        alone = bf16.time_text_embed(t, x.bfloat16())  # the hook is gone again
    assert torch.equal(seen[0], alone)
    assert torch.equal(seen[1], torch.cat([alone, alone]))
    assert not torch.equal(alone[0], alone[1])


def make_roles(transformer: QwenImageTransformer2DModel) -> Roles:
    negative = Text(torch.zeros(1, 2, 24))
    return Roles(transformer, AdapterSection(rank=2), GuidanceSection(scale=1), negative, 0,
                 adapters=(STUDENT, FAKE))  # fmt: skip


def test_roles_speak_for_themselves(transformer: QwenImageTransformer2DModel) -> None:
    x, t, text = torch.randn(2, 16, 4, 4), torch.rand(2), Text(torch.randn(2, 3, 24))
    with torch.no_grad():
        base = qwen_image.velocity(transformer, x, t, text)
    roles = make_roles(transformer)
    with torch.no_grad():
        for role in (STUDENT, FAKE):  # a fresh adapter changes nothing
            assert torch.equal(roles.velocity(role, x, t, text), base)
        for parameter in roles.parameters(STUDENT):
            parameter.add_(0.1)
        assert not torch.allclose(roles.velocity(STUDENT, x, t, text), base)
        assert torch.equal(roles.velocity(FAKE, x, t, text), base)
        assert torch.equal(roles.velocity(TEACHER, x, t, text), base)


def test_a_roles_gradient_is_its_own(transformer: QwenImageTransformer2DModel) -> None:
    roles = make_roles(transformer)
    x, t, text = torch.randn(2, 16, 4, 4), torch.rand(2), Text(torch.randn(2, 3, 24))
    roles.velocity(FAKE, x, t, text).square().mean().backward()
    without = [n for n, p in roles.named_parameters(FAKE).items() if p.grad is None]
    # The last block's text output is not used: nothing flows into what only makes that
    dead = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")
    assert all(n.startswith(tuple(f"transformer_blocks.1.{d}" for d in dead)) for n in without)
    assert all(p.grad is None for p in roles.parameters(STUDENT))
    assert all(p.grad is None for n, p in transformer.named_parameters() if ".lora_" not in n)
