"""Stages of a recipe, one class per method: the keys that a stage may have, and their defaults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    field_validator,
    model_validator,
)

from .utils.section import ModelPath, Section

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
INSTALL_TORCHAO = "Install it (pip install 'torchao>=0.18'), or set optimizer: adamw."


class OptimizerSection(Section):
    """AdamW on one set of weights."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bits per state, by torchao
    lr: PositiveFloat = 5e-5
    betas: Betas = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)  # updates with a rising learning rate
    clip: PositiveFloat = 1.0  # gradient norm

    @field_validator("optimizer")
    @classmethod
    def _installed(cls, value: str) -> str:
        # Here and not in hours, when the stage begins
        if value == "adamw8bit" and find_spec("torchao") is None:
            raise ValueError(f"{value} needs torchao, which is not installed. {INSTALL_TORCHAO}")
        return value


class Stage(OptimizerSection):
    """What all methods share; the optimiser's keys are the student's."""

    adapters: ClassVar[tuple[str, ...]] = ("student",)  # LoRAs that the method trains

    method: str
    steps: PositiveInt
    batch: PositiveInt = 1  # samples per rank that are computed together
    accumulate: PositiveInt = 1  # such micro-batches per update
    guidance_scale: float | None = Field(None, ge=1)  # of the teacher here; None: guidance.scale
    ema: float = Field(0.99, ge=0, lt=1)  # decay per step; 0 = off

    @property
    def samples(self) -> int:
        """Per rank and update of the student."""
        return self.batch * self.accumulate

    @model_validator(mode="after")
    def _shares(self) -> Stage:
        """The other roles take all of the student's micro-batches, or every n-th."""
        gan = getattr(self, "gan", None)
        shares = {
            "fake_accumulate": getattr(self, "fake_accumulate", None),
            "gan.accumulate": gan.accumulate if gan else None,
        }
        for key, share in shares.items():
            if share and self.accumulate % share:
                raise ValueError(
                    f"{key}: expected a divisor of accumulate, {self.accumulate} (found {share}), "
                    "for its micro-batches are the student's; null takes all of them"
                )
        return self

    @property
    def label(self) -> str:
        """The stage's name in the finished LoRA's header."""
        return f"{self.method}+gan" if getattr(self, "gan", None) else self.method


class DiscriminatorSection(OptimizerSection):
    """A discriminator: light heads on frozen features, and how its word counts."""

    lr: PositiveFloat = 1e-4
    betas: Betas = (0.0, 0.99)
    accumulate: PositiveInt | None = None  # micro-batches per update; None: all of the student's
    loss: Literal["hinge", "softplus"] = "hinge"
    layers: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # depths of the backbone that get a head
    width: int = Field(128, ge=2)  # channels inside a head; of one alone no norm can be taken
    ratio: float = Field(0.3, gt=0)  # size of its gradient at x0 over that of the main loss
    by_accuracy: StrictBool = False  # times 2 accuracy - 1: nothing where it guesses
    weight: PositiveFloat | None = None  # a fixed weight instead
    ramp: PositiveInt = 500  # student updates over which it rises to full weight
    r1_gamma: float = Field(
        0.5, ge=0
    )  # penalty gamma / 2 |grad D|^2 (Mescheder et al. 2018), 0: off
    r1_weight: float | None = Field(
        None, ge=0
    )  # in its place, lambda |D(x) - D(x + noise)|^2 (APT)
    r1_sigma: PositiveFloat = 0.05  # of the noise that estimates it, in units of what is judged

    @property
    def r1_lambda(self) -> float:
        """Factor of |D(x) - D(x + sigma noise)|^2, which is about sigma^2 |grad D|^2. APT's 100 at
        sigma .01 is gamma .02.
        """
        if self.r1_weight is not None:
            return self.r1_weight
        return self.r1_gamma / (2 * self.r1_sigma**2)

    @model_validator(mode="after")
    def _depths(self) -> DiscriminatorSection:
        if not self.layers or not all(0 < depth <= 1 for depth in self.layers):
            raise ValueError(
                "layers: expected depths above 0 and up to 1, 1 being the last block "
                f"(found {list(self.layers)})"
            )
        return self


Augmentation = Literal["flip", "translate", "colour", "cutout"]


class GANSection(DiscriminatorSection):
    """The adversarial term of `dmd2`.

    features: a DINOv2 or DINOv3 model (folder or hub id), which judges decoded image crops;
    "latent": the frozen base model's blocks, which judge noised latents; "pixels": a small network
    trained from scratch on crops, without any download.
    """

    features: ModelPath = "facebook/dinov2-with-registers-base"
    updates: PositiveInt = 1  # of the discriminator per student update
    last_step_only: StrictBool = (
        True  # judge x0 of the sampler's last step alone, where it is an image
    )
    real_ratio: float = Field(1.0, ge=0, le=1)  # share of real images; the rest is the teacher's
    draw_teacher: StrictBool = False  # without cached ones: draw the teacher's in every update
    teacher_steps: PositiveInt = 40  # guided steps that such a drawing takes
    teacher_shift: PositiveFloat = 3.0  # and the shift of their schedule
    crop: PositiveInt = 48  # latents per side that are decoded, halo included
    halo: int = Field(6, ge=0)  # latents per side that are decoded and cut off again
    crops: PositiveInt = 1  # per image
    augment: tuple[Augmentation, ...] = ("translate", "colour", "cutout")  # flip mirrors text
    t_mean: float = -0.6  # "latent": noise level, logit-normal
    t_std: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _something_is_left(self) -> GANSection:
        if self.crop <= 2 * self.halo:
            raise ValueError(
                f"crop, halo: expected crop above 2 * halo (found {self.crop} and {self.halo})"
            )
        return self


class TrajectoryStage(Stage):
    """Methods that copy the teacher's path: one student step lands where its guided ODE lands."""

    solver_steps: PositiveInt = 1  # teacher Euler steps from one grid point to the next
    distance: Literal["huber", "squared"] = "huber"
    huber: PositiveFloat = 0.1  # c of the pseudo-Huber distance


class PCMStage(TrajectoryStage):
    """Phased consistency (Wang et al. 2024): the phases are the intervals between the spec's
    sigmas. `gan`: adversarial consistency on the teacher's features.
    """

    method: Literal["pcm"]
    points: PositiveInt = 16  # grid points per phase
    target: Literal["student", "ema"] = "student"
    gan: DiscriminatorSection | None = None


class ConsistencyStage(TrajectoryStage):
    """Consistency distillation (Song et al. 2023): one phase, every point of a trajectory maps to
    its x0. A baseline.
    """

    method: Literal["consistency"]
    points: PositiveInt = 32  # grid points from the first sigma to 0
    target: Literal["student", "ema"] = "student"


class ProgressiveStage(TrajectoryStage):
    """Progressive distillation (Salimans & Ho 2022) in one round: a student step lands where
    `solver_steps` teacher steps land. A baseline.
    """

    method: Literal["progressive"]
    solver_steps: PositiveInt = 8  # teacher Euler steps per interval between sigmas


class DMD2Stage(Stage):
    """Distribution matching (Yin et al. 2024) on the student's own samples; with `gan` also
    adversarial. Keys that begin with fake_ belong to the fake score.
    """

    adapters: ClassVar[tuple[str, ...]] = ("student", "fake")

    method: Literal["dmd2"]
    betas: Betas = (0.0, 0.999)
    gradient_step: Literal["random", "last"] = "random"  # sampler step that gets the gradient
    t_min: float = Field(0.02, ge=0, le=1)  # times of the two scores: between these after `shift`,
    t_max: float = Field(0.98, ge=0, le=1)
    shift: PositiveFloat = 3.0  # before which they are uniform
    fake_lr: PositiveFloat = 2e-5
    fake_betas: Betas = (0.0, 0.999)
    fake_accumulate: PositiveInt | None = None  # micro-batches per update; None: all
    fake_updates: PositiveInt = 5  # per student update
    fake_warmup: int = Field(200, ge=0)  # student updates that begin the stage with more of them:
    fake_warmup_updates: PositiveInt = 20
    fake_init: Literal["student", "base", "keep"] = "student"  # keep: as the stage before left it
    fake_samples: Literal["fresh", "reuse"] = "fresh"  # new samples for each update, or one for all
    fake_shift: PositiveFloat = 3.0  # of its training times, uniform over [0, 1) before
    ida: float | None = Field(None, ge=0, le=1)  # fake <- ida fake + (1 - ida) student (SenseFlow)
    decoupled: StrictBool = False  # Decoupled-DMD: guidance and matching at times of their own
    diversity: float = Field(0.0, ge=0)  # weight of the first step's regression (DP-DMD)
    diversity_steps: PositiveInt = 5  # guided teacher steps to its target
    gan: GANSection | None = None

    @model_validator(mode="after")
    def _times(self) -> DMD2Stage:
        if self.t_min >= self.t_max:
            raise ValueError(
                f"t_min, t_max: expected t_min below t_max (found {self.t_min} and {self.t_max})"
            )
        return self

    @property
    def fake(self) -> OptimizerSection:
        """The fake score's optimiser."""
        return OptimizerSection(
            optimizer=self.optimizer,
            lr=self.fake_lr,
            betas=self.fake_betas,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
        )


AnyStage = Annotated[
    PCMStage | ConsistencyStage | ProgressiveStage | DMD2Stage, Field(discriminator="method")
]

STAGES = tuple(get_args(get_args(AnyStage)[0]))
STAGE_METHODS = tuple(get_args(stage.model_fields["method"].annotation)[0] for stage in STAGES)


def stage_ranges(stages: Sequence[AnyStage]) -> Iterator[tuple[AnyStage, int, int]]:
    """Every stage with the number of updates done before it and after it."""
    begin = 0
    for stage in stages:
        yield stage, begin, begin + stage.steps
        begin += stage.steps


def check_teacher_images(stages: Sequence[AnyStage], cached: int) -> None:
    """Raises ValueError where a stage would draw `teacher_steps` guided steps in every update and
    does not say that it means to. cached: images by the teacher that the data holds.
    """
    for i, stage in enumerate(stages):
        gan = getattr(stage, "gan", None)
        if not isinstance(gan, GANSection) or gan.real_ratio == 1 or cached or gan.draw_teacher:
            continue
        raise ValueError(
            f"stages.{i}.gan.real_ratio: expected 1 where no images by the teacher are cached "
            f"(found {gan.real_ratio:g}): {gan.teacher_steps} guided steps, "
            f"{2 * gan.teacher_steps} forwards per sample, would draw them in every update. Set "
            "data.teacher_images and run `turbo-distill prepare`, real_ratio: 1, or "
            f"stages.{i}.gan.draw_teacher: true to pay that price."
        )
