"""Options of a recipe that contradict each other, or of which one does nothing beside the other.

All of this is known when the recipe is read, and would crash, or be in vain, in a stage that
begins hours later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .stages import AnyStage, DiscriminatorSection, DMD2Stage


def conflicts(
    stages: Sequence[AnyStage], rank: int, fake_rank: int | None, steps: int
) -> Iterator[str]:
    """What cannot be: keys, expected and found, and the way out. steps: of the spec."""
    fake_before = False  # whether an earlier stage has trained the fake score
    for i, stage in enumerate(stages):
        where = f"stages.{i}"
        if getattr(stage, "target", "student") == "ema" and not stage.ema:
            yield (
                f"{where}.target: expected student (found ema) with ema 0, for there is no moving "
                f"average to learn from; set {where}.ema, e.g. 0.99"
            )
        if isinstance(stage, DMD2Stage):
            yield from _fake_score(stage, where, rank, fake_rank or rank, fake_before)
            fake_before = True
            if stage.diversity and steps == 1:
                yield (
                    f"{where}.diversity: expected 0 (found {stage.diversity:g}) with a schedule of "
                    "one step, for it is about the first of several"
                )
        gan = getattr(stage, "gan", None)
        if gan is not None:
            yield from _discriminator(gan, f"{where}.gan")


def _fake_score(
    stage: DMD2Stage, where: str, rank: int, fake_rank: int, before: bool
) -> Iterator[str]:
    if stage.fake_init == "student" and fake_rank < rank:
        yield (
            f"adapter.fake_rank: expected at least adapter.rank, {rank} (found {fake_rank}), with "
            f"{where}.fake_init student, which copies the student; raise it, or set "
            f"{where}.fake_init=base"
        )
    if stage.fake_init == "keep" and not before:
        yield (
            f"{where}.fake_init: expected student or base (found keep) in the first dmd2 stage, "
            "for no stage before it has a fake score to keep"
        )
    if stage.ida is not None and fake_rank != rank:
        yield (
            f"{where}.ida: expected null (found {stage.ida:g}) with adapter.fake_rank {fake_rank} "
            f"and adapter.rank {rank}, for it averages the two weight by weight; set "
            f"adapter.fake_rank=null, or {where}.ida=null"
        )


def _discriminator(gan: DiscriminatorSection, where: str) -> Iterator[str]:
    usual = DiscriminatorSection.model_fields["ratio"].default
    if gan.weight is not None and gan.ratio != usual:
        yield (
            f"{where}.weight: expected null (found {gan.weight:g}) with {where}.ratio "
            f"{gan.ratio:g}: the one replaces the other; set {where}.weight=null, or leave out "
            f"{where}.ratio"
        )
