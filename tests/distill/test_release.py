"""The files beside a finished LoRA: true, complete, and sound as a workflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image

from distill.config import AdapterSection, Config, GuidanceSection
from distill.contract.metadata import write_lora
from distill.contract.shift import LinearShift
from distill.contract.spec import TurboSpec
from distill.contract.tiny import BASE_NAME
from distill.lora import workflow
from distill.lora.header import header_fields
from distill.lora.model_card import companions, model_card, preview_of, write_release
from distill.lora.source import open_source
from distill.lora.workflow import workflow_for
from distill.models.pipeline import attach
from distill.models.roles import Roles
from distill.models.sample import sample_student
from distill.models.text import Text
from distill.trainer import train

QWEN = "Qwen/Qwen-Image-2512"
SPEC = TurboSpec((1.0, 0.7155, 0.0), base=QWEN, resolutions=((1664, 928), (928, 1664)))
TITLE_HEIGHT = 30  # LiteGraph draws a node's title above its `pos`


def lora_file(path: Path, spec: TurboSpec = SPEC, **header: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    key = "diffusion_model.transformer_blocks.0.attn.to_q.lora_{}.weight"
    tensors = {
        key.format("A"): torch.randn(2, 32, generator=generator),
        key.format("B"): torch.randn(32, 2, generator=generator),
    }
    return write_lora(path, tensors, spec=spec, title="My turbo", extra=header)


def front_matter(card: str) -> dict[str, Any]:
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    assert body.strip().startswith("# ")
    return yaml.safe_load(head)


# --------------------------------------------------------------------------------------- the card


def test_the_card_says_how_to_sample(tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "mine.safetensors")
    write_release(lora)
    card = lora.with_suffix(".md").read_text(encoding="utf-8")
    head = front_matter(card)
    assert head["base_model"] == QWEN
    assert head["pipeline_tag"] == "text-to-image"
    assert {"lora", "2-step", "qwen-image"} <= set(head["tags"])
    assert "license" not in head  # the user's to choose
    assert "# license:" in card
    assert "# My turbo" in card
    for text in ("1, 0.7155, 0", "euler", "1664x928", "mine.workflow.json", "mine.safetensors"):
        assert text in card
    assert "## Recipe" not in card  # nothing is known of it
    assert "preview" not in card


def test_a_lora_inherits_the_licence_of_its_base(tmp_path: Path) -> None:
    """In the card's head and text, and in both notes of the workflow."""
    spec = TurboSpec(
        (1.0, 0.5, 0.0),
        LinearShift((256, 8192), (0.5, 0.9)),
        family="qwen-image-2.1",
        base="Qwen/Qwen-Image-2.1",
        resolutions=((1376, 768),),
    )
    lora = lora_file(tmp_path / "mine.safetensors", spec)
    write_release(lora)
    card = lora.with_suffix(".md").read_text(encoding="utf-8")
    head = front_matter(card)
    link = "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE"
    assert (head["license"], head["license_name"], head["license_link"]) == (
        "other",
        "qwen-research",
        link,
    )
    assert "## Licence" in card
    assert "QwenImage21Pipeline.from_pretrained" in snippet(card)
    assert "base_shift=0.5" in snippet(card)
    graph = json.loads(lora.with_suffix(".workflow.json").read_text(encoding="utf-8"))
    notes = [n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "MarkdownNote"]
    assert sum(link in note for note in notes) == 2
    (latent,) = (n for n in graph["nodes"] if n["type"] == "EmptyLatentImage")
    assert latent["widgets_values"][:2] == [1376, 768]


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_snippet_samples_as_the_spec_says(
    sampler: str, tmp_path: Path, new_transformer: Callable[[], QwenImageTransformer2DModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Run as it stands in the card, but on a toy transformer, from its text encoder on."""
    spec = TurboSpec((1.0, 0.7155, 0.0), base=QWEN, sampler=sampler, strength=0.5,
                     resolutions=((64, 32),))  # fmt: skip
    lora = lora_file(tmp_path / "mine.safetensors", spec)
    write_release(lora)
    code = snippet(lora.with_suffix(".md").read_text(encoding="utf-8"))
    noise = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(1))
    embeds = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(2))

    class Toy(QwenImagePipeline):
        @classmethod
        def from_pretrained(cls, name: str, torch_dtype: torch.dtype) -> Toy:
            assert (name, torch_dtype) == (QWEN, torch.bfloat16)
            own = {"use_dynamic_shifting": True, "shift_terminal": 0.02}  # Qwen-Image's
            scheduler = FlowMatchEulerDiscreteScheduler(**own)
            pipe = cls(scheduler, None, None, None, new_transformer())
            pipe.set_progress_bar_config(disable=True)
            return pipe

        def to(self, device: str) -> Toy:
            assert device == "cuda"
            return self

        def __call__(self, prompt: str, **words: Any) -> Any:
            own = {
                "prompt_embeds": embeds,
                "latents": self._pack_latents(noise, 1, 16, 4, 8),
                "output_type": "latent",
            }
            assert words["sigmas"] == [1.0, 0.7155]  # the last one is the pipeline's own
            torch.manual_seed(3)
            return super().__call__(**words, **own)

    monkeypatch.setattr("diffusers.QwenImagePipeline", Toy)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    theirs = QwenImagePipeline._unpack_latents(found["image"][None], 32, 64, 8)[:, :, 0]

    transformer = new_transformer()
    source = open_source(lora)
    attach(transformer, "lora_0", source.lora)
    for module in transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling["lora_0"] *= spec.strength
    roles = Roles(transformer, AdapterSection(), GuidanceSection(), Text(embeds), 0, adapters=())
    if sampler == "renoise":  # the pipeline's own random numbers
        step = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3))
        fresh = QwenImagePipeline._unpack_latents(step, 32, 64, 8)[:, :, 0]
        monkeypatch.setattr("distill.models.sample._renoise", lambda *_: lambda *_: fresh)
    ours = sample_student(roles, spec, noise, Text(embeds), role="lora_0")
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_the_models_own_scheduler_would_alter_the_sigmas() -> None:
    """Why the snippet brings another one."""
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    stock.set_timesteps(sigmas=[1.0, 0.7155], mu=0.9)
    assert stock.sigmas.tolist()[1] == pytest.approx(0.02)
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(sigmas=[1.0, 0.7155], mu=0.9)
    assert plain.sigmas.tolist() == pytest.approx([1.0, 0.7155, 0.0])


def test_what_the_stock_pipeline_cannot_do_has_no_snippet() -> None:
    by_size = TurboSpec((1.0, 0.5, 0.0), LinearShift((1, 9), (0, 1)), family="of nobody")
    assert "schedule depends on the size" in model_card("x.safetensors", by_size, {})
    card = model_card("x.safetensors", TurboSpec((0.9, 0.5, 0.0), base=QWEN), {})
    assert "```python" not in card
    assert "starts at sigma 1" in card
    card = model_card("x.safetensors", TurboSpec((1.0, 0.0), base=BASE_NAME), {})
    assert "```python" not in card
    assert "turbo-distill sample x.safetensors" in card
    assert "base_model" not in front_matter(card)
    assert "draw in 1 step," in card
    guided = model_card("x.safetensors", TurboSpec((1.0, 0.5, 0.0), base=QWEN, cfg=3.0), {})
    assert "true_cfg_scale=3" in snippet(guided)
    assert "negative_prompt" in snippet(guided)


def test_a_base_in_a_local_folder_is_named_without_its_path(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "Qwen-Image-2512"
    base.mkdir(parents=True)
    spec = TurboSpec((1.0, 0.5, 0.0), base=str(base))
    card = model_card("x.safetensors", spec, {})
    assert "secret" not in card
    assert "Qwen-Image-2512" in card
    assert "base_model" not in front_matter(card)


def test_the_card_holds_the_recipe(small_config: Callable[..., Config]) -> None:
    gan = {"features": "pixels"}
    stages = [
        {"method": "pcm", "steps": 70, "batch": 4, "lr": 1e-3},
        {
            "method": "dmd2",
            "steps": 30,
            "batch": 1,
            "accumulate": 2,
            "lr": 5e-5,
            "ema": 0.9,
            "gan": gan,
            "optimizer": "adamw8bit",
        },
    ]
    config = small_config(stages=stages, engine={"world": 8}, guidance={"scale": 3.25})
    header = header_fields(config) | {"ss_network_dim": "4"}
    assert header["ss_total_batch_size"] == "16"
    assert header["ss_optimizer"] == "torchao.optim.AdamW8bit"
    card = model_card("x.safetensors", SPEC, header)
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in card.splitlines()
        if re.match(r"\| [12] ", line)
    ]
    assert rows == [
        ["1", "pcm", "70", "32", "0.001", "0.99"],
        ["2", "dmd2 + GAN", "30", "16", "5e-05", "0.9"],
    ]
    assert "guidance 3.25" in card
    assert "rank 4" in card


def test_the_picture_is_that_of_the_step_or_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "previews"
    assert preview_of(tmp_path, "200") is None
    folder.mkdir()
    for step in (100, 200, 300):
        Image.new("RGB", (4, 4), (step // 2, 0, 0)).save(folder / f"step-{step:06d}.png")
    assert preview_of(tmp_path, "200") == folder / "step-000200.png"
    assert preview_of(tmp_path, "250") == folder / "step-000300.png"
    lora = lora_file(tmp_path / "lora" / "mine.safetensors", ss_steps="200")
    write_release(lora, tmp_path)
    assert Image.open(companions(lora)[2]).getpixel((0, 0))[0] == 100
    assert "](mine.preview.png)" in companions(lora)[0].read_text(encoding="utf-8")


def test_a_run_leaves_them_beside_its_lora(
    small_config: Callable[..., Config], data: object
) -> None:
    config = small_config(name="mine")
    lora = train(config, data=data)  # type: ignore[arg-type]
    card = lora.with_suffix(".md").read_text(encoding="utf-8")
    assert "| 1     |    pcm |     8 |" in card
    assert "# mine" in card


# ----------------------------------------------------------------------------------- the workflow


def nodes_of(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    (node,) = (node for node in graph["nodes"] if node["type"] == kind)
    return node


@pytest.fixture(params=[QWEN, "Qwen/Qwen-Image", BASE_NAME, "/models/Qwen-Image-2512"])
def graph(request: pytest.FixtureRequest) -> dict[str, Any]:
    spec = TurboSpec((1.0, 0.8, 0.4, 0.0), base=request.param, resolutions=((96, 64),))
    made = workflow_for(spec, "my_lora.safetensors")
    assert made is not None
    return made


def test_it_names_lora_size_and_schedule(graph: dict[str, Any]) -> None:
    assert nodes_of(graph, "TurboDistillLoraLoader")["widgets_values"] == [
        "my_lora.safetensors", 1, "auto", "", "auto", 0, True,
    ]  # fmt: skip
    assert nodes_of(graph, "EmptySD3LatentImage")["widgets_values"][:2] == [96, 64]
    assert nodes_of(graph, "SaveImage")["widgets_values"] == ["turbo-distill/my_lora"]
    text = json.dumps(graph, ensure_ascii=False)
    for other in ("Wuli", "Lightning", "tiny_turbo_2_steps", "0.7155", "Two steps", "Eight steps"):
        assert other not in text
    assert [n["widgets_values"] for n in graph["nodes"] if n["type"] == "TurboDistillInspect"] in (
        [],
        [["my_lora.safetensors"]],
    )
    notes = [n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "MarkdownNote"]
    assert sum("1, 0.8, 0.4, 0" in note for note in notes) == 2  # English and Chinese
    assert any("运行" in note for note in notes)
    for node in graph["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"]
            assert f"[{model['name']}]({model['url']})" in "".join(notes)


def test_its_links_agree_on_both_ends(graph: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    assert graph["last_node_id"] == max(nodes)
    assert graph["last_link_id"] == max(link[0] for link in graph["links"])
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for link, source, out, target, into, kind in graph["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == link
        assert (
            nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind
        )
        assert nodes[source]["order"] < nodes[target]["order"]
    ends = [link for node in nodes.values() for o in node["outputs"] for link in o["links"] or ()]
    assert sorted(ends) == sorted(link[0] for link in graph["links"])


def test_the_lora_sits_between_base_and_sampler(graph: dict[str, Any]) -> None:
    links = {link[0]: link for link in graph["links"]}
    sampler, loader = (
        nodes_of(graph, kind) for kind in ("TurboDistillSampler", "TurboDistillLoraLoader")
    )
    model = next(slot for slot in sampler["inputs"] if slot["name"] == "model")
    assert links[model["link"]][1] == loader["id"]
    base = links[loader["inputs"][0]["link"]][1]
    kind = next(node["type"] for node in graph["nodes"] if node["id"] == base)
    assert kind in ("UNETLoader", "TurboDistillTinyLoader")
    if kind == "TurboDistillTinyLoader":
        assert nodes_of(graph, kind)["widgets_values"] == ["teacher (no LoRA)"]


def test_no_node_covers_another(graph: dict[str, Any]) -> None:
    def box(node: dict[str, Any]) -> tuple[tuple[float, float], ...]:
        (x, y), (width, height) = node["pos"], node["size"]
        return (x, x + width), (y - TITLE_HEIGHT, y + height)

    def overlap(one: Any, other: Any) -> bool:
        return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))

    boxes = [box(node) for node in graph["nodes"]]
    assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
    groups = [
        ((x, x + width), (y, y + height))
        for x, y, width, height in (group["bounding"] for group in graph["groups"])
    ]
    assert not any(overlap(one, other) for one, other in combinations(groups, 2))
    for node in boxes:
        for group in groups:
            inside = all(g[0] <= n[0] and n[1] <= g[1] for n, g in zip(node, group, strict=True))
            assert inside or not overlap(node, group)


def test_each_lora_has_a_graph_of_its_own_and_the_shipped_ones_stay() -> None:
    one, other, again = (workflow_for(SPEC, f"{name}.safetensors") for name in "aba")
    assert one == again
    assert one["id"] != other["id"]


def test_without_a_fitting_graph_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edit = TurboSpec((1.0, 0.0), base="Qwen/Qwen-Image-Edit")
    assert workflow_for(edit, "x.safetensors") is None
    monkeypatch.setattr(workflow, "WORKFLOWS", tmp_path / "none")  # a wheel has no such folder
    lora = lora_file(tmp_path / "mine.safetensors")
    with caplog.at_level("INFO"):
        write_release(lora)
    assert "no workflow" in caplog.text
    assert not companions(lora)[1].exists()
    card = companions(lora)[0].read_text(encoding="utf-8")
    assert "workflow.json" not in card
    assert "**Turbo LoRA Loader**" in card
